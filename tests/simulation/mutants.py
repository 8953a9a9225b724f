"""Mutants of whole agents, the plans that find each of them, and the promise that it breaks."""

from __future__ import annotations

import asyncio
import contextlib
import math
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace
from typing import Any

from tests.model.lock_mutants import (
    amended_by_anybody,
    any_boot_is_mine,
    for_ever,
    never_detached,
    whoever_holds_it,
)
from tests.simulation.invariants import BY_SERVER, SOURCE_KEPT, TURN
from tests.simulation.node_statuses import KNOWN, SAID
from tests.simulation.plan import Plan
from tests.simulation.play import Wrong, patched
from tests.simulation.shapes import B, act, shape, wait
from usbip_plugin.attach import pipeline, reattach
from usbip_plugin.attach.claim_locks import ClaimLocks
from usbip_plugin.attach.half_open import HalfOpenConnections
from usbip_plugin.attach.monitor import AttachmentMonitor
from usbip_plugin.attach.pipeline import Pipeline
from usbip_plugin.attach.release import Releaser
from usbip_plugin.claims import Claim, ClaimState
from usbip_plugin.errors import KubeUnreachable
from usbip_plugin.exporter import fence
from usbip_plugin.inventory import health, turns
from usbip_plugin.inventory.failures import FailureTracker
from usbip_plugin.kube.node_status import NodeStatusPublisher
from usbip_plugin.kubelet.device_plugin import DevicePluginServer
from usbip_plugin.kubelet.publish import KubeletPublisher
from usbip_plugin.locks import protocol, record
from usbip_plugin.locks.manager import Grant, LockSettings
from usbip_plugin.locks.protocol import Create, Decision, Denied, LockMeta, Observation, Replace, Rules, Write
from usbip_plugin.locks.record import Lease
from usbip_plugin.locks.watch import ApiState, LockCache
from usbip_plugin.locks.writer import AcknowledgedWrite, WriteAttempts, Writer
from usbip_plugin.model import Attachment, Descriptor, DeviceKey, Endpoint, ServerKey
from usbip_plugin.usbip.client import TcpUsbipClient
from usbip_plugin.usbip.connect import Source
from usbip_plugin.usbip.poller import ExportState, ServerPoller
from usbip_sim.leases import MemoryBackend

TWO_IMPORTS = "one import, by the nodes' account"
NOT_LOCKED = "a lock for each import"
SAME_EPOCH = "an epoch for each holder"
NOT_BACK = "a pod's device is attached again"
RELEASED = "a pod's device is not released"
ANOTHER = "a promised device is that one"
NOT_ATTACHED = "attached is true"
NOT_WORKING = "agents work"
PAUSED = "a device that fails Allocates is paused"
SELECTED = "a pod's device is one that it selected"
OFFERED = "nothing is offered without the API server"
LEFT = "nothing is left"

# Replacements are named after what they do wrong. These are the replaced functions that some of them call.
check_still_ours = ClaimLocks.check_still_ours
create = MemoryBackend.create
detach_and_release = Releaser.detach_and_release
bind = TcpUsbipClient.bind
enumerate_and_compare = Pipeline._enumerate
replace_lease = MemoryBackend.replace
run_monitor = AttachmentMonitor.run
show_lease = LockCache._show
write_lock = Writer._write


# R1


async def without_a_write(self: ClaimLocks, claim: Claim, _import_from: Endpoint | None, **_options: bool) -> Grant:
    lock = self._locks.locks[claim.id]
    return Grant(lock, lock.epoch, math.inf)


# R2


def last_one_wins(self: MemoryBackend, lease: Lease) -> Lease:
    """Replaces a lease without compare-and-swap. The epoch rises nevertheless."""
    before = self.leases[lease.name]
    if lease.holder not in ("", before.holder):
        lease = replace(lease, transitions=before.transitions + 1)
    return replace_lease(self, replace(lease, resource_version=before.resource_version))


def create_or_replace(self: MemoryBackend, lease: Lease) -> Lease:
    return last_one_wins(self, lease) if lease.name in self.leases else create(self, lease)


