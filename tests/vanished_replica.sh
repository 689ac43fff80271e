#!/usr/bin/env bash
# Cuts a replica off the network in the middle of an ATOMIC import, and asserts that PostgreSQL ends its sessions, and so
# frees its locks, within 16 s. Prints how long it took. Requires root and network namespaces.
#
# Usage: tests/vanished_replica.sh BINARY
set -euo pipefail
source "$(dirname "$0")/replica_namespace.sh"

freed_within_s=16
nowhere=02:00:00:00:00:99
import=
on_exit() {
    if [ -n "$import" ]; then
        kill -KILL "$import" && wait "$import" || true
    fi
}

start_replica --listen 127.0.0.1:50051
{
    echo title
    seq -f 'issue %.0f' 1000000
} >"$work/issues.csv"
ip netns exec "$namespace" "$binary" import --token-file "$work/token" --mode atomic "$work/issues.csv" >"$work/import.log" 2>&1 &
import=$!

sessions="FROM pg_stat_activity WHERE client_addr = '$replica_address'"
for _ in $(seq 300); do
    [ "$(sql "SELECT count(*) $sessions AND backend_xid IS NOT NULL AND xact_start < now() - interval '1 s'")" -gt 0 ] && break
    kill -0 "$import" || { cat "$work/import.log"; exit 1; }
    sleep 0.1
done
[ "$(sql "SELECT count(*) $sessions AND backend_xid IS NOT NULL")" -gt 0 ]

# Packets go to an address that does not exist: neither side learns that the other is away.
ip neighbour replace "$replica_address" lladdr "$nowhere" dev "$interface" nud permanent
ip -n "$namespace" neighbour replace "$database_address" lladdr "$nowhere" dev eth0 nud permanent
began=$SECONDS
until [ "$(sql "SELECT count(*) $sessions")" -eq 0 ]; do
    if [ $((SECONDS - began)) -gt "$freed_within_s" ]; then
        echo "sessions of a replica that vanished $freed_within_s s ago:" >&2
        sql "SELECT pid, state, wait_event, now() - state_change, query $sessions" >&2
        exit 1
    fi
    sleep 0.5
done
echo "PostgreSQL ended the sessions of a vanished replica after $((SECONDS - began)) s"
