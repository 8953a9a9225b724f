"""A command of the plugin's as a process, to its end."""

from __future__ import annotations

import asyncio
from asyncio.subprocess import Process


async def finished(process: Process, patience: float) -> tuple[int, str, str]:
    """Reads it to its end: (exit status, stdout, stderr). One that takes longer than that many seconds is killed.

    Left running, its transports would be collected in a later test, with a warning there.
    """
    try:
        async with asyncio.timeout(patience):
            out, err = await process.communicate()
    finally:
        if process.returncode is None:
            process.kill()
            await process.communicate()
    return process.returncode or 0, out.decode(), err.decode()
