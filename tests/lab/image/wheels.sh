#!/bin/bash
# wheels.sh ARCH PYTHON_VERSION: every wheel that the Dockerfile needs without a package index, for a glibc system of that
# architecture. Prints the directory, which is kept in the cache until the locks change.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../../.." && pwd)
arch=$1 version=$2
case $arch in amd64) machine=x86_64 ;; arm64) machine=aarch64 ;; *) echo "wheels.sh: no '$arch'" >&2; exit 2 ;; esac

# pip evaluates conditions like python_version < "3.12" for its own Python, which should have the image's version
python=
for candidate in ${PYTHON:-} "$root/.venv/bin/python" "python$version" python3; do
  "$candidate" -c "import sys, pip; sys.exit(sys.version_info[:2] != (${version/./, }))" 2>/dev/null && python=$candidate && break
done
if [ -z "$python" ]; then
  echo "wheels.sh: no Python $version with pip was found, which the offline base needs; name one with PYTHON=..." >&2
  exit 1
fi

locks=("$root/image.lock" "$root/image-build.lock")
directory=${USBIP_PLUGIN_CACHE:-$HOME/.cache/usbip-plugin}/image/wheels-$arch-$version-$(cat "${locks[@]}" | sha256sum | cut -c1-12)
mkdir -p "${directory%/*}"
exec 9>"$directory.lock"
flock 9
if [ ! -e "$directory" ]; then
  platforms=(--platform "manylinux2014_$machine")
  for glibc in 17 24 26 27 28 31 34; do platforms+=(--platform "manylinux_2_${glibc}_$machine"); done
  new=$(mktemp -d "$directory.XXXXXX")
  trap 'rm -rf "$new"' EXIT
  "$python" -m pip --disable-pip-version-check download --quiet --only-binary=:all: "${platforms[@]}" \
    --python-version "$version" --dest "$new" --require-hashes -r "${locks[0]}" -r "${locks[1]}" >&2
  chmod 755 "$new"
  mv "$new" "$directory"
fi
echo "$directory"
