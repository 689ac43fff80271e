-- Users, tokens, issues, comments, labels, history, request ids, imports.
--
-- Enumerations are kept as the numbers of their protocol buffer values: status 1 open, 2 in progress, 3 closed;
-- priority 0 none, 1 low, 2 medium, 3 high, 4 critical; role 1 viewer, 2 member, 3 administrator.
-- Every constraint has a name, because the service tells callers what is wrong by it.

CREATE TABLE users (
    id            uuid        NOT NULL CONSTRAINT users_pkey PRIMARY KEY,
    username      text        NOT NULL CONSTRAINT users_username_format CHECK (username ~ '^[A-Za-z0-9][A-Za-z0-9._@+-]{0,49}$'),
    password_hash text        NOT NULL,
    role          smallint    NOT NULL CONSTRAINT users_role_known CHECK (role BETWEEN 1 AND 3),
    disabled      boolean     NOT NULL DEFAULT false,
    create_time   timestamptz NOT NULL DEFAULT now(),
    update_time   timestamptz NOT NULL DEFAULT now()
);
-- Login, usernames in filters and imports; ListUsers in order.
CREATE UNIQUE INDEX users_username_key ON users (lower(username));

-- Session tokens (expire_time set) and API tokens (a name instead). The token itself is not kept.
CREATE TABLE tokens (
    id          uuid        NOT NULL CONSTRAINT tokens_pkey PRIMARY KEY,
    user_id     uuid        NOT NULL CONSTRAINT tokens_user_id_fkey REFERENCES users (id),
    sha256      bytea       NOT NULL CONSTRAINT tokens_sha256_key UNIQUE CONSTRAINT tokens_sha256_length CHECK (length(sha256) = 32),
    name        text        CONSTRAINT tokens_name_length CHECK (char_length(name) BETWEEN 1 AND 100),
    create_time timestamptz NOT NULL DEFAULT now(),
    expire_time timestamptz,
    revoke_time timestamptz,
    CONSTRAINT tokens_session_or_api CHECK ((name IS NULL) = (expire_time IS NOT NULL))
);
-- ListApiTokens; ending a user's sessions.
CREATE INDEX tokens_user_id_idx ON tokens (user_id, id) WHERE revoke_time IS NULL;
-- Pruning of sessions that have expired.
CREATE INDEX tokens_expire_time_idx ON tokens (expire_time) WHERE expire_time IS NOT NULL;

CREATE TABLE labels (
    id          uuid        NOT NULL CONSTRAINT labels_pkey PRIMARY KEY,
    name        text        NOT NULL CONSTRAINT labels_name_length CHECK (char_length(name) BETWEEN 1 AND 50),
    description text        NOT NULL DEFAULT '' CONSTRAINT labels_description_length CHECK (char_length(description) <= 255)
);
-- Labels by name in filters and imports; ListLabels in order.
CREATE UNIQUE INDEX labels_name_key ON labels (lower(name));

-- Ids are UUIDs of version 7 made when the issue is filed, or from the creation time that an import gives, so that the primary key is also the order of lists
-- (newest first) and inserts stay at its right edge.
CREATE TABLE issues (
    id              uuid        NOT NULL CONSTRAINT issues_pkey PRIMARY KEY,
    version         bigint      NOT NULL DEFAULT 1,
    create_time     timestamptz NOT NULL DEFAULT now(),
    update_time     timestamptz NOT NULL DEFAULT now(),
    close_time      timestamptz,
    delete_time     timestamptz,
    reporter_id     uuid        NOT NULL CONSTRAINT issues_reporter_id_fkey REFERENCES users (id),
    assignee_id     uuid        CONSTRAINT issues_assignee_id_fkey REFERENCES users (id),
    reopen_count    integer     NOT NULL DEFAULT 0,
    status          smallint    NOT NULL CONSTRAINT issues_status_known CHECK (status BETWEEN 1 AND 3),
    priority        smallint    NOT NULL CONSTRAINT issues_priority_known CHECK (priority BETWEEN 0 AND 4),
    title           text        NOT NULL CONSTRAINT issues_title_length CHECK (char_length(title) BETWEEN 1 AND 255),
    description     text        NOT NULL CONSTRAINT issues_description_length CHECK (char_length(description) <= 65536),
    -- The import that created it, if one did.
    import_id       uuid,
    external_id     text        CONSTRAINT issues_external_id_length CHECK (char_length(external_id) BETWEEN 1 AND 255),
    -- Who makes the change at hand: null at rest, set by every UPDATE, taken by the trigger that writes the history.
    change_actor_id uuid,
    CONSTRAINT issues_close_time_iff_closed CHECK ((status = 3) = (close_time IS NOT NULL))
);
-- An import's or caller's key: at most one issue has it.
CREATE UNIQUE INDEX issues_external_id_key ON issues (external_id) WHERE external_id IS NOT NULL;
-- ListIssues by status, newest first. One index a status, in the order of the list: of an index on (status, id) the
-- planner thinks little, and rather reads all issues, newest first, until it has found enough.
CREATE INDEX issues_open_idx ON issues (id) WHERE status = 1 AND delete_time IS NULL;
CREATE INDEX issues_in_progress_idx ON issues (id) WHERE status = 2 AND delete_time IS NULL;
CREATE INDEX issues_closed_idx ON issues (id) WHERE status = 3 AND delete_time IS NULL;
-- ListIssues by assignee, newest first; GetTopAssignees.
CREATE INDEX issues_assignee_id_idx ON issues (assignee_id, id) WHERE assignee_id IS NOT NULL;
-- ListIssues by reporter, newest first.
CREATE INDEX issues_reporter_id_idx ON issues (reporter_id, id);
-- GetResolutionLatency over a window.
CREATE INDEX issues_close_time_idx ON issues (close_time) WHERE close_time IS NOT NULL;

