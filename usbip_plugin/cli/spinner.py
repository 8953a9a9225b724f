"""Shows on a terminal that a command is at work."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import sys
from collections.abc import AsyncIterator
from typing import TextIO

from usbip_plugin.clock import Clock, SystemClock

AFTER_S = 0.5
"""Seconds until it appears. What is faster needs none."""
FRAME_S = 0.1
"""Seconds that one frame is shown."""
FRAMES = "⠋⠙⠹⠸⠼⠴⠦⠧⠇⠏"
ASCII_FRAMES = "|/-\\"
CLEAR = "\r\x1b[K"


@contextlib.asynccontextmanager
async def spinner(text: str, *, stream: TextIO | None = None, clock: Clock | None = None) -> AsyncIterator[None]:
    """Shows the text with a spinner on standard error while the block runs, from AFTER_S on; only on a terminal."""
    stream, clock = stream or sys.stderr, clock or SystemClock()
    if not stream.isatty():
        yield
        return
    spinning = asyncio.create_task(_spin(text, stream, clock))
    try:
        yield
    finally:
        spinning.cancel()
        await asyncio.wait([spinning])


async def _spin(text: str, stream: TextIO, clock: Clock) -> None:
    frames = FRAMES if (stream.encoding or "").lower().startswith("utf") else ASCII_FRAMES
    await clock.sleep(AFTER_S)
    try:
        for frame in itertools.cycle(frames):
            stream.write(f"{CLEAR}{frame} {text} ...")
            stream.flush()
            await clock.sleep(FRAME_S)
    finally:
        stream.write(CLEAR)
        stream.flush()
