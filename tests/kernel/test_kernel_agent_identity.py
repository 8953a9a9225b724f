"""Which device is the promised one: asked of devices on a real usbip-host, and compared by the real kernel."""

from __future__ import annotations

from dataclasses import replace

from tests.kernel.kernel_rig import DISK, TWINS, KernelRig
from tests.kernel.qemu_monitor import Monitor
from tests.rigs.agent_rig import (
    POD,
    SERIAL,
    advertised,
    agent_with,
    busy_rows,
    end,
    keys_of,
    on,
    refusal,
    serial_of,
    until_health,
    until_lease,
    until_reason,
    until_released,
)
from tests.rigs.usbipd import RealUsbipd
from usbip_plugin.config.schema import Config, DeviceSelector, ResourceConfig, Selector
from usbip_plugin.locks import record
from usbip_plugin.locks.record import lock_of
from usbip_plugin.model import DeviceKey, Reason

STORAGE = 8


def first_twin(usbipd: RealUsbipd) -> Config:
    """The converter with the first serial number, wherever it is plugged in."""
    selector = Selector(vendor=0x0403, product=0x6001, serial=TWINS[0])
    return Config((ResourceConfig(SERIAL, (DeviceSelector(usbipd.key, selector),)),))


async def test_converters_that_change_places_are_known_by_what_they_tell(rig: KernelRig, monitor: Monitor) -> None:
    usbipd = rig.usbipd
    first, second = keys_of(usbipd, SERIAL)
    async with agent_with(first_twin(usbipd), first) as world:
        node = on(world)
        await until_lease(world.backend, second, lambda lease: lease is not None and lock_of(lease).serial == TWINS[1])
        await until_released(world, first, second)
        for number, serial in enumerate(TWINS):
            monitor.unplug(usbipd, number, serial)
        await until_reason(node, first, Reason.NOT_LISTED)
        assert monitor.plug(usbipd, 0, TWINS[0], second.busid.rpartition("-")[2]) == second.busid
        assert monitor.plug(usbipd, 1, TWINS[1], first.busid.rpartition("-")[2]) == first.busid
        await until_health(node, {first.id: False, second.id: True})
        await until_reason(node, first, Reason.MOVED)
        await node.admit(POD, {SERIAL: 1})
        assert serial_of(node, second) == TWINS[0]
        await end(world, POD, second)
        assert busy_rows() == ()


async def test_a_device_with_another_serial_number_than_the_promised_is_given_to_nobody(rig: KernelRig) -> None:
    usbipd = rig.usbipd
    first, second = keys_of(usbipd, SERIAL)
    async with agent_with(first_twin(usbipd), first) as world:
        node = on(world)
        known = await until_lease(
            world.backend,
            second,
            lambda lease: lease is not None and not lease.holder and lock_of(lease).serial == TWINS[1],
        )
        assert known is not None
        usbipd.unbind(first.busid)
        try:
            await until_reason(node, first, Reason.NOT_LISTED)
            # as of a server that gives another device the number that the one before it had
            world.backend.replace(replace(known, annotations={**known.annotations, record.SERIAL: TWINS[0]}))
            await until_health(node, {second.id: True})
            told = await refusal(node, SERIAL, second)
            assert f"{second.busid}: expected serial number {TWINS[0]}, got {TWINS[1]}" in told
            await until_released(world, second)
            assert busy_rows() == ()
            assert lock_of(world.backend.leases[second.id]).serial == TWINS[1]
            found = await until_reason(node, second, Reason.LISTED_WRONG)
            assert TWINS[1] in found.health.detail
        finally:
            usbipd.bind(first.busid)


async def test_a_disk_that_nobody_has_used_since_it_was_bound_is_selected_by_its_class(rig: KernelRig) -> None:
    usbipd = rig.usbipd
    disk = DeviceKey(usbipd.key, usbipd.busid(DISK))
    usbipd.unbind(disk.busid)
    usbipd.bind(disk.busid)
    (listed,) = (d for d in await rig.client.devlist(usbipd.key, timeout=5) if d.busid == disk.busid)
    selector = Selector(bus_id=disk.busid, class_=STORAGE)
    async with agent_with(Config((ResourceConfig("disk", (DeviceSelector(usbipd.key, selector),)),)), disk) as world:
        node = on(world)
        told = lock_of(world.backend.leases[disk.id]).interfaces if disk.id in world.backend.leases else None
        assert listed.interfaces or (told and told[0].class_ == STORAGE), "its server says so, or it was asked"
        await node.admit(POD, {"disk": 1})
        assert advertised(node, disk).health.reason is Reason.ATTACHED
        await end(world, POD, disk)
