#!/usr/bin/env bash
# Copies the files of the running server into the new directory DIR: base.tar.gz, pg_wal.tar.gz and backup_manifest. The
# service continues to read and write. With the archive of archive-wal.sh, it can be restored as of any later moment.
#
# Usage: deploy/backup/base-backup.sh DIR
#
# Connects as the variables of libpq say, with a role that has the attribute REPLICATION.
set -euo pipefail
umask 077

dir=$1
if [ -e "$dir" ]; then
    echo "$dir: exists; expected the name of a new directory" >&2
    exit 2
fi
# The backup has the segments that it needs itself: it can be restored without the archive too.
pg_basebackup --pgdata="$dir.partial" --format=tar --gzip --wal-method=stream --checkpoint=fast --no-password
mv "$dir.partial" "$dir"
sync "$(dirname "$dir")"
