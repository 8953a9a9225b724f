"""How long a device is not offered after failed Allocates, and what ends that early."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import pytest
from opentelemetry.trace import NoOpTracer

from tests.rigs.vocabulary import KEY, LAB, ME, descriptor
from tests.unit.inventory.snapshots import claim, held, lock, snapshot, view
from tests.unit.inventory.test_health import health_of
from usbip_plugin import errors
from usbip_plugin.claims import ClaimState
from usbip_plugin.context import NodeContext
from usbip_plugin.errors import AllocateTimeout, ImportRefused, PluginError, is_device_failure
from usbip_plugin.inventory.failures import (
    FIRST_PAUSE,
    MAX_DEVICES,
    MAX_PAUSE,
    MEMORY,
    AllocateFailures,
    FailureTracker,
    after_list,
    pause,
)
from usbip_plugin.locks.watch import LockChange
from usbip_plugin.model import DeviceKey, Reason
from usbip_plugin.usbip.client import refusal
from usbip_plugin.usbip.poller import ServerState
from usbip_sim.virtual.loop import SimClock
from usbip_sim.virtual.steploop import stepped

FAILED = AllocateFailures(KEY, 2, frozenset({"node-a"}))
LISTED = descriptor()


@pytest.mark.parametrize(
    ("failures", "seconds"),
    [
        (replace(FAILED, count=1), 0.0),
        (FAILED, 10.0),
        (replace(FAILED, count=3), 20.0),
        (replace(FAILED, count=4), 40.0),
        (replace(FAILED, count=7), MAX_PAUSE),
        (replace(FAILED, count=10**6), MAX_PAUSE),
        (replace(FAILED, seconds=9.0), 36.0),
        (replace(FAILED, seconds=600.0), MAX_PAUSE),
        (replace(FAILED, nodes=frozenset({"node-b", "node-c"})), 0.0),
        (replace(FAILED, nodes=frozenset({"node-b", "node-c", "node-d"})), 10.0),
    ],
)
def test_a_pause_doubles_and_needs_failures_here_or_on_three_nodes(failures: AllocateFailures, seconds: float) -> None:
    assert pause(failures, "node-a") == seconds


def test_only_a_change_after_the_device_was_listed_again_counts() -> None:
    renumbered = descriptor(devnum=LISTED.devnum + 1)
    resetting = after_list(replace(FAILED, entry=LISTED), None, in_hand=True)
    assert resetting == FAILED
    again = after_list(FAILED, renumbered, in_hand=False)
    assert again == replace(FAILED, entry=renumbered), "it got another number by the import itself"
    assert after_list(again, renumbered, in_hand=False) is again
    assert after_list(again, LISTED, in_hand=False) is None
    assert after_list(again, None, in_hand=False) is None
    assert after_list(FAILED, None, in_hand=False) == FAILED


def test_errors_of_server_and_device_count_and_others_do_not() -> None:
    counted = {errors.AttachRefused, errors.AttachStuck, errors.NodesMissing}
    for cls in vars(errors).values():
        if isinstance(cls, type) and issubclass(cls, PluginError) and cls is not AllocateTimeout:
            error = cls.__new__(cls)
            assert is_device_failure(error) == (cls in counted or issubclass(cls, errors.UsbipError)), cls
    assert is_device_failure(AllocateTimeout("importing", at_device=True))
    assert not is_device_failure(AllocateTimeout("locking"))


@pytest.mark.parametrize("status", range(1, 256))
def test_every_refusal_has_words_and_a_cure(status: int) -> None:
    error = refusal(KEY, status)
    assert isinstance(error, ImportRefused)
    said, _, cure = str(error).partition("; ")
    assert said.startswith(f"USB/IP server {LAB}: {KEY.busid} ")
    assert said.endswith(f" (status {status})")
    assert cure
    assert "BUSID" not in str(error)


def test_the_reason_names_the_cause_also_while_the_failed_allocate_is_undone() -> None:
    paused = {KEY.id: "2 in a row: it is in use by another client"}
    for now in (snapshot(paused=paused), snapshot(paused=paused, **claim(ClaimState.RELEASING))):
        health = health_of(now)
        assert health.reason is Reason.ALLOCATES_FAILED
        assert "another client" in health.detail
        assert not health.healthy
    assert health_of(snapshot(paused=paused, **held("node-b"))).reason is Reason.HELD_ELSEWHERE
    assert health_of(snapshot(paused=paused, servers={LAB: view()})).reason is Reason.NOT_LISTED
    assert health_of(snapshot(paused=paused, **claim(ClaimState.ATTACHED))).healthy


@dataclass
class Rig:
    """A tracker of node-a; `in_hand` says whether a node has the device."""

    ended: list[str] = field(default_factory=list)
    in_hand: bool = False

    def __post_init__(self) -> None:
        clock = SimClock(asyncio.get_running_loop())
        context = NodeContext(ME, clock, random.Random(1), NoOpTracer())
        self.tracker = FailureTracker(context, on_pause_end=self.ended.append)
        self.views = {LAB: view(LISTED)}

    def fail(self, times: int = 1) -> None:
        for _ in range(times):
            self.tracker.failed(KEY, ME.node, "busy", 0.0)

    def release(self, holder: str, failed_epoch: int | None) -> None:
        """Releases another node's lock, whose epoch is 3."""
        change = LockChange(KEY.id, lock(holder), lock("", failed_epoch=failed_epoch))
        self.tracker.lock_changed(change)

    def paused(self) -> str | None:
        return self.tracker.paused(self.views, lambda _id: self.in_hand).get(KEY.id)


