"""SIGKILL of the plugin at random moments of Allocate and release. --kills N of them; --kills-seed S repeats a run."""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections import Counter
from dataclasses import dataclass, field

import pytest
from agent_rig import DISKS, DOMAIN, NODE, SERIAL, busy_rows, nodes_of, until_lease
from kernel_rig import KernelRig
from test_kernel_agent_restart import Node, a_node

from usbip_plugin.model import PodRef
from usbip_plugin.sim.device_manager import AdmissionError

LONGEST_LIFE_S = 4.0
"""An admission takes about 1 s in the guest, and a release half of that: longer lives meet them all."""
LEAST_WORK = 2
REFUSED_S = 0.1
RESOURCES = (SERIAL, DISKS)


@dataclass(slots=True)
class Load:
    """Pods that come and go, one for each resource at a time, as fast as the kubelet admits them."""

    node: Node
    rng: random.Random
    running: dict[PodRef, str] = field(default_factory=dict)
    fates: Counter[str] = field(default_factory=Counter)
    _count: int = 0

    async def run(self) -> None:
        """Until cancelled, which may be in the middle of an admission."""
        while True:
            for name in self.rng.sample(RESOURCES, len(RESOURCES)):
                await self.step(name)

    async def step(self, name: str) -> None:
        holding = [pod for pod, resource in self.running.items() if resource == name]
        if holding and self.rng.random() < 0.6:
            pod = self.rng.choice(holding)
            del self.running[pod]
            self.node.kubelet.end(pod)
            self.fates["ended"] += 1
            await asyncio.sleep(self.rng.uniform(0, 0.5))
            return
        self._count += 1
        pod = PodRef("default", f"pod-{self._count}")
        try:
            got = await self.node.kubelet.admit(pod, {f"{DOMAIN}/{name}": 1})
        except AdmissionError:
            self.fates["refused"] += 1
            await asyncio.sleep(REFUSED_S)
            return
        self.running[pod] = name
        self.fates["admitted"] += 1
        for allocation in got.values():
            assert nodes_of(allocation)


def kept(node: Node, load: Load) -> None:
    """What must hold while no plugin runs: every device that is attached is locked, and by this node."""
    keys = (*node.twins, node.disk)
    held = [key for key in keys if (lease := node.backend.leases.get(key.id)) is not None and lease.holder == NODE]
    assert len(busy_rows()) <= len(held), (busy_rows(), held)
    checkpoint = {
        device_id
        for (pod, _, _), allocation in node.kubelet.manager.checkpoint.items()
        if pod in load.running
        for device_id in allocation.device_ids
    }
    assert checkpoint <= {key.id for key in held}, "a running pod's device is not locked"


async def test_a_plugin_killed_at_any_moment_loses_and_leaks_nothing(
    rig: KernelRig, request: pytest.FixtureRequest
) -> None:
    kills, seed = int(request.config.getoption("--kills")), int(request.config.getoption("--kills-seed"))
    rng = random.Random(seed)
    async with a_node(rig) as node:
        load = Load(node, rng)
        for _ in range(kills):
            async with node.plugin():
                task = asyncio.create_task(load.run())
                await asyncio.wait([task], timeout=rng.uniform(0, LONGEST_LIFE_S))
                if task.done():
                    task.result()
            # the plugin is dead; whoever was being admitted is refused by that
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError, AdmissionError):
                await task
            kept(node, load)
        async with node.plugin():
            for pod in list(load.running):
                node.kubelet.end(pod)
            for key in (*node.twins, node.disk):
                if key.id in node.backend.leases:
                    await until_lease(node.backend, key, lambda lease: lease is not None and lease.holder == "")
            assert busy_rows() == ()
    print(f"{kills} kills, seed {seed}: {dict(load.fates)}")
    assert load.fates["admitted"] >= min(kills, LEAST_WORK)
