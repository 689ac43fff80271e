#!/usr/bin/env bash
# Dumps the database into FILE, as it was when the dump began. The service continues to read and write.
#
# Usage: deploy/backup/dump.sh FILE
#
# Connects as the variables of libpq say: PGHOST, PGUSER, PGDATABASE, PGPASSFILE and others. The role must be able to read all
# tables, as the owner of the schema can.
set -euo pipefail
umask 077

file=$1
if [ -e "$file" ]; then
    echo "$file: exists; expected the name of a new file" >&2
    exit 2
fi
# Stored parts of imports that are in progress. A restored import receives them again.
pg_dump --format=custom --no-unlogged-table-data --no-password --file="$file.partial"
pg_restore --list "$file.partial" >/dev/null
sync "$file.partial"
mv "$file.partial" "$file"
sync "$(dirname "$file")"
