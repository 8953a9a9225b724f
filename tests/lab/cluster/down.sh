#!/bin/bash
# down.sh STATE_DIR: ends what up.sh started, containers too, however far it came, and removes its state; logs stay
set -uo pipefail
[ $# = 1 ] && [ -n "$1" ] || { sed -n '2s/^# //p' "${BASH_SOURCE[0]}" >&2; exit 2; }
state=$(realpath -m "$1")
# everything mounted below the directory is unmounted
[ -d "$state/etcd" ] || [ -d "$state/node-1" ] || [ "$(cat /sys/class/net/usbiplab0/ifalias 2>/dev/null)" = "$state" ] || { echo "down.sh: $state is not the state of a lab" >&2; exit 1; }
GONE_TENTHS=100
if [ -e /sys/class/net/usbiplab0 ]; then
  owner=$(cat /sys/class/net/usbiplab0/ifalias)
  [ -z "$owner" ] || [ "$owner" = "$state" ] || { echo "down.sh: the lab that is up is that of $owner, not of $state" >&2; exit 1; }
fi

running=()
end() { # end SIGNAL PID-FILE...
  local signal=$1 file pid
  shift
  for file; do
    [ -s "$file" ] || continue
    pid=$(cat "$file")
    kill "-$signal" "$pid" 2>/dev/null && running+=("$pid")
  done
}
# a zombie counts as ended: init may be slow to reap it
ended() { [ ! -e "/proc/$1" ] || grep -qs '^State:[[:space:]]*Z' "/proc/$1/status"; }
gone() {
  local pid
  for pid in ${running[0]+"${running[@]}"}; do
    for _ in $(seq "$GONE_TENTHS"); do ended "$pid" && break; sleep .1; done
  done
  running=()
}
end KILL "$state"/node-*/kubelet.pid
gone
# the containers: first their supervisors, then their processes
for shim in $(pgrep -f 'containerd-shim-runc-v2' || true); do
  tr '\0' ' ' <"/proc/$shim/cmdline" 2>/dev/null | grep -qF "$state/" && kill -KILL "$shim" 2>/dev/null && running+=("$shim")
done
for number in {1..8}; do
  for procs in $(find /sys/fs/cgroup -path "*/usbiplab-$number/*" -name cgroup.procs 2>/dev/null); do
    # the process may have ended
    for pid in $(cat "$procs" 2>/dev/null); do kill -KILL "$pid" 2>/dev/null && running+=("$pid"); done
  done
done
gone
end KILL "$state"/node-*/containerd.pid "$state"/node-*/holder.pid
# their state is removed
end KILL "$state"/{manager,scheduler,apiserver,etcd}.pid
gone
for number in {1..8}; do
  find /sys/fs/cgroup -depth -type d -path "*/usbiplab-$number*" -exec rmdir {} + 2>/dev/null
  ip netns delete "usbiplab-$number" 2>/dev/null
done
if [ -e /sys/class/net/usbiplab0 ]; then
  iptables -D FORWARD -i usbiplab0 -o usbiplab0 -j ACCEPT 2>/dev/null
  iptables -D FORWARD -i usbiplab0 ! -o usbiplab0 -j REJECT 2>/dev/null
  iptables -t nat -S PREROUTING | sed -n 's/^-A \(.* -i usbiplab0 .*\)/\1/p' | while read -ra rule; do
    iptables -t nat -D "${rule[@]}"
  done
  ip link delete usbiplab0
fi
awk -v at="$state/" 'index($2, at) == 1 {print $2}' /proc/self/mounts | sort -r | while read -r mounted; do umount -l "$mounted"; done
rm -rf "$state"/etcd "$state"/certs "$state"/*.{pid,command} "$state"/*.token "$state"/tokens.csv "$state"/sa.key "$state"/*.kubeconfig \
  "$state"/node-*/{kubelet,containerd,containerd.run,containerd.sock*,certs,cdi,vhci,devbus,netns,ipam,*.pid,kubeconfig}
