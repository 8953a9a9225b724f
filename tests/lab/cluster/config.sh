# What a node is configured by; sourced by up.sh. Wants STATE, BIN (build.sh's directory) and PAUSE (an image).
# shellcheck shell=bash

API=10.89.0.1:6443

# kubeconfig TOKEN: to standard output
kubeconfig() {
  cat <<Y
apiVersion: v1
kind: Config
clusters: [{name: lab, cluster: {server: "https://$API", certificate-authority: $STATE/certs/apiserver.crt}}]
users: [{name: user, user: {token: $1}}]
contexts: [{name: lab, context: {cluster: lab, user: user}}]
current-context: lab
Y
}

# node_files INTO NODE-DIRECTORY ADDRESS POD-SUBNET CGROUP TOKEN: what containerd and the kubelet read, written to INTO,
# for a node that keeps its state in NODE-DIRECTORY
node_files() {
  local into=$1 node=$2 address=$3 subnet=$4 cgroup=$5
  mkdir -p "$into/cni"
  (umask 077 && kubeconfig "$6" >"$into/kubeconfig")
  cat >"$into/containerd.toml" <<T
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
    options = {BinaryName = "$BIN/runc", SystemdCgroup = false}
  [plugins."io.containerd.cri.v1.runtime".cni]
    bin_dirs = ["$BIN"]
    conf_dir = "$into/cni"
[plugins."io.containerd.cri.v1.images".pinned_images]
  sandbox = "$PAUSE"
T
  cat >"$into/cni/10-lab.conflist" <<J
{"cniVersion": "1.0.0", "name": "lab", "plugins": [{"type": "ptp", "ipam": {"type": "host-local", "dataDir": "$node/ipam",
 "subnet": "$subnet", "routes": [{"dst": "0.0.0.0/0"}]}}]}
J
  cat >"$into/kubelet.yaml" <<Y
apiVersion: kubelet.config.k8s.io/v1beta1
kind: KubeletConfiguration
failCgroupV1: false
cgroupDriver: cgroupfs
cgroupRoot: $cgroup
containerRuntimeEndpoint: unix://$node/containerd.sock
# a lab's: whoever reaches this address is on this machine
authentication: {anonymous: {enabled: true}, webhook: {enabled: false}}
authorization: {mode: AlwaysAllow}
address: $address
healthzBindAddress: 127.0.0.1
podLogsDir: $node/logs
failSwapOn: false
enforceNodeAllocatable: []
localStorageCapacityIsolation: false
makeIPTablesUtilChains: false
evictionHard: {memory.available: "1Mi"}
Y
}
