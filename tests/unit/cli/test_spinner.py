"""The spinner: only on a terminal, only for what takes longer, and gone at the end."""

from __future__ import annotations

import asyncio
import io

from usbip_plugin.cli.spinner import AFTER_S, CLEAR, FRAME_S, spinner
from usbip_sim.virtual.loop import virtual


class Terminal(io.StringIO):
    encoding = "utf-8"

    def isatty(self) -> bool:
        return True


async def drawn(stream: io.StringIO, seconds: float) -> str:
    async with spinner("asking", stream=stream):
        await asyncio.sleep(seconds)
    return stream.getvalue()


@virtual
async def test_a_fast_block_shows_nothing() -> None:
    assert await drawn(Terminal(), AFTER_S / 2) == ""


@virtual
async def test_a_slow_block_shows_frames_and_removes_them() -> None:
    text = await drawn(Terminal(), AFTER_S + 2.5 * FRAME_S)
    assert text == f"{CLEAR}⠋ asking ...{CLEAR}⠙ asking ...{CLEAR}⠹ asking ...{CLEAR}"


@virtual
async def test_a_pipe_gets_nothing() -> None:
    assert await drawn(io.StringIO(), 10) == ""
