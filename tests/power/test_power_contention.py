"""Two nodes that admit pods for one device at the same moment."""

from __future__ import annotations

import asyncio
import time

from tests.power.devices import DISK, STICK
from tests.power.lab import Lab
from tests.power.nodes import Pod
from tests.power.usb_server import ServerKind

ROUNDS = 50


async def test_one_of_two_allocates_wins_each_round(lab: Lab, kind: ServerKind) -> None:
    reader = await lab.use(lab.a, DISK)
    key = lab.server.key(STICK)
    wins = {node.name: 0 for node in lab.nodes}
    began = time.monotonic()
    for number in range(ROUNDS):
        results = await asyncio.gather(*(lab.admit(node, STICK) for node in lab.nodes))
        winners = [result for result in results if isinstance(result, Pod)]
        assert len(winners) == 1, f"round {number}: {results}"
        (winner,) = winners
        wins[winner.node.name] += 1
        await lab.server.until_exported_to("node-a", winner.node.name)
        await lab.locks.until_pod(key, winner.reference)
        assert lab.locks.holder(key) == winner.node.name
        await lab.end(winner)
        for node in lab.nodes:
            await lab.until_offered(node, STICK)
    lab.note(f"{kind.value}: {ROUNDS} contended Allocates, wins {wins}", time.monotonic() - began)
    await reader.rounds_after(time.monotonic())
    assert reader.program.losses == 0
