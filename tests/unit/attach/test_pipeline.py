"""The pipeline from the lock to the container: failures of the lock, the server and the kernel at every await."""

from __future__ import annotations

import errno
from dataclasses import replace

import pytest

from tests.rigs.vocabulary import DONGLE, KEY, LAB, ME, OTHER_KEY, STICK, descriptor
from tests.unit.attach.pipeline_rig import Rig, on_rig
from usbip_plugin.attach.events import taken_over
from usbip_plugin.attach.pipeline import DETACH_TIMEOUT, PROBE_TIMEOUT, SECOND_TRY_TIME
from usbip_plugin.claims import ClaimEvent, ClaimState
from usbip_plugin.config.schema import DEFAULT_CHILDREN_TIMEOUT_S, IMPORT_WINDOW_S, Config, ResourceConfig
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
from usbip_plugin.model import DeviceKey, Endpoint, Identity, InterfaceRules, PodRef, UsbId
from usbip_plugin.usbip.poller import ServerFlaw
from usbip_plugin.vhci.driver import PortState
from usbip_plugin.vhci.sysfs import PortStatus

ACQUIRED, RENEWED = "acquire 1-1", "renew 1-1"
IMPORT, ATTACH, ENUMERATE = "import 1-1", "attach 1-1", "enumerate 1-1"
DEVID = descriptor().devid
FORMER = Endpoint("10.0.0.7", 40123)
"""From where the device was imported before, an address that the client does not choose."""

losses = pytest.mark.parametrize("holder", ["node-b", "", None], ids=["taken over", "released by hand", "deleted"])
"""Ways in which a lock stops naming this node: another holder, no holder, no Lease."""


# the lock


@on_rig
async def test_a_device_held_by_another_node_is_not_imported_and_leaves_no_claim(r: Rig) -> None:
    r.script.at(ACQUIRED, r.raises(LockHeld(str(KEY), "node-b")))
    with pytest.raises(LockHeld, match="held by node node-b"):
        await r.attach()
    assert r.script.steps == [ACQUIRED]
    assert r.book.get(KEY.id) is None


@on_rig
async def test_a_failed_lock_write_leaves_a_claim_whose_detach_does_not_need_the_kernel(r: Rig) -> None:
    r.script.at(ACQUIRED, r.raises(LockUnavailable(str(KEY), "no answer")))
    with pytest.raises(LockUnavailable):
        await r.attach()
    assert r.claim.state is ClaimState.LOCKING
    await r.pipeline.detach(KEY.id)
    assert r.script.steps == [ACQUIRED], "nothing is attached, and a missing driver must not delay the release"


@on_rig
async def test_a_takeover_is_reported_before_the_import(r: Rig) -> None:
    former = r.locks.former = r.locks.hold(KEY, "node-b")

    async def reported() -> None:
        assert r.events == [taken_over(KEY, former, "node-a")]

    r.script.at(IMPORT, reported)
    await r.attach()
    assert r.events == [taken_over(KEY, former, "node-a")]


@on_rig
async def test_the_acquire_of_a_free_lock_is_not_a_takeover(r: Rig) -> None:
    await r.attach()
    assert r.events == []


# failures at each await


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
@on_rig
async def test_a_cancelled_attach_names_its_last_step_and_its_detach_frees_the_port(
    r: Rig, step: str, doing: str, port: int | None
) -> None:
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
@on_rig
async def test_a_permanent_failure_is_not_tried_again(r: Rig, step: str, error: PluginError, state: ClaimState) -> None:
    r.script.at(step, r.raises(error))
    with pytest.raises(type(error)):
        await r.attach()
    assert r.script.count(step) == 1
    assert r.claim.state is state
    await r.pipeline.detach(KEY.id)
    assert r.free()


# R6: a lock that is lost during an attach


@losses
@on_rig
async def test_a_device_whose_lock_is_lost_during_its_import_does_not_reach_the_kernel(
    r: Rig, holder: str | None
) -> None:
    r.script.at(IMPORT, r.loses(KEY, holder))
    with pytest.raises(LockLost) as lost:
        await r.attach()
    assert lost.value.holder == (holder or "")
    assert ATTACH not in r.script.steps
    assert r.claim.state is ClaimState.IMPORTING


