#!/bin/sh
# older.sh FILE… : says yes where the server runs with older settings than there are, as after a run that broke before it was started again.
set -eu
systemctl show -p NeedDaemonReload --value lfm-edge-serve.service lfm-edge-serve.socket
started=$(systemctl show -p ActiveEnterTimestamp --value lfm-edge-serve.service)
[ -z "$started" ] || find "$@" -newermt "$started" -printf 'yes\n' 2>/dev/null || true
