"""Tasks and wake-ups within one event loop: tasks, threads, waits for conditions, subscribers, directory changes."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Awaitable, Callable, Coroutine, Generator, Iterator
from concurrent.futures import Executor, Future
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, ParamSpec, Self, TypeAlias, TypeVar

from usbip_plugin.clock import Clock

if TYPE_CHECKING:
    from asyncinotify import Inotify

log = logging.getLogger(__name__)

T = TypeVar("T")
P = ParamSpec("P")


Steps: TypeAlias = Generator[None, None, T]
"""A long computation that yields often, at the latest after a millisecond, and returns its result."""
SLICE_S = 0.002
"""Seconds for which in_slices() computes before the event loop may do other work; the last step may exceed it."""
PAUSE_S = 0.008
"""Seconds between two slices. The computation then takes at most a fifth of the event loop."""


async def in_slices(steps: Steps[T], clock: Clock) -> T:
    """Returns the result of a computation that other work of the event loop must not wait for. Cancel-safe."""
    try:
        while True:
            until = clock.monotonic() + SLICE_S
            while clock.monotonic() < until:
                next(steps)
            await clock.sleep(PAUSE_S)
    except StopIteration as end:
        result: T = end.value
        return result
    finally:
        steps.close()


async def done_within(clock: Clock, seconds: float, wait: Awaitable[object]) -> bool:
    """Returns whether a wait, such as event.wait(), ends within that many seconds. Cancels it otherwise.

    Cancel-safe. Raises what the wait raises, except TimeoutError.
    """
    try:
        async with clock.timeout(seconds):
            await wait
    except TimeoutError:
        return False
    return True


def start_task(
    tasks: asyncio.TaskGroup | None, work: Coroutine[object, object, None], name: str | None = None
) -> asyncio.Task[None] | None:
    """Starts work in a task of the group. If the group is None or is shutting down, closes work and returns None."""
    try:
        if tasks is not None:
            return tasks.create_task(work, name=name)
    except RuntimeError:  # the group is shutting down and accepts no more tasks
        log.debug("task not started, plugin is stopping", extra={"work": name} if name else None)
    work.close()
    return None


class OwnThreads(Executor):
    """An executor that runs each call in a new thread of this name, so that no call waits for another one.

    For calls that a peer or the kernel can block without end. The threads do not keep the process from ending. The
    caller must bound how many calls are under way.
    """

    def __init__(self, name: str) -> None:
        self._name = name

    def submit(self, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        answer = Future[T]()

        def work() -> None:
            if not answer.set_running_or_notify_cancel():
                return
            try:
                result = fn(*args, **kwargs)
            except BaseException as error:  # noqa: BLE001 - raised where the answer is awaited
                answer.set_exception(error)
            else:
                answer.set_result(result)

        threading.Thread(target=work, name=self._name, daemon=True).start()
        return answer


def leaves(errors: BaseExceptionGroup[BaseException]) -> Iterator[BaseException]:
    """Yields the errors in a group of a TaskGroup, also those of groups in it."""
    for error in errors.exceptions:
        if isinstance(error, BaseExceptionGroup):
            yield from leaves(error)
        else:
            yield error


RECHECK_S = 0.05
"""Seconds between two checks of Broadcast.until_within() without a change that is announced.

The kernel sends no uevent when a port becomes free (null), nor when it notices the end of a socket in status 005.
"""


class Broadcast:
    """A wake-up for callbacks, and for tasks that wait for a condition on state kept elsewhere.

    Each change of that state must fire() it. All methods belong to one event loop. No change is missed: nothing runs
    between a check and the wait.
    """

    def __init__(self) -> None:
        self._event = asyncio.Event()
        self._callbacks: dict[object, Callable[[], None]] = {}

    def subscribe(self, callback: Callable[[], None]) -> Callable[[], None]:
        """Calls callback synchronously at each fire(). It must not raise.

        Returns the function that unsubscribes it, which may be called any number of times.
        """
        subscription = object()
        self._callbacks[subscription] = callback

        def unsubscribe() -> None:
            self._callbacks.pop(subscription, None)

        return unsubscribe

    def fire(self) -> None:
        """Makes every waiter check its condition again, and calls the callbacks. Never blocks."""
        event, self._event = self._event, asyncio.Event()
        event.set()
        for callback in tuple(self._callbacks.values()):
            callback()

    async def until(self, condition: Callable[[], T]) -> T:
        """Waits until condition() is true, and returns its value. Has no timeout of its own. Cancel-safe."""
        while not (value := condition()):
            await self._event.wait()
        return value

    async def until_within(
        self, condition: Callable[[], T | None], clock: Clock, *, timeout: float, recheck: float = RECHECK_S
    ) -> T:
        """Waits until condition() is true, and returns its value. Checks also every recheck seconds. Cancel-safe.

        Raises TimeoutError after timeout seconds, and what condition() raises.
        """
        async with clock.timeout(timeout):
            while not (value := condition()):
                await done_within(clock, recheck, self._event.wait())
        return value


MAX_DRAINED_EVENTS = 1000
"""Inotify events dropped at the end of one wait, so that a flood of events cannot delay it for ever."""


class DirectoryWatch:
    """Waits for changes of a directory's entries, such as the symbolic link ..data that the kubelet swaps in a volume.

    Polls while the directory cannot be watched: it is missing, or no inotify instance is left. Logs that once.
    All work is done within a `with` block.

    recheck: longest wait in seconds while the directory is watched, because some file systems deliver no events.
    poll: seconds of each wait while the directory cannot be watched.
    debounce: seconds that a wait continues after the first event, because one change causes several events.
    """

    def __init__(self, path: Path, clock: Clock, *, recheck: float, poll: float, debounce: float = 0.0) -> None:
        self._path = path
        self._clock = clock
        self._recheck = recheck
        self._poll = poll
        self._debounce = debounce
        self._inotify: Inotify | None = None
        self._watched = False
        self._warned = False

    def __enter__(self) -> Self:
        self._watch()
        return self

    def __exit__(self, *_: object) -> None:
        if self._inotify is not None:
            self._inotify.close()

    async def changed(self) -> None:
        """Waits for a change, or for the time of a recheck or poll. Cancel-safe.

        When it returns, the directory that is at the path now is watched: a change after that ends the next wait.
        """
        if self._inotify is None or not self._watched:
            await self._clock.sleep(self._poll)
        elif await done_within(self._clock, self._recheck, self._inotify.get()):
            await self._clock.sleep(self._debounce)
            for _ in islice(self._inotify, MAX_DRAINED_EVENTS):
                pass
        self._watch()

    def _watch(self) -> None:
        """Watches the directory that is at the path now, which may be another one than before."""
        from asyncinotify import Inotify, Mask  # noqa: PLC0415 - fails on Windows, where only the command line runs

        entries = Mask.CREATE | Mask.DELETE | Mask.MOVED_FROM | Mask.MOVED_TO | Mask.CLOSE_WRITE
        try:
            self._inotify = self._inotify or Inotify(sync_timeout=0)
            self._inotify.add_watch(self._path, entries | Mask.DELETE_SELF | Mask.MOVE_SELF | Mask.ONLYDIR)
        except OSError as error:
            self._watched = False
            if not self._warned:
                log.warning(
                    "directory cannot be watched, polling instead",
                    extra={"directory": str(self._path), "cause": str(error), "interval_s": self._poll},
                )
            self._warned = True
        else:
            self._watched = True