# R3


def no_boot_but_this_is_mine(
    lease: Lease | None, key: DeviceKey, meta: LockMeta, write: Write, seen: Observation | None, listed: bool
) -> Decision:
    if lease is not None and lease.holder == write.me.node and not protocol.is_mine(lease, write.me):
        return Denied(lease)
    return protocol.decide_acquire(lease, key, meta, write, seen, listed)


# R4


def at_once(*seen: Any) -> Observation:
    return replace(protocol.observe(*seen), duration=0.0)


async def as_it_was_listed(self: ServerPoller, key: DeviceKey) -> ExportState:
    listed = any(device.busid == key.busid for device in self.views[key.server].devices)
    return ExportState.FREE if listed else ExportState.UNLISTED


# R5


async def release_first(self: Releaser, device_id: str, **options: bool) -> None:
    claim = self._book[device_id]
    if claim.state is ClaimState.RELEASING:
        await self._locks.release(claim.key)
    await detach_and_release(self, device_id, **options)


# R6


async def renew_only(self: ClaimLocks, claim: Claim, import_from: Endpoint | None, **_options: bool) -> Grant:
    return await self._locks.renew(claim.key, LockMeta(import_from=import_from))


def ignore(*_arguments: object) -> None:
    """Replaces a check or a reaction by nothing."""


def ignore_the_place(self: ClaimLocks, claim: Claim) -> None:
    check_still_ours(self, replace(claim, moved_to=None))


def ignore_its_own(self: ClaimLocks, claim: Claim) -> None:
    check_still_ours(self, replace(claim, key=claim.location, moved_to=None))


@contextlib.asynccontextmanager
async def goes_on(_self: ClaimLocks, _claim: Claim) -> AsyncIterator[None]:
    yield


# R7


async def detaching_without_api(self: AttachmentMonitor) -> None:
    def changed(state: ApiState) -> None:
        for device_id in () if state.reachable else tuple(self._tasks.book.view):
            self._tasks.spawn(self._releaser.release_if(device_id, lambda _claim: True), "let go")

    unsubscribe = self._locks.subscribe_api(changed)
    try:
        await run_monitor(self)
    finally:
        unsubscribe()


async def silence_is_a_yes(
    self: Writer, key: DeviceKey, decision: Create | Replace, write: Write, effort: WriteAttempts
) -> AcknowledgedWrite | None:
    try:
        return await write_lock(self, key, decision, write, effort)
    except KubeUnreachable:
        with self._view.call(key.id) as call:
            self._view.answered(call, replace(decision.lease, resource_version="1000000"))
        return AcknowledgedWrite(decision.lease, self._clock.monotonic())


# beyond the lock


def only_if_later(self: LockCache, device_id: str, lease: Lease | None) -> Lease | None:
    """Takes the order of versions for that of changes."""
    shown = self._shown.get(device_id)
    if lease is not None and shown is not None and int(lease.resource_version) < int(shown.resource_version):
        return shown
    return show_lease(self, device_id, lease)


async def any_serial_number_will_do(
    self: Pipeline, device_id: str, descriptor: Descriptor, port: int, timeout: float
) -> Attachment:
    self._book.put(replace(self._book[device_id], serial=None))
    return await enumerate_and_compare(self, device_id, descriptor, port, timeout)


def no_pauses(*_arguments: object) -> dict[str, str]:
    return {}


def never_another(*_arguments: object) -> None:
    """Refuses each USB ID that a claim does not have yet."""


def any_usb_id_will_do(claim: Claim, _resource: object, descriptor: Descriptor) -> Claim:
    return replace(claim, usb_id=descriptor.usb_id, serial=None)


async def from_another_port(
    self: TcpUsbipClient, server: ServerKey, last: Endpoint | None = None, *, timeout: float
) -> Source:
    del last
    return await bind(self, server, timeout=timeout)


async def never_ended(_self: HalfOpenConnections) -> None:
    await asyncio.Event().wait()


