"""The poller of USB/IP servers, in virtual time on virtual servers."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import random
from collections.abc import AsyncIterator
from dataclasses import replace

import pytest

from tests.rigs.tasks import background, virtual_with
from usbip_plugin.model import DeviceKey, ServerKey, UsbId
from usbip_plugin.usbip.client import DeviceList, TcpUsbipClient
from usbip_plugin.usbip.poller import (
    FIRST_RETRY,
    MAX_RATE,
    MAX_RETRY,
    POLL_INTERVAL,
    POLL_TIMEOUT,
    SECOND_LOOK,
    ExportState,
    NodeCount,
    ServerFlaw,
    ServerPoller,
    ServerState,
    ServerView,
    share,
)
from usbip_sim.server.server import VirtualServer
from usbip_sim.server.usbdevice import VirtualDevice
from usbip_sim.virtual.loop import SimClock, virtual
from usbip_sim.virtual.network import Host, Network
from usbip_sim.virtual.tcp import MemoryConnector

LATENCY = 0.001
STICK = VirtualDevice("1-1", UsbId(1, 1))
TWIN = VirtualDevice("1-2", UsbId(1, 1))


class RecordingClient(TcpUsbipClient):
    """A client that records the times of its polls."""

    def __init__(self, clock: SimClock, connector: MemoryConnector, polls: dict[ServerKey, list[float]]) -> None:
        super().__init__(clock, connector)
        self._now, self._polls = clock.monotonic, polls

    async def devlist(self, server: ServerKey, *, timeout: float) -> DeviceList:
        self._polls[server].append(self._now())
        return await super().devlist(server, timeout=timeout)


class Lab:
    """Servers and a poller, with the times of all polls and the changes that the poller reported."""

    def __init__(self, servers: int = 1, seed: int = 0, fleet: NodeCount | None = None) -> None:
        self.clock = SimClock(asyncio.get_running_loop())
        self.servers = [
            VirtualServer([TWIN, STICK], f"server-{n}", 3240, clock=self.clock, listen=False) for n in range(servers)
        ]
        self.keys = [server.key for server in self.servers]
        by_key = {server.key: server for server in self.servers}
        network = Network(by_key.get, lambda: LATENCY)
        self.polls: dict[ServerKey, list[float]] = {key: [] for key in self.keys}
        self.node = RecordingClient(self.clock, MemoryConnector(network, Host("node")), self.polls)
        self.changes: list[ServerView] = []
        self.poller = ServerPoller(self.node, self.clock, random.Random(seed), fleet=fleet)
        self.poller.subscribe(self.changes.append)
        self.poller.set_servers(frozenset(self.keys))

    def gaps(self, key: ServerKey) -> list[float]:
        times = self.polls[key]
        return [later - earlier for earlier, later in itertools.pairwise(times)]

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[Lab]:
        for server in self.servers:
            await server.start()
        async with background(self.poller.run()):
            yield self


one_server = virtual_with(lambda: Lab(1).running())
three_servers = virtual_with(lambda: Lab(3).running())


@virtual
async def test_a_server_is_pending_until_its_first_poll() -> None:
    lab = Lab()
    assert lab.poller.views == {lab.keys[0]: ServerView(lab.keys[0])}
    async with lab.running():
        await lab.clock.sleep(1)
        view = lab.poller.views[lab.keys[0]]
        assert view.state is ServerState.REACHABLE
        assert [device.busid for device in view.devices] == ["1-1", "1-2"]
        assert lab.changes == [view]


@one_server
async def test_only_changes_are_reported(lab: Lab) -> None:
    await lab.clock.sleep(60)
    assert len(lab.changes) == 1
    lab.servers[0].unplug("1-1")
    await lab.clock.sleep(POLL_INTERVAL * 1.2 + 1)
    assert [len(view.devices) for view in lab.changes] == [2, 1]


@one_server
async def test_an_odd_entry_hides_nothing_and_is_reported_once_until_it_changes(
    lab: Lab, caplog: pytest.LogCaptureFixture
) -> None:
    await lab.clock.sleep(1)
    lab.servers[0].plug(replace(STICK, busid="1-7", speed=9))
    await lab.clock.sleep(60)
    lab.servers[0].unplug("1-1")
    await lab.clock.sleep(60)
    lab.servers[0].plug(replace(STICK, busid="1-8", speed=9))
    await lab.clock.sleep(60)
    lab.servers[0].unplug("1-7")
    lab.servers[0].unplug("1-8")
    await lab.clock.sleep(60)
    seven, eight = ("1-7: speed 9 is not a valid USB speed", "1-8: speed 9 is not a valid USB speed")
    seen = [(len(view.devices), view.problems) for view in lab.changes]
    assert seen == [(2, ()), (2, (seven,)), (1, (seven,)), (1, (seven, eight)), (1, ())]
    warned = [vars(record) for record in caplog.records if record.levelno == logging.WARNING]
    assert [(one["problems"], one["count"]) for one in warned] == [((seven,), 1), ((seven, eight), 2)]


@one_server
async def test_polls_keep_their_interval_with_jitter(lab: Lab) -> None:
    await lab.clock.sleep(300)
    gaps = lab.gaps(lab.keys[0])
    assert min(gaps) >= POLL_INTERVAL * 0.8
    assert max(gaps) <= POLL_INTERVAL * 1.2 + 1
    assert len({round(gap, 3) for gap in gaps}) > len(gaps) / 2


@three_servers
async def test_a_dead_server_delays_no_other(lab: Lab) -> None:
    lab.servers[0].freeze()
    await lab.servers[1].stop()
    await lab.clock.sleep(120)
    assert len(lab.polls[lab.keys[2]]) >= 120 / (POLL_INTERVAL * 1.2 + 1)
    states = [lab.poller.views[key].state for key in lab.keys]
    assert states == [ServerState.UNREACHABLE, ServerState.UNREACHABLE, ServerState.REACHABLE]


@one_server
async def test_the_first_failure_is_reported_with_the_last_list_and_the_reason(lab: Lab) -> None:
    await lab.clock.sleep(1)
    await lab.servers[0].stop()
    await lab.clock.sleep(POLL_INTERVAL * 1.2)
    view = lab.changes[-1]
    assert (view.state, view.failures) == (ServerState.UNREACHABLE, 1)
    assert [device.busid for device in view.devices] == ["1-1", "1-2"]
    assert view.error is not None
    assert "refused" in view.error


@one_server
async def test_failures_are_counted_and_reported_once_and_slow_the_polls_to_half_a_minute(lab: Lab) -> None:
    await lab.clock.sleep(1)
    await lab.servers[0].stop()
    await lab.clock.sleep(600)
    assert len(lab.changes) == 2
    assert lab.poller.views[lab.keys[0]].failures > 10
    gaps = lab.gaps(lab.keys[0])
    assert gaps[1] <= FIRST_RETRY * 1.2 + 1
    assert MAX_RETRY * 0.8 <= max(gaps) <= MAX_RETRY * 1.2 + 1


@one_server
async def test_a_server_that_comes_back_is_polled_as_before(lab: Lab) -> None:
    lab.servers[0].freeze()
    await lab.clock.sleep(300)
    lab.servers[0].thaw()
    await lab.clock.sleep(MAX_RETRY * 1.2 + POLL_TIMEOUT + 1)
    view = lab.poller.views[lab.keys[0]]
    assert (view.state, view.error, view.failures) == (ServerState.REACHABLE, None, 0)
    before = len(lab.polls[lab.keys[0]])
    await lab.clock.sleep(30)
    assert len(lab.polls[lab.keys[0]]) - before >= 7


@one_server
async def test_the_first_retry_is_quick_each_time_a_server_fails(lab: Lab) -> None:
    for _ in range(2):
        await lab.servers[0].stop()
        await lab.clock.sleep(300)
        await lab.servers[0].start()
        lab.poller.poll_soon(lab.keys[0])
        await lab.clock.sleep(POLL_INTERVAL * 3)
        assert lab.poller.views[lab.keys[0]].state is ServerState.REACHABLE
    await lab.servers[0].stop()
    polls = len(lab.polls[lab.keys[0]])
    await lab.clock.sleep(POLL_INTERVAL * 1.2 + FIRST_RETRY * 1.2 + 0.1)
    assert len(lab.polls[lab.keys[0]]) - polls >= 2


@one_server
async def test_poll_soon_finds_a_released_device_that_is_hidden_at_first(lab: Lab) -> None:
    imported = await lab.node.import_device(DeviceKey(lab.keys[0], "1-1"), timeout=1)
    await lab.clock.sleep(POLL_INTERVAL * 2)
    assert [device.busid for device in lab.poller.views[lab.keys[0]].devices] == ["1-2"]
    imported.close()
    polls = len(lab.polls[lab.keys[0]])
    lab.poller.poll_soon(lab.keys[0])
    await lab.clock.sleep(share(1) + SECOND_LOOK + 0.01)
    assert len(lab.polls[lab.keys[0]]) == polls + 2
    assert [device.busid for device in lab.poller.views[lab.keys[0]].devices] == ["1-1", "1-2"]


@one_server
async def test_export_state_asks_the_server_and_not_the_last_poll(lab: Lab) -> None:
    stick = DeviceKey(lab.keys[0], "1-1")
    await lab.clock.sleep(0.1)
    assert await lab.poller.export_state(stick) is ExportState.FREE
    lab.servers[0].unplug("1-1")
    assert await lab.poller.export_state(stick) is ExportState.UNLISTED
    assert await lab.poller.export_state(DeviceKey(lab.keys[0], "1-2")) is ExportState.FREE
    await lab.servers[0].stop()
    assert await lab.poller.export_state(DeviceKey(lab.keys[0], "1-2")) is ExportState.UNKNOWN
    view = lab.poller.views[lab.keys[0]]
    assert (view.state, len(view.devices)) == (ServerState.REACHABLE, 2), "only polls change a view"


@one_server
async def test_poll_soon_during_a_poll_leads_to_one_more_poll(lab: Lab) -> None:
    polls = lab.polls[lab.keys[0]]
    while not polls:
        await lab.clock.sleep(LATENCY / 2)
    assert (len(polls), lab.changes) == (1, [])
    lab.servers[0].unplug("1-1")  # the answer under way may show it or not
    for _ in range(5):
        lab.poller.poll_soon(lab.keys[0])
    await lab.clock.sleep(2 * share(1))
    assert len(polls) == 2
    lab.poller.poll_soon(ServerKey("unknown"))


@three_servers
async def test_a_flaw_of_a_server_is_kept_while_the_process_lives(lab: Lab) -> None:
    a, b, _ = lab.keys
    stick = DeviceKey(a, "1-1")
    await lab.clock.sleep(10)
    assert await lab.poller.export_state(stick) is ExportState.FREE
    for _ in range(2):
        lab.poller.note_flaw(a, ServerFlaw.LISTS_IN_USE)
    assert [view.server for view in lab.changes if view.flaws] == [a], "reported once"
    assert await lab.poller.export_state(stick) is ExportState.LISTED, "its list is no evidence"
    lab.servers[0].unplug("1-1")
    await lab.clock.sleep(10)
    assert lab.poller.views[a].lists_in_use
    lab.poller.set_servers(frozenset({b}))
    lab.poller.set_servers(frozenset({a, b}))
    assert (lab.poller.views[a].lists_in_use, lab.poller.views[b].lists_in_use) == (True, False)
    lab.poller.note_flaw(ServerKey("unknown"), ServerFlaw.LISTS_IN_USE)


@three_servers
async def test_servers_may_be_added_and_removed_at_any_time(lab: Lab) -> None:
    a, b, c = lab.keys
    lab.poller.set_servers(frozenset({a}))
    await lab.clock.sleep(10)
    assert not lab.polls[b]
    kept = lab.poller.views[a]
    lab.poller.set_servers(frozenset({a, c}))
    assert lab.poller.views[a] is kept
    assert lab.poller.views[c].state is ServerState.PENDING
    await lab.clock.sleep(10)
    assert lab.poller.views[c].state is ServerState.REACHABLE
    lab.poller.set_servers(frozenset({c}))
    polls = len(lab.polls[a])
    await lab.clock.sleep(60)
    assert len(lab.polls[a]) == polls
    assert set(lab.poller.views) == {c}


@one_server
async def test_no_change_of_a_server_removed_during_its_poll_is_reported(lab: Lab) -> None:
    lab.servers[0].freeze()
    await lab.clock.sleep(POLL_TIMEOUT / 2)
    lab.poller.set_servers(frozenset())
    lab.servers[0].thaw()
    await lab.clock.sleep(60)
    assert lab.changes == []
    assert len(lab.polls[lab.keys[0]]) == 1


@virtual
async def test_no_change_of_a_server_removed_at_the_moment_of_its_answer_is_reported() -> None:
    lab = Lab(servers=2)
    changes: list[ServerView] = []

    def remove_all(view: ServerView) -> None:
        changes.append(view)
        lab.poller.set_servers(frozenset())

    lab.poller = ServerPoller(lab.node, lab.clock, random.Random(0))
    lab.poller.subscribe(remove_all)
    lab.poller.set_servers(frozenset(lab.keys))
    async with lab.running():
        await lab.clock.sleep(60)
    assert len(changes) == 1
    assert lab.poller.views == {}


class Many:
    """A NodeCount that is known once `counted` is set."""

    def __init__(self, nodes: int) -> None:
        self.nodes = nodes
        self.counted = asyncio.Event()
        self.counted.set()

    async def known(self) -> None:
        await self.counted.wait()


NODES = 400
SHARE = NODES / MAX_RATE


@virtual
async def test_a_node_keeps_to_its_share_of_polls_despite_poll_soon() -> None:
    lab = Lab(fleet=Many(NODES))
    (server,) = lab.keys
    async with lab.running():
        for second in range(1000):
            if second % 7 < 3:
                lab.poller.poll_soon(server)
            await lab.clock.sleep(1)
    assert min(lab.gaps(server)) >= SHARE - 1e-6
    assert len(lab.polls[server]) >= 1000 / (SHARE * 1.2 + 1)


@virtual
async def test_a_failing_server_is_not_polled_more_often_than_a_reachable_one() -> None:
    lab = Lab(fleet=Many(NODES))
    async with lab.running():
        await lab.servers[0].stop()
        await lab.clock.sleep(1000)
    assert min(lab.gaps(lab.keys[0])) >= SHARE - 1e-6


@virtual
async def test_nodes_that_learn_of_a_change_at_once_spread_their_polls() -> None:
    first: list[float] = []
    soon: list[float] = []
    for seed in range(60):
        lab = Lab(seed=seed, fleet=Many(NODES))
        began = lab.clock.monotonic()
        async with lab.running():
            await lab.clock.sleep(SHARE * 10)
            polls = lab.polls[lab.keys[0]]
            first.append(polls[0] - began)
            before, now = len(polls), lab.clock.monotonic()
            lab.poller.poll_soon(lab.keys[0])
            await lab.clock.sleep(SHARE * 2)
            soon.append(polls[before] - now)
    for times in (first, soon):
        assert max(times) <= SHARE
        assert max(times) - min(times) > SHARE / 2
        buckets = [sum(n * SHARE / 6 <= time < (n + 1) * SHARE / 6 for time in times) for n in range(6)]
        assert max(buckets) < 60 / 2


@virtual
async def test_no_server_is_polled_before_the_nodes_are_counted() -> None:
    fleet = Many(1)
    fleet.counted.clear()
    lab = Lab(fleet=fleet)
    async with lab.running():
        await lab.clock.sleep(100)
        assert not lab.polls[lab.keys[0]]
        fleet.counted.set()
        await lab.clock.sleep(1)
        assert lab.poller.views[lab.keys[0]].state is ServerState.REACHABLE


@virtual
async def test_poll_eagerly_polls_a_server_at_once_and_as_often_as_in_a_small_cluster() -> None:
    lab = Lab(servers=2, fleet=Many(NODES))
    slow, quick = lab.keys
    async with lab.running():
        await lab.clock.sleep(SHARE * 3)
        before, now = len(lab.polls[quick]), lab.clock.monotonic()
        lab.poller.poll_soon(quick)  # which waits for its turn
        lab.poller.poll_eagerly(frozenset({quick}))
        await lab.clock.sleep(SHARE)
        assert lab.polls[quick][before] - now < LATENCY
        assert len(lab.polls[quick]) - before >= SHARE / (POLL_INTERVAL * 1.2 + 1)
        lab.poller.poll_eagerly(frozenset())
        await lab.clock.sleep(POLL_INTERVAL * 2)
        before = len(lab.polls[quick])
        await lab.clock.sleep(SHARE * 5)
        assert len(lab.polls[quick]) - before <= 6
    assert min(lab.gaps(slow)) >= SHARE - 1e-6


@one_server
async def test_polled_since_waits_for_a_poll_that_begins_after_its_moment(lab: Lab) -> None:
    (server,) = lab.keys
    await lab.clock.sleep(10)
    lab.servers[0].freeze()
    polls = len(lab.polls[server])
    while len(lab.polls[server]) == polls:
        await lab.clock.sleep(0.1)
    moment = lab.clock.monotonic() + 0.01
    await lab.poller.polled_since(server, moment)
    assert lab.polls[server][-1] >= moment
    assert lab.poller.views[server].failures == 2, "a failed poll counts"
    waiting = asyncio.create_task(lab.poller.polled_since(server, moment + 1000))
    await lab.clock.sleep(1)
    lab.poller.set_servers(frozenset())
    await lab.clock.sleep(0.1)
    assert waiting.done()
