"""The identity of real devices: serial numbers, classes, and devices that move to another bus ID."""

from __future__ import annotations

from dataclasses import replace

from tests.kernel.kernel_rig import DISK, TWINS, KernelRig, raw_tty
from tests.kernel.qemu_monitor import Monitor
from tests.rigs.agent_rig import (
    POD,
    SERIAL,
    advertised,
    agent,
    agent_with,
    arrives,
    busy_rows,
    config_of,
    end,
    keys_of,
    on,
    refusal,
    serial_of,
    tty_of,
    until_health,
    until_lease,
    until_pod_noted,
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
    """Selects the converter with the first serial number, at any bus ID."""
    selector = Selector(vendor=0x0403, product=0x6001, serial=TWINS[0])
    return Config((ResourceConfig(SERIAL, (DeviceSelector(usbipd.key, selector),)),))


async def test_converters_that_change_places_are_recognised_by_their_serial_numbers(
    rig: KernelRig, monitor: Monitor
) -> None:
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


async def test_a_device_with_an_unexpected_serial_number_is_not_allocated(rig: KernelRig) -> None:
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
            # like a server where another device has the device number of the first one
            world.backend.replace(replace(known, annotations={**known.annotations, record.SERIAL: TWINS[0]}))
            await until_health(node, {second.id: True})
            message = await refusal(node, SERIAL, second)
            assert f"{second.busid}: expected serial number {TWINS[0]}, got {TWINS[1]}" in message
            await until_released(world, second)
            assert busy_rows() == ()
            assert lock_of(world.backend.leases[second.id]).serial == TWINS[1]
            found = await until_reason(node, second, Reason.LISTED_WRONG)
            assert TWINS[1] in found.health.detail
        finally:
            usbipd.bind(first.busid)


async def test_a_disk_that_was_not_used_since_it_was_bound_is_selected_by_its_class(rig: KernelRig) -> None:
    usbipd = rig.usbipd
    disk = DeviceKey(usbipd.key, usbipd.busid(DISK))
    usbipd.unbind(disk.busid)
    usbipd.bind(disk.busid)
    found = await rig.client.devlist(usbipd.key, timeout=5)
    (listed,) = (device for device in found.devices if device.busid == disk.busid)
    selector = Selector(bus_id=disk.busid, class_=STORAGE)
    async with agent_with(Config((ResourceConfig("disk", (DeviceSelector(usbipd.key, selector),)),)), disk) as world:
        node = on(world)
        probed = lock_of(world.backend.leases[disk.id]).interfaces if disk.id in world.backend.leases else None
        assert listed.interfaces or (probed and probed[0].class_ == STORAGE), "from the list of the server, or probed"
        await node.admit(POD, {"disk": 1})
        assert advertised(node, disk).health.reason is Reason.ATTACHED
        await end(world, POD, disk)


async def test_a_device_plugged_in_elsewhere_is_re_attached_and_works(rig: KernelRig, monitor: Monitor) -> None:
    usbipd = rig.usbipd
    twins = keys_of(usbipd, SERIAL)
    async with agent_with(config_of(usbipd, SERIAL), *twins) as world:
        node = on(world)
        await node.admit(POD, {SERIAL: 2})
        await until_pod_noted(world.backend, *twins)
        monitor.unplug(usbipd, 0, TWINS[0])
        await until_reason(node, twins[0], Reason.LOST)
        moved = DeviceKey(usbipd.key, monitor.plug(usbipd, 0, TWINS[0]))
        assert moved != twins[0]
        await until_reason(node, twins[0], Reason.ATTACHED)
        assert serial_of(node, twins[0]) == TWINS[0]
        await until_reason(node, moved, Reason.IN_PLACE_OF)
        assert {world.backend.leases[key.id].holder for key in (moved, *twins)} == {node.name}
        assert moved.busid in usbipd.usbip_port()
        with raw_tty(tty_of(node, twins[0])) as one, raw_tty(tty_of(node, twins[1])) as other:
            assert await arrives(one, other, b"from its new port") == b"from its new port"
            assert await arrives(other, one, b"and to it") == b"and to it"
        rows = busy_rows()
        await node.stop()
        node.start()
        for key in twins:
            await until_reason(node, key, Reason.ATTACHED)
        assert busy_rows() == rows, "the next process adopts it"
        await until_reason(node, moved, Reason.IN_PLACE_OF)
        await end(world, POD, *twins, moved)
        assert busy_rows() == ()
        await until_reason(node, twins[0], Reason.NOT_LISTED)
        await until_health(node, {moved.id: True})


async def test_a_free_identical_device_is_not_re_attached_in_its_place(rig: KernelRig, monitor: Monitor) -> None:
    usbipd = rig.usbipd
    twins = keys_of(usbipd, SERIAL)
    async with agent_with(config_of(usbipd, SERIAL), *twins) as world:
        node = on(world)
        await node.admit(POD, {SERIAL: 1})
        (held,) = agent(node).claims.view.values()
        number = twins.index(held.key)
        other = twins[1 - number]
        await until_pod_noted(world.backend, held.key)
        monitor.unplug(usbipd, number, TWINS[number])
        await until_reason(node, held.key, Reason.LOST)
        moved = DeviceKey(usbipd.key, monitor.plug(usbipd, number, TWINS[number]))
        await until_reason(node, held.key, Reason.ATTACHED)
        assert serial_of(node, held.key) == TWINS[number]
        assert world.backend.leases[other.id].holder == ""
        assert usbipd.is_free(other.busid)
        await end(world, POD, held.key, moved)
