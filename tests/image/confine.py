"""confine.py ROOTFS EMULATOR ENVIRONMENT PROGRAM ARGUMENT...: runs a program of an image like a strict container.

Must be started as root by `unshare --mount --net --pid --fork`. The root file system is read-only except an empty /tmp,
the only network is loopback, and root has no capabilities. EMULATOR: a static qemu on this machine, or "".
ENVIRONMENT: a JSON object.
"""

from __future__ import annotations

import ctypes
import fcntl
import json
import os
import socket
import struct
import subprocess
import sys
from pathlib import Path

SIOCSIFFLAGS, IFF_UP = 0x8914, 1
PR_CAPBSET_DROP, PR_SET_NO_NEW_PRIVS = 24, 38
DEVICES = ("null", "zero", "urandom", "random")


def mount(*arguments: str) -> None:
    subprocess.run(["mount", *arguments], check=True)


def prepare(root: Path, emulator: str) -> None:
    """Mounts the file systems of a container in this process's mount namespace."""
    mount("--make-rprivate", "/")
    mount("--bind", str(root), str(root))
    for directory, kind in (("proc", "proc"), ("dev", "tmpfs"), ("tmp", "tmpfs")):
        (root / directory).mkdir(exist_ok=True)
        mount("-t", kind, kind, str(root / directory))
    for device in DEVICES:
        (root / "dev" / device).touch()
        mount("--bind", f"/dev/{device}", str(root / "dev" / device))
    if emulator:
        (root / "dev/emulator").touch()
        mount("--bind", emulator, str(root / "dev/emulator"))
    mount("-o", "remount,bind,ro", str(root))


def loopback_up() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        fcntl.ioctl(any_socket, SIOCSIFFLAGS, struct.pack("16sh14x", b"lo", IFF_UP))


def drop_capabilities(last: int) -> None:
    """Empties the bounding set of capabilities, so that root has none after the next exec."""
    libc = ctypes.CDLL(None, use_errno=True)
    for capability in range(last + 1):
        if libc.prctl(PR_CAPBSET_DROP, capability, 0, 0, 0) != 0:
            raise OSError(ctypes.get_errno(), f"capability {capability} cannot be dropped")
    libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)


def main() -> None:
    root, emulator, environment, program, *arguments = sys.argv[1:]
    prepare(Path(root), emulator)
    loopback_up()
    # read before chroot, after which this Python is not reachable
    last = int(Path("/proc/sys/kernel/cap_last_cap").read_text(encoding="ascii"))
    os.chroot(root)
    os.chdir("/")
    drop_capabilities(last)
    variables = json.loads(environment)
    command = [program, *arguments]
    paths = [Path(directory) / program for directory in variables["PATH"].split(":")]
    found = str(next(path for path in paths if path.exists()))
    if emulator:
        command = ["emulator", found, *arguments]
        found = "/dev/emulator"
    os.execve(found, command, variables)


if __name__ == "__main__":
    main()
