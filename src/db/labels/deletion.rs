//! Deleting a label, and removing it from the issues that have it.
//!
//! That takes several transactions, so that none locks many issues or runs for long. The first one marks the label, and no
//! call uses it from then on. The following ones remove it from up to [`ISSUES_PER_STEP_MAX`] issues each. The last one finds
//! that no issue has it, and deletes it. If the call ends before, a retry or [`resume_deletion`] continues.

use prost::Message;
use tokio_postgres::Row;
use uuid::Uuid;

use crate::{
    db::{
        conn::Conn,
        idempotency::{
            IdempotencyKey, MutationOptions, Step, StoredResponse, store_response_of_other_call, stored_response,
        },
        pool::Db,
        transaction::Tx,
    },
    error::{Error, Result},
    pb::DeleteLabelResponse,
};

/// From how many issues one transaction removes a label.
const ISSUES_PER_STEP_MAX: i64 = 1_000;
/// Up to how many issues an error counts.
const COUNTED_ISSUES_MAX: i64 = 1_000;
/// After how long without a step a deletion counts as interrupted. A step waits at most 5 s for a lock.
const INTERRUPTED_AFTER_SECONDS: f64 = 30.0;

/// Deletes a label, and with `force` removes it from the issues that have it. If the label is being deleted already,
/// continues with that.
///
/// Fails with `LABEL_IN_USE` if issues have the label, without `force`. The response counts the issues.
pub async fn delete(
    db: &Db,
    caller_id: Uuid,
    options: MutationOptions,
    label_id: Uuid,
    force: bool,
) -> Result<DeleteLabelResponse> {
    let mut deletion = Deletion { label_id, caller_id, options, force, progress: Progress::default() };
    loop {
        match db.mutate_step(caller_id, options, async |tx| deletion.step(tx).await).await {
            Ok(Step::Done(mutated)) => return Ok(mutated.response),
            Ok(Step::Continue(progress)) => deletion.progress = progress,
            Err(Error::LockTimeout) if deletion.progress.mark.is_some() => return Err(interrupted()),
            Err(error) => return Err(error),
        }
    }
}

fn interrupted() -> Error {
    Error::Aborted {
        reason: "CONFLICT",
        message: "concurrent requests hold locks; the server continues the deletion later, a retry does so now"
            .to_owned(),
    }
}

/// Completes an interrupted deletion. Returns the label's id, or `None` if there is none. Replicas that do this concurrently
/// choose different labels.
pub async fn resume_deletion(db: &Db) -> Result<Option<Uuid>> {
    const CLAIM: &str = "-- claim_interrupted_label_deletion
        UPDATE labels SET delete_step_time = now()
        WHERE id = (
            SELECT id FROM labels
            WHERE delete_actor_id IS NOT NULL AND delete_step_time < now() - make_interval(secs => $1)
            ORDER BY delete_step_time LIMIT 1
            FOR NO KEY UPDATE SKIP LOCKED)
        RETURNING id, delete_actor_id";
    let Some(row) = db.autocommit_conn().await?.query_opt(CLAIM, &[&INTERRUPTED_AFTER_SECONDS]).await? else {
        return Ok(None);
    };
    let (label_id, actor_id) = (row.get("id"), row.get("delete_actor_id"));
    match delete(db, actor_id, MutationOptions::default(), label_id, true).await {
        // The call that was taken for interrupted has completed it.
        Ok(_) | Err(Error::NotFound(_)) => Ok(Some(label_id)),
        Err(error) => Err(error),
    }
}

/// The mark of a label that is being deleted.
#[derive(Clone)]
struct Mark {
    /// The user who deletes it.
    actor_id: Uuid,
    /// The response is stored for it. Generated if the call has none.
    key: IdempotencyKey,
    /// From how many issues the label was removed.
    removed_issue_count: i64,
}

impl Mark {
    fn from_row(row: &Row) -> Result<Option<Self>> {
        let Some(actor_id) = row.get("delete_actor_id") else { return Ok(None) };
        let fingerprint = row.get::<_, &[u8]>("delete_fingerprint").try_into();
        let fingerprint = fingerprint.map_err(|_| Error::Internal("a fingerprint has the wrong length"))?;
        let key = IdempotencyKey { request_id: row.get("delete_request_id"), fingerprint };
        Ok(Some(Self { actor_id, key, removed_issue_count: row.get("removed_issue_count") }))
    }
}

/// A call that deletes a label.
struct Deletion {
    label_id: Uuid,
    caller_id: Uuid,
    options: MutationOptions,
    force: bool,
    progress: Progress,
}

/// How far a call is.
#[derive(Clone, Default)]
struct Progress {
    /// The mark of the label, once this call has seen or made it.
    mark: Option<Mark>,
    /// The label was removed from the issues up to this one, except for locked ones.
    after: Uuid,
    /// Whether the next step waits for one issue, because all that are left are locked.
    waits_for_issue: bool,
}

