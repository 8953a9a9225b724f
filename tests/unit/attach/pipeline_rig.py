"""The pipeline of one node with a scripted client, driver and lock manager, in virtual time."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import random
import socket
from collections import defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field, replace
from typing import cast

from opentelemetry.trace import NoOpTracer

from tests.rigs.known_resources import KnownResources
from tests.rigs.tasks import virtual_with
from tests.rigs.vocabulary import KEY, ME, STICK, descriptor
from usbip_plugin.attach.cdi import CdiSpecs
from usbip_plugin.attach.claim_locks import ClaimLocks
from usbip_plugin.attach.events import DeviceEvent
from usbip_plugin.attach.pipeline import Pipeline, Progress
from usbip_plugin.attach.tasks import DeviceTasks
from usbip_plugin.claims import Claim, ClaimBook, ClaimState
from usbip_plugin.config.schema import IMPORT_WINDOW_S, ResourceConfig
from usbip_plugin.context import NodeContext
from usbip_plugin.locks.manager import Grant, LockManager
from usbip_plugin.locks.protocol import LockMeta, Rules
from usbip_plugin.locks.watch import LockChange
from usbip_plugin.model import (
    Attachment,
    Descriptor,
    DeviceKey,
    Endpoint,
    Hold,
    Identity,
    InterfaceRules,
    Lock,
    ServerKey,
    Tenure,
    UsbId,
)
from usbip_plugin.usbip.client import DeviceList, Imported
from usbip_plugin.usbip.connect import Source
from usbip_plugin.usbip.identify import DeviceIdentity
from usbip_plugin.usbip.poller import ServerFlaw
from usbip_plugin.vhci.driver import ASKED_CHILD_WAIT_S, DEFAULT_RULES, PortState
from usbip_plugin.vhci.sysfs import PortStatus
from usbip_sim.kernel.driver import SimulatedVhci
from usbip_sim.kernel.ports import SimulatedKernel
from usbip_sim.kubelet.specs import MemorySpecs
from usbip_sim.sockets import SocketTable
from usbip_sim.virtual.loop import SimClock

DEADLINE_S = 60.0
"""Default time in seconds until the deadline of an attach, longer than every import window."""

Act = Callable[[], Awaitable[None]]


class Script:
    """The steps that the pipeline has reached, in order, and acts to run at the next ones."""

    def __init__(self) -> None:
        self.steps: list[str] = []
        self._acts: defaultdict[str, list[Act]] = defaultdict(list)

    def at(self, step: str, *acts: Act) -> None:
        """Runs one act each of the next times that the pipeline reaches this step."""
        self._acts[step] += acts

    async def reach(self, step: str) -> None:
        self.steps.append(step)
        if self._acts[step]:
            await self._acts[step].pop(0)()

    def count(self, step: str) -> int:
        """Returns how often the pipeline has reached this step."""
        return self.steps.count(step)


class ScriptedLocks:
    """A lock manager that grants every lock unless the script raises. Steps: `acquire 1-1`, `renew 1-1` and so on.

    former: the holder before an acquire, for its Grant.
    identities: the identities written to locks, in order. metas: what each acquire was to write.
    """

    def __init__(self, clock: SimClock, script: Script) -> None:
        self.rules = Rules()
        self.locks: dict[str, Lock] = {}
        self.former: Lock | None = None
        self.tenures: dict[str, Tenure] = {}
        self.identities: list[tuple[DeviceKey, Identity]] = []
        self.metas: list[LockMeta] = []
        self._clock, self._script = clock, script
        self._subscribers: list[Callable[[LockChange], None]] = []

    def subscribe(self, callback: Callable[[LockChange], None]) -> Callable[[], None]:
        self._subscribers.append(callback)
        return lambda: self._subscribers.remove(callback)

    def hold(self, key: DeviceKey, holder: str = ME.node, boot_id: str = ME.boot_id) -> Lock:
        """Makes a node, this one by default, the holder of the lock."""
        before = self.locks.get(key.id)
        lock = Lock(key.id, holder, before.epoch + 1 if before is not None else 1, 40.0, "1", boot_id=boot_id)
        self.locks[key.id] = lock
        return lock

    def lose(self, key: DeviceKey, holder: str | None) -> None:
        """Makes the watch show another holder, "" after a release, or no Lease for None."""
        before = self.locks.pop(key.id)
        if holder is not None:
            self.locks[key.id] = replace(before, holder=holder)
        for callback in tuple(self._subscribers):
            callback(LockChange(key.id, before, self.locks.get(key.id)))

    async def acquire(
        self,
        key: DeviceKey,
        meta: LockMeta | None = None,
        *,
        claimed: bool = False,
        attached: bool = False,
        listed: bool = False,
    ) -> Grant:
        meta = meta or LockMeta()
        self.metas.append(meta)
        return replace(await self._written("acquire", key, meta.import_from), former=self.former)

    def tenure(self, device_id: str) -> Tenure | None:
        return self.tenures.get(device_id)

    async def renew(self, key: DeviceKey, meta: LockMeta | None = None) -> Grant:
        import_from = meta.import_from if meta is not None else None
        before = self.locks.get(key.id)
        return await self._written("renew", key, import_from or (before.import_from if before is not None else None))

    async def _written(self, verb: str, key: DeviceKey, import_from: Endpoint | None) -> Grant:
        sent_at = self._clock.monotonic()
        await self._script.reach(f"{verb} {key.busid}")
        lock = self.locks[key.id] = replace(self.hold(key), import_from=import_from)
        return Grant(lock, lock.epoch, sent_at + IMPORT_WINDOW_S)

    async def annotate(self, key: DeviceKey, *, identity: Identity) -> Lock:
        await self._script.reach(f"annotate {key.busid}")
        self.identities.append((key, identity))
        return self.locks[key.id]

    async def release(self, key: DeviceKey, *, left: bool = False) -> None:
        await self._script.reach(f"{'leave' if left else 'release'} {key.busid}")
        lock = self.locks.get(key.id)
        if lock is not None and lock.holder == ME.node:
            self.lose(key, "")


class ScriptedClient:
    """A USB/IP client whose every import succeeds unless the script raises. Steps: `import 1-1`, `probe 1-1`.

    usb_id, serial: of the device. limits: the timeout of each call in seconds, in order.
    last: the source ports that were to be bound again, in order. busy: whether none of them can be.
    named: for each import, the source port, and that of the lock when it began.
    """

    def __init__(self, script: Script, sockets: SocketTable, locks: ScriptedLocks) -> None:
        self.usb_id = STICK
        self.serial: str | None = "S1"
        self.limits: list[float] = []
        self.last: list[Endpoint | None] = []
        self.busy = False
        self.named: list[tuple[Endpoint, Endpoint | None]] = []
        self.open = 0
        self._script, self._sockets, self._locks = script, sockets, locks
        self._ports = itertools.count(40001)

    async def devlist(self, server: ServerKey, *, timeout: float) -> DeviceList:
        raise NotImplementedError

    async def bind(self, server: ServerKey, last: Endpoint | None = None, *, timeout: float) -> Source:
        self.last.append(last)
        self.open += 1
        again = None if self.busy else last
        return ScriptedSource(self, again or Endpoint("10.0.0.5", next(self._ports)))

    async def end_half_open(self, server: ServerKey, source: Endpoint, *, timeout: float) -> bool:
        raise NotImplementedError

    async def import_device(self, key: DeviceKey, *, source: Source | None = None, timeout: float) -> Imported:
        self.limits.append(timeout)
        assert source is not None
        self.named.append((source.endpoint, self._locks.locks[key.id].import_from))
        await self._script.reach(f"import {key.busid}")
        return Imported(key, descriptor(key.busid, self.usb_id), self._sockets.open())

    async def probe(self, imported: Imported, *, timeout: float) -> DeviceIdentity:
        self.limits.append(timeout)
        try:
            await self._script.reach(f"probe {imported.key.busid}")
            return DeviceIdentity(self.usb_id, self.serial, ())
        finally:
            imported.close()


class ScriptedSource:
    """A source port of a ScriptedClient."""

    def __init__(self, client: ScriptedClient, endpoint: Endpoint) -> None:
        self.endpoint = endpoint
        self._client: ScriptedClient | None = client

    async def connect(self) -> socket.socket:
        raise NotImplementedError

    def close(self) -> None:
        if self._client is not None:
            self._client.open -= 1
        self._client = None


class ScriptedVhci(SimulatedVhci):
    """A driver on a simulated kernel. Steps: `ports`, `attach 1-1`, `attached 1-1`, `enumerate 1-1`, `detach 0`.

    The step `attached 1-1` comes when the kernel has the device and attach() has not returned yet.
    """

    def __init__(self, kernel: SimulatedKernel, script: Script) -> None:
        super().__init__(kernel)
        self.limits: list[float] = []
        self._script = script

    async def ports(self) -> tuple[PortState, ...]:
        await self._script.reach("ports")
        return await super().ports()

    async def attach(self, key: DeviceKey, descriptor: Descriptor, fd: int, holds: tuple[Hold, ...] = ()) -> int:
        await self._script.reach(f"attach {key.busid}")
        port = await super().attach(key, descriptor, fd, holds)
        await self._script.reach(f"attached {key.busid}")
        return port

    async def enumerate(
        self,
        key: DeviceKey,
        descriptor: Descriptor,
        port: int,
        *,
        children: tuple[str, ...] | None = None,
        children_timeout: float = ASKED_CHILD_WAIT_S,
        serial: str | None = None,
        rules: InterfaceRules = DEFAULT_RULES,
        timeout: float,
    ) -> Attachment:
        self.rules = rules
        self.limits.append(timeout)
        await self._script.reach(f"enumerate {key.busid}")
        more = {"children": children, "children_timeout": children_timeout, "serial": serial, "rules": rules}
        return await super().enumerate(key, descriptor, port, timeout=timeout, **more)  # type: ignore[arg-type]

    async def detach(self, port: int, *, timeout: float) -> None:
        await self._script.reach(f"detach {port}")
        await super().detach(port, timeout=timeout)


class ScriptedTasks(DeviceTasks):
    """Tasks whose notes on locks are steps, such as `note port 0 of 1-1`.

    identities: those to be noted on locks. devids: those of the notes of ports.
    """

    def __init__(self, context: NodeContext, locks: LockManager, script: Script) -> None:
        super().__init__(context, ClaimBook(), locks)
        self.identities: list[tuple[DeviceKey, Identity]] = []
        self.devids: list[tuple[DeviceKey, int | None]] = []
        self._script = script

    def note_port(self, key: DeviceKey, port: int, usb_id: UsbId, devid: int | None = None) -> None:
        self.devids.append((key, devid))
        self._script.steps.append(f"note port {port} of {key.busid}")

    def note_identity(self, key: DeviceKey, identity: Identity) -> None:
        self.identities.append((key, identity))


@dataclass
class Rig:
    """The pipeline of node-a with its collaborators, and the events that it reported."""

    script: Script
    clock: SimClock
    locks: ScriptedLocks
    client: ScriptedClient
    kernel: SimulatedKernel
    driver: ScriptedVhci
    specs: MemorySpecs
    sockets: SocketTable
    pipeline: Pipeline
    claim_locks: ClaimLocks
    tasks: ScriptedTasks
    events: list[DeviceEvent]
    flaws: list[tuple[ServerKey, ServerFlaw]]
    resources: KnownResources
    progress: Progress = field(default_factory=lambda: Progress(""))

    async def attach(self, *, within: float = DEADLINE_S, **fields: object) -> Attachment:
        """Attaches the device KEY for an Allocate. fields: of its claim. within: seconds until the deadline."""
        claim = Claim(KEY, STICK, **{"resource": "stick", **fields})  # type: ignore[arg-type]
        return await self.pipeline.attach_new(claim, None, self.clock.monotonic() + within, self.progress)

    async def reattach(self) -> Attachment:
        return await self.pipeline.reattach(KEY.id, self.clock.monotonic() + DEADLINE_S)

    def lost(self, **fields: object) -> None:
        """Makes KEY a lost device with the locks of KEY and of its location. fields: of its claim."""
        fields = {"resource": "stick", "state": ClaimState.REATTACHING, **fields}
        claim = Claim(KEY, STICK, **fields)  # type: ignore[arg-type]
        self.book.put(claim)
        for key in {claim.key, claim.location}:
            self.locks.hold(key)

    @property
    def book(self) -> ClaimBook:
        return self.tasks.book

    @property
    def identities(self) -> list[tuple[DeviceKey, Identity]]:
        return self.tasks.identities

    @property
    def claim(self) -> Claim:
        return self.book[KEY.id]

    def free(self) -> bool:
        """Whether every port of the kernel is free and no port record is left."""
        return {port.status for port in self.kernel.ports()} == {PortStatus.NULL} and not any(
            self.kernel.records.values()
        )

    # acts

    def raises(self, error: Exception) -> Act:
        async def act() -> None:
            raise error

        return act

    def takes(self, seconds: float, then: Act | None = None) -> Act:
        async def act() -> None:
            await self.clock.sleep(seconds)
            if then is not None:
                await then()

        return act

    def loses(self, key: DeviceKey, holder: str | None) -> Act:
        async def act() -> None:
            self.locks.lose(key, holder)

        return act


@contextlib.asynccontextmanager
async def rig() -> AsyncIterator[Rig]:
    """Makes a rig, and checks at the end that only the kernel has references to connections."""
    script, clock, sockets = Script(), SimClock(asyncio.get_running_loop()), SocketTable()
    locks = ScriptedLocks(clock, script)
    client = ScriptedClient(script, sockets, locks)
    kernel = SimulatedKernel(clock, resolve=sockets.resolve)
    driver = ScriptedVhci(kernel, script)
    files = MemorySpecs("usbip.dev")
    resources = KnownResources(ResourceConfig("stick", (), cdi=True))
    specs = CdiSpecs(files, "usbip.dev", resources)
    context = NodeContext(ME, clock, random.Random(1), NoOpTracer())
    tasks = ScriptedTasks(context, cast("LockManager", locks), script)
    events: list[DeviceEvent] = []
    flaws: list[tuple[ServerKey, ServerFlaw]] = []
    pipeline = Pipeline(
        context,
        client=client,
        driver=driver,
        locks=cast("LockManager", locks),
        specs=specs,
        tasks=tasks,
        resources=resources,
        events=events.append,
        on_step=lambda _name, _seconds: None,
        on_flaw=lambda server, flaw: flaws.append((server, flaw)),
    )
    claim_locks = ClaimLocks(context, cast("LockManager", locks), tasks.book)
    yield Rig(
        script,
        clock,
        locks,
        client,
        kernel,
        driver,
        files,
        sockets,
        pipeline,
        claim_locks,
        tasks,
        events,
        flaws,
        resources,
    )
    taken = [port for port in kernel.ports() if port.status is not PortStatus.NULL]
    assert len(sockets) == len(taken), "a socket was not closed"
    assert client.open == 0, "a source port was not closed"


on_rig = virtual_with(rig)
