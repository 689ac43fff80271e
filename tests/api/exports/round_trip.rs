//! Exporting, importing into another server, and exporting again yields the same file.

use issue_tracker::pb::{BatchCreateIssuesRequest, Label};

use super::*;

/// Character sequences that CSV writers, CSV readers and PostgreSQL `COPY` are likely to alter.
const FRAGMENTS: &[&str] = &[
    " ", "  ", "\t", "\n", "\r", "\r\n", "\n\n", "\"", "\"\"", ",", ";", "'", "=", "-", "\\", "\\.", "\\n", "\u{feff}",
    "\u{85}", "\u{a0}", "\u{2028}", "\u{1}", "\u{7f}", "é", "e\u{301}", "😀", "x", "NULL", "null", "#", "title", "0",
    "{}",
];

/// Distinct labels, some of which a case mapping other than PostgreSQL's would make equal.
const LABELS: &[&str] = &[
    "bug",
    "a, b",
    "say \"no\"",
    "two\nlines",
    "=1",
    "'",
    "ΑΣ",
    "ας",
    "İ",
    "i\u{307}",
    "ß",
    "SS",
    "é",
    "e\u{301}",
    "\u{feff}x",
    "x\ry",
    "0",
    "\\.",
];

/// A linear congruential generator (Knuth's MMIX), deterministic for a given seed.
struct Random(u64);

impl Random {
    fn below(&mut self, bound: usize) -> usize {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) as usize % bound
    }

    fn text(&mut self) -> String {
        (0..self.below(6)).map(|_| FRAGMENTS[self.below(FRAGMENTS.len())]).collect()
    }

    /// Returns a text that is not blank.
    fn non_blank_text(&mut self) -> String {
        loop {
            let text = self.text();
            if !text.trim().is_empty() {
                return text;
            }
        }
    }

    fn issue(&mut self, tracker: &Tracker, labels: &[Label], number: usize) -> Issue {
        let users = ["", &tracker.admin.user.id, &tracker.member.user.id];
        let external_id = match self.below(3) {
            0 => String::new(),
            1 => format!("{number}{}", self.text()),
            _ => format!("{}{number}", self.text()),
        };
        let first = self.below(labels.len());
        let label_count = self.below(5).min(labels.len() - first);
        Issue {
            title: self.non_blank_text(),
            description: self.text(),
            status: (1 + self.below(3)) as i32,
            priority: self.below(5) as i32,
            assignee_id: users[self.below(3)].to_owned(),
            external_id,
            label_ids: labels[first..first + label_count].iter().map(|label| label.id.clone()).collect(),
            ..Default::default()
        }
    }
}

async fn create_labels(client: &Client, names: impl Iterator<Item = &'static str>) -> Vec<Label> {
    let mut labels = Vec::new();
    for name in names {
        labels.push(client.label(name).await);
    }
    labels
}

#[tokio::test]
async fn re_exported_file_is_identical_byte_for_byte() {
    let tracker = Tracker::start().await;
    let existing_labels = create_labels(&tracker.member, LABELS.iter().copied()).await;
    for seed in 0..5 {
        let mut random = Random(seed);
        let issues = (0..100).map(|n| random.issue(&tracker, &existing_labels, n + 100 * seed as usize)).collect();
        // All issues of a batch have the same create_time.
        let batch = BatchCreateIssuesRequest { issues, ..Default::default() };
        tracker.member.issues().batch_create_issues(batch).await.unwrap();
    }
    for file in [
        "title,create_time,status,close_time\nold,1970-01-01T00:00:00Z,closed,9999-12-31T23:59:59.999999Z\n",
        "title,create_time\n\u{feff}mark,2024-02-29T23:59:59.000001Z\nsame time,2024-02-29T23:59:59.000001Z\n",
    ] {
        import(&tracker.member, file).await;
    }
    let deleted = tracker.member.file("deleted").await;
    delete(&tracker.member, &deleted.id).await;
    let all = ExportIssuesRequest { show_deleted: true, ..Default::default() };
    let first = export_as(&tracker.viewer, all.clone()).await.unwrap();
    assert_eq!(rows(&first).len(), 504);

    let other = Tracker::start().await;
    create_labels(&other.member, LABELS.iter().rev().copied()).await;
    import(&other.member, &first).await;

    let second = export_as(&other.viewer, all).await.unwrap();
    for (before, after) in rows(&first).into_iter().zip(rows(&second)) {
        assert_eq!(before, after);
    }
    assert!(first == second, "the rows are equal but the bytes differ");
}

/// Uses 6,000 issues per `create_time`; an import writes batches of 5,000 rows.
#[tokio::test]
async fn issues_with_equal_create_time_keep_their_order_across_import_batches() {
    let tracker = Tracker::start().await;
    let insert = "INSERT INTO issues (id, reporter_id, status, priority, title, description, create_time)
        SELECT ('0190' || lpad(to_hex(n), 8, '0') || '70008000000000000000')::uuid, id, 1, 0, 'issue ' || n, '',
            timestamptz '2024-05-17 08:30:00' + n / 6000 * interval '1 microsecond'
        FROM users, generate_series(1, 12000) n WHERE username = 'member'";
    tracker.sql(insert, &[]).await;
    let first = export(&tracker.viewer).await;
    assert_eq!(titles(&first), (1..=12_000).map(|n| format!("issue {n}")).collect::<Vec<_>>());

    let other = Tracker::start().await;
    import(&other.member, &first).await;

    assert!(export(&other.viewer).await == first, "the order of the issues differs");
    let list = ListIssuesRequest { page_size: 1, ..Default::default() };
    let newest = other.viewer.issues().list_issues(list).await.unwrap().into_inner().issues.remove(0);
    assert_eq!(newest.title, "issue 12000");
}
