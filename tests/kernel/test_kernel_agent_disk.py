"""A file system without room where port records or CDI specs are: real ones, filled to the last byte."""

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
    """A small file system, filled and emptied."""

    def __init__(self, place: Path) -> None:
        self.place = place
        self._ballast = place / "ballast"

    def fill(self) -> None:
        with self._ballast.open("wb", buffering=0) as file, contextlib.suppress(OSError):
            while True:
                file.write(b"x" * 4096)
        assert os.statvfs(self.place).f_bavail == 0

    def make_room(self) -> None:
        self._ballast.unlink()


@contextlib.contextmanager
def small_disk(place: Path) -> Iterator[Disk]:
    """Mounted there for the length of the block."""
    place.mkdir(parents=True, exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16k", "tmpfs", str(place)], check=True)
    try:
        yield Disk(place)
    finally:
        subprocess.run(["umount", str(place)], check=True)


def by_cdi(usbipd: RealUsbipd) -> Config:
    (resource,) = config_of(usbipd, SERIAL).resources
    return Config((replace(resource, cdi=True, on_loss=OnLoss.RESTART),))


def paths_in(spec: Path) -> set[str]:
    (device,) = json.loads(spec.read_text(encoding="utf-8"))["devices"]
    return {node["hostPath"] for node in device["containerEdits"]["deviceNodes"]}


def leftovers(place: Path) -> set[str]:
    return {path.name for path in place.iterdir()} - {"ballast"}


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
            assert (await allocate(on(world), SERIAL, twin)).devices, "the server had it free again"


async def test_a_full_disk_for_specs_fails_the_allocate_and_leaves_nothing(rig: KernelRig, tmp_path: Path) -> None:
    twin = keys_of(rig.usbipd, SERIAL)[0]
    with small_disk(tmp_path / "cdi") as disk:
        async with agent_with(by_cdi(rig.usbipd), twin, cdi=disk.place) as world:
            disk.fill()
            message = await refusal(on(world), SERIAL, twin)
            assert f"cannot write the CDI spec {disk.place}/usbip.dev-serial-{twin.id}.json: {FULL}" in message
            await until_released(world, twin)
            assert busy_rows() == ()
            assert leftovers(disk.place) == set()
            disk.make_room()
            await until_health(on(world), {twin.id: True})
            answer = await allocate(on(world), SERIAL, twin)
            assert [device.name for device in answer.cdi_devices] == [f"usbip.dev/serial={twin.id}-0"]
            assert not answer.devices


async def test_a_full_disk_at_a_reattach_is_over_when_there_is_room(rig: KernelRig, tmp_path: Path) -> None:
    usbipd = rig.usbipd
    twin = keys_of(usbipd, SERIAL)[0]
    with small_disk(tmp_path / "cdi") as disk:
        async with agent_with(by_cdi(usbipd), twin, cdi=disk.place) as world:
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
            assert len(busy_rows()) == 1, "it is attached, and waits for its spec"
            assert paths_in(spec) == before, "the old one, whole"
            disk.make_room()
            await until_health(node, {held.id: True})
            assert paths_in(spec) == {n.path for n in attachment_of(node, held).nodes}
            assert paths_in(spec) != before
            await end(world, POD, held)
            assert leftovers(disk.place) == set()
