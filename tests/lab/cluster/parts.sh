# Functions of up.sh and guest.sh; to be sourced. Needs STATE (a directory) and BIN (of build.sh).
# shellcheck shell=bash
PAUSE=localhost/pause:lab
READY_TENTHS=900
# more arguments of the controller manager
MANAGER_ARGUMENTS=()

# kubeconfig SERVER TOKEN: to standard output
kubeconfig() {
  cat <<Y
apiVersion: v1
kind: Config
clusters: [{name: lab, cluster: {server: "https://$1", certificate-authority: $STATE/certs/apiserver.crt}}]
users: [{name: user, user: {token: $2}}]
contexts: [{name: lab, context: {cluster: lab, user: user}}]
current-context: lab
Y
}

# control_plane ADDRESS PORT ETCD_PORT NODE...: etcd (on that port and the next), API server, scheduler and controller
# manager, until it answers. Leaves admin.kubeconfig, the *.pid and *.log of each, NODE.token, certs/apiserver.crt.
control_plane() {
  local address=$1 port=$2 etcd=http://127.0.0.1:$3 peer=http://127.0.0.1:$(($3 + 1)) name
  shift 3
  openssl genrsa -out "$STATE/sa.key" 2048 2>/dev/null
  (
    umask 077
    for name in admin scheduler manager "$@"; do openssl rand -hex 16 >"$STATE/$name.token"; done
    {
      echo "$(cat "$STATE/admin.token"),admin,admin,system:masters"
      echo "$(cat "$STATE/scheduler.token"),system:kube-scheduler,scheduler,"
      echo "$(cat "$STATE/manager.token"),system:kube-controller-manager,manager,"
      for name; do echo "$(cat "$STATE/$name.token"),system:node:$name,$name,system:nodes"; done
    } >"$STATE/tokens.csv"
    for name in admin scheduler manager; do
      kubeconfig "$address:$port" "$(cat "$STATE/$name.token")" >"$STATE/$name.kubeconfig"
    done
  )
  _background etcd etcd --data-dir "$STATE/etcd" --unsafe-no-fsync --listen-client-urls "$etcd" --advertise-client-urls "$etcd" \
    --listen-peer-urls "$peer" --initial-advertise-peer-urls "$peer" --initial-cluster "default=$peer"
  # its certificate also has the first address of the service range
  _background apiserver kube-apiserver --etcd-servers="$etcd" --service-account-key-file="$STATE/sa.key" \
    --service-account-signing-key-file="$STATE/sa.key" --service-account-issuer=https://kubernetes.default.svc \
    --token-auth-file="$STATE/tokens.csv" --authorization-mode=Node,RBAC --enable-admission-plugins=NodeRestriction \
    --cert-dir="$STATE/certs" --service-cluster-ip-range=10.96.0.0/16 --bind-address="$address" --secure-port="$port" \
    --allow-privileged --kubelet-preferred-address-types=InternalIP
  apiserver_ready
  _background scheduler kube-scheduler --kubeconfig "$STATE/scheduler.kubeconfig" --leader-elect=false --secure-port 0
  _background manager kube-controller-manager --kubeconfig "$STATE/manager.kubeconfig" --leader-elect=false --secure-port 0 \
    --service-account-private-key-file="$STATE/sa.key" --use-service-account-credentials \
    --root-ca-file="$STATE/certs/apiserver.crt" "${MANAGER_ARGUMENTS[@]}"
}

apiserver_ready() {
  for _ in $(seq "$READY_TENTHS"); do
    "$BIN/kubectl" --kubeconfig "$STATE/admin.kubeconfig" get --raw /readyz >/dev/null 2>&1 && break
    sleep .1
  done
  "$BIN/kubectl" --kubeconfig "$STATE/admin.kubeconfig" get --raw /readyz >/dev/null
}

_background() { # _background NAME COMMAND...: with NAME.command for `again`
  local name=$1
  shift
  printf '%q ' "$BIN/$1" "${@:2}" >"$STATE/$name.command"
  again "$name"
}

again() { # again NAME: starts a part of the control plane as it was started before
  local command
  eval "command=($(cat "$STATE/$1.command"))"
  nohup "${command[@]}" >>"$STATE/$1.log" 2>&1 </dev/null 9>&- &
  echo $! >"$STATE/$1.pid"
}

