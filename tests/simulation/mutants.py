"""Each rule of the lock switched off in whole agents, with stories in which that shows, and the promise then broken."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from unittest.mock import patch

from tests.simulation.node_statuses import KNOWN, SAID
from tests.simulation.plan import Plan
from tests.simulation.play import Wrong
from tests.simulation.shapes import B, act, shape, wait
from usbip_plugin.attach.monitor import AttachmentMonitor
from usbip_plugin.attach.pipeline import Pipeline
from usbip_plugin.attach.release import Releaser
from usbip_plugin.claims import Claim, ClaimState
from usbip_plugin.errors import KubeUnreachable
from usbip_plugin.inventory import health
from usbip_plugin.kube.node_status import NodeStatusPublisher
from usbip_plugin.kubelet.device_plugin import DevicePluginServer
from usbip_plugin.kubelet.publish import KubeletPublisher
from usbip_plugin.locks import protocol, record
from usbip_plugin.locks.manager import Grant, LockSettings
from usbip_plugin.locks.protocol import Create, Decision, Denied, LockMeta, Observation, Replace, Rules, Write
from usbip_plugin.locks.record import Lease
from usbip_plugin.locks.watch import ApiState
from usbip_plugin.locks.writer import AcknowledgedWrite, WriteAttempts, Writer
from usbip_plugin.model import Attachment, Descriptor, DeviceKey
from usbip_plugin.usbip.poller import ServerPoller
from usbip_sim.leases import MemoryBackend

TWO_IMPORTS = "one import, by the nodes' account"
NOT_LOCKED = "a lock for each import"
SAME_EPOCH = "an epoch for each holder"
NOT_BACK = "a pod's device is attached again"
RELEASED = "a pod's device is not released"
ANOTHER = "a promised device is that one"
NOT_ATTACHED = "attached is true"
NOT_WORKING = "agents work"
OFFERED = "nothing is offered without the API server"

# R1


async def without_a_write(self: Pipeline, claim: Claim) -> Grant:
    """Instead of Pipeline._write_again."""
    lock = self._locks.locks[claim.id]
    return Grant(lock, lock.epoch, math.inf)


def for_ever(_sent_at: float, _window: float) -> float:
    return math.inf


# R2


def last_one_wins(self: MemoryBackend, lease: Lease) -> Lease:
    """Instead of MemoryBackend.replace: no compare-and-swap. The epoch rises nevertheless."""
    before = self.leases[lease.name]
    if lease.holder not in ("", before.holder):
        lease = replace(lease, transitions=before.transitions + 1)
    return replace_in_store(self, replace(lease, resource_version=before.resource_version))


replace_in_store = MemoryBackend.replace
create_in_store = MemoryBackend.create


def or_replace(self: MemoryBackend, lease: Lease) -> Lease:
    """Instead of MemoryBackend.create."""
    return last_one_wins(self, lease) if lease.name in self.leases else create_in_store(self, lease)


@contextlib.contextmanager
def without_compare_and_swap() -> Iterator[None]:
    with patch.object(MemoryBackend, "replace", last_one_wins), patch.object(MemoryBackend, "create", or_replace):
        yield


def whoever_holds_it(
    lease: Lease | None, key: DeviceKey, meta: LockMeta, write: Write, _seen: Observation | None, _listed: bool
) -> Decision:
    free = replace(lease, holder="") if lease is not None else None
    return protocol.decide_acquire(free, key, meta, write, None, False)


# R3


def any_boot_is_mine(
    lease: Lease | None, key: DeviceKey, meta: LockMeta, write: Write, seen: Observation | None, listed: bool
) -> Decision:
    if lease is not None and lease.holder == write.me.node:
        lease = replace(lease, annotations={**lease.annotations, record.BOOT_ID: write.me.boot_id})
    return protocol.decide_acquire(lease, key, meta, write, seen, listed)


def no_boot_but_this_is_mine(
    lease: Lease | None, key: DeviceKey, meta: LockMeta, write: Write, seen: Observation | None, listed: bool
) -> Decision:
    if lease is not None and lease.holder == write.me.node and not protocol.is_mine(lease, write.me):
        return Denied(lease)
    return protocol.decide_acquire(lease, key, meta, write, seen, listed)


# R4


def at_once(
    before: Observation | None, lock: Lease, session: Lease | None, asked: float, answered: float, duration: float
) -> Observation:
    return replace(protocol.observe(before, lock, session, asked, answered, duration), duration=0.0)


async def as_it_was_listed(self: ServerPoller, key: DeviceKey) -> bool:
    """Instead of ServerPoller.is_exported: not asked anew."""
    return any(device.busid == key.busid for device in self.views[key.server].devices)


# R5


async def release_first(self: Releaser, device_id: str) -> None:
    """Before Releaser.detach_and_release."""
    claim = self._book[device_id]
    if claim.state is ClaimState.RELEASING:
        await self._locks.release(claim.key)
    await finish(self, device_id)


finish = Releaser.detach_and_release


# R6


def amended_by_anybody(lease: Lease | None, write: Write, changes: Mapping[str, str | None]) -> Decision:
    if lease is None:
        return protocol.decide_amend(lease, write, changes)
    mine = {**lease.annotations, record.BOOT_ID: write.me.boot_id}
    decision = protocol.decide_amend(replace(lease, holder=write.me.node, annotations=mine), write, changes)
    assert isinstance(decision, Replace)
    notes = {**decision.lease.annotations, record.BOOT_ID: lease.annotations.get(record.BOOT_ID, "")}
    return Replace(replace(decision.lease, holder=lease.holder, annotations=notes))


@contextlib.contextmanager
def losing_nothing() -> Iterator[None]:
    """Neither the watch's word that a lock is lost counts, nor a look at it before a write and an import, and after."""

    async def write_again(self: Pipeline, claim: Claim) -> Grant:
        return await self._locks.renew(claim.key)

    with (
        patch.object(AttachmentMonitor, "_lock_changed", lambda _self, _change: None),
        patch.object(Pipeline, "_write_again", write_again),
        patch.object(Pipeline, "_check_still_ours", lambda _self, _key: None),
    ):
        yield


