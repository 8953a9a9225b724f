"""Random faults by seed: after every step the invariants hold, and after the faults everything converges.

A failing seed prints its timeline and is replayed by: pytest tests/simulation/test_random_faults.py --sim-seed N
"""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import replace

import pytest
from cluster_rig import LOCKS, health, key, pod, server, spec, stick

from usbip_plugin.claims import ALLOCATION_GRACE, State
from usbip_plugin.errors import KubeServerError, KubeThrottled
from usbip_plugin.locks.memory import FINE, Fate, Lost, Operation
from usbip_plugin.locks.memory import RESOURCE as LEASES
from usbip_plugin.model import DeviceKey, PodRef
from usbip_plugin.sim.cluster import Cluster, ClusterNode, cluster
from usbip_plugin.sim.server import VirtualServer
from usbip_plugin.sim.steploop import run

STEPS = 120
CONVERGE = 6 * LOCKS.duration
"""Virtual seconds after the last fault in which everything must be in order again."""
CLOCK_RATES = (1.0, 0.75, 1.3)
"""Slowest to fastest below a factor of two, which the safety argument needs."""


class Chaos:
    """One run: does one random thing after another, checks, and keeps a timeline."""

    def __init__(self, c: Cluster, servers: list[VirtualServer], devices: list[DeviceKey], rng: random.Random) -> None:
        self.cluster, self.servers, self.devices, self.rng = c, servers, devices, rng
        self.timeline: list[str] = []
        self.fired: Counter[str] = Counter()
        self.pods: dict[PodRef, ClusterNode] = {}
        self.down: set[str] = set()
        self.kubelets_down: set[str] = set()
        self.admissions: set[asyncio.Task[None]] = set()
        self.flaky = 0.0
        self._count = 0

    def note(self, what: str) -> None:
        self.fired[what.split(maxsplit=1)[0]] += 1
        self.timeline.append(f"{asyncio.get_running_loop().time():9.2f}  {what}")

    def fate(self, node: str, operation: Operation) -> Fate:
        if operation.verb == "event" or self.rng.random() >= self.flaky:
            return FINE
        kind = self.rng.randrange(6)
        self.fired[f"api-{kind}"] += 1
        del node
        return (
            Fate(refused=KubeServerError(operation.verb, LEASES, "500")),
            Fate(broken=KubeServerError(operation.verb, LEASES, "500 after the write")),
            Fate(refused=KubeThrottled(operation.verb, LEASES, 0.5)),
            Fate(lost=Lost.REQUEST),
            Fate(lost=Lost.RESPONSE),
            Fate(request=self.rng.uniform(0, 7)),
        )[kind]

    async def step(self) -> None:
        node = self.rng.choice(list(self.cluster.nodes.values()))
        actions: list[tuple[int, Callable[[ClusterNode], Awaitable[None]]]] = [
            (6, self.admit),
            (4, self.end),
            (1, self.crash),
            (2, self.start),
            (1, self.reboot),
            (1, self.partition),
            (2, self.heal),
            (1, self.drop),
            (1, self.server_stop),
            (2, self.server_start),
            (1, self.freeze),
            (1, self.replug),
            (1, self.kubelet),
            (1, self.api_trouble),
            (1, self.cut_watch),
        ]
        weights, choices = zip(*actions, strict=True)
        await self.rng.choices(choices, weights)[0](node)
        await asyncio.sleep(self.rng.choice((0.01, 0.2, 1.0, 5.0, 15.0)))
        self.check()

    async def admit(self, node: ClusterNode) -> None:
        if node.name in self.kubelets_down:
            return
        self._count += 1
        name = pod(f"p{self._count}")
        self.note(f"admit {name} on {node.name}")

        async def run() -> None:
            began = asyncio.get_running_loop().time()
            failure = await node.admit(name, "stick")
            took = asyncio.get_running_loop().time() - began
            # the kubelet admits one pod at a time, so some of this may be other pods' time; each is bounded
            assert took <= 60, f"admission of {name} took {took} s"
            if failure is None:
                self.pods[name] = node
            self.note(f"{'admitted' if failure is None else 'refused'} {name} {failure or ''}")

        task = asyncio.create_task(run())
        self.admissions.add(task)

    async def end(self, _node: ClusterNode) -> None:
        if self.pods:
            name = self.rng.choice(sorted(self.pods))
            node = self.pods.pop(name)
            self.note(f"end {name} on {node.name}")
            node.end(name)

    async def crash(self, node: ClusterNode) -> None:
        if node.agent is not None:
            self.note(f"crash {node.name}")
            await node.stop()
            self.down.add(node.name)

    async def start(self, _node: ClusterNode) -> None:
        if self.down:
            name = self.rng.choice(sorted(self.down))
            self.note(f"start {name}")
            self.down.discard(name)
            self.cluster[name].start()

    async def reboot(self, node: ClusterNode) -> None:
        self.note(f"reboot {node.name}")
        node.reboot()
        self.down.add(node.name)

    async def partition(self, node: ClusterNode) -> None:
        self.note(f"partition {node.name}")
        node.partition(cut=True)

    async def heal(self, node: ClusterNode) -> None:
        if node.partitioned:
            self.note(f"heal {node.name}")
            node.partition(cut=False)

    async def drop(self, _node: ClusterNode) -> None:
        device = self.rng.choice(self.devices)
        self.note(f"drop {device}")
        self.cluster.servers[device.server].drop(device.busid)

    async def server_stop(self, _node: ClusterNode) -> None:
        found = self.rng.choice(self.servers)
        if found.running and not found.frozen:
            self.note(f"stop {found.key}")
            await found.stop()

    async def server_start(self, _node: ClusterNode) -> None:
        for found in self.servers:
            if not found.running or found.frozen:
                self.note(f"restart {found.key}")
                found.thaw()
                await found.start()

    async def freeze(self, _node: ClusterNode) -> None:
        found = self.rng.choice(self.servers)
        if found.running:
            self.note(f"freeze {found.key}")
            found.freeze()

    async def replug(self, _node: ClusterNode) -> None:
        device = self.rng.choice(self.devices)
        self.note(f"replug {device}")
        found = self.cluster.servers[device.server]
        found.unplug(device.busid)
        found.plug(stick(device.busid))

    async def kubelet(self, node: ClusterNode) -> None:
        down = node.name not in self.kubelets_down
        self.note(f"kubelet {'down' if down else 'up'} {node.name}")
        (self.kubelets_down.add if down else self.kubelets_down.discard)(node.name)
        node.kubelet_restart(down=down)

    async def api_trouble(self, _node: ClusterNode) -> None:
        self.flaky = self.rng.choice((0.0, 0.0, 0.1, 0.4))
        self.note(f"flaky {self.flaky}")

    async def cut_watch(self, node: ClusterNode) -> None:
        self.note(f"cut {node.name}")
        if node.leases is not None:
            node.leases.cut()
        if self.rng.random() < 0.3:
            self.cluster.backend.compact()

    def check(self) -> None:
        """What must hold after every step."""
        for found in self.servers:
            assert not found.violations, f"two imports at once: {found.violations}"
        holders: dict[DeviceKey, list[str]] = {}
        for node in self.cluster.nodes.values():
            for device in node.attached():
                holders.setdefault(device, []).append(node.name)
            for device in node.held_in(State.ATTACHED):
                lock = node.agent.locks.locks.get(device.id) if node.agent is not None else None
                assert lock is not None, f"{node.name} attached {device} without a lock"
                assert lock.holder == node.name, f"{node.name} attached {device} under the lock of {lock.holder!r}"
        for device, names in holders.items():
            assert len(names) == 1, f"{device} is attached on {names}"
        for task in [task for task in self.admissions if task.done()]:
            self.admissions.discard(task)
            task.result()
        for node in self.cluster.nodes.values():
            if node.name not in self.down:
                node.alive()

    async def calm(self) -> None:
        """Every fault ends, every pod ends, every node comes back."""
        self.note("calm")
        self.flaky = 0.0
        for node in self.cluster.nodes.values():
            node.partition(cut=False)
            if node.name in self.kubelets_down:
                node.kubelet_restart(down=False)
        for found in self.servers:
            found.thaw()
            await found.start()
        for name in sorted(self.down):
            self.cluster[name].start()
        self.down.clear()
        await asyncio.sleep(ALLOCATION_GRACE)
        for task in self.admissions:
            await task
        for ending, node in sorted(self.pods.items()):
            node.end(ending)

    def converged(self) -> bool:
        ids = {device.id for device in self.devices}
        return (
            all(self.cluster.holder(device) == "" for device in self.devices)
            and all(not node.attached() for node in self.cluster.nodes.values())
            and all(found.importers(d.busid) == 0 for d in self.devices for found in [self.cluster.servers[d.server]])
            and all(
                {i for i, healthy in health(self.cluster, node).items() if healthy} == ids
                for node in self.cluster.nodes.values()
            )
        )