@pytest.mark.parametrize("step", [ATTACH, ENUMERATE])
@losses
@on_rig
async def test_a_device_whose_lock_is_lost_after_its_attach_does_not_reach_the_container(
    r: Rig, holder: str | None, step: str
) -> None:
    r.kernel.serials[KEY] = "S1"
    r.script.at(step, r.loses(KEY, holder))
    with pytest.raises(LockLost) as lost:
        await r.attach(container_indexes=(0,))
    assert lost.value.holder == (holder or "")
    assert r.claim.state is ClaimState.ATTACHING
    assert not r.specs.texts
    await r.pipeline.detach(KEY.id)
    assert r.free()


@pytest.mark.parametrize("step", ["attach 1-2", "enumerate 1-2"])
@pytest.mark.parametrize("lost", [KEY, OTHER_KEY])
@losses
@on_rig
async def test_an_enumeration_ends_at_once_when_a_lock_is_lost(
    r: Rig, holder: str | None, lost: DeviceKey, step: str
) -> None:
    r.lost(moved_to=OTHER_KEY)
    r.kernel.stuck_next()
    r.script.at(step, r.takes(2, r.loses(lost, holder)))
    began = r.clock.monotonic()
    with pytest.raises(LockError):
        await r.reattach()
    assert r.clock.monotonic() - began == 2


@on_rig
async def test_the_change_of_another_lock_ends_no_enumeration(r: Rig) -> None:
    r.locks.hold(OTHER_KEY)
    r.script.at(ENUMERATE, r.loses(OTHER_KEY, "node-b"))
    await r.attach()
    assert r.claim.state is ClaimState.ATTACHED


@pytest.mark.parametrize("step", ["import 1-2", "enumerate 1-2"])
@losses
@on_rig
async def test_a_device_re_attached_from_another_bus_id_needs_its_own_lock(
    r: Rig, holder: str | None, step: str
) -> None:
    r.lost(moved_to=OTHER_KEY)
    r.script.at(step, r.loses(KEY, holder))
    with pytest.raises(LockLost) as lost:
        await r.reattach()
    assert (lost.value.device, lost.value.holder) == (str(KEY), holder or "")
    assert r.claim.state is ClaimState.REATTACHING


@pytest.mark.parametrize("step", ["import 1-2", "enumerate 1-2"])
@losses
@on_rig
async def test_a_lost_lock_of_the_location_ends_the_re_attach_and_keeps_the_claim(
    r: Rig, holder: str | None, step: str
) -> None:
    r.lost(moved_to=OTHER_KEY)
    r.script.at(step, r.loses(OTHER_KEY, holder))
    with pytest.raises(LockError) as lost:
        await r.reattach()
    if holder:
        assert isinstance(lost.value, LockHeld)
        assert (lost.value.device, lost.value.holder) == (str(OTHER_KEY), holder)
    else:
        assert isinstance(lost.value, LockUnavailable)
        assert str(lost.value) == f"cannot lock {OTHER_KEY}: the lock was released during the attach; try again"
    assert r.claim.state is ClaimState.REATTACHING
    assert ("attach 1-2" in r.script.steps) == (step == "enumerate 1-2")


# R1: the import window


@on_rig
async def test_no_import_begins_after_the_window(r: Rig) -> None:
    r.script.at(ACQUIRED, r.takes(IMPORT_WINDOW_S))
    with pytest.raises(LockUnavailable, match="in time after the lock was written"):
        await r.attach()
    assert IMPORT not in r.script.steps


@on_rig
async def test_an_import_that_ends_after_the_window_is_closed_and_does_not_reach_the_kernel(r: Rig) -> None:
    """Plays a process that was stopped: the client answers after its limit."""
    r.script.at(IMPORT, r.takes(IMPORT_WINDOW_S))
    with pytest.raises(LockUnavailable, match="in time after the lock was written"):
        await r.attach()
    assert ATTACH not in r.script.steps


@pytest.mark.parametrize(("within", "limit"), [(60.0, 8.0), (5.0, 3.0)], ids=["window", "deadline"])
@on_rig
async def test_the_limit_of_an_import_is_the_rest_of_window_and_deadline(r: Rig, within: float, limit: float) -> None:
    r.script.at(ACQUIRED, r.takes(2))
    await r.attach(within=within)
    assert r.client.limits == [limit]


@on_rig
async def test_a_busy_device_is_imported_again_within_the_window(r: Rig) -> None:
    busy = r.raises(DeviceBusy(KEY))
    r.script.at(IMPORT, busy, busy, busy)
    await r.attach()
    assert r.script.count(IMPORT) == 4
    assert sorted(r.client.limits, reverse=True) == r.client.limits, "the waits count"