def whatever_became_of_it(_self: Pipeline, _claim: Claim) -> None:
    """Instead of Pipeline._check_still_ours: the watch's word counts, but not before the device is handed out."""


def whatever_became_of_the_place(self: Pipeline, claim: Claim) -> None:
    """Instead of Pipeline._check_still_ours."""
    check_still_ours(self, replace(claim, moved_to=None))


def whatever_became_of_its_own(self: Pipeline, claim: Claim) -> None:
    """Instead of Pipeline._check_still_ours."""
    check_still_ours(self, replace(claim, key=claim.location, moved_to=None))


check_still_ours = Pipeline._check_still_ours


# R7


async def detaching_without_api(self: AttachmentMonitor, *, run: Callable[..., object] = AttachmentMonitor.run) -> None:
    """Around AttachmentMonitor.run."""

    def changed(state: ApiState) -> None:
        for device_id in () if state.reachable else tuple(self._tasks.book.view):
            self._tasks.spawn(self._releaser.release_if(device_id, lambda _claim: True), "let go")

    unsubscribe = self._locks.subscribe_api(changed)
    try:
        await run(self)  # type: ignore[misc]
    finally:
        unsubscribe()


async def silence_is_a_yes(
    self: Writer, key: DeviceKey, decision: Create | Replace, write: Write, effort: WriteAttempts
) -> AcknowledgedWrite | None:
    """Around Writer._write."""
    try:
        return await write_lock(self, key, decision, write, effort)
    except KubeUnreachable:
        self._view.put(replace(decision.lease, resource_version="1000000"))
        return AcknowledgedWrite(decision.lease, self._clock.monotonic())


write_lock = Writer._write


# who it is


enumerate_and_compare = Pipeline._enumerate


async def any_serial_number_will_do(self: Pipeline, device_id: str, descriptor: Descriptor, port: int) -> Attachment:
    """Instead of Pipeline._enumerate."""
    self._book.put(replace(self._book[device_id], serial=None))
    return await enumerate_and_compare(self, device_id, descriptor, port)


# the Node


