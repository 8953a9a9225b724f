"""The plugin's command line as a process."""

from __future__ import annotations

import asyncio
import os
import sys
from asyncio.subprocess import DEVNULL, PIPE
from pathlib import Path

PATIENCE_S = 30.0
PLUGIN = (sys.executable, "-m", "usbip_plugin")


async def command(
    *arguments: str, kubeconfig: str, prog: tuple[str, ...] = PLUGIN, scripts: Path | None = None
) -> tuple[int, str, str]:
    """Runs a command to its end. Returns its exit status, standard output and standard error.

    scripts: a directory of commands for the PATH.
    Kills it after PATIENCE_S: otherwise its transports are collected in a later test, with a warning there.
    """
    path = {"PATH": f"{scripts}:{os.environ['PATH']}"} if scripts is not None else {}
    process = await asyncio.create_subprocess_exec(
        *prog,
        *arguments,
        stdin=DEVNULL,
        stdout=PIPE,
        stderr=PIPE,
        env=os.environ | {"KUBECONFIG": kubeconfig} | path,
    )
    try:
        async with asyncio.timeout(PATIENCE_S):
            out, err = await process.communicate()
    finally:
        if process.returncode is None:
            process.kill()
            await process.communicate()
    return process.returncode or 0, out.decode(), err.decode()
