"""Socket names, the end of a registration, and stale sockets in the kubelet's directory."""

from __future__ import annotations

import contextlib
import logging
import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.rigs.clocks import InstantClock
from usbip_plugin.kubelet.registration import (
    MAX_SOCKET_PATH_BYTES,
    SocketIdentity,
    endpoint_name,
    identify,
    is_stale,
    left_behind,
    named_by_us,
    sweep,
    why_over,
)

KUBELET_DIRECTORY = Path("/var/lib/kubelet/device-plugins")
RESOURCE_NAMES = st.from_regex(r"[A-Za-z0-9]([A-Za-z0-9._-]{0,61}[A-Za-z0-9])?", fullmatch=True)
ONE, TWO = SocketIdentity(1, 2, 3), SocketIdentity(1, 2, 4)


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """Returns a relative path, because the path of a unix socket must be short."""
    return Path(os.path.relpath(tmp_path))


def dead(path: Path) -> None:
    """Leaves a socket behind, like a process that was killed."""
    with alive(path):
        pass


@contextlib.contextmanager
def alive(path: Path) -> Iterator[None]:
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))
        server.listen()
        yield


def names(directory: Path) -> set[str]:
    return {path.name for path in directory.iterdir()}


@given(RESOURCE_NAMES, st.integers(1, 10**9))
def test_the_socket_of_any_resource_has_a_short_path_and_a_name_of_the_plugin(name: str, run: int) -> None:
    path = KUBELET_DIRECTORY / endpoint_name(KUBELET_DIRECTORY, f"usbip.dev/{name}", run)
    assert named_by_us(path.name)
    assert path.parent == KUBELET_DIRECTORY
    assert len(os.fsencode(path)) <= MAX_SOCKET_PATH_BYTES


@pytest.mark.parametrize(
    "name", ["kubelet.sock", "nvidia-gpu.sock", "usbip.sock", "usbip-.sock", "usbip-stick", "usbip-stick.sock.bak", "x"]
)
def test_other_names_are_not_names_of_the_plugin(name: str) -> None:
    assert not named_by_us(name)


def test_a_socket_that_was_stale_twice_with_one_identity_is_removed() -> None:
    assert left_behind({"b": ONE, "a": TWO}, {"a": TWO, "b": ONE}) == ("a", "b")
    assert left_behind({"a": ONE}, {"a": TWO}) == (), "another plugin has begun"
    assert left_behind({}, {"a": ONE}) == ()
    assert left_behind({"a": ONE}, {}) == ()


async def test_only_the_sockets_of_killed_plugins_are_removed(directory: Path) -> None:
    for name in ("usbip-stick.sock", "usbip-stick.7.sock", "usbip-gone.sock", "nvidia-gpu.sock"):
        dead(directory / name)
    (directory / "usbip-file.sock").write_text("no socket")
    (directory / "usbip-dir.sock").mkdir()
    (directory / "usbip-link.sock").symlink_to("nvidia-gpu.sock")
    with alive(directory / "usbip-used.sock"), alive(directory / "kubelet.sock"):
        await sweep(directory, InstantClock())
        kept = {"nvidia-gpu.sock", "usbip-file.sock", "usbip-dir.sock", "usbip-link.sock"}
        assert names(directory) == kept | {"usbip-used.sock", "kubelet.sock"}


async def test_a_plugin_that_is_about_to_listen_keeps_its_socket(directory: Path) -> None:
    with socket.socket(socket.AF_UNIX) as starting:
        starting.bind(str(directory / "usbip-stick.sock"))
        await sweep(directory, InstantClock(starting.listen))
        assert names(directory) == {"usbip-stick.sock"}


async def test_a_new_socket_with_the_name_of_a_stale_one_is_kept(directory: Path) -> None:
    path = directory / "usbip-stick.sock"
    dead(path)
    dead(directory / "usbip-other.sock")

    def replace_socket() -> None:
        path.rename(directory / "away")  # so that its inode is not used again
        with socket.socket(socket.AF_UNIX) as bound:
            bound.bind(str(path))

    await sweep(directory, InstantClock(replace_socket))
    assert names(directory) == {"usbip-stick.sock", "away"}


async def test_without_a_stale_socket_there_is_no_second_look(directory: Path) -> None:
    clock = InstantClock()
    with alive(directory / "usbip-stick.sock"):
        await sweep(directory, clock)
    assert clock.slept == []


async def test_a_missing_directory_is_not_logged(directory: Path, caplog: pytest.LogCaptureFixture) -> None:
    await sweep(directory / "later", InstantClock())
    assert not caplog.records


async def test_a_socket_that_cannot_be_removed_is_logged(
    directory: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    dead(directory / "usbip-stick.sock")

    def refuse(_path: Path, missing_ok: bool = False) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "unlink", refuse)
    with caplog.at_level(logging.INFO):
        await sweep(directory, InstantClock())
    assert [record.getMessage() for record in caplog.records] == ["stale sockets not removed"]


def test_a_later_run_has_another_socket_name() -> None:
    assert endpoint_name(KUBELET_DIRECTORY, "usbip.dev/storage", 1) == "usbip-storage.sock"
    assert endpoint_name(KUBELET_DIRECTORY, "usbip.dev/storage", 2) == "usbip-storage.2.sock"


def test_long_names_stay_distinct() -> None:
    names = {endpoint_name(KUBELET_DIRECTORY, f"usbip.dev/{'x' * 62}{c}", 10**6) for c in "abc"}
    assert len(names) == 3


@pytest.mark.parametrize(
    ("kubelet_now", "socket_now", "streams", "over"),
    [
        (ONE, ONE, 1, False),
        (None, ONE, 1, False),
        (TWO, ONE, 1, True),
        (ONE, None, 1, True),
        (ONE, TWO, 1, True),
        (ONE, ONE, 0, True),
    ],
)
def test_a_registration_is_over_when_the_kubelet_the_socket_or_the_stream_is_gone(
    kubelet_now: SocketIdentity | None, socket_now: SocketIdentity | None, streams: int, over: bool
) -> None:
    cause = why_over(kubelet_then=ONE, kubelet_now=kubelet_now, socket_then=ONE, socket_now=socket_now, streams=streams)
    assert (cause is not None) is over


def test_only_a_socket_has_an_identity_and_only_one_without_a_listener_is_stale(directory: Path) -> None:
    path = directory / "s"
    assert identify(path) is None
    assert not is_stale(path)
    path.write_text("not a socket")
    assert identify(path) is None
    assert not is_stale(path)
    path.unlink()
    with alive(path):
        assert identify(path) is not None
        assert not is_stale(path)
    assert identify(path) is not None
    assert is_stale(path)
