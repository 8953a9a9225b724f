"""The agent beside other programs on its kernel and server: their attachments stay unchanged."""

from __future__ import annotations

import contextlib

from tests.kernel.kernel_rig import TWINS, KernelRig
from tests.rigs.agent_rig import (
    KEYS,
    POD,
    SERIAL,
    admitted,
    agent,
    agent_with,
    allocate,
    attach_by_hand,
    busy_rows,
    config_of,
    end,
    keys_of,
    nodes_of,
    on,
    refusal,
    serial_of,
    until_health,
    until_pod_noted,
    until_reason,
    until_released,
)
from tests.rigs.usbipd import eventually
from usbip_plugin.model import Reason


async def test_attachments_of_others_are_neither_adopted_nor_changed(rig: KernelRig) -> None:
    usbipd = rig.usbipd
    (keyboard,), twins = keys_of(usbipd, KEYS), keys_of(usbipd, SERIAL)
    attach_by_hand(usbipd, keyboard.busid)
    foreign = busy_rows()
    async with agent_with(config_of(usbipd, SERIAL, KEYS), *twins) as world:
        node = on(world)
        await node.admit(POD, {SERIAL: 2})
        assert set(foreign) < set(busy_rows())
        assert keyboard.id not in agent(node).claims.view
        assert keyboard.id not in world.backend.leases
        await end(world, POD, *twins)
        assert busy_rows() == foreign
        await node.stop()
        assert busy_rows() == foreign
        node.start()
        await until_health(node, {key.id: True for key in twins})
        assert busy_rows() == foreign
    assert busy_rows() == foreign


async def test_an_identical_device_on_the_port_of_a_lost_one_is_not_adopted(rig: KernelRig) -> None:
    usbipd = rig.usbipd
    twins = keys_of(usbipd, SERIAL)
    async with agent_with(config_of(usbipd, SERIAL), *twins) as world:
        node = on(world)
        got = await admitted(node, SERIAL)
        (ours,) = [key for key in twins if key.id in got.device_ids]
        (other,) = [key for key in twins if key != ours]
        await until_pod_noted(world.backend, ours)
        (row,) = busy_rows()
        await node.stop()
        usbipd.usbip("detach", "-p", row.split()[1])
        eventually(lambda: busy_rows() == (), "detached by hand")
        attach_by_hand(usbipd, other.busid)
        (foreign,) = busy_rows()
        assert foreign.split()[1] == row.split()[1], "the same port"
        node.start()
        await until_reason(node, ours, Reason.ATTACHED)
        assert foreign in busy_rows()
        assert serial_of(node, ours) == got.envs["USBIP_SERIAL_0_SERIAL"]
        await end(world, POD, ours)
        assert busy_rows() == (foreign,)


async def test_a_device_in_use_by_another_client_is_refused_with_the_cause(rig: KernelRig) -> None:
    twins = keys_of(rig.usbipd, SERIAL)
    async with agent_with(config_of(rig.usbipd, SERIAL), *twins) as world:
        node = on(world)
        with contextlib.closing(await rig.import_serial(TWINS[0])):
            message = await refusal(node, SERIAL, twins[0])
            assert str(rig.usbipd.key) in message
            assert twins[0].busid in message
            assert "in use by another client" in message
            await until_released(world, twins[0])
            await until_reason(node, twins[0], Reason.NOT_LISTED)
            assert nodes_of(await admitted(node, SERIAL))
            assert world.backend.leases[twins[1].id].holder == node.name
        await until_health(node, {twins[0].id: True})
        assert (await allocate(node, SERIAL, twins[0])).devices
