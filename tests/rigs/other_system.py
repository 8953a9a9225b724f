"""Runs kubectl-usbip as on a laptop without Linux: python other_system.py darwin|win32 TREE ARGUMENT...

TREE is what release/kubectl_package.py writes. What the system's Python lacks is taken away from this one, and so is
what kubectl-usbip does not depend on. sys.platform stays: the standard library of this system needs it.
"""

from __future__ import annotations

import asyncio
import functools
import importlib
import os
import select
import signal
import socket
import ssl
import subprocess
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType

LIBRARIES = (
    *(
        "usbip_plugin",
        "usbip_sim",
        "asyncinotify",
        "google",
        "grpc",
        "jinja2",
        "markupsafe",
        "msgspec",
        "opentelemetry",
    ),
    "prometheus_client",
)
"""Packages that kubectl-usbip does not depend on. aiohttp uses none of them."""
LACKING: dict[str, dict[str, Sequence[str]]] = {
    "darwin": {
        "os": ("O_DIRECT", "eventfd", "memfd_create", "sched_getaffinity", "sched_setaffinity", "pidfd_open", "setns"),
        "select": ("epoll",),
        "signal": ("SIGRTMIN", "SIGRTMAX", "SIGSTKFLT", "SIGPWR", "sigtimedwait", "sigwaitinfo"),
        "socket": (
            *(
                "AF_NETLINK",
                "AF_VSOCK",
                "AF_PACKET",
                "SO_PEERCRED",
                "SO_BINDTODEVICE",
                "TCP_USER_TIMEOUT",
                "TCP_KEEPIDLE",
            ),
            *("TCP_QUICKACK", "SOCK_CLOEXEC", "SOCK_NONBLOCK", "MSG_NOSIGNAL", "SO_DOMAIN", "SO_PROTOCOL"),
        ),
    },
    "win32": {
        "os": (
            *("O_NONBLOCK", "O_CLOEXEC", "O_DIRECTORY", "O_NOFOLLOW", "uname", "fork", "getuid", "geteuid", "getgid"),
            *("sched_getaffinity", "sched_setaffinity"),
            *(
                "getegid",
                "getgroups",
                "chown",
                "mkfifo",
                "mknod",
                "statvfs",
                "sysconf",
                "pread",
                "killpg",
                "setsid",
                "nice",
            ),
            *("openpty", "ttyname", "wait3", "WNOHANG", "getloadavg", "eventfd", "pipe2", "sync"),
        ),
        "select": ("epoll", "poll"),
        "signal": (
            *(
                "SIGUSR1",
                "SIGUSR2",
                "SIGHUP",
                "SIGQUIT",
                "SIGALRM",
                "SIGPIPE",
                "SIGCHLD",
                "SIGWINCH",
                "SIGKILL",
                "SIGSTOP",
            ),
            *("SIGTSTP", "SIGCONT", "pthread_sigmask", "alarm", "setitimer", "sigwait", "pause"),
        ),
        "socket": (
            *("AF_UNIX", "AF_NETLINK", "AF_VSOCK", "AF_PACKET", "SO_PEERCRED", "SO_BINDTODEVICE", "SO_REUSEPORT"),
            *("TCP_KEEPIDLE", "TCP_KEEPINTVL", "TCP_KEEPCNT", "TCP_USER_TIMEOUT", "TCP_QUICKACK", "SOCK_CLOEXEC"),
            *("SOCK_NONBLOCK", "MSG_DONTWAIT", "MSG_NOSIGNAL", "SO_DOMAIN", "SO_PROTOCOL", "CMSG_LEN"),
        ),
    },
}
"""What the Python of a system lacks, by module."""
WITHOUT: dict[str, Sequence[str]] = {
    "darwin": (),
    "win32": ("fcntl", "termios", "tty", "pty", "pwd", "grp", "resource", "curses", "readline", "syslog"),
}
"""Modules of the standard library that a system lacks."""


class Absent:
    """Refuses to import some packages."""

    def __init__(self, names: Sequence[str]) -> None:
        self._names = frozenset(names)

    def find_spec(self, name: str, _path: object = None, _target: ModuleType | None = None) -> ModuleSpec | None:
        if name.partition(".")[0] in self._names:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return None


def take_away(system: str) -> None:
    """Removes what the system lacks."""
    # asyncio makes its own pair of sockets, of a family that Windows has not
    pair = functools.partial(socket.socketpair, socket.AF_UNIX)
    for module, names in LACKING[system].items():
        for name in names:
            vars(importlib.import_module(module)).pop(name, None)
    if hasattr(os, "process_cpu_count"):
        # what os makes of it where there is no sched_getaffinity
        setattr(os, "process_cpu_count", os.cpu_count)  # noqa: B010  since Python 3.13
    if system == "win32":
        socket.socketpair = pair
    for name in WITHOUT[system]:
        sys.modules.pop(name, None)
    sys.meta_path.insert(0, Absent((*WITHOUT[system], *LIBRARIES)))


def main(system: str, tree: str, *arguments: str) -> int:
    """Carries out a command of kubectl-usbip and returns its exit status."""
    # parts of this system's standard library that would need at import what is taken away
    assert all((asyncio.run, os.environ, select.select, signal.signal, ssl.SSLContext, subprocess.run))
    take_away(system)
    sys.path.insert(0, tree)
    command = importlib.import_module("kubectl_usbip.cli.main")
    return int(command.main(arguments, prog=command.KUBECTL))


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
