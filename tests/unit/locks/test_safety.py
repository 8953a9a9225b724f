"""Lock managers of nodes that crash, lose the network and run at different rates: no two import one device at once."""

from __future__ import annotations

import asyncio
import contextlib
import random
from dataclasses import dataclass, replace

import pytest
from opentelemetry.trace import NoOpTracer

from tests.rigs.vocabulary import KEY
from usbip_plugin.errors import KubeUnreachable, LockError
from usbip_plugin.locks import protocol
from usbip_plugin.locks.manager import LockManager, LockSettings
from usbip_plugin.locks.protocol import Observation, Rules
from usbip_plugin.locks.record import Lease
from usbip_plugin.model import NodeIdentity
from usbip_sim.leases import FINE, Fate, Lost, MemoryBackend, MemoryLeases, Operation
from usbip_sim.virtual.loop import SimClock, run

SETTINGS = LockSettings(duration=40.0, import_window=19.0)
LIFE_S = 3600.0
RATES = (1.0, 1.3, 1.95)
"""Rates of the clocks: less than a factor of two apart, as the safety argument requires."""


@dataclass
class Device:
    """A device on its server. overlaps: imports that began during the import of another node."""

    attached: str | None = None
    importing: str | None = None
    imports: int = 0
    overlaps: int = 0
    takeovers: int = 0


class Machine:
    """A node that acquires and imports the device again and again."""

    def __init__(self, name: str, rate: float, backend: MemoryBackend, device: Device, seed: int, rules: Rules) -> None:
        self.name, self.backend, self.device, self.rules = name, backend, device, rules
        self.rng = random.Random(f"{seed}{name}")
        self.clock = SimClock(asyncio.get_running_loop(), rate)
        self.boots = 0
        self.cut_off = False
        self.manager: LockManager | None = None

    def fate(self, operation: Operation) -> Fate:
        if self.cut_off:
            return Fate(refused=KubeUnreachable(operation.verb, "leases", "partition"))
        if operation.verb in ("watch", "event") or self.rng.random() < 0.8:
            return Fate(response=self.rng.expovariate(20))
        delays = Fate(request=self.rng.uniform(0, 30)), Fate(response=self.rng.uniform(0, 4.9))
        return self.rng.choice([FINE, Fate(lost=Lost.REQUEST), Fate(lost=Lost.RESPONSE), *delays])

    async def live(self) -> None:
        while True:
            self.boots += 1
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self.rng.expovariate(1 / 600)), asyncio.TaskGroup() as group:
                    await self.boot(group)
            # after a crash, its sockets are gone at once, but the server frees an attached device later
            if self.device.importing == self.name:
                self.device.importing = None
            await asyncio.sleep(self.rng.uniform(0, 120))
            if self.device.attached == self.name:
                self.device.attached = None

    async def boot(self, group: asyncio.TaskGroup) -> None:
        self.cut_off = False
        store = MemoryLeases(self.backend, self.clock, self.name, self.fate)
        identity = NodeIdentity(self.name, f"boot-{self.boots // 2}")
        self.manager = LockManager(store, identity, self.clock, self.rng, SETTINGS, NoOpTracer(), self.rules)
        group.create_task(self.manager.run())
        group.create_task(self.poll(self.manager))
        group.create_task(self.partition(store))
        while True:
            await self.clock.sleep(self.rng.uniform(0, 20))
            await self.use(self.manager)

    async def partition(self, store: MemoryLeases) -> None:
        """Cuts the node off at random times, for longer or shorter than the duration of a lock."""
        while True:
            await asyncio.sleep(self.rng.expovariate(1 / 150))
            self.cut_off = True
            store.cut()
            await asyncio.sleep(self.rng.uniform(1, 150))
            self.cut_off = False

    async def poll(self, manager: LockManager) -> None:
        while True:
            free = self.device.attached is None
            manager.expiry.set_importable(frozenset({KEY.id}) if free else frozenset())
            await self.clock.sleep(2)

    async def use(self, manager: LockManager) -> None:
        before = self.backend.leases.get(KEY.id)
        try:
            async with self.clock.timeout(15):
                grant = await manager.acquire(KEY)
        except (LockError, TimeoutError):
            return
        if before is not None and before.holder not in ("", self.name):
            self.device.takeovers += 1
        await self.import_(grant.import_deadline)
        await self.clock.sleep(self.rng.expovariate(1 / 60))
        if self.device.attached == self.name:
            self.device.attached = None
        for _ in range(3):
            with contextlib.suppress(LockError):
                await manager.release(KEY)
                return

    async def import_(self, deadline: float) -> None:
        """Imports as slowly as the window permits."""
        await self.clock.sleep(max(0.0, (deadline - self.clock.monotonic()) * self.rng.uniform(0, 0.9)))
        if not protocol.may_import(deadline, self.clock.monotonic()) or self.device.attached is not None:
            return
        self.device.imports += 1
        if self.device.importing is not None:
            self.device.overlaps += 1
        self.device.importing = self.name
        await self.clock.sleep(max(0.0, deadline - self.clock.monotonic() - 0.001))
        if self.device.importing == self.name:
            self.device.importing = None
            self.device.attached = self.device.attached or self.name


def simulate(seed: int, rules: Rules | None = None) -> Device:
    async def main() -> Device:
        backend, device = MemoryBackend(), Device()
        machines = [Machine(f"n{i}", rate, backend, device, seed, rules or Rules()) for i, rate in enumerate(RATES)]
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(LIFE_S), asyncio.TaskGroup() as group:
                for machine in machines:
                    group.create_task(machine.live())
        return device

    return run(main)


@pytest.mark.parametrize("seed", range(4))
def test_no_two_nodes_import_the_device_at_once(seed: int) -> None:
    device = simulate(seed)
    assert device.imports > 5
    assert device.takeovers > 0
    assert device.overlaps == 0


def impatient(
    previous: Observation | None, lock: Lease, session: Lease | None, asked: float, answered: float, duration: float
) -> Observation:
    return replace(protocol.observe(previous, lock, session, asked, answered, duration), duration=duration / 8)


def generous(sent_at: float, window: float) -> float:
    return sent_at + 4 * window


@pytest.mark.parametrize("rules", [Rules(observe=impatient), Rules(import_deadline=generous)], ids=["R4", "R1"])
def test_a_broken_rule_is_caught(rules: Rules) -> None:
    assert any(simulate(seed, rules).overlaps for seed in range(8))
