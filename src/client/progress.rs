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
}

pub struct Progress {
    shown: Shown,
    total_bytes: Option<u64>,
    /// What is counted: `row` or `issue`.
    noun: &'static str,
    began: Instant,
    /// The position at `began`; `None` before the first update.
    first: Option<Position>,
    last: Position,
}

enum Shown {
    Bar(ProgressBar),
    Lines { last: Instant },
    Nothing,
}

impl Progress {
    /// Shows progress on standard error: as a bar if it is a terminal and `NO_COLOR` is not set, else as lines.
    pub fn new(noun: &'static str) -> Self {
        let shown = if is_stderr_styled() { Shown::Bar(bar(None)) } else { Shown::Lines { last: Instant::now() } };
        Self { shown, ..Self::silent(noun) }
    }

    /// Shows nothing but messages.
    pub fn silent(noun: &'static str) -> Self {
        Self {
            shown: Shown::Nothing,
            total_bytes: None,
            noun,
            began: Instant::now(),
            first: None,
            last: Position::default(),
        }
    }

    /// Sets the size of the file.
    pub fn set_total_bytes(&mut self, total_bytes: u64) {
        self.total_bytes = Some(total_bytes);
        if let Shown::Bar(shown) = &mut self.shown {
            shown.finish_and_clear();
            *shown = bar(Some(total_bytes));
        }
    }

    /// Shows a new position.
    pub fn update(&mut self, position: Position) {
        if self.first.is_none() {
            self.first = Some(position);
            self.began = Instant::now();
        }
        self.last = position;
        let text = self.rows_text();
        match &mut self.shown {
            Shown::Bar(bar) => {
                bar.set_position(position.bytes);
                bar.set_message(text);
            }
            Shown::Lines { last } if last.elapsed() >= LINE_INTERVAL => {
                *last = Instant::now();
                let bytes = bytes_text(position.bytes, self.total_bytes, self.began.elapsed(), self.first);
                eprint_line(&format!("{text}, {bytes}"));
            }
            Shown::Lines { .. } | Shown::Nothing => {}
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
    pub fn finish(&self) {
        self.clear();
        if !matches!(self.shown, Shown::Nothing) {
            let bytes = HumanBytes(self.last.bytes);
            eprint_line(&format!("{}, {bytes} in {}", self.rows_text(), HumanDuration(self.began.elapsed())));
        }
    }

    fn rows_text(&self) -> String {
        let Position { rows, rejected, .. } = self.last;
        let new = rows.saturating_sub(self.first.unwrap_or_default().rows);
        // A rate over less than a second is meaningless.
        let elapsed = self.began.elapsed().as_secs_f64().max(1.0);
        let rate = HumanCount((new as f64 / elapsed) as u64);
        let mut text =
            format!("{} {}{}, {rate} a second", HumanCount(rows), self.noun, if rows == 1 { "" } else { "s" });
        if rejected > 0 {
            text += &format!(", {} rejected", HumanCount(rejected));
        }
        text
    }
}

fn bar(total_bytes: Option<u64>) -> ProgressBar {
    let (bar, template) = match total_bytes {
        Some(total) => (ProgressBar::new(total), "{bar:25} {percent}%  {bytes} of {total_bytes}  {msg}  {eta} left"),
        None => (ProgressBar::no_length(), "{spinner} {bytes}  {msg}"),
    };
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
    let percent = (bytes as f64 / total as f64 * 100.0) as u64;
    let mut text = format!("{} of {} ({percent}%)", HumanBytes(bytes), HumanBytes(total));
    let new = bytes.saturating_sub(first.unwrap_or_default().bytes);
    if new > 0 {
        let left = elapsed.as_secs_f64() / new as f64 * total.saturating_sub(bytes) as f64;
        text += &format!(", {} left", HumanDuration(Duration::from_secs_f64(left)));
    }
    text
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
        progress.update(Position { bytes: 10, rows: 1_000_000, rejected: 0 });
        progress.update(Position { bytes: 20, rows: 1_234_567, rejected: 1_200 });
        assert_eq!(progress.rows_text(), "1,234,567 rows, 234,567 a second, 1,200 rejected");
    }
}
