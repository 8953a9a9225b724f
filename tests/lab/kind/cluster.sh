# cluster.sh: to be sourced. A kind cluster that exists as long as one script. Needs $here and $cluster;
# sets KUBECONFIG, $state, $status (the exit status, 75 until the cluster is up) and $node_image. The script sets $status.
#   KEEP=1             leaves the cluster
#   NODE_IMAGE=IMAGE   of kind's nodes; else kind's own where its registry answers, else one made by node-image.sh
#   E2E_LOGS=DIR       where the logs of a failure go, default build/e2e-logs
# shellcheck shell=bash
cluster_root=$(cd "$here/../../.." && pwd)
python=${PYTHON:-$cluster_root/.venv/bin/python}
export E2E_LOGS=${E2E_LOGS:-$cluster_root/build/e2e-logs}
READY=180s REGISTRY_SECONDS=5 DELETE_SECONDS=60
INFRASTRUCTURE=75
# shellcheck source=engine.sh
. "$here/engine.sh"
state=$(mktemp -d "${TMPDIR:-/tmp}/usbip-kind.XXXXXX")
export KUBECONFIG=$state/kubeconfig
status=$INFRASTRUCTURE created='' child='' node_image=${NODE_IMAGE:-}

# run COMMAND...: in its own process group, so that a signal ends it at once, without a wait of bash
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

# twice WHAT COMMAND...: set-up, which may fail once because of the machine, unlike the tests
twice() {
  local what=$1
  shift
  "$@" && return
  echo "$what failed: once more" >&2
  "$@" && return
  echo "$what failed twice: this says nothing about the tests" >&2
  return "$INFRASTRUCTURE"
}

cluster_finish() {
  trap - EXIT
  # ignore a second signal, which would leave the cluster: each step here has a limit
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

# cluster_tools: an engine, kind and kubectl, and no cluster of that name
cluster_tools() {
  trap cluster_finish EXIT
  trap 'status=130; exit 130' INT TERM
  twice "the Docker engine" engine_start
  command -v kind >/dev/null && command -v kubectl >/dev/null || PATH=$("$here/../cluster/build.sh" apiserver nodes kind | tail -1):$PATH
  export PATH
  if kind get clusters 2>/dev/null | grep -qx "$cluster"; then
    echo "there is a kind cluster $cluster already, in use, or left by KEEP=1: end it with $here/down.sh" >&2
    status=1
    exit 1
  fi
  [ -n "$node_image" ] || registry || twice "the image of the nodes" _node_image
}

# tested_with_kind: for docs/tested_with.py
tested_with_kind() { echo "tested with: kind=$(kind version | sed 's/^kind v\([^ ]*\).*/\1/')"; }

# any answer is enough: the registry's is 401
registry() {
  python3 - "$REGISTRY_SECONDS" <<'P'
import sys, urllib.error, urllib.request
try:
    urllib.request.urlopen("https://registry-1.docker.io/v2/", timeout=float(sys.argv[1]))
except urllib.error.HTTPError:
    pass
except OSError:
    sys.exit(1)
P
}

_node_image() {
  run "$here/node-image.sh" >"$state/node-image" && node_image=$(cat "$state/node-image")
}

# image_archive: the file of the plugin's image, which is IMAGE or is built
image_archive() {
  archive=${IMAGE:-}
  [ -z "$archive" ] || { archive=$(realpath -e "$archive"); return; }
  archive=$state/image.tar
  # the archive, not the image: an engine with containerd's image store cannot export one of several platforms
  run "$cluster_root/tests/lab/image/build.sh" --builder docker --output "$archive" "$image"
}

# cluster_up COMMAND...: the command makes the cluster. Nodes and the cluster's DNS are ready when this returns.
cluster_up() { twice "making the cluster" _cluster_up "$@"; }
_cluster_up() {
  if [ -n "$created" ]; then
    "$here/logs.sh" "$E2E_LOGS/cluster-that-did-not-come-up" "$cluster"
    timeout "$DELETE_SECONDS" kind delete cluster --name "$cluster" || return
  fi
  created=1
  run "$@" && run kubectl wait --for=condition=Ready node --all "--timeout=$READY" &&
    run kubectl rollout status -n kube-system deployment/coredns "--timeout=$READY"
}
