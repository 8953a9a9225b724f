"""The state of vhci_hcd for programs."""

from __future__ import annotations

import pytest

from usbip_plugin.errors import DriverMissing, KernelUnsupported, SimulatedKernelMissing, VhciError
from usbip_plugin.inventory.conditions import unusable


@pytest.mark.parametrize(
    ("error", "module"),
    [
        (DriverMissing("/sys/devices/platform/vhci_hcd.0"), "missing"),
        (SimulatedKernelMissing("/run/kernel.sock", "no such file"), "missing"),
        (KernelUnsupported("4.4", "no status file"), "unusable"),
        (VhciError("cannot read nports"), "unusable"),
    ],
)
def test_a_driver_that_cannot_be_used_is_missing_or_unusable(error: VhciError, module: str) -> None:
    found = unusable(error)
    assert (found.error, found.module, found.free_hs, found.free_ss) == (str(error), module, 0, 0)
