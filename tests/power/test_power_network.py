"""Cuts of the network between a node and the server. The API server stays reachable."""

from __future__ import annotations

import asyncio
import time

import pytest

from tests.power.devices import DISK, STICK
from tests.power.lab import Lab
from tests.power.usb_server import ServerKind

BACK_S = 10.0
"""Seconds from the end of a cut until the pod uses its device again."""
ENDED_S = 6.0
"""Seconds of a cut after which an exporter ends the connection; the node does so two seconds later."""


@pytest.mark.parametrize("seconds", [5, pytest.param(30, marks=pytest.mark.short), 300])
async def test_after_a_cut_the_pod_has_its_device_again(lab: Lab, kind: ServerKind, seconds: int) -> None:
    pod = await lab.use(lab.a, DISK)
    bystander = await lab.use(lab.b, STICK)
    losses = bystander.program.losses
    lab.bridge.cut("node-a", "server")
    await asyncio.sleep(seconds)
    lab.bridge.mend()
    mended = time.monotonic()
    back = await pod.rounds_after(mended)
    lab.note(f"{kind.value}: a cut of {seconds} s: in use again after", back)
    assert back <= BACK_S
    assert bool(pod.program.losses) == (seconds > ENDED_S)
    assert lab.holders_since(mended - seconds, DISK) == {"node-a"}, "no other node has taken it over"
    await bystander.rounds_after(mended)
    assert bystander.program.losses == losses == 0
    assert lab.server.now.nodes() == ["node-a", "node-b"]
