#!/bin/bash
# guest.sh [PYTEST ARGUMENT...]: tests/node in the QEMU guest: a real kubelet and containerd on a kernel with the real
# vhci_hcd and USB devices. The control plane runs outside, on this machine's 127.0.0.1, and ends with the tests.
# Needs Debian and root. IMAGE=TAR takes an image that is built already, by IMAGE_NAME (usbip-plugin:e2e).
# COMMAND=... runs that in the guest instead of the tests. Logs of a failure: NODE_LOGS, default build/node-logs.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
root=$(cd "$here/../../.." && pwd)
export NODE_LOGS=${NODE_LOGS:-$root/build/node-logs}
MEMORY=4096 SECONDS_IN_GUEST=${SECONDS_IN_GUEST:-840}
API_PORT=16443 ETCD_PORT=23379 PEER_PORT=23380
state=$(mktemp -d "${TMPDIR:-/var/tmp}/usbip-node.XXXXXX")
status=1 pids=()

finish() {
  trap - EXIT INT TERM
  local pid
  if [ "$status" != 0 ]; then
    mkdir -p "$NODE_LOGS"
    cp -r "$state"/*.log "$state/guest" "$NODE_LOGS" 2>/dev/null || true
    echo "logs: $NODE_LOGS" >&2
  fi
  for pid in ${pids[0]+"${pids[@]}"}; do kill "$pid" 2>/dev/null || true; done
  wait
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
cd "$state"
mkdir guest

# The pause image, and the manifests: what is outside is quick.
gcc -static -Os -o pause "$here/pause.c"
tar -cf pause-root.tar pause
python3 "$here/../image/archive.py" pause-root.tar amd64 localhost/pause:lab pause.tar /pause
kubectl kustomize "$root/deploy" >base.yaml
kubectl kustomize "$root/deploy/overlays/modules" >modules.yaml

# The control plane.
bg() { local name=$1; shift; "$@" >"$state/$name.log" 2>&1 </dev/null & pids+=($!); }
openssl genrsa -out sa.key 2048 2>/dev/null
token() { openssl rand -hex 16; }
admin=$(token) scheduler=$(token) manager=$(token) node=$(token)
cat >tokens.csv <<T
$admin,admin,admin,system:masters
$scheduler,system:kube-scheduler,scheduler,
$manager,system:kube-controller-manager,manager,
$node,system:node:guest,guest,system:nodes
T
bg etcd etcd --data-dir "$state/etcd" --unsafe-no-fsync --listen-client-urls "http://127.0.0.1:$ETCD_PORT" \
  --advertise-client-urls "http://127.0.0.1:$ETCD_PORT" --listen-peer-urls "http://127.0.0.1:$PEER_PORT" \
  --initial-advertise-peer-urls "http://127.0.0.1:$PEER_PORT" --initial-cluster "default=http://127.0.0.1:$PEER_PORT"
# its certificate has the first address of the service range, under which the guest reaches it
bg apiserver kube-apiserver --etcd-servers="http://127.0.0.1:$ETCD_PORT" --service-account-key-file=sa.key \
  --service-account-signing-key-file=sa.key --service-account-issuer=https://kubernetes.default.svc \
  --token-auth-file=tokens.csv --authorization-mode=Node,RBAC --enable-admission-plugins=NodeRestriction \
  --cert-dir=certs --service-cluster-ip-range=10.96.0.0/16 --secure-port="$API_PORT" --bind-address=127.0.0.1 \
  --allow-privileged
kubeconfig() { # kubeconfig SERVER TOKEN
  cat <<Y
apiVersion: v1
kind: Config
clusters: [{name: lab, cluster: {server: "https://$1", certificate-authority: $state/certs/apiserver.crt}}]
users: [{name: user, user: {token: $2}}]
contexts: [{name: lab, context: {cluster: lab, user: user}}]
current-context: lab
Y
}
kubeconfig "127.0.0.1:$API_PORT" "$admin" >admin.kubeconfig
kubeconfig "127.0.0.1:$API_PORT" "$scheduler" >scheduler.kubeconfig
kubeconfig "127.0.0.1:$API_PORT" "$manager" >manager.kubeconfig
kubeconfig 10.96.0.1 "$node" >node.kubeconfig
printf '{"server": "https://10.96.0.1", "token": "%s", "ca": "%s"}\n' "$admin" "$state/certs/apiserver.crt" >api.json
for _ in $(seq 600); do kubectl --kubeconfig admin.kubeconfig get --raw /readyz >/dev/null 2>&1 && break; sleep .1; done
kubectl --kubeconfig admin.kubeconfig get --raw /readyz >/dev/null
bg scheduler kube-scheduler --kubeconfig scheduler.kubeconfig --leader-elect=false --bind-address 127.0.0.1 --secure-port 0
bg manager kube-controller-manager --kubeconfig manager.kubeconfig --leader-elect=false --bind-address 127.0.0.1 \
  --secure-port 0 --service-account-private-key-file=sa.key --use-service-account-credentials --root-ca-file=certs/apiserver.crt

cd "$root"
printf -v arguments '%q ' "$@"
command=${COMMAND:-"python3 -m pytest -p no:cacheprovider tests/node $arguments"}
status=0
tests/lab/guest/run.sh -u -N -w "$state" -m "$MEMORY" -t "$SECONDS_IN_GUEST" "
  export NODE_STATE=$state NODE_IMAGE=${IMAGE_NAME:-usbip-plugin:e2e}
  tests/lab/cluster/guest-up.sh $state $API_PORT $image && { $command; }
  status=\$?
  cp /run/node/*.log $state/guest/; cp -r /run/node/logs $state/guest/; exit \$status" || status=$?
