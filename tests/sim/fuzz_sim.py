"""Targets: both ends of the simulated kernel's socket."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import socket
from collections.abc import Awaitable, Callable, Iterable
from pathlib import Path
from typing import Any

import msgspec

from tests.fuzz.fuzz_target import Target, fit_to_raise, fit_to_show
from usbip_plugin.errors import PortsExhausted, SimulatedKernelMissing, VhciError, WrongDevice
from usbip_plugin.model import Attachment, DeviceKey, DeviceNode, ServerKey, UsbId
from usbip_plugin.vhci.driver import DriverReport, PortState
from usbip_plugin.vhci.sysfs import PortStatus
from usbip_sim.kernel import wire
from usbip_sim.kernel.channel import MAX_MESSAGE, Channel
from usbip_sim.kernel.ports import SimulatedKernel
from usbip_sim.kernel.remote import RemoteVhci
from usbip_sim.kernel.service import KernelService, _Session
from usbip_sim.server.usbdevice import VirtualDevice
from usbip_sim.virtual.loop import SimClock, run

KEY = DeviceKey(ServerKey("10.0.0.1"), "1-1")
DESCRIPTOR = VirtualDevice("1-1", UsbId(1, 2)).descriptor(configured=False)
ATTACHMENT = Attachment(KEY, 0, "3-1", UsbId(1, 2), "S", (DeviceNode("/dev/bus/usb/003/002", "usb", False, 189, 1),))
LAST = 1 << 40
# Virtual seconds: longer than any request may take.
PATIENCE = 2 * wire.MAX_TIMEOUT_S


def _pair() -> tuple[socket.socket, socket.socket]:
    ends = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    for end in ends:
        end.setblocking(False)
    return ends


def kernel_requests(data: bytes) -> None:
    """What a driver sends, one message a line. The kernel answers the next good one, or has ended the connection."""
    run(lambda: _requests(data))


async def _requests(data: bytes) -> None:
    loop = asyncio.get_running_loop()
    ours, theirs = _pair()
    device, server = _pair()
    with ours, device, server:
        service = KernelService(SimulatedKernel(SimClock(loop)), Path("/nowhere"))
        before = _open_files()
        async with asyncio.timeout(PATIENCE), asyncio.TaskGroup() as tasks:
            channels: set[Channel] = set()
            session = _Session(service, theirs, channels, tasks)
            good = msgspec.json.encode(wire.Message(LAST, wire.VERSION, wire.Ports()))
            for line in [*(line for line in data.split(b"\n")[:8] if line), good]:
                with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                    # a descriptor comes along: it must not stay open
                    socket.send_fds(ours, [line[:MAX_MESSAGE]], [device.fileno()])
            with contextlib.suppress(ConnectionResetError):
                while (answer := await loop.sock_recv(ours, MAX_MESSAGE)) and json.loads(answer).get("id") != LAST:
                    pass
            while session._calls:
                await asyncio.wait(list(session._calls.values()))
            for channel in tuple(channels):
                session._ended()
                channel.close()
        service.kernel.reboot()
        assert _open_files() <= before


def _open_files() -> int:
    return len(os.listdir("/proc/self/fd"))  # noqa: PTH208 - counted, not looked at


def kernel_answers(data: bytes) -> None:
    """What the kernel answers, the same to every call."""
    with contextlib.suppress(ValueError, RecursionError):
        value = json.loads(data)
        if isinstance(value, dict):
            run(lambda: _answers(value))


async def _answers(value: dict[str, Any]) -> None:
    loop = asyncio.get_running_loop()
    ours, theirs = _pair()
    remote = RemoteVhci(Path("/nowhere"), SimClock(loop), random.Random(0))
    remote._channel = Channel(theirs, remote._received, remote._ended)

    async def answer() -> None:
        while request := await loop.sock_recv(ours, MAX_MESSAGE):
            asked = json.loads(request).get("id")
            with contextlib.suppress(BrokenPipeError):
                ours.send(json.dumps(value if asked is None else {**value, "id": asked}).encode()[:MAX_MESSAGE])

    answering = asyncio.create_task(answer())
    calls: tuple[Callable[[], Awaitable[object]], ...] = (
        remote.ports,
        remote.check,
        lambda: remote.inspect(KEY, 0),
        lambda: remote.attach(KEY, DESCRIPTOR, ours.fileno()),
        lambda: remote.detach(0, timeout=1),
        lambda: remote.enumerate(KEY, DESCRIPTOR, 0, timeout=1),
    )
    async with asyncio.timeout(PATIENCE):
        for call in calls:
            try:
                result = await call()
            except (VhciError, WrongDevice) as error:
                fit_to_raise(error, 10_000)
                continue
            if isinstance(result, Attachment):
                fit_to_show(result.local_busid, wire.MAX_TEXT)
            assert result is None or isinstance(result, int | tuple | Attachment | DriverReport)
    answering.cancel()
    remote.close()
    ours.close()


def _requested() -> Iterable[bytes]:
    requests: tuple[wire.Request, ...] = (
        wire.Attach(KEY, DESCRIPTOR),
        wire.Enumerate(KEY, DESCRIPTOR, 0, ("tty",), 5.0, 6.0),
        wire.Inspect(KEY, 0),
        wire.Detach(0, 5.0),
        wire.Check(),
    )
    messages = [wire.Message(number, wire.VERSION, request) for number, request in enumerate(requests, 1)]
    messages.insert(4, wire.Message(cancel=2))
    yield b"\n".join(msgspec.json.encode(message) for message in messages)


def _answered() -> Iterable[bytes]:
    port = PortState(0, "hs", PortStatus.USED, 3, 65538, "3-1", KEY, by_plugin=True)
    for result in (wire.compact([port]), ATTACHMENT, wire.Inspected(ATTACHMENT), DriverReport(loaded=True), 3):
        yield msgspec.json.encode(wire.Message(result=result))
    errors: tuple[VhciError | WrongDevice, ...] = (
        WrongDevice(KEY, UsbId(1, 2), UsbId(3, 4)),
        PortsExhausted("hs", 8),
        SimulatedKernelMissing("/x", "gone"),
    )
    for error in errors:
        yield msgspec.json.encode(wire.Message(error=wire.failure_of(error)))


TARGETS = (
    Target("kernel-requests", kernel_requests, _requested),
    Target("kernel-answers", kernel_answers, _answered),
)
