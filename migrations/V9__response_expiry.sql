-- The oldest stored responses, which pruning deletes in this order.
--
-- The BRIN index did not find them. Vacuumed rows are replaced by new ones, and a block range keeps the oldest time that it ever
-- had: a day after the first removal, all ranges seemed to have expired responses, and each statement read the whole table.
DROP INDEX requests_create_time_idx;
CREATE INDEX requests_create_time_idx ON requests (create_time);
