"""The lists that a ListAndWatch stream is sent, without a socket."""

import asyncio
import functools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.rigs.vocabulary import KEY
from tests.unit.kubelet.idle_backend import IdleBackend
from usbip_plugin.kubelet.device_plugin import DeviceList, DevicePluginServer, DeviceStates, device_list
from usbip_plugin.model import Advertised, Health, Reason
from usbip_sim.virtual.loop import run, virtual


@functools.cache
def device(number: int, healthy: bool) -> Advertised:
    return Advertised(str(number), KEY, Health(Reason.FREE if healthy else Reason.HELD_ELSEWHERE))


def devices(*health: bool) -> tuple[Advertised, ...]:
    """Returns one object for each state of a device, like the inventory."""
    return tuple(device(n, h) for n, h in enumerate(health))


def new_server() -> DevicePluginServer:
    return DevicePluginServer("usbip.dev/storage", IdleBackend())


class Stream:
    """A stream of a server whose sends take `pace` seconds each."""

    def __init__(self, server: DevicePluginServer, pace: float) -> None:
        self.sent: list[DeviceStates] = []
        self._pace = pace
        self.task = asyncio.create_task(server.follow(self._send))

    async def _send(self, state: DeviceStates) -> None:
        await asyncio.sleep(self._pace)
        self.sent.append(state)

    async def end(self) -> None:
        self.task.cancel()
        await asyncio.wait([self.task])


@virtual
async def test_an_empty_list_is_sent() -> None:
    server = new_server()
    stream = Stream(server, 0)
    await asyncio.sleep(1)
    assert stream.sent == []
    server.publish(())
    await server.wait_sent()
    assert stream.sent == [()]
    await stream.end()


@virtual
async def test_a_list_published_during_a_send_is_sent_after_it() -> None:
    server = new_server()
    server.publish(devices(True))
    stream = Stream(server, 1)
    await asyncio.sleep(0.5)
    server.publish(devices(False))
    await server.wait_sent()
    assert stream.sent == [(("0", True),), (("0", False),)]
    await stream.end()


@virtual
async def test_wait_sent_waits_for_the_slowest_stream_but_not_for_an_ended_one() -> None:
    server = new_server()
    quick, slow = Stream(server, 0.1), Stream(server, 5)
    await asyncio.sleep(0)
    server.publish(devices(True))
    await server.wait_sent()
    assert len(quick.sent) == len(slow.sent) == 1
    server.publish(devices(False))
    waiting = asyncio.create_task(server.wait_sent())
    await asyncio.sleep(1)
    assert not waiting.done()
    await slow.end()
    async with asyncio.timeout(0.1):
        await waiting
    assert server.open_streams == 1
    await quick.end()


@virtual
async def test_a_stream_that_breaks_harms_no_other() -> None:
    server = new_server()
    server.publish(devices(True))

    async def broken(_state: DeviceStates) -> None:
        raise ConnectionError("gone")

    with pytest.raises(ConnectionError):
        await server.follow(broken)
    assert server.open_streams == 0
    stream = Stream(server, 0)
    await asyncio.sleep(0.1)
    assert stream.sent == [(("0", True),)]
    await stream.end()


def test_healthy_devices_count_in_use_or_not() -> None:
    server = new_server()
    reasons = [Reason.FREE, Reason.ATTACHED, Reason.HELD_ELSEWHERE, Reason.UNKNOWN]
    server.publish(tuple(Advertised(r.name, KEY, Health(r)) for r in reasons))
    assert server.healthy == 2
    server.publish(())
    assert server.healthy == 0


@given(st.lists(st.lists(st.tuples(st.integers(0, 2), st.booleans()), max_size=3), max_size=6))
def test_a_list_changed_in_place_equals_a_new_list(script: list[list[tuple[int, bool]]]) -> None:
    server, kept = new_server(), DeviceList()

    async def main() -> None:
        stream = Stream(server, 0)
        await asyncio.sleep(0)
        for states in script:
            server.publish(tuple(device(number, healthy) for number, healthy in states))
            await server.wait_sent()
            expected = tuple((str(number), healthy) for number, healthy in states)
            assert stream.sent[-1] == expected
            assert kept.message_for(stream.sent[-1]) == device_list(expected)
        await stream.end()

    run(main)


steps = st.lists(st.tuples(st.sampled_from([0.0, 0.3, 1.0, 4.0]), st.lists(st.booleans(), max_size=2)), max_size=12)


@given(steps, st.sampled_from([0.0, 0.5, 2.0]))
def test_every_stream_ends_with_the_last_list_and_never_goes_back(
    script: list[tuple[float, list[bool]]], pace: float
) -> None:
    async def main() -> None:
        server = new_server()
        streams = [Stream(server, pace)]
        published: list[DeviceStates] = []
        for pause, health in script:
            server.publish(devices(*health))
            state = tuple((str(n), h) for n, h in enumerate(health))
            if not published or published[-1] != state:
                published.append(state)
            await asyncio.sleep(pause)
            streams.append(Stream(server, pace))
            await asyncio.sleep(0)
        await server.wait_sent()
        for stream in streams:
            if published:
                assert stream.sent[-1] == published[-1]
            # the lists sent are a subsequence of those published
            rest = iter(published)
            assert all(state in rest for state in stream.sent)
            await stream.end()

    run(main)
