//! The users and labels that rows refer to by name.

use std::collections::{HashMap, HashSet};

use uuid::Uuid;

use super::Conn;
use crate::{
    csv::ImportRow,
    db::labels,
    error::{Error, Result},
};

/// The maximum number of usernames, and of labels, cached during an import.
const CACHED_NAMES_MAX: usize = 10_000;

/// Returns the id of the user with this name, in any case.
pub(super) async fn find_user(db: &Conn, username: &str) -> Result<Option<Uuid>> {
    let mut users = HashMap::new();
    look_up_users(db, &mut users, HashSet::from([username])).await?;
    Ok(users.into_values().next().flatten())
}

/// Ids by name, cached for the batches of an import. `None` means that the name does not exist.
#[derive(Default)]
pub(super) struct References {
    users: HashMap<String, Option<Uuid>>,
    labels: HashMap<String, Option<Uuid>>,
    /// Whether the transaction has created labels.
    has_created_labels: bool,
}

impl References {
    pub fn clear(&mut self) {
        *self = Self::default();
    }

    /// Fails with `QuotaExceeded` if the transaction has created labels and there are too many. Call it last before the
    /// commit.
    pub async fn check_label_count(&mut self, db: &Conn, labels_max: i64) -> Result<()> {
        match std::mem::take(&mut self.has_created_labels) {
            true => labels::check_count(db, labels_max).await,
            false => Ok(()),
        }
    }

    /// Looks up all names in the rows.
    pub async fn look_up(&mut self, db: &Conn, rows: &[ImportRow]) -> Result<()> {
        for cache in [&mut self.users, &mut self.labels] {
            if cache.len() > CACHED_NAMES_MAX {
                cache.clear();
            }
        }
        let usernames = rows.iter().filter_map(|row| row.assignee.as_deref()).collect();
        look_up_users(db, &mut self.users, usernames).await?;
        let labels = rows.iter().flat_map(|row| row.labels.iter().map(String::as_str)).collect();
        look_up_labels(db, &mut self.labels, labels).await
    }

    /// Returns the user with this name. The name must have been looked up.
    pub fn user_id(&self, username: &str) -> Option<Uuid> {
        self.users.get(username).copied().flatten()
    }

    /// Returns the label with this name. The name must have been looked up.
    pub fn label_id(&self, name: &str) -> Option<Uuid> {
        self.labels.get(name).copied().flatten()
    }

    /// Returns the ids of a row's labels, without duplicates. Fails with a `CONFLICT` if a label that was found before does
    /// not exist any more.
    pub fn label_ids(&self, row: &ImportRow) -> Result<Vec<Uuid>> {
        let mut ids: Vec<Uuid> = Vec::with_capacity(row.labels.len());
        for name in &row.labels {
            let id = self.label_id(name).ok_or_else(references_changed)?;
            // Names can differ in a way that only the database's lower case ignores.
            if !ids.contains(&id) {
                ids.push(id);
            }
        }
        Ok(ids)
    }

    /// Creates the labels that do not exist, and looks them up. Fails with `QuotaExceeded` if there are too many already;
    /// the transaction must end with [`Self::check_label_count`].
    pub async fn create_labels(&mut self, db: &Conn, labels_max: i64, names: impl Iterator<Item = &str>) -> Result<()> {
        // Sorted, so that two imports that create the same labels do not deadlock.
        const SQL: &str = "-- create_labels
            INSERT INTO labels (id, name)
            SELECT DISTINCT ON (lower(n.name)) n.id, n.name
            FROM unnest($1::uuid[], $2::text[]) WITH ORDINALITY AS n (id, name, position)
            ORDER BY lower(n.name), n.position
            LIMIT $3
            ON CONFLICT DO NOTHING";
        let mut seen = HashSet::new();
        let missing: Vec<&str> =
            names.filter(|name| self.labels.get(*name) == Some(&None) && seen.insert(*name)).collect();
        if missing.is_empty() {
            return Ok(());
        }
        let ids: Vec<Uuid> = missing.iter().map(|_| Uuid::now_v7()).collect();
        // More would fail anyway. A batch can name half a million.
        let created_max = labels_max + 1;
        if db.execute(SQL, &[&ids, &missing, &created_max]).await? > 0 {
            self.has_created_labels = true;
            labels::check_visible_count(db, labels_max).await?;
        }
        for name in &missing {
            self.labels.remove(*name);
        }
        look_up_labels(db, &mut self.labels, seen).await
    }
}

/// The error of a batch whose references changed after their lookup. The batch is attempted again.
pub(super) fn references_changed() -> Error {
    Error::Aborted {
        reason: "CONFLICT",
        message: "issues or labels of the batch changed concurrently; retry the batch".to_owned(),
    }
}

async fn look_up_users(db: &Conn, cache: &mut HashMap<String, Option<Uuid>>, names: HashSet<&str>) -> Result<()> {
    const SQL: &str = "-- import_users
        SELECT n.name, u.id
        FROM unnest($1::text[]) AS n (name) JOIN users u ON lower(u.username) = lower(n.name)";
    look_up(db, SQL, cache, names).await
}

async fn look_up_labels(db: &Conn, cache: &mut HashMap<String, Option<Uuid>>, names: HashSet<&str>) -> Result<()> {
    const SQL: &str = "-- import_labels
        SELECT n.name, l.id
        FROM unnest($1::text[]) AS n (name) JOIN labels l ON lower(l.name) = lower(n.name)
        WHERE l.delete_actor_id IS NULL";
    look_up(db, SQL, cache, names).await
}

/// Looks up the names that are not cached.
async fn look_up(
    db: &Conn,
    sql: &'static str,
    cache: &mut HashMap<String, Option<Uuid>>,
    names: HashSet<&str>,
) -> Result<()> {
    let unknown: Vec<&str> = names.into_iter().filter(|name| !cache.contains_key(*name)).collect();
    if unknown.is_empty() {
        return Ok(());
    }
    for row in db.query(sql, &[&unknown]).await? {
        cache.insert(row.get("name"), Some(row.get("id")));
    }
    for name in unknown {
        cache.entry(name.to_owned()).or_insert(None);
    }
    Ok(())
}
