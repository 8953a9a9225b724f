#!/bin/bash
# e2e.sh [PYTEST ARGUMENT...]: tests/e2e on a kind cluster of its own, from the image to the deletion of the cluster.
#   KEEP=1             leaves the cluster, and says how to use and how to end it
#   NODE_IMAGE=IMAGE   of kind's nodes; else kind's own where its registry answers, else one made by node-image.sh
#   E2E_LOGS=DIR       where the logs of a failure go, default build/e2e-logs
#   PYTHON=PYTHON      with what the tests need, default .venv/bin/python
# Uses the Docker engine that answers, or starts one (root). kind and kubectl come from PATH or are built. The user's own
# kubeconfig is not touched.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
root=$(cd "$here/../../.." && pwd)
python=${PYTHON:-$root/.venv/bin/python}
cluster=usbip-e2e image=usbip-plugin:e2e
export E2E_LOGS=${E2E_LOGS:-$root/build/e2e-logs}
READY=180s REGISTRY_SECONDS=5 DELETE_SECONDS=60
# shellcheck source=engine.sh
. "$here/engine.sh"
"$python" -m pytest --version >/dev/null 2>&1 || { echo "$python has no pytest: use make e2e, or set PYTHON" >&2; exit 1; }

state=$(mktemp -d "${TMPDIR:-/tmp}/usbip-kind.XXXXXX")
export KUBECONFIG=$state/kubeconfig
status=1 created='' child=''

# run COMMAND...: in a process group of its own, so that a signal ends it at once; bash alone would wait for its end
run() {
  local result=0
  set -m
  "$@" </dev/null &
  child=$!
  set +m
  wait "$child" || result=$?
  child=
  return "$result"
}

finish() {
  trap - EXIT
  # once is enough: a second signal would leave the cluster behind, and each step here is bounded
  trap '' INT TERM
  if [ -n "$child" ]; then
    kill -TERM -- "-$child" 2>/dev/null || true
    wait "$child" 2>/dev/null || true
  fi
  if [ "$status" != 0 ] && [ "$status" != 130 ] && [ -n "$created" ]; then
    "$here/logs.sh" "$E2E_LOGS/cluster" "$cluster"
    echo "logs: $E2E_LOGS" >&2
  fi
  if [ -n "${KEEP:-}" ] && [ -n "$created" ]; then
    cat >&2 <<T
the cluster stays, with the plugin as the tests left it:
  export KUBECONFIG=$KUBECONFIG${DOCKER_HOST:+ DOCKER_HOST=$DOCKER_HOST} PATH=$(dirname "$(command -v kind)"):\$PATH
  kubectl delete namespace --ignore-not-found usbip-e2e usbip-system    # before the tests run on it again:
  $python -m pytest tests/e2e --kubeconfig \$KUBECONFIG --nodes kind --image $image
  $here/down.sh; rm -r $state    # ends it
T
  else
    [ -z "$created" ] || timeout "$DELETE_SECONDS" kind delete cluster --name "$cluster" || true
    rm -rf "$state"
    engine_stop
  fi
  exit "$status"
}
trap finish EXIT
trap 'status=130; exit 130' INT TERM

engine_start
command -v kind >/dev/null && command -v kubectl >/dev/null || PATH=$("$here/../cluster/build.sh" apiserver nodes kind | tail -1):$PATH
export PATH
if kind get clusters 2>/dev/null | grep -qx "$cluster"; then
  echo "there is a kind cluster $cluster already, in use, or left by KEEP=1: end it with $here/down.sh" >&2
  exit 1
fi
# any answer will do, the registry's is 401
registry() {
  "$python" - "$REGISTRY_SECONDS" <<'P'
import sys, urllib.error, urllib.request
try:
    urllib.request.urlopen("https://registry-1.docker.io/v2/", timeout=float(sys.argv[1]))
except urllib.error.HTTPError:
    pass
except OSError:
    sys.exit(1)
P
}
node_image=${NODE_IMAGE:-}
if [ -z "$node_image" ] && ! registry; then
  run "$here/node-image.sh" >"$state/node-image"
  node_image=$(cat "$state/node-image")
fi
# the archive, not the image: an engine with containerd's image store cannot hand over one platform of several
run "$root/tests/lab/image/build.sh" --builder docker --output "$state/image.tar" "$image"
created=1
run kind create cluster --name "$cluster" --config "$root/kind-config.yaml" --wait "$READY" ${node_image:+--image "$node_image"}
run kubectl wait --for=condition=Ready node --all "--timeout=$READY"
run kubectl rollout status -n kube-system deployment/coredns "--timeout=$READY"
run kind load image-archive --name "$cluster" "$state/image.tar"
rm "$state/image.tar"
# --keep: what the plugin said is to be had after a failure; the cluster goes as a whole. Left out is what lasts, or needs
# the lab: tests/lab/cluster/e2e.sh has it.
status=0
run "$python" -m pytest "$root/tests/e2e" --ignore "$root/tests/e2e/test_soak.py" --ignore "$root/tests/e2e/test_api_outage.py" --kubeconfig "$KUBECONFIG" --nodes kind --image "$image" --keep "$@" || status=$?
