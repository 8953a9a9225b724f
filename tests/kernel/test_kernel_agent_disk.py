"""Full file systems for port records and CDI specs."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from tests.kernel.kernel_rig import KernelRig
from tests.rigs.agent_rig import (
    PATIENCE_S,
    POD,
    SERIAL,
    advertised,
    agent,
    agent_with,
    allocate,
    attachment_of,
    busy_rows,
    config_of,
    end,
    keys_of,
    on,
    refusal,
    until_health,
    until_reason,
    until_released,
)
from tests.rigs.usbipd import RealUsbipd
from usbip_plugin.config.schema import Config, OnLoss
from usbip_plugin.model import DeviceKey, Reason

RECORDS = Path("/run/vhci_hcd")
FULL = "No space left on device; the file system is full: free some space"


class Disk:
    """A small file system that can be filled and emptied."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._ballast = path / "ballast"

    def fill(self) -> None:
        with self._ballast.open("wb", buffering=0) as file, contextlib.suppress(OSError):
            while True:
                file.write(b"x" * 4096)
        assert os.statvfs(self.path).f_bavail == 0

    def make_room(self) -> None:
        self._ballast.unlink()


@contextlib.contextmanager
def small_disk(path: Path) -> Iterator[Disk]:
    """Mounts a file system of 16 KiB for the length of the block."""
    path.mkdir(parents=True, exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16k", "tmpfs", str(path)], check=True)
    try:
        yield Disk(path)
    finally:
        subprocess.run(["umount", str(path)], check=True)


def by_cdi(usbipd: RealUsbipd) -> Config:
    (resource,) = config_of(usbipd, SERIAL).resources
    return Config((replace(resource, cdi=True, on_loss=OnLoss.RESTART),))


def paths_in(spec: Path) -> set[str]:
    (device,) = json.loads(spec.read_text(encoding="utf-8"))["devices"]
    return {node["hostPath"] for node in device["containerEdits"]["deviceNodes"]}


def leftovers(directory: Path) -> set[str]:
    return {path.name for path in directory.iterdir()} - {"ballast"}


async def test_a_full_disk_for_records_fails_the_allocate_and_leaves_nothing(rig: KernelRig) -> None:
    twin = keys_of(rig.usbipd, SERIAL)[0]
    with small_disk(RECORDS) as disk:
        async with agent_with(config_of(rig.usbipd, SERIAL), twin) as world:
            disk.fill()
            message = await refusal(on(world), SERIAL, twin)
            assert f"cannot write the port record {RECORDS}/port" in message
            assert FULL in message
            await until_released(world, twin)
            assert busy_rows() == ()
            assert leftovers(RECORDS) == set()
            disk.make_room()
            await until_health(on(world), {twin.id: True})
            assert (await allocate(on(world), SERIAL, twin)).devices, "the server lists it as free again"


async def test_a_full_disk_for_specs_fails_the_allocate_and_leaves_nothing(rig: KernelRig, tmp_path: Path) -> None:
    twin = keys_of(rig.usbipd, SERIAL)[0]
    with small_disk(tmp_path / "cdi") as disk:
        async with agent_with(by_cdi(rig.usbipd), twin, cdi=disk.path) as world:
            disk.fill()
            message = await refusal(on(world), SERIAL, twin)
            assert f"cannot write the CDI spec {disk.path}/usbip.dev-serial-{twin.id}.json: {FULL}" in message
            await until_released(world, twin)
            assert busy_rows() == ()
            assert leftovers(disk.path) == set()
            disk.make_room()
            await until_health(on(world), {twin.id: True})
            answer = await allocate(on(world), SERIAL, twin)
            assert [device.name for device in answer.cdi_devices] == [f"usbip.dev/serial={twin.id}-0"]
            assert not answer.devices


async def test_a_reattach_on_a_full_disk_succeeds_once_there_is_room(rig: KernelRig, tmp_path: Path) -> None:
    usbipd = rig.usbipd
    twin = keys_of(usbipd, SERIAL)[0]
    with small_disk(tmp_path / "cdi") as disk:
        async with agent_with(by_cdi(usbipd), twin, cdi=disk.path) as world:
            node = on(world)
            await node.admit(POD, {SERIAL: 1})
            (held,) = (DeviceKey(usbipd.key, c.key.busid) for c in agent(node).claims.view.values())
            spec = node.specs.file(SERIAL, held.id)
            before = paths_in(spec)
            disk.fill()
            usbipd.unbind(held.busid)
            await until_reason(node, held, Reason.LOST)
            usbipd.bind(held.busid)
            async with asyncio.timeout(PATIENCE_S):
                await node.advertised.until(lambda: "cannot write the CDI spec" in advertised(node, held).health.detail)
            assert len(busy_rows()) == 1, "the device is attached, without its spec"
            assert paths_in(spec) == before, "the complete old spec"
            disk.make_room()
            await until_health(node, {held.id: True})
            assert paths_in(spec) == {n.path for n in attachment_of(node, held).nodes}
            assert paths_in(spec) != before
            await end(world, POD, held)
            assert leftovers(disk.path) == set()
