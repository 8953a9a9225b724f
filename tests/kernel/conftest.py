"""Fixtures for tests on a real kernel with vhci_hcd and usbip-host, which tests/lab/guest/run.sh -u runs."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator, Iterator

import pytest

pytest.register_assert_rewrite("tests.rigs.vhci_contract")

from tests.kernel.kernel_rig import ALL, TWINS, KernelRig  # noqa: E402
from tests.kernel.qemu_monitor import Monitor  # noqa: E402
from tests.rigs.tested_with import ran_with  # noqa: E402
from tests.rigs.usbipd import RealUsbipd, kernel_version  # noqa: E402


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("kernel")
    group.addoption("--kills", default="5", help="how often the plugin is killed at a random moment")
    group.addoption("--soak-seconds", default="15", help="for how long devices are attached and detached")
    group.addoption("--kills-seed", default="1", help="which moments these are")


@pytest.fixture(scope="session")
def usbipd_host(pytestconfig: pytest.Config) -> Iterator[RealUsbipd]:
    """Binds the guest's devices to usbip-host. Skips the test elsewhere, as it rebinds USB devices."""
    if "GUEST_TOOLS" not in os.environ:
        pytest.skip("runs in the guest only: tests/lab/guest/run.sh -u")
    usbipd = RealUsbipd()
    usbipd.load_modules()
    for serial in ALL:
        usbipd.bind(usbipd.busid(serial))
    ran_with(pytestconfig, "server", usbipd.version())
    ran_with(pytestconfig, "kernel", kernel_version())
    yield usbipd
    usbipd.stop()


@pytest.fixture
def real_usbipd(usbipd_host: RealUsbipd) -> RealUsbipd:
    """Returns a running usbipd with all devices bound."""
    for serial in ALL:
        usbipd_host.bind(usbipd_host.busid(serial))
    if not usbipd_host.running:
        usbipd_host.start()
    return usbipd_host


@pytest.fixture
async def rig(real_usbipd: RealUsbipd) -> AsyncIterator[KernelRig]:
    """Yields the rig, and detaches every port afterwards."""
    async with asyncio.TaskGroup() as group:
        rig = KernelRig(real_usbipd, group)
        yield rig
        await rig.close()


@pytest.fixture
def monitor(real_usbipd: RealUsbipd) -> Iterator[Monitor]:
    """Yields QEMU's monitor, and plugs every converter in at its old place afterwards."""
    before = {serial: real_usbipd.busid(serial) for serial in TWINS}
    with contextlib.closing(Monitor()) as found:
        yield found
        now = real_usbipd.busids()
        moved = [serial for serial in TWINS if now.get(serial) != before[serial]]
        for serial in moved:
            if serial in now:
                found.unplug(real_usbipd, TWINS.index(serial), serial)
        for serial in moved:
            found.plug(real_usbipd, TWINS.index(serial), serial, before[serial].rpartition("-")[2])