@pytest.mark.parametrize("former", [True, False])
@on_rig
async def test_a_server_that_refuses_a_takeover_as_busy_lists_devices_in_use(r: Rig, former: bool) -> None:
    if former:
        r.locks.former = r.locks.hold(KEY, "node-b")
    busy = r.raises(DeviceBusy(KEY))
    r.script.at(IMPORT, busy, busy, busy, busy)
    with pytest.raises(DeviceBusy):
        await r.attach()
    assert r.flaws == ([(KEY.server, ServerFlaw.LISTS_IN_USE)] if former else [])


@on_rig
async def test_a_busy_device_is_not_imported_again_after_the_window(r: Rig) -> None:
    r.script.at(IMPORT, r.takes(IMPORT_WINDOW_S - 0.05, r.raises(DeviceBusy(KEY))))
    with pytest.raises(LockUnavailable, match="in time after the lock was written"):
        await r.attach()
    assert r.script.count(IMPORT) == 1


@on_rig
async def test_the_window_of_the_own_lock_limits_an_import_from_another_bus_id(r: Rig) -> None:
    r.lost(moved_to=OTHER_KEY)
    r.script.at(RENEWED, r.takes(6))
    await r.reattach()
    assert r.client.limits == [IMPORT_WINDOW_S - 6]


@on_rig
async def test_no_import_from_another_bus_id_begins_after_the_window_of_the_own_lock(r: Rig) -> None:
    r.lost(moved_to=OTHER_KEY)
    r.script.at("acquire 1-2", r.takes(IMPORT_WINDOW_S))
    r.script.at(RENEWED, r.takes(IMPORT_WINDOW_S / 2))
    with pytest.raises(LockUnavailable, match="in time after the lock was written"):
        await r.reattach()
    assert "import 1-2" not in r.script.steps


# the source port


@on_rig
async def test_the_lock_names_the_source_port_of_each_import_before_it_begins(r: Rig) -> None:
    r.client.busy = True
    r.kernel.stuck_next()
    r.script.at(IMPORT, r.raises(DeviceBusy(KEY)))
    await r.attach()
    assert r.script.count(IMPORT) == 3
    assert len({source for source, _ in r.client.named}) == 2, "the second try comes from another port"
    assert all(source == written for source, written in r.client.named)
    assert r.claim.import_from == r.client.named[-1][0]


@on_rig
async def test_a_busy_device_is_imported_again_from_the_same_port(r: Rig) -> None:
    r.script.at(IMPORT, r.raises(DeviceBusy(KEY)))
    await r.attach()
    assert len({source for source, _ in r.client.named}) == 1
    assert r.script.count(ACQUIRED) == 1


@on_rig
async def test_a_device_is_imported_from_the_port_that_its_lock_names_if_that_can_be_bound(r: Rig) -> None:
    r.locks.locks[KEY.id] = replace(r.locks.hold(KEY, ""), import_from=FORMER)
    await r.attach()
    assert r.client.last == [FORMER]
    assert r.client.named == [(FORMER, FORMER)]


@on_rig
async def test_a_re_attach_is_from_the_port_of_the_lost_connection_also_without_its_lease(r: Rig) -> None:
    r.lost(import_from=FORMER)
    del r.locks.locks[KEY.id]
    await r.reattach()
    assert r.client.named == [(FORMER, FORMER)]


@on_rig
async def test_an_import_from_another_bus_id_is_named_by_the_lock_of_that_only(r: Rig) -> None:
    r.lost(moved_to=OTHER_KEY)
    r.locks.locks[KEY.id] = replace(r.locks.locks[KEY.id], import_from=FORMER)
    await r.reattach()
    ((source, written),) = r.client.named
    assert source == written == r.locks.locks[OTHER_KEY.id].import_from != FORMER
    assert r.locks.locks[KEY.id].import_from == FORMER, "the connection from there may be half-open"


@on_rig
async def test_a_lock_that_is_taken_again_for_a_live_attachment_names_its_source_port(r: Rig) -> None:
    await r.attach()
    source = r.claim.import_from
    await _lock_lost(r, "")
    r.book.move(r.claim, ClaimEvent.LOCK_FREE)
    await r.reattach()
    assert r.locks.locks[KEY.id].import_from == source is not None
    assert r.script.count(IMPORT) == 1


