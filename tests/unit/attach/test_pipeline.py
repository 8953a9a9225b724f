"""The pipeline between lock and container: what must hold when a lock, a server or the kernel fails it at any await."""

from __future__ import annotations

import errno
from dataclasses import replace

import pytest

from tests.unit.attach.attaching_rig import DONGLE, KEY, ME, OTHER, STICK, Rig, described, rig
from usbip_plugin.attach.events import taken_over
from usbip_plugin.attach.pipeline import DETACH_TIMEOUT, ENUMERATE_TIMEOUT, PROBE_TIMEOUT
from usbip_plugin.claims import ClaimEvent, ClaimState
from usbip_plugin.config.schema import DEFAULT_CHILDREN_TIMEOUT_S
from usbip_plugin.errors import (
    AttachRefused,
    AttachStuck,
    CdiError,
    DetachFailed,
    DeviceBusy,
    DeviceUnknown,
    KubeForbidden,
    LockError,
    LockHeld,
    LockLost,
    LockUnavailable,
    NodesMissing,
    PluginError,
    ServerTimeout,
    WrongDevice,
    WrongSerial,
)
from usbip_plugin.locks.manager import IMPORT_WINDOW_S
from usbip_plugin.model import Identity
from usbip_plugin.vhci.driver import PortState
from usbip_plugin.vhci.sysfs import PortStatus
from usbip_sim.virtual.loop import virtual

ACQUIRED, RENEWED = "acquire 1-1", "renew 1-1"
IMPORT, ATTACH, ENUMERATE = "import 1-1", "attach 1-1", "enumerate 1-1"
DEVID = described(KEY).devid

losses = pytest.mark.parametrize("holder", ["node-b", "", None], ids=["taken over", "released by hand", "deleted"])
"""Ways in which a lock stops naming this node: another holder, no holder, no Lease."""


# the lock


@virtual
async def test_a_device_that_another_node_holds_is_not_touched_and_leaves_no_claim() -> None:
    with rig() as r:
        r.script.at(ACQUIRED, r.raises(LockHeld(str(KEY), "node-b")))
        with pytest.raises(LockHeld, match="held by node node-b"):
            await r.attach()
        assert r.script.steps == [ACQUIRED]
        assert r.book.get(KEY.id) is None


@virtual
async def test_a_lock_that_could_not_be_written_leaves_a_claim_for_which_the_kernel_is_not_asked() -> None:
    with rig() as r:
        r.script.at(ACQUIRED, r.raises(LockUnavailable(str(KEY), "no answer")))
        with pytest.raises(LockUnavailable):
            await r.attach()
        assert r.claim.state is ClaimState.LOCKING
        await r.pipeline.detach(KEY.id)
        assert r.script.steps == [ACQUIRED], "nothing was attached, and a missing driver must not delay the release"


@virtual
async def test_who_lost_the_device_to_a_takeover_is_reported_before_the_device_is_touched() -> None:
    with rig() as r:
        former = r.locks.former = r.locks.hold(KEY, "node-b")

        async def reported() -> None:
            assert r.events == [taken_over(KEY, former, "node-a")]

        r.script.at(IMPORT, reported)
        await r.attach()
        assert r.events == [taken_over(KEY, former, "node-a")]


@virtual
async def test_a_lock_that_was_free_is_no_takeover() -> None:
    with rig() as r:
        await r.attach()
        assert r.events == []


# any await


@pytest.mark.parametrize(
    ("step", "doing", "port"),
    [
        (ACQUIRED, "locking the device (API server)", None),
        (IMPORT, "importing 1-1 from USB/IP server lab:3240", None),
        (ATTACH, "attaching lab:3240/1-1 to vhci_hcd", None),
        ("attached 1-1", "attaching lab:3240/1-1 to vhci_hcd", None),
        (ENUMERATE, "waiting for lab:3240/1-1 to enumerate on vhci port 0, with hidraw, tty nodes", 0),
    ],
)
@virtual
async def test_an_attach_that_is_cut_off_says_what_it_waited_for_and_a_detach_leaves_no_port(
    step: str, doing: str, port: int | None
) -> None:
    with rig() as r:
        r.script.at(step, r.takes(100))
        with pytest.raises(TimeoutError):
            async with r.clock.timeout(5):
                await r.attach(children=("hidraw", "tty"))
        assert r.progress.doing == doing
        assert r.claim.port == port
        await r.pipeline.detach(KEY.id)
        assert r.free()
        assert r.claim.port is None