def without_its_source(lease: Lease | None, write: Write, evident: bool) -> Decision:
    decision = protocol.decide_release(lease, write, evident)
    if not isinstance(decision, Replace):
        return decision
    notes = record.merged_annotations(decision.lease.annotations, {record.IMPORT_FROM: None})
    return Replace(replace(decision.lease, annotations=notes))


async def answered_at_once(*_arguments: object) -> None:
    """Replaces a wait by nothing."""


async def forgotten(self: KubeletPublisher, server: DevicePluginServer) -> None:
    """Publishes the end of a resource to the kubelet, but not to the Node."""
    await server.wait_sent()
    assert self._node_status is not None
    self._node_status.forget(server.resource)
    del self._servers[server.resource]


@dataclass(frozen=True)
class Mutant:
    """An error of the plugin.

    plans: at least one of them breaks the promise with the error, and none of them without it.
    """

    rule: str
    what: str
    promise: str
    plans: tuple[Plan, ...]
    wrong: Wrong

    def __str__(self) -> str:
        return f"{self.rule}-{self.what}"


CUT_OFF = shape(
    act(0, "admit"),
    act(4, "api_silent", lasts=120),
    act(4, "link_cut", lasts=80),
    act(60, "admit", B),
)
"""A is cut off from API server and USB/IP server until B has its device, and reaches the server first again."""
AWAY = shape(act(0, "admit"), act(4, "isolate", lasts=70), act(60, "admit", B))
"""A is isolated until B has its device."""
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
"""A's request to the server is under way for longer than its lock lasts."""
ROBBED = tuple(shape(act(0, "admit"), act(0.1, loss, lasts=70), wait(40)) for loss in ("lock_taken", "lock_released"))
"""A loses the lock while the device enumerates, which takes 0.3 s."""
HALF_OPEN = shape(act(0, "admit"), act(4, "link_cut", lasts=30), wait(60), keepalive=(False,), exclusive=True)
"""The network between A and a server without keepalive is away for half a minute."""
LEFT_HALF_OPEN = shape(
    act(0, "admit"), act(4, "link_cut", lasts=30), act(20, "end"), wait(40), keepalive=(False,), exclusive=True
)
"""The same, and the pod of A ends meanwhile."""
ROBBED_FOR_LONG = shape(
    act(0, "stuck_port"), act(0, "admit"), act(1, "lock_taken", lasts=70), wait(60), allocate_timeout=60.0
)
"""A loses the lock while the device does not enumerate, and its Allocate may take 60 s."""
ROBBED_ELSEWHERE = tuple(
    shape(act(0, "admit"), act(4, "replug_elsewhere", lasts=90), act(4.2, "lock_taken", lasts=60, pick=lock), wait(40))
    for lock in (0, 1)
)
"""A loses the lock of the device, or of the place to which it is moved, while the device enumerates there."""
TAKEN = shape(act(0, "admit"), act(4, "lock_taken", lasts=120), wait(100))
"""A loses the lock of a device in use to a node that keeps it."""
RACE = shape(act(0, "watch_stall", lasts=60), act(0, "watch_stall", B, lasts=60), act(0, "race"))
"""Both nodes acquire the device, and get no watch events of each other."""
REBOOT = shape(act(0, "admit"), act(4, "reboot", lasts=5), wait(80))
SLOWLY = shape(
    act(1, "link_slow", lasts=30, pick=10),
    act(1, "admit"),
    *(act(1 + at, "admit", B) for at in (0.2, 0.4, 0.6, 0.8, 1.0, 1.2, 1.4, 1.6, 1.8, 2.0, 2.2, 2.5)),
)
"""A imports slowly, and B asks the server soon after A's write."""
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
"""A is silent and has both devices. B was frozen when A took the second one, and gets its lock late."""
END = shape(act(0, "admit"), act(4, "end"))
API_GONE = shape(act(0, "admit"), act(4, "api_refused", lasts=140), wait(180), devices=((2, 0),))
SWAPPED = shape(
    act(0, "swap_twin", lasts=40),
    act(0.1, "admit", pick=1),
    act(0.1, "admit", B, pick=1),
    act(45, "admit", pick=1),
    serials=True,
)
"""The device is replaced by another stick before any server is polled."""
FLASHED_IN_USE = shape(act(0, "admit"), act(4, "change_usb_id", lasts=90), wait(100))
"""The stick of A's pod gets another USB ID that its resource selects as well."""
REPLACED = shape(act(0, "admit"), act(4, "swap", lasts=90), wait(100))
"""The stick of A's pod is replaced by a dongle."""
TAKEN_OUT = shape(*(act(at, "reload", lasts=5) for at in (0, 12, 25)), wait(30))
REFUSED = shape(act(0, "refused_import", lasts=60), *(act(1 + 2 * n, "race") for n in range(12)), wait(60))
"""The server lists a device and refuses each import, for a minute in which pods come one after the other."""
MUTE = shape(act(0, "mute_device", lasts=200), *(act(1 + 12 * n, "race") for n in range(16)), wait(200))
RESTORED = tuple(
    shape(act(0, "admit"), act(4, "end"), act(10, "restore", lasts=20, pick=bumped), act(14, "admit"), wait(90))
    for bumped in (1, 0)
)
"""A takes the device between a backup and the restore."""
FROZEN_IMPORTS = tuple(
    shape(
        act(0, "freeze_agent", lasts=9, steps=steps),
        act(0, "admit"),
        *(act(at, "admit", B) for at in (4.4, 5.2, 6.0, 6.8, 7.6)),
        wait(30),
        locks=LockSettings(3.0, 1.4),
        latency=0.3,
        allocate_timeout=30.0,
        exporters=(True,),
    )
    for steps in range(10, 40, 4)
)
"""A is frozen between its lock write and its import until B has the device, whose server is an exporter."""
WITHOUT_R1 = Wrong(Rules(import_deadline=for_ever))
UNANSWERED = shape(act(0, "api_silent", lasts=30), act(0.1, "admit"))

