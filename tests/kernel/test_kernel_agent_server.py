"""The agent while a real USB/IP server dies, loses a device or becomes silent."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import subprocess
from collections.abc import Iterator

import pytest

from tests.kernel.kernel_rig import KernelRig, raw_tty
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
from tests.rigs.tcp_proxy import proxy_to
from tests.rigs.usbipd import RealUsbipd
from usbip_plugin.model import DeviceKey, Reason, ServerKey

SHORT_TIMEOUT_S = 4.0
"""allocateTimeout that an Allocate must exceed."""


@pytest.fixture
def second_usbipd(real_usbipd: RealUsbipd) -> Iterator[RealUsbipd]:
    """Yields a usbipd with the devices under another port, which is another server for the plugin."""
    other = RealUsbipd(real_usbipd.key.port + 1)
    other.start()
    yield other
    other.stop()


@pytest.mark.short
async def test_attached_devices_outlive_usbipd(rig: KernelRig) -> None:
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
async def test_a_device_unbound_and_bound_again_is_re_attached(rig: KernelRig) -> None:
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
            assert not stuck.done(), "the disk waited for the frozen server"
        finally:
            signal_usbipd(usbipd, signal.SIGCONT)
        assert exist(device.host_path for device in (await stuck).devices)


@contextlib.contextmanager
def frozen_host(server: ServerKey) -> Iterator[None]:
    """Drops all packets to and from the server, also answers of its kernel."""
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


async def test_keepalive_detects_a_frozen_host_whose_device_stays_locked_and_comes_back(
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
            # the host has received nothing, and usbipd sets no keepalive: it still has the old connection
            assert not usbipd.is_free(keyboard.busid)
        # an import from the same port ends that
        await until_health(node, {keyboard.id: True})
        lock = world.backend.leases[keyboard.id]
        assert (lock.holder, lock.transitions) == (node.name, epoch), "the node has kept its lock"
        await end(world, POD, keyboard)


async def test_a_silent_connection_ends_within_the_timeout(rig: KernelRig) -> None:
    usbipd = rig.usbipd
    async with proxy_to(usbipd.key.port) as proxy:
        server = ServerKey("127.0.0.1", proxy.port)
        (disk,) = (DeviceKey(server, key.busid) for key in keys_of(usbipd, DISKS))
        config = config_of(usbipd, DISKS, allocate_timeout=SHORT_TIMEOUT_S, servers={DISKS: server})
        async with agent_with(config, disk) as world:
            node = on(world)
            proxy.flowing.clear()
            message = await refusal(node, DISKS, disk)
            assert str(disk.server) in message
            assert disk.busid in message
            assert "import" in message.lower(), message
            await until_released(world, disk)
            await until_reason(node, disk, Reason.SERVER_UNREACHABLE)
