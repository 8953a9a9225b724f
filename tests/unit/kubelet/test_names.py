"""Socket names, and when a registration is over."""

import asyncio
import os
import socket
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from usbip_plugin.kubelet.registration import (
    MAX_SOCKET_PATH_BYTES,
    SocketIdentity,
    endpoint_name,
    identify,
    is_stale,
    why_over,
)
from usbip_plugin.sync import Broadcast

KUBELET_DIRECTORY = Path("/var/lib/kubelet/device-plugins")
ONE, TWO = SocketIdentity(1, 2, 3), SocketIdentity(1, 2, 4)


def test_endpoint_names() -> None:
    assert endpoint_name(KUBELET_DIRECTORY, "usbip.dev/storage", 1) == "usbip-storage.sock"
    assert endpoint_name(KUBELET_DIRECTORY, "usbip.dev/storage", 2) == "usbip-storage.2.sock"


@given(st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,61}[A-Za-z0-9]", fullmatch=True), st.integers(1, 10**9))
def test_every_resource_fits_into_a_socket_path(name: str, run: int) -> None:
    path = KUBELET_DIRECTORY / endpoint_name(KUBELET_DIRECTORY, f"usbip.dev/{name}", run)
    assert path.parent == KUBELET_DIRECTORY
    assert len(os.fsencode(path)) <= MAX_SOCKET_PATH_BYTES


def test_long_names_stay_apart() -> None:
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
def test_why_over(
    kubelet_now: SocketIdentity | None, socket_now: SocketIdentity | None, streams: int, over: bool
) -> None:
    cause = why_over(kubelet_then=ONE, kubelet_now=kubelet_now, socket_then=ONE, socket_now=socket_now, streams=streams)
    assert (cause is not None) is over


def test_only_a_socket_has_an_identity_and_only_a_dead_one_is_stale(tmp_path: Path) -> None:
    path = Path(os.path.relpath(tmp_path / "s"))
    assert identify(path) is None
    assert not is_stale(path)
    path.write_text("not a socket")
    assert identify(path) is None
    assert not is_stale(path)
    path.unlink()
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))
        server.listen()
        assert identify(path) is not None
        assert not is_stale(path)
    assert identify(path) is not None
    assert is_stale(path)


async def test_broadcast_wakes_everybody_and_misses_nothing() -> None:
    value = 0
    broadcast, upstream = Broadcast(), Broadcast()

    async def wait_for(wanted: int) -> None:
        await broadcast.until(lambda: value >= wanted)

    async with asyncio.timeout(10), asyncio.TaskGroup() as group:
        for wanted in range(50):
            group.create_task(wait_for(wanted))
        unsubscribe = upstream.subscribe(broadcast.fire)
        for _ in range(50):
            value += 1
            upstream.fire()
            await asyncio.sleep(0)
        unsubscribe()
    upstream.fire()
    assert value == 50


async def test_a_relay_ends_when_it_is_unsubscribed() -> None:
    a, b = Broadcast(), Broadcast()
    looked = 0

    def condition() -> bool:
        nonlocal looked
        looked += 1
        return looked == 3

    task = asyncio.create_task(b.until(condition))
    await asyncio.sleep(0)
    unsubscribe = a.subscribe(b.fire)
    a.fire()
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    unsubscribe()
    unsubscribe()  # a second call does nothing
    a.fire()
    await asyncio.sleep(0)
    assert looked == 2
    b.fire()
    await task
