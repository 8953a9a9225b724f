"""Uevents: parsing, the netlink socket, and its absence."""

from __future__ import annotations

import asyncio
import errno
import socket
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.rigs.clocks import InstantClock
from usbip_plugin.vhci import uevents
from usbip_plugin.vhci.uevents import MAX_UEVENT, NetlinkUevents, Uevent, parse

REMOVE = (
    b"remove@/devices/platform/vhci_hcd.0/usb4/4-1\0ACTION=remove\0"
    b"DEVPATH=/devices/platform/vhci_hcd.0/usb4/4-1\0SUBSYSTEM=usb\0DEVNAME=bus/usb/004/002\0SEQNUM=994\0"
)


class TestParse:
    def test_a_message_of_the_kernel_is_read(self) -> None:
        event = parse(REMOVE)
        assert event is not None
        assert (event.action, event.devpath) == ("remove", "/devices/platform/vhci_hcd.0/usb4/4-1")
        assert event.fields["DEVNAME"] == "bus/usb/004/002"
        assert event.concerns_vhci

    def test_a_uevent_of_another_device_does_not_concern_vhci(self) -> None:
        event = parse(b"add@/devices/pci0000:00/0000:00:05.0/usb2/2-4\0ACTION=add\0")
        assert event is not None
        assert not event.concerns_vhci

    @pytest.mark.parametrize(
        "message",
        [
            b"",
            b"\0",
            b"libudev\0\xfe\xed\xca\xfe\0",
            REMOVE[:-1],  # cut
            b"remove/devices/x\0",
            b"remove@devices/x\0",
            b"re move@/devices/x\0",
            b"add@/x\0" + b"A=" + b"b" * MAX_UEVENT + b"\0",
        ],
    )
    def test_anything_else_is_ignored(self, message: bytes) -> None:
        assert parse(message) is None

    @given(st.binary(max_size=200))
    def test_any_message_is_parsed_without_an_error(self, message: bytes) -> None:
        event = parse(message)
        assert event is None or event.devpath.startswith("/")


class ScriptedSocket:
    """A socket whose recvfrom follows a script of errors and messages with the port id of their sender."""

    def __init__(self, *script: tuple[bytes, int] | OSError) -> None:
        self.script = list(script)

    def recvfrom(self, _size: int) -> tuple[bytes, tuple[int, int]]:
        if not self.script:
            raise BlockingIOError
        step = self.script.pop(0)
        if isinstance(step, OSError):
            raise step
        message, sender = step
        return message, (sender, 1)


def receive(*script: tuple[bytes, int] | OSError) -> tuple[list[Uevent | None], asyncio.Future[None]]:
    delivered: list[Uevent | None] = []
    failed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    uevents._receive(ScriptedSocket(*script), delivered.append, failed)  # type: ignore[arg-type]
    return delivered, failed


class TestReceive:
    async def test_only_messages_of_the_kernel_are_delivered(self) -> None:
        delivered, _ = receive((REMOVE, 4711), (REMOVE, 0))
        assert delivered == [parse(REMOVE)]

    async def test_an_overrun_delivers_none_which_means_look_at_everything(self) -> None:
        delivered, failed = receive(OSError(errno.ENOBUFS, "no buffer space"), (REMOVE, 0))
        assert delivered == [None, parse(REMOVE)]
        assert not failed.done()

    async def test_another_error_ends_the_receiving(self) -> None:
        delivered, failed = receive(OSError(errno.EBADF, "bad"), (REMOVE, 0))
        assert delivered == []
        assert isinstance(failed.exception(), OSError)


async def run_until(source: NetlinkUevents, enough: Callable[[list[Uevent | None]], bool]) -> list[Uevent | None]:
    delivered: list[Uevent | None] = []
    done = asyncio.Event()

    def deliver(event: Uevent | None) -> None:
        delivered.append(event)
        if enough(delivered):
            done.set()

    async with asyncio.timeout(5), asyncio.TaskGroup() as group:
        task = group.create_task(source.run(deliver))
        await done.wait()
        task.cancel()
    return delivered


class TestNetlink:
    async def test_it_begins_with_a_look_at_everything(self) -> None:
        clock = InstantClock()
        assert (await run_until(NetlinkUevents(clock), lambda events: len(events) >= 1))[0] is None
        assert clock.slept == []

    async def test_without_netlink_it_polls_and_reports_the_problem(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def refuse(*_args: object) -> socket.socket:
            raise PermissionError(errno.EPERM, "Operation not permitted")

        monkeypatch.setattr(socket, "socket", refuse)
        clock = InstantClock()
        source = NetlinkUevents(clock)
        assert await run_until(source, lambda events: len(events) >= 3) == [None, None, None]
        assert set(clock.slept) == {uevents.POLL_S}
        problem = source.problem()
        assert problem is not None
        assert "Operation not permitted" in problem
