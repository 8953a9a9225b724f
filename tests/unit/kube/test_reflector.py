"""The reflector: a list, then watches that each continue the last one, and another list only after a failure."""

import asyncio
import contextlib
import random
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from itertools import pairwise

import pytest

from tests.rigs.tasks import background
from usbip_plugin.errors import KubeError, KubeForbidden, KubeGone, KubeServerError, KubeUnreachable
from usbip_plugin.kube.reflector import SETTLE_S, Reflector
from usbip_sim.virtual.loop import SimClock, virtual

FIRST_S, MAX_S = 0.2, 5.0
GONE = KubeGone("watch", "things", "too old")
AWAY = KubeUnreachable("watch", "things", "reset")
REFUSED = KubeForbidden("watch", "things", "no")

Step = str | float | Exception
"""A step of a watch: the version of an event, seconds without an event, or the error that ends the watch."""


class Things(Reflector[str]):
    """A reflector whose events are versions; "" is an event without a version.

    lists: how each list fails in turn. watches: the steps of each watch in turn; a later watch has no event and no end.
    """

    def __init__(self, *watches: Sequence[Step]) -> None:
        super().__init__("things", SimClock(asyncio.get_running_loop()), random.Random(1), (FIRST_S, MAX_S))
        self.watches = list(watches)
        self.lists: list[KubeError] = []
        self.listed: list[float] = []
        self.watched: list[str] = []
        self.opened: list[float] = []
        self.closed = 0
        self.applied: list[str] = []
        self.ups: list[float] = []
        self.downs: list[tuple[type[KubeError], bool]] = []

    async def _list(self) -> str:
        self.listed.append(now())
        if self.lists:
            raise self.lists.pop(0)
        return f"list {len(self.listed)}"

    async def _watch(self, version: str) -> AsyncGenerator[str, None]:
        self.watched.append(version)
        self.opened.append(now())
        try:
            for step in self.watches.pop(0) if self.watches else [1e9]:
                if isinstance(step, Exception):
                    raise step
                if isinstance(step, float):
                    await asyncio.sleep(step)
                else:
                    yield step
        finally:
            self.closed += 1

    def apply(self, event: str) -> str | None:
        self.applied.append(event)
        return event or None

    def _up(self) -> None:
        self.ups.append(now())

    def _down(self, error: KubeError, *, first: bool) -> None:
        self.downs.append((type(error), first))


def now() -> float:
    return asyncio.get_running_loop().time()


@contextlib.asynccontextmanager
async def running(things: Things, seconds: float) -> AsyncIterator[None]:
    """Runs the reflector for so many seconds before the block and during it."""
    async with background(things.run()) as task:
        await asyncio.sleep(seconds)
        yield
    assert task.cancelled()
    assert things.closed == len(things.opened), "a watch was left open"


@virtual
async def test_a_watch_that_ends_continues_at_its_last_version_without_a_list() -> None:
    things = Things(["5", 100.0, "7", ""], [100.0], [100.0, "9"])
    async with running(things, 301):
        assert things.watched == ["list 1", "7", "7", "9"]
        assert things.applied == ["5", "7", "", "9"]
        assert things.listed == [0]
        assert things.opened == [0, 100, 200, 300], "at once, as none of them was short"
        assert things.downs == []


@virtual
async def test_a_version_that_is_too_old_leads_to_a_list_and_is_not_a_failure() -> None:
    things = Things([10.0, GONE], [GONE])
    async with running(things, 60):
        assert things.watched == ["list 1", "list 2", "list 3"]
        assert things.downs == []
        assert 0.8 * FIRST_S <= things.listed[1] - 10 <= 1.2 * FIRST_S


@virtual
async def test_after_a_failure_there_is_a_new_list_and_the_view_is_current_once_a_watch_has_settled() -> None:
    things = Things(["5", 10.0, AWAY], [AWAY])
    async with running(things, 60):
        assert things.watched == ["list 1", "list 2", "list 3"]
        assert things.downs == [(KubeUnreachable, True), (KubeUnreachable, True)]
        _, second, third = things.listed
        assert things.ups[-2] == second, "the first watch had worked, so a list was enough"
        assert things.ups[-1] == third + SETTLE_S, "the second had not, so another list was not"


@virtual
async def test_an_event_shows_that_a_watch_works() -> None:
    things = Things([AWAY], [1.0, "5", 1e9])
    async with running(things, 60):
        assert things.ups[1] == things.opened[1] + 1


@virtual
async def test_waits_grow_and_are_reset_by_a_watch_that_lasted() -> None:
    things = Things(*[[AWAY]] * 12, [SETTLE_S, AWAY])
    async with running(things, 300):
        waits = [b - a for a, b in pairwise(things.listed)]
        assert waits[0] <= 1.2 * FIRST_S
        assert 0.8 * MAX_S <= waits[11] <= 1.2 * MAX_S
        assert waits[12] <= SETTLE_S + 1.2 * FIRST_S


@virtual
async def test_a_repeated_failure_is_first_only_once_until_the_view_is_current() -> None:
    things = Things([AWAY], [AWAY], [REFUSED], [REFUSED], [SETTLE_S, REFUSED])
    things.lists = [AWAY, AWAY]
    async with running(things, 60):
        assert things.downs == [
            *((KubeUnreachable, True), (KubeUnreachable, False)),
            *((KubeUnreachable, True), (KubeUnreachable, False)),
            *((KubeForbidden, True), (KubeForbidden, False)),
            (KubeForbidden, True),
        ]


@virtual
async def test_watches_that_end_at_once_are_a_failure() -> None:
    things = Things(*[[]] * 20)
    async with running(things, 10):
        assert things.downs == [(KubeServerError, True)] + [(KubeServerError, False)] * (len(things.downs) - 1)
        assert len(things.ups) == 1
        assert 3 < len(things.listed) < 10


@virtual
async def test_watches_that_end_after_an_event_are_opened_again_after_a_wait() -> None:
    things = Things(*[["5"]] * 10_000)
    async with running(things, 60):
        assert len(things.watched) < 30
        assert things.listed == [0]
        assert things.downs == []


@virtual
@pytest.mark.parametrize("seconds", [0.5, 10])
async def test_relist_ends_the_watch_and_leads_to_one_list(seconds: float) -> None:
    things = Things()
    things.relist()
    async with running(things, seconds):
        things.relist()
        things.relist()
        await asyncio.sleep(20)
        assert things.watched == ["list 1", "list 2"]
        assert things.downs == []


@virtual
async def test_an_event_that_cannot_be_applied_leaves_no_watch_open() -> None:
    class Broken(Things):
        def apply(self, event: str) -> str | None:
            raise LookupError(event)

    things = Broken(["5"])
    with pytest.raises(LookupError):
        await things.run()
    assert things.closed == 1