MUTANTS = (
    Mutant(
        "R1",
        "attached again without a write",
        TWO_IMPORTS,
        (CUT_OFF,),
        patched(ClaimLocks, "write_again", without_a_write),
    ),
    Mutant("R1", "no window", NOT_LOCKED, IN_FLIGHT, Wrong(Rules(import_deadline=for_ever))),
    Mutant(
        "R2",
        "no compare-and-swap",
        NOT_LOCKED,
        (RACE,),
        patched(MemoryBackend, "replace", last_one_wins, (MemoryBackend, "create", create_or_replace)),
    ),
    Mutant("R2", "taken from whoever holds it", NOT_LOCKED, (RACE,), Wrong(Rules(decide_acquire=whoever_holds_it))),
    Mutant("R3", "any boot is mine", SAME_EPOCH, (REBOOT,), Wrong(Rules(decide_acquire=any_boot_is_mine))),
    Mutant(
        "R3", "an earlier boot is not mine", NOT_BACK, (REBOOT,), Wrong(Rules(decide_acquire=no_boot_but_this_is_mine))
    ),
    Mutant("R4", "expired at once", TWO_IMPORTS, (SLOWLY,), Wrong(Rules(observe=at_once))),
    Mutant(
        "R4", "an old list trusted", NOT_LOCKED, (STARVED,), patched(ServerPoller, "export_state", as_it_was_listed)
    ),
    Mutant(
        "R5",
        "released before it is detached",
        NOT_LOCKED,
        (END,),
        patched(Releaser, "detach_and_release", release_first),
    ),
    Mutant(
        "R6",
        "a loss is ignored",
        TWO_IMPORTS,
        (AWAY,),
        Wrong(
            Rules(decide_amend=amended_by_anybody),
            patches=(
                (AttachmentMonitor, "_lock_changed", ignore),
                (ClaimLocks, "write_again", renew_only),
                (ClaimLocks, "check_still_ours", ignore),
                (ClaimLocks, "while_ours", goes_on),
            ),
        ),
    ),
    Mutant(
        "R6",
        "a device of another holder stays attached",
        NOT_LOCKED,
        (TAKEN,),
        Wrong(Rules(decide_loss=never_detached)),
    ),
    Mutant(
        "R6",
        "a loss before the device is handed out is ignored",
        NOT_LOCKED,
        ROBBED,
        patched(ClaimLocks, "check_still_ours", ignore, (ClaimLocks, "while_ours", goes_on)),
    ),
    Mutant(
        "R6",
        "an enumeration goes on without its lock",
        NOT_LOCKED,
        (ROBBED_FOR_LONG,),
        patched(ClaimLocks, "while_ours", goes_on),
    ),
    Mutant(
        "R6",
        "the lock of the place may be lost",
        NOT_ATTACHED,
        ROBBED_ELSEWHERE,
        patched(ClaimLocks, "check_still_ours", ignore_the_place, (ClaimLocks, "while_ours", goes_on)),
    ),
    Mutant(
        "R6",
        "the device's own lock may be lost",
        NOT_WORKING,
        ROBBED_ELSEWHERE,
        patched(ClaimLocks, "check_still_ours", ignore_its_own, (ClaimLocks, "while_ours", goes_on)),
    ),
    Mutant(
        "R7",
        "detached without the API server",
        RELEASED,
        (API_GONE,),
        patched(AttachmentMonitor, "run", detaching_without_api),
    ),
    Mutant("R7", "offered without the API server", OFFERED, (API_GONE,), patched(health, "API_GRACE", math.inf)),
    Mutant("R7", "silence is a yes", NOT_LOCKED, (UNANSWERED,), patched(Writer, "_write", silence_is_a_yes)),
)

