"""A server that loses its power while two nodes have its devices, and returns."""

from __future__ import annotations

import time

from tests.power.devices import DISK, STICK
from tests.power.lab import Lab
from tests.power.usb_server import ServerKind

BACK_S = 10.0
"""Seconds from the moment at which the server exports a device again until its pod uses it."""
AWAY_S = 10.0


async def returned(lab: Lab, kind: ServerKind, what: str) -> None:
    """Cuts the server's power and starts it again; both pods must have their devices then."""
    pods = [await lab.use(lab.a, DISK), await lab.use(lab.b, STICK)]
    keys = [lab.server.key(pod.resource) for pod in pods]
    dead = await lab.server.cut_power()
    for pod in pods:
        await pod.node.until(lambda pod=pod: pod.program.losses, "its program has lost the device")  # type: ignore[misc]
    lab.note(f"{kind.value}: {what}: noticed by both nodes after", time.monotonic() - dead)
    if what == "renumbered":
        lab.server.first_port += 2
    await lab.start_server(kind)
    serving = time.monotonic()
    for pod in pods:
        back = lab.note(f"{kind.value}: {what}: {pod.resource} in use again after", await pod.rounds_after(serving))
        assert back <= BACK_S
    assert lab.server.now.nodes() == ["node-a", "node-b"]
    assert [lab.locks.holder(key) for key in keys] == ["node-a", "node-b"]


async def test_a_server_that_was_without_power(lab: Lab, kind: ServerKind) -> None:
    await returned(lab, kind, "server without power")


async def test_a_server_that_was_rebooted_and_gives_its_devices_other_bus_ids(lab: Lab, kind: ServerKind) -> None:
    before = {lab.server.key(resource) for resource in (STICK, DISK)}
    await returned(lab, kind, "renumbered")
    assert not before & {lab.server.key(resource) for resource in (STICK, DISK)}
