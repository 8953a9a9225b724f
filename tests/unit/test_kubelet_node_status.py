"""Publishing allocatable: the latest counts, only our keys, never in the way."""

import asyncio
import random
from typing import Any, Self

from usbip_plugin.errors import KubeError, KubeForbidden, KubeUnreachable
from usbip_plugin.kubelet.node_status import NodeStatusPublisher, allocatable, status_patch
from usbip_plugin.model import Advertised, DeviceKey, Health, Reason, ServerKey
from usbip_plugin.sim.loop import SimClock, virtual

STORAGE, MODEM = "usbip.dev/storage", "usbip.dev/modem"
PATCH_S = 0.02


class Api:
    """Takes PATCH_S for each patch; raises what is in `errors` first."""

    def __init__(self) -> None:
        self.allocatable: dict[str, str] = {"cpu": "4", STORAGE: "1"}
        self.patches: list[dict[str, Any]] = []
        self.errors: list[KubeError] = []

    async def request(
        self,
        verb: str,
        path: str,
        *,
        resource: str,
        body: Any = None,
        content_type: str = "application/json",
        timeout: float,
    ) -> dict[str, Any]:
        assert (verb, path, resource) == ("patch", "/api/v1/nodes/node-a/status", "nodes/status")
        assert content_type == "application/merge-patch+json"
        await asyncio.sleep(PATCH_S)
        self.patches.append(body)
        if self.errors:
            raise self.errors.pop(0)
        self.allocatable.update(body["status"]["allocatable"])
        return {}


class Running:
    """A publisher whose worker runs for the length of the block."""

    def __init__(self) -> None:
        self.api = Api()
        self.publisher = NodeStatusPublisher(self.api, "node-a", SimClock(asyncio.get_running_loop()), random.Random(1))

    async def __aenter__(self) -> Self:
        self.task = asyncio.create_task(self.publisher.run())
        return self

    async def __aexit__(self, *_: object) -> None:
        self.task.cancel()
        await asyncio.wait([self.task])
        assert self.task.cancelled()


def test_the_patch_names_our_resources_only_and_counts_are_quantities() -> None:
    assert status_patch({STORAGE: 0, MODEM: 12}) == {"status": {"allocatable": {MODEM: "12", STORAGE: "0"}}}


def test_allocatable_counts_what_is_healthy_in_use_or_not() -> None:
    key = DeviceKey(ServerKey("10.0.0.1"), "1-1")
    reasons = [Reason.FREE, Reason.ATTACHED, Reason.HELD_ELSEWHERE, Reason.UNKNOWN]
    assert allocatable(Advertised(r.name, key, Health(r)) for r in reasons) == 2


@virtual
async def test_publish_now_returns_when_the_node_says_so() -> None:
    async with Running() as r:
        assert await r.publisher.publish_now({STORAGE: 0}, 1.0)
        assert r.api.allocatable == {"cpu": "4", STORAGE: "0"}


@virtual
async def test_what_is_written_already_is_not_written_again() -> None:
    async with Running() as r:
        for _ in range(3):
            assert await r.publisher.publish_now({STORAGE: 0}, 1.0)
            await asyncio.sleep(10 * PATCH_S)
        assert len(r.api.patches) == 1
        r.publisher.forget(STORAGE)
        assert await r.publisher.publish_now({STORAGE: 0}, 1.0)
        assert len(r.api.patches) == 2


@virtual
async def test_a_burst_becomes_few_patches_and_the_last_count_stands() -> None:
    async with Running() as r:
        for count in range(100):
            r.publisher.publish({STORAGE: count, MODEM: 1})
            await asyncio.sleep(PATCH_S / 10)
        assert await r.publisher.publish_now({STORAGE: 7}, 1.0)
        assert r.api.allocatable == {"cpu": "4", STORAGE: "7", MODEM: "1"}
        assert len(r.api.patches) < 20


@virtual
async def test_a_count_that_changes_during_its_patch_is_written_too() -> None:
    async with Running() as r:
        r.publisher.publish({STORAGE: 0})
        await asyncio.sleep(PATCH_S / 2)
        r.publisher.publish({STORAGE: 1})
        r.publisher.publish({STORAGE: 0})
        r.publisher.publish({STORAGE: 3})
        await asyncio.sleep(1)
        assert r.api.allocatable[STORAGE] == "3"


@virtual
async def test_errors_are_counted_and_tried_again_and_publish_now_is_bounded() -> None:
    async with Running() as r:
        r.api.errors = [KubeUnreachable("patch", "nodes/status", "refused")] * 20
        loop = asyncio.get_running_loop()
        start = loop.time()
        assert not await r.publisher.publish_now({STORAGE: 0}, 1.0)
        assert loop.time() - start <= 1.01
        await asyncio.sleep(300)
        assert r.api.allocatable[STORAGE] == "0"
        assert r.publisher.errors == 20
        assert r.publisher.last_error is None


@virtual
async def test_forbidden_costs_an_allocate_nothing() -> None:
    async with Running() as r:
        r.api.errors = [KubeForbidden("patch", "nodes/status", "no")]
        loop = asyncio.get_running_loop()
        assert not await r.publisher.publish_now({STORAGE: 0}, 1.0)
        start = loop.time()
        assert not await r.publisher.publish_now({STORAGE: 2}, 1.0)
        assert loop.time() == start
        assert "patch" in (r.publisher.last_error or "")
        assert "nodes/status" in (r.publisher.last_error or "")
        await asyncio.sleep(120)
        assert r.api.allocatable[STORAGE] == "2"


@virtual
async def test_an_urgent_count_does_not_wait_out_a_backoff() -> None:
    async with Running() as r:
        r.api.errors = [KubeUnreachable("patch", "nodes/status", "refused")] * 8
        r.publisher.publish({STORAGE: 1})
        await asyncio.sleep(20)
        r.api.errors.clear()
        assert await r.publisher.publish_now({STORAGE: 0}, 2 * PATCH_S)
