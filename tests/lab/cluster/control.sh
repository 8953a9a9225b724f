#!/bin/bash
# control.sh STATE_DIR VERB PART: stops or starts a part of up.sh's control plane: etcd, apiserver, scheduler, manager
#   stop   SIGTERM, and SIGKILL after 5 s; nodes and their pods run on
#   start  with the earlier command; the API server answers when this returns
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
[ $# = 3 ] || { sed -n '2,4s/^# //p' "${BASH_SOURCE[0]}" >&2; exit 2; }
STATE=$(realpath -e "$1") verb=$2 part=$3
BIN=$("$here/build.sh" apiserver nodes | tail -1)
STOP_TENTHS=50 KILL_TENTHS=100
# shellcheck source=parts.sh
. "$here/parts.sh"
[ -s "$STATE/$part.command" ] || { echo "control.sh: no $part in $STATE" >&2; exit 2; }

# a zombie counts as ended: init may be slow to reap it
runs() { [ -e "/proc/$1" ] && ! grep -qs '^State:[[:space:]]*Z' "/proc/$1/status"; }
case $verb in
  stop)
    pid=$(cat "$STATE/$part.pid")
    kill "$pid"
    for _ in $(seq "$STOP_TENTHS"); do runs "$pid" || exit 0; sleep .1; done
    kill -KILL "$pid"
    for _ in $(seq "$KILL_TENTHS"); do runs "$pid" || exit 0; sleep .1; done
    echo "control.sh: $part does not end" >&2
    exit 1
    ;;
  start)
    ! runs "$(cat "$STATE/$part.pid")" || exit 0
    again "$part"
    [ "$part" != apiserver ] || apiserver_ready
    ;;
  *) echo "control.sh: there is no $verb" >&2; exit 2 ;;
esac
