#!/usr/bin/env bash
# Restores a backup of base-backup.sh into the new data directory DATA. The server that is then started on it replays the
# archive of archive-wal.sh: up to its end, or up to TIME, such as '2026-11-29 15:30:00+00'.
#
# Usage: deploy/backup/restore-base.sh BACKUP ARCHIVE DATA [TIME]
#
# Run it as the user that runs PostgreSQL, with its programs in PATH, of the major version of the backup.
set -euo pipefail
umask 077

backup=$1 archive=$2 data=$3 time=${4:-}
if [ -e "$data" ]; then
    echo "$data: exists; expected the name of a new directory" >&2
    exit 2
fi
if [[ ! $archive =~ ^/[A-Za-z0-9_./-]+$ ]]; then
    echo "$archive: expected an absolute path of letters, digits and _./-" >&2
    exit 2
fi
if [ -n "$(find "$backup" -name '*.tar.gz' ! -name base.tar.gz ! -name pg_wal.tar.gz)" ]; then
    echo "$backup: has tablespaces; expected none" >&2
    exit 2
fi
mkdir "$data"
tar --extract --gzip --file "$backup/base.tar.gz" --directory "$data"
tar --extract --gzip --file "$backup/pg_wal.tar.gz" --directory "$data/pg_wal"
# Every file has the checksum that the server reported, and the log that the backup needs is complete.
cp "$backup/backup_manifest" "$data"
pg_verifybackup --quiet "$data"
rm "$data/backup_manifest"
{
    echo "restore_command = 'cp \"$archive/%f\" \"%p\"'"
    if [ -n "$time" ]; then
        echo "recovery_target_time = '${time//\'/}'"
        echo "recovery_target_action = 'promote'"
    fi
} >>"$data/postgresql.auto.conf"
touch "$data/recovery.signal"
