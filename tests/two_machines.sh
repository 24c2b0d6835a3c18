#!/usr/bin/env bash
# Two network namespaces joined by a cable (a veth pair) stand in for two machines:
#
#   tests/two_machines.sh up NAME       makes the namespaces NAMEa (10.79.0.1) and NAMEb (10.79.0.2), whose links are called NAMEa and NAMEb
#   tests/two_machines.sh down NAME     removes them
#
# Needs root, iproute2 and the right to make namespaces (CAP_SYS_ADMIN). A name of at most 14 characters.
# Inside: ip netns exec NAMEb unshare --uts sh -c 'hostname node-b; exec "$@"' sh COMMAND ...
# Cutting the cable: ip -n NAMEb link set NAMEb down
set -euo pipefail

up() {
    local number=0 side
    for side in a b; do ip netns add "$1$side"; done
    ip link add "$1a" netns "$1a" type veth peer name "$1b" netns "$1b"
    for side in a b; do
        number=$((number + 1))
        ip -n "$1$side" address add "10.79.0.$number/24" dev "$1$side"
        ip -n "$1$side" link set "$1$side" up
        ip -n "$1$side" link set lo up
    done
    ip netns exec "$1a" unshare --uts true
}

down() {
    local side
    for side in a b; do ip netns delete "$1$side" || true; done
}

case "${1:-} ${2:-}" in
"up "?*) up "$2" ;;
"down "?*) down "$2" ;;
*)
    sed -n '2,9s/^# \{0,1\}//p' "$0" >&2
    exit 2
    ;;
esac
