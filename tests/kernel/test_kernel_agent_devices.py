"""The agent with real devices: device nodes of an Allocate can be opened, and bytes pass."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.kernel.kernel_rig import TWINS, KernelRig, raw_tty
from tests.rigs.agent_rig import (
    DISKS,
    FAST,
    KEYS,
    POD,
    SERIAL,
    admitted,
    agent_with,
    arrives,
    busy_rows,
    config_of,
    disk_of,
    end,
    exist,
    keys_of,
    nodes_of,
    on,
    row_hub,
    until_released,
)
from usbip_plugin.model import PodRef
from usbip_sim import demo


@pytest.mark.short
async def test_identical_devices_go_to_different_pods_and_bytes_pass(rig: KernelRig) -> None:
    usbipd = rig.usbipd
    twins = keys_of(usbipd, SERIAL)
    first, second = PodRef("default", "first"), PodRef("default", "second")
    async with agent_with(config_of(usbipd, SERIAL), *twins) as world:
        node = on(world)
        got = [await admitted(node, SERIAL, pod=pod) for pod in (first, second)]
        for allocation in got:
            assert allocation.envs["USBIP_SERIAL_0_TTY"] in nodes_of(allocation)
        serials = {a.envs["USBIP_SERIAL_0_BUSID"]: a.envs["USBIP_SERIAL_0_SERIAL"] for a in got}
        assert serials == {usbipd.busid(serial): serial for serial in TWINS}
        assert not nodes_of(got[0]).keys() & nodes_of(got[1]).keys()
        one, other = (allocation.envs["USBIP_SERIAL_0_TTY"] for allocation in got)
        with raw_tty(one) as a, raw_tty(other) as b:
            assert await arrives(a, b, b"from the first pod") == b"from the first pod"
            assert await arrives(b, a, bytes(range(256))) == bytes(range(256))
        node.end(first)
        (ended,) = [key for key in twins if key.id in got[0].device_ids]
        await until_released(world, ended)
        assert not exist([one])
        assert len(busy_rows()) == 1
        with raw_tty(other):
            pass  # the device of the other pod stays
        await end(world, second, *(key for key in twins if key != ended))
        assert busy_rows() == ()


@pytest.mark.parametrize(
    ("resource", "image", "hub"), [(DISKS, "disk-hs.img", "hs"), (FAST, "disk-ss.img", "ss")], ids=["high", "super"]
)
async def test_a_disk_is_read_and_written_and_has_a_port_of_its_speed(
    rig: KernelRig, resource: str, image: str, hub: str
) -> None:
    backing = Path("/vmrun") / image
    async with agent_with(config_of(rig.usbipd, resource), *keys_of(rig.usbipd, resource)) as world:
        node = on(world)
        path = disk_of(await admitted(node, resource))
        assert row_hub(busy_rows()) == hub
        written = os.urandom(512)
        disk = os.open(path, os.O_RDWR)
        try:
            assert os.pread(disk, 512, 0) == backing.read_bytes()[:512]
            os.pwrite(disk, written, 8192)
            os.fsync(disk)
        finally:
            os.close(disk)
        assert backing.read_bytes()[8192:8704] == written
        await end(world, POD, *keys_of(rig.usbipd, resource))
    assert busy_rows() == ()


async def test_a_keyboard_brings_its_event_and_raw_nodes(rig: KernelRig) -> None:
    async with agent_with(config_of(rig.usbipd, KEYS), *keys_of(rig.usbipd, KEYS)) as world:
        node = on(world)
        paths = nodes_of(await admitted(node, KEYS))
        kinds = {Path(path).name.rstrip("0123456789") for path in paths}
        assert {"hidraw", "event", ""} <= kinds, paths
        for path in paths:
            os.close(os.open(path, os.O_RDWR | os.O_NONBLOCK))


@pytest.mark.short
async def test_every_promise_of_the_demo_holds_on_a_real_kernel(rig: KernelRig) -> None:
    lines: list[str] = []
    assert await demo.run(lines.append, real_kernel=True), "\n".join(lines)