@pytest.mark.parametrize(
    ("step", "error", "state"),
    [
        (IMPORT, DeviceUnknown(KEY), ClaimState.IMPORTING),
        (IMPORT, ServerTimeout(KEY.server, "IMPORT 1-1", 3), ClaimState.IMPORTING),
        (ATTACH, AttachRefused("no"), ClaimState.ATTACHING),
        (ENUMERATE, DetachFailed("port 0 was not free"), ClaimState.ATTACHING),
    ],
)
@virtual
async def test_a_failure_that_a_second_try_does_not_mend_is_not_tried_again(
    step: str, error: PluginError, state: ClaimState
) -> None:
    with rig() as r:
        r.script.at(step, r.raises(error))
        with pytest.raises(type(error)):
            await r.attach()
        assert r.script.count(step) == 1
        assert r.claim.state is state
        await r.pipeline.detach(KEY.id)
        assert r.free()


# R6: the lock is lost meanwhile


@losses
@virtual
async def test_a_lock_lost_while_its_device_is_imported_keeps_the_device_from_the_kernel(holder: str | None) -> None:
    with rig() as r:
        r.script.at(IMPORT, r.loses(KEY, holder))
        with pytest.raises(LockLost) as lost:
            await r.attach()
        assert lost.value.holder == (holder or "")
        assert ATTACH not in r.script.steps
        assert r.claim.state is ClaimState.IMPORTING


@pytest.mark.parametrize("step", [ATTACH, ENUMERATE])
@losses
@virtual
async def test_a_lock_lost_after_the_kernel_has_the_device_keeps_it_from_the_container(
    holder: str | None, step: str
) -> None:
    with rig() as r:
        r.kernel.serials[KEY] = "S1"
        r.script.at(step, r.loses(KEY, holder))
        with pytest.raises(LockLost) as lost:
            await r.attach(container_indexes=(0,))
        assert lost.value.holder == (holder or "")
        assert r.claim.state is ClaimState.ATTACHING
        assert not r.specs.texts
        await r.pipeline.detach(KEY.id)
        assert r.free()


@pytest.mark.parametrize("step", ["import 1-2", "enumerate 1-2"])
@losses
@virtual
async def test_the_own_lock_of_a_device_that_is_attached_from_elsewhere_may_not_be_lost_either(
    holder: str | None, step: str
) -> None:
    with rig() as r:
        r.lost(moved_to=OTHER)
        r.script.at(step, r.loses(KEY, holder))
        with pytest.raises(LockLost) as lost:
            await r.reattach()
        assert (lost.value.device, lost.value.holder) == (str(KEY), holder or "")
        assert r.claim.state is ClaimState.REATTACHING


@pytest.mark.parametrize("step", ["import 1-2", "enumerate 1-2"])
@losses
@virtual
async def test_a_lost_lock_of_the_place_ends_the_attach_from_there_and_leaves_the_claim(
    holder: str | None, step: str
) -> None:
    with rig() as r:
        r.lost(moved_to=OTHER)
        r.script.at(step, r.loses(OTHER, holder))
        with pytest.raises(LockError) as lost:
            await r.reattach()
        if holder:
            assert isinstance(lost.value, LockHeld)
            assert (lost.value.device, lost.value.holder) == (str(OTHER), holder)
        else:
            assert isinstance(lost.value, LockUnavailable)
            assert str(lost.value) == f"cannot lock {OTHER}: the lock was released during the attach; try again"
        assert r.claim.state is ClaimState.REATTACHING
        assert ("attach 1-2" in r.script.steps) == (step == "enumerate 1-2")


# R1: the import window


