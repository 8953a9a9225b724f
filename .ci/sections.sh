# sections.sh: what .ci/run and .ci/nightly share; to be sourced. A section is a command with a time limit. Its output
# comes as it happens, each line behind the section's name, and its last line says how long it took: wall seconds,
# processor seconds (user and system, of everything that was waited for), and the load average at its end.
#
# Exit statuses: 1 a section failed; 75 (EX_TEMPFAIL of sysexits.h) only the infrastructure did: a download, a lab that
# did not come up.
# shellcheck shell=bash
set -o pipefail
# with CI=true, what a machine lacks fails a test instead of leaving it out
export DEBIAN_FRONTEND=noninteractive PYTHONUNBUFFERED=1 CI=true
CACHE=${USBIP_PLUGIN_CACHE:-$HOME/.cache/usbip-plugin}
# a section that is ended has to end what it started: clusters, guests
GRACE_SECONDS=90
INFRASTRUCTURE=75
# processor seconds that `calibrate` takes on the machine on which the limits were chosen
CALIBRATION_NOMINAL=1.00
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
export CACHE work
# what the ledger knows this run by; changes that are not committed are a tree of their own
tree=$(git stash create 2>/dev/null || true)
tree=$(git rev-parse --short=12 "${tree:-HEAD}^{tree}" 2>/dev/null || echo unknown)
TIMEFORMAT='%R %U %S'

say() { printf '%(%H:%M:%S)T %s\n' -1 "$*"; }

# section NAME SECONDS COMMAND...: runs the command; returns its exit status, 1 if tests were skipped in it
section() {
  local name=$1 limit=$2 status=0 verdict=ok skipped wall user system core load failed
  shift 2
  say "=== $name: $*"
  { time timeout --kill-after="$GRACE_SECONDS" "$limit" "$@" 2>&1 | tee "$work/$name.log" | sed -u "s/^/$name| /"; } \
    2>"$work/$name.time" || status=$?
  # make exits with 2 whatever the status of the recipe that failed
  if [ "$status" != 0 ] && grep -qaE "^make([[][0-9]+])?: [*]{3} .* Error $INFRASTRUCTURE\$" "$work/$name.log"; then
    status=$INFRASTRUCTURE
  fi
  read -r wall user system < <(tail -n 1 "$work/$name.time")
  core=$(awk "BEGIN { printf \"%.0f\", $user + $system }")
  load=$(cut -d' ' -f1 /proc/loadavg)
  # a tier that skips what it is there for has failed
  skipped=$(grep -aE '(^|[|] )=+ .* in [0-9.]+s.* =+$' "$work/$name.log" | grep -aoE '[0-9]+ skipped' | head -n 1 || true)
  if [ "$status" = 0 ] && [ -n "$skipped" ]; then
    say "$name: $skipped: a tier that cannot run has failed"
    status=1
  fi
  case $status in
    0) ;;
    "$INFRASTRUCTURE") verdict=INFRASTRUCTURE ;;
    124 | 137) verdict=FAILED; say "$name: no end within $limit s" ;;
    *) verdict=FAILED ;;
  esac
  failed=$(grep -aoE '^(FAILED|ERROR) [^ ]+::[^ ]+' "$work/$name.log" | cut -d' ' -f2 | sort -u | paste -sd, || true)
  printf '%-14s %-14s %5.0f s  %5s core-s  load %s\n' "$name" "$verdict" "$wall" "$core" "$load" >>"$work/summary"
  say "$name: $verdict after $(printf %.0f "$wall") s, $core core-s, load $load"
  record "$name" "$verdict" "$wall" "$core" "$load" "$failed"
  [ "$verdict" != ok ] || record_versions "$name"
  return "$status"
}

# record NAME VERDICT WALL CORE LOAD FAILED-TESTS: one line of the ledger that .ci/flakes.py reads
record() {
  mkdir -p "$CACHE/ci"
  printf '%(%FT%T)T\t%s\t%s\t%s\t%s\t%s\t%s\t%s\t%s\n' -1 "$tree" "$1" "$2" "$3" "$4" "$5" "${calibration:-}" "$6" >>"$CACHE/ci/sections.tsv"
}

# record_versions NAME: what a section without failures was tested with, for docs/tested_with.py
record_versions() {
  local line
  { grep -aE '^tested with: ' "$work/$1.log" || true; } | tr -d '\r' | sort -u | while read -r line; do
    printf '%(%FT%T)T\t%s\t%s\t%s\n' -1 "$tree" "$1" "${line#tested with: }"
  done >>"$CACHE/ci/tested-with.tsv"
}