async def answered_at_once(_self: KubeletPublisher, _resource: str, _limit: float) -> None:
    """Instead of KubeletPublisher.flush."""


async def forgotten(self: KubeletPublisher, server: DevicePluginServer) -> None:
    """Instead of KubeletPublisher.detach: the kubelet is told, and the Node is not."""
    await server.wait_sent()
    assert self._node_status is not None
    self._node_status.forget(server.resource)
    del self._servers[server.resource]


@dataclass(frozen=True)
class Mutant:
    """plans: in one of them at least the promise is broken, and in none of them with the rule."""

    rule: str
    what: str
    promise: str
    plans: tuple[Plan, ...]
    rules: Rules = field(default_factory=Rules)
    patched: Callable[[], AbstractContextManager[object]] = contextlib.nullcontext

    @property
    def wrong(self) -> Wrong:
        return Wrong(rules=self.rules, patched=self.patched)

    def __str__(self) -> str:
        return f"{self.rule}-{self.what}"


CUT_OFF = shape(
    act(0, "admit"),
    act(4, "api_silent", lasts=120),
    act(4, "link_cut", lasts=80),
    act(60, "admit", B),
)
"""A hears nothing of anybody until B has its device, and then of the server first."""
AWAY = shape(act(0, "admit"), act(4, "isolate", lasts=70), act(60, "admit", B))
"""A comes back when B has its device."""
IN_FLIGHT = tuple(
    shape(
        act(0, "admit"),
        act(cut, "link_cut", lasts=30),
        act(cut, "api_silent", lasts=30),
        *(act(at, "admit", B) for at in (4.4, 4.8, 5.2, 5.6, 6.0, 6.4, 6.8, 7.2, 7.6)),
        locks=LockSettings(3.0, 1.4),
        latency=0.2,
    )
    for cut in (0.4, 0.5, 0.6)
)
"""What A asks of the server is under way for longer than its lock lasts."""
ROBBED = tuple(shape(act(0, "admit"), act(0.1, loss, lasts=70), wait(40)) for loss in ("lock_taken", "lock_released"))
"""A loses the lock while the device enumerates, which takes 0.3 s."""
ROBBED_ELSEWHERE = tuple(
    shape(act(0, "admit"), act(4, "replug_elsewhere", lasts=90), act(4.2, "lock_taken", lasts=60, pick=lock), wait(40))
    for lock in (0, 1)
)
"""A loses the lock of the device, or that of the place to which it is moved, while it enumerates there."""
RACE = shape(act(0, "watch_stall", lasts=60), act(0, "watch_stall", B, lasts=60), act(0, "race"))
"""Both want the device, and hear of each other by their writes only."""
REBOOT = shape(act(0, "admit"), act(4, "reboot", lasts=5), wait(80))
SLOWLY = shape(
    act(1, "link_slow", lasts=30, pick=10),
    act(1, "admit"),
    *(act(1 + at, "admit", B) for at in (0.2, 0.4, 0.6, 0.8, 1.0, 1.2, 1.4, 1.6, 1.8, 2.0, 2.2, 2.5)),
)
"""It takes A a while to import what it has locked, and B asks the server soon after A's write."""
STARVED = shape(
    act(0, "admit"),
    act(1, "link_slow", lasts=60, pick=10),
    act(1, "admit"),
    act(2, "api_silent", lasts=60),
    act(3.9, "freeze_agent", B, lasts=30),
    act(10, "link_slow", B, lasts=50, pick=10),
    *(act(at, "admit", B) for at in (34.2, 34.6, 35.0)),
    devices=((2, 0),),
)
"""A is silent, but has both devices; B has slept since before it had the second, and learns late that it has."""
END = shape(act(0, "admit"), act(4, "end"))
API_GONE = shape(act(0, "admit"), act(4, "api_refused", lasts=140), wait(180), devices=((2, 0),))
SWAPPED = shape(
    act(0, "swap_twin", lasts=40),
    act(0.1, "admit", pick=1),
    act(0.1, "admit", B, pick=1),
    act(45, "admit", pick=1),
    serials=True,
)
"""Another stick is there before any server has been asked what it lists."""
TAKEN_OUT = shape(*(act(at, "reload", lasts=5) for at in (0, 12, 25)), wait(30))
UNANSWERED = shape(act(0, "api_silent", lasts=30), act(0.1, "admit"))