@virtual
async def test_an_import_is_not_begun_when_the_answer_to_the_lock_write_came_after_the_window() -> None:
    with rig() as r:
        r.script.at(ACQUIRED, r.takes(IMPORT_WINDOW_S))
        with pytest.raises(LockUnavailable, match="in time after the lock was written"):
            await r.attach()
        assert IMPORT not in r.script.steps


@virtual
async def test_what_was_imported_after_the_window_is_closed_and_never_reaches_the_kernel() -> None:
    """As after a SIGSTOP: the limit given to the client has passed, and the client answers all the same."""
    with rig() as r:
        r.script.at(IMPORT, r.takes(IMPORT_WINDOW_S))
        with pytest.raises(LockUnavailable, match="in time after the lock was written"):
            await r.attach()
        assert ATTACH not in r.script.steps


@pytest.mark.parametrize(("within", "limit"), [(60.0, 8.0), (5.0, 3.0)], ids=["window", "deadline"])
@virtual
async def test_an_import_may_take_what_is_left_of_window_and_deadline(within: float, limit: float) -> None:
    with rig() as r:
        r.script.at(ACQUIRED, r.takes(2))
        await r.attach(within=within)
        assert r.client.limits == [limit]


@virtual
async def test_a_busy_device_is_asked_again_within_the_window() -> None:
    with rig() as r:
        busy = r.raises(DeviceBusy(KEY))
        r.script.at(IMPORT, busy, busy, busy)
        await r.attach()
        assert r.script.count(IMPORT) == 4
        assert sorted(r.client.limits, reverse=True) == r.client.limits, "the waits count"


@virtual
async def test_a_busy_device_is_not_asked_again_after_the_window() -> None:
    with rig() as r:
        r.script.at(IMPORT, r.takes(IMPORT_WINDOW_S - 0.05, r.raises(DeviceBusy(KEY))))
        with pytest.raises(LockUnavailable, match="in time after the lock was written"):
            await r.attach()
        assert r.script.count(IMPORT) == 1


@virtual
async def test_the_window_of_the_own_lock_counts_also_where_the_device_is_imported_from_elsewhere() -> None:
    with rig() as r:
        r.lost(moved_to=OTHER)
        r.script.at(RENEWED, r.takes(6))
        await r.reattach()
        assert r.client.limits == [IMPORT_WINDOW_S - 6]


@virtual
async def test_nothing_is_imported_from_elsewhere_after_the_window_of_the_own_lock() -> None:
    with rig() as r:
        r.lost(moved_to=OTHER)
        r.script.at("acquire 1-2", r.takes(IMPORT_WINDOW_S))
        r.script.at(RENEWED, r.takes(IMPORT_WINDOW_S / 2))
        with pytest.raises(LockUnavailable, match="in time after the lock was written"):
            await r.reattach()
        assert "import 1-2" not in r.script.steps


# the second try


@virtual
async def test_the_second_try_after_a_stuck_attach_has_a_lock_write_and_a_window_of_its_own() -> None:
    with rig() as r:
        r.kernel.stuck_next()
        attachment = await r.attach()
        one = [IMPORT, ATTACH, ENUMERATE]
        assert [step for step in r.script.steps if step in (ACQUIRED, RENEWED, *one)] == [
            *(ACQUIRED, *one),
            *(RENEWED, *one),
        ]
        assert r.client.limits == [IMPORT_WINDOW_S, IMPORT_WINDOW_S]
        assert (r.claim.state, r.claim.port) == (ClaimState.ATTACHED, attachment.port)


@virtual
async def test_a_lock_lost_by_the_second_try_is_not_imported_under() -> None:
    with rig() as r:
        r.kernel.stuck_next()
        r.script.at(RENEWED, r.raises(LockLost(str(KEY), "node-b")))
        with pytest.raises(LockLost):
            await r.attach()
        assert r.script.count(IMPORT) == 1
        assert r.free()


@virtual
async def test_a_device_that_sticks_twice_is_given_up_with_its_port_free() -> None:
    with rig() as r:
        r.kernel.stuck_next(5)
        with pytest.raises(AttachStuck):
            await r.attach()
        assert r.script.count(ATTACH) == 2
        assert (r.claim.state, r.claim.port) == (ClaimState.IMPORTING, None)
        assert r.free()


