#!/bin/bash
# guest.sh [PYTEST ARGUMENT...]: tests/node in the QEMU guest: a real kubelet and containerd on a kernel with the real
# vhci_hcd and USB devices. The control plane runs outside, on this machine's 127.0.0.1, and ends with the tests.
# Needs Debian and root. IMAGE=TAR takes an image that is built already, by IMAGE_NAME (usbip-plugin:e2e).
# COMMAND=... runs that in the guest instead of the tests. Logs of a failure: NODE_LOGS, default build/node-logs.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
root=$(cd "$here/../../.." && pwd)
python=${PYTHON:-$root/.venv/bin/python}
export NODE_LOGS=${NODE_LOGS:-$root/build/node-logs}
MEMORY=3072 SECONDS_IN_GUEST=${SECONDS_IN_GUEST:-1200}
state=$(mktemp -d "${TMPDIR:-/var/tmp}/usbip-node.XXXXXX")
status=1

finish() {
  trap - EXIT INT TERM
  local file
  if [ "$status" != 0 ]; then
    mkdir -p "$NODE_LOGS"
    cp -r "$state"/*.log "$state/guest" "$NODE_LOGS" 2>/dev/null || true
    echo "logs: $NODE_LOGS" >&2
  fi
  # SIGKILL, as their state is removed, and an API server without etcd ignores SIGTERM
  for file in "$state"/*.pid; do [ ! -e "$file" ] || kill -KILL "$(cat "$file")" 2>/dev/null || true; done
  { wait; } 2>/dev/null
  rm -rf "$state"
  exit "$status"
}
trap finish EXIT
trap 'status=130; exit 130' INT TERM

bin=$("$here/build.sh" apiserver nodes | tail -1)
export PATH=$bin:$PATH
image=${IMAGE:-}
if [ -z "$image" ]; then
  image=$state/image.tar
  "$root/tests/lab/image/build.sh" --output "$image" "${IMAGE_NAME:-usbip-plugin:e2e}"
fi
image=$(realpath -e "$image")
STATE=$state BIN=$bin
# shellcheck source=parts.sh
. "$here/parts.sh"
mkdir "$state/guest"
# The guest's seconds are longer than those of the control plane (run.sh): a node that renews its Lease every ten of its own
# seconds must count as ready.
MANAGER_ARGUMENTS=(--node-monitor-grace-period=10m)

# Outside, images, manifests and control plane are quick.
pause_image
image_disk "$state/pause.tar" "$image"
kubectl kustomize "$root/deploy" >"$state/base.yaml"
kubectl kustomize "$root/deploy/overlays/modules" >"$state/modules.yaml"
kubectl kustomize "$root/deploy/overlays/exporter" >"$state/exporter.yaml"
# two neighbours for etcd, one for the API server, so that several can run at a time
read -r api_port etcd_port < <(python3 - <<'P'
import socket
while True:
    with socket.socket() as one, socket.socket() as two, socket.socket() as three:
        one.bind(("127.0.0.1", 0))
        two.bind(("127.0.0.1", 0))
        try:
            three.bind(("127.0.0.1", two.getsockname()[1] + 1))
        except (OSError, OverflowError):
            continue
        print(one.getsockname()[1], two.getsockname()[1])
        break
P
)
control_plane 127.0.0.1 "$api_port" "$etcd_port" guest
# the guest reaches it at the address in its certificate
kubeconfig 10.96.0.1 "$(cat "$state/guest.token")" >"$state/node.kubeconfig"
printf '{"server": "https://10.96.0.1", "token": "%s", "ca": "%s"}\n' "$(cat "$state/admin.token")" "$state/certs/apiserver.crt" \
  >"$state/api.json"

cd "$root"
arguments=
[ $# = 0 ] || printf -v arguments '%q ' "$@"
command=${COMMAND:-"$(realpath -s "$python") -m pytest -p no:cacheprovider tests/node $arguments"}
status=0
tests/lab/guest/run.sh -u -N -w "$state" -m "$MEMORY" -t "$SECONDS_IN_GUEST" \
  -q "-drive if=virtio,format=raw,cache=unsafe,file=$state/containerd.ext4" "
  export NODE_STATE=$state NODE_IMAGE=${IMAGE_NAME:-usbip-plugin:e2e}
  tests/lab/cluster/guest-up.sh $state $api_port && { $command; }
  status=\$?
  cp /run/node/*.log $state/guest/; cp -r /run/node/logs $state/guest/; exit \$status" || status=$?
