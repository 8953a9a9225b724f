#!/bin/bash
# e2e.sh [PYTEST ARGUMENT...]: tests/e2e on a kind cluster of its own, from the image to the deletion of the cluster.
#   KEEP=1             leaves the cluster, and says how to use it
#   NODE_IMAGE=IMAGE   of kind's nodes; else kind's own where its registry answers, else one made by node-image.sh
#   E2E_LOGS=DIR       where the logs of a failure go, default build/e2e-logs
# Uses the Docker engine that answers, or starts one (root). kind and kubectl come from PATH or are built.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
root=$(cd "$here/../../.." && pwd)
python=${PYTHON:-$root/.venv/bin/python}
cluster=usbip-e2e image=usbip-plugin:e2e
export E2E_LOGS=${E2E_LOGS:-$root/build/e2e-logs}
READY=180s REGISTRY_SECONDS=5
# shellcheck source=engine.sh
. "$here/engine.sh"

state=$(mktemp -d "${TMPDIR:-/tmp}/usbip-kind.XXXXXX")
export KUBECONFIG=$state/kubeconfig
status=1 created=

finish() {
  trap - EXIT INT TERM
  if [ "$status" != 0 ] && [ -n "$created" ]; then
    mkdir -p "$E2E_LOGS"
    kind export logs --name "$cluster" "$E2E_LOGS/kind" >/dev/null 2>&1 || true
    kubectl get pods,nodes,events -A -o wide >"$E2E_LOGS/objects.txt" 2>&1 || true
    kubectl get leases -n usbip-system -o yaml >"$E2E_LOGS/leases.yaml" 2>&1 || true
    echo "logs: $E2E_LOGS" >&2
  fi
  if [ -n "${KEEP:-}" ] && [ -n "$created" ]; then
    echo "the cluster stays: export KUBECONFIG=$KUBECONFIG${DOCKER_HOST:+ DOCKER_HOST=$DOCKER_HOST}" >&2
    echo "delete it with: kind delete cluster --name $cluster" >&2
  else
    [ -z "$created" ] || kind delete cluster --name "$cluster" || true
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
  echo "there is a kind cluster $cluster already, perhaps of KEEP=1: kind delete cluster --name $cluster" >&2
  exit 1
fi
node_image=${NODE_IMAGE:-}
if [ -z "$node_image" ] && ! curl -s -o /dev/null -m "$REGISTRY_SECONDS" https://registry-1.docker.io/v2/; then
  node_image=$("$here/node-image.sh")
fi
# the archive, not the image: an engine with containerd's image store cannot hand over one platform of several
"$root/tests/lab/image/build.sh" --builder docker --output "$state/image.tar" "$image"
created=1
kind create cluster --name "$cluster" --config "$root/kind-config.yaml" --wait "$READY" ${node_image:+--image "$node_image"}
kubectl wait --for=condition=Ready node --all "--timeout=$READY"
kubectl rollout status -n kube-system deployment/coredns "--timeout=$READY"
kind load image-archive --name "$cluster" "$state/image.tar"
status=0
"$python" -m pytest "$root/tests/e2e" --kubeconfig "$KUBECONFIG" --nodes kind --image "$image" "$@" || status=$?
