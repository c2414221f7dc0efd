#!/bin/sh
# audit.sh SERVICE DRAIN COMMAND… : runs a command while the units SERVICE.socket and SERVICE.service stand still, and starts those again
# that ran before, whatever happens, a connection that breaks included. Without DRAIN (true) it refuses where one runs.
set -eu
service=$1 drain=$2
shift 2
active=
for unit in "$service.socket" "$service.service"; do
    case $(systemctl is-active "$unit" 2>/dev/null || true) in active | activating | reloading) active="$active $unit" ;; esac
done
if [ -n "$active" ]; then
    [ "$drain" = true ] || {
        printf 'it serves, and would measure its clients as well; stop it for the time with audit_drain=true\n' >&2
        exit 4
    }
    trap 'systemctl start $active' EXIT
    trap 'exit 129' HUP INT TERM
    systemctl stop $active
fi
"$@"
