#!/bin/sh
# sudo contrib/server/install.sh: installs or upgrades the exporter on a host with systemd, from the clone that has this
# file, into PREFIX (default /opt/usbip-plugin). Keeps /etc/usbip-plugin/export.yaml; connections go on.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
prefix=${PREFIX:-/opt/usbip-plugin}
fail() { echo "install.sh: $*" >&2; exit 1; }

[ "$(id -u)" = 0 ] || fail "must run as root: sudo $0"
python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))' || fail "Python 3.11 or later is needed"
modprobe usbip-host || fail "the kernel has no module usbip-host; Ubuntu: apt install linux-modules-extra-$(uname -r)"
python3 -c 'import ensurepip' 2>/dev/null || apt-get install -y python3-venv
python3 -m venv "$prefix"
"$prefix/bin/pip" install -c "$here/../../constraints.txt" "$here/../.."
ln -sf "$prefix/bin/usbip-plugin" /usr/local/bin/usbip-plugin
[ -e /etc/usbip-plugin/export.yaml ] || install -D -m 644 "$here/export.yaml" /etc/usbip-plugin/export.yaml
sed "s|/opt/usbip-plugin|$prefix|" "$here/usbip-plugin-export.service" |
  install -m 644 /dev/stdin /etc/systemd/system/usbip-plugin-export.service
systemctl daemon-reload
systemctl enable usbip-plugin-export
systemctl restart usbip-plugin-export
