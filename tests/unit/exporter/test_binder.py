"""What is bound and unbound, and when: at start, at plug-in, after a change of the file, after a failure."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from dataclasses import replace

import pytest

from tests.rigs.command_rig import Log
from tests.rigs.exporter_rig import log_from
from tests.rigs.host_suite import CONVERTER, DISK, HUB, STICK
from tests.rigs.tasks import background, virtual_with
from usbip_plugin.config.schema import Selector
from usbip_plugin.exporter.binder import HUB as HUB_PROBLEM
from usbip_plugin.exporter.binder import RECHECK_S, RETRY_S, Binder, BindPlan, plan
from usbip_plugin.exporter.host import STUB, HostDevice, StubStatus
from usbip_plugin.model import HUB_CLASS, UsbId
from usbip_sim.server.host import SimulatedHost
from usbip_sim.server.usbdevice import VirtualDevice
from usbip_sim.virtual.loop import SimClock

ALL = Selector()
DISKS, STICKS, NAMED = Selector(class_=DISK.class_), Selector(vendor=0x0951), Selector(serial="KINGSTON-42")


def host_device(device: VirtualDevice, driver: str = "usb", *, hub: bool = False) -> HostDevice:
    configured = device.descriptor(configured=True)
    descriptor = replace(device.descriptor(driver != STUB), interfaces=configured.interfaces)
    if hub:
        descriptor = replace(descriptor, device_class=HUB_CLASS)
    return HostDevice(descriptor, driver, device.serial or None, device.product)


PLUGGED = [host_device(STICK), host_device(HUB, hub=True), host_device(CONVERTER)]


@pytest.mark.parametrize(
    ("selectors", "expected"),
    [
        ([], BindPlan()),
        ([ALL], BindPlan(bind=("1-1", "1-2.3"))),
        ([DISKS], BindPlan(bind=("1-1",))),
        ([NAMED], BindPlan(bind=("1-1",))),
        ([STICKS, NAMED], BindPlan(bind=("1-1",))),
        ([Selector(serial="other")], BindPlan(unmatched=(Selector(serial="other"),))),
        ([Selector(bus_id="1-2")], BindPlan(hubs=("1-2",))),
        ([Selector(bus_id="1-*")], BindPlan(bind=("1-1", "1-2.3"), hubs=("1-2",))),
    ],
)
def test_selected_devices_are_bound_and_hubs_never(selectors: list[Selector], expected: BindPlan) -> None:
    assert plan(PLUGGED, {}, selectors) == expected


@pytest.mark.parametrize("selector", [ALL, DISKS, NAMED])
def test_a_bound_device_stays_selected_although_it_has_no_configuration(selector: Selector) -> None:
    stick = host_device(STICK, STUB)
    assert stick.descriptor.configuration == 0
    assert plan([stick], {"1-1": StubStatus.AVAILABLE}, [selector]) == BindPlan()


@pytest.mark.parametrize(
    ("status", "selectors", "expected"),
    [
        (StubStatus.AVAILABLE, [], BindPlan(unbind=("1-1",))),
        (StubStatus.ERROR, [], BindPlan(unbind=("1-1",))),
        (StubStatus.USED, [], BindPlan()),
        (StubStatus.USED, [ALL], BindPlan()),
        (StubStatus.ERROR, [ALL], BindPlan(renew=("1-1",))),
    ],
)
def test_a_bound_device_is_given_back_when_nobody_uses_it_and_renewed_after_an_error(
    status: StubStatus, selectors: list[Selector], expected: BindPlan
) -> None:
    assert plan([host_device(STICK, STUB)], {"1-1": status}, selectors) == expected


class Rig:
    def __init__(self, log: Log) -> None:
        self.log = log
        self.clock = SimClock(asyncio.get_running_loop())
        self.host = SimulatedHost([STICK, CONVERTER], self.clock, reset_time=0.0)
        self.binder = Binder(self.host, self.clock, [ALL])

    async def until(self, condition: Callable[[], object]) -> None:
        async with self.clock.timeout(10 * RECHECK_S):
            while not condition():
                await self.clock.sleep(0.05)

    async def driver(self, busid: str) -> str:
        return next((device.driver for device in await self.host.devices() if device.busid == busid), "")

    def logged(self, message: str) -> list[dict[str, object]]:
        return [vars(record) for record in self.log.having(message)]


@contextlib.asynccontextmanager
async def binding() -> AsyncIterator[Rig]:
    with log_from() as log:
        rig = Rig(log)
        async with background(rig.binder.run()):
            await rig.binder.settled.wait()
            yield rig


on_a_host = virtual_with(binding)


@on_a_host
async def test_devices_are_bound_at_start_and_whenever_they_are_plugged_in(rig: Rig) -> None:
    assert sorted(rig.binder.exported) == ["1-1", "1-2.3"]
    began = rig.clock.monotonic()
    rig.host.unplug("1-1")
    await rig.until(lambda: sorted(rig.binder.exported) == ["1-2.3"])
    rig.host.plug(STICK)
    await rig.until(lambda: sorted(rig.binder.exported) == ["1-1", "1-2.3"])
    assert rig.clock.monotonic() - began < 1, "by event, not by a poll"
    assert await rig.driver("1-1") == STUB
    assert [line["busid"] for line in rig.logged("device bound")] == ["1-1", "1-2.3", "1-1"]


@on_a_host
async def test_what_is_taken_out_of_the_file_is_given_back_at_once_or_after_its_use(rig: Rig) -> None:
    rig.host.hold("1-1")
    rig.binder.reconfigure([])
    assert dict(rig.binder.exported) == {}, "no new client gets one"
    await rig.until(lambda: rig.logged("device unbound, not selected"))
    assert [await rig.driver(busid) for busid in ("1-1", "1-2.3")] == [STUB, "usb"]
    rig.host.let_go("1-1")
    rig.binder.wake()
    await rig.until(lambda: len(rig.logged("device unbound, not selected")) == 2)
    assert await rig.driver("1-1") == "usb"


@on_a_host
async def test_a_device_that_was_bound_by_hand_is_given_back_unless_it_is_selected(rig: Rig) -> None:
    rig.binder.reconfigure([STICKS])
    await rig.until(lambda: rig.logged("device unbound, not selected"))
    await rig.host.bind("1-2.3")
    await rig.until(lambda: len(rig.logged("device unbound, not selected")) == 2)
    assert await rig.driver("1-2.3") == "usb"


@on_a_host
async def test_a_device_that_the_host_uses_is_tried_again_until_it_is_free(rig: Rig) -> None:
    rig.host.in_use["1-3"] = "sda1 is mounted on this host at /; unmount it"
    rig.host.plug(VirtualDevice("1-3", UsbId(1, 2)))
    await rig.until(lambda: "1-3" in rig.binder.problems)
    await rig.clock.sleep(5 * RETRY_S)
    assert rig.binder.problems == {"1-3": rig.host.in_use["1-3"]}
    (line,) = rig.logged("device not exported")
    assert (line["busid"], line["cause"]) == ("1-3", rig.host.in_use["1-3"]), "said once, with the cure"
    rig.host.in_use.clear()
    await rig.clock.sleep(RETRY_S + 1)
    assert rig.binder.problems == {}
    assert "1-3" in rig.binder.exported


@on_a_host
async def test_a_driver_that_hangs_is_not_asked_again_and_delays_no_other_device(rig: Rig) -> None:
    rig.host.stuck.add("1-3")
    rig.host.plug(VirtualDevice("1-3", UsbId(1, 2)))
    await rig.until(lambda: "1-3" in rig.binder.problems)
    rig.host.stuck.clear()
    rig.host.plug(VirtualDevice("1-4", UsbId(1, 2)))
    await rig.until(lambda: "1-4" in rig.binder.exported)
    await rig.clock.sleep(5 * RETRY_S)
    assert "1-3" not in rig.binder.exported, "each try would leave one more thread in the kernel"
    rig.host.unplug("1-3")
    rig.host.plug(VirtualDevice("1-3", UsbId(1, 2)))
    await rig.until(lambda: "1-3" in rig.binder.exported)
    assert rig.binder.problems == {}


@on_a_host
async def test_a_device_whose_reset_failed_is_bound_again(rig: Rig) -> None:
    rig.host.break_reset("1-1")
    assert rig.host.status("1-1") is StubStatus.ERROR
    await rig.clock.sleep(RECHECK_S + 1)
    assert rig.host.status("1-1") is StubStatus.AVAILABLE
    assert len(rig.logged("device in error state, binding it again")) == 1


@on_a_host
async def test_a_selected_hub_and_a_selector_without_device_are_said_once(rig: Rig) -> None:
    rig.host.plug(HUB, is_hub=True)
    rig.binder.reconfigure([Selector(bus_id="1-2"), NAMED, Selector(serial="other")])
    await rig.until(lambda: "1-2" in rig.binder.problems)
    await rig.clock.sleep(5 * RECHECK_S)
    assert rig.binder.problems == {"1-2": HUB_PROBLEM}
    assert [line["busid"] for line in rig.logged("device not exported")] == ["1-2"]
    assert [line["selector"] for line in rig.logged("selector matches no device")] == ["serial other"]
    assert rig.binder.unmatched == (Selector(serial="other"),)
    assert await rig.driver("1-2") == "usb"


@on_a_host
async def test_a_module_that_is_unloaded_is_a_problem_of_each_device_until_it_is_back(rig: Rig) -> None:
    rig.host.loaded = False
    rig.host.plug(VirtualDevice("1-3", UsbId(1, 2)))
    await rig.until(lambda: "1-3" in rig.binder.problems)
    assert "modprobe usbip-host" in rig.binder.problems["1-3"]
    rig.host.loaded = True
    await rig.clock.sleep(RETRY_S + 1)
    assert "1-3" in rig.binder.exported


@on_a_host
async def test_unreadable_devices_are_said_once_and_read_again(rig: Rig) -> None:
    rig.host.unreadable = "the USB devices cannot be read within 5 s"
    rig.binder.wake()
    await rig.clock.sleep(5 * RETRY_S)
    assert [line["cause"] for line in rig.logged("devices not readable")] == [rig.host.unreadable]
    assert sorted(rig.binder.exported) == ["1-1", "1-2.3"], "clients can still import"
    rig.host.unreadable = ""
    rig.host.plug(VirtualDevice("1-3", UsbId(1, 2)))
    await rig.until(lambda: "1-3" in rig.binder.exported)
