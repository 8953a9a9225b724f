#!/bin/bash
# base.sh [amd64|arm64]: a base image from Debian packages, for places without an image registry: Debian 12 with Python 3.11
# and nothing to build with. Prints the archive (docker load, buildah pull docker-archive:) that holds it as
# localhost/usbip-plugin-base:ARCH. Kept in the cache; remove it there to build it again.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
native=$(dpkg --print-architecture)
arch=${1:-$native}
cache=${USBIP_PLUGIN_CACHE:-$HOME/.cache/usbip-plugin}/image
suite=bookworm
case $arch in amd64 | arm64) ;; *) echo "base.sh: '$arch' is not an architecture of the image: amd64, arm64" >&2; exit 2 ;; esac
command -v mmdebstrap >/dev/null || { echo "base.sh: mmdebstrap is missing: apt-get install mmdebstrap" >&2; exit 1; }

archive=$cache/base-$suite-$arch.tar
mkdir -p "$cache"
exec 9>"$archive.lock"
flock 9
if [ ! -e "$archive" ]; then
  # a foreign architecture is unpacked only, its packages' scripts are not run: enough for python3, and no emulation
  variant=minbase
  [ "$arch" = "$native" ] || variant=extract
  work=$(mktemp -d "$cache/work.XXXXXX")
  trap 'rm -rf "$work"' EXIT
  mmdebstrap --quiet --architectures="$arch" --variant="$variant" \
    --include=python3-minimal,python3,ca-certificates,base-files,coreutils,dash,libc-bin,libstdc++6 \
    --aptopt='Acquire::Languages "none"' \
    --dpkgopt='path-exclude=/usr/share/man/*' --dpkgopt='path-exclude=/usr/share/locale/*' \
    --dpkgopt='path-exclude=/usr/share/doc/*' --dpkgopt='path-include=/usr/share/doc/*/copyright' \
    "$suite" "$work/rootfs.tar" >&2
  python3 "$here/archive.py" "$work/rootfs.tar" "$arch" "localhost/usbip-plugin-base:$arch" "$work/image.tar"
  mv "$work/image.tar" "$archive"
fi
echo "$archive"
