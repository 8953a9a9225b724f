#!/bin/bash
# cni.sh TOKEN POD_SUBNET: writes this node's CNI configuration, and the routes to the other nodes' pods.
set -euo pipefail
server=$(sed -n 's/^ *server: //p' /etc/kubernetes/kubelet.conf)
kubectl --kubeconfig=/dev/null "--server=$server" --certificate-authority=/etc/kubernetes/pki/ca.crt "--token=$1" get nodes -o json |
  jq -r '.items[] | select(.spec.podCIDR)
    | [.metadata.name, .spec.podCIDR, (.status.addresses[] | select(.type == "InternalIP").address)] | @tsv' |
  while read -r name subnet address; do
    if [ "$name" != "$(hostname)" ]; then
      ip route replace "$subnet" via "$address"
      continue
    fi
    mkdir -p /etc/cni/net.d
    cat >/etc/cni/net.d/.new <<J
{"cniVersion": "0.4.0", "name": "lab", "plugins": [
 {"type": "ptp", "mtu": 1500, "ipam": {"type": "host-local", "dataDir": "/run/cni-ipam", "routes": [{"dst": "0.0.0.0/0"}],
  "ranges": [[{"subnet": "$subnet"}]]}},
 {"type": "portmap", "capabilities": {"portMappings": true}}]}
J
    cmp -s /etc/cni/net.d/.new /etc/cni/net.d/10-lab.conflist || mv /etc/cni/net.d/.new /etc/cni/net.d/10-lab.conflist
    iptables -t nat -C POSTROUTING -s "$subnet" ! -d "$2" -j MASQUERADE 2>/dev/null ||
      iptables -t nat -A POSTROUTING -s "$subnet" ! -d "$2" -j MASQUERADE
  done
