"""systemd and udevd in the guest, in namespaces of their own, with the few units that contrib/server needs."""

from __future__ import annotations

import contextlib
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.rigs.usbipd import eventually

ROOT = Path(__file__).parents[2]
SYSTEMD = Path("/lib/systemd/systemd")
UNITS = Path("/run/lab-units")
CALL_S = 180.0
"""Seconds for a command in the namespaces. The guest is emulated."""
FROM_SYSTEMD = (
    *(
        "basic.target",
        "multi-user.target",
        "network.target",
        "network-online.target",
        "paths.target",
        "shutdown.target",
    ),
    *("sockets.target", "sysinit.target", "timers.target", "umount.target", "modprobe@.service"),
    "systemd-modules-load.service",
)
FROM_UDEV = (
    *("systemd-udevd.service", "systemd-udevd-control.socket", "systemd-udevd-kernel.socket"),
    "systemd-udev-trigger.service",
)
BOOT = f"""
mount --make-rprivate /
for place in /etc/systemd /opt /etc/udev/rules.d; do mkdir -p $place; mount -t tmpfs tmpfs $place; done
umount /sys/fs/cgroup; mount -t cgroup2 cgroup2 /sys/fs/cgroup
mkdir -p /etc/systemd/system /etc/systemd/system.conf.d /run/no-generators
printf '[Manager]\\nDefaultStandardOutput=kmsg\\n' >/etc/systemd/system.conf.d/lab.conf
export SYSTEMD_UNIT_PATH=/etc/systemd/system:{UNITS} SYSTEMD_GENERATOR_PATH=/run/no-generators
exec {SYSTEMD} --system --unit=multi-user.target --log-target=kmsg --show-status=0
"""


@dataclass(frozen=True)
class Systemd:
    """A systemd that runs. pid: its process, as the guest sees it."""

    pid: int

    def run(self, *command: str | Path, check: bool = True) -> str:
        """Runs a command in its namespaces and returns the output. Raises AssertionError if it fails."""
        inside = ["nsenter", "--target", str(self.pid), "--mount", "--pid", "--uts", "--ipc", "--cgroup"]
        done = subprocess.run(
            [*inside, *map(str, command)], capture_output=True, text=True, timeout=CALL_S, check=False, cwd="/"
        )
        assert not check or done.returncode == 0, f"{command}: {done.stdout}{done.stderr}{kernel_log()}"
        return done.stdout.strip()

    def systemctl(self, *arguments: str, check: bool = True) -> str:
        return self.run("systemctl", *arguments, check=check)

    def show(self, unit: str, name: str) -> str:
        return self.systemctl("show", "--value", f"--property={name}", unit)

    def write(self, path: str, text: str, mode: str = "644") -> None:
        """Writes a file as the namespaces see it."""
        self.run("sh", "-c", 'mkdir -p "${1%/*}" && printf %s "$2" >"$1" && chmod "$3" "$1"', "sh", path, text, mode)


def hidden_by_unit() -> list[Path]:
    """Returns the directories that this Python and the project need, and that ProtectHome and PrivateTmp hide."""
    needed = {Path(sys.base_prefix).resolve(), Path(sys.prefix), ROOT}
    return [place for place in sorted(needed) if place.parts[1] in ("root", "home", "tmp")]


def kernel_log() -> str:
    """Returns the last lines of the kernel's log, to which systemd and its services write."""
    return "\n".join(subprocess.run(["dmesg"], capture_output=True, text=True, check=False).stdout.splitlines()[-60:])


def install_programs() -> None:
    """Copies udev and usbip to where units expect them. The guest's root file system is a copy in memory."""
    tools = Path(os.environ["GUEST_TOOLS"])
    UNITS.mkdir(exist_ok=True)
    for names, directory in ((FROM_SYSTEMD, SYSTEMD.parent), (FROM_UDEV, tools / "lib/systemd")):
        for name in names:
            shutil.copy(directory / "system" / name, UNITS)
    for name, needs in (("sockets.target", FROM_UDEV[1:3]), ("sysinit.target", (FROM_UDEV[0], FROM_UDEV[3]))):
        wanted = UNITS / f"{name}.wants"
        wanted.mkdir(exist_ok=True)
        for need in needs:
            with contextlib.suppress(FileExistsError):
                (wanted / need).symlink_to(f"../{need}")
    if shutil.which("udevadm") is None:
        shutil.copy(tools / "bin/udevadm", "/bin/udevadm")
        Path("/lib/systemd/systemd-udevd").symlink_to("/bin/udevadm")
        shutil.copytree(tools / "lib/udev", "/lib/udev", dirs_exist_ok=True)
    for name in ("usbip", "usbipd"):
        shutil.copy(tools / "usr/sbin" / name, "/usr/sbin")
    for library in (*tools.glob("usr/lib/*/libwrap.so.0"), *tools.glob("lib/*/libwrap.so.0")):
        shutil.copy(library, "/usr/lib/x86_64-linux-gnu")


@contextlib.contextmanager
def booted() -> Iterator[Systemd]:
    """Runs systemd until the end of the block, and with it everything that it has started."""
    install_programs()
    group = Path("/sys/fs/cgroup/lab")
    group.mkdir(exist_ok=True)
    spaces = ("--mount", "--pid", "--uts", "--ipc", "--cgroup", "--fork", "--kill-child=KILL")
    enter = f"echo $$ >{group}/cgroup.procs; exec unshare {' '.join(spaces)} --mount-proc sh -euc {shlex.quote(BOOT)}"
    environ = {name: os.environ[name] for name in ("PATH",)}
    process = subprocess.Popen(["sh", "-euc", enter], env=environ, stdin=subprocess.DEVNULL)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")

    def ready() -> bool:
        assert process.poll() is None, kernel_log()
        pid = children.read_text().split()
        return bool(pid) and Systemd(int(pid[0])).systemctl("is-system-running", check=False) in {"running", "degraded"}

    try:
        try:
            eventually(ready, "systemd has started", CALL_S)
        except AssertionError:
            print(kernel_log(), file=sys.stderr)
            raise
        yield Systemd(int(children.read_text()))
    finally:
        process.kill()
        process.wait(timeout=CALL_S)
