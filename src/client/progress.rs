//! Progress on standard error: a bar on a terminal, else a line every few seconds.

use std::time::{Duration, Instant};

use indicatif::{HumanBytes, HumanCount, HumanDuration, ProgressBar, ProgressStyle};

use super::eprint_line;
use crate::config::terminal::is_stderr_styled;

const LINE_INTERVAL: Duration = Duration::from_secs(5);
const BAR_TICK: Duration = Duration::from_millis(200);

#[derive(Clone, Copy, Default)]
pub struct Position {
    pub bytes: u64,
    pub rows: u64,
    pub rejected: u64,
    /// Rows that are processed in the [second phase](Progress::set_second_phase).
    pub processed: u64,
}

pub struct Progress {
    shown: Shown,
    total_bytes: Option<u64>,
    /// What is counted: `row` or `issue`.
    noun: &'static str,
    /// What happens to the rows once all are received: `written` or `checked`.
    second_phase: Option<&'static str>,
    began: Instant,
    /// The position at `began`; `None` before the first update.
    first: Option<Position>,
    last: Position,
    /// When the second phase began, while it lasts.
    second_phase_began: Option<Instant>,
}

enum Shown {
    /// A bar of bytes or, in the second phase, of rows.
    Bar(ProgressBar),
    Lines {
        last: Instant,
    },
    Nothing,
}

impl Progress {
    /// Shows progress on standard error: as a bar if it is a terminal and `NO_COLOR` is not set, else as lines.
    pub fn new(noun: &'static str) -> Self {
        let shown =
            if is_stderr_styled() { Shown::Bar(bytes_bar(None)) } else { Shown::Lines { last: Instant::now() } };
        Self { shown, ..Self::silent(noun) }
    }

    /// Shows nothing but messages.
    pub fn silent(noun: &'static str) -> Self {
        Self {
            shown: Shown::Nothing,
            total_bytes: None,
            noun,
            second_phase: None,
            began: Instant::now(),
            first: None,
            last: Position::default(),
            second_phase_began: None,
        }
    }

    /// Sets what happens to the rows once all are received: they are `written` or `checked`.
    pub fn set_second_phase(&mut self, second_phase: &'static str) {
        self.second_phase = Some(second_phase);
    }

    /// Sets the size of the file.
    pub fn set_total_bytes(&mut self, total_bytes: u64) {
        self.total_bytes = Some(total_bytes);
        self.replace_bar(bytes_bar(Some(total_bytes)));
    }

    fn replace_bar(&mut self, bar: ProgressBar) {
        if let Shown::Bar(shown) = &mut self.shown {
            shown.finish_and_clear();
            *shown = bar;
        }
    }

    /// Shows a new position.
    pub fn update(&mut self, position: Position) {
        if self.first.is_none() {
            self.first = Some(position);
            self.began = Instant::now();
        }
        self.last = position;
        self.enter_phase();
        let text = self.rows_text();
        let in_second_phase = self.second_phase_began.is_some();
        match &mut self.shown {
            Shown::Bar(bar) => {
                bar.set_position(if in_second_phase { position.processed } else { position.bytes });
                bar.set_message(text);
            }
            Shown::Lines { last } if last.elapsed() >= LINE_INTERVAL => {
                *last = Instant::now();
                let done = match self.second_phase_began {
                    Some(began) => {
                        format!("{}%", percent(position.processed, position.rows))
                            + &left_text(
                                position.processed,
                                position.rows,
                                began.elapsed(),
                                self.first.unwrap_or_default().processed,
                            )
                    }
                    None => bytes_text(position.bytes, self.total_bytes, self.began.elapsed(), self.first),
                };
                eprint_line(&format!("{text}, {done}"));
            }
            Shown::Lines { .. } | Shown::Nothing => {}
        }
    }

    /// Enters the second phase with the first processed row, and leaves it when the file is sent again.
    fn enter_phase(&mut self) {
        let in_second_phase =
            self.second_phase.is_some() && self.last.processed > self.first.unwrap_or_default().processed;
        if in_second_phase != self.second_phase_began.is_some() {
            self.second_phase_began = in_second_phase.then(Instant::now);
            let bar = if in_second_phase { rows_bar(self.last.rows) } else { bytes_bar(self.total_bytes) };
            self.replace_bar(bar);
        }
    }

    /// Prints a line, above the bar if there is one.
    pub fn message(&self, line: &str) {
        match &self.shown {
            Shown::Bar(bar) => bar.suspend(|| eprint_line(line)),
            Shown::Lines { .. } | Shown::Nothing => eprint_line(line),
        }
    }

    /// Removes the bar.
    pub fn clear(&self) {
        if let Shown::Bar(bar) = &self.shown {
            bar.finish_and_clear();
        }
    }