type DeletionStep = Step<DeleteLabelResponse, Progress>;

impl Deletion {
    /// Executes the next transaction.
    async fn step(&self, tx: &Tx) -> Result<DeletionStep> {
        // Locked before issues, as by all statements that change labels of issues: the other order could deadlock.
        // Transactions that add the label are not waited for.
        const LOCK: &str = "-- lock_label_to_delete
            SELECT name, delete_actor_id, delete_request_id, delete_fingerprint, removed_issue_count
            FROM labels WHERE id = $1 FOR NO KEY UPDATE";
        if self.options.validate_only {
            return self.validate(tx).await.map(Step::Done);
        }
        let Some(row) = tx.query_opt(LOCK, &[&self.label_id]).await? else { return self.find_response(tx).await };
        match Mark::from_row(&row)? {
            None => self.begin(tx, row.get("name")).await,
            Some(_) if !self.force => Err(self.not_found()),
            Some(mark) => self.remove_from_issues(tx, mark).await,
        }
    }

    /// Checks what [`Self::step`] checks, and counts all issues.
    async fn validate(&self, db: &Conn) -> Result<DeleteLabelResponse> {
        const SQL: &str = "-- validate_label_deletion
            SELECT name, delete_actor_id IS NOT NULL AS is_being_deleted,
                coalesce(removed_issue_count, 0)
                    + (SELECT count(*) FROM issue_labels WHERE label_id = labels.id) AS issue_count
            FROM labels WHERE id = $1";
        let row = db.query_opt(SQL, &[&self.label_id]).await?;
        let row = row.filter(|row| self.force || !row.get::<_, bool>("is_being_deleted"));
        let row = row.ok_or_else(|| self.not_found())?;
        let issue_count: i64 = row.get("issue_count");
        if issue_count > 0 && !self.force {
            return Err(label_in_use(issue_count, row.get("name")));
        }
        Ok(response(issue_count))
    }

    /// Deletes a label that no issue has, or marks it.
    async fn begin(&self, tx: &Tx, name: &str) -> Result<DeletionStep> {
        const COUNT: &str = "-- count_issues_of_label
            SELECT count(*) AS issue_count FROM (SELECT FROM issue_labels WHERE label_id = $1 LIMIT $2) counted";
        const MARK: &str = "-- mark_label_to_delete
            UPDATE labels SET
                delete_actor_id = /* actor_id */ $2,
                delete_request_id = /* request_id */ $3,
                delete_fingerprint = /* fingerprint */ $4,
                removed_issue_count = 0,
                delete_step_time = now()
            WHERE id = /* id */ $1";
        if self.lock_if_unused(tx).await? {
            self.delete_label(tx).await?;
            return Ok(Step::Done(response(0)));
        }
        if !self.force {
            let counted_max = COUNTED_ISSUES_MAX + 1;
            let row = tx.query_one(COUNT, &[&self.label_id, &counted_max]).await?;
            return Err(label_in_use(row.get("issue_count"), name));
        }
        let generated = || IdempotencyKey { request_id: Uuid::new_v4(), fingerprint: [0; 32] };
        let key = self.options.key.unwrap_or_else(generated);
        tx.execute(MARK, &[&self.label_id, &self.caller_id, &key.request_id, &&key.fingerprint[..]]).await?;
        let mark = Some(Mark { actor_id: self.caller_id, key, removed_issue_count: 0 });
        Ok(Step::Continue(Progress { mark, ..Progress::default() }))
    }

    /// Removes the label from the next issues. If no issue has it, deletes it and returns the response.
    async fn remove_from_issues(&self, tx: &Tx, mark: Mark) -> Result<DeletionStep> {
        const NEXT: &str = "-- next_issues_of_label
            SELECT issue_id FROM issue_labels WHERE label_id = $1 AND issue_id > $2 ORDER BY issue_id LIMIT $3";
        let Progress { after, waits_for_issue, .. } = self.progress;
        let issues_max = if waits_for_issue { 1 } else { ISSUES_PER_STEP_MAX };
        let rows = tx.query(NEXT, &[&self.label_id, &after, &issues_max]).await?;
        let issue_ids: Vec<Uuid> = rows.iter().map(|row| row.get("issue_id")).collect();
        let Some(&last) = issue_ids.last() else {
            if self.lock_if_unused(tx).await? {
                return self.finish(tx, mark).await.map(Step::Done);
            }
            // The issues that are left were locked, or were given the label by a transaction that began before the mark.
            return Ok(Step::Continue(Progress { mark: Some(mark), after: Uuid::nil(), waits_for_issue: true }));
        };
        self.remove_from(tx, mark.actor_id, &issue_ids).await?;
        let after = if waits_for_issue { Uuid::nil() } else { last };
        Ok(Step::Continue(Progress { mark: Some(mark), after, waits_for_issue: false }))
    }

