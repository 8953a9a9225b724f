"""VhciDriver on the simulated kernel of another process, for development. No device is really attached."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import os
import random
import socket
from collections.abc import Callable
from pathlib import Path
from types import NoneType
from typing import TypeVar

from usbip_plugin.clock import Clock, backoff
from usbip_plugin.errors import AttachRefused, DriverMissing, SimulatedKernelMissing
from usbip_plugin.model import Attachment, Descriptor, DeviceKey, Hold, InterfaceRules
from usbip_plugin.sync import Broadcast
from usbip_plugin.vhci.driver import ABANDON_S, ASKED_CHILD_WAIT_S, DEFAULT_RULES, DriverReport, PortState
from usbip_sim.kernel import wire
from usbip_sim.kernel.channel import Channel

log = logging.getLogger(__name__)

T = TypeVar("T")

ANSWER_S = 5.0
"""Seconds that the simulated kernel has to answer, beyond the time that the request itself may take."""
RECONNECT_FIRST_S, RECONNECT_MAX_S = 0.1, 2.0
"""Seconds of the first and the longest wait before run() connects to the simulated kernel again."""


class RemoteVhci:
    """VhciDriver that calls a `usbip-plugin simulate kernel` process. Reconnects when the connection breaks.

    socket_path: socket on which the process listens.
    """

    def __init__(self, socket_path: Path, clock: Clock, rng: random.Random) -> None:
        self._path, self._clock, self._rng = socket_path, clock, rng
        self._changed = Broadcast()
        self._channel: Channel | None = None
        self._running = False
        self._lost = asyncio.Event()
        self._numbers = itertools.count(1)
        self._waiting: dict[int, asyncio.Future[wire.Message]] = {}
        self._abandoned: set[int] = set()

    async def ports(self) -> tuple[PortState, ...]:
        return await self._call(wire.Ports(), tuple[PortState, ...])

    async def attach(self, key: DeviceKey, descriptor: Descriptor, fd: int, holds: tuple[Hold, ...] = ()) -> int:
        # If cancelled, _received detaches the port of a late answer.
        return await self._call(wire.Attach(key, descriptor, holds), int, fd=fd)

    async def enumerate(
        self,
        key: DeviceKey,
        descriptor: Descriptor,
        port: int,
        *,
        children: tuple[str, ...] | None = None,
        children_timeout: float = ASKED_CHILD_WAIT_S,
        serial: str | None = None,  # noqa: ARG002 (the kernel does not verify serial numbers)
        rules: InterfaceRules = DEFAULT_RULES,
        timeout: float,
    ) -> Attachment:
        request = wire.Enumerate(key, descriptor, port, children or (), children_timeout, rules, timeout)
        return await self._call(request, Attachment, seconds=timeout + ABANDON_S)

    async def inspect(self, key: DeviceKey, port: int) -> Attachment | None:
        return (await self._call(wire.Inspect(key, port), wire.Inspected)).attachment

    async def detach(self, port: int, *, timeout: float) -> None:
        await self._call(wire.Detach(port, timeout), NoneType, seconds=timeout)

    async def note_holds(self, key: DeviceKey, port: int, holds: tuple[Hold, ...]) -> None:
        await self._call(wire.NoteHolds(key, port, holds), NoneType)

    async def forget(self, key: DeviceKey) -> None:
        await self._call(wire.Forget(key), NoneType)

    def subscribe(self, callback: Callable[[], None]) -> Callable[[], None]:
        return self._changed.subscribe(callback)

    async def run(self) -> None:
        waits = backoff(self._rng, RECONNECT_FIRST_S, RECONNECT_MAX_S)
        self._running = True
        try:
            while True:
                try:
                    self._connected()
                except DriverMissing:
                    await self._clock.sleep(next(waits))
                    continue
                waits = backoff(self._rng, RECONNECT_FIRST_S, RECONNECT_MAX_S)
                self._changed.fire()  # the new connection may be to another kernel
                await self._lost.wait()
                log.warning("simulated kernel disconnected, reconnecting", extra={"socket": str(self._path)})
                self._changed.fire()
        finally:
            self._running = False
            self.close()

    def close(self) -> None:
        """Ends the connection; attached devices stay. The next call makes a new connection."""
        if self._channel is not None:
            self._channel.close()
            self._ended()

    async def check(self) -> DriverReport:
        try:
            return await self._call(wire.Check(), DriverReport)
        except (DriverMissing, AttachRefused) as error:
            return DriverReport(loaded=False, problems=(str(error),))
        finally:
            if not self._running:  # in `usbip-plugin check` nothing else ends the connection
                self.close()

    def _connected(self) -> Channel:
        if self._channel is None:
            sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            try:
                sock.setblocking(False)
                sock.connect(str(self._path))
            except OSError as error:
                sock.close()
                raise SimulatedKernelMissing(str(self._path), str(error)) from error
            self._lost.clear()
            self._channel = Channel(sock, self._received, self._ended)
        return self._channel

    async def _call(self, request: wire.Request, kind: type[T], *, fd: int | None = None, seconds: float = 0.0) -> T:
        """Sends a request and returns its result, which must be of this kind, within seconds + ANSWER_S.

        Cancel-safe: the kernel gets a message that cancels the request. Raises SimulatedKernelMissing if there is no
        connection or no valid answer, and the error that the kernel answers with.
        """
        number, name = next(self._numbers), type(request).__name__.lower()
        waiting: asyncio.Future[wire.Message] = asyncio.get_running_loop().create_future()
        self._waiting[number] = waiting
        try:
            self._connected().send(wire.Message(number, wire.VERSION, request), fd)
            if self._channel is None:  # the kernel does not read: send() ended the connection
                raise SimulatedKernelMissing(str(self._path), "it does not read its requests")
            async with self._clock.timeout(seconds + ANSWER_S):
                answer = await waiting
        except TimeoutError:
            self._give_up(number, request)
            raise SimulatedKernelMissing(str(self._path), f"no answer to {name}") from None
        except asyncio.CancelledError:
            self._give_up(number, request)
            raise
        finally:
            self._waiting.pop(number, None)
        try:
            if answer.error is None:
                result: T = wire.read(answer.result, kind)
                return result
            error = wire.error_of(wire.read(answer.error, wire.Failure))
        except ValueError as cause:
            raise SimulatedKernelMissing(str(self._path), f"its answer to {name} is not valid") from cause
        raise error

    def _give_up(self, number: int, request: wire.Request) -> None:
        if self._channel is None:
            return
        waiting = self._waiting.get(number)
        if isinstance(request, wire.Attach):
            if waiting is not None and waiting.done() and not waiting.cancelled():
                self._give_back(waiting.result())
            else:
                self._abandoned.add(number)
        self._channel.send(wire.Message(cancel=number))

    def _give_back(self, answer: wire.Message) -> None:
        """Detaches the port that an Attach has returned. Does nothing if it failed."""
        if self._channel is not None:
            with contextlib.suppress(ValueError):
                request = wire.Detach(wire.read(answer.result, int), ABANDON_S)
                self._channel.send(wire.Message(next(self._numbers), wire.VERSION, request))

    def _received(self, message: wire.Message, fd: int | None) -> None:
        if fd is not None:
            os.close(fd)  # the kernel sends no fds
        number = message.id
        if number in self._abandoned:
            self._abandoned.discard(number)
            self._give_back(message)
        elif number in self._waiting:
            waiting = self._waiting[number]
            if not waiting.done():
                waiting.set_result(message)
        elif message.changed:
            self._changed.fire()

    def _ended(self) -> None:
        self._channel = None
        self._abandoned.clear()
        self._lost.set()
        for answer in self._waiting.values():
            if not answer.done():
                answer.set_exception(SimulatedKernelMissing(str(self._path), "it has disconnected"))
