#!/bin/bash
# run.sh [-u] [-N] [-r] [-C] [-w DIR]... [-m MB] [-t SECONDS] [-q 'QEMU ARGUMENTS'] [-k IMAGE] 'COMMAND'
#
# Boots a Debian kernel with vhci_hcd in QEMU (emulation: needs no /dev/kvm) on top of this machine's root file system,
# runs the command as root with bash in the current directory, prints its output and exits with its exit status.
# Nothing that the guest writes reaches the machine, except in -w directories.
#   -u  plug in the USB devices of usb_devices below      -w  share a directory read-write under the same path
#   -N  a network in which this machine's 127.0.0.1 is 10.0.2.2
#   -r  the guest's clock is this machine's; without it, it counts instructions (see below)
#   -C  compile.sh has run
#   -m  memory (1024)      -t  time limit (300)           -q  more QEMU arguments      -k  an image made by setup.sh
# A test that takes longer than TEST_SECONDS (300 of the guest's) ends the tests, and its name and stacks are printed.
# In the guest, GUEST_TOOLS is the root of the `usbip` package, and /vmrun is a directory both sides see.
# KEEP=DIR keeps console, dmesg and disk images there.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
image= memory=1024 limit=300 usb= real= compiled= network=none shares=() extra=()
while getopts uNrCw:m:t:q:k: option; do
  case $option in
    u) usb=1 ;;
    r) real=1 ;;
    C) compiled=1 ;;
    N) network=user,model=virtio-net-pci,ipv6=off ;;
    w) shares+=("$(realpath "$OPTARG")") ;;
    m) memory=$OPTARG ;;
    t) limit=$OPTARG ;;
    q) read -ra more <<<"$OPTARG"; extra+=("${more[@]}") ;;
    k) image=$OPTARG ;;
    *) exit 2 ;;
  esac
done
shift $((OPTIND - 1))
image=${image:-$("$here/setup.sh")}
[ -n "$compiled" ] || "$here/compile.sh"

run=$(mktemp -d "${TMPDIR:-/var/tmp}/usbip-guest.XXXXXX")
trap '[ -z "${KEEP:-}" ] || cp -r "$run/." "$KEEP"; rm -rf "$run"' EXIT

# Two identical serial converters joined by a null-modem cable, a disk at high speed, a disk at SuperSpeed, a keyboard,
# a sound card.
# They are on the guest's own controllers; the tests export them with usbipd and import them over loopback. QEMU's
# monitor is at the virtio port "monitor", for tests that unplug a device and plug it in elsewhere.
usb_devices() {
  local disk
  for disk in hs ss; do
    head -c 8M /dev/zero >"$run/disk-$disk.img"
    printf 'usbip-plugin test disk %s\n' "$disk" | dd of="$run/disk-$disk.img" conv=notrunc status=none
  done
  extra+=(
    -device qemu-xhci,id=x0,p2=8,p3=8 -device qemu-xhci,id=x1,p2=8,p3=0
    -chardev "socket,id=cable0,path=$run/cable,server=on,wait=off" -chardev "socket,id=cable1,path=$run/cable"
    -device usb-serial,id=converter0,bus=x0.0,chardev=cable0,serial=SERIAL1,always-plugged=on
    -device usb-serial,id=converter1,bus=x0.0,chardev=cable1,serial=SERIAL2,always-plugged=on
    -device usb-kbd,bus=x0.0,serial=KEYBOARD
    -audiodev none,id=quiet -device usb-audio,bus=x1.0,audiodev=quiet,serial=AUDIO
    -chardev "socket,id=monitor0,path=$run/monitor,server=on,wait=off" -mon chardev=monitor0,mode=control
    -chardev "socket,id=monitor1,path=$run/monitor" -device virtserialport,chardev=monitor1,name=monitor,nr=1
    -drive "if=none,id=hs,format=raw,file=$run/disk-hs.img" -device usb-storage,bus=x1.0,drive=hs,serial=DISKHS
    -drive "if=none,id=ss,format=raw,file=$run/disk-ss.img" -device usb-storage,bus=x0.0,drive=ss,serial=DISKSS
  )
}
[ -z "$usb" ] || usb_devices

