#!/usr/bin/env bash
# Copies a finished segment of the write-ahead log into DIR. For archive_command, with an absolute path:
#
#     archive_command = '/usr/local/lib/issue-tracker/archive-wal.sh /var/backups/issue-tracker/wal "%p" %f'
#
# PostgreSQL repeats it until it succeeds. A segment appears in DIR complete and on disk. One that exists is never overwritten:
# a repetition succeeds if it has the same contents.
#
# Usage: deploy/backup/archive-wal.sh DIR PATH NAME
set -euo pipefail
umask 077

dir=$1 path=$2 name=$3
if [ -e "$dir/$name" ]; then
    cmp "$path" "$dir/$name"
    exit
fi
cp "$path" "$dir/.$name.tmp"
sync "$dir/.$name.tmp"
mv "$dir/.$name.tmp" "$dir/$name"
sync "$dir"
