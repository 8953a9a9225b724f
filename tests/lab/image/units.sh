#!/bin/bash
# units.sh ARCH [ARGUMENT...]: the product's unit tests for an architecture that qemu-user-static emulates, with the Python
# and the libraries of its image. Tests that start programs are left out: an emulated process cannot. ARGUMENT: for pytest.
# Needs root.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
root=$(cd "$here/../../.." && pwd)
[ $# -ge 1 ] || { sed -n '2,4s/^# //p' "${BASH_SOURCE[0]}" >&2; exit 2; }
case $1 in
  amd64) machine=x86_64 ;;
  arm64) machine=aarch64 ;;
  *) echo "units.sh: $1: amd64 and arm64 are built" >&2; exit 2 ;;
esac
arch=$1
shift
emulator=$(command -v "qemu-$machine-static") || { echo "units.sh: qemu-$machine-static is missing: apt-get install qemu-user-static" >&2; exit 1; }
PACKAGES=(attach cli config exporter inventory kube kubelet locks node observe usbip vhci)
START_PROGRAMS=(
  cli/test_main.py cli/test_prune.py kube/test_client.py kube/test_kubeconfig.py kube/test_lazy_imports.py kubelet/test_proto.py
  node/test_memory.py
)
STARTS_ONE='not_imported or silent_endpoint'

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"$here/build.sh" --arch "$arch" --output "$work/image.tar" usbip-plugin:units
mkdir "$work/image" "$work/root"
tar -C "$work/image" -xf "$work/image.tar"
for layer in $(jq -r '.[0].Layers[]' "$work/image/manifest.json"); do tar -C "$work/root" -xf "$work/image/$layer"; done
variables='{"PATH": "/usr/local/bin:/usr/bin:/bin", "PYTHONPATH": "/work:/opt/usbip-plugin/lib:/opt/test", "PYTHONDONTWRITEBYTECODE": "1", "HOME": "/tmp", "EMULATED": "1"}'
inside() {
  unshare --mount --net --pid --fork --kill-child "${PYTHON:-python3}" "$root/tests/image/confine.py" "$work/root" "$emulator" "$variables" "$@"
}
version=$(inside python3 -c 'import sys; print("%d.%d" % sys.version_info[:2])')
"${PYTHON:-python3}" -m pip --disable-pip-version-check --quiet install --target "$work/root/opt/test" -c "$root/constraints.txt" \
  --python-version "$version" --only-binary=:all: --platform "manylinux2014_$machine" --platform "manylinux_2_28_$machine" \
  pytest pytest-asyncio hypothesis jsonschema
mkdir "$work/root/work"
git -C "$root" ls-files -z | tar -C "$root" --null --files-from - -cf - | tar -C "$work/root/work" -xf -
inside python3 -m pytest -q -p no:cacheprovider --rootdir /work "${PACKAGES[@]/#//work/tests/unit/}" \
  "${START_PROGRAMS[@]/#/--ignore=/work/tests/unit/}" -k "not ($STARTS_ONE)" "$@"