OTHERS = (
    Mutant(
        "half-open",
        "a re-attach comes from another port",
        SOURCE_KEPT,
        (HALF_OPEN,),
        patched(TcpUsbipClient, "bind", from_another_port),
    ),
    Mutant(
        "half-open",
        "a release forgets the port",
        SOURCE_KEPT,
        (LEFT_HALF_OPEN,),
        Wrong(Rules(decide_release=without_its_source)),
    ),
    Mutant(
        "half-open",
        "what nobody uses stays half-open",
        LEFT,
        (LEFT_HALF_OPEN,),
        patched(HalfOpenConnections, "run", never_ended),
    ),
    Mutant(
        "restore",
        "versions are compared by order",
        NOT_LOCKED,
        RESTORED,
        patched(LockCache, "_show", only_if_later),
    ),
    Mutant(
        "identity",
        "any serial number will do",
        ANOTHER,
        (SWAPPED,),
        patched(Pipeline, "_enumerate", any_serial_number_will_do),
    ),
    Mutant(
        "fence",
        "the endpoint is not compared",
        BY_SERVER,
        FROZEN_IMPORTS,
        replace(WITHOUT_R1, patches=((fence, "decide_import", ignore),)),
    ),
    Mutant(
        "turns",
        "the next turn never comes",
        TURN,
        (END,),
        patched(turns, "delay", lambda _place: 1e9),
    ),
    Mutant(
        "health",
        "never learns from Allocates",
        PAUSED,
        (REFUSED, MUTE),
        patched(FailureTracker, "paused", no_pauses),
    ),
    Mutant(
        "USB ID",
        "never another one",
        NOT_BACK,
        (FLASHED_IN_USE,),
        patched(pipeline, "with_usb_id", never_another, (reattach, "with_usb_id", never_another)),
    ),
    Mutant("USB ID", "any will do", SELECTED, (REPLACED,), patched(pipeline, "with_usb_id", any_usb_id_will_do)),
    Mutant("Node status", "nothing is written", SAID, (END,), patched(NodeStatusPublisher, "publish", ignore)),
    Mutant(
        "Node status",
        "an Allocate fails before it is written",
        KNOWN,
        (RACE,),
        patched(KubeletPublisher, "flush", answered_at_once),
    ),
    Mutant(
        "Node status",
        "a removed resource is left as it was",
        SAID,
        (TAKEN_OUT,),
        patched(KubeletPublisher, "detach", forgotten),
    ),
)
"""Mutants that break a promise beyond those of the lock."""
