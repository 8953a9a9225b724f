#!/bin/bash
# run.sh COMMAND...: runs the command in a network namespace of its own, in which tests/power joins guests by a bridge.
# What the guests and the API server need is built before, because the namespace has no way out. Everything that the
# command has started ends with it. Needs Debian and root.
# POWER_LOGS: where logs of plugins and guests go; default build/power-logs.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
root=$(cd "$here/../../.." && pwd)
export POWER_LOGS=${POWER_LOGS:-$root/build/power-logs}
POWER_IMAGE=$("$root/tests/lab/guest/setup.sh")
POWER_BIN=$("$root/tests/lab/cluster/build.sh" apiserver | tail -1)
export POWER_IMAGE POWER_BIN KUBEBUILDER_ASSETS=$POWER_BIN
"$root/tests/lab/guest/compile.sh"
rm -rf "$POWER_LOGS"
mkdir -p "$POWER_LOGS"
cd "$root"
exec unshare --net --pid --fork --kill-child=KILL --mount-proc "$@"
