"""The agent on a node without free ports. Runs last, as connections that fill ports may stall hubs for seconds."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path

from tests.kernel.kernel_rig import LIMIT_S, TWINS, KernelRig
from tests.rigs.agent_rig import (
    DISKS,
    FAST,
    POD,
    STATUS_FILES,
    admitted,
    agent_with,
    attach_by_hand,
    busy_rows,
    config_of,
    end,
    keys_of,
    nodes_of,
    on,
    refusal,
    until_health,
    until_reason,
    until_released,
    used,
)
from usbip_plugin.model import DeviceKey, PodRef, Reason, UsbId
from usbip_plugin.vhci.sysfs import PortStatus, format_attach, write_sysfs
from usbip_sim.server.server import VirtualServer
from usbip_sim.server.usbdevice import HIGH_SPEED, SUPER_SPEED, VirtualDevice

PORTS = 240
"""Ports of the guest's kernel: 8 controllers with 15 high-speed and 15 SuperSpeed ports."""
CONTROLLER = Path("/sys/devices/platform/vhci_hcd.0")
SPEED = {"hs": HIGH_SPEED, "ss": SUPER_SPEED}
ENUMERATED_S = 240.0
STICK = UsbId(0x0951, 0x1666)
OTHER_POD = PodRef("default", "other")


@contextlib.asynccontextmanager
async def all_ports_taken(rig: KernelRig) -> AsyncIterator[None]:
    """Attaches a virtual device to every free port of every controller, without the plugin."""
    free = [port for port in await rig.plugin().ports() if port.status is PortStatus.NULL]
    sticks = {port.number: VirtualDevice(f"9-{port.number}", STICK, speed=SPEED[port.hub]) for port in free}
    server = VirtualServer(sticks.values(), reset_time=0)
    await server.start()
    try:
        for number, stick in sticks.items():
            imported = await rig.client.import_device(DeviceKey(server.key, stick.busid), timeout=LIMIT_S)
            text = format_attach(number, imported.sock.fileno(), imported.descriptor.devid, stick.speed)
            await asyncio.to_thread(write_sysfs, CONTROLLER / "attach", text)
            imported.close()
        async with asyncio.timeout(ENUMERATED_S):
            while len(used()) < PORTS:  # noqa: ASYNC110 (a uevent comes before the row says so)
                await asyncio.sleep(0.5)
        yield
        await rig.clean()
    finally:
        await server.stop()


def controllers() -> int:
    """Returns the number of controllers, which have one status file each."""
    return len(list(Path("/sys").glob(STATUS_FILES)))


def rows_by_number() -> dict[int, list[str]]:
    """Returns the fields of each used port: hub, port, status, speed, device, socket, local bus ID."""
    return {int(fields[1]): fields for fields in (row.split() for row in busy_rows())}


async def test_without_a_free_port_every_device_has_the_reason_until_one_is_free(rig: KernelRig) -> None:
    usbipd = rig.usbipd
    disk, fast = keys_of(usbipd, DISKS)[0], keys_of(usbipd, FAST)[0]
    async with all_ports_taken(rig):
        rows = rows_by_number()
        assert sorted(rows) == list(range(PORTS))
        assert controllers() == 8
        ports = {
            port.number: [port.hub, port.status, port.speed, port.devid, port.local_busid]
            for port in await rig.plugin().ports()
        }
        assert ports == {n: [r[0], PortStatus.USED, int(r[3]), int(r[4], 16), r[6]] for n, r in rows.items()}
        assert {r[0]: int(r[3]) for r in rows.values()} == SPEED
        assert len({r[6] for r in rows.values()}) == PORTS, "each port has its own device"
        async with agent_with(config_of(usbipd, DISKS, FAST)) as world:
            node = on(world)
            for resource, key, hub in ((DISKS, disk, "hs"), (FAST, fast, "ss")):
                await until_health(node, {key.id: False})
                await until_reason(node, key, Reason.NO_PORT)
                assert f"all {PORTS // 2} {hub} ports of vhci_hcd are in use" in await refusal(node, resource, key)
                await until_released(world, key)
            assert rows_by_number() == rows
            for resource, key, hub, pod in ((DISKS, disk, "hs", POD), (FAST, fast, "ss", OTHER_POD)):
                # in the middle of the table
                freed = [number for number, fields in rows.items() if fields[0] == hub][50]
                usbipd.usbip("detach", "-p", str(freed))
                await until_health(node, {key.id: True})
                assert nodes_of(await admitted(node, resource, pod=pod))
                now = rows_by_number()
                assert now.pop(freed)[0] == hub
                del rows[freed]
                assert {n: fields for n, fields in now.items() if n in rows} == rows
            await end(world, POD, disk)
            await end(world, OTHER_POD, fast)
            assert rows_by_number() == rows


async def test_a_full_hub_is_reported_until_a_port_is_free(rig: KernelRig) -> None:
    usbipd = rig.usbipd
    (disk,) = keys_of(usbipd, DISKS)
    attach_by_hand(usbipd, usbipd.busid(TWINS[1]))
    (last,) = busy_rows()
    await rig.fill("hs")
    full = busy_rows()
    async with agent_with(config_of(usbipd, DISKS)) as world:
        node = on(world)
        await until_health(node, {disk.id: False})
        await until_reason(node, disk, Reason.NO_PORT)
        message = await refusal(node, DISKS, disk)
        assert f"all {len(full)} hs ports of vhci_hcd are in use" in message
        await until_released(world, disk)
        assert busy_rows() == full
        usbipd.usbip("detach", "-p", last.split()[1])
        await until_health(node, {disk.id: True})
