-- Files of imports that are written in one transaction are stored while they arrive, and written when they are complete.

-- Parts of a file, in the order of position. Unlogged: an import that is interrupted starts again at byte 0, so nothing of it
-- has to survive a crash, and its file is neither written to the log nor sent to standbys.
CREATE UNLOGGED TABLE import_staging (
    import_id uuid    NOT NULL,
    position  integer NOT NULL,
    data      bytea   NOT NULL,
    CONSTRAINT import_staging_pkey PRIMARY KEY (import_id, position)
);

-- A server that was built without lz4 keeps its default.
DO $$
BEGIN
    ALTER TABLE import_staging ALTER COLUMN data SET COMPRESSION lz4;
EXCEPTION WHEN feature_not_supported THEN
    NULL;
END
$$;
