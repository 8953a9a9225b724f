#!/bin/bash
# up.sh [--nodes N] [--guest] STATE_DIR [IMAGE.TAR...]: a real Kubernetes on this machine: a control plane and nodes, two
# unless told otherwise, node-1, node-2 and so on, each with its own network namespace and address, mounts, kubelet and
# containerd. The images are given to all of them. --guest prepares a place for one in a QEMU guest, see guest.sh.
# KUBECONFIG is STATE_DIR/admin.kubeconfig, logs are STATE_DIR/*.log and STATE_DIR/node-*/*.log; node.sh handles a node,
# down.sh ends it all. Needs root. One at a time on a machine. Nothing in it has a way out of the machine.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
usage() { sed -n '2,6s/^# //p' "${BASH_SOURCE[0]}" >&2; exit 2; }
fail() { echo "up.sh: $1" >&2; exit 1; }
NODES=2 READY_SECONDS=90 PAUSE=localhost/pause:lab MAX_NODES=8
guest=
while [ $# -gt 0 ]; do
  case $1 in
    --nodes)
      [[ ${2:-} =~ ^[0-9]+$ ]] && [ "$2" -le "$MAX_NODES" ] || fail "--nodes ${2:-}: a number from 0 to $MAX_NODES"
      NODES=$2
      shift 2
      ;;
    --guest) guest=1; shift ;;
    -*) usage ;;
    *) break ;;
  esac
done
[ $# -gt 0 ] || usage
state=$(realpath -m "$1")
shift
missing=()
for pair in ip:iproute2 iptables:iptables openssl:openssl gcc:gcc python3:python3 nsenter:util-linux pgrep:procps; do
  command -v "${pair%:*}" >/dev/null || missing+=("${pair#*:}")
done
[ ${#missing[@]} = 0 ] || fail "missing commands; on Debian: apt-get install ${missing[*]}"
[ "$(id -u)" = 0 ] || fail "needs root"
[ ! -e /sys/class/net/usbiplab0 ] || fail "a lab is up already, or was not ended well: $here/down.sh $(cat /sys/class/net/usbiplab0/ifalias)"
images=()
for image; do images+=("$(realpath -e "$image")"); done
bin=$("$here/build.sh" apiserver nodes | tail -1)
export PATH=$bin:$PATH
STATE=$state BIN=$bin
# shellcheck source=config.sh
. "$here/config.sh"
mkdir -p "$state"
trap 'echo "up.sh: failed; logs are in $state; end it with: $here/down.sh $state" >&2' ERR
cd "$state"
bg() { local name=$1; shift; nohup "$@" >"$state/$name.log" 2>&1 </dev/null 9>&- & echo $! >"$state/$name.pid"; }

# The network: a bridge, an address for each node. No default route in the nodes.
ip link add usbiplab0 type bridge
# whose it is
ip link set usbiplab0 alias "$state"
ip addr add 10.89.0.1/24 dev usbiplab0
ip link set usbiplab0 up
# bridged packets may pass the machine's own firewall, Docker's for one, which drops what it does not know
iptables -I FORWARD -i usbiplab0 -o usbiplab0 -j ACCEPT
iptables -I FORWARD -i usbiplab0 ! -o usbiplab0 -j REJECT
# there is no kube-proxy: the API server's ClusterIP is answered here, others nowhere
iptables -t nat -A PREROUTING -i usbiplab0 -d 10.96.0.1 -p tcp --dport 443 -j DNAT --to-destination "$API"
for i in $(seq "$NODES"); do
  ip netns add "usbiplab-$i"
  ip link add "usbiplab-v$i" type veth peer name eth0 netns "usbiplab-$i"
  ip link set "usbiplab-v$i" master usbiplab0 up
  inside=(nsenter "--net=/run/netns/usbiplab-$i")
  "${inside[@]}" ip link set lo up
  "${inside[@]}" ip addr add "10.89.0.1$i/24" dev eth0
  "${inside[@]}" ip link set eth0 up
  "${inside[@]}" sysctl -qw net.ipv4.ip_forward=1
  "${inside[@]}" ip route add 10.96.0.1 via 10.89.0.1
  "${inside[@]}" ip route add unreachable 10.96.0.0/16
  # pods of one node reach those of the other
  for j in $(seq "$NODES"); do
    [ "$i" = "$j" ] || "${inside[@]}" ip route add "10.90.$j.0/24" via "10.89.0.1$j"
  done
  "${inside[@]}" iptables -t nat -A POSTROUTING -s "10.90.$i.0/24" ! -d 10.90.0.0/16 -o eth0 -j MASQUERADE
done
if [ -n "$guest" ]; then
  ip tuntap add dev usbiplab-tap mode tap
  ip link set usbiplab-tap master usbiplab0 up
  # it has no NAT: what its pods ask is answered to them
  ip route add 10.90.99.0/24 via 10.89.0.99
fi

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
if [ -n "$guest" ]; then
  token >guest.token
  echo "$(cat guest.token),system:node:guest,guest,system:nodes" >>tokens.csv
fi
chmod 600 tokens.csv
bg etcd etcd --data-dir "$state/etcd" --unsafe-no-fsync --listen-client-urls http://127.0.0.1:22379 \
  --advertise-client-urls http://127.0.0.1:22379 --listen-peer-urls http://127.0.0.1:22380 \
  --initial-advertise-peer-urls http://127.0.0.1:22380 --initial-cluster default=http://127.0.0.1:22380
bg apiserver kube-apiserver --etcd-servers=http://127.0.0.1:22379 --service-account-key-file=sa.key \
  --service-account-signing-key-file=sa.key --service-account-issuer=https://kubernetes.default.svc \
  --token-auth-file=tokens.csv --authorization-mode=Node,RBAC --enable-admission-plugins=NodeRestriction \
  --cert-dir=certs --service-cluster-ip-range=10.96.0.0/16 --bind-address="${API%:*}" --secure-port="${API#*:}" \
  --allow-privileged --kubelet-preferred-address-types=InternalIP
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
  mkdir -p "$node"/{kubelet/device-plugins,certs,cdi,vhci,devbus,netns,logs}
  node_files "$node" "$node" "10.89.0.1$i" "10.90.$i.0/24" "/usbiplab-$i" "$(cat "node-$i.token")"
  "$here/node.sh" "$state" start "node-$i"
done
for i in $(seq "$NODES"); do
  for _ in $(seq "$READY_SECONDS"); do kubectl get node "node-$i" >/dev/null 2>&1 && break; sleep 1; done
  kubectl wait --for=condition=Ready "node/node-$i" "--timeout=${READY_SECONDS}s"
done
[ -z "$guest" ] || node_files "$state/guest" /run/usbiplab 10.89.0.99 10.90.99.0/24 / "$(cat guest.token)"
echo "export KUBECONFIG=$KUBECONFIG"
