"""Nodes that lose their power or are frozen while they have a device."""

from __future__ import annotations

import asyncio
import time

import pytest

from tests.power.devices import DURATION_S, STICK
from tests.power.guests import EMULATED_S
from tests.power.lab import Lab
from tests.power.usb_server import ServerKind

TAKEOVER_S = DURATION_S + 10.0
"""Seconds from the end of a node until its device is offered elsewhere."""
BACK_S = 10.0
"""Seconds from the thaw of a node until its pod uses its device again."""
WATCHED_S = 2 * TAKEOVER_S
"""Seconds for which a device is watched that must not be taken over."""
NOTICED_S = 6.0
"""Seconds after which an exporter ends the connection of a silent node."""
STEADY_S = 10.0


@pytest.mark.short
async def test_a_node_without_power(lab: Lab, kind: ServerKind) -> None:
    await lab.use(lab.a, STICK)
    dead = await lab.a.cut_power()
    if kind is ServerKind.STOCK:
        # not promised: usbipd exports the device to the dead node for as long as it runs
        await lab.never_offered(lab.b, STICK, WATCHED_S)
        assert lab.server.now.nodes() == ["node-a"]
        return
    lab.note(f"{kind.value}: a node without power: free at the server after", await lab.server.until_free(STICK) - dead)
    took = lab.note(
        f"{kind.value}: a node without power: offered elsewhere after", await lab.until_offered(lab.b, STICK) - dead
    )
    assert took <= TAKEOVER_S + EMULATED_S
    began = time.monotonic()
    pod = await lab.use(lab.b, STICK)
    lab.note(f"{kind.value}: a node without power: the next pod uses the device after", time.monotonic() - began)
    assert lab.locks.holder(lab.server.key(STICK)) == "node-b"
    assert lab.server.now.nodes() == ["node-b"]
    assert not pod.program.losses


async def test_a_node_that_returns_frees_what_it_had(lab: Lab, kind: ServerKind) -> None:
    pod = await lab.use(lab.a, STICK)
    await lab.a.cut_power()
    await lab.end(pod)
    await lab.start_node(lab.a)
    began = time.monotonic()
    async with asyncio.TaskGroup() as tasks:
        for node in lab.nodes:
            tasks.create_task(lab.until_offered(node, STICK))
    lab.note(
        f"{kind.value}: a node that returns: its device is offered after the start of its plugin",
        time.monotonic() - began,
    )
    await lab.use(lab.a, STICK)
    assert lab.server.now.nodes() == ["node-a"]


@pytest.mark.parametrize("how", ["stopped", "paused"])
@pytest.mark.parametrize("seconds", [5, 15, 60])
async def test_a_node_that_thaws(lab: Lab, kind: ServerKind, how: str, seconds: int) -> None:
    """stopped: its clock jumps at the thaw. paused: its clock stood still."""
    pod = await lab.use(lab.a, STICK)
    frozen = lab.a.suspend() if how == "stopped" else await lab.a.freeze()
    takes_over = kind is ServerKind.EXPORTER and seconds > TAKEOVER_S
    heir = None
    if takes_over:
        took = await lab.until_offered(lab.b, STICK) - frozen
        lab.note(f"{kind.value}: a node {how} for {seconds} s: offered elsewhere after", took)
        assert took <= TAKEOVER_S + EMULATED_S
        heir = await lab.use(lab.b, STICK)
    await asyncio.sleep(max(0.0, frozen + seconds - time.monotonic()))
    thawed = lab.a.resume() if how == "stopped" else await lab.a.thaw()
    if heir is None:
        back = await pod.rounds_after(thawed)
        lab.note(f"{kind.value}: a node {how} for {seconds} s: in use again after", back)
        assert back <= BACK_S
        assert bool(pod.program.losses) == (kind is ServerKind.EXPORTER and seconds > NOTICED_S)
        assert lab.holders_since(frozen, STICK) == {"node-a"}
        assert lab.server.now.nodes() == ["node-a"]
    else:
        key = lab.server.key(STICK)
        await lab.a.until(lambda: lab.a.health_of(STICK, key) is False, "the frozen node has lost the device")
        await heir.rounds_after(time.monotonic() + STEADY_S)
        assert heir.program.losses == 0
        assert pod.program.began is None or pod.program.began < thawed
        assert lab.holders_since(thawed, STICK) == {"node-b"}
        assert lab.server.nodes_since(thawed) == {"node-b"}
