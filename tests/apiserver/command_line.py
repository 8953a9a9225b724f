"""The plugin's command line as a process."""

from __future__ import annotations

import asyncio
import os
import sys
import sysconfig
from asyncio.subprocess import DEVNULL, PIPE
from pathlib import Path

PATIENCE_S = 30.0
SCRIPTS = Path(sysconfig.get_path("scripts"))
PLUGIN = (sys.executable, "-m", "usbip_plugin")


async def command(*arguments: str, kubeconfig: str, prog: tuple[str, ...] = PLUGIN) -> tuple[int, str, str]:
    """Runs a command to its end. Returns its exit status, standard output and standard error.

    Kills it after PATIENCE_S: otherwise its transports are collected in a later test, with a warning there.
    """
    process = await asyncio.create_subprocess_exec(
        *prog,
        *arguments,
        stdin=DEVNULL,
        stdout=PIPE,
        stderr=PIPE,
        env=os.environ | {"KUBECONFIG": kubeconfig, "PATH": f"{SCRIPTS}:{os.environ['PATH']}"},
    )
    try:
        async with asyncio.timeout(PATIENCE_S):
            out, err = await process.communicate()
    finally:
        if process.returncode is None:
            process.kill()
            await process.communicate()
    return process.returncode or 0, out.decode(), err.decode()
