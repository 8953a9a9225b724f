#!/bin/sh
# sudo contrib/server/usbipd/install.sh: exports the devices of 90-usbip.rules with the usbipd of Debian, at boot and
# after each replug.
set -eu
cd "$(dirname "$0")"
[ "$(id -u)" = 0 ] || { echo "install.sh: must run as root: sudo $0" >&2; exit 1; }
[ -x /usr/sbin/usbipd ] || apt-get install -y usbip
install -m 644 usbip-host.conf /etc/modules-load.d/
install -m 644 usbipd.service usbip-bind@.service /etc/systemd/system/
install -m 644 90-usbip.rules /etc/udev/rules.d/
modprobe usbip-host
systemctl daemon-reload
systemctl enable --now usbipd
udevadm control --reload
udevadm trigger --action=add --subsystem-match=usb
