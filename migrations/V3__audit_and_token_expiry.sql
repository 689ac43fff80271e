-- API tokens that expire, and a trail of who signed in and who changed users and tokens.
--
-- While replicas of the version before still run, they take a token that expires for a session (a new password ends it,
-- and it is forgotten a day after it has expired), and write no trail.

-- A session has no name and expires; an API token has a name, and may expire.
ALTER TABLE tokens
    DROP CONSTRAINT tokens_session_or_api,
    ADD CONSTRAINT tokens_session_or_api CHECK (name IS NOT NULL OR expire_time IS NOT NULL);

-- Written by the statements that make the changes. Like the history of issues without foreign keys: no login is held up by
-- them, and the trail outlives what it is about.
CREATE TABLE audit_events (
    id          bigint      GENERATED ALWAYS AS IDENTITY CONSTRAINT audit_events_pkey PRIMARY KEY,
    create_time timestamptz NOT NULL DEFAULT now(),
    -- The names of the protocol's AuditAction.
    action      text        NOT NULL CONSTRAINT audit_events_action_known CHECK (action IN (
        'LOGIN', 'LOGIN_FAILED', 'LOGOUT', 'SESSION_ENDED', 'PASSWORD_CHANGED', 'API_TOKEN_CREATED', 'API_TOKEN_REVOKED',
        'USER_CREATED', 'ROLE_CHANGED', 'USER_DISABLED', 'USER_ENABLED')),
    -- Who did it. Null: nobody who has signed in, or the command line.
    actor_id    uuid,
    -- From where, if it came over the network.
    address     inet,
    -- Whom and which token it is about. A failed login without a user: there is none of the name that was given, which is
    -- not kept.
    user_id     uuid,
    token_id    uuid,
    -- Of a role and of a token's name. Never a secret, nor what was given as a username or password.
    old_value   text        CONSTRAINT audit_events_old_value_length CHECK (char_length(old_value) <= 100),
    new_value   text        CONSTRAINT audit_events_new_value_length CHECK (char_length(new_value) <= 100)
);
-- ListAuditEvents of one user, newest first. Events without a user are in it too: a failed login takes the same work
-- whether there is such a user or not.
CREATE INDEX audit_events_user_id_idx ON audit_events (user_id, id);
-- Pruning.
CREATE INDEX audit_events_create_time_idx ON audit_events USING brin (create_time);

-- What was written stays as it is for 400 days.
CREATE FUNCTION audit_events_keep() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF TG_OP = 'DELETE' THEN
        IF OLD.create_time < now() - interval '400 days' THEN
            RETURN OLD;
        END IF;
    END IF;
    RAISE EXCEPTION 'audit events are kept for 400 days, as they are';
END
$$;
CREATE TRIGGER audit_events_keep_rows BEFORE UPDATE OR DELETE ON audit_events
    FOR EACH ROW EXECUTE FUNCTION audit_events_keep();
CREATE TRIGGER audit_events_keep_all BEFORE TRUNCATE ON audit_events
    FOR EACH STATEMENT EXECUTE FUNCTION audit_events_keep();
