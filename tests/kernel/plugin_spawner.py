"""Plugin processes, one at a time, each forked from a process that has everything imported already.

In the emulated guest the imports take most of a start. What is forked has done nothing yet but import.
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
"""For the imports; the guest is emulated, and the machine may be busy."""
END_S = 60.0


class Spawner:
    """Use as an async context manager. arguments: of agent_process.py."""

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
        """A plugin that has just begun, by its pid; SIGKILL at the end. AssertionError if it ended by itself."""
        assert self._process is not None
        assert self._process.stdin is not None
        self._process.stdin.write(b"start\n")
        pid = int(await self._line(END_S))
        try:
            yield pid
        finally:
            os.kill(pid, signal.SIGKILL)  # it is a zombie at least: its parent has been told nothing yet
            self._process.stdin.write(b"reap\n")
            ended = await self._line(END_S)
        assert ended == str(-signal.SIGKILL), f"the plugin ended by itself: {ended}"

    async def _line(self, limit: float) -> str:
        assert self._process is not None
        assert self._process.stdout is not None
        async with asyncio.timeout(limit):
            return (await self._process.stdout.readline()).decode().strip()


def serve() -> bool:
    """The process's side: forks when told to. True in a child that is to become a plugin, False at the end."""
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
