"""A scheduler and two controllers over a simulated cluster: what becomes of pods that want more devices than there are.

As kube-scheduler: a pending pod is placed where the Node's allocatable has room beside the pods placed there before,
and is looked at again when a Node or a pod has changed. A pod that its kubelet refuses has failed for good.
"""

from __future__ import annotations

import asyncio
import itertools
import random
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from tests.simulation.cluster_rig import Cluster, cluster, key, pod, server, spec, stick
from usbip_plugin.model import PodRef
from usbip_sim.kubelet.device_manager import ContainerSpec
from usbip_sim.virtual.steploop import stepped

LOOK_S = 0.01
"""Seconds from a change of a Node or a pod until the scheduler has seen it and decided."""
BATCH_S = 1.0
"""Seconds by which the job controller collects changes of pods before it makes the next ones (syncJobBatchPeriod)."""


@dataclass(frozen=True)
class Pace:
    """Seconds, from and to.

    bind: from a placement until kubelet and plugin see that the pod is bound to the node.
    admit: from then until the kubelet admits it.
    end: from a deletion until the kubelet lists the pod no more.
    forget: from then until the API server knows it no more, which scheduler and plugin see at the same moment.
    run: that a pod of a job takes.
    """

    bind: tuple[float, float] = (0.01, 0.05)
    admit: tuple[float, float] = (0.01, 0.05)
    end: tuple[float, float] = (0.05, 0.3)
    forget: tuple[float, float] = (0.1, 1.2)
    run: tuple[float, float] = (0.5, 1.5)


CALM = Pace()
BUSY = Pace(bind=(0.05, 0.2), admit=(0.05, 0.6), end=(0.3, 2.0), forget=(0.1, 3.0), run=(0.5, 4.0))


ROUNDS = 20
"""Contested handovers in one run of contested()."""


class Scheduler:
    """Places pods that want one device of a resource. failures: the pod, its node and the kubelet's message."""

    def __init__(self, cluster: Cluster, resource: str, seed: object, pace: Pace) -> None:
        self.cluster, self.resource, self.pace = cluster, resource, pace
        self.rng = random.Random(f"{seed}")
        self.cordoned: set[str] = set()
        self.pending: list[PodRef] = []
        self.placed: dict[PodRef, str] = {}
        self.running: dict[PodRef, str] = {}
        self.failures: list[tuple[PodRef, str, str]] = []
        self.changed: Callable[[], None] = lambda: None
        self._tasks: asyncio.TaskGroup | None = None
        self._numbers = itertools.count()

    async def during(self, story: Awaitable[None]) -> None:
        """Runs as long as the story."""
        async with asyncio.TaskGroup() as tasks:
            self._tasks = tasks
            placing = tasks.create_task(self._place())
            await story
            placing.cancel()

    def create(self) -> PodRef:
        made = pod(f"p{next(self._numbers)}")
        self.pending.append(made)
        return made

    async def end(self, one: PodRef, *, completed: bool = False) -> None:
        """The pod's container ends, its kubelet lists it no more, and at last the API server knows it no more.

        completed: it ends by itself, and the API server knows that. Otherwise it is deleted.
        """
        await asyncio.sleep(self.rng.uniform(*self.pace.end))
        node = self.cluster[self.running.pop(one)]
        node.known_pods.hold(synced=True)
        node.end(one)
        await asyncio.sleep(self.rng.uniform(*self.pace.forget))
        node.known_pods.resume()
        if completed:
            node.known_pods.over.add(one)
        node.end(one)
        del self.placed[one]
        self.changed()

    def room(self, node: str) -> int:
        said = self.cluster[node].object.allocatable.get(self.cluster.full(self.resource), 0)
        return said - sum(where == node for where in self.placed.values())

    async def _place(self) -> None:
        assert self._tasks is not None
        while True:
            for one in tuple(self.pending):
                fitting = [name for name in self.cluster.nodes if name not in self.cordoned and self.room(name) > 0]
                if fitting:
                    self.pending.remove(one)
                    self.placed[one] = self.rng.choice(fitting)
                    self._tasks.create_task(self._bind(one, self.placed[one]))
            await asyncio.sleep(LOOK_S)

    async def _bind(self, one: PodRef, node: str) -> None:
        at = self.cluster[node]
        await asyncio.sleep(self.rng.uniform(*self.pace.bind))
        at.known_pods.bound[one] = (ContainerSpec("app", {self.cluster.full(self.resource): 1}),)
        await asyncio.sleep(self.rng.uniform(*self.pace.admit))
        error = await at.admit(one, self.resource)
        del at.known_pods.bound[one]
        if error is None:
            self.running[one] = node
        else:
            self.failures.append((one, node, error))
            del self.placed[one]
        self.changed()


