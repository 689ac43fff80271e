-- Labels that are being deleted.
--
-- A label that issues have is deleted in several transactions. The first one marks it, so that no call uses it any more. The
-- following ones remove it from the issues, and the last one deletes it.
ALTER TABLE labels
    -- The user who deletes the label; not null: it is being deleted. All other columns are null unless it is.
    ADD COLUMN delete_actor_id     uuid,
    -- The idempotency key of the call that has marked the label, or a generated one: whichever call deletes the label stores the
    -- response for it.
    ADD COLUMN delete_request_id   uuid,
    ADD COLUMN delete_fingerprint  bytea,
    -- How many issues it was removed from.
    ADD COLUMN removed_issue_count bigint,
    -- When the latest of these transactions began. If that is long ago, the deletion was interrupted.
    ADD COLUMN delete_step_time    timestamptz,
    ADD CONSTRAINT labels_deletion_is_complete CHECK (num_nonnulls(
        delete_actor_id, delete_request_id, delete_fingerprint, removed_issue_count, delete_step_time) IN (0, 5));
-- Interrupted deletions.
CREATE INDEX labels_delete_step_time_idx ON labels (delete_step_time) WHERE delete_actor_id IS NOT NULL;
