#!/bin/bash
# up.sh [--nodes N] STATE_DIR [IMAGE.TAR...]: a real Kubernetes on this machine: a control plane and N (default 2) nodes,
# node-1, node-2 and so on, each with its own network namespace and address, mounts, kubelet and containerd.
# Every node gets the images.
# KUBECONFIG is STATE_DIR/admin.kubeconfig, logs are STATE_DIR/*.log and STATE_DIR/node-*/*.log; node.sh controls a node,
# down.sh ends it all. Needs root. One at a time on a machine. Nothing in it has a way out of the machine.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
usage() { sed -n '2,6s/^# //p' "${BASH_SOURCE[0]}" >&2; exit 2; }
fail() { echo "up.sh: $1" >&2; exit 1; }
NODES=2 READY_SECONDS=90 MAX_NODES=8
API=10.89.0.1 PORT=6443 ETCD_PORT=22379
while [ $# -gt 0 ]; do
  case $1 in
    --nodes)
      [[ ${2:-} =~ ^[1-9]$ ]] && [ "$2" -le "$MAX_NODES" ] || fail "--nodes ${2:-}: a number from 1 to $MAX_NODES"
      NODES=$2
      shift 2
      ;;
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
# shellcheck source=parts.sh
. "$here/parts.sh"
mkdir -p "$state"
trap 'echo "up.sh: failed; logs are in $state; end it with: $here/down.sh $state" >&2' ERR
cd "$state"

# The network: a bridge, an address for each node. No default route in the nodes.
ip link add usbiplab0 type bridge
# the directory of the lab that owns it
ip link set usbiplab0 alias "$state"
ip addr add 10.89.0.1/24 dev usbiplab0
ip link set usbiplab0 up
# bridged packets may pass the machine's firewall, which may drop them (Docker's does)
iptables -I FORWARD -i usbiplab0 -o usbiplab0 -j ACCEPT
iptables -I FORWARD -i usbiplab0 ! -o usbiplab0 -j REJECT
# without a kube-proxy only the API server's ClusterIP is answered, here
iptables -t nat -A PREROUTING -i usbiplab0 -d 10.96.0.1 -p tcp --dport 443 -j DNAT --to-destination "$API:$PORT"
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
mapfile -t names < <(seq -f 'node-%g' "$NODES")
control_plane "$API" "$PORT" "$ETCD_PORT" "${names[@]}"
export KUBECONFIG=$state/admin.kubeconfig
pause_image
printf '%s\n' "$state/pause.tar" ${images[0]+"${images[@]}"} >images

# The nodes.
for i in $(seq "$NODES"); do
  node=$state/node-$i
  mkdir -p "$node"/{kubelet/device-plugins,certs,cdi,vhci,devbus,netns,logs}
  node_files "$node" "10.89.0.1$i" "10.90.$i.0/24" "/usbiplab-$i"
  (umask 077 && kubeconfig "$API:$PORT" "$(cat "node-$i.token")" >"$node/kubeconfig")
  "$here/node.sh" "$state" start "node-$i"
done
for i in $(seq "$NODES"); do
  for _ in $(seq "$READY_SECONDS"); do kubectl get node "node-$i" >/dev/null 2>&1 && break; sleep 1; done
  kubectl wait --for=condition=Ready "node/node-$i" "--timeout=${READY_SECONDS}s"
  # the scheduler uses a node only once the controller manager has seen it
  for _ in $(seq "$READY_SECONDS"); do [ -n "$(kubectl get node "node-$i" -o "jsonpath={.spec.taints}")" ] || break; sleep 1; done
done
echo "export KUBECONFIG=$KUBECONFIG"
