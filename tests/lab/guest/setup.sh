#!/bin/bash
# setup.sh: everything the guest needs, below ${XDG_CACHE_HOME:-~/.cache}/usbip-plugin/guest. Prints the image directory.
#
# Needs Debian on amd64 and, for missing packages, root. Does nothing when everything is there already.
# KERNEL=6.1 chooses the newest amd64 kernel of that version that apt knows, KERNEL=linux-image-... a package; the default
# is the newest of all.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
cache=${XDG_CACHE_HOME:-$HOME/.cache}/usbip-plugin/guest
tools=(busybox-static usbip libwrap0 apparmor udev)

say() { echo "setup: $*" >&2; }

install_qemu() {
  command -v qemu-system-x86_64 >/dev/null && command -v zstd >/dev/null && return
  say "installing qemu-system-x86 and zstd"
  apt-get update -q >&2
  apt-get install -yq --no-install-recommends qemu-system-x86 zstd >&2
}

# newest_kernel VERSION: of every version if it is empty
newest_kernel() {
  apt-cache search --names-only "^linux-image-${1:+${1//./\\.}\\.}[0-9][^ ]*-amd64\$" | awk '{print $1}' |
    grep -Ev -- '-(rt|cloud|unsigned|dbg)' | sort -V | tail -1
}

# One .deb per package, downloaded once.
fetch() {
  local package=$1
  compgen -G "$cache/debs/${package}_*.deb" >/dev/null && return
  say "downloading $package"
  [ -n "${updated:-}" ] || { apt-get update -q >&2; updated=1; }
  (cd "$cache/debs" && apt-get -o APT::Sandbox::User=root download -q "$package" >&2)
}

mkdir -p "$cache/debs"
install_qemu
version=${KERNEL:-}
case $version in linux-image-*) kernel=$version ;; *) kernel=$(newest_kernel "$version") ;; esac
[ -n "$kernel" ] || { apt-get update -q >&2; updated=1; kernel=$(newest_kernel "$version"); }
[ -n "$kernel" ] || { say "apt knows no linux-image-$version*-amd64; set KERNEL"; exit 1; }
for package in "$kernel" "${tools[@]}"; do fetch "$package"; done

if [ "$(cat "$cache/tools/.done" 2>/dev/null)" != "${tools[*]}" ]; then
  for package in "${tools[@]}"; do dpkg-deb -x "$cache/debs/${package}"_*.deb "$cache/tools"; done
  echo "${tools[*]}" >"$cache/tools/.done"
fi

# The image depends on the kernel and on two files here.
image=$cache/$kernel-$(cat "$here/image.py" "$here/init.sh" | sha256sum | cut -c1-8)
if ! [ -e "$image/vmlinux" ]; then
  say "building $image"
  rm -rf "$image.new"
  python3 "$here/image.py" "$cache/debs/${kernel}"_*.deb "$cache/tools/bin/busybox" "$here/init.sh" "$image.new" >&2
  mv -T "$image.new" "$image"
fi
echo "$image"
