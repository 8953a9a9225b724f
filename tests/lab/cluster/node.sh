#!/bin/bash
# node.sh STATE_DIR VERB NODE [ARGUMENT...]: controls a node of up.sh
#   start             containerd and kubelet, after up.sh has written their configuration
#   stop-kubelet      SIGTERM, and waits for its end; pods run on
#   start-kubelet     and waits until it listens, for instance for kubectl exec
#   restart-kubelet   stop, start
#   kill PATTERN      SIGKILL for the processes of the node's containers whose command line matches (pgrep -f)
#   pids PATTERN      their process ids
#   exec COMMAND...   in the node's mount and network namespace
set -euo pipefail
[ $# -ge 3 ] || { sed -n '2,9s/^# //p' "${BASH_SOURCE[0]}" >&2; exit 2; }
state=$(realpath -e "$1") verb=$2 name=$3
shift 3
number=${name#node-}
node=$state/node-$number
[ -d "$node" ] || { echo "node.sh: no node $name in $state" >&2; exit 2; }
bin=$("$(dirname "${BASH_SOURCE[0]}")/build.sh" apiserver nodes | tail -1)
export PATH=$bin:$PATH
STOP_TENTHS=300 START_TENTHS=300

# a zombie counts as ended: init may be slow to reap it
runs() { [ -e "/proc/$1" ] && ! grep -qs '^State:[[:space:]]*Z' "/proc/$1/status"; }
alive() { [ -s "$node/$1.pid" ] && runs "$(cat "$node/$1.pid")"; }
inside() { nsenter "--net=/run/netns/usbiplab-$number" "--mount=/proc/$(cat "$node/holder.pid")/ns/mnt" "$@"; }
bg() {
  local what=$1
  shift
  inside setsid nohup bash -c 'echo $$ >"$0"; exec "$@"' "$node/$what.pid" "$@" >>"$node/$what.log" 2>&1 </dev/null 9>&- &
  for _ in $(seq "$START_TENTHS"); do alive "$what" && return; sleep .1; done
  echo "node.sh: $what did not start: $node/$what.log" >&2
  return 1
}
stop() { # stop WHAT SIGNAL
  alive "$1" || return 0
  local pid
  pid=$(cat "$node/$1.pid")
  kill "-$2" "$pid"
  for _ in $(seq "$STOP_TENTHS"); do runs "$pid" || { rm -f "$node/$1.pid"; return 0; }; sleep .1; done
  echo "node.sh: $1 does not end" >&2
  return 1
}
kubelet() {
  alive kubelet && return
  rm -f "$node/kubelet.pid"
  bg kubelet kubelet --config "$node/kubelet.yaml" --kubeconfig "$node/kubeconfig" --root-dir /var/lib/kubelet \
    --cert-dir "$node/certs" --hostname-override "$name" --node-ip "10.89.0.1$number"
  for _ in $(seq "$START_TENTHS"); do inside bash -c ': <"/dev/tcp/$0/10250"' "10.89.0.1$number" 2>/dev/null && return; sleep .1; done
  echo "node.sh: kubelet does not listen: $node/kubelet.log" >&2
  return 1
}
# the cgroup of a process names its node
pids() {
  local pid
  for pid in $(pgrep -f -- "$1" || true); do
    grep -qE "[:/]usbiplab-$number/|/usbiplab-$number(/|$)" "/proc/$pid/cgroup" 2>/dev/null && echo "$pid"
  done
  return 0
}

containerd() {
  alive containerd && return
  bg containerd containerd -c "$node/containerd.toml"
  for _ in $(seq "$START_TENTHS"); do ctr -a "$node/containerd.sock" version >/dev/null 2>&1 && return; sleep .1; done
  echo "node.sh: containerd does not answer: $node/containerd.log" >&2
  return 1
}

case $verb in
  start)
    # cgroup v1 has a tree for each controller, v2 one for all
    for tree in /sys/fs/cgroup /sys/fs/cgroup/*/; do
      [ -f "$tree/cgroup.procs" ] || continue
      [ ! -f "$tree/cgroup.subtree_control" ] || [ "$tree" != /sys/fs/cgroup ] || \
        sed 's/\([^ ]*\)/+\1/g' "$tree/cgroup.controllers" >"$tree/cgroup.subtree_control" 2>/dev/null || true
      [ "$tree" = /sys/fs/cgroup ] || [ ! -f /sys/fs/cgroup/cgroup.controllers ] || continue
      mkdir -p "$tree/usbiplab-$number"
      for file in cpuset.cpus cpuset.mems; do
        [ ! -f "$tree/$file" ] || [ -f /sys/fs/cgroup/cgroup.controllers ] || cat "$tree/$file" >"$tree/usbiplab-$number/$file"
      done
    done
    mkdir -p /var/lib/kubelet /run/vhci_hcd /run/cdi /run/netns /dev/bus/usb
    # holds the node's mount namespace: the kubelet's directories are constants, so each node mounts its own there
    rm -f "$node/mounted"
    setsid nohup unshare --mount --propagation private bash -euc "
      mount --bind '$node/kubelet' /var/lib/kubelet
      mount --bind '$node/vhci' /run/vhci_hcd
      mount --bind '$node/cdi' /run/cdi
      mount --bind '$node/devbus' /dev/bus/usb
      mount --bind '$node/netns' /run/netns
      mount --make-rshared /
      echo \$\$ >'$node/holder.pid'
      touch '$node/mounted'
      exec sleep infinity" >"$node/holder.log" 2>&1 </dev/null 9>&- &
    for _ in $(seq "$START_TENTHS"); do [ -e "$node/mounted" ] && break; sleep .1; done
    [ -e "$node/mounted" ] || { cat "$node/holder.log" >&2; exit 1; }
    containerd
    while read -r image; do
      inside ctr -a "$node/containerd.sock" -n k8s.io images import "$image" >>"$node/images.log" 2>&1
    done <"$state/images"
    kubelet
    ;;
  stop-kubelet) stop kubelet TERM ;;
  start-kubelet) kubelet ;;
  restart-kubelet) stop kubelet TERM && kubelet ;;
  pids) pids "$1" ;;
  kill)
    found=$(pids "$1")
    [ -n "$found" ] || { echo "node.sh: nothing on $name matches $1" >&2; exit 1; }
    # shellcheck disable=SC2086 # one word each
    kill -KILL $found
    ;;
  exec) inside "$@" ;;
  *) echo "node.sh: there is no $verb" >&2; exit 2 ;;
esac
