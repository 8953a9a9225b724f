#!/bin/bash
# down.sh: ends what e2e.sh left because of KEEP=1 or because it was killed: the cluster usbip-e2e, and the private
# Docker engine if there is one and nothing else runs in it. Any other engine and any other cluster stays.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=engine.sh
. "$here/engine.sh"
cluster=usbip-e2e
if ! docker version >/dev/null 2>&1; then
  export DOCKER_HOST=unix://$engine_run/docker.sock
  docker version >/dev/null 2>&1 || { echo "no Docker engine answers: nothing to end" >&2; exit 0; }
fi
PATH=$PATH:${USBIP_PLUGIN_CACHE:-$HOME/.cache/usbip-plugin}/k8s/bin
# the user's own kubeconfig is not touched
kubeconfig=$(mktemp)
trap 'rm -f "$kubeconfig" "$kubeconfig.lock"' EXIT
kind delete cluster --name "$cluster" --kubeconfig "$kubeconfig"
engine_end
