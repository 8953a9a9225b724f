#!/bin/bash
# e2e.sh [PYTEST ARGUMENT...]: tests/e2e on a kind cluster of its own, from the image to the deletion of the cluster.
#   KEEP=1             leaves the cluster, and prints how to use and end it
#   IMAGE=TAR          an archive of the image, named usbip-plugin:e2e, that is built already
#   NODE_IMAGE=IMAGE   of kind's nodes; else kind's own where its registry answers, else one made by node-image.sh
#   E2E_LOGS=DIR       where the logs of a failure go, default build/e2e-logs
#   PYTHON=PYTHON      with what the tests need, default .venv/bin/python
# Uses the Docker engine that answers, or starts one (root). kind and kubectl come from PATH or are built. The user's own
# kubeconfig is not touched. Exit status 75: there is no cluster to test on, after two tries.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
root=$(cd "$here/../../.." && pwd)
cluster=usbip-e2e image=usbip-plugin:e2e
# shellcheck source=cluster.sh
. "$here/cluster.sh"
"$python" -m pytest --version >/dev/null 2>&1 || { rmdir "$state"; echo "$python has no pytest: use make e2e, or set PYTHON" >&2; exit 1; }

cluster_tools
status=1
image_archive
status=$INFRASTRUCTURE
cluster_up kind create cluster --name "$cluster" --config "$root/kind-config.yaml" --wait "$READY" ${node_image:+--image "$node_image"}
twice "loading the image" run kind load image-archive --name "$cluster" "$archive"
rm -f "$state/image.tar"
# --keep: keeps the plugin's logs after a failure, as the whole cluster is deleted. Long tests and those that need the lab
# are left out: tests/lab/cluster/e2e.sh runs them.
status=0
run "$python" -m pytest "$root/tests/e2e" --ignore "$root/tests/e2e/test_soak.py" --ignore "$root/tests/e2e/test_api_outage.py" --kubeconfig "$KUBECONFIG" --nodes kind --image "$image" --keep "$@" || status=$?
[ "$status" != 0 ] || tested_with_kind