    /// Removes the bar and prints the totals.
    pub fn finish(&mut self) {
        self.clear();
        // The totals are those of both phases together.
        self.second_phase = None;
        self.second_phase_began = None;
        if !matches!(self.shown, Shown::Nothing) {
            let bytes = HumanBytes(self.last.bytes);
            eprint_line(&format!("{}, {bytes} in {}", self.rows_text(), HumanDuration(self.began.elapsed())));
        }
    }

    fn rows_text(&self) -> String {
        let Position { rows, rejected, processed, .. } = self.last;
        let first = self.first.unwrap_or_default();
        let mut text = format!("{} {}{}", HumanCount(rows), self.noun, if rows == 1 { "" } else { "s" });
        let (mut new, mut began) = (rows.saturating_sub(first.rows), self.began);
        if let Some(second_phase) = self.second_phase {
            text += " received";
            if let Some(second_phase_began) = self.second_phase_began {
                text += &format!(", {} {second_phase}", HumanCount(processed));
                (new, began) = (processed.saturating_sub(first.processed), second_phase_began);
            }
        }
        // A rate over less than a second is meaningless.
        let elapsed = began.elapsed().as_secs_f64().max(1.0);
        text += &format!(", {} a second", HumanCount((new as f64 / elapsed) as u64));
        if rejected > 0 {
            text += &format!(", {} rejected", HumanCount(rejected));
        }
        text
    }
}

fn bytes_bar(total_bytes: Option<u64>) -> ProgressBar {
    match total_bytes {
        Some(total) => bar(ProgressBar::new(total), "{bar:25} {percent}%  {bytes} of {total_bytes}  {msg}  {eta} left"),
        None => bar(ProgressBar::no_length(), "{spinner} {bytes}  {msg}"),
    }
}

fn rows_bar(rows: u64) -> ProgressBar {
    bar(ProgressBar::new(rows), "{bar:25} {percent}%  {msg}  {eta} left")
}

fn bar(bar: ProgressBar, template: &str) -> ProgressBar {
    if let Ok(style) = ProgressStyle::with_template(template) {
        bar.set_style(style.progress_chars("=> "));
    }
    bar.enable_steady_tick(BAR_TICK);
    bar
}

fn bytes_text(bytes: u64, total: Option<u64>, elapsed: Duration, first: Option<Position>) -> String {
    let Some(total) = total.filter(|total| *total > 0) else {
        return HumanBytes(bytes).to_string();
    };
    let text = format!("{} of {} ({}%)", HumanBytes(bytes), HumanBytes(total), percent(bytes, total));
    text + &left_text(bytes, total, elapsed, first.unwrap_or_default().bytes)
}

fn percent(done: u64, total: u64) -> u64 {
    (done as f64 / total.max(1) as f64 * 100.0) as u64
}

/// Returns the time left, estimated from what was done since `first`; empty if nothing was.
fn left_text(done: u64, total: u64, elapsed: Duration, first: u64) -> String {
    let new = done.saturating_sub(first);
    if new == 0 {
        return String::new();
    }
    let left = elapsed.as_secs_f64() / new as f64 * total.saturating_sub(done) as f64;
    format!(", {} left", HumanDuration(Duration::from_secs_f64(left)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_time_left_is_estimated_from_the_bytes_since_the_start() {
        let first = Some(Position { bytes: 500_000, ..Position::default() });
        let text = bytes_text(750_000, Some(1_000_000), Duration::from_secs(10), first);
        assert_eq!(text, "732.42 KiB of 976.56 KiB (75%), 10 seconds left");
        assert_eq!(bytes_text(512, None, Duration::from_secs(10), first), "512 B");
    }

    #[test]
    fn rows_are_shown_with_their_rate_and_the_rejected_rows() {
        let mut progress = Progress::silent("row");
        assert_eq!(progress.rows_text(), "0 rows, 0 a second");
        progress.update(Position { bytes: 10, rows: 1_000_000, ..Position::default() });
        progress.update(Position { bytes: 20, rows: 1_234_567, rejected: 1_200, processed: 0 });
        assert_eq!(progress.rows_text(), "1,234,567 rows, 234,567 a second, 1,200 rejected");
    }

    #[test]
    fn rows_that_are_written_after_all_are_received_have_a_rate_of_their_own() {
        let mut progress = Progress::silent("row");
        progress.set_second_phase("written");
        let mut position = Position::default();
        progress.update(position);
        position.rows = 1_000_000;
        progress.update(position);
        assert_eq!(progress.rows_text(), "1,000,000 rows received, 1,000,000 a second");
        position.processed = 400_000;
        progress.update(position);
        assert_eq!(progress.rows_text(), "1,000,000 rows received, 400,000 written, 400,000 a second");
        // The file is sent again.
        progress.update(Position { rows: 5_000, ..Position::default() });
        assert_eq!(progress.rows_text(), "5,000 rows received, 5,000 a second");
        position.processed = position.rows;
        progress.update(position);
        progress.finish();
        assert_eq!(progress.rows_text(), "1,000,000 rows, 1,000,000 a second");
    }
}