CREATE TABLE issue_labels (
    issue_id uuid NOT NULL CONSTRAINT issue_labels_issue_id_fkey REFERENCES issues (id),
    label_id uuid NOT NULL CONSTRAINT issue_labels_label_id_fkey REFERENCES labels (id),
    CONSTRAINT issue_labels_pkey PRIMARY KEY (issue_id, label_id)
);
-- ListIssues by label, newest first; DeleteLabel.
CREATE INDEX issue_labels_label_id_idx ON issue_labels (label_id, issue_id);

CREATE TABLE comments (
    id          uuid        NOT NULL CONSTRAINT comments_pkey PRIMARY KEY,
    issue_id    uuid        NOT NULL CONSTRAINT comments_issue_id_fkey REFERENCES issues (id),
    parent_id   uuid        CONSTRAINT comments_parent_id_fkey REFERENCES comments (id),
    author_id   uuid        NOT NULL CONSTRAINT comments_author_id_fkey REFERENCES users (id),
    create_time timestamptz NOT NULL DEFAULT now(),
    update_time timestamptz NOT NULL DEFAULT now(),
    delete_time timestamptz,
    content     text        NOT NULL,
    -- A deleted comment keeps its place without its text.
    CONSTRAINT comments_content_length CHECK (
        CASE WHEN delete_time IS NULL THEN char_length(content) BETWEEN 1 AND 16384 ELSE content = '' END)
);
-- An issue's comments, oldest first; how many it has.
CREATE INDEX comments_issue_id_idx ON comments (issue_id, id) INCLUDE (delete_time);

-- What was changed of issues, by whom. An issue's creation is its own row and has no event. No foreign keys: the trigger
-- and the label statements write what the same transaction has just locked, and history outlives what it is about.
CREATE TABLE issue_events (
    id          bigint      GENERATED ALWAYS AS IDENTITY CONSTRAINT issue_events_pkey PRIMARY KEY,
    issue_id    uuid        NOT NULL,
    version     bigint      NOT NULL,
    actor_id    uuid        NOT NULL,
    create_time timestamptz NOT NULL DEFAULT now(),
    -- A column of issues (status and priority by name, `deleted` for delete_time), or `label` with the label's id: old is
    -- the one taken off, new the one put on.
    field       text        NOT NULL,
    old_value   text,
    new_value   text
);
-- An issue's history in order.
CREATE INDEX issue_events_issue_id_idx ON issue_events (issue_id, id);

-- The one place that bumps versions, keeps close_time and reopen_count true to the status, and writes history. An UPDATE
-- always means a change: statements leave out rows that would stay as they are.
CREATE FUNCTION issues_before_update() RETURNS trigger LANGUAGE plpgsql AS $$
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
        NEW.close_time := CASE WHEN NEW.status = 3 THEN greatest(now(), OLD.create_time) END;
        IF OLD.status = 3 THEN
            NEW.reopen_count := OLD.reopen_count + 1;
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
CREATE TRIGGER issues_before_update BEFORE UPDATE ON issues
    FOR EACH ROW EXECUTE FUNCTION issues_before_update();

-- What mutations with a request id have answered. A row is claimed at the start of the mutation's transaction, so that a
-- second call waits for the first, and gets its reply before the commit.
CREATE TABLE requests (
    caller_id   uuid        NOT NULL,
    request_id  uuid        NOT NULL,
    -- SHA-256 over the method and the payload without request id and passwords.
    fingerprint bytea       NOT NULL CONSTRAINT requests_fingerprint_length CHECK (length(fingerprint) = 32),
    reply       bytea,
    create_time timestamptz NOT NULL DEFAULT now(),
    CONSTRAINT requests_pkey PRIMARY KEY (caller_id, request_id)
) WITH (fillfactor = 80); -- room for the reply on the page of its claim
-- Pruning.
CREATE INDEX requests_create_time_idx ON requests USING brin (create_time);

CREATE TABLE imports (
    id               uuid        NOT NULL CONSTRAINT imports_pkey PRIMARY KEY,
    caller_id        uuid        NOT NULL CONSTRAINT imports_caller_id_fkey REFERENCES users (id),
    mode             smallint    NOT NULL CONSTRAINT imports_mode_known CHECK (mode BETWEEN 1 AND 2),
    create_time      timestamptz NOT NULL DEFAULT now(),
    -- Set when the whole file is in.
    finish_time      timestamptz,
    -- Rows that end at or before this byte of the file are in, or were rejected.
    committed_offset bigint      NOT NULL,
    row_count        bigint      NOT NULL,
    created_count    bigint      NOT NULL,
    rejected_count   bigint      NOT NULL,
    error_count      bigint      NOT NULL
);
