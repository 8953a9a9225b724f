"""VhciDriver on the simulated kernel of service.py, for development: it never really attaches a device."""

from __future__ import annotations

import asyncio
import itertools
import logging
import os
import random
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from usbip_plugin.clock import Clock, backoff
from usbip_plugin.errors import AttachRefused, DriverMissing, SimulatedKernelMissing
from usbip_plugin.model import Attachment, Descriptor, DeviceKey
from usbip_plugin.sync import Bell
from usbip_plugin.vhci.driver import ABANDON_S, ASKED_CHILD_WAIT_S, DriverReport, PortState
from usbip_sim.kernel import wire
from usbip_sim.kernel.channel import Channel, Message

log = logging.getLogger(__name__)

T = TypeVar("T")


ANSWER_S = 5.0
"""Seconds that the simulated kernel has to answer, beyond the time that the request itself may take."""
RECONNECT_FIRST_S, RECONNECT_MAX_S = 0.1, 2.0
"""Seconds of the first and the longest wait before run() connects to the simulated kernel again."""


class RemoteVhci:
    """VhciDriver that calls a `usbip-plugin simulate kernel` process. Connects again when the connection breaks.

    socket_path: socket on which the process listens.
    """

    def __init__(self, socket_path: Path, clock: Clock, rng: random.Random) -> None:
        self._path, self._clock, self._rng = socket_path, clock, rng
        self._bell = Bell()
        self._channel: Channel | None = None
        self._running = False
        self._lost = asyncio.Event()
        self._numbers = itertools.count(1)
        self._waiting: dict[int, asyncio.Future[Message]] = {}
        self._abandoned: set[int] = set()

    async def ports(self) -> tuple[PortState, ...]:
        return await self._call("ports", wire.ports_in)

    async def attach(self, key: DeviceKey, descriptor: Descriptor, fd: int) -> int:
        # If cancelled, _received detaches the port that a late answer names.
        request = {"key": wire.key_out(key), "descriptor": wire.descriptor_out(descriptor)}
        return await self._call("attach", wire.number_in, request, fd=fd)

    async def enumerate(
        self,
        key: DeviceKey,
        descriptor: Descriptor,
        port: int,
        *,
        children: tuple[str, ...] | None = None,
        children_timeout: float = ASKED_CHILD_WAIT_S,
        serial: str | None = None,  # noqa: ARG002 (it does not read them)
        timeout: float,
    ) -> Attachment:
        request = {"key": wire.key_out(key), "descriptor": wire.descriptor_out(descriptor), "port": port}
        request |= {"children": list(children or ()), "children_timeout": children_timeout}
        return await self._call("enumerate", wire.attachment_in, request, timeout=timeout, extra=ABANDON_S)

    async def inspect(self, key: DeviceKey, port: int) -> Attachment | None:
        return await self._call("inspect", _if_any, {"key": wire.key_out(key), "port": port})

    async def detach(self, port: int, *, timeout: float) -> None:
        await self._call("detach", _nothing, {"port": port}, timeout=timeout)

    async def forget(self, key: DeviceKey) -> None:
        await self._call("forget", _nothing, {"key": wire.key_out(key)})

    def subscribe(self, callback: Callable[[], None]) -> Callable[[], None]:
        return self._bell.subscribe(callback)

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
                self._bell.ring()  # the new connection may be to another kernel
                await self._lost.wait()
                log.warning("the simulated kernel has gone", extra={"socket": str(self._path)})
                self._bell.ring()
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
            return await self._call("check", wire.report_in)
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

    async def _call(
        self,
        name: str,
        read: Callable[[Any], T],
        request: Message | None = None,
        *,
        fd: int | None = None,
        timeout: float = 0.0,
        extra: float = 0.0,
    ) -> T:
        """Sends a request and returns its result, within timeout + extra + ANSWER_S seconds.

        Cancel-safe: the kernel gets a message that cancels the request. Raises SimulatedKernelMissing if there is no
        connection or no valid answer, and the error that the kernel answers with.

        read: converts the answer into the result; raises ValueError or KeyError for an invalid answer.
        """
        number = next(self._numbers)
        answer: asyncio.Future[Message] = asyncio.get_running_loop().create_future()
        self._waiting[number] = answer
        message = {"id": number, "version": wire.VERSION, "call": name, "timeout": timeout, **(request or {})}
        try:
            self._connected().send(message, fd)
            if self._channel is None:  # the kernel does not read: send() ended the connection
                raise SimulatedKernelMissing(str(self._path), "it does not read its requests")
            async with self._clock.timeout(timeout + extra + ANSWER_S):
                got = await answer
        except TimeoutError:
            self._give_up(number, name)
            raise SimulatedKernelMissing(str(self._path), f"no answer to {name}") from None
        except asyncio.CancelledError:
            self._give_up(number, name)
            raise
        finally:
            self._waiting.pop(number, None)
        try:
            if "error" not in got:
                return read(got["result"])
            error = wire.error_in(got["error"])
        except (KeyError, ValueError) as cause:
            raise SimulatedKernelMissing(str(self._path), f"its answer to {name} makes no sense") from cause
        raise error

    def _give_up(self, number: int, name: str) -> None:
        if self._channel is None:
            return
        answer = self._waiting.get(number)
        if name == "attach" and answer is not None and answer.done() and not answer.cancelled():
            self._give_back(answer.result())
        elif name == "attach":
            self._abandoned.add(number)
        self._channel.send({"cancel": number})

    def _give_back(self, answer: Message) -> None:
        if self._channel is not None and "result" in answer:
            number = next(self._numbers)
            request = {"id": number, "version": wire.VERSION, "call": "detach", "port": answer["result"]}
            self._channel.send({**request, "timeout": ABANDON_S})

    def _received(self, message: Message, fd: int | None) -> None:
        if fd is not None:
            os.close(fd)  # the kernel sends no fds
        number = message.get("id")
        if not isinstance(number, int):
            number = 0
        if number in self._abandoned:
            self._abandoned.discard(number)
            self._give_back(message)
        elif number in self._waiting:
            answer = self._waiting[number]
            if not answer.done():
                answer.set_result(message)
        elif "changed" in message:
            self._bell.ring()

    def _ended(self) -> None:
        self._channel = None
        self._abandoned.clear()
        self._lost.set()
        for answer in self._waiting.values():
            if not answer.done():
                answer.set_exception(SimulatedKernelMissing(str(self._path), "it has gone"))


def _if_any(value: Any) -> Attachment | None:
    return None if value is None else wire.attachment_in(value)


def _nothing(_value: Any) -> None:
    return None