# pause_image: STATE/pause.tar, the process that holds a pod's namespaces
pause_image() {
  local here
  here=$(dirname "${BASH_SOURCE[0]}")
  gcc -static -Os -o "$STATE/pause" "$here/pause.c"
  tar -C "$STATE" -cf "$STATE/pause-root.tar" pause
  python3 "$here/../image/archive.py" "$STATE/pause-root.tar" "$(uname -m | sed 's/^x86_64$/amd64/; s/^aarch64$/arm64/')" \
    "$PAUSE" "$STATE/pause.tar" /pause
}

# containerd 1 knows version 2 of its configuration, in which all of CRI is one plugin
_config_version() { case $("$BIN/containerd" --version) in *' 1.'*) echo 2 ;; *) echo 3 ;; esac; }

# image_disk IMAGE.TAR...: STATE/containerd.ext4, the directory of a containerd with these images unpacked, which would
# take minutes in the emulated guest.
image_disk() {
  local root=$STATE/containerd-root run=$STATE/containerd-run image pid status=0
  mkdir -p "$root" "$run"
  cat >"$run/config.toml" <<T
version = $(_config_version)
root = "$root"
state = "$run/state"
disabled_plugins = ["io.containerd.grpc.v1.cri", "io.containerd.cri.v1.images", "io.containerd.cri.v1.runtime"]
[grpc]
  address = "$run/sock"
T
  PATH=$BIN:$PATH containerd -c "$run/config.toml" >"$STATE/image-disk.log" 2>&1 </dev/null &
  pid=$!
  for _ in $(seq "$READY_TENTHS"); do [ -S "$run/sock" ] && break; sleep .1; done
  for image; do
    "$BIN/ctr" -a "$run/sock" -n k8s.io images import "$image" >>"$STATE/image-disk.log" 2>&1 || status=1
  done
  kill "$pid"
  wait "$pid" || true
  [ "$status" = 0 ] || { tail "$STATE/image-disk.log" >&2; return 1; }
  # room for files of containers
  truncate -s "$(($(du -sm "$root" | cut -f1) * 5 / 4 + 1024))M" "$STATE/containerd.ext4"
  PATH=$PATH:/usr/sbin:/sbin mkfs.ext4 -q -O ^has_journal -E lazy_itable_init=1 -d "$root" "$STATE/containerd.ext4"
  rm -rf "$root" "$run"
}

# node_files NODE-DIRECTORY ADDRESS POD-SUBNET CGROUP: the configuration of a node's containerd and kubelet. CDI is in its
# default directory. cgroup v1 and a machine without CAP_SYS_RESOURCE are enough.
node_files() {
  local node=$1 address=$2 subnet=$3 cgroup=$4
  mkdir -p "$node/cni"
  local version cri images runtime=io.containerd.cri.v1.runtime cni_bin='bin_dirs = ["'$BIN'"]'
  version=$(_config_version)
  cri='restrict_oom_score_adj = true'
  images='[plugins."io.containerd.cri.v1.images".pinned_images]
  sandbox = "'$PAUSE'"'
  if [ "$version" = 2 ]; then
    runtime=io.containerd.grpc.v1.cri cni_bin='bin_dir = "'$BIN'"' images=''
    cri+='
  enable_cdi = true
  sandbox_image = "'$PAUSE'"'
  fi
  cat >"$node/containerd.toml" <<T
version = $version
root = "$node/containerd"
state = "$node/containerd.run"
[grpc]
  address = "$node/containerd.sock"
[plugins."$runtime"]
  $cri
  [plugins."$runtime".containerd.runtimes.runc]
    runtime_type = "io.containerd.runc.v2"
    options = {BinaryName = "$BIN/runc", SystemdCgroup = false}
  [plugins."$runtime".cni]
    $cni_bin
    conf_dir = "$node/cni"
$images
T
  cat >"$node/cni/10-lab.conflist" <<J
{"cniVersion": "1.0.0", "name": "lab", "plugins": [{"type": "ptp", "ipam": {"type": "host-local", "dataDir": "$node/ipam",
 "subnet": "$subnet", "routes": [{"dst": "0.0.0.0/0"}]}}]}
J
  cat >"$node/kubelet.yaml" <<Y
apiVersion: kubelet.config.k8s.io/v1beta1
kind: KubeletConfiguration
failCgroupV1: false
cgroupDriver: cgroupfs
cgroupRoot: $cgroup
containerRuntimeEndpoint: unix://$node/containerd.sock
# only processes of this machine reach this address
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
