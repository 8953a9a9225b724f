#!/bin/bash
# guest-up.sh STATE_DIR API_PORT: run by guest.sh in the QEMU guest. Makes it the node "guest" of the control plane
# outside: containerd and kubelet on a kernel with the real vhci_hcd, cgroup v2, AppArmor. All of it is in /run/node;
# containerd's socket is /run/node/containerd.sock, its images are on /dev/vda. vhci_hcd itself is not loaded: that is for
# the tests.
set -euo pipefail
state=$1 port=$2 n=/run/node
START_TENTHS=600
up() { echo "$(cut -d' ' -f1 /proc/uptime) s: $*"; }
mkdir -p $n/{kubelet/device-plugins,certs,logs,containerd} /var/lib/kubelet /run/cdi

for module in virtio_blk veth nf_tables nft_compat nft_chain_nat xt_nat xt_MASQUERADE xt_tcpudp; do modprobe "$module"; done
mount -t ext4 /dev/vda $n/containerd
# modprobe at the path that the init container of deploy/overlays/modules uses
[ -e /sbin/modprobe ] || ln -s /run/bin/busybox /sbin/modprobe
sed 's/\([^ ]*\)/+\1/g' /sys/fs/cgroup/cgroup.controllers >/sys/fs/cgroup/cgroup.subtree_control
# AppArmor as on a Debian or Ubuntu node: containerd needs the parser at this path
if [ -e /sys/module/apparmor/parameters/enabled ] && [ -x "$GUEST_TOOLS/sbin/apparmor_parser" ]; then
  mount -t securityfs securityfs /sys/kernel/security
  ln -sf "$GUEST_TOOLS/sbin/apparmor_parser" /sbin/apparmor_parser
  cp -rn "$GUEST_TOOLS/etc/apparmor.d" "$GUEST_TOOLS/etc/apparmor" /etc/
  # parser.conf names it, and no profile loads without it
  cp -rn "$GUEST_TOOLS/usr/share/apparmor-features" /usr/share/
fi

# The API server's ClusterIP is answered outside. There is no kube-proxy, and other addresses do not leave the machine.
ip route add unreachable 10.96.0.0/16
ip route add 10.96.0.1 via 10.0.2.2
for chain in OUTPUT PREROUTING; do
  iptables -t nat -A $chain -d 10.96.0.1 -p tcp --dport 443 -j DNAT --to-destination "10.0.2.2:$port"
done
ip route del default
iptables -t nat -A POSTROUTING -s 10.90.9.0/24 ! -d 10.90.0.0/16 -o eth0 -j MASQUERADE

STATE=$state BIN=$(dirname "$(command -v runc)")
# shellcheck source=parts.sh
. "$(dirname "${BASH_SOURCE[0]}")/parts.sh"
node_files $n 10.0.2.15 10.90.9.0/24 /
mount --bind $n/kubelet /var/lib/kubelet
mount --make-rshared /
setsid nohup containerd -c $n/containerd.toml >$n/containerd.log 2>&1 </dev/null &
for _ in $(seq $START_TENTHS); do [ -S $n/containerd.sock ] && break; sleep .1; done
up containerd listens
setsid nohup kubelet --config $n/kubelet.yaml --kubeconfig "$state/node.kubeconfig" --root-dir /var/lib/kubelet \
  --cert-dir $n/certs --hostname-override guest --node-ip 10.0.2.15 >$n/kubelet.log 2>&1 </dev/null &
for _ in $(seq $START_TENTHS); do [ -S /var/lib/kubelet/device-plugins/kubelet.sock ] && break; sleep .1; done
[ -S /var/lib/kubelet/device-plugins/kubelet.sock ] || { tail -n 20 $n/kubelet.log >&2; exit 1; }
up the kubelet listens