    async fn remove_from(&self, tx: &Tx, actor_id: Uuid, issue_ids: &[Uuid]) -> Result<()> {
        // In the order in which all statements lock issues.
        const LOCK: &str = "-- lock_issues_of_label
            SELECT id FROM issues WHERE id = ANY($1) ORDER BY id FOR NO KEY UPDATE";
        const LOCK_NOT_LOCKED: &str = "-- lock_issues_of_label_not_locked
            SELECT id FROM issues WHERE id = ANY($1) ORDER BY id FOR NO KEY UPDATE SKIP LOCKED";
        const REMOVE: &str = "-- remove_label_from_issues
            WITH removed AS (
                DELETE FROM issue_labels
                WHERE label_id = /* label_id */ $1 AND issue_id = ANY(/* issue_ids */ $2)
                RETURNING issue_id
            ), changed AS (
                UPDATE issues issue SET change_actor_id = /* actor_id */ $3
                FROM removed WHERE issue.id = removed.issue_id
                RETURNING issue.id, issue.version
            ), counted AS (
                UPDATE labels SET
                    removed_issue_count = removed_issue_count + (SELECT count(*) FROM changed),
                    delete_step_time = now()
                WHERE id = /* label_id */ $1
            )
            SELECT insert_label_events(/* actor_id */ $3, array_agg(id), array_agg(version),
                /* removed */ array_agg(/* label_id */ $1::uuid), /* added */ NULL)
            FROM changed";
        let lock = if self.progress.waits_for_issue { LOCK } else { LOCK_NOT_LOCKED };
        let locked: Vec<Uuid> = tx.query(lock, &[&issue_ids]).await?.iter().map(|row| row.get("id")).collect();
        tx.execute(REMOVE, &[&self.label_id, &locked, &actor_id]).await.map(drop)
    }

    /// Returns whether no issue has the label. Then no other transaction can add it until this one ends.
    ///
    /// The transaction must not have locked issues: transactions that have locked the label may wait for these.
    async fn lock_if_unused(&self, tx: &Tx) -> Result<bool> {
        const IS_USED: &str = "-- is_label_used
            SELECT EXISTS (SELECT FROM issue_labels WHERE label_id = $1) AS is_used";
        const LOCK: &str = "-- lock_label_against_use\nSELECT FROM labels WHERE id = $1 FOR UPDATE";
        if tx.query_one(IS_USED, &[&self.label_id]).await?.get("is_used") {
            return Ok(false);
        }
        tx.execute(LOCK, &[&self.label_id]).await?;
        Ok(!tx.query_one(IS_USED, &[&self.label_id]).await?.get::<_, bool>("is_used"))
    }

    /// Deletes the label, and stores the response for the call that has marked it.
    async fn finish(&self, tx: &Tx, mark: Mark) -> Result<DeleteLabelResponse> {
        self.delete_label(tx).await?;
        let response = response(mark.removed_issue_count);
        let is_own = self.caller_id == mark.actor_id
            && self.options.key.is_some_and(|key| key.request_id == mark.key.request_id);
        if !is_own {
            let stored = StoredResponse { caller_id: mark.actor_id, key: mark.key, response: response.encode_to_vec() };
            store_response_of_other_call(tx, &stored).await?;
        }
        Ok(response)
    }

    async fn delete_label(&self, tx: &Tx) -> Result<()> {
        const SQL: &str = "-- delete_label\nDELETE FROM labels WHERE id = $1";
        tx.execute(SQL, &[&self.label_id]).await.map(drop)
    }

    /// Returns the response of the call that has deleted the label meanwhile. If this call is a retry of that one, the next
    /// transaction finds the response.
    async fn find_response(&self, tx: &Tx) -> Result<DeletionStep> {
        if let Some(key) = self.options.key
            && stored_response(tx, self.caller_id, key).await?.is_some()
        {
            return Ok(Step::Continue(self.progress.clone()));
        }
        let stored = match &self.progress.mark {
            Some(mark) => stored_response(tx, mark.actor_id, mark.key).await?,
            None => None,
        };
        let stored = stored.ok_or_else(|| self.not_found())?;
        let response = DeleteLabelResponse::decode(&*stored);
        response.map(Step::Done).map_err(|_| Error::Internal("a stored response cannot be decoded"))
    }

    fn not_found(&self) -> Error {
        Error::not_found("label", "id", self.label_id)
    }
}

fn response(issue_count: i64) -> DeleteLabelResponse {
    DeleteLabelResponse { issue_count: i32::try_from(issue_count).unwrap_or(i32::MAX) }
}

fn label_in_use(issue_count: i64, name: &str) -> Error {
    let issues = match issue_count {
        ..=COUNTED_ISSUES_MAX => format!("{issue_count} issues"),
        _ => format!("more than {COUNTED_ISSUES_MAX} issues"),
    };
    let message = format!("{issues} carry label \"{name}\"; set force to remove it from them");
    Error::precondition("LABEL_IN_USE", "id", message)
}
