"""A plugin process killed while a container uses its devices, and the next process."""

from __future__ import annotations

import asyncio
import contextlib
import os
import tempfile
from collections.abc import AsyncIterator
from functools import partial
from pathlib import Path

import pytest

from tests.kernel.agent_reader import Reader, reading
from tests.kernel.kernel_rig import KernelRig, hubs_authorize, raw_tty
from tests.kernel.lease_socket import served
from tests.kernel.plugin_spawner import Spawner
from tests.rigs.agent_rig import (
    DISKS,
    DOMAIN,
    NODE,
    PATIENCE_S,
    POD,
    SERIAL,
    allocate_at,
    busy_rows,
    disk_of,
    keys_of,
    nodes_of,
    plugin_directory,
    pod_resources_socket,
    until_lease,
)
from tests.rigs.usbipd import eventually
from usbip_plugin.clock import SystemClock
from usbip_plugin.kubelet import deviceplugin_pb2 as pb
from usbip_plugin.locks.record import Lease
from usbip_plugin.model import DeviceKey
from usbip_sim.kubelet.device_manager import AdmissionError
from usbip_sim.kubelet.kubelet import FakeKubelet
from usbip_sim.leases import MemoryBackend, MemoryLeases

CONFIG = """\
resources:
  serial:
    - target: {{host: {key.host}, port: {key.port}}}
      selector: {{vendor: "0403", product: "6001"}}
  disk:
    - target: {{host: {key.host}, port: {key.port}}}
      selector: {{bus_id: "{disk}"}}
"""


class Node:
    """The parts of a node that outlive its plugin: kubelet, locks, devices."""

    def __init__(self, directory: Path, twins: tuple[DeviceKey, ...], disk: DeviceKey) -> None:
        self.directory, self.twins, self.disk = directory, twins, disk
        self.backend = MemoryBackend()
        self.leases, self.config = directory / "leases.sock", directory / "config.yaml"
        self.config.write_text(CONFIG.format(key=disk.server, disk=disk.busid))
        plugin_directory(directory).mkdir()
        self.kubelet = FakeKubelet(plugin_directory(directory), pod_resources_socket(directory))
        self.spawner = Spawner((self.config, directory, self.leases))

    @contextlib.asynccontextmanager
    async def plugin(self) -> AsyncIterator[int]:
        """Yields the pid of a plugin once the kubelet has all devices Healthy. Kills it at the end."""
        before = len(self.kubelet.seen.lists)
        async with self.spawner.plugin() as pid:
            async with asyncio.timeout(PATIENCE_S):
                for resource, keys in ((SERIAL, self.twins), (DISKS, (self.disk,))):
                    await self.kubelet.wait_for(f"{DOMAIN}/{resource}", {key.id: True for key in keys}.__eq__)
            self.first_lists = dict(reversed(self.kubelet.seen.lists[before:]))
            yield pid

    async def allocate_again(self) -> list[pb.ContainerAllocateResponse]:
        """Sends the Allocate of another container of the pod."""
        wanted = ((SERIAL, sorted(key.id for key in self.twins)), (DISKS, [self.disk.id]))
        return [await allocate_at(self.kubelet.directory, resource, *ids) for resource, ids in wanted]


@contextlib.asynccontextmanager
async def a_node(rig: KernelRig) -> AsyncIterator[Node]:
    with tempfile.TemporaryDirectory(prefix="usbip-") as directory:
        node = Node(Path(directory), keys_of(rig.usbipd, SERIAL), keys_of(rig.usbipd, DISKS)[0])
        async with node.kubelet, served(MemoryLeases(node.backend, SystemClock()), node.leases), node.spawner:
            yield node


def written_since(version: str, lease: Lease | None) -> bool:
    return lease is not None and lease.resource_version != version


async def both_read(tty: Reader, writer: int, disk: Reader, text: str) -> None:
    """Asserts that both devices pass data now."""
    os.write(writer, f"{text}\n".encode())
    await tty.until(lambda lines: lines[-1] == text)
    await disk.still_reads_disk()


@pytest.mark.short
async def test_a_pod_keeps_its_devices_when_its_plugin_is_killed_and_the_next_one_releases_them(rig: KernelRig) -> None:
    async with a_node(rig) as node, contextlib.AsyncExitStack() as pod:
        names = [f"{DOMAIN}/{SERIAL}", f"{DOMAIN}/{DISKS}"]
        async with node.plugin():
            got = await node.kubelet.admit(POD, {names[0]: 2, names[1]: 1})
            first = await node.allocate_again()
            rows, leases = busy_rows(), dict(node.backend.leases)
            assert len(rows) == 3
            serial = got["app", names[0]]
            tty = await pod.enter_async_context(reading("tty", serial.envs["USBIP_SERIAL_0_TTY"]))
            writer = pod.enter_context(raw_tty(serial.envs["USBIP_SERIAL_1_TTY"]))
            disk = await pod.enter_async_context(reading("disk", disk_of(got["app", names[1]])))
            await both_read(tty, writer, disk, "with the first plugin")

        await both_read(tty, writer, disk, "without a plugin")
        assert busy_rows() == rows

        async with node.plugin():
            assert node.first_lists[names[0]] == {key.id: True for key in node.twins}
            assert node.first_lists[names[1]] == {node.disk.id: True}
            before = {key: node.backend.leases[key.id].resource_version for key in (*node.twins, node.disk)}
            assert await node.allocate_again() == first
            await both_read(tty, writer, disk, "with the second plugin")
            assert tty.lines == ["open", "with the first plugin", "without a plugin", "with the second plugin"]
            assert busy_rows() == rows
            for key in (*node.twins, node.disk):
                lease = node.backend.leases[key.id]
                assert (lease.holder, lease.transitions) == (NODE, leases[key.id].transitions)
            await pod.aclose()
            for key, version in before.items():  # the pod is noted again
                await until_lease(node.backend, key, partial(written_since, version))
            node.kubelet.end(POD)
            for key in (*node.twins, node.disk):
                await until_lease(node.backend, key, lambda lease: lease is not None and lease.holder == "")
            assert busy_rows() == ()


async def test_a_plugin_killed_while_it_attaches_leaves_nothing_behind(rig: KernelRig) -> None:
    wanted = {f"{DOMAIN}/{DISKS}": 1}
    async with a_node(rig) as node:
        async with node.plugin():
            admission = asyncio.create_task(node.kubelet.admit(POD, wanted))
            await asyncio.to_thread(eventually, lambda: bool(busy_rows()), "a port is taken")
        with pytest.raises(AdmissionError):
            await admission
        assert node.backend.leases[node.disk.id].holder == NODE

        async with node.plugin():
            await until_lease(node.backend, node.disk, lambda lease: lease is not None and lease.holder == "")
            assert busy_rows() == ()
            assert hubs_authorize()
            got = await node.kubelet.admit(POD, wanted)
            assert nodes_of(got["app", f"{DOMAIN}/{DISKS}"])
