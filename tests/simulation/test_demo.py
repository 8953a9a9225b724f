"""The demo as a test: real gRPC on unix sockets and USB/IP over TCP."""

from usbip_sim import demo


async def test_every_promise_of_the_demo_holds() -> None:
    lines: list[str] = []
    held = await demo.run(lines.append)
    assert held, "\n".join(lines)
    assert any("promises held" in line for line in lines)
