#!/bin/bash
# e2e.sh [PYTEST ARGUMENT...]: tests/e2e on a cluster of up.sh, which is made for it and ended after it. With KEEP=1 the
# cluster stays. IMAGE=TAR takes an image that is built already. Logs of a failure: E2E_LOGS, default build/e2e-logs.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
root=$(cd "$here/../../.." && pwd)
python=${PYTHON:-$root/.venv/bin/python}
export E2E_LOGS=${E2E_LOGS:-$root/build/e2e-logs}
state=$(mktemp -d "${TMPDIR:-/tmp}/usbip-lab.XXXXXX")
status=1

finish() {
  trap - EXIT INT TERM
  if [ "$status" != 0 ]; then
    mkdir -p "$E2E_LOGS"
    # everything but what is large or secret
    (cd "$state" && find . -name '*.log' -size -20M -print0 | tar --null -T - -cf -) | tar -C "$E2E_LOGS" -xf - || true
    echo "logs: $E2E_LOGS" >&2
  fi
  if [ -n "${KEEP:-}" ]; then
    echo "the cluster stays: export KUBECONFIG=$state/admin.kubeconfig; end it with: $here/down.sh $state; rm -rf $state" >&2
  else
    "$here/down.sh" "$state" && rm -rf "$state"
  fi
  exit "$status"
}
trap finish EXIT
trap 'status=130; exit 130' INT TERM

bin=$("$here/build.sh" apiserver nodes | tail -1)
export PATH=$bin:$PATH
image=${IMAGE:-}
if [ -z "$image" ]; then
  image=$state/usbip-plugin.tar
  "$root/tests/lab/image/build.sh" --output "$image" usbip-plugin:e2e
fi
"$here/up.sh" "$state" "$image"
status=0
"$python" -m pytest "$root/tests/e2e" --kubeconfig "$state/admin.kubeconfig" --nodes lab --lab-state "$state" \
  --image usbip-plugin:e2e "$@" || status=$?
