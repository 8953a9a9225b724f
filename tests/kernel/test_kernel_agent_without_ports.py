"""The agent on a node whose port table is full. The last of its kind: what fills the table stalls hubs for seconds."""

from __future__ import annotations

from agent_rig import (
    DISKS,
    agent_with,
    attach_by_hand,
    busy_rows,
    config_of,
    keys_of,
    on,
    refusal,
    until_health,
    until_reason,
    until_released,
)
from kernel_rig import TWINS, KernelRig

from usbip_plugin.model import Reason


async def test_a_full_port_table_is_said_and_ends_when_a_port_is_free(rig: KernelRig) -> None:
    usbipd = rig.usbipd
    (disk,) = keys_of(usbipd, DISKS)
    attach_by_hand(usbipd, usbipd.busid(TWINS[1]))
    (last,) = busy_rows()
    await rig.fill("hs")
    full = busy_rows()
    async with agent_with(config_of(usbipd, DISKS)) as world:
        node = on(world)
        await node.until(DISKS, lambda known: known == {disk.id: False})
        await until_reason(node, disk, Reason.NO_PORT)
        message = await refusal(node, DISKS, disk)
        assert f"all {len(full)} hs ports of vhci_hcd are in use" in message
        await until_released(world, disk)
        assert busy_rows() == full
        usbipd.usbip("detach", "-p", last.split()[1])
        await until_health(node, {disk.id: True})
