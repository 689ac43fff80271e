# Starts a PostgreSQL server, and a replica of the service in a network namespace of its own. Sourced by tests that make the
# network between the two fail. Requires root and network namespaces.
#
# Sets $namespace, $interface (the server's end), $database_address, $replica_address and $work, a directory for files.
# Everything ends with the script, after `on_exit`, which it may define. Processes that it starts in the background and ends
# itself must not be started by `in_namespace`: the process id would be that of a shell.

binary=$(realpath "$1")
database_address=10.213.0.1
replica_address=10.213.0.2

postgres=$(find /usr/lib/postgresql -maxdepth 2 -name bin | sort -V | tail -1)
namespace=replica-$$
interface=trk-$$
work=$(mktemp -d)
service=
on_exit() { :; }
stop() {
    on_exit
    if [ -n "$service" ]; then
        kill -KILL "$service" && wait "$service" || true
    fi
    runuser -u postgres -- "$postgres/pg_ctl" -D "$work/cluster" -m immediate stop || true
    ip link delete "$interface" || true
    ip netns delete "$namespace" || true
    rm -rf "$work"
} >"/dev/null" 2>&1
trap stop EXIT

sql() {
    psql -h "$work" -U postgres -XAtqc "$1"
}

in_namespace() {
    ip netns exec "$namespace" "$@"
}

# Arguments: flags of the service. Writes the token of a member to $work/token.
start_replica() {
    ip netns exec "$namespace" "$binary" "$@" --database-url "postgresql://postgres@$database_address/postgres?sslmode=disable" \
        >"$work/out" 2>"$work/service.log" &
    service=$!
    # It may listen before it has applied the migrations.
    for _ in $(seq 300); do
        local address
        address=$(sed -n 's/^listening on //p' "$work/out")
        [ -n "$address" ] && in_namespace "$binary" health --server "http://$address" >"$work/health" 2>&1 && break
        kill -0 "$service"
        sleep 0.1
    done
    # A token is 32 random bytes. Its hash covers their length and them: src/hash.rs.
    head -c 32 /dev/urandom >"$work/secret"
    local hash
    hash=$({ printf '\0\0\0\0\0\0\0\x20' && cat "$work/secret"; } | sha256sum | cut -c -64)
    echo "itk_$(basenc --base64url -w 0 "$work/secret" | tr -d =)" >"$work/token"
    sql "INSERT INTO users (id, username, password_hash, role) VALUES (gen_random_uuid(), 'member', '', 2);
        INSERT INTO tokens (id, user_id, sha256, name)
        SELECT gen_random_uuid(), id, '\\x$hash', 'test' FROM users"
}

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
