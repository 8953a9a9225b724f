"""The demo as a test: real gRPC on unix sockets and USB/IP over TCP."""

import pytest

from usbip_plugin.errors import DriverMissing
from usbip_sim import demo


async def test_every_promise_of_the_demo_holds() -> None:
    lines: list[str] = []
    held = await demo.run(lines.append)
    assert held, "\n".join(lines)
    assert any("promises held" in line for line in lines)


async def test_a_real_kernel_without_the_module_ends_the_demo_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    class NoModule:
        async def ports(self) -> None:
            raise DriverMissing("/sys/devices/platform/vhci_hcd.0")

    monkeypatch.setattr(demo, "SysfsVhci", lambda *_, **__: NoModule())
    lines: list[str] = []
    with pytest.raises(DriverMissing, match="modprobe vhci-hcd"):
        await demo.run(lines.append, real_kernel=True)
    assert lines == []