# the wrong device


@virtual
async def test_a_device_that_is_imported_as_another_kind_never_reaches_the_kernel() -> None:
    with rig() as r:
        r.client.usb_id = DONGLE
        with pytest.raises(WrongDevice) as wrong:
            await r.attach()
        assert (wrong.value.expected, wrong.value.found) == (STICK, DONGLE)
        assert ATTACH not in r.script.steps
        assert r.claim.state is ClaimState.IMPORTING


@virtual
async def test_a_device_that_enumerates_as_another_kind_is_not_handed_out() -> None:
    with rig() as r:
        r.kernel.impostor_next(DONGLE)
        with pytest.raises(WrongDevice):
            await r.attach()
        assert r.claim.state is ClaimState.ATTACHING
        await r.pipeline.detach(KEY.id)
        assert r.free()


@pytest.mark.parametrize("noted", [True, False])
@virtual
async def test_a_wrong_serial_number_is_written_to_the_lock_before_the_attach_fails(noted: bool) -> None:
    """noted: whether the write succeeds; the attach fails with the same error."""
    with rig() as r:
        r.kernel.serials[KEY] = "S2"
        if not noted:
            r.script.at("annotate 1-1", r.raises(LockUnavailable(str(KEY), "no answer")))
        with pytest.raises(WrongSerial) as wrong:
            await r.attach(serial="S1")
        assert wrong.value.found == "S2"
        assert r.script.steps[-1] == "annotate 1-1"
        assert r.locks.told == ([(KEY, Identity(DEVID, "S2"))] if noted else [])
        assert r.locks.locks[KEY.id].holder == ME.node, "it is for the caller to release"


@pytest.mark.parametrize(
    ("error", "settled", "logged"),
    [
        (None, True, False),
        (LockLost(str(KEY), "node-b"), True, False),
        (LockUnavailable(str(KEY), "no answer"), False, True),
        (KubeForbidden("update", "leases", "no"), False, True),
    ],
)
@virtual
async def test_a_serial_number_is_worth_another_write_unless_it_is_written_or_the_lock_is_lost(
    error: PluginError | None, settled: bool, logged: bool, caplog: pytest.LogCaptureFixture
) -> None:
    with rig() as r:
        r.locks.hold(KEY)
        if error is not None:
            r.script.at("annotate 1-1", r.raises(error))
        assert await r.tasks.record_identity(KEY, Identity(DEVID, "S1")) is settled
        assert [record.message for record in caplog.records] == ["serial number not recorded on the lock"] * logged


@pytest.mark.parametrize(
    ("serial", "on_lock", "noted"),
    [
        ("S1", (None, None), True),
        ("S1", ("S1", DEVID), False),
        ("S1", ("S1", DEVID + 1), True),
        ("S1", ("S2", DEVID), True),
        (None, ("S2", DEVID), False),
    ],
)
@virtual
async def test_the_serial_number_that_the_kernel_read_is_noted_where_the_lock_does_not_have_it_of_this_device(
    serial: str | None, on_lock: tuple[str | None, int | None], noted: bool
) -> None:
    with rig() as r:
        if serial is not None:
            r.kernel.serials[KEY] = serial

        async def known() -> None:
            lock = r.locks.locks[KEY.id]
            r.locks.locks[KEY.id] = replace(lock, serial=on_lock[0], read_from=on_lock[1])

        r.script.at(IMPORT, known)
        await r.attach()
        assert r.told == ([(KEY, Identity(DEVID, serial))] if noted else [])


# enumeration


@virtual
async def test_the_port_goes_onto_each_lock_before_the_device_has_enumerated() -> None:
    with rig() as r:
        r.lost(moved_to=OTHER)
        await r.reattach()
        steps = [step for step in r.script.steps if step.startswith(("note port", "enumerate"))]
        assert steps == ["note port 0 of 1-1", "note port 0 of 1-2", "enumerate 1-2"]


