#!/bin/bash
# e2e.sh [PYTEST ARGUMENT...]: tests/e2e on a cluster of up.sh, which is made for it and ended after it. With KEEP=1 the
# cluster stays. IMAGE=TAR takes an image that is built already, OLD_IMAGE=TAR one of another version for the tests of an
# upgrade, named usbip-plugin:e2e-old (tests/lab/image/build.sh --revision makes one; the simulated kernel must understand
# it: VERSION of usbip_sim/kernel/wire.py); without it they have one image under two names.
# Logs of a failure: E2E_LOGS, default build/e2e-logs.
# Exit status 75: there is no cluster to test on, after two tries; that says nothing about the tests.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
root=$(cd "$here/../../.." && pwd)
python=${PYTHON:-$root/.venv/bin/python}
export E2E_LOGS=${E2E_LOGS:-$root/build/e2e-logs}
INFRASTRUCTURE=75
state=$(mktemp -d "${TMPDIR:-/tmp}/usbip-lab.XXXXXX")
status=1 begun=''

# keep_logs DIRECTORY: of the cluster, without large and secret files
keep_logs() {
  mkdir -p "$1"
  (cd "$state" && find . -name '*.log' -size -20M -print0 | tar --null -T - -cf -) | tar -C "$1" -xf - || true
  echo "logs: $1" >&2
}

finish() {
  trap - EXIT INT TERM
  [ "$status" = 0 ] || keep_logs "$E2E_LOGS"
  if [ -n "${KEEP:-}" ]; then
    echo "the cluster stays: export KUBECONFIG=$state/admin.kubeconfig; end it with: $here/down.sh $state; rm -rf $state" >&2
  else
    # down.sh does nothing without a lab
    [ -z "$begun" ] || "$here/down.sh" "$state" || true
    rm -rf "$state"
  fi
  exit "$status"
}
trap finish EXIT
trap 'status=130; exit 130' INT TERM

bin=$("$here/build.sh" apiserver nodes | tail -1) || { status=$?; exit "$status"; }
export PATH=$bin:$PATH
image=${IMAGE:-}
if [ -z "$image" ]; then
  image=$state/usbip-plugin.tar
  "$root/tests/lab/image/build.sh" --output "$image" usbip-plugin:e2e
fi
images=("$(realpath -e "$image")")
[ -z "${OLD_IMAGE:-}" ] || images+=("$(realpath -e "$OLD_IMAGE")")
# set-up may fail once because of the machine, the tests may not
begun=1
if ! "$here/up.sh" "$state" "${images[@]}"; then
  echo "the cluster did not come up: once more" >&2
  keep_logs "$E2E_LOGS/did-not-come-up"
  "$here/down.sh" "$state" || true
  if ! "$here/up.sh" "$state" "${images[@]}"; then
    echo "the cluster did not come up twice: this says nothing about the tests" >&2
    status=$INFRASTRUCTURE
    exit "$status"
  fi
fi
status=0
"$python" -m pytest "$root/tests/e2e" --kubeconfig "$state/admin.kubeconfig" --nodes lab --lab-state "$state" \
  --image usbip-plugin:e2e ${OLD_IMAGE:+--old-image usbip-plugin:e2e-old} "$@" || status=$?
[ "$status" != 0 ] || echo "tested with: runtime=runc $(runc --version | sed -n 's/^runc version //p')"
