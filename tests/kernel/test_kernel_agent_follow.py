"""A serial converter that a pod has is pulled out and plugged in elsewhere: another bus id, the same serial number."""

from __future__ import annotations

from tests.kernel.kernel_rig import TWINS, KernelRig, raw_tty
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
    serial_of,
    tty_of,
    until_health,
    until_pod_noted,
    until_reason,
)
from usbip_plugin.model import DeviceKey, Reason


async def test_a_device_plugged_in_elsewhere_is_attached_from_there_and_works(rig: KernelRig, monitor: Monitor) -> None:
    usbipd = rig.usbipd
    twins = keys_of(usbipd, SERIAL)
    async with agent_with(config_of(usbipd, SERIAL), *twins) as world:
        node = on(world)
        await node.admit(POD, {SERIAL: 2})
        await until_pod_noted(world.backend, *twins)
        monitor.unplug(usbipd, 0, TWINS[0])
        await until_reason(node, twins[0], Reason.LOST)
        place = DeviceKey(usbipd.key, monitor.plug(usbipd, 0, TWINS[0]))
        assert place != twins[0]
        await until_reason(node, twins[0], Reason.ATTACHED)
        assert serial_of(node, twins[0]) == TWINS[0]
        await until_reason(node, place, Reason.IN_PLACE_OF)
        assert {world.backend.leases[key.id].holder for key in (place, *twins)} == {node.name}
        assert place.busid in usbipd.usbip_port()
        with raw_tty(tty_of(node, twins[0])) as one, raw_tty(tty_of(node, twins[1])) as other:
            assert await arrives(one, other, b"from its new place") == b"from its new place"
            assert await arrives(other, one, b"and to it") == b"and to it"
        rows = busy_rows()
        await node.stop()
        node.start()
        await until_health(node, {key.id: True for key in twins})
        assert busy_rows() == rows, "its successor adopts it there"
        assert advertised(node, place).health.reason is Reason.IN_PLACE_OF
        await end(world, POD, *twins, place)
        assert busy_rows() == ()
        await until_reason(node, twins[0], Reason.NOT_LISTED)
        await until_health(node, {place.id: True})


async def test_an_identical_device_that_is_free_is_not_taken_for_it(rig: KernelRig, monitor: Monitor) -> None:
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
        place = DeviceKey(usbipd.key, monitor.plug(usbipd, number, TWINS[number]))
        await until_reason(node, held.key, Reason.ATTACHED)
        assert serial_of(node, held.key) == TWINS[number]
        assert world.backend.leases[other.id].holder == ""
        assert usbipd.is_free(other.busid)
        await end(world, POD, held.key, place)
