"""The poller in virtual time, on virtual servers."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import random
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any

from usbip_plugin.model import Descriptor, DeviceKey, ServerKey, UsbId
from usbip_plugin.usbip.client import Imported, TcpUsbipClient
from usbip_plugin.usbip.identify import DeviceIdentity
from usbip_plugin.usbip.poller import (
    FIRST_RETRY,
    MAX_RATE,
    MAX_RETRY,
    POLL_INTERVAL,
    POLL_TIMEOUT,
    SECOND_LOOK,
    NodeCount,
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


class Lab:
    """Servers a, b, ..., one poller, and what it told, with the times of all polls."""

    def __init__(self, servers: int = 1, seed: int = 0, fleet: NodeCount | None = None) -> None:
        self.clock = SimClock(asyncio.get_running_loop())
        self.servers = [
            VirtualServer([TWIN, STICK], f"server-{n}", 3240, clock=self.clock, listen=False) for n in range(servers)
        ]
        self.keys = [server.key for server in self.servers]
        by_key = {server.key: server for server in self.servers}
        network = Network(by_key.get, lambda: LATENCY)
        self.node = TcpUsbipClient(self.clock, MemoryConnector(network, Host("node")))
        self.polls: dict[ServerKey, list[float]] = {key: [] for key in self.keys}
        self.told: list[ServerView] = []
        self.poller = ServerPoller(self, self.clock, random.Random(seed), fleet=fleet)
        self.poller.subscribe(self.told.append)
        self.poller.set_servers(frozenset(self.keys))

    async def devlist(self, server: ServerKey, *, timeout: float) -> tuple[Descriptor, ...]:
        self.polls[server].append(self.clock.monotonic())
        return await self.node.devlist(server, timeout=timeout)

    async def import_device(self, key: DeviceKey, *, timeout: float) -> Imported:
        return await self.node.import_device(key, timeout=timeout)

    async def probe(self, imported: Imported, *, timeout: float) -> DeviceIdentity:
        return await self.node.probe(imported, timeout=timeout)

    def gaps(self, key: ServerKey) -> list[float]:
        times = self.polls[key]
        return [later - earlier for earlier, later in itertools.pairwise(times)]

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        for server in self.servers:
            await server.start()
        task = asyncio.ensure_future(self.poller.run())
        try:
            yield
        finally:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task


def in_lab(servers: int) -> Callable[[Callable[[Lab], Coroutine[Any, Any, None]]], Callable[[], None]]:
    """Decorator: a test in virtual time with a running lab."""

    def decorate(test: Callable[[Lab], Coroutine[Any, Any, None]]) -> Callable[[], None]:
        async def body() -> None:
            lab = Lab(servers)
            async with lab.running():
                await test(lab)

        wrapper = virtual(body)

        def run() -> None:
            wrapper()

        run.__doc__ = test.__doc__
        return run

    return decorate


@virtual
async def test_a_server_is_pending_until_it_has_been_asked() -> None:
    lab = Lab()
    assert lab.poller.views == {lab.keys[0]: ServerView(lab.keys[0])}
    async with lab.running():
        await lab.clock.sleep(1)
        view = lab.poller.views[lab.keys[0]]
        assert view.state is ServerState.REACHABLE
        assert [device.busid for device in view.devices] == ["1-1", "1-2"]
        assert lab.told == [view]


@in_lab(1)
async def test_only_what_changed_is_told(lab: Lab) -> None:
    await lab.clock.sleep(60)
    assert len(lab.told) == 1
    lab.servers[0].unplug("1-1")
    await lab.clock.sleep(POLL_INTERVAL * 1.2 + 1)
    assert [len(view.devices) for view in lab.told] == [2, 1]


@in_lab(1)
async def test_polls_keep_their_interval_with_jitter(lab: Lab) -> None:
    await lab.clock.sleep(300)
    gaps = lab.gaps(lab.keys[0])
    assert min(gaps) >= POLL_INTERVAL * 0.8
    assert max(gaps) <= POLL_INTERVAL * 1.2 + 1
    assert len({round(gap, 3) for gap in gaps}) > len(gaps) / 2


@in_lab(3)
async def test_a_dead_server_delays_no_other(lab: Lab) -> None:
    lab.servers[0].freeze()
    await lab.servers[1].stop()
    await lab.clock.sleep(120)
    assert len(lab.polls[lab.keys[2]]) >= 120 / (POLL_INTERVAL * 1.2 + 1)
    states = [lab.poller.views[key].state for key in lab.keys]
    assert states == [ServerState.UNREACHABLE, ServerState.UNREACHABLE, ServerState.REACHABLE]


@in_lab(1)
async def test_one_failure_is_told_at_once_with_the_last_list_and_the_reason(lab: Lab) -> None:
    await lab.clock.sleep(1)
    await lab.servers[0].stop()
    await lab.clock.sleep(POLL_INTERVAL * 1.2)
    view = lab.told[-1]
    assert (view.state, view.failures) == (ServerState.UNREACHABLE, 1)
    assert [device.busid for device in view.devices] == ["1-1", "1-2"]
    assert view.error is not None
    assert "refused" in view.error


@in_lab(1)
async def test_failures_are_counted_and_told_once_and_slow_down_to_half_a_minute(lab: Lab) -> None:
    await lab.clock.sleep(1)
    await lab.servers[0].stop()
    await lab.clock.sleep(600)
    assert len(lab.told) == 2
    assert lab.poller.views[lab.keys[0]].failures > 10
    gaps = lab.gaps(lab.keys[0])
    assert gaps[1] <= FIRST_RETRY * 1.2 + 1
    assert MAX_RETRY * 0.8 <= max(gaps) <= MAX_RETRY * 1.2 + 1


@in_lab(1)
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


@in_lab(1)
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


@in_lab(1)
async def test_a_poke_finds_a_released_device_although_it_is_hidden_at_first(lab: Lab) -> None:
    imported = await lab.node.import_device(DeviceKey(lab.keys[0], "1-1"), timeout=1)
    await lab.clock.sleep(POLL_INTERVAL * 2)
    assert [device.busid for device in lab.poller.views[lab.keys[0]].devices] == ["1-2"]
    imported.close()
    polls = len(lab.polls[lab.keys[0]])
    lab.poller.poll_soon(lab.keys[0])
    await lab.clock.sleep(share(1) + SECOND_LOOK + 0.01)
    assert len(lab.polls[lab.keys[0]]) == polls + 2
    assert [device.busid for device in lab.poller.views[lab.keys[0]].devices] == ["1-1", "1-2"]


@in_lab(1)
async def test_what_a_server_lists_now_is_asked_of_it_and_not_of_the_last_poll(lab: Lab) -> None:
    stick = DeviceKey(lab.keys[0], "1-1")
    await lab.clock.sleep(0.1)
    assert await lab.poller.is_exported(stick)
    lab.servers[0].unplug("1-1")
    assert not await lab.poller.is_exported(stick)
    assert await lab.poller.is_exported(DeviceKey(lab.keys[0], "1-2"))
    await lab.servers[0].stop()
    assert not await lab.poller.is_exported(DeviceKey(lab.keys[0], "1-2"))
    view = lab.poller.views[lab.keys[0]]
    assert (view.state, len(view.devices)) == (ServerState.REACHABLE, 2), "the views are those of the polls"


@in_lab(1)
async def test_a_poke_during_a_poll_asks_once_more(lab: Lab) -> None:
    polls = lab.polls[lab.keys[0]]
    while not polls:
        await lab.clock.sleep(LATENCY / 2)
    assert (len(polls), lab.told) == (1, [])
    lab.servers[0].unplug("1-1")  # may or may not be in the answer that is on its way
    for _ in range(5):
        lab.poller.poll_soon(lab.keys[0])
    await lab.clock.sleep(2 * share(1))
    assert len(polls) == 2
    lab.poller.poll_soon(ServerKey("nobody"))


@in_lab(3)
async def test_servers_come_and_go_while_it_runs(lab: Lab) -> None:
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


@in_lab(1)
async def test_nothing_is_told_of_a_server_taken_out_while_it_was_asked(lab: Lab) -> None:
    lab.servers[0].freeze()
    await lab.clock.sleep(POLL_TIMEOUT / 2)
    lab.poller.set_servers(frozenset())
    lab.servers[0].thaw()
    await lab.clock.sleep(60)
    assert lab.told == []
    assert len(lab.polls[lab.keys[0]]) == 1


@virtual
async def test_nothing_is_told_of_a_server_taken_out_in_the_moment_of_its_answer() -> None:
    lab = Lab(servers=2)
    told: list[ServerView] = []

    def take_all_out(view: ServerView) -> None:
        told.append(view)
        lab.poller.set_servers(frozenset())

    lab.poller = ServerPoller(lab, lab.clock, random.Random(0))
    lab.poller.subscribe(take_all_out)
    lab.poller.set_servers(frozenset(lab.keys))
    async with lab.running():
        await lab.clock.sleep(60)
    assert len(told) == 1
    assert lab.poller.views == {}


class Many:
    """A Fleet that is counted when counted is set."""

    def __init__(self, nodes: int) -> None:
        self.nodes = nodes
        self.counted = asyncio.Event()
        self.counted.set()

    async def known(self) -> None:
        await self.counted.wait()


NODES = 400
SHARE = NODES / MAX_RATE


@virtual
async def test_a_node_keeps_to_its_share_whatever_it_is_poked_for() -> None:
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
async def test_a_failing_server_is_not_asked_more_often_than_one_that_answers() -> None:
    lab = Lab(fleet=Many(NODES))
    async with lab.running():
        await lab.servers[0].stop()
        await lab.clock.sleep(1000)
    assert min(lab.gaps(lab.keys[0])) >= SHARE - 1e-6


@virtual
async def test_what_all_nodes_hear_of_at_once_they_do_not_ask_at_once() -> None:
    first: list[float] = []
    poked: list[float] = []
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
            poked.append(polls[before] - now)
    for times in (first, poked):
        assert max(times) <= SHARE
        assert max(times) - min(times) > SHARE / 2
        buckets = [sum(n * SHARE / 6 <= time < (n + 1) * SHARE / 6 for time in times) for n in range(6)]
        assert max(buckets) < 60 / 2


@virtual
async def test_nothing_is_asked_before_the_fleet_is_counted() -> None:
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
async def test_a_server_that_a_pod_waits_for_is_polled_as_in_a_small_fleet_and_from_now_on() -> None:
    lab = Lab(servers=2, fleet=Many(NODES))
    slow, quick = lab.keys
    async with lab.running():
        await lab.clock.sleep(SHARE * 3)
        before, now = len(lab.polls[quick]), lab.clock.monotonic()
        lab.poller.poll_soon(quick)  # and waits for its turn
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


@in_lab(1)
async def test_who_waits_for_a_poll_sent_later_is_not_content_with_one_under_way(lab: Lab) -> None:
    (server,) = lab.keys
    await lab.clock.sleep(10)
    lab.servers[0].freeze()
    polls = len(lab.polls[server])
    while len(lab.polls[server]) == polls:
        await lab.clock.sleep(0.1)
    moment = lab.clock.monotonic() + 0.01
    await lab.poller.polled_since(server, moment)
    assert lab.polls[server][-1] >= moment
    assert lab.poller.views[server].failures == 2, "one that failed will do"
    waiting = asyncio.create_task(lab.poller.polled_since(server, moment + 1000))
    await lab.clock.sleep(1)
    lab.poller.set_servers(frozenset())
    await lab.clock.sleep(0.1)
    assert waiting.done()