@on_rig
async def test_a_node_whose_address_has_changed_says_so_once(r: Rig, caplog: pytest.LogCaptureFixture) -> None:
    r.lost(import_from=FORMER)
    r.locks.locks[KEY.id] = replace(r.locks.locks[KEY.id], import_from=FORMER)
    r.client.busy = True
    r.script.at(IMPORT, r.raises(ServerTimeout(LAB, "connect", 3)))
    with pytest.raises(ServerTimeout):
        await r.reattach()
    await r.reattach()
    assert [record.message for record in caplog.records if "address" in record.message] == [
        "own address has changed, an old connection to the server cannot be ended"
    ]


# the second try


@on_rig
async def test_the_second_try_after_a_stuck_attach_has_a_new_lock_write_and_window(r: Rig) -> None:
    r.kernel.stuck_next()
    attachment = await r.attach()
    one = [IMPORT, ATTACH, ENUMERATE]
    assert [step for step in r.script.steps if step in (ACQUIRED, RENEWED, *one)] == [
        *(ACQUIRED, *one),
        *(RENEWED, *one),
    ]
    assert r.client.limits == [IMPORT_WINDOW_S, pytest.approx(SECOND_TRY_TIME)], "the first window is long over"
    assert (r.claim.state, r.claim.port) == (ClaimState.ATTACHED, attachment.port)


@on_rig
async def test_the_second_try_does_not_import_without_the_lock(r: Rig) -> None:
    r.kernel.stuck_next()
    r.script.at(RENEWED, r.raises(LockLost(str(KEY), "node-b")))
    with pytest.raises(LockLost):
        await r.attach()
    assert r.script.count(IMPORT) == 1
    assert r.free()


@on_rig
async def test_an_attach_that_is_stuck_twice_fails_and_frees_the_port(r: Rig) -> None:
    r.kernel.stuck_next(5)
    with pytest.raises(AttachStuck):
        await r.attach()
    assert r.script.count(ATTACH) == 2
    assert (r.claim.state, r.claim.port) == (ClaimState.IMPORTING, None)
    assert r.free()


# the wrong device


@on_rig
async def test_a_device_with_another_usb_id_in_its_import_does_not_reach_the_kernel(r: Rig) -> None:
    r.client.usb_id = DONGLE
    with pytest.raises(WrongDevice) as wrong:
        await r.attach()
    assert (wrong.value.expected, wrong.value.found) == (STICK, DONGLE)
    assert ATTACH not in r.script.steps
    assert r.claim.state is ClaimState.IMPORTING


@on_rig
async def test_a_device_that_enumerates_with_another_usb_id_does_not_reach_the_container(r: Rig) -> None:
    r.kernel.impostor_next(DONGLE)
    with pytest.raises(WrongDevice):
        await r.attach()
    assert r.claim.state is ClaimState.ATTACHING
    await r.pipeline.detach(KEY.id)
    assert r.free()


@pytest.mark.parametrize("noted", [True, False])
@on_rig
async def test_a_wrong_serial_number_is_written_to_the_lock_before_the_attach_fails(r: Rig, noted: bool) -> None:
    """noted: whether the write succeeds; the attach fails with the same error."""
    r.kernel.serials[KEY] = "S2"
    if not noted:
        r.script.at("annotate 1-1", r.raises(LockUnavailable(str(KEY), "no answer")))
    with pytest.raises(WrongSerial) as wrong:
        await r.attach(serial="S1")
    assert wrong.value.found == "S2"
    assert r.script.steps[-1] == "annotate 1-1"
    assert r.locks.identities == ([(KEY, Identity(DEVID, "S2"))] if noted else [])
    assert r.locks.locks[KEY.id].holder == ME.node, "the caller releases it"


@pytest.mark.parametrize(
    ("error", "logged"),
    [
        (None, False),
        (LockLost(str(KEY), "node-b"), False),
        (LockUnavailable(str(KEY), "no answer"), True),
        (KubeForbidden("update", "leases", "no"), True),
    ],
)
@on_rig
async def test_a_serial_number_that_is_not_written_is_logged_unless_the_lock_is_lost(
    r: Rig, error: PluginError | None, logged: bool, caplog: pytest.LogCaptureFixture
) -> None:
    r.locks.hold(KEY)
    if error is not None:
        r.script.at("annotate 1-1", r.raises(error))
    assert await r.tasks.record_identity(KEY, Identity(DEVID, "S1")) is error
    assert [record.message for record in caplog.records] == ["serial number not recorded on the lock"] * logged


