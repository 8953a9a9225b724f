"""Nodes that are frozen between the write of a lock and the import that it allows."""

from __future__ import annotations

import asyncio
import time

import pytest

from tests.power.devices import DURATION_S, STICK
from tests.power.guests import EMULATED_S
from tests.power.lab import Lab
from tests.power.nodes import Node, Pod
from tests.power.usb_server import ServerKind

TRIES = 10
"""Until a node is frozen between lock and import, for which it takes some hundredths of a second."""
TAKEOVER_S = DURATION_S + 10.0


async def frozen_before_import(lab: Lab, node: Node) -> tuple[float, asyncio.Task[Pod | str]]:
    """Freezes a node while it allocates the device. Returns when, and the Allocate."""
    key = lab.server.key(STICK)
    for _ in range(TRIES):
        allocate = asyncio.create_task(lab.admit(node, STICK))
        await lab.locks.until_held(key, node.name)
        frozen = await node.freeze()
        if not await lab.server.call("peers"):
            return frozen, allocate
        await node.thaw()
        pod = await allocate
        assert isinstance(pod, Pod), pod
        await lab.locks.until_pod(key, pod.reference)
        await lab.end(pod)
        await lab.until_offered(node, STICK)
    raise AssertionError(f"{node.name}: no freeze between lock and import in {TRIES} tries")


@pytest.mark.parametrize("kind", [ServerKind.EXPORTER], ids=lambda kind: kind.value, indirect=True)
async def test_a_late_import_is_refused_though_the_device_is_free(lab: Lab, kind: ServerKind) -> None:
    key = lab.server.key(STICK)
    frozen, late = await frozen_before_import(lab, lab.a)
    await lab.b.until(lambda: lab.b.health_of(STICK, key) is False, "the device is withdrawn")
    took = await lab.until_offered(lab.b, STICK) - frozen
    lab.note(f"{kind.value}: a node frozen between lock and import: offered elsewhere after", took)
    assert took <= TAKEOVER_S + EMULATED_S
    _, allocate = await frozen_before_import(lab, lab.b)
    began = time.monotonic()
    await lab.a.thaw()
    assert isinstance(await late, str), "the lock is another node's"
    await lab.b.thaw()
    pod = await allocate
    assert isinstance(pod, Pod), pod
    await lab.start_program(pod)
    assert lab.server.nodes_since(began) == {"node-b"}
