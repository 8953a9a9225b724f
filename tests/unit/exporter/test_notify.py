"""Messages to systemd."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from usbip_plugin.exporter.notify import READY, ServiceNotifier


@pytest.fixture
def manager(tmp_path: Path) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind(str(tmp_path / "notify"))
        sock.settimeout(10)
        yield sock


def test_messages_are_one_datagram_each(manager: socket.socket) -> None:
    notifier = ServiceNotifier({"NOTIFY_SOCKET": manager.getsockname(), "WATCHDOG_USEC": "20000000"})
    notifier.send(READY, "STATUS=2 devices exported")
    notifier.reloading()
    notifier.alive()
    assert manager.recv(4096) == b"READY=1\nSTATUS=2 devices exported"
    reloading, at = manager.recv(4096).split(b"\n")
    assert (reloading, at.partition(b"=")[0]) == (b"RELOADING=1", b"MONOTONIC_USEC")
    assert int(at.partition(b"=")[2]) > 0
    assert manager.recv(4096) == b"WATCHDOG=1"


def test_an_abstract_socket_is_reached() -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind("\0usbip-plugin-test-notify")
        sock.settimeout(10)
        ServiceNotifier({"NOTIFY_SOCKET": "@usbip-plugin-test-notify"}).send(READY)
        assert sock.recv(4096) == b"READY=1"


def test_without_a_manager_or_a_watchdog_nothing_is_sent(manager: socket.socket, tmp_path: Path) -> None:
    ServiceNotifier({}).send(READY)
    ServiceNotifier({"NOTIFY_SOCKET": str(tmp_path / "gone")}).send(READY)
    ServiceNotifier({"NOTIFY_SOCKET": manager.getsockname()}).alive()
    manager.setblocking(False)
    with pytest.raises(BlockingIOError):
        manager.recv(1)
