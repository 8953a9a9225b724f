"""A plugin under load that is killed at random moments of Allocate and release, or runs for long.

--kills N sets how often, --kills-seed S repeats a run, --soak-seconds N sets how long it runs.
"""

from __future__ import annotations

import asyncio
import contextlib
import faulthandler
import random
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.kernel.kernel_rig import KernelRig
from tests.kernel.test_kernel_agent_restart import Node, a_node
from tests.rigs.agent_rig import DISKS, DOMAIN, NODE, SERIAL, busy_rows, nodes_of, until_lease
from usbip_plugin.model import PodRef
from usbip_sim.kubelet.device_manager import AdmissionError

LONGEST_LIFE = 4.0
"""Admissions until a kill, at most. A release takes half as long, so kills meet all moments of both."""
LEAST_WORK = 2
PROGRESS = 20
"""Kills between two lines of progress."""
REFUSED_S = 0.1
RESOURCES = (SERIAL, DISKS)
RECORDS = Path("/run/vhci_hcd")
WARM_UP_S = 20.0
MORE_FDS, MORE_THREADS, MORE_KIB = 2, 4, 3072
"""An open connection, threads of a pool, and memory that Python once needed are not a leak."""


@dataclass(slots=True)
class Load:
    """Pods that start and end as fast as the kubelet admits them, one for each resource at a time."""

    node: Node
    rng: random.Random
    running: dict[PodRef, str] = field(default_factory=dict)
    fates: Counter[str] = field(default_factory=Counter)
    over: bool = False
    _count: int = 0

    async def run(self) -> None:
        """Runs until over is set, or until it is cancelled, also during an admission."""
        while not self.over:
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
        await self.admit(name)

    async def admit(self, name: str) -> None:
        """Admits a new pod that requests one device of this resource."""
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


def check_locks(node: Node, load: Load) -> None:
    """Asserts, while no plugin runs, that this node has locked every attached device and those of running pods."""
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


@pytest.fixture
def unlimited() -> None:
    """Lifts run.sh's time limit of a single test: the time of these is an option."""
    faulthandler.cancel_dump_traceback_later()


@pytest.mark.usefixtures("unlimited")
async def test_a_plugin_killed_at_any_moment_loses_and_leaks_nothing(
    rig: KernelRig, request: pytest.FixtureRequest
) -> None:
    kills, seed = int(request.config.getoption("--kills")), int(request.config.getoption("--kills-seed"))
    rng = random.Random(seed)
    async with a_node(rig) as node:
        load = Load(node, rng)
        async with node.plugin():
            begin = time.monotonic()
            await load.admit(RESOURCES[0])
            longest = LONGEST_LIFE * (time.monotonic() - begin)
            assert load.fates["admitted"] == 1
        for number in range(1, kills + 1):
            async with node.plugin():
                task = asyncio.create_task(load.run())
                await asyncio.wait([task], timeout=rng.uniform(0, longest))
                if task.done():
                    task.result()
            # an admission at the moment of the kill is refused
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError, AdmissionError):
                await task
            check_locks(node, load)
            if number % PROGRESS == 0:
                print(f"{number} kills: {dict(load.fates)}", flush=True)
        async with node.plugin():
            await all_released(node, load)
            before = load.fates["admitted"]
            for name in RESOURCES:
                await load.admit(name)
            assert load.fates["admitted"] == before + len(RESOURCES), "a device is not allocated after the kills"
            await all_released(node, load)
    print(f"{kills} kills, seed {seed}: {dict(load.fates)}")


def usage_of(pid: int) -> dict[str, int]:
    """Returns the file descriptors, the threads and the anonymous memory (KiB) of a process."""
    proc = Path(f"/proc/{pid}")
    status = dict(line.split(":", 1) for line in (proc / "status").read_text().splitlines())
    return {
        "fds": len(list((proc / "fd").iterdir())),
        "threads": int(status["Threads"]),
        "KiB": int(status["RssAnon"].split()[0]),
    }


def records() -> list[str]:
    return sorted(path.name for path in RECORDS.glob("port*"))


async def all_released(node: Node, load: Load) -> None:
    """Ends all pods, and waits until their devices are released."""
    for pod in list(load.running):
        node.kubelet.end(pod)
    load.running.clear()
    for key in (*node.twins, node.disk):
        if key.id in node.backend.leases:
            await until_lease(node.backend, key, lambda lease: lease is not None and lease.holder == "")
    assert busy_rows() == ()
    assert records() == []


@pytest.mark.usefixtures("unlimited")
async def test_attaching_and_detaching_for_long_leaks_nothing(rig: KernelRig, request: pytest.FixtureRequest) -> None:
    seconds = float(request.config.getoption("--soak-seconds"))
    async with a_node(rig) as node, node.plugin() as pid:
        load = Load(node, random.Random(1))

        async def loaded(limit: float) -> None:
            task = asyncio.create_task(load.run())
            await asyncio.wait([task], timeout=limit)
            if task.done():
                task.result()
            load.over = True  # the current admission ends first
            await task
            load.over = False
            await all_released(node, load)

        await loaded(min(WARM_UP_S, seconds))
        before = usage_of(pid)
        await loaded(seconds)
        after = usage_of(pid)
        print(f"{seconds:g} s: {dict(load.fates)}, before {before}, after {after}")
        assert load.fates["admitted"] >= LEAST_WORK
        assert after["fds"] <= before["fds"] + MORE_FDS
        assert after["threads"] <= before["threads"] + MORE_THREADS
        assert after["KiB"] <= before["KiB"] + MORE_KIB
