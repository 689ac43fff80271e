-- Grants the privileges of the role that serves, which the setting issue_tracker.role names. Run by the owner of the
-- tables.
DO $$
DECLARE
    role text := current_setting('issue_tracker.role');
    may record;
BEGIN
    REVOKE CREATE ON SCHEMA public FROM PUBLIC;
    -- Tables of a new version work at once. The next run revokes the privileges that they do not need.
    EXECUTE format('ALTER DEFAULT PRIVILEGES IN SCHEMA public GRANT SELECT, INSERT, UPDATE, DELETE ON TABLES TO %I', role);
    FOR may IN SELECT name, rights, relowner FROM (VALUES
        ('users',                   'SELECT, INSERT, UPDATE'),
        ('tokens',                  'SELECT, INSERT, UPDATE, DELETE'), -- expired sessions are deleted
        ('labels',                  'SELECT, INSERT, UPDATE, DELETE'),
        ('issues',                  'SELECT, INSERT, UPDATE, DELETE'), -- deleted only by reverting an import
        ('issue_labels',            'SELECT, INSERT, DELETE'),
        ('issue_events',            'SELECT, INSERT'),
        ('comments',                'SELECT, INSERT, UPDATE'),
        ('requests',                'SELECT, INSERT, DELETE'), -- deleted after a day
        ('stored_response_bytes',   'SELECT, INSERT, UPDATE, DELETE'),
        ('imports',                 'SELECT, INSERT, UPDATE, DELETE'), -- deleted when they are old
        ('expired_imports',         'SELECT, INSERT, DELETE'),
        ('import_errors',           'SELECT, INSERT, DELETE'),
        ('import_issues',           'SELECT, INSERT, DELETE'),
        ('import_staging',          'SELECT, INSERT, DELETE'),
        ('audit_events',            'SELECT, INSERT, DELETE'),
        ('refinery_schema_history', 'SELECT')
    ) AS needs (name, rights) LEFT JOIN pg_class ON pg_class.oid = to_regclass('public.' || needs.name)
    LOOP
        -- With another search_path, the tables are in another schema.
        IF may.relowner IS NULL THEN
            RAISE undefined_table USING MESSAGE = format('there is no table %I in the schema public', may.name);
        END IF;
        -- If another role runs this, GRANT only warns.
        IF NOT pg_has_role(may.relowner, 'USAGE') THEN
            RAISE insufficient_privilege USING MESSAGE = format('must be owner of table %I', may.name);
        END IF;
        EXECUTE format('REVOKE ALL ON public.%I FROM %I', may.name, role);
        EXECUTE format('GRANT %s ON public.%I TO %I', may.rights, may.name, role);
    END LOOP;
    -- Only needed where the owner's default privileges do not let PUBLIC execute functions.
    EXECUTE format('GRANT EXECUTE ON FUNCTION public.insert_label_events TO %I', role);
END
$$;
