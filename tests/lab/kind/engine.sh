# engine.sh: to be sourced. A Docker engine: the one that answers, else a private one, whose state is in the cache and
# which engine_stop ends. Sets DOCKER_HOST then.
# shellcheck shell=bash
engine_cache=${USBIP_PLUGIN_CACHE:-$HOME/.cache/usbip-plugin}/kind
engine_here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
engine_started=
ENGINE_TENTHS=600

engine_start() {
  docker version >/dev/null 2>&1 && return
  local dockerd
  dockerd=$(PATH=/usr/sbin:/usr/bin:/sbin:/bin command -v dockerd) || {
    echo "no Docker engine answers, and there is no dockerd to start one; on Debian: apt-get install docker.io" >&2
    return 1
  }
  [ "$(id -u)" = 0 ] || { echo "no Docker engine answers, and starting one needs root" >&2; return 1; }
  local run=/run/usbip-plugin-docker arguments=()
  mkdir -p "$run" "$engine_cache"
  export DOCKER_HOST=unix://$run/docker.sock
  if ! docker version >/dev/null 2>&1; then
    # three nodes with systemd, kubelet and containerd pass the default of 128 instances
    sysctl -qw fs.inotify.max_user_instances=1024 fs.inotify.max_user_watches=524288 || true
    # in a sandbox without CAP_SYS_RESOURCE nothing may raise a limit or lower an OOM score
    if ! unshare --fork prlimit --pid $$ --nofile=1048577:1048577 true 2>/dev/null; then
      arguments+=(--oom-score-adjust=0 --add-runtime "nores=$engine_here/runc-nores" --default-runtime nores)
    fi
    PATH=/usr/sbin:/usr/bin:/sbin:/bin setsid nohup "$dockerd" --data-root "$engine_cache/docker" --exec-root "$run/exec" \
      --pidfile "$run/docker.pid" -H "$DOCKER_HOST" ${arguments[0]+"${arguments[@]}"} >"$run/dockerd.log" 2>&1 </dev/null 9>&- &
    for _ in $(seq "$ENGINE_TENTHS"); do docker version >/dev/null 2>&1 && break; sleep .1; done
    docker version >/dev/null 2>&1 || { echo "the Docker engine does not start: $run/dockerd.log" >&2; tail -n 5 "$run/dockerd.log" >&2; return 1; }
    engine_started=$run/docker.pid
  fi
  # what a test cluster says stays on this machine: a ClusterIP that no rule answers would be routed out
  local device
  device=$(ip -4 route show default | sed -n 's/.* dev \([^ ]*\).*/\1/p' | head -1)
  [ -z "$device" ] || iptables -C DOCKER-USER -i br-+ -o "$device" -j REJECT 2>/dev/null || \
    iptables -I DOCKER-USER -i br-+ -o "$device" -j REJECT
}

engine_stop() {
  [ -n "$engine_started" ] || return 0
  local pid
  pid=$(cat "$engine_started")
  kill "$pid"
  for _ in $(seq "$ENGINE_TENTHS"); do [ -e "/proc/$pid" ] || break; sleep .1; done
}