@pytest.mark.parametrize(
    ("serial", "usb_id", "on_lock", "noted"),
    [
        ("S1", STICK, (None, None), True),
        ("S1", STICK, ("S1", DEVID), False),
        ("S1", DONGLE, ("S1", DEVID), True),
        ("S1", STICK, ("S1", DEVID + 1), True),
        ("S1", STICK, ("S2", DEVID), True),
        (None, STICK, ("S2", DEVID), False),
    ],
)
@on_rig
async def test_a_serial_number_that_the_lock_does_not_have_from_this_device_is_noted(
    r: Rig, serial: str | None, usb_id: UsbId, on_lock: tuple[str | None, int | None], noted: bool
) -> None:
    if serial is not None:
        r.kernel.serials[KEY] = serial

    async def known() -> None:
        lock = r.locks.locks[KEY.id]
        r.locks.locks[KEY.id] = replace(lock, usb_id=usb_id, serial=on_lock[0], read_from=on_lock[1])

    r.script.at(IMPORT, known)
    await r.attach()
    assert r.identities == ([(KEY, Identity(DEVID, serial))] if noted else [])


# enumeration


@on_rig
async def test_the_port_is_noted_on_each_lock_before_the_device_enumerates(r: Rig) -> None:
    r.lost(moved_to=OTHER_KEY)
    await r.reattach()
    steps = [step for step in r.script.steps if step.startswith(("note port", "enumerate"))]
    assert steps == ["note port 0 of 1-1", "note port 0 of 1-2", "enumerate 1-2"]


@pytest.mark.parametrize(("serial", "devid"), [(None, DEVID), ("S1", None)])
@on_rig
async def test_the_lock_keeps_no_serial_number_of_an_earlier_device_unless_the_pod_was_promised_one(
    r: Rig, serial: str | None, devid: int | None
) -> None:
    r.kernel.serials[KEY] = "S1"
    await r.attach(serial=serial)
    assert r.tasks.devids == [(KEY, devid)]


@on_rig
async def test_the_claims_own_lock_keeps_its_serial_number_when_the_device_is_attached_from_elsewhere(r: Rig) -> None:
    r.lost(moved_to=OTHER_KEY, serial=None)
    await r.reattach()
    assert r.tasks.devids == [(KEY, None), (OTHER_KEY, DEVID)]


@on_rig
async def test_a_lock_that_is_taken_again_says_whose_device_it_is(r: Rig) -> None:
    r.lost(serial="S1", pod=PodRef("ns", "p", "u"))
    r.locks.hold(KEY, "")
    await r.reattach()
    (meta,) = r.locks.metas
    assert (meta.serial, meta.pod) == ("S1", PodRef("ns", "p", "u"))


@pytest.mark.parametrize(
    ("within", "children_timeout", "first", "second"),
    [
        (60.0, DEFAULT_CHILDREN_TIMEOUT_S, 57.0, 3.0),
        (9.0, DEFAULT_CHILDREN_TIMEOUT_S, 6.0, 3.0),
        (7.0, DEFAULT_CHILDREN_TIMEOUT_S, 6.0, 1.0),
        (9.0, 3.0, 6.0, 3.0),
        (10.0, 8.0, 9.0, 1.0),
        (30.0, 8.0, 27.0, 3.0),
    ],
)
@on_rig
async def test_the_first_enumeration_gets_nearly_all_of_the_time_and_the_second_what_is_left(
    r: Rig, within: float, children_timeout: float, first: float, second: float
) -> None:
    r.kernel.stuck_next()
    await r.attach(within=within, children=(), children_timeout=children_timeout)
    assert r.driver.limits == [first, pytest.approx(second)]


@on_rig
async def test_a_second_enumeration_after_an_early_failure_gets_the_rest_of_the_time(r: Rig) -> None:
    r.script.at(ENUMERATE, r.takes(2, r.raises(AttachStuck("the connection ended"))))
    await r.attach(within=40.0)
    assert r.driver.limits == [37.0, 38.0]


@on_rig
async def test_an_enumeration_in_a_very_short_allocate_gets_all_of_it(r: Rig) -> None:
    await r.attach(within=2.0)
    assert r.driver.limits == [2.0]


@on_rig
async def test_the_enumeration_of_a_reattach_gets_what_its_try_has_left(r: Rig) -> None:
    r.lost()
    r.script.at(IMPORT, r.takes(2))
    await r.reattach()
    assert r.driver.limits == [58.0]


