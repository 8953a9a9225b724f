"""The agent while a real server dies, loses a device, or goes silent."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import subprocess
from collections.abc import Iterator

import pytest

from tests.kernel.kernel_rig import KernelRig, raw_tty
from tests.kernel.silent_proxy import SilentProxy
from tests.rigs.agent_rig import (
    DISKS,
    KEYS,
    PATIENCE_S,
    POD,
    SERIAL,
    admitted,
    advertised,
    agent_with,
    allocate,
    arrives,
    busy_rows,
    config_of,
    end,
    exist,
    keys_of,
    on,
    refusal,
    signal_usbipd,
    tty_of,
    until_health,
    until_lease,
    until_pod_noted,
    until_reason,
    until_released,
)
from tests.rigs.usbipd import RealUsbipd
from usbip_plugin.model import DeviceKey, Reason, ServerKey

SHORT_TIMEOUT_S = 4.0
"""allocateTimeout where an Allocate must run into it."""


@pytest.fixture
def second_usbipd(real_usbipd: RealUsbipd) -> Iterator[RealUsbipd]:
    """The same devices under another port: another server as far as the plugin can tell."""
    other = RealUsbipd(real_usbipd.key.port + 1)
    other.start()
    yield other
    other.stop()


@pytest.mark.short
async def test_a_dead_usbipd_takes_nothing_that_is_attached(rig: KernelRig) -> None:
    usbipd = rig.usbipd
    twins, (disk,) = keys_of(usbipd, SERIAL), keys_of(usbipd, DISKS)
    async with agent_with(config_of(usbipd, SERIAL, DISKS), *twins, disk) as world:
        node = on(world)
        allocation = await admitted(node, SERIAL, 2)
        before = busy_rows()
        usbipd.kill()
        await until_reason(node, disk, Reason.SERVER_UNREACHABLE)
        ttys = [allocation.envs[f"USBIP_SERIAL_{n}_TTY"] for n in range(2)]
        with raw_tty(ttys[0]) as one, raw_tty(ttys[1]) as other:
            assert await arrives(one, other, b"usbipd is dead") == b"usbipd is dead"
        assert [advertised(node, key).health.reason for key in twins] == [Reason.ATTACHED] * 2
        usbipd.start()
        await until_health(node, {disk.id: True})
        assert busy_rows() == before
        await end(world, POD, *twins)
        assert busy_rows() == ()


@pytest.mark.short
async def test_a_device_unbound_and_bound_again_comes_back_by_itself(rig: KernelRig) -> None:
    usbipd = rig.usbipd
    twins = keys_of(usbipd, SERIAL)
    async with agent_with(config_of(usbipd, SERIAL), *twins) as world:
        node = on(world)
        await node.admit(POD, {SERIAL: 2})
        usbipd.unbind(twins[0].busid)
        lost = await until_reason(node, twins[0], Reason.LOST)
        assert str(usbipd.key) in lost.health.detail
        assert world.backend.leases[twins[0].id].holder == node.name
        usbipd.bind(twins[0].busid)
        await until_health(node, {twins[0].id: True})
        assert len(busy_rows()) == 2
        with raw_tty(tty_of(node, twins[0])) as one, raw_tty(tty_of(node, twins[1])) as other:
            assert await arrives(one, other, b"back again") == b"back again"
        await end(world, POD, *twins)
        assert busy_rows() == ()


async def test_a_frozen_server_delays_nobody_else(rig: KernelRig, second_usbipd: RealUsbipd) -> None:
    usbipd = rig.usbipd
    (disk,) = keys_of(second_usbipd, DISKS)
    twin = keys_of(usbipd, SERIAL)[0]
    config = config_of(usbipd, SERIAL, DISKS, allocate_timeout=PATIENCE_S, servers={DISKS: second_usbipd.key})
    async with agent_with(config, twin, disk) as world:
        node = on(world)
        signal_usbipd(usbipd, signal.SIGSTOP)
        try:
            stuck = asyncio.create_task(allocate(node, SERIAL, twin))
            # an import follows the lock
            await until_lease(world.backend, twin, lambda lease: lease is not None and lease.holder == node.name)
            answer = await allocate(node, DISKS, disk)
            assert exist(device.host_path for device in answer.devices)
            assert not stuck.done(), "the disk had to wait for the frozen server"
        finally:
            signal_usbipd(usbipd, signal.SIGCONT)
        assert exist(device.host_path for device in (await stuck).devices)


@contextlib.contextmanager
def frozen_host(server: ServerKey) -> Iterator[None]:
    """Nothing comes to the server and nothing from it, not even what its kernel would answer."""
    for module in ("nf_tables", "nft_compat", "xt_tcpudp"):
        subprocess.run(["modprobe", module], check=True)
    rules = [
        ["INPUT", "-i", "lo", "-p", "tcp", f"--{end}", str(server.port), "-j", "DROP"] for end in ("dport", "sport")
    ]
    for rule in rules:
        subprocess.run(["iptables", "-I", *rule], check=True)
    try:
        yield
    finally:
        for rule in rules:
            subprocess.run(["iptables", "-D", *rule], check=True)


async def test_a_frozen_host_is_found_out_by_keepalive_and_its_device_stays_locked(
    rig: KernelRig, second_usbipd: RealUsbipd
) -> None:
    usbipd = rig.usbipd
    (disk,), (keyboard,) = keys_of(second_usbipd, DISKS), keys_of(usbipd, KEYS)
    config = config_of(usbipd, KEYS, DISKS, servers={DISKS: second_usbipd.key})
    async with agent_with(config, keyboard, disk) as world:
        node = on(world)
        await node.admit(POD, {KEYS: 1})
        await until_pod_noted(world.backend, keyboard)
        epoch = world.backend.leases[keyboard.id].transitions
        with frozen_host(usbipd.key):
            await until_reason(node, keyboard, Reason.LOST)
            assert busy_rows() == ()
            assert (await allocate(node, DISKS, disk)).devices
        # the host has heard nothing of all that, and usbipd sets no keepalive: to it the old connection stands
        await until_reason(node, keyboard, Reason.LOST)
        assert not usbipd.is_free(keyboard.busid)
        usbipd.drop(keyboard.busid)
        await until_health(node, {keyboard.id: True})
        lock = world.backend.leases[keyboard.id]
        assert (lock.holder, lock.transitions) == (node.name, epoch), "the same lock all along"
        await end(world, POD, keyboard)


async def test_a_silent_connection_ends_within_the_timeout(rig: KernelRig) -> None:
    usbipd = rig.usbipd
    async with SilentProxy(usbipd.key) as proxy:
        (disk,) = (DeviceKey(proxy.key, key.busid) for key in keys_of(usbipd, DISKS))
        config = config_of(usbipd, DISKS, allocate_timeout=SHORT_TIMEOUT_S, servers={DISKS: proxy.key})
        async with agent_with(config, disk) as world:
            node = on(world)
            proxy.mute()
            message = await refusal(node, DISKS, disk)
            assert str(disk.server) in message
            assert disk.busid in message
            assert "import" in message.lower(), message
            await until_released(world, disk)
            await until_reason(node, disk, Reason.SERVER_UNREACHABLE)
