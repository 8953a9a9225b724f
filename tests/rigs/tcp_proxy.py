"""A TCP proxy that can cut connections or hold back their bytes."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

END_S = 5.0
"""Limits the wait for connections to end with the proxy, in seconds."""


class Proxy:
    """A proxy in front of one port of this machine.

    target: the port for new connections.
    refusing: whether new connections are closed at once.
    flowing: while it is not set, bytes are held back.
    held: the number of connections with bytes held back.
    """

    def __init__(self, target_port: int) -> None:
        self.target = target_port
        self._writers: set[asyncio.StreamWriter] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self.refusing = False
        self.flowing = asyncio.Event()
        self.flowing.set()
        self.port = 0
        self.held = 0

    def cut(self) -> None:
        """Resets all connections."""
        for writer in self._writers:
            writer.transport.abort()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        self._writers.add(writer)
        try:
            if self.refusing:
                return
            try:
                far_reader, far_writer = await asyncio.open_connection("127.0.0.1", self.target)
            except ConnectionRefusedError:
                return
            self._writers.add(far_writer)
            try:
                await asyncio.gather(self._pump(reader, far_writer), self._pump(far_reader, writer))
            finally:
                self._writers.discard(far_writer)
                far_writer.transport.abort()
        finally:
            writer.transport.abort()
            self._writers.discard(writer)
            self._tasks.discard(task)

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(65536):
                self.held += 1
                try:
                    await self.flowing.wait()
                finally:
                    self.held -= 1
                writer.write(data)
                await writer.drain()
        writer.transport.abort()

    async def end(self) -> None:
        """Ends all connections without a cancel: asyncio logs a cancelled connection handler as an error."""
        self.flowing.set()
        self.cut()
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=END_S)


@contextlib.asynccontextmanager
async def proxy_to(target_port: int, host: str = "127.0.0.1", port: int = 0) -> AsyncIterator[Proxy]:
    """Runs a proxy at an address of this machine. port: 0 for any."""
    proxy = Proxy(target_port)
    server = await asyncio.start_server(proxy.serve, host, port)
    proxy.port = server.sockets[0].getsockname()[1]
    try:
        yield proxy
    finally:
        server.close()
        await proxy.end()
