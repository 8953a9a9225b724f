"""An exporter on a simulated host, in virtual time: binder, exports and server, with a gate that the test sets."""

from __future__ import annotations

import contextlib
import logging
import socket
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from pathlib import Path

from tests.rigs.command_rig import Log
from tests.rigs.host_suite import CONVERTER, STICK
from tests.rigs.tasks import background
from usbip_plugin.clock import Clock
from usbip_plugin.config.schema import Selector
from usbip_plugin.exporter.binder import Binder
from usbip_plugin.exporter.exports import Exports, ImportAnswer, ImportResult
from usbip_plugin.exporter.gate import OpenGate, Refusal
from usbip_plugin.exporter.host import StubStatus
from usbip_plugin.exporter.state import Export, StateFile
from usbip_plugin.model import Endpoint
from usbip_sim.server.host import SimulatedHost
from usbip_sim.server.usbdevice import VirtualDevice

EVERY = (Selector(),)
PEER, OTHER = Endpoint("10.0.0.1", 40001), Endpoint("10.0.0.2", 40002)
LIMIT_S = 600.0
"""Limits a wait in seconds of the test's clock, which are virtual in most tests."""


@contextlib.contextmanager
def log_from(level: int = logging.INFO) -> Iterator[Log]:
    """Collects the log from this level up."""
    logger = logging.getLogger("usbip_plugin")
    before = logger.level
    logger.setLevel(level)
    try:
        with Log() as log:
            yield log
    finally:
        logger.setLevel(before)


class FakeGate(OpenGate):
    """A gate whose answers a test sets. refusals: by bus ID. holders: by bus ID, whose connection may stay."""

    def __init__(self) -> None:
        self.refusals: dict[str, str] = {}
        self.holders: dict[str, Endpoint] = {}
        self.asked: list[tuple[str, Endpoint]] = []
        self.on_ask: Callable[[], None] = lambda: None
        self._callbacks: list[Callable[[str], None]] = []

    async def admits(self, busid: str, peer: Endpoint) -> Refusal | None:
        self.asked.append((busid, peer))
        self.on_ask()
        return Refusal(self.refusals[busid]) if busid in self.refusals else None

    def may_stay(self, busid: str, peer: Endpoint | None) -> bool:
        return self.holders.get(busid, peer) == peer

    def subscribe(self, callback: Callable[[str], None]) -> Callable[[], None]:
        self._callbacks.append(callback)
        return lambda: self._callbacks.remove(callback)

    def hand_over(self, busid: str, holder: Endpoint) -> None:
        self.holders[busid] = holder
        for callback in self._callbacks:
            callback(busid)


class ExporterRig:
    """An exporter that can be ended and started anew on the same host. Every device is selected unless told otherwise.

    results, ended: what the exporter has counted.
    """

    limit_s = LIMIT_S

    def __init__(
        self, clock: Clock, state: Path, devices: Sequence[VirtualDevice] = (STICK, CONVERTER), reset_time: float = 0.3
    ) -> None:
        self.clock = clock
        self.host = SimulatedHost(devices, clock, reset_time)
        self.gate = FakeGate()
        self.state = StateFile(state)
        self.selectors: Sequence[Selector] = EVERY
        self.results: list[ImportResult] = []
        self.ended: list[Export] = []
        self.clients: list[socket.socket] = []

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Runs an exporter for the length of the block. It leaves the host as it is then."""
        self.binder = Binder(self.host, self.clock, self.selectors)
        self.exports = Exports(
            self.host,
            self.binder,
            self.gate,
            self.state,
            self.clock,
            on_import=self.results.append,
            on_end=self.ended.append,
        )
        with log_from() as self.log:
            async with background(self.binder.run()), background(self.exports.run()):
                await self.exports.ready.wait()
                yield

    def close(self) -> None:
        self.host.close()
        for client in self.clients:
            client.close()

    async def import_device(self, busid: str, peer: Endpoint = PEER) -> ImportAnswer:
        """Imports a device over a socketpair, whose client's end is the last of `clients`."""
        ours, theirs = socket.socketpair()
        theirs.setblocking(False)
        self.clients.append(theirs)
        with ours:
            return await self.exports.import_device(busid, peer, ours.fileno())

    async def until(self, condition: Callable[[], object]) -> None:
        """Waits until the condition is true; looks as often as a second of the clock has ten parts."""
        async with self.clock.timeout(self.limit_s):
            while not condition():
                await self.clock.sleep(0.1)

    async def freed(self, busid: str) -> None:
        await self.until(lambda: self.host.status(busid) is StubStatus.AVAILABLE)

    def listed(self) -> list[str]:
        return sorted(device.busid for device in self.exports.devlist())

    def logged(self, message: str) -> list[dict[str, object]]:
        return [vars(record) for record in self.log.having(message)]


def closed(client: socket.socket) -> bool:
    """Returns whether the exporter's end of a connection is closed."""
    try:
        return client.recv(1) == b""
    except BlockingIOError:
        return False
    except ConnectionResetError:
        return True
