"""Log lines of a cluster: none while nothing changes, and each with its trace id."""

from __future__ import annotations

import asyncio
import io
import json
import logging
from collections.abc import Iterator

import pytest

from tests.simulation.cluster_rig import (
    DONGLE,
    cluster,
    dongle,
    key,
    one_stick,
    pod,
    resource,
    server,
    spec,
    stick,
    two_sticks,
)
from tests.simulation.trace_stories import Story, life, played, pod_known
from usbip_plugin.attach.monitor import PORT_CHECK_INTERVAL
from usbip_plugin.model import Reason
from usbip_plugin.observe import logs
from usbip_plugin.observe.logs import PACKAGES, set_up_logging
from usbip_sim.virtual.steploop import stepped

HOUR, SHORT_HOUR = 3600.0, 900.0
"""Seconds without a log line, in the long form and in the short form."""
DEFAULT_LEVEL = "info"


class Written(io.StringIO):
    """Log lines that a test reads while they are written."""

    def lines(self) -> list[dict[str, object]]:
        """Returns the lines since the last call."""
        found = [json.loads(line) for line in self.getvalue().splitlines()]
        self.seek(0)
        self.truncate()
        return found


@pytest.fixture
def idle_s(long_form: bool) -> float:
    return HOUR if long_form else SHORT_HOUR


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> Iterator[Written]:
    """Collects all that the process logs at the default level."""
    root, packages = logging.getLogger(), [logging.getLogger(name) for name in PACKAGES]
    levels = [logger.level for logger in (root, *packages)]
    stream = Written()
    # all nodes of the simulation write to it
    monkeypatch.setattr(logs, "LINES", 10 * logs.LINES)
    handler = set_up_logging(DEFAULT_LEVEL, stream)
    yield stream
    root.removeHandler(handler)
    for logger, level in zip((root, *packages), levels, strict=True):
        logger.setLevel(level)


def test_an_idle_hour_writes_nothing(written: Written, idle_s: float) -> None:
    """Three nodes have a device in use, a free one, and one that is unplugged while a pod has it."""

    async def hour(story: Story) -> None:
        lab = server("lab", stick("1-1"), stick("1-2"), dongle("2-1"))
        resources = resource("stick", [lab]), resource("dongle", [lab], DONGLE)
        async with cluster(story.traced(spec([lab], *resources, nodes=3))) as c:
            a, lost = c["node-a"], key(lab, "2-1")
            await c.all_healthy(key(lab, "1-1"), key(lab, "1-2"))
            await c.all_healthy(lost, name="dongle")
            assert await a.admit(pod("p"), "stick") is None
            assert await a.admit(pod("q"), "dongle") is None
            await pod_known(c, "node-a", "p")
            for name in ("node-b", "node-c"):
                await c.becomes(c[name], lost, healthy=False)
            lab.unplug(lost.busid)
            await c.becomes(a, lost, healthy=False)
            await asyncio.sleep(60)
            assert len(written.lines()) > 10, "these events are logged"
            await asyncio.sleep(idle_s)
            assert written.lines() == []

    played(hour)


def test_a_device_that_another_node_takes_and_releases_is_not_logged(written: Written) -> None:
    """Each of thousands of nodes sees every handover."""

    async def handover(story: Story) -> None:
        async with one_stick(nodes=3, change=story.traced) as (c, _lab, device):
            node = await c.taken(device)
            for name in ("node-b", "node-c"):
                await c.becomes(c[name], device, healthy=False)
            node.end(pod("p"))
            for name in ("node-a", "node-b", "node-c"):
                await c.becomes(c[name], device, healthy=True, within=20)
            lines = written.lines()
            assert [line for line in lines if line.get("reason") == Reason.HELD_ELSEWHERE.value] == []
            (released,) = (n for n, line in enumerate(lines) if line["msg"] == "device released")
            assert len([line for line in lines[released:] if line["msg"] == "device healthy"]) == 1, (
                "on the node that had it"
            )

    played(handover)


def test_a_server_that_does_not_answer_is_logged_once(written: Written, idle_s: float) -> None:
    async def hour(story: Story) -> None:
        async with one_stick(nodes=1, change=story.traced) as (c, lab, device):
            await c.admitted(device)
            await lab.stop()
            await asyncio.sleep(60)
            texts = [line["msg"] for line in written.lines()]
            assert texts.count("server does not answer") == 1
            await asyncio.sleep(idle_s)
            assert written.lines() == []

    played(hour)


def test_an_unreachable_api_server_is_logged_once_by_each_client(written: Written, idle_s: float) -> None:
    async def hour(story: Story) -> None:
        async with two_sticks(nodes=1, change=story.traced) as (c, *_rest):
            a = c["node-a"]
            assert await a.admit(pod("p"), "stick") is None
            await pod_known(c, "node-a", "p")
            written.lines()
            a.partition(cut=True)
            await asyncio.sleep(120)
            texts = [str(line["msg"]) for line in written.lines() if line["level"] == "warn"]
            assert sorted(text.partition(";")[0] for text in texts) == [
                "allocatable not published on the node",
                "lock watch failed, will retry",
                "session heartbeat failed",
            ]
            await asyncio.sleep(idle_s)
            assert written.lines() == []

    played(hour)


def test_every_log_line_about_a_device_in_use_has_its_trace_id(written: Written) -> None:
    story = played(life)
    (trace,) = {span.trace_id for span in story.spans}
    lines = written.lines()
    of_device = ("devices allocated", "attachment lost", "device re-attached", "device released", "device unhealthy")
    assert {line["msg"] for line in lines} >= set(of_device)
    assert {line.get("trace_id") for line in lines if line["msg"] in of_device} == {trace}
    spans = {span.span_id: span.name for span in story.spans}
    named = {str(line["msg"]): spans.get(str(line.get("span_id"))) for line in lines}
    assert (named["devices allocated"], named["device re-attached"], named["device released"]) == (
        "Allocate",
        "re-attach",
        "release",
    )
    assert all("trace_id" not in line for line in lines if line["msg"] == "server answers")


@stepped
async def test_ports_that_cannot_be_read_are_logged_once_until_they_can(written: Written) -> None:
    async with one_stick() as (c, _lab, device):
        node = await c.taken(device)
        for _ in range(2):
            written.lines()
            node.kernel.loaded = False
            await asyncio.sleep(6 * PORT_CHECK_INTERVAL)
            assert [line["msg"] for line in written.lines()].count("cannot read vhci ports") == 1
            node.kernel.loaded = True
            await asyncio.sleep(2 * PORT_CHECK_INTERVAL)