async def play(seed: int) -> Counter[str]:
    rng = random.Random(seed)
    servers = [server("lab", stick("1-1"), stick("1-2")), server("attic", stick("1-1"))]
    devices = [key(servers[0], "1-1"), key(servers[0], "1-2"), key(servers[1], "1-1")]
    made: list[Chaos] = []
    plan = replace(
        spec(servers, nodes=3, seed=seed),
        rates=rng.sample(CLOCK_RATES, 3),
        faults=lambda node, operation: made[0].fate(node, operation) if made else FINE,
    )
    async with cluster(plan) as c:
        chaos = Chaos(c, servers, devices, rng)
        made.append(chaos)
        try:
            for _ in range(STEPS):
                await chaos.step()
            await chaos.calm()
            assert await c.settle(chaos.converged, CONVERGE), [
                (node.name, health(c, node), sorted(map(str, node.attached())), node.partitioned)
                for node in c.nodes.values()
            ] + [(str(d), c.holder(d)) for d in devices]
            assert await c.settle(lambda: all(node.sockets == 0 for node in c.nodes.values()), 5), "sockets leaked"
        except BaseException:
            print(f"seed {seed}; replay: pytest {__file__.rpartition('/tests/')[2]} --sim-seed {seed}")
            print("\n".join(chaos.timeline))
            raise
        return chaos.fired


def test_invariants_hold_under_random_faults(sim_seed: int) -> None:
    fired = run(lambda: play(sim_seed))
    assert fired["admit"] > 0


def test_every_fault_is_really_played() -> None:
    """Coverage of the faults themselves, over the seeds that are always run."""
    fired: Counter[str] = Counter()
    for seed in range(1000, 1004):
        fired += run(lambda seed=seed: play(seed))  # type: ignore[misc]
    wanted = "admitted refused end crash start reboot partition heal drop stop restart freeze replug kubelet flaky cut"
    assert not [name for name in wanted.split() if not fired[name]], fired


@pytest.fixture(name="sim_seed")
def _sim_seed(request: pytest.FixtureRequest) -> int:
    return int(request.param)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "sim_seed" in metafunc.fixturenames:
        given = metafunc.config.getoption("--sim-seed")
        count = int(metafunc.config.getoption("--sim-seeds"))
        metafunc.parametrize("sim_seed", [int(given)] if given is not None else list(range(count)), indirect=True)