MUTANTS = (
    Mutant(
        "R1",
        "attached again without a write",
        TWO_IMPORTS,
        (CUT_OFF,),
        patched=lambda: patch.object(Pipeline, "_write_again", without_a_write),
    ),
    Mutant("R1", "no window", NOT_LOCKED, IN_FLIGHT, Rules(import_deadline=for_ever)),
    Mutant(
        "R2",
        "no compare-and-swap",
        NOT_LOCKED,
        (RACE,),
        patched=without_compare_and_swap,
    ),
    Mutant("R2", "taken from whoever holds it", NOT_LOCKED, (RACE,), Rules(decide_acquire=whoever_holds_it)),
    Mutant("R3", "any boot is mine", SAME_EPOCH, (REBOOT,), Rules(decide_acquire=any_boot_is_mine)),
    Mutant("R3", "an earlier boot is not mine", NOT_BACK, (REBOOT,), Rules(decide_acquire=no_boot_but_this_is_mine)),
    Mutant("R4", "expired at once", TWO_IMPORTS, (SLOWLY,), Rules(observe=at_once)),
    Mutant(
        "R4",
        "an old list trusted",
        NOT_LOCKED,
        (STARVED,),
        patched=lambda: patch.object(ServerPoller, "is_exported", as_it_was_listed),
    ),
    Mutant(
        "R5",
        "released before it is detached",
        NOT_LOCKED,
        (END,),
        patched=lambda: patch.object(Releaser, "detach_and_release", release_first),
    ),
    Mutant(
        "R6", "a loss is nothing", TWO_IMPORTS, (AWAY,), Rules(decide_amend=amended_by_anybody), patched=losing_nothing
    ),
    Mutant(
        "R6",
        "a loss before the device is handed out is nothing",
        NOT_LOCKED,
        ROBBED,
        patched=lambda: patch.object(Pipeline, "_check_still_ours", whatever_became_of_it),
    ),
    Mutant(
        "R6",
        "the lock of the place may be lost",
        NOT_ATTACHED,
        ROBBED_ELSEWHERE,
        patched=lambda: patch.object(Pipeline, "_check_still_ours", whatever_became_of_the_place),
    ),
    Mutant(
        "R6",
        "the device's own lock may be lost",
        NOT_WORKING,
        ROBBED_ELSEWHERE,
        patched=lambda: patch.object(Pipeline, "_check_still_ours", whatever_became_of_its_own),
    ),
    Mutant(
        "R7",
        "detached without the API server",
        RELEASED,
        (API_GONE,),
        patched=lambda: patch.object(AttachmentMonitor, "run", detaching_without_api),
    ),
    Mutant(
        "R7",
        "offered without the API server",
        OFFERED,
        (API_GONE,),
        patched=lambda: patch.object(health, "API_GRACE", math.inf),
    ),
    Mutant(
        "R7",
        "silence is a yes",
        NOT_LOCKED,
        (UNANSWERED,),
        patched=lambda: patch.object(Writer, "_write", silence_is_a_yes),
    ),
)

OTHERS = (
    Mutant(
        "identity",
        "any serial number will do",
        ANOTHER,
        (SWAPPED,),
        patched=lambda: patch.object(Pipeline, "_enumerate", any_serial_number_will_do),
    ),
    Mutant(
        "Node status",
        "nothing is written",
        SAID,
        (END,),
        patched=lambda: patch.object(NodeStatusPublisher, "publish", lambda _self, _counts: None),
    ),
    Mutant(
        "Node status",
        "an Allocate fails before it is written",
        KNOWN,
        (RACE,),
        patched=lambda: patch.object(KubeletPublisher, "flush", answered_at_once),
    ),
    Mutant(
        "Node status",
        "a resource that was taken out is left as it was",
        SAID,
        (TAKEN_OUT,),
        patched=lambda: patch.object(KubeletPublisher, "detach", forgotten),
    ),
)
"""What is promised beyond the lock."""