async def job(scheduler: Scheduler, completions: int, parallel: int) -> None:
    """As the job controller: so many pods run to their end, so many at a time; one that fails is replaced."""
    left, news = completions, asyncio.Event()
    scheduler.changed = news.set
    ending: set[PodRef] = set()

    async def run(one: PodRef) -> None:
        nonlocal left
        await asyncio.sleep(scheduler.rng.uniform(*scheduler.pace.run))
        await scheduler.end(one, completed=True)
        left -= 1
        ending.discard(one)
        news.set()

    async with asyncio.TaskGroup() as tasks:
        while left:
            for _ in range(min(left, parallel) - len(scheduler.pending) - len(scheduler.placed)):
                scheduler.create()
            await news.wait()
            news.clear()
            for one in scheduler.running.keys() - ending:
                ending.add(one)
                tasks.create_task(run(one))
            await asyncio.sleep(BATCH_S)


async def handovers(scheduler: Scheduler, rounds: int, *, cordon: bool = False) -> list[tuple[int, float]]:
    """As a ReplicaSet of two that want one device: the pod that has it is deleted, again and again.

    cordon: no pod is placed on its node until another runs.
    Returns the failed pods of each round, and the seconds from a pod's end until another runs.
    """
    found: list[tuple[int, float]] = []
    replicas, loop = 2, asyncio.get_running_loop()

    def replace() -> None:
        while len(scheduler.pending) + len(scheduler.placed) < replicas:
            scheduler.create()

    scheduler.changed = replace
    replace()
    await scheduler.cluster.settle(lambda: bool(scheduler.running), 60)
    for _ in range(rounds):
        await asyncio.sleep(scheduler.rng.uniform(3, 14))
        ((one, node),) = scheduler.running.items()
        scheduler.cordoned = {node} if cordon else set()
        before = len(scheduler.failures)
        replicas = 3  # the pod that ends is no replica any more
        replace()
        await scheduler.end(one)
        replicas, began = 2, loop.time()
        await scheduler.cluster.settle(lambda: bool(scheduler.running), 60)
        took = loop.time() - began
        await asyncio.sleep(2)
        found.append((len(scheduler.failures) - before, took))
    return found


async def scheduled(
    seed: int, pace: Pace, devices: int, play: Callable[[Scheduler], Awaitable[None]], nodes: int = 3
) -> Scheduler:
    """Plays on nodes that have all offered all devices for long."""
    lab = server("lab", *(stick(f"1-{n + 1}") for n in range(devices)))
    async with cluster(spec([lab], nodes=nodes, seed=seed)) as c:
        await c.all_healthy(*(key(lab, f"1-{n + 1}") for n in range(devices)))
        scheduler = Scheduler(c, "stick", seed, pace)
        await scheduler.during(play(scheduler))
        return scheduler


def contested(seed: int, pace: Pace, *, cordon: bool = False, nodes: int = 3) -> list[tuple[int, float]]:
    """What handovers() returns. cordon: the node that has the device may not have the next pod."""
    found: list[tuple[int, float]] = []

    @stepped
    async def story() -> None:
        async def play(scheduler: Scheduler) -> None:
            found.extend(await handovers(scheduler, ROUNDS, cordon=cordon))

        await scheduled(seed, pace, 1, play, nodes)

    story()
    return found
