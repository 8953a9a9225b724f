"""The count of nodes that run the plugin: rare small requests, and a safe assumption without an answer."""

from __future__ import annotations

import asyncio
import logging
import random
from typing import Any

import pytest

from tests.rigs.api_double import ApiDouble
from tests.rigs.tasks import background
from usbip_plugin.errors import KubeForbidden, KubeUnreachable
from usbip_plugin.kube.fleet import (
    COUNT_INTERVAL_S,
    COUNT_TIMEOUT_S,
    MAX_NAMED,
    RETRY_MAX_S,
    UNCOUNTED,
    Fleet,
    FleetCount,
    count_pods,
)
from usbip_sim.virtual.loop import SimClock, virtual

A, B = ({"spec": {"nodeName": name}} for name in ("a", "b"))


@pytest.mark.parametrize(
    ("answer", "fleet"),
    [
        ({"items": [A, B, B], "metadata": {}}, Fleet(3, frozenset({"a", "b"}))),
        (
            {"items": [{**A, "status": {"hostIP": "10.0.0.1"}}, A, {**B, "status": {"hostIP": 7}}], "metadata": {}},
            Fleet(3, frozenset({"a", "b"}), {"a": "10.0.0.1"}),
        ),
        ({"items": [A], "metadata": {"remainingItemCount": 199}}, Fleet(200)),
        ({"items": [{}, {"spec": None}, {"spec": {"nodeName": 7}}, None], "metadata": {}}, Fleet(4)),
        ({"items": [], "metadata": {}}, Fleet(0)),
        ({"items": None, "metadata": None}, Fleet(0)),
        ({"items": [A], "metadata": {"remainingItemCount": -7}}, Fleet(1, frozenset({"a"}))),
        ({"items": [A], "metadata": {"remainingItemCount": "many"}}, Fleet(1, frozenset({"a"}))),
    ],
)
def test_one_list_has_the_number_of_pods_and_the_names_and_addresses_of_few_nodes(
    answer: dict[str, Any], fleet: Fleet
) -> None:
    api = ApiDouble(answer=lambda _call: answer)
    assert asyncio.run(count_pods(api, "usbip-system")) == fleet
    (call,) = api.calls
    assert (call.verb, call.path) == ("list", "/api/v1/namespaces/usbip-system/pods")
    assert call.params == {"limit": str(MAX_NAMED)}


class Counting:
    """A FleetCount of `there` nodes. None: no answer. An error: the answer is that error."""

    def __init__(self) -> None:
        self.there: int | Exception | None = 7
        self.counts = 0
        self.fleet = FleetCount(self.count, SimClock(asyncio.get_running_loop()), random.Random(1))

    async def count(self) -> Fleet:
        self.counts += 1
        if self.there is None:
            await asyncio.Event().wait()
        if isinstance(self.there, Exception):
            raise self.there
        assert self.there is not None
        return Fleet(self.there)


@virtual
async def test_the_nodes_are_counted_at_the_start_and_twice_an_hour() -> None:
    c = Counting()
    async with background(c.fleet.run()):
        await c.fleet.known()
        assert (c.fleet.nodes, c.counts) == (7, 1)
        c.there = 9
        await asyncio.sleep(24 * 3600)
        assert c.fleet.nodes == 9
        assert 24 * 3600 / COUNT_INTERVAL_S / 1.2 - 1 <= c.counts <= 24 * 3600 / COUNT_INTERVAL_S / 0.8 + 1


@virtual
async def test_a_count_of_zero_means_this_node() -> None:
    c = Counting()
    c.there = 0
    async with background(c.fleet.run()):
        await c.fleet.known()
        assert c.fleet.nodes == 1


@virtual
async def test_without_an_answer_the_wait_is_short_and_the_fleet_counts_as_large(
    caplog: pytest.LogCaptureFixture,
) -> None:
    c = Counting()
    c.there = None
    loop = asyncio.get_running_loop()
    with caplog.at_level(logging.WARNING, "usbip_plugin.kube.fleet"):
        async with background(c.fleet.run()):
            await c.fleet.known()
            assert loop.time() <= COUNT_TIMEOUT_S + 0.01
            assert c.fleet.nodes == UNCOUNTED
            await asyncio.sleep(600)
    assert [record.getMessage() for record in caplog.records] == ["node count unknown"]
    async with background(c.fleet.run()):
        c.there = 3
        await asyncio.sleep(COUNT_TIMEOUT_S + 3)
        assert c.fleet.nodes == 3


@virtual
async def test_the_last_count_stays_while_counting_fails(caplog: pytest.LogCaptureFixture) -> None:
    c = Counting()
    async with background(c.fleet.run()):
        await c.fleet.known()
        with caplog.at_level(logging.DEBUG, "usbip_plugin.kube.fleet"):
            for error in (KubeUnreachable("list", "pods", "refused"), KubeForbidden("list", "pods", "no")):
                c.there = error
                await asyncio.sleep(COUNT_INTERVAL_S * 2)
                assert c.fleet.nodes == 7
        assert not caplog.records, "others log an unreachable API server"
        c.there = 8
        await asyncio.sleep(RETRY_MAX_S * 1.2)
        assert c.fleet.nodes == 8
