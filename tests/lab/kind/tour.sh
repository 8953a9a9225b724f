#!/bin/bash
# tour.sh: runs the commands of the README's "Five minutes with kind" on a kind cluster of its own. The pod of the tour
# must print what the README shows; a second pod waits for the device and gets it when the first is deleted.
#   IMAGE=TAR          an archive of the image, named usbip-plugin:e2e: loaded instead of building
#   NODE_IMAGE=IMAGE, E2E_LOGS=DIR, KEEP=1: as for e2e.sh
# Where no registry answers, kind gets an image of its nodes, and the image is built as tests/lab/image does. Each command
# is printed before it runs, and ends within COMMAND_SECONDS. Exit status 75: there is no cluster, after two tries.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
cd "$here/../../.."
COMMAND_SECONDS=240 SAID_TENTHS=300
cluster=usbip-e2e image=usbip-plugin:e2e
# shellcheck source=cluster.sh
. "$here/cluster.sh"
# the README names no cluster
export KIND_CLUSTER_NAME=$cluster

# section PART: the commands (or the output that is shown) of the README's section, each ended by a NUL
section() {
  python3 - "$1" <<'P'
import re, sys
text = open("README.md", encoding="utf-8").read().partition("\n## Five minutes with kind\n")[2].partition("\n## ")[0]
for language, block in re.findall(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
    if (language == "sh") != (sys.argv[1] == "commands"):
        continue
    lines, command, end = block.splitlines(), [], None
    for line in lines:
        command.append(line)
        end = line.rpartition("<<'")[2].rstrip("'") if "<<'" in line else None if line == end else end
        if end is None:
            print("\n".join(command), end="\0")
            command = []
P
}

fail() { echo "tour.sh: $1" >&2; exit 1; }
say() { printf '\n%4d s  $ %s\n' "$SECONDS" "$1"; }
# the command of the README
do_it() { say "$1"; run timeout "$COMMAND_SECONDS" bash -euo pipefail -c "$1"; }
kind_create() { run timeout "$COMMAND_SECONDS" bash -euo pipefail -c "$1${node_image:+ --image $node_image}"; }
storage=usbip.dev/storage
offers() { # offers COUNT NODE...: until the nodes say so
  local count=$1
  shift
  do_it "kubectl wait $* --for=jsonpath='{.status.allocatable.usbip\.dev/storage}'=$count --timeout=90s"
}

# not_said: lines of the pod's output in the README that its log lacks, except the device's path and the time
not_said() {
  local line
  for line in "${shown[@]}"; do
    case $line in
      USBIP_*_DEVICE=*) grep -q '^USBIP_STORAGE_0_DEVICE=/dev/bus/usb/' "$state/log" || echo "$line" ;;
      USBIP_*) grep -qxF "$line" "$state/log" || echo "$line" ;;
      *) grep -q '^crw-rw-rw- .* /dev/bus/usb/' "$state/log" || echo "$line" ;;
    esac
  done
}

mapfile -d '' -t commands < <(section commands)
mapfile -d '' -t shown < <(section output)
pod='' missing=''
[ ${#commands[@]} -ge 8 ] || fail "README.md has no section with the commands"
cluster_tools
for command in "${commands[@]}"; do
  case $command in
    'kind create cluster'*)
      say "$command${node_image:+    # with --image $node_image: no registry answers}"
      cluster_up kind_create "$command"
      status=1
      ;;
    'docker build'*)
      [ -n "${IMAGE:-}" ] && say "$command    # not here: IMAGE is given" || say "$command    # as tests/lab/image/build.sh"
      image_archive
      ;;
    'kind load docker-image'*)
      say "$command    # its archive"
      status=$INFRASTRUCTURE
      twice "loading the image" run kind load image-archive --name "$cluster" "$archive"
      status=1
      ;;
    *'kind: Pod'*)
      mapfile -t nodes < <(kubectl get nodes -o name)
      offers 1 "${nodes[@]}"
      pod=$command
      do_it "$command"
      ;;
    *'kubectl logs tour'*)
      do_it "$command" | tee "$state/log"
      # the pod is ready a moment before its first line
      for _ in $(seq "$SAID_TENTHS"); do
        missing=$(not_said)
        [ -n "$missing" ] || break
        sleep .1
        kubectl logs tour >"$state/log"
      done
      [ -z "$missing" ] || fail "the pod did not say $missing"
      ;;
    'kubectl delete pod tour')
      holder=$(kubectl get pod tour -o 'jsonpath={.spec.nodeName}')
      mapfile -t others < <(kubectl get nodes -o name | grep -vxF "node/$holder")
      offers 0 "${others[@]}"
      do_it "${pod//name: tour/name: second}"
      do_it "kubectl wait --for=condition=PodScheduled=false pod/second --timeout=60s"
      [ "$(kubectl get pod second -o 'jsonpath={.status.phase}')" = Pending ] || fail "the second pod does not wait"
      do_it "$command"
      do_it "kubectl wait --for=condition=Ready pod/second --timeout=90s && kubectl logs second"
      [ "$(kubectl -n usbip-system get leases -l usbip.dev/lease=lock -o 'jsonpath={.items[*].spec.holderIdentity}')" = \
        "$(kubectl get pod second -o 'jsonpath={.spec.nodeName}')" ] || fail "the lock is not that of the second pod's node"
      ;;
    'kind delete cluster'*)
      [ -n "${KEEP:-}" ] && continue
      do_it "$command"
      created=
      ;;
    *) do_it "$command" ;;
  esac
done
[ -n "$pod" ] || fail "README.md has no pod"
status=0
tested_with_kind
echo "the tour took $SECONDS s"