@pytest.mark.parametrize(("children_timeout", "more"), [(3.0, 0.0), (DEFAULT_CHILDREN_TIMEOUT_S, 0.0), (8.0, 3.0)])
@virtual
async def test_a_device_may_take_longer_to_enumerate_by_what_its_children_may(
    children_timeout: float, more: float
) -> None:
    with rig() as r:
        await r.attach(children=(), children_timeout=children_timeout)
        assert r.driver.limits == [ENUMERATE_TIMEOUT + more]


@virtual
async def test_children_that_do_not_come_are_named_beside_the_kinds_that_came() -> None:
    with rig() as r:
        r.kernel.child_kinds[STICK] = ("sound", "hidraw", "hidraw")
        r.kernel.driverless.add("tty")
        with pytest.raises(NodesMissing, match=r"no tty node appeared within 2 s, found hidraw, sound; ") as missing:
            await r.attach(children=("tty",), children_timeout=2.0)
        assert missing.value.kinds == ("tty",)
        assert r.claim.state is ClaimState.ATTACHING
        await r.pipeline.detach(KEY.id)
        assert r.free()


@virtual
async def test_a_device_without_any_child_is_not_said_to_have_its_own_node() -> None:
    with rig() as r:
        r.kernel.driverless.add("tty")
        with pytest.raises(NodesMissing, match=r", found none; "):
            await r.attach(children=("tty",))


# handing out


@virtual
async def test_a_device_whose_spec_cannot_be_written_is_not_handed_out_and_only_its_spec_is_tried_again() -> None:
    with rig() as r:
        r.lost(container_indexes=(0,))
        r.specs.failing = errno.ENOSPC
        with pytest.raises(CdiError):
            await r.reattach()
        assert (r.claim.state, r.claim.port) == (ClaimState.REATTACHING, 0)
        r.specs.failing = None
        attachment = await r.reattach()
        assert r.script.count(IMPORT) == 1
        assert r.claim.state is ClaimState.ATTACHED
        assert attachment.nodes[0].path in next(iter(r.specs.texts.values()))


@losses
@virtual
async def test_a_device_that_still_stands_is_handed_out_again_only_under_its_lock(holder: str | None) -> None:
    with rig() as r:
        r.lost(container_indexes=(0,))
        r.specs.failing = errno.ENOSPC
        with pytest.raises(CdiError):
            await r.reattach()
        r.specs.failing = None
        r.locks.lose(KEY, holder)
        with pytest.raises(LockLost):
            await r.reattach()
        assert not r.specs.texts
        assert r.claim.state is ClaimState.REATTACHING


# attaching again


@virtual
async def test_a_device_is_attached_again_after_what_is_left_of_it_was_detached_and_its_lock_written() -> None:
    with rig() as r:
        first = await r.attach()
        r.book.move(r.claim, ClaimEvent.PORT_LOST)
        r.script.steps.clear()
        again = await r.reattach()
        assert r.script.steps[:6] == ["ports", "detach 0", RENEWED, IMPORT, ATTACH, "attached 1-1"]
        assert again.nodes != first.nodes
        assert r.claim.allocated_as == first, "its containers still have that"


@pytest.mark.parametrize(
    ("holder", "boot_id"), [("node-a", "boot-0"), ("", "boot-1"), ("node-b", "boot-1")], ids=["boot", "free", "other"]
)
@virtual
async def test_a_lock_that_is_not_of_this_boot_is_acquired_anew_for_a_re_attach(holder: str, boot_id: str) -> None:
    with rig() as r:
        r.lost()
        r.locks.hold(KEY, holder, boot_id)
        await r.reattach()
        assert (r.script.count(ACQUIRED), r.script.count(RENEWED)) == (1, 0)


@virtual
async def test_a_lock_that_another_node_holds_by_the_time_of_a_re_attach_is_lost() -> None:
    with rig() as r:
        r.lost()
        r.locks.hold(KEY, "node-b")
        r.script.at(ACQUIRED, r.raises(LockHeld(str(KEY), "node-b")))
        with pytest.raises(LockLost) as lost:
            await r.reattach()
        assert lost.value.holder == "node-b"
        assert IMPORT not in r.script.steps