@on_rig
async def test_the_error_of_missing_children_names_the_kinds_found(r: Rig) -> None:
    r.kernel.child_kinds[STICK] = ("sound", "hidraw", "hidraw")
    r.kernel.driverless.add("tty")
    with pytest.raises(NodesMissing, match=r"no tty node appeared within 2 s, found hidraw, sound; ") as missing:
        await r.attach(children=("tty",), children_timeout=2.0)
    assert missing.value.kinds == ("tty",)
    assert r.claim.state is ClaimState.ATTACHING
    await r.pipeline.detach(KEY.id)
    assert r.free()


@on_rig
async def test_the_error_of_missing_children_does_not_count_the_usb_node(r: Rig) -> None:
    r.kernel.driverless.add("tty")
    with pytest.raises(NodesMissing, match=r", found none; "):
        await r.attach(children=("tty",))


# the CDI spec


@on_rig
async def test_a_failed_write_of_the_spec_fails_the_re_attach_and_only_the_write_is_tried_again(r: Rig) -> None:
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
@on_rig
async def test_the_spec_of_an_attached_device_is_written_only_with_its_lock(r: Rig, holder: str | None) -> None:
    r.lost(container_indexes=(0,))
    r.specs.failing = errno.ENOSPC
    with pytest.raises(CdiError):
        await r.reattach()
    r.specs.failing = None
    r.locks.lose(KEY, holder)
    r.script.at(ACQUIRED, r.raises(LockHeld(str(KEY), "node-b")))
    with pytest.raises(LockLost):
        await r.reattach()
    assert not r.specs.texts
    assert r.claim.state is ClaimState.REATTACHING


@on_rig
async def test_a_device_that_lost_only_its_lock_stays_attached_under_a_new_one(r: Rig) -> None:
    first = await r.attach()
    await _lock_lost(r, "")
    r.book.move(r.claim, ClaimEvent.LOCK_FREE)
    r.script.steps.clear()
    assert await r.reattach() == first
    assert r.script.steps[:2] == ["ports", ACQUIRED]
    assert (r.script.count(IMPORT), r.claim.state) == (0, ClaimState.ATTACHED)


@on_rig
async def test_a_lock_of_another_boot_does_not_name_this_node(r: Rig) -> None:
    await r.attach()
    r.locks.hold(KEY, "node-a", "boot-0")
    with pytest.raises(LockLost):
        r.claim_locks.check_still_ours(r.claim)


# re-attach


@on_rig
async def test_a_re_attach_begins_with_a_detach_and_a_lock_write(r: Rig) -> None:
    first = await r.attach()
    r.book.move(r.claim, ClaimEvent.PORT_LOST)
    r.book.put(replace(r.claim, attachment=None))
    r.script.steps.clear()
    again = await r.reattach()
    assert r.script.steps[:6] == ["ports", "detach 0", RENEWED, IMPORT, ATTACH, "attached 1-1"]
    assert again.nodes != first.nodes
    assert r.claim.allocated_as == first, "its containers still have those nodes"


@pytest.mark.parametrize(
    ("holder", "boot_id"), [("node-a", "boot-0"), ("", "boot-1"), ("node-b", "boot-1")], ids=["boot", "free", "other"]
)
@on_rig
async def test_a_re_attach_acquires_a_lock_that_is_not_held_by_this_boot(r: Rig, holder: str, boot_id: str) -> None:
    r.lost()
    r.locks.hold(KEY, holder, boot_id)
    await r.reattach()
    assert (r.script.count(ACQUIRED), r.script.count(RENEWED)) == (1, 0)


@on_rig
async def test_a_re_attach_fails_if_another_node_holds_the_lock(r: Rig) -> None:
    r.lost()
    r.locks.hold(KEY, "node-b")
    r.script.at(ACQUIRED, r.raises(LockHeld(str(KEY), "node-b")))
    with pytest.raises(LockLost) as lost:
        await r.reattach()
    assert lost.value.holder == "node-b"
    assert IMPORT not in r.script.steps


@losses
@on_rig
async def test_a_claim_whose_lock_is_lost_during_its_detach_does_not_acquire_it_again(
    r: Rig, holder: str | None
) -> None:
    """A person may have released the lock."""
    await r.attach()
    r.book.move(r.claim, ClaimEvent.PORT_LOST)
    r.book.put(replace(r.claim, attachment=None))
    r.script.at("detach 0", lambda: _lock_lost(r, holder))
    r.script.steps.clear()
    with pytest.raises(LockLost):
        await r.reattach()
    assert r.script.steps == ["ports", "detach 0"]
    assert r.claim.state is ClaimState.LOST


