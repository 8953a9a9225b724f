#!/bin/busybox sh
# First process of the guest. Puts the machine's own root file system (9p, read-only) under a tmpfs overlay, runs
# /vmrun/command.sh in it, leaves its exit status in /vmrun/status and powers off.
# Kernel arguments: none. /vmrun is a directory of the host shared read-write; /vmrun/share.N names further ones.
box=/bin/busybox
options=trans=virtio,version=9p2000.L,msize=512000

give_up() {
  echo "init: $*" >/dev/ttyS0
  $box poweroff -f
}

$box mount -t proc proc /proc
$box mount -t sysfs sysfs /sys
$box mount -t devtmpfs dev /dev 2>/dev/null
for module in virtio_pci virtio_console 9pnet_virtio 9p overlay virtio_net; do
  /sbin/modprobe "$module" 2>/dev/null
done

$box mkdir -p /lower /upper /root
$box mount -t 9p -o "ro,$options,cache=loose" host /lower || give_up "no root share"
$box mount -t tmpfs -o mode=755 tmpfs /upper
$box mkdir /upper/files /upper/work
$box mount -t overlay -o lowerdir=/lower,upperdir=/upper/files,workdir=/upper/work overlay /root || give_up "no overlay"

$box mkdir -p /root/proc /root/sys /root/dev /root/run /root/tmp /root/vmrun /root/usr/lib/modules
$box mount -t proc proc /root/proc
$box mount -t sysfs sysfs /root/sys
$box mount --bind /dev /root/dev
$box mkdir -p /root/dev/pts /root/dev/shm
$box mount -t devpts -o mode=620,ptmxmode=666 devpts /root/dev/pts
$box mount -t tmpfs tmpfs /root/dev/shm
$box mount -t tmpfs -o mode=755 tmpfs /root/run
# /tmp stays that of the machine, under the overlay: the checkout may be there. New files go into memory.
$box mkdir -m 1777 /root/run/tmp
$box mount -t cgroup2 cgroup2 /root/sys/fs/cgroup 2>/dev/null
$box mount -t configfs configfs /root/sys/kernel/config 2>/dev/null
$box mount --bind /lib/modules /root/usr/lib/modules
$box ln -sf /proc/self/fd /root/dev/fd

$box mount -t 9p -o "rw,$options,cache=none" vmrun /root/vmrun || give_up "no /vmrun share"
number=0
while [ -s "/root/vmrun/share.$number" ]; do
  folder=$($box cat "/root/vmrun/share.$number")
  $box mkdir -p "/root$folder"
  $box mount -t 9p -o "rw,$options,cache=none" "share$number" "/root$folder" || give_up "no share $folder"
  number=$((number + 1))
done

$box ip link set lo up
if [ -e /sys/class/net/eth0 ]; then
  $box ip link set eth0 up
  $box ip addr add 10.0.2.15/24 dev eth0
  $box ip route add default via 10.0.2.2
fi
$box hostname usbip-guest

# The guest's own modprobe: the machine's would look for the modules of the machine's kernel.
$box mkdir -p /root/run/bin
$box cp /bin/busybox /root/run/bin/busybox
for name in modprobe rmmod lsmod; do $box ln -s busybox "/root/run/bin/$name"; done

# Output goes through a virtio port: the emulated serial port is slow.
output=/dev/ttyS0
for port in /dev/vport*p*; do [ -c "$port" ] && output=$port; done
# Moved, not only chrooted: AppArmor sees a path from the root of the mount namespace, not of a chroot.
cd /root
$box mount --move . /
HOME=/root PATH=/run/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin \
  $box chroot . /bin/bash /vmrun/command.sh </dev/null >"$output" 2>&1
echo $? >vmrun/status
# modules compiled here, which the machine could have compiled before (compile.sh)
$box find /upper/files -name "*.pyc" >vmrun/compiled
$box cat /proc/uptime >vmrun/uptime
$box dmesg >vmrun/dmesg
$box sync
$box poweroff -f