@losses
@virtual
async def test_a_claim_whose_lock_is_lost_while_it_is_detached_does_not_take_the_lock_again(holder: str | None) -> None:
    """A lock that is free by then may have been released by a person, and is to stay so."""
    with rig() as r:
        await r.attach()
        r.book.move(r.claim, ClaimEvent.PORT_LOST)
        r.script.at("detach 0", lambda: _lock_lost(r, holder))
        r.script.steps.clear()
        with pytest.raises(LockLost):
            await r.reattach()
        assert r.script.steps == ["ports", "detach 0"]
        assert r.claim.state is ClaimState.LOST


@pytest.mark.parametrize("step", [IMPORT, ENUMERATE])
@virtual
async def test_a_lock_that_is_lost_and_back_meanwhile_was_lost(step: str) -> None:
    with rig() as r:
        r.lost()

        async def lost_and_back() -> None:
            await _lock_lost(r, "node-b")
            r.locks.hold(KEY)

        r.script.at(step, lost_and_back)
        with pytest.raises(LockLost):
            await r.reattach()
        assert r.claim.state is ClaimState.LOST


async def _lock_lost(r: Rig, holder: str | None) -> None:
    """The watch shows it, and the claim is Lost from that moment, as the monitor does it."""
    r.locks.lose(KEY, holder)
    r.book.move(r.claim, ClaimEvent.LOCK_LOST)


# letting go


@virtual
async def test_a_lost_claim_without_a_port_is_looked_for_on_the_ports() -> None:
    """Its attach was cut off when the kernel had it already, and then its lock was taken over."""
    with rig() as r:
        r.script.at("attached 1-1", r.takes(100))
        with pytest.raises(TimeoutError):
            async with r.clock.timeout(5):
                await r.attach()
        r.locks.lose(KEY, "node-b")
        r.book.move(r.claim, ClaimEvent.LOCK_LOST)
        assert r.claim.port is None
        await r.pipeline.detach(KEY.id)
        assert r.free()


@virtual
async def test_a_port_that_carries_another_device_by_now_is_left_alone() -> None:
    with rig() as r:
        await r.attach()
        r.kernel.free_port(0)
        r.kernel.fill_ports("hs")
        await r.pipeline.detach(KEY.id)
        assert r.kernel.occupant(0) is not None
        assert not any(r.kernel.records.values()), "its own record is gone"
        assert r.claim.port is None
        r.kernel.reboot()


@virtual
async def test_a_port_that_does_not_become_free_stays_in_the_claim() -> None:
    with rig() as r:
        await r.attach()
        r.kernel.detaching_hangs = True
        began = r.clock.monotonic()
        with pytest.raises(DetachFailed):
            await r.pipeline.detach(KEY.id)
        assert r.clock.monotonic() - began == DETACH_TIMEOUT
        assert r.claim.port == 0


@virtual
async def test_the_lock_of_a_place_is_released_when_its_port_is_free_and_not_before() -> None:
    with rig() as r:
        r.lost(moved_to=OTHER)
        await r.reattach()
        r.script.steps.clear()
        r.kernel.detaching_hangs = True
        with pytest.raises(DetachFailed):
            await r.pipeline.detach_from_location(KEY.id)
        assert r.claim.moved_to == OTHER
        r.kernel.detaching_hangs = False
        r.script.at("release 1-2", r.raises(LockUnavailable(str(OTHER), "no answer")))
        with pytest.raises(LockUnavailable):
            await r.pipeline.detach_from_location(KEY.id)
        assert r.claim.moved_to == OTHER
        await r.pipeline.detach_from_location(KEY.id)
        assert r.script.steps == ["ports", "detach 0", "ports", "detach 0", "release 1-2", "ports", "release 1-2"]
        assert r.book[KEY.id].moved_to is None
        assert r.locks.locks[KEY.id].holder == ME.node
        await r.pipeline.detach_from_location(KEY.id)
        assert r.script.count("release 1-2") == 2, "at its own place there is nothing to leave"


# what stands attached


async def _stood(r: Rig) -> tuple[PortState, ...]:
    await r.attach()
    return await r.driver.ports()