@pytest.mark.parametrize("step", [IMPORT, ENUMERATE])
@on_rig
async def test_a_lock_that_was_lost_for_a_moment_ends_the_re_attach(r: Rig, step: str) -> None:
    r.lost()

    async def lost_and_back() -> None:
        await _lock_lost(r, "node-b")
        r.locks.hold(KEY)

    r.script.at(step, lost_and_back)
    with pytest.raises(LockLost):
        await r.reattach()
    assert r.claim.state is ClaimState.LOST


async def _lock_lost(r: Rig, holder: str | None) -> None:
    """Loses the lock and moves the claim to Lost, like the monitor."""
    r.locks.lose(KEY, holder)
    r.book.move(r.claim, ClaimEvent.LOCK_LOST)


# detach


@on_rig
async def test_the_detach_of_a_lost_claim_without_a_port_searches_the_ports(r: Rig) -> None:
    """The attach was cancelled after the write to the kernel, and the lock was taken over."""
    r.script.at("attached 1-1", r.takes(100))
    with pytest.raises(TimeoutError):
        async with r.clock.timeout(5):
            await r.attach()
    r.locks.lose(KEY, "node-b")
    r.book.move(r.claim, ClaimEvent.LOCK_LOST)
    assert r.claim.port is None
    await r.pipeline.detach(KEY.id)
    assert r.free()


@on_rig
async def test_a_port_with_another_device_is_not_detached(r: Rig) -> None:
    await r.attach()
    r.kernel.free_port(0)
    r.kernel.fill_ports("hs")
    await r.pipeline.detach(KEY.id)
    assert r.kernel.occupant(0) is not None
    assert not any(r.kernel.records.values()), "its own record is gone"
    assert r.claim.port is None
    r.kernel.reboot()


@on_rig
async def test_a_claim_keeps_a_port_that_does_not_become_free(r: Rig) -> None:
    await r.attach()
    r.kernel.detaching_hangs = True
    began = r.clock.monotonic()
    with pytest.raises(DetachFailed):
        await r.pipeline.detach(KEY.id)
    assert r.clock.monotonic() - began == DETACH_TIMEOUT
    assert r.claim.port == 0


@on_rig
async def test_the_lock_of_a_location_is_released_after_its_port_is_free(r: Rig) -> None:
    r.lost(moved_to=OTHER_KEY)
    await r.reattach()
    r.script.steps.clear()
    r.kernel.detaching_hangs = True
    with pytest.raises(DetachFailed):
        await r.pipeline.detach_from_location(KEY.id)
    assert r.claim.moved_to == OTHER_KEY
    r.kernel.detaching_hangs = False
    r.script.at("release 1-2", r.raises(LockUnavailable(str(OTHER_KEY), "no answer")))
    with pytest.raises(LockUnavailable):
        await r.pipeline.detach_from_location(KEY.id)
    assert r.claim.moved_to == OTHER_KEY
    await r.pipeline.detach_from_location(KEY.id, detached=True)
    assert r.script.steps == ["ports", "detach 0", "ports", "detach 0", "release 1-2", "ports", "release 1-2"]
    assert r.book[KEY.id].moved_to is None
    assert r.locks.locks[KEY.id].holder == ME.node
    await r.pipeline.detach_from_location(KEY.id)
    assert r.script.count("release 1-2") == 2, "nothing to release at its own bus ID"


@on_rig
async def test_the_lock_of_a_location_whose_connection_was_lost_is_left_under_the_boot(r: Rig) -> None:
    r.lost(moved_to=OTHER_KEY)
    await r.reattach()
    r.kernel.free_port(0)
    r.script.steps.clear()
    assert not await r.pipeline.detach(KEY.id)
    await r.pipeline.detach_from_location(KEY.id)
    assert r.script.steps[-1] == "leave 1-2"


# the current attachment


async def _attached_ports(r: Rig) -> tuple[PortState, ...]:
    await r.attach()
    return await r.driver.ports()


