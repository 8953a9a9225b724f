"""Sockets in the kubelet's directory whose plugin is gone: which are removed at start, and which are not."""

from __future__ import annotations

import contextlib
import logging
import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from usbip_plugin.clock import SystemClock
from usbip_plugin.kubelet.registration import SocketIdentity, endpoint_name, left_behind, named_by_us, sweep

ONE, TWO = SocketIdentity(1, 2, 3), SocketIdentity(1, 2, 4)


class Meanwhile(SystemClock):
    """Sleeping takes no time; this happens in it."""

    def __init__(self, happens: Callable[[], object] = lambda: None) -> None:
        self.happens = happens
        self.slept = 0

    async def sleep(self, seconds: float) -> None:
        self.slept += 1
        self.happens()


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """Named relative to here: a unix socket's path is short."""
    return Path(os.path.relpath(tmp_path))


def dead(path: Path) -> None:
    """As a process that was killed leaves it."""
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))
        server.listen()


@contextlib.contextmanager
def alive(path: Path) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))
        server.listen()
        yield server


def names(directory: Path) -> set[str]:
    return {path.name for path in directory.iterdir()}


@given(st.from_regex(r"[A-Za-z0-9]([A-Za-z0-9._-]{0,61}[A-Za-z0-9])?", fullmatch=True), st.integers(1, 10**9))
def test_whatever_a_resource_is_called_its_sockets_are_known_as_ours(name: str, run: int) -> None:
    assert named_by_us(endpoint_name(Path("/var/lib/kubelet/device-plugins"), f"usbip.dev/{name}", run))


@pytest.mark.parametrize(
    "name", ["kubelet.sock", "nvidia-gpu.sock", "usbip.sock", "usbip-.sock", "usbip-stick", "usbip-stick.sock.bak", "x"]
)
def test_what_others_call_theirs_is_not_ours(name: str) -> None:
    assert not named_by_us(name)


def test_only_the_very_same_socket_that_nobody_listened_on_twice_is_removed() -> None:
    assert left_behind({"b": ONE, "a": TWO}, {"a": TWO, "b": ONE}) == ("a", "b")
    assert left_behind({"a": ONE}, {"a": TWO}) == (), "another plugin has begun meanwhile"
    assert left_behind({}, {"a": ONE}) == ()
    assert left_behind({"a": ONE}, {}) == ()


async def test_what_killed_plugins_left_is_removed_and_nothing_else(directory: Path) -> None:
    for name in ("usbip-stick.sock", "usbip-stick.7.sock", "usbip-gone.sock", "nvidia-gpu.sock"):
        dead(directory / name)
    (directory / "usbip-file.sock").write_text("no socket")
    (directory / "usbip-dir.sock").mkdir()
    (directory / "usbip-link.sock").symlink_to("nvidia-gpu.sock")
    with alive(directory / "usbip-used.sock"), alive(directory / "kubelet.sock"):
        await sweep(directory, Meanwhile())
        kept = {"nvidia-gpu.sock", "usbip-file.sock", "usbip-dir.sock", "usbip-link.sock"}
        assert names(directory) == kept | {"usbip-used.sock", "kubelet.sock"}


async def test_a_plugin_that_is_about_to_listen_keeps_its_socket(directory: Path) -> None:
    with socket.socket(socket.AF_UNIX) as starting:
        starting.bind(str(directory / "usbip-stick.sock"))
        await sweep(directory, Meanwhile(starting.listen))
        assert names(directory) == {"usbip-stick.sock"}


async def test_a_socket_made_anew_under_the_name_of_a_dead_one_is_kept(directory: Path) -> None:
    path = directory / "usbip-stick.sock"
    dead(path)
    dead(directory / "usbip-other.sock")

    def anew() -> None:
        path.rename(directory / "away")  # whose inode is thus not used again
        with socket.socket(socket.AF_UNIX) as bound:
            bound.bind(str(path))

    await sweep(directory, Meanwhile(anew))
    assert names(directory) == {"usbip-stick.sock", "away"}


async def test_without_anything_left_behind_there_is_no_second_look(directory: Path) -> None:
    clock = Meanwhile()
    with alive(directory / "usbip-stick.sock"):
        await sweep(directory, clock)
    assert clock.slept == 0


async def test_a_directory_that_is_not_there_yet_is_nothing_to_tell(
    directory: Path, caplog: pytest.LogCaptureFixture
) -> None:
    await sweep(directory / "later", Meanwhile())
    assert not caplog.records


async def test_what_cannot_be_removed_is_told_and_harms_nobody(
    directory: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    dead(directory / "usbip-stick.sock")

    def refuse(_path: Path, missing_ok: bool = False) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "unlink", refuse)
    with caplog.at_level(logging.INFO):
        await sweep(directory, Meanwhile())
    assert [record.getMessage() for record in caplog.records] == ["stale sockets not removed"]