@virtual
async def test_what_stands_as_it_was_attached_is_found_so_with_the_child_nodes_it_has_now() -> None:
    with rig() as r:
        ports = await _stood(r)
        assert await r.pipeline.current_attachment(r.claim, ports) == r.claim.attachment
        r.kernel.bring(0, ["hidraw"])
        now = await r.pipeline.current_attachment(r.claim, ports)
        assert now is not None
        assert [node.kind for node in now.nodes] == ["usb", "hidraw"]


@virtual
async def test_what_has_enumerated_anew_no_longer_stands_as_it_was_attached() -> None:
    with rig() as r:
        ports = await _stood(r)
        r.kernel.enumerate_anew(0)
        assert await r.pipeline.current_attachment(r.claim, ports) is None


@virtual
async def test_another_kind_of_device_under_the_same_node_is_not_what_was_attached() -> None:
    """The kernel has 127 numbers on a bus and gives them out in turn: the node alone may be an old one again."""
    with rig() as r:
        ports = await _stood(r)
        occupant = r.kernel.occupant(0)
        assert occupant is not None
        occupant.usb_id = DONGLE
        assert await r.pipeline.current_attachment(r.claim, ports) is None


@virtual
async def test_what_is_not_on_its_port_by_the_port_records_does_not_stand() -> None:
    with rig() as r:
        ports = await _stood(r)
        free = tuple(replace(port, status=PortStatus.NULL) for port in ports)
        others = tuple(replace(port, record=OTHER) for port in ports)
        assert await r.pipeline.current_attachment(r.claim, free) is None
        assert await r.pipeline.current_attachment(r.claim, others) is None
        assert await r.pipeline.current_attachment(replace(r.claim, port=None), ports) is None
        assert await r.pipeline.current_attachment(replace(r.claim, attachment=None), ports) is None


# reading serial numbers


@virtual
async def test_a_probe_and_its_import_are_each_bounded_by_the_time_of_a_probe() -> None:
    with rig() as r:
        await r.pipeline.probe(KEY, described(KEY))
        assert r.client.limits == [PROBE_TIMEOUT, PROBE_TIMEOUT]
        assert PROBE_TIMEOUT < IMPORT_WINDOW_S


@virtual
async def test_the_import_of_a_probe_ends_with_the_window_at_the_latest() -> None:
    with rig() as r:
        r.script.at(ACQUIRED, r.takes(IMPORT_WINDOW_S - 1))
        await r.pipeline.probe(KEY, described(KEY))
        assert r.client.limits[0] == 1


@pytest.mark.parametrize("serial", ["S1", None])
@virtual
async def test_what_a_probe_read_is_on_the_lock_before_others_can_have_the_device(serial: str | None) -> None:
    """serial None: the device has none, which is known from now on."""
    with rig() as r:
        r.client.serial = serial
        told = await r.pipeline.probe(KEY, described(KEY))
        assert told == Identity(DEVID, serial or "", ())
        assert r.locks.told == [(KEY, told)]
        assert r.script.steps == [ACQUIRED, IMPORT, "probe 1-1", "annotate 1-1", "release 1-1"]


@pytest.mark.parametrize("step", [IMPORT, "probe 1-1", "annotate 1-1"])
@virtual
async def test_a_probe_that_fails_gives_the_lock_back(step: str) -> None:
    with rig() as r:
        r.script.at(step, r.raises(ServerTimeout(KEY.server, "GET_DESCRIPTOR", 4)))
        with pytest.raises(ServerTimeout):
            await r.pipeline.probe(KEY, described(KEY))
        assert r.script.steps[-1] == "release 1-1"
        assert r.locks.told == []


@losses
@virtual
async def test_a_device_whose_lock_is_lost_while_it_is_imported_is_not_asked_who_it_is(holder: str | None) -> None:
    with rig() as r:
        r.script.at(IMPORT, r.loses(KEY, holder))
        with pytest.raises(LockLost):
            await r.pipeline.probe(KEY, described(KEY))
        assert r.script.steps == [ACQUIRED, IMPORT, "release 1-1"]
