-- Imports are removed when they are old, and the row errors that are stored for a user are limited.

-- Imports that are removed from imports while they have rows in import_errors or import_issues.
CREATE TABLE expired_imports (
    import_id uuid NOT NULL CONSTRAINT expired_imports_pkey PRIMARY KEY
);

-- How many rows import_errors has for the import. Replicas of the previous version leave 0: their errors are removed
-- together with the import.
ALTER TABLE imports ADD COLUMN stored_error_count integer NOT NULL DEFAULT 0;
UPDATE imports SET stored_error_count = least(error_count, 10000) WHERE error_count > 0;
-- evict_import_errors, prune_import_errors.
CREATE INDEX imports_with_stored_errors_idx ON imports (caller_id, create_time) WHERE stored_error_count > 0;
