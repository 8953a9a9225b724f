"""What the process as in its image asks of the kernel when nothing happens, counted by strace."""

from __future__ import annotations

import asyncio
import shutil
import signal
from pathlib import Path

import pytest
from api_process import Cluster
from node_tokens import NodeTokens
from test_apiserver_idle import offering, registered

from usbip_plugin.process import START_OVER_S

WINDOW_S = 30.0
MOST_A_MINUTE = 6000
"""Of all threads; it was 2,540. A loop that turns for nothing makes more within a second."""


async def test_an_idle_process_asks_little_of_the_kernel(cluster: Cluster, tokens: NodeTokens) -> None:
    strace = shutil.which("strace")
    if strace is None:
        pytest.skip("needs strace")
    async with offering(cluster, tokens) as pod, registered(pod) as child:
        await asyncio.sleep(START_OVER_S + 2)
        calls = await counted(strace, child.pid, pod.directory / "calls")
        assert child.poll() is None, "it runs on"
    per_minute = sum(calls.values()) * 60 / WINDOW_S
    most = sorted(calls, key=lambda name: -calls[name])[:5]
    print(f"{per_minute:.0f} system calls in a minute, most of them {', '.join(f'{n} {calls[n]}' for n in most)}")
    assert calls.keys() & {"epoll_wait", "epoll_pwait", "futex"}, "they are counted"
    assert per_minute < MOST_A_MINUTE


async def counted(strace: str, pid: int, file: Path) -> dict[str, int]:
    """The system calls of all threads of a process in the window, by name."""
    tracing = await asyncio.create_subprocess_exec(strace, "-q", "-f", "-c", "-o", str(file), "-p", str(pid))
    try:
        await asyncio.sleep(WINDOW_S)
    finally:
        tracing.send_signal(signal.SIGINT)  # it lets the process go and writes what it counted
        await tracing.wait()
    return calls_in(file)


def calls_in(file: Path) -> dict[str, int]:
    """% time, seconds, usecs/call, calls, errors unless there were none, name."""
    rows = (line.split() for line in file.read_text(encoding="ascii").splitlines())
    return {row[-1]: int(row[3]) for row in rows if len(row) >= 5 and row[3].isdigit() and row[-1] != "total"}
