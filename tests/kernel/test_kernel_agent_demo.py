"""The demo, on the real kernel."""

from __future__ import annotations

import pytest

from tests.kernel.kernel_rig import KernelRig
from usbip_sim import demo


@pytest.mark.short
async def test_every_promise_of_the_demo_holds_on_a_real_kernel(rig: KernelRig) -> None:
    said: list[str] = []
    assert await demo.run(said.append, real_kernel=True), "\n".join(said)
