#!/usr/bin/env bash
# Loses packets between a replica, its database and its clients: 10 %, 30 %, then all of them for a while. Asserts that each
# acknowledged write is stored once, that calls succeed while some packets arrive, that health follows, and that everything
# recovers by itself. Requires root, network namespaces, nftables, and Python with grpcio and grpcio-reflection.
#
# Usage: tests/lost_packets.sh BINARY [PYTHON]
set -euo pipefail
source "$(dirname "$0")/replica_namespace.sh"

python=${2:-python3}
phase_s=8
writes_in_phase_min=5
recovered_within_s=30
clients=
on_exit() {
    nft delete table inet "faults_$$" || true
    if [ -n "$clients" ]; then
        kill -KILL "$clients" && wait "$clients" || true
    fi
}

# Drops packets when they arrive, on both ends: a packet that is dropped where it is sent would be an error there.
lose() {
    local rule="table inet faults_$$ { chain input { type filter hook input priority 0; iifname \"%s\" %s drop; }; }\n"
    local match=
    nft delete table inet "faults_$$" 2>/dev/null || true
    in_namespace nft delete table inet "faults_$$" 2>/dev/null || true
    case $1 in
        0) return ;;
        100) ;;
        *) match="numgen random mod 100 < $1" ;;
    esac
    # shellcheck disable=SC2059
    printf "$rule" "$interface" "$match" | nft -f -
    # shellcheck disable=SC2059
    printf "$rule" eth0 "$match" | in_namespace nft -f -
}

# Within the namespace, no packet is lost.
reports() {
    [ "$(in_namespace "$binary" health --server "http://$replica_address:50051" --service issuetracker.writes)" = "$1" ]
}

wait_until_health_is() {
    local began=$SECONDS
    until reports "$1"; do
        [ $((SECONDS - began)) -le "$recovered_within_s" ] || { echo "health is not $1" >&2; exit 1; }
        sleep 0.2
    done
    echo "health was $1 after $((SECONDS - began)) s"
}

acknowledged() {
    grep -c ^create "$work/acknowledged" || true
}

wait_for_writes() {
    local target=$(($(acknowledged) + writes_in_phase_min)) began=$SECONDS
    until [ "$(acknowledged)" -ge "$target" ]; do
        kill -0 "$clients"
        [ $((SECONDS - began)) -le "$recovered_within_s" ] || { echo "no call succeeds" >&2; exit 1; }
        sleep 0.2
    done
}

start_replica --listen "$replica_address:50051" --insecure-plaintext
"$python" "$(dirname "$0")/lost_packets.py" "$replica_address:50051" "$work/token" >"$work/acknowledged" 2>"$work/clients.log" &
clients=$!
wait_for_writes
wait_until_health_is SERVING

for percent in 10 30; do
    before=$(acknowledged)
    lose "$percent"
    sleep "$phase_s"
    wait_for_writes
    echo "$percent % of the packets lost: $(($(acknowledged) - before)) writes"
done
lose 100
wait_until_health_is NOT_SERVING
sleep 2
lose 0
wait_until_health_is SERVING
wait_for_writes

kill -TERM "$clients"
wait "$clients" || { cat "$work/clients.log" >&2; exit 1; }
clients=
# The clients repeat each call until it is acknowledged, so the database has these writes and no others.
diff <(sed -n 's/^create //p' "$work/acknowledged" | LC_ALL=C sort) <(sql "SELECT title FROM issues WHERE title LIKE 'issue %'" | LC_ALL=C sort)
diff <(sed -n 's/^update //p' "$work/acknowledged" | LC_ALL=C sort) \
    <(sql "SELECT new_value FROM issue_events WHERE field = 'title'" | LC_ALL=C sort)
if grep -E 'panicked|internal error|database error' "$work/service.log" >&2; then exit 1; fi
echo "$(wc -l <"$work/acknowledged") acknowledged writes are stored once"
