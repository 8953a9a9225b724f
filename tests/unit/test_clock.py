"""The clock of the operating system."""

import time

import pytest

from usbip_plugin.clock import SystemClock


def test_the_monotonic_clock_goes_on_while_the_machine_is_suspended(monkeypatch: pytest.MonkeyPatch) -> None:
    """After an hour of suspend, an import window that was open before is over (R1)."""
    after_suspend = {time.CLOCK_MONOTONIC: 10.0, time.CLOCK_BOOTTIME: 3610.0}
    monkeypatch.setattr(time, "clock_gettime", after_suspend.__getitem__)
    monkeypatch.setattr(time, "monotonic", lambda: after_suspend[time.CLOCK_MONOTONIC])
    assert SystemClock().monotonic() == 3610.0
