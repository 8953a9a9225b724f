"""Random pods for the soak test, and disturbances."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import random
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from tests.e2e.cluster import ClusterView, Object, failed
from tests.e2e.conftest import COUNTS, Place
from tests.e2e.workloads import pod, pod_spec

WORKERS = 4
LONGEST_LIFE_S = 8.0
DELETED = 0.3
"""Share of pods that are deleted at a random moment instead of ending by themselves."""
POD_LIMIT_S = 240.0
"""Seconds until a pod has ended, longer than a restarted plugin or three earlier pods may take."""
# exits with 1 if a read of the device fails before or after the wait
_SCRIPT = """
trap 'exit 0' TERM
look() {{ for device in {devices}; do [ "$(head -c 4 "$device" | wc -c)" -eq 4 ] || exit 1; done; }}
look; sleep {life} & wait $!; look
"""
REFUSED = ("UnexpectedAdmissionError", "OutOf")
"""Reasons of a pod that a kubelet refused: none of its containers ran."""
INTERRUPTED = "context canceled"
"""Part of the message of a container that was not started because its kubelet ended. Its program never ran."""


@dataclass
class Tally:
    """Counts of pods that ran, were deleted, were refused, or were interrupted by a restart of the kubelet."""

    ends: Counter[str] = field(default_factory=Counter)
    messages: Counter[str] = field(default_factory=Counter)
    failed: list[str] = field(default_factory=list)
    """Pods whose container could not read its device."""

    @property
    def total(self) -> int:
        return self.ends.total()


class Load:
    """WORKERS pods at a time, each with a random resource, count, node and lifetime."""

    def __init__(self, cluster: ClusterView, image: str, place: Place, rng: random.Random) -> None:
        self._cluster, self._image, self._rng = cluster, image, rng
        self._places = (place.a, place.b, None)
        self._count = 0
        self.tally = Tally()

    async def run(self, go_on: Callable[[], bool]) -> None:
        """Runs pods while go_on() holds, and waits until the last ones are gone."""
        async with asyncio.TaskGroup() as group:
            for _ in range(WORKERS):
                group.create_task(self._worker(go_on))

    async def _worker(self, go_on: Callable[[], bool]) -> None:
        while go_on():
            self._count += 1
            await self._one(f"soak-{self._count}")

    async def _one(self, name: str) -> None:
        rng = self._rng
        resource = rng.choice(sorted(COUNTS))
        count, life = rng.randint(1, COUNTS[resource]), rng.uniform(0, LONGEST_LIFE_S)
        spec = pod_spec(self._image, resource, count, node=rng.choice(self._places))
        spec["restartPolicy"] = "Never"
        devices = " ".join(f'"$USBIP_{resource.upper()}_{n}_DEVICE"' for n in range(count))
        script = _SCRIPT.format(devices=devices, life=f"{life:.1f}")
        spec["containers"][0]["command"] = ["sh", "-c", script]
        deleted = rng.random() < DELETED
        await self._cluster.create("pods", pod(name, spec))
        if deleted:
            await asyncio.sleep(rng.uniform(0, LONGEST_LIFE_S))
            one = await self._cluster.get("pods", name)
            end = self._judge(one) if failed(one) else "deleted"
        else:
            end = self._judge(await self._cluster.pod(name, _ended, "ended", limit=POD_LIMIT_S))
        await self._cluster.delete("pods", name, grace=rng.choice((1, 5)))
        await self._cluster.gone(name, limit=POD_LIMIT_S)
        self.tally.ends[end] += 1

    def _judge(self, one: Object) -> str:
        status: dict[str, Any] = one["status"]
        if status["phase"] == "Succeeded":
            return "ran"
        reason, message = str(status.get("reason", "")), str(status.get("message", ""))
        if reason.startswith(REFUSED):
            self.tally.messages[f"{reason}: {message[:160]}"] += 1
            return "refused"
        ended = [container.get("state", {}).get("terminated", {}) for container in status.get("containerStatuses", ())]
        if any(state.get("reason") == "StartError" and INTERRUPTED in state.get("message", "") for state in ended):
            return "interrupted"
        self.tally.failed.append(f"{one['metadata']['name']}: {reason} {message} {status.get('containerStatuses')}")
        return "failed"


def _ended(one: Object) -> bool:
    return one["status"].get("phase") in {"Succeeded", "Failed"}


async def disturb(
    actions: Sequence[tuple[str, Callable[[], Awaitable[None]]]], every: float, rng: random.Random, stop: asyncio.Event
) -> Counter[str]:
    """Runs the actions in turn until stop is set, about `every` seconds apart. Returns how often each ran."""
    done: Counter[str] = Counter()
    for name, action in itertools.cycle(actions):
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(rng.uniform(0.5, 1.5) * every):
                await stop.wait()
            break
        await action()
        done[name] += 1
    return done
