"""A TCP proxy that can go silent: connections stay open and are accepted, and nothing passes any more."""

from __future__ import annotations

import asyncio
import contextlib
from types import TracebackType
from typing import Self

from usbip_plugin.model import ServerKey

CHUNK = 1 << 16


class SilentProxy:
    """Use as an async context manager; key is where it listens."""

    def __init__(self, target: ServerKey) -> None:
        self.key = target
        self._target = target
        self._passing = asyncio.Event()
        self._passing.set()
        self._open: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.key = ServerKey(*self._server.sockets[0].getsockname())
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.close()
        for task in tuple(self._open):
            task.cancel()
        if self._open:
            await asyncio.wait(tuple(self._open))

    def mute(self) -> None:
        """Nothing passes from now on, in either direction, on old connections and new ones."""
        self._passing.clear()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._open.add(task)
        try:
            there, back = await asyncio.open_connection(self._target.host, self._target.port)
            with contextlib.closing(back):
                async with asyncio.TaskGroup() as group:
                    group.create_task(self._pass(reader, back))
                    group.create_task(self._pass(there, writer))
        finally:
            self._open.discard(task)
            writer.close()

    async def _pass(self, source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError):
            while data := await source.read(CHUNK):
                await self._passing.wait()
                sink.write(data)
                await sink.drain()
            sink.write_eof()