{
  printf 'export GUEST_TOOLS=%q PATH=%q:$PATH TMPDIR=/run/tmp\ncd %q\n' "$(dirname "$image")/tools" "$PATH" "$PWD"
  printf 'export PYTEST_ADDOPTS=%q\n' "-v -o faulthandler_timeout=${TEST_SECONDS:-300} -o faulthandler_exit_on_timeout=true"
  printf '%s\n' "$*"
} >"$run/command.sh"
number=0
for folder in "${shares[@]}"; do
  printf %s "$folder" >"$run/share.$number"
  extra+=(-virtfs "local,path=$folder,mount_tag=share$number,security_model=none,multidevs=remap")
  number=$((number + 1))
done

# The guest's clock counts executed instructions, one nanosecond each (shift=0): a busy second of the guest takes about
# eight seconds of processor here, whatever the load of the machine. So time limits in the guest do not depend
# on the machine's load. While the guest waits (sleep=on), its clock runs with this machine's. Not shift=auto, which
# follows the load; not sleep=off, which jumps over the time that the machine needs for 9p.
# Measured with the 18 short kernel tests at nice 5, load 6 to 21 on two cores:
#   counted, shift=0:  53-56 s of the guest's time (15 busy) in five runs, 91-137 s of processor, green
#   counted, shift=1:  73 s of the guest's time (31 busy), 136 s of processor, green
#   this machine's (-r): 300-480 s of the guest's time, 125-146 s of processor; red at load 20: allocateTimeout passed
# Counting costs no more processor time.
clock=(-accel tcg,thread=single,tb-size=256 -icount "shift=${ICOUNT:-0},align=off,sleep=on") source=tsc=reliable
# With this machine's clock: the kernel measures the rates of TSC and APIC timer at boot, and on a busy machine it finds them
# wrong (a guest's clock ran at twice the rate). The HPET tells its own.
[ -z "$real" ] || { clock=(-accel tcg,thread=multi,tb-size=256); source='tsc=unstable clocksource=hpet nolapic_timer'; }
# no_timer_check: at boot the kernel waits for ten ticks of the timer, panics without them, and a busy machine gives none
emulation=0
timeout -k 5 "$limit" qemu-system-x86_64 \
  "${clock[@]}" -cpu max -smp 1 -m "$memory" \
  -machine q35,usb=off -nodefaults -no-reboot -display none -monitor none \
  -kernel "$image/vmlinux" -initrd "$image/initrd.cpio" \
  -append "console=ttyS0 quiet panic=-1 mitigations=off nokaslr no_timer_check $source" \
  -serial "file:$run/console" \
  -device virtio-serial-pci -add-fd fd=3,set=1 -chardev file,id=out,path=/dev/fdset/1,append=on \
  -device virtserialport,chardev=out,name=output,nr=9 \
  -virtfs local,path=/,mount_tag=host,security_model=none,readonly=on,multidevs=remap \
  -virtfs "local,path=$run,mount_tag=vmrun,security_model=none" \
  -nic "$network" "${extra[@]}" 3>&1 </dev/null &
emulator=$!
trap 'kill "$emulator"; exit 143' INT TERM
wait "$emulator" || emulation=$?

if ! [ -s "$run/status" ]; then
  echo "run.sh: the command did not end (QEMU: $emulation); console:" >&2
  tail -20 "$run/console" >&2
  exit 125
fi
read -r up idle <"$run/uptime"
echo "run.sh: $up s of the guest's time, $idle of them idle; compiled in the guest: $(wc -l <"$run/compiled") files"
head -n 5 "$run/compiled"
exit "$(cat "$run/status")"
