"""A stuck loop, without which devices are not attached or released, is noticed, and no outage makes one look so."""

import asyncio
from collections.abc import Callable
from unittest import mock

import pytest

from tests.simulation.cluster_rig import agent, key, offered, pod, stick
from usbip_plugin.node.agent import Agent
from usbip_plugin.observe.liveness import STUCK_S, Verdict, liveness
from usbip_sim.virtual.steploop import stepped

HOUR = 3600.0


def alive(running: Agent) -> Verdict:
    return liveness(running.loops(), running._clock.monotonic())


@stepped
async def test_no_outage_makes_a_loop_look_stuck() -> None:
    async with offered(stick("1-1"), stick("1-2"), nodes=2) as (c, lab, _devices):
        node = c["node-a"]
        assert await node.admit(pod("p"), "stick") is None
        faults: list[Callable[[], object]] = [
            lambda: node.partition(cut=True),
            lab.freeze,
            lambda: node.partition(cut=False),
            lab.thaw,
        ]
        for fault in faults:
            fault()
            for _ in range(4):
                await asyncio.sleep(HOUR / 4)
                assert alive(agent(node)) == Verdict(ok=True)
        loops = agent(node).loops()
        assert {name for name, loop in loops.items() if loop.turned_at is None} == {"list of locks", "list of pods"}


STUCK: dict[str, Callable[[Agent], tuple[object, str]]] = {
    "list of locks": lambda running: (running.locks._watcher, "_list"),
    "session": lambda running: (running.locks.session, "_write"),
    "pod-resources": lambda running: (running.usage, "users"),
    "vhci ports": lambda running: (running.driver, "ports"),
    "polls of lab:3240": lambda running: (running.poller._client, "devlist"),
}


@pytest.mark.parametrize("loop", STUCK)
@stepped
async def test_a_stuck_loop_is_not_alive(loop: str) -> None:
    async def never(*_: object, **__: object) -> None:
        await asyncio.Event().wait()

    async with offered(stick("1-1"), nodes=1) as (c, lab, (device,)):
        node = c["node-a"]
        assert lab.key == device.server
        assert key(lab, "1-1") == device
        assert await node.admit(pod("p"), "stick") is None
        running = agent(node)
        with mock.patch.object(*STUCK[loop](running), never):
            if loop == "list of locks":
                running.locks._watcher.relist()
            await asyncio.sleep(2 * STUCK_S)
            assert [line.partition(": no turn")[0] for line in alive(running).lines] == [loop]
