"""Pages are made seldom and in slices, however many peers ask for them."""

from __future__ import annotations

import asyncio

from tests.rigs.tasks import background
from tests.unit.observe.test_page import CLUSTER, STATUS
from usbip_plugin.observe.http import Answer
from usbip_plugin.observe.pages import MADE_EVERY_S, Paced, Site
from usbip_plugin.observe.status import ClusterReport, NodeReport
from usbip_plugin.observe.tracing import RecentSpans
from usbip_plugin.sync import PAUSE_S, SLICE_S, Steps, in_slices
from usbip_sim.virtual.loop import SimClock, virtual


class Made:
    """A page that counts how often it is made. takes: seconds."""

    def __init__(self, takes: float = 0.0) -> None:
        self.at: list[float] = []
        self.clock = SimClock(asyncio.get_running_loop())
        self.takes = takes
        self.page = Paced(self._make, self.clock)

    async def _make(self) -> Answer:
        self.at.append(self.clock.monotonic())
        await self.clock.sleep(self.takes)
        return Answer(str(len(self.at)).encode())


@virtual
async def test_a_hundred_clients_that_ask_without_end_have_a_page_made_once_a_second() -> None:
    made = Made(takes=0.2)
    answers = [0]

    async def client() -> None:
        for _ in range(100):
            await made.page()
            answers[0] += 1

    async with asyncio.TaskGroup() as tasks:
        clients = [tasks.create_task(client()) for _ in range(100)]
        await made.clock.sleep(10.5)
        for one in clients:
            one.cancel()
    gaps = [later - before for before, later in zip(made.at, made.at[1:], strict=False)]
    assert len(made.at) <= 11
    assert min(gaps) >= MADE_EVERY_S - 1e-9
    assert answers[0] >= 100 * 8, "all are answered"


@virtual
async def test_a_page_is_never_older_than_the_request() -> None:
    made = Made(takes=0.2)
    assert (await made.page()).body == b"1"
    asked = made.clock.monotonic()
    assert (await made.page()).body == b"2"
    assert made.at[-1] >= asked
    first = asyncio.create_task(made.page())
    await made.clock.sleep(MADE_EVERY_S)
    second = asyncio.create_task(made.page())  # the page under way may lack what it looks for
    assert [one.body for one in await asyncio.gather(first, second)] == [b"3", b"4"]


@virtual
async def test_a_request_that_is_given_up_does_not_keep_the_others_waiting() -> None:
    made = Made(takes=0.2)
    given_up = asyncio.create_task(made.page())
    await made.clock.sleep(0.1)
    waiting = asyncio.create_task(made.page())
    given_up.cancel()
    assert (await waiting).body == b"2"


class CountingClock(SimClock):
    """A clock that moves by a millisecond each time it is asked."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        super().__init__(loop)
        self.ahead = 0.0
        self.slept: list[float] = []

    def monotonic(self) -> float:
        self.ahead += 0.001
        return self.ahead

    async def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        await super().sleep(seconds)


@virtual
async def test_a_long_computation_lets_the_event_loop_run_after_each_slice() -> None:
    clock = CountingClock(asyncio.get_running_loop())
    steps, turns = [0], [0]

    def long() -> Steps[str]:
        for _ in range(100):
            steps[0] += 1
            yield
        return "result"

    async def other() -> None:
        while True:
            turns[0] += 1
            await asyncio.sleep(PAUSE_S)

    async with background(other()):
        assert await in_slices(long(), clock) == "result"
    assert set(clock.slept) == {PAUSE_S}
    assert len(clock.slept) >= 100 / (SLICE_S / 0.001) - 1
    assert turns[0] >= len(clock.slept)


@virtual
async def test_one_page_is_made_at_a_time() -> None:
    making, most = [0], [0]

    def metrics() -> Steps[tuple[bytes, str]]:
        making[0] += 1
        most[0] = max(most[0], making[0])
        for _ in range(10):
            yield
        making[0] -= 1
        return b"", ""

    def status() -> Steps[NodeReport]:
        yield from metrics()
        return STATUS

    def cluster() -> Steps[ClusterReport]:
        yield from metrics()
        return CLUSTER

    pages = Site(status, cluster, metrics, RecentSpans(), CountingClock(asyncio.get_running_loop())).pages()

    async def get(path: str) -> None:
        answer = pages[path]()
        assert isinstance(answer, Answer) or await answer

    await asyncio.gather(*map(get, ("/metrics", "/api/status", "/api/devices", "/api/page", "/cluster")))
    assert most == [1]
