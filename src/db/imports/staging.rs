//! The file of an import in one transaction while it is received: parts in the table `import_staging`, the rest in memory.

use bytes::Bytes;
use tokio::sync::mpsc;
use uuid::Uuid;

use super::Conn;
use crate::{
    csv::{Batch, BatchReader, FileError},
    error::{Error, Result},
};

/// A part of the file is stored when it has this many bytes.
const STAGED_PART_BYTES: usize = 2 * 1024 * 1024;
/// How many parts a statement deletes.
const DELETED_PARTS_MAX: i64 = 64;

/// The bytes of a file that were received, in their order: the stored parts, then those in memory.
#[derive(Default)]
pub(super) struct StagedFile {
    part_count: i32,
    /// Less than [`STAGED_PART_BYTES`].
    rest: Vec<u8>,
}

/// What a file that is read again is sent as.
enum Part {
    Bytes(Bytes),
    /// The end of the file.
    End,
}

impl StagedFile {
    /// Adds bytes to the end. Stores all that are in memory if they are enough for a part.
    pub async fn add(&mut self, db: &Conn, import_id: Uuid, data: &[u8]) -> Result<()> {
        const SQL: &str = "-- stage_part_of_import
            INSERT INTO import_staging (import_id, position, data) VALUES ($1, $2, $3)";
        self.rest.extend_from_slice(data);
        if self.rest.len() >= STAGED_PART_BYTES {
            db.execute(SQL, &[&import_id, &self.part_count, &self.rest]).await?;
            self.part_count += 1;
            self.rest.clear();
        }
        Ok(())
    }

    /// Returns whether parts are stored.
    pub fn has_parts(&self) -> bool {
        self.part_count > 0
    }

    /// Parses the file into batches. Fails with `Cancelled` if they are not received any more.
    pub async fn replay(
        &self,
        db: &Conn,
        import_id: Uuid,
        file: BatchReader,
        batches: mpsc::Sender<Batch>,
    ) -> Result<()> {
        let (parts, received) = mpsc::channel(1);
        // A task of its own, because it needs a processor while the database does, too. It ends with its channels.
        let parsed = tokio::spawn(parse(file, received, batches));
        self.send_parts(db, import_id, parts).await?;
        parsed.await.unwrap_or(Err(Error::Internal("the parser of a staged file has failed")))
    }

    async fn send_parts(&self, db: &Conn, import_id: Uuid, parts: mpsc::Sender<Part>) -> Result<()> {
        const SQL: &str = "-- read_staged_part
            SELECT data FROM import_staging WHERE import_id = $1 AND position = $2";
        // A closed channel means that the parser has ended. Its error is reported.
        for position in 0..self.part_count {
            let part = db.query_opt(SQL, &[&import_id, &position]).await?;
            let part = part.ok_or(Error::Internal("a part of a staged file is missing"))?;
            if parts.send(Part::Bytes(part.get::<_, Vec<u8>>("data").into())).await.is_err() {
                return Ok(());
            }
        }
        let _ = parts.send(Part::Bytes(self.rest.clone().into())).await;
        let _ = parts.send(Part::End).await;
        Ok(())
    }
}

/// Parses parts until the end of the file. The file has no last batch if they end earlier.
async fn parse(mut file: BatchReader, mut parts: mpsc::Receiver<Part>, batches: mpsc::Sender<Batch>) -> Result<()> {
    // The file was parsed when it was received.
    let unreadable = |_: FileError| Error::Internal("a staged file cannot be parsed again");
    let send = async |batch| batches.send(batch).await.map_err(|_| Error::Cancelled);
    while let Some(part) = parts.recv().await {
        let Part::Bytes(part) = part else {
            return send(file.finish().map_err(unreadable)?).await;
        };
        let mut data = &part[..];
        while let Some(batch) = file.read(&mut data).map_err(unreadable)? {
            send(batch).await?;
        }
    }
    Err(Error::Cancelled)
}

/// Deletes the stored parts of the import's file.
pub(super) async fn delete_parts(db: &Conn, import_id: Uuid) -> Result<()> {
    // In several statements: PostgreSQL stores a part as a thousand rows, and a statement has a time limit.
    const SQL: &str = "-- delete_staged_parts
        DELETE FROM import_staging WHERE ctid = ANY (ARRAY(
            SELECT ctid FROM import_staging WHERE import_id = $1 LIMIT $2))";
    while db.execute(SQL, &[&import_id, &DELETED_PARTS_MAX]).await? > 0 {}
    Ok(())
}

/// Deletes up to [`DELETED_PARTS_MAX`] parts that interrupted imports have left. Returns how many.
pub async fn prune_import_staging(db: &Conn) -> Result<u64> {
    // An import that is running holds its lock. The statement's snapshot is older than its look at the locks: parts of a run
    // that takes the lock later are not visible to it. See state::is_locked for the key of a lock.
    const SQL: &str = "-- prune_import_staging
        WITH running AS MATERIALIZED (
            SELECT l.classid::int8 << 32 | l.objid::int8 AS key
            FROM pg_locks l JOIN pg_database d ON d.oid = l.database
            WHERE d.datname = current_database() AND l.locktype = 'advisory' AND l.objsubid = 1 AND l.granted
        )
        DELETE FROM import_staging WHERE ctid = ANY (ARRAY(
            SELECT ctid FROM import_staging
            WHERE hashtextextended('import ' || import_id::text, 0) NOT IN (SELECT key FROM running)
            LIMIT $1))";
    db.execute(SQL, &[&DELETED_PARTS_MAX]).await
}
