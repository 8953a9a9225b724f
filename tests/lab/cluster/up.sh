#!/bin/bash
# up.sh STATE_DIR [IMAGE.TAR...]: a real Kubernetes on this machine: a control plane and two nodes, node-1 and node-2, each
# with its own network namespace and address, mounts, kubelet and containerd. The images are given to both nodes.
# KUBECONFIG is STATE_DIR/admin.kubeconfig, logs are STATE_DIR/*.log and STATE_DIR/node-*/*.log; node.sh handles a node,
# down.sh ends it all. Needs root. One at a time on a machine. Nothing in it has a way out of the machine.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
[ $# -gt 0 ] || { sed -n '2,5s/^# //p' "${BASH_SOURCE[0]}" >&2; exit 2; }
state=$(realpath -m "$1")
shift
NODES=2
READY_SECONDS=90
PAUSE=localhost/pause:lab

fail() { echo "up.sh: $1" >&2; exit 1; }
missing=()
for pair in ip:iproute2 iptables:iptables openssl:openssl gcc:gcc python3:python3 nsenter:util-linux pgrep:procps; do
  command -v "${pair%:*}" >/dev/null || missing+=("${pair#*:}")
done
[ ${#missing[@]} = 0 ] || fail "missing commands; on Debian: apt-get install ${missing[*]}"
[ "$(id -u)" = 0 ] || fail "needs root"
[ ! -e /sys/class/net/usbiplab0 ] || fail "a lab is up already, or was not ended well: down.sh STATE_DIR"
images=()
for image; do images+=("$(realpath -e "$image")"); done
bin=$("$here/build.sh" apiserver nodes | tail -1)
export PATH=$bin:$PATH
mkdir -p "$state"
trap 'echo "up.sh: failed; logs are in $state; end it with: $here/down.sh $state" >&2' ERR
cd "$state"
bg() { local name=$1; shift; nohup "$@" >"$state/$name.log" 2>&1 </dev/null 9>&- & echo $! >"$state/$name.pid"; }

# The network: a bridge, an address for each node. No default route in the nodes.
ip link add usbiplab0 type bridge
ip addr add 10.89.0.1/24 dev usbiplab0
ip link set usbiplab0 up
# bridged packets may pass the machine's own firewall, Docker's for one, which drops what it does not know
iptables -I FORWARD -i usbiplab0 -o usbiplab0 -j ACCEPT
iptables -I FORWARD -i usbiplab0 ! -o usbiplab0 -j REJECT
for i in $(seq "$NODES"); do
  ip netns add "usbiplab-$i"
  ip link add "usbiplab-v$i" type veth peer name eth0 netns "usbiplab-$i"
  ip link set "usbiplab-v$i" master usbiplab0 up
  inside=(nsenter "--net=/run/netns/usbiplab-$i")
  "${inside[@]}" ip link set lo up
  "${inside[@]}" ip addr add "10.89.0.1$i/24" dev eth0
  "${inside[@]}" ip link set eth0 up
  "${inside[@]}" sysctl -qw net.ipv4.ip_forward=1
  # there is no kube-proxy: the API server's ClusterIP is answered here, others nowhere
  "${inside[@]}" ip route add 10.96.0.1 via 10.89.0.1
  "${inside[@]}" ip route add unreachable 10.96.0.0/16
  for chain in OUTPUT PREROUTING; do
    "${inside[@]}" iptables -t nat -A "$chain" -d 10.96.0.1 -p tcp --dport 443 -j DNAT --to-destination 10.89.0.1:6443
  done
  # pods of one node reach those of the other
  for j in $(seq "$NODES"); do
    [ "$i" = "$j" ] || "${inside[@]}" ip route add "10.90.$j.0/24" via "10.89.0.1$j"
  done
  "${inside[@]}" iptables -t nat -A POSTROUTING -s "10.90.$i.0/24" ! -d 10.90.0.0/16 -o eth0 -j MASQUERADE
done

# The control plane.
openssl genrsa -out sa.key 2048 2>/dev/null
token() { openssl rand -hex 16; }
admin=$(token) scheduler=$(token) manager=$(token)
{
  echo "$admin,admin,admin,system:masters"
  echo "$scheduler,system:kube-scheduler,scheduler,"
  echo "$manager,system:kube-controller-manager,manager,"
} >tokens.csv
for i in $(seq "$NODES"); do
  token >"node-$i.token"
  echo "$(cat "node-$i.token"),system:node:node-$i,node-$i,system:nodes" >>tokens.csv
done
chmod 600 tokens.csv
bg etcd etcd --data-dir "$state/etcd" --unsafe-no-fsync --listen-client-urls http://127.0.0.1:22379 \
  --advertise-client-urls http://127.0.0.1:22379 --listen-peer-urls http://127.0.0.1:22380 \
  --initial-advertise-peer-urls http://127.0.0.1:22380 --initial-cluster default=http://127.0.0.1:22380
bg apiserver kube-apiserver --etcd-servers=http://127.0.0.1:22379 --service-account-key-file=sa.key \
  --service-account-signing-key-file=sa.key --service-account-issuer=https://kubernetes.default.svc \
  --token-auth-file=tokens.csv --authorization-mode=Node,RBAC --enable-admission-plugins=NodeRestriction \
  --cert-dir=certs --service-cluster-ip-range=10.96.0.0/16 --secure-port=6443 --bind-address=10.89.0.1 --allow-privileged \
  --kubelet-preferred-address-types=InternalIP
kubeconfig() {
  cat <<Y
apiVersion: v1
kind: Config
clusters: [{name: lab, cluster: {server: "https://10.89.0.1:6443", certificate-authority: $state/certs/apiserver.crt}}]
users: [{name: user, user: {token: $1}}]
contexts: [{name: lab, context: {cluster: lab, user: user}}]
current-context: lab
Y
}
kubeconfig "$admin" >admin.kubeconfig
kubeconfig "$scheduler" >scheduler.kubeconfig
kubeconfig "$manager" >manager.kubeconfig
chmod 600 ./*.kubeconfig
export KUBECONFIG=$state/admin.kubeconfig
for _ in $(seq 600); do kubectl get --raw /readyz >/dev/null 2>&1 && break; sleep .1; done
kubectl get --raw /readyz >/dev/null
bg scheduler kube-scheduler --kubeconfig scheduler.kubeconfig --leader-elect=false --bind-address 127.0.0.1
bg manager kube-controller-manager --kubeconfig manager.kubeconfig --leader-elect=false --bind-address 127.0.0.1 \
  --service-account-private-key-file=sa.key --use-service-account-credentials --root-ca-file=certs/apiserver.crt

# The images.
if [ ! -e pause.tar ]; then
  gcc -static -Os -o pause "$here/pause.c"
  tar -cf pause-root.tar pause
  python3 "$here/../image/archive.py" pause-root.tar "$(dpkg --print-architecture 2>/dev/null || echo amd64)" "$PAUSE" pause.tar /pause
fi
printf '%s\n' "$state/pause.tar" ${images[0]+"${images[@]}"} >images

# The nodes.
for i in $(seq "$NODES"); do
  node=$state/node-$i
  mkdir -p "$node"/{kubelet/device-plugins,cni,certs,cdi,vhci,devbus,netns,logs}
  kubeconfig "$(cat "node-$i.token")" >"$node/kubeconfig"
  chmod 600 "$node/kubeconfig"
  cat >"$node/containerd.toml" <<T
version = 3
root = "$node/containerd"
state = "$node/containerd.run"
[grpc]
  address = "$node/containerd.sock"
[plugins."io.containerd.cri.v1.runtime"]
  enable_cdi = true
  cdi_spec_dirs = ["/var/run/cdi"]
  restrict_oom_score_adj = true
  [plugins."io.containerd.cri.v1.runtime".containerd.runtimes.runc]
    runtime_type = "io.containerd.runc.v2"
    options = {BinaryName = "$bin/runc", SystemdCgroup = false}
  [plugins."io.containerd.cri.v1.runtime".cni]
    bin_dirs = ["$bin"]
    conf_dir = "$node/cni"
[plugins."io.containerd.cri.v1.images".pinned_images]
  sandbox = "$PAUSE"
T
  cat >"$node/cni/10-lab.conflist" <<J
{"cniVersion": "1.0.0", "name": "lab-$i", "plugins": [{"type": "ptp", "ipam": {"type": "host-local", "dataDir": "$node/ipam",
 "subnet": "10.90.$i.0/24", "routes": [{"dst": "0.0.0.0/0"}]}}]}
J
  cat >"$node/kubelet.yaml" <<Y
apiVersion: kubelet.config.k8s.io/v1beta1
kind: KubeletConfiguration
failCgroupV1: false
cgroupDriver: cgroupfs
cgroupRoot: /usbiplab-$i
containerRuntimeEndpoint: unix://$node/containerd.sock
# a lab's: whoever reaches this address is on this machine
authentication: {anonymous: {enabled: true}, webhook: {enabled: false}}
authorization: {mode: AlwaysAllow}
address: 10.89.0.1$i
healthzBindAddress: 127.0.0.1
podLogsDir: $node/logs
failSwapOn: false
enforceNodeAllocatable: []
localStorageCapacityIsolation: false
makeIPTablesUtilChains: false
evictionHard: {memory.available: "1Mi"}
Y
  "$here/node.sh" "$state" start "node-$i"
done
for i in $(seq "$NODES"); do
  for _ in $(seq "$READY_SECONDS"); do kubectl get node "node-$i" >/dev/null 2>&1 && break; sleep 1; done
  kubectl wait --for=condition=Ready "node/node-$i" "--timeout=${READY_SECONDS}s"
done
echo "export KUBECONFIG=$KUBECONFIG"
