#!/usr/bin/env bash
# Restores a dump of dump.sh into an empty database, in one transaction: everything or nothing.
#
# Usage: deploy/backup/restore-dump.sh FILE
#
# The roles and the database must exist: deploy/postgresql/roles.sql creates them. Connects as the variables of libpq say. The
# role must own the database, and then owns the tables. `issue-tracker migrate --grant-to` grants the privileges of the role
# that serves.
set -euo pipefail

file=$1
if [ "$(psql -XAtqc "SELECT count(*) FROM pg_class WHERE relnamespace = 'public'::regnamespace")" != 0 ]; then
    echo "the database is not empty; expected a new one" >&2
    exit 2
fi
pg_restore --exit-on-error --single-transaction --no-owner --no-privileges --no-password \
    --dbname="${PGDATABASE:?the database to restore into}" "$file"
# A dump has no statistics, and plans without them are slow.
# Without the warnings about tables of the system, which only superusers can analyze.
PGOPTIONS='-c client_min_messages=error' psql -XAtqc ANALYZE
