"""JSON lines between the tests and a process in a guest, over a virtio port: calls with answers, and events.

The port is no part of the guest's network, so a cut of the network leaves it alone.
"""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

PORTS = Path("/sys/class/virtio-ports")
PORT_NAME = "control"
MAX_LINE = 1 << 20
"""Bytes of one message."""

Handler = Callable[..., Awaitable[Any]]


class GuestError(Exception):
    """An exception in the guest, as text: "TypeName: message"."""


class Channel:
    """The end of a channel in the tests. on_event: called with each event. `run` must be running."""

    def __init__(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, on_event: Callable[[dict[str, Any]], None]
    ) -> None:
        self._reader, self._writer, self._on_event = reader, writer, on_event
        self._answers: dict[int, asyncio.Future[Any]] = {}
        self._calls = 0

    async def run(self) -> None:
        """Reads until the guest is gone. Calls without an answer then raise GuestError."""
        try:
            while line := await self._reader.readline():
                self._receive(json.loads(line))
        except ConnectionError:
            pass
        finally:
            self._writer.close()
            for answer in self._answers.values():
                if not answer.done():
                    answer.set_exception(GuestError("the guest is gone"))

    def _receive(self, message: dict[str, Any]) -> None:
        if "event" in message:
            self._on_event(message)
            return
        answer = self._answers.pop(message["id"], None)
        if answer is None or answer.done():
            return
        if "error" in message:
            answer.set_exception(GuestError(message["error"]))
        else:
            answer.set_result(message["result"])

    async def call(self, name: str, limit: float, /, **arguments: Any) -> Any:
        """Calls a handler in the guest. Raises GuestError if it fails, TimeoutError after limit seconds."""
        self._calls += 1
        number, answer = self._calls, asyncio.get_running_loop().create_future()
        self._answers[number] = answer
        try:
            self._writer.write(encode({"id": number, "call": name, "arguments": arguments}))
            async with asyncio.timeout(limit):
                return await answer
        finally:
            self._answers.pop(number, None)


def encode(message: Mapping[str, Any]) -> bytes:
    return json.dumps(message).encode() + b"\n"


def control_port() -> str:
    """Returns the path of the virtio port that run.sh's caller has named so."""
    return next(f"/dev/{port.parent.name}" for port in PORTS.glob("*/name") if port.read_text().strip() == PORT_NAME)


def appended(path: str) -> BinaryIO:
    """Opens a file for appending."""
    return Path(path).open("ab")


def write(path: Path, text: str) -> None:
    """Writes a small file on a tmpfs, where it blocks nobody."""
    path.write_text(text)


class GuestEnd:
    """The end of a channel in the guest. Every call runs in a task of its own."""

    def __init__(self, handlers: Mapping[str, Handler]) -> None:
        self._handlers = handlers
        self._reader = asyncio.StreamReader(limit=MAX_LINE)
        self._writer: asyncio.WriteTransport | None = None

    def event(self, event: str, **fields: Any) -> None:
        self._send({"event": event, **fields})

    async def open(self) -> None:
        """Opens the port, and tells the tests. Must be the first call."""
        loop = asyncio.get_running_loop()
        fd = os.open(control_port(), os.O_RDWR | os.O_NONBLOCK)
        await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(self._reader), os.fdopen(fd, "rb", 0))
        self._writer, _ = await loop.connect_write_pipe(asyncio.BaseProtocol, os.fdopen(os.dup(fd), "wb", 0))
        self.event("ready")

    async def serve(self, tasks: asyncio.TaskGroup) -> None:
        """Serves calls until the tests close the channel."""
        while line := await self._reader.readline():
            tasks.create_task(self._answer(json.loads(line)))

    async def _answer(self, request: dict[str, Any]) -> None:
        try:
            result = await self._handlers[request["call"]](**request["arguments"])
        except Exception as error:  # noqa: BLE001 - the tests get it
            self._send({"id": request["id"], "error": f"{type(error).__name__}: {error}"})
        else:
            self._send({"id": request["id"], "result": result})

    def _send(self, message: Mapping[str, Any]) -> None:
        assert self._writer is not None
        self._writer.write(encode(message))