@on_rig
async def test_an_unchanged_attachment_is_returned_with_its_current_child_nodes(r: Rig) -> None:
    ports = await _attached_ports(r)
    assert await r.pipeline.current_attachment(r.claim, ports) == r.claim.attachment
    r.kernel.bring(0, ["hidraw"])
    now = await r.pipeline.current_attachment(r.claim, ports)
    assert now is not None
    assert [node.kind for node in now.nodes] == ["usb", "hidraw"]


@on_rig
async def test_a_device_that_enumerated_again_has_no_current_attachment(r: Rig) -> None:
    ports = await _attached_ports(r)
    r.kernel.enumerate_anew(0)
    assert await r.pipeline.current_attachment(r.claim, ports) is None


@on_rig
async def test_a_device_with_another_usb_id_has_no_current_attachment(r: Rig) -> None:
    """The kernel reuses the 127 numbers of a bus, so the node of an old device may return."""
    ports = await _attached_ports(r)
    occupant = r.kernel.occupant(0)
    assert occupant is not None
    occupant.usb_id = DONGLE
    assert await r.pipeline.current_attachment(r.claim, ports) is None


@on_rig
async def test_a_device_that_is_not_on_its_port_has_no_current_attachment(r: Rig) -> None:
    ports = await _attached_ports(r)
    free = tuple(replace(port, status=PortStatus.NULL) for port in ports)
    others = tuple(replace(port, record=OTHER_KEY) for port in ports)
    assert await r.pipeline.current_attachment(r.claim, free) is None
    assert await r.pipeline.current_attachment(r.claim, others) is None
    assert await r.pipeline.current_attachment(replace(r.claim, port=None), ports) is None
    assert await r.pipeline.current_attachment(replace(r.claim, attachment=None), ports) is None


# probes


@on_rig
async def test_a_probe_and_its_import_are_each_limited_to_the_probe_timeout(r: Rig) -> None:
    await r.pipeline.probe(KEY, descriptor())
    assert r.client.limits == [PROBE_TIMEOUT, PROBE_TIMEOUT]
    assert PROBE_TIMEOUT < IMPORT_WINDOW_S


@on_rig
async def test_the_import_of_a_probe_is_limited_by_the_window(r: Rig) -> None:
    r.script.at(ACQUIRED, r.takes(IMPORT_WINDOW_S - 1))
    await r.pipeline.probe(KEY, descriptor())
    assert r.client.limits[0] == 1


@pytest.mark.parametrize("serial", ["S1", None])
@on_rig
async def test_the_identity_from_a_probe_is_on_the_lock_before_the_release(r: Rig, serial: str | None) -> None:
    r.client.serial = serial
    identity = await r.pipeline.probe(KEY, descriptor())
    assert identity == Identity(DEVID, serial or "", ())
    assert r.locks.identities == [(KEY, identity)]
    assert r.script.steps == [ACQUIRED, IMPORT, "probe 1-1", "annotate 1-1", "release 1-1"]


@pytest.mark.parametrize(
    ("step", "released"), [(IMPORT, "leave 1-1"), ("probe 1-1", "leave 1-1"), ("annotate 1-1", "release 1-1")]
)
@on_rig
async def test_a_failed_probe_releases_the_lock(r: Rig, step: str, released: str) -> None:
    """Under its boot while the server may take the connection for alive."""
    r.script.at(step, r.raises(ServerTimeout(KEY.server, "GET_DESCRIPTOR", 4)))
    with pytest.raises(ServerTimeout):
        await r.pipeline.probe(KEY, descriptor())
    assert r.script.steps[-1] == released
    assert r.locks.identities == []


@losses
@on_rig
async def test_a_device_whose_lock_is_lost_during_its_import_is_not_probed(r: Rig, holder: str | None) -> None:
    r.script.at(IMPORT, r.loses(KEY, holder))
    with pytest.raises(LockLost):
        await r.pipeline.probe(KEY, descriptor())
    assert r.script.steps == [ACQUIRED, IMPORT, "leave 1-1"]


@on_rig
async def test_an_attach_and_a_re_attach_allow_the_interfaces_that_the_resource_allows_then(r: Rig) -> None:
    r.resources.config = Config((ResourceConfig("stick", (), allow_classes=(3,)),))
    await r.attach()
    assert r.driver.rules == InterfaceRules(allowed=(3,))
    await r.pipeline.detach(KEY.id)
    r.resources.config = Config((ResourceConfig("stick", (), children=("input",)),))
    r.lost()
    await r.reattach()
    assert r.driver.rules == InterfaceRules(asked=(3,))
