#!/usr/bin/env bash
# Cuts a replica off the network in the middle of an ATOMIC import, and asserts that PostgreSQL ends its sessions, and so
# frees its locks, within 16 s. Prints how long it took. Requires root and network namespaces.
#
# Usage: tests/vanished_replica.sh BINARY
set -euo pipefail

binary=$(realpath "$1")
database_address=10.213.0.1
replica_address=10.213.0.2
freed_within_s=16
nowhere=02:00:00:00:00:99

postgres=$(find /usr/lib/postgresql -maxdepth 2 -name bin | sort -V | tail -1)
namespace=replica-$$
interface=trk-$$
work=$(mktemp -d)
service=
import=
stop() {
    for process in $import $service; do
        kill -KILL "$process" && wait "$process" || true
    done
    runuser -u postgres -- "$postgres/pg_ctl" -D "$work/cluster" -m immediate stop || true
    ip netns delete "$namespace" || true
    rm -rf "$work"
} >"/dev/null" 2>&1
trap stop EXIT

ip netns add "$namespace"
ip link add "$interface" type veth peer name eth0 netns "$namespace"
ip address add "$database_address/24" dev "$interface"
ip link set "$interface" up
ip -n "$namespace" address add "$replica_address/24" dev eth0
ip -n "$namespace" link set eth0 up
ip -n "$namespace" link set lo up

chown postgres "$work"
chmod 755 "$work"
runuser -u postgres -- "$postgres/initdb" --auth trust -D "$work/cluster" >"$work/initdb.log"
echo "host all all $replica_address/32 trust" >>"$work/cluster/pg_hba.conf"
runuser -u postgres -- "$postgres/pg_ctl" -D "$work/cluster" -l "$work/server.log" -w start \
    -o "-c listen_addresses=$database_address -c unix_socket_directories=$work" >"$work/start.log"
sql() {
    psql -h "$work" -U postgres -XAtqc "$1"
}

ip netns exec "$namespace" "$binary" --listen 127.0.0.1:50051 \
    --database-url "postgresql://postgres@$database_address/postgres?sslmode=disable" >"$work/out" 2>"$work/service.log" &
service=$!
for _ in $(seq 100); do
    grep -q '^listening on ' "$work/out" && break
    kill -0 "$service"
    sleep 0.1
done

# A token is 32 random bytes. Its hash covers their length and them: src/hash.rs.
head -c 32 /dev/urandom >"$work/secret"
hash=$({ printf '\0\0\0\0\0\0\0\x20' && cat "$work/secret"; } | sha256sum | cut -c -64)
echo "itk_$(basenc --base64url -w 0 "$work/secret" | tr -d =)" >"$work/token"
sql "INSERT INTO users (id, username, password_hash, role) VALUES (gen_random_uuid(), 'member', '', 2);
    INSERT INTO tokens (id, user_id, sha256, name)
    SELECT gen_random_uuid(), id, '\\x$hash', 'test' FROM users"
{
    echo title
    seq -f 'issue %.0f' 1000000
} >"$work/issues.csv"
ip netns exec "$namespace" "$binary" import --token-file "$work/token" --mode atomic "$work/issues.csv" \
    >"$work/import.log" 2>&1 &
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
