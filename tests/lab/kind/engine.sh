# engine.sh: to be sourced. A Docker engine: the one that answers, else a private one, whose state is in the cache and
# which engine_stop ends. Sets DOCKER_HOST then. down.sh ends one that a KEEP=1 left.
# shellcheck shell=bash
engine_cache=${USBIP_PLUGIN_CACHE:-$HOME/.cache/usbip-plugin}/kind
engine_here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
engine_run=/run/usbip-plugin-docker
engine_started=
ENGINE_TENTHS=600

# the device of the default route, if there is one
engine_way_out() { ip -4 route show default | sed -n 's/.* dev \([^ ]*\).*/\1/p' | head -1; }

engine_start() {
  docker version >/dev/null 2>&1 && return
  local dockerd
  dockerd=$(PATH=/usr/sbin:/usr/bin:/sbin:/bin command -v dockerd) || {
    echo "no Docker engine answers, and there is no dockerd to start one; on Debian: apt-get install docker.io" >&2
    return 1
  }
  [ "$(id -u)" = 0 ] || { echo "no Docker engine answers, and starting one needs root" >&2; return 1; }
  local arguments=()
  mkdir -p "$engine_run" "$engine_cache"
  export DOCKER_HOST=unix://$engine_run/docker.sock
  if ! docker version >/dev/null 2>&1; then
    # three nodes with systemd, kubelet and containerd pass the default of 128 instances
    sysctl -qw fs.inotify.max_user_instances=1024 fs.inotify.max_user_watches=524288 || true
    # a sandbox without CAP_SYS_RESOURCE cannot raise a limit or lower an OOM score
    if ! unshare --fork prlimit --pid $$ --nofile=1048577:1048577 true 2>/dev/null; then
      arguments+=(--oom-score-adjust=0 --add-runtime "nores=$engine_here/runc-nores" --default-runtime nores)
    fi
    # the first script starts the only engine
    exec 7>"$engine_run/start.lock"
    flock 7
    if ! docker version >/dev/null 2>&1; then
      PATH=/usr/sbin:/usr/bin:/sbin:/bin setsid nohup "$dockerd" --data-root "$engine_cache/docker" --exec-root "$engine_run/exec" \
        --pidfile "$engine_run/docker.pid" -H "$DOCKER_HOST" ${arguments[0]+"${arguments[@]}"} \
        >"$engine_run/dockerd.log" 2>&1 </dev/null 7>&- 8>&- 9>&- &
      engine_started=1
    fi
    for _ in $(seq "$ENGINE_TENTHS"); do docker version >/dev/null 2>&1 && break; sleep .1; done
    exec 7>&-
    docker version >/dev/null 2>&1 || {
      echo "the Docker engine does not start: $engine_run/dockerd.log" >&2
      tail -n 5 "$engine_run/dockerd.log" >&2
      return 1
    }
  fi
  # keeps a test cluster's packets on this machine: a ClusterIP without a rule would be routed out
  local device
  device=$(engine_way_out)
  [ -z "$device" ] || iptables -C DOCKER-USER -i br-+ -o "$device" -j REJECT 2>/dev/null || \
    iptables -I DOCKER-USER -i br-+ -o "$device" -j REJECT
}

# engine_stop: ends the engine if this shell started it and no other containers run in it.
engine_stop() {
  [ -z "$engine_started" ] || engine_end
}

# engine_end: ends the private engine, also of another script. It stays while containers run in it.
engine_end() {
  local pid device running
  pid=$(cat "$engine_run/docker.pid" 2>/dev/null) || return 0
  # the number may belong to another process by now
  tr '\0' ' ' 2>/dev/null <"/proc/$pid/cmdline" | grep -qF -- "--pidfile $engine_run/docker.pid" || return 0
  running=$(DOCKER_HOST=unix://$engine_run/docker.sock docker ps --format '{{.Names}}' 2>/dev/null | tr '\n' ' ')
  if [ -n "$running" ]; then
    echo "the Docker engine stays, for it runs: $running" >&2
    return 0
  fi
  kill "$pid"
  for _ in $(seq "$ENGINE_TENTHS"); do [ -e "/proc/$pid" ] || break; sleep .1; done
  device=$(engine_way_out)
  [ -z "$device" ] || iptables -D DOCKER-USER -i br-+ -o "$device" -j REJECT 2>/dev/null || true
}
