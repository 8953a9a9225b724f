"""Plugin processes, one at a time, each forked from a process that has only imported its modules.

In the emulated guest the imports take most of the time of a start.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Self

ROOT = Path(__file__).parents[2]
IMPORT_S = 180.0
"""Seconds for the imports in an emulated guest on a busy machine."""
END_S = 60.0


class Spawner:
    """A process that forks plugins, as an async context manager. arguments: of agent_process.py."""

    def __init__(self, arguments: Sequence[str | Path]) -> None:
        self._arguments = arguments
        self._process: asyncio.subprocess.Process | None = None

    async def __aenter__(self) -> Self:
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        self._process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "tests.kernel.agent_process", *map(str, self._arguments)),
            env=environment,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
        )
        assert await self._line(IMPORT_S) == "ready"
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._process is not None
        with contextlib.suppress(ProcessLookupError):
            self._process.kill()
        await self._process.communicate()

    @contextlib.asynccontextmanager
    async def plugin(self) -> AsyncIterator[int]:
        """Yields the pid of a new plugin, and kills it at the end. Raises AssertionError if it ended by itself."""
        assert self._process is not None
        assert self._process.stdin is not None
        self._process.stdin.write(b"start\n")
        pid = int(await self._line(END_S))
        try:
            yield pid
        finally:
            os.kill(pid, signal.SIGKILL)  # the pid is valid: the parent has not reaped it
            self._process.stdin.write(b"reap\n")
            ended = await self._line(END_S)
        assert ended == str(-signal.SIGKILL), f"the plugin ended by itself: {ended}"

    async def _line(self, limit: float) -> str:
        assert self._process is not None
        assert self._process.stdout is not None
        async with asyncio.timeout(limit):
            return (await self._process.stdout.readline()).decode().strip()


def serve() -> bool:
    """Forks a child for each request. Returns True in a child, which becomes a plugin, and False at the end."""
    print("ready", flush=True)
    while sys.stdin.readline() == "start\n":
        pid = os.fork()
        if pid == 0:
            return True
        print(pid, flush=True)
        if sys.stdin.readline() != "reap\n":
            os.kill(pid, signal.SIGKILL)
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
    return False
