-- Imports that go on where they were cut, tell their errors later, update what is there, and can be undone.

ALTER TABLE imports
    -- As in the protocol: 1 committed, 2 rejected, 4 running (or cut, when nobody holds the import's lock), 6 reverted.
    -- Null: by a version that did not keep it, while replicas are replaced; then finish_time says it.
    ADD COLUMN state          smallint CONSTRAINT imports_state_known CHECK (state IN (1, 2, 4, 6)),
    -- SHA-256 over the options; null: begun by a version that did not keep it.
    ADD COLUMN fingerprint    bytea    CONSTRAINT imports_fingerprint_length CHECK (length(fingerprint) = 32),
    -- 0: the client has not said it.
    ADD COLUMN total_bytes    bigint   NOT NULL DEFAULT 0,
    -- The line of the file on which the rows that are in end.
    ADD COLUMN committed_line bigint   NOT NULL DEFAULT 1,
    -- Our name of each of the file's columns, empty for those that are left out. Null until rows are in.
    ADD COLUMN columns        text[],
    ADD COLUMN updated_count  bigint   NOT NULL DEFAULT 0,
    ADD COLUMN skipped_count  bigint   NOT NULL DEFAULT 0,
    -- What undoing it has answered.
    ADD COLUMN revert_time    timestamptz,
    ADD COLUMN removed_count  bigint,
    ADD COLUMN restored_count bigint,
    ADD COLUMN kept_count     bigint,
    ADD COLUMN kept_ids       uuid[],
    ADD CONSTRAINT imports_reverted_with_answer CHECK (
        (state = 6) = (num_nonnulls(revert_time, removed_count, restored_count, kept_count, kept_ids) = 5));
UPDATE imports SET state = CASE WHEN finish_time IS NULL THEN 4 ELSE 1 END;

-- The first errors of an import's rows, in the order of the file.
CREATE TABLE import_errors (
    import_id   uuid    NOT NULL,
    -- From 1, without a gap.
    position    integer NOT NULL,
    row_number  bigint  NOT NULL,
    line_number bigint  NOT NULL,
    byte_offset bigint  NOT NULL,
    column_name text    NOT NULL,
    value       text    NOT NULL,
    code        text    NOT NULL,
    message     text    NOT NULL,
    CONSTRAINT import_errors_pkey PRIMARY KEY (import_id, position)
);

-- Issues that were there before an import that has a row for them. Those that it changed are kept with what they had, to
-- undo it; those that it left as they were only until it is finished, to know a second row for them. Like the history,
-- without foreign keys.
CREATE TABLE import_issues (
    import_id     uuid NOT NULL,
    issue_id      uuid NOT NULL,
    -- What the import has left; null, with all that follows: it has left the issue as it was.
    version       bigint,
    title         text,
    description   text,
    priority      smallint,
    status        smallint,
    assignee_id   uuid,
    close_time    timestamptz,
    reopen_count  integer,
    label_ids     uuid[],
    -- How many comments the issue had, deleted ones too: more of them were added since.
    comment_count bigint,
    CONSTRAINT import_issues_pkey PRIMARY KEY (import_id, issue_id)
);

-- Undoing an import: the issues that it created.
CREATE INDEX issues_import_id_idx ON issues (import_id) WHERE import_id IS NOT NULL;

-- As before, but a change that restores what an issue had takes its close_time and reopen_count along: within a
-- transaction that has set issue_tracker.restores_status, they are as the UPDATE says.
CREATE OR REPLACE FUNCTION issues_before_update() RETURNS trigger LANGUAGE plpgsql AS $$
DECLARE
    statuses   CONSTANT text[] := ARRAY['OPEN', 'IN_PROGRESS', 'CLOSED'];
    priorities CONSTANT text[] := ARRAY['NONE', 'LOW', 'MEDIUM', 'HIGH', 'CRITICAL'];
    actor      CONSTANT uuid := NEW.change_actor_id;
BEGIN
    IF actor IS NULL THEN
        RAISE EXCEPTION 'an update of issues must set change_actor_id';
    END IF;
    NEW.change_actor_id := NULL;
    NEW.version := OLD.version + 1;
    NEW.update_time := greatest(now(), OLD.update_time);
    IF NEW.status <> OLD.status THEN
        IF current_setting('issue_tracker.restores_status', true) IS DISTINCT FROM 'on' THEN
            NEW.close_time := CASE WHEN NEW.status = 3 THEN greatest(now(), OLD.create_time) END;
            IF OLD.status = 3 THEN
                NEW.reopen_count := OLD.reopen_count + 1;
            END IF;
        END IF;
        INSERT INTO issue_events (issue_id, version, actor_id, field, old_value, new_value)
        VALUES (NEW.id, NEW.version, actor, 'status', statuses[OLD.status], statuses[NEW.status]);
    END IF;
    IF NEW.priority <> OLD.priority THEN
        INSERT INTO issue_events (issue_id, version, actor_id, field, old_value, new_value)
        VALUES (NEW.id, NEW.version, actor, 'priority', priorities[OLD.priority + 1], priorities[NEW.priority + 1]);
    END IF;
    IF NEW.assignee_id IS DISTINCT FROM OLD.assignee_id THEN
        INSERT INTO issue_events (issue_id, version, actor_id, field, old_value, new_value)
        VALUES (NEW.id, NEW.version, actor, 'assignee_id', OLD.assignee_id, NEW.assignee_id);
    END IF;
    IF NEW.title <> OLD.title THEN
        INSERT INTO issue_events (issue_id, version, actor_id, field, old_value, new_value)
        VALUES (NEW.id, NEW.version, actor, 'title', OLD.title, NEW.title);
    END IF;
    IF NEW.description <> OLD.description THEN
        INSERT INTO issue_events (issue_id, version, actor_id, field, old_value, new_value)
        VALUES (NEW.id, NEW.version, actor, 'description', OLD.description, NEW.description);
    END IF;
    IF NEW.external_id IS DISTINCT FROM OLD.external_id THEN
        INSERT INTO issue_events (issue_id, version, actor_id, field, old_value, new_value)
        VALUES (NEW.id, NEW.version, actor, 'external_id', OLD.external_id, NEW.external_id);
    END IF;
    IF (NEW.delete_time IS NULL) <> (OLD.delete_time IS NULL) THEN
        INSERT INTO issue_events (issue_id, version, actor_id, field, old_value, new_value)
        VALUES (NEW.id, NEW.version, actor, 'deleted',
                (OLD.delete_time IS NOT NULL)::text, (NEW.delete_time IS NOT NULL)::text);
    END IF;
    RETURN NEW;
END
$$;

-- A row is written with its reply, at the end of the mutation's transaction: no room has to be left for it.
ALTER TABLE requests SET (fillfactor = 100);