@stepped
async def test_a_pause_ends_by_itself_and_the_next_one_is_longer() -> None:
    rig = Rig()
    running = asyncio.create_task(rig.tracker.run())
    rig.fail()
    assert rig.paused() is None, "one failure may be bad luck"
    rig.fail()
    assert rig.paused() == "2 in a row, offered again after 10 s: busy"
    await asyncio.sleep(FIRST_PAUSE - 0.1)
    assert rig.paused()
    assert not rig.ended
    await asyncio.sleep(0.2)
    assert rig.paused() is None
    assert rig.ended == [KEY.id]
    rig.fail()
    await asyncio.sleep(2 * FIRST_PAUSE - 0.1)
    assert rig.paused()
    running.cancel()


@stepped
async def test_a_success_here_or_elsewhere_ends_the_pause() -> None:
    endings: list[Callable[[Rig], None]] = [
        lambda rig: rig.tracker.succeeded(KEY.id),
        lambda rig: rig.release("node-b", None),
    ]
    for end in endings:
        rig = Rig()
        rig.fail(2)
        assert rig.paused()
        end(rig)
        assert rig.paused() is None
        rig.fail()
        assert rig.paused() is None, "the count begins anew"


@stepped
async def test_a_change_of_the_list_ends_the_pause() -> None:
    for changed in (view(), view(descriptor(devnum=99)), view(state=ServerState.UNREACHABLE)):
        rig = Rig()
        rig.fail(2)
        assert rig.paused()
        rig.views = {LAB: changed}
        assert rig.paused() is None


@stepped
async def test_what_is_listed_while_a_node_has_the_device_changes_nothing() -> None:
    rig = Rig()
    rig.fail(2)
    assert rig.paused()
    rig.in_hand, rig.views = True, {LAB: view()}
    assert rig.paused()
    rig.in_hand, rig.views = False, {LAB: view(LISTED)}
    assert rig.paused()


@stepped
async def test_failures_of_other_nodes_count_where_an_allocate_failed_as_well() -> None:
    rig = Rig()
    rig.release("node-b", 3)
    assert rig.paused() is None
    rig.release("node-b", 2)
    rig.fail()
    assert rig.paused() == "2 in a row, offered again after 10 s: busy"
    rig.release("node-b", 3)
    assert rig.paused() == "3 in a row, offered again after 20 s: busy"


@stepped
async def test_failures_on_three_other_nodes_pause_the_device_everywhere() -> None:
    rig = Rig()
    for name in ("node-b", "node-b", "node-c"):
        rig.release(name, 3)
    assert rig.paused() is None, "both may have a fault of their own"
    rig.release("node-d", 3)
    assert rig.paused() == "4 in a row, offered again after 40 s: failed on nodes node-b, node-c, node-d"


@stepped
async def test_failures_are_forgotten_after_a_time_and_bounded_in_number() -> None:
    rig = Rig()
    rig.fail(2)
    await asyncio.sleep(MEMORY + 1)
    assert rig.paused() is None
    rig.fail()
    assert rig.paused() is None
    for number in range(MAX_DEVICES):
        rig.tracker.failed(DeviceKey(LAB, f"2-{number}"), ME.node, "busy", 0.0)
    rig.fail()
    assert rig.paused() is None, "the oldest was forgotten"
    assert len(rig.tracker._failures) == MAX_DEVICES
