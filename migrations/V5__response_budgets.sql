-- Budgets for large stored responses, and faster compression of them.

-- How many bytes of large responses were stored for a user in an hour. Small responses are not counted.
CREATE TABLE stored_response_bytes (
    user_id uuid        NOT NULL,
    hour    timestamptz NOT NULL,
    bytes   bigint      NOT NULL,
    CONSTRAINT stored_response_bytes_pkey PRIMARY KEY (user_id, hour)
);

-- Compresses as well as pglz in a fifth of the time. Responses that are stored already stay readable. A server that was
-- built without lz4 keeps its default.
DO $$
BEGIN
    ALTER TABLE requests ALTER COLUMN reply SET COMPRESSION lz4;
EXCEPTION WHEN feature_not_supported THEN
    NULL;
END
$$;