# calibrate: sets calibration, the processor seconds of a fixed piece of Python: a slow machine is told from a slow test
calibrate() {
  export calibration
  calibration=$(python3 -c '
import time
begin, total = time.process_time(), 0
for number in range(9_000_000):
    total += number * number % 7
print(f"{time.process_time() - begin:.2f}")')
  say "calibration: $calibration processor seconds where the nominal machine takes $CALIBRATION_NOMINAL; load $(cut -d' ' -f1-3 /proc/loadavg)"
}

# attempt COMMAND...: up to three times; for downloads only, never for tests. Exit status 75 if none succeeded.
attempt() {
  local round
  for round in 1 2 3; do
    "$@" && return
    echo "attempt $round of: $*: failed"
  done
  return "$INFRASTRUCTURE"
}

# tests_that COUNTED: the sum of what the closing lines of pytest say of all sections, such as `passed`
tests_that() {
  local number total=0
  for number in $(cat "$work"/*.log 2>/dev/null | grep -aE '(^|[|] )=+ .* in [0-9.]+s.* =+$' | grep -aoE "[0-9]+ $1" | cut -d' ' -f1); do
    total=$((total + number))
  done
  echo "$total"
}

# why NAME: the lines in which a section's tests say why they failed, and its last lines
why() {
  printf '\n=== %s: why\n' "$1"
  grep -aE '^(_{3,} |[>E] |[^ ]+[.]py:[0-9]+: |(FAILED|ERROR) )' "$work/$1.log" | tail -n 60 || true
  printf '=== %s: its last lines\n' "$1"
  tail -n 20 "$work/$1.log"
}

# finish: what failed, for whoever keeps only the end of a log; the summary of all sections; and the exit status
finish() {
  local name verdict
  while read -r name verdict _; do
    [ "$verdict" = ok ] || why "$name"
  done <"$work/summary"
  printf '\n=== summary (calibration %s, nominal %s)\n' "${calibration:-none}" "$CALIBRATION_NOMINAL"
  cat "$work/summary"
  printf 'total %s s\n' "$SECONDS"
  printf 'tests: %s passed, %s failed\n' "$(tests_that passed)" "$(tests_that '(failed|errors?)')"
  if grep -q FAILED "$work/summary"; then exit 1; fi
  if grep -q INFRASTRUCTURE "$work/summary"; then exit "$INFRASTRUCTURE"; fi
  exit 0
}

packages() {
  local wanted=() package
  local packages=(
    ca-certificates gcc libc6-dev make openssl python3-venv # the project and its small tiers
    qemu-system-x86 zstd                                    # the guest
    chromium                                                # the status page
    strace                                                  # an idle process
    systemd                                                 # units
    busybox-static iproute2 iptables jq libseccomp-dev pkg-config procps # Kubernetes nodes
    buildah docker.io mmdebstrap qemu-user-static           # images and kind
    patchelf                                                # other Pythons
  )
  for package in "${packages[@]}"; do
    dpkg-query -W -f='${Status}' "$package" 2>/dev/null | grep -q 'ok installed' || wanted+=("$package")
  done
  [ ${#wanted[@]} = 0 ] || { apt-get update -qq && apt-get install -qq -y --no-install-recommends "${wanted[@]}" >"$work/apt.log"; } ||
    { tail -n 20 "$work/apt.log"; return 1; }
}

# The Kubernetes binaries need a recent Go. From 1.21 on, go fetches the release its module asks for by itself; Debian 12
# has an older one, which is good enough to fetch a toolchain from the module proxy.
GO_TOOLCHAIN=1.26.0
go_minor() { "$1" env GOVERSION 2>/dev/null | sed -E 's/^go1\.([0-9]+).*/\1/'; }
go_toolchain() {
  local arch minor dir
  minor=$(go_minor go || true)
  if [ "${minor:-0}" -lt 21 ]; then
    command -v go >/dev/null || apt-get install -qq -y --no-install-recommends golang-go
    arch=$(dpkg --print-architecture)
    dir=$(go mod download -json "golang.org/toolchain@v0.0.1-go$GO_TOOLCHAIN.linux-$arch" | sed -n 's/^\t"Dir": "\(.*\)",$/\1/p')
    [ -n "$dir" ] || return 1
    # a module's files come without their execute bits
    chmod -R u+x "$dir/bin" "$dir/pkg/tool"
    mkdir -p "$CACHE"
    ln -sfn "$dir" "$CACHE/go"
  fi
  PATH="$CACHE/go/bin:$PATH" go version
}
export GOTOOLCHAIN=auto
export GO_TOOLCHAIN

# What a run left behind that was killed: labs and clusters under the names that the tiers use.
leftovers() {
  [ ! -e /sys/class/net/usbiplab0 ] || tests/lab/cluster/down.sh "$(cat /sys/class/net/usbiplab0/ifalias)"
  [ ! -e /run/usbip-plugin-docker/docker.sock ] || tests/lab/kind/down.sh
}

# set_up TARGET: packages, Go and the Python environment (a target of the Makefile)
set_up() {
  attempt packages && attempt go_toolchain && leftovers && attempt make "$1"
}
export -f packages go_minor go_toolchain leftovers attempt set_up
export INFRASTRUCTURE
