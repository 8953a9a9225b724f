"""Event loop in virtual time: an hour of leases and heartbeats passes in milliseconds, the same way in each run."""

from __future__ import annotations

import asyncio
import functools
import selectors
from asyncio import Future
from collections.abc import Callable, Coroutine
from concurrent.futures import Executor
from contextlib import AbstractAsyncContextManager
from datetime import UTC, datetime, timedelta
from typing import Any, ParamSpec, TypeVar

from usbip_sim.sockets import MemoryStreams

T = TypeVar("T")
P = ParamSpec("P")

STALL_S = 30.0
"""Real seconds to wait for a peer outside the loop when no timer is set, before the loop raises Deadlock."""
_THREAD_POLL_S = 0.5
"""Real seconds of one wait for I/O while a thread works."""
_EPOCH = datetime(2030, 1, 1, tzinfo=UTC)


class Deadlock(RuntimeError):
    """Error of a virtual loop with nothing ready, no timer set and no I/O."""


class _JumpingSelector(selectors.DefaultSelector):
    """Selector that moves virtual time on by the timeout, instead of waiting, when nothing is ready."""

    def __init__(self) -> None:
        super().__init__()
        self.virtual_time = 0.0
        self.threads_busy = 0

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        ready = super().select(0)
        if ready or (timeout is not None and timeout <= 0):
            return ready
        if self.threads_busy:
            # A thread works in real time; virtual time stands still until the thread has answered.
            return super().select(_THREAD_POLL_S)
        if timeout is None:
            ready = super().select(STALL_S)
            if not ready:
                raise Deadlock(f"virtual loop: nothing to do for {STALL_S:g} s of real time and no timer set")
            return ready
        self.virtual_time += timeout
        return []


class VirtualLoop(MemoryStreams, asyncio.SelectorEventLoop):
    """Event loop whose time() stands still while anything is ready or a thread works, then jumps to the next timer.

    Real sockets work: the loop reads everything that the kernel can deliver before time moves. Time starts at 0.
    """

    def __init__(self) -> None:
        self._jumping = _JumpingSelector()
        super().__init__(self._jumping)

    def time(self) -> float:
        return self._jumping.virtual_time

    def run_in_executor(self, executor: Executor | None, func: Callable[..., T], *args: Any) -> Future[T]:  # type: ignore[override]
        future: Future[T] = super().run_in_executor(executor, func, *args)
        self._jumping.threads_busy += 1
        future.add_done_callback(self._thread_done)
        return future

    async def shutdown_default_executor(self, timeout: float | None = None) -> None:  # noqa: ARG002
        """Waits for the threads in real time: a timeout would pass at once in virtual time."""
        await super().shutdown_default_executor()

    def _thread_done(self, _future: Future[Any]) -> None:
        self._jumping.threads_busy -= 1


class SimClock:
    """Clock of a simulated node, driven by the time of an event loop.

    rate: seconds of this clock for each second of the loop.
    offset: start of monotonic(), in seconds.
    wall_error: seconds by which now() is wrong; may be changed at any time.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, rate: float = 1.0, offset: float = 1000.0) -> None:
        self._loop, self.rate, self._offset = loop, rate, offset
        self.wall_error = 0.0

    def monotonic(self) -> float:
        return self._offset + self._loop.time() * self.rate

    def now(self) -> datetime:
        return _EPOCH + timedelta(seconds=self._loop.time() * self.rate + self.wall_error)

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(seconds / self.rate)

    def timeout(self, seconds: float) -> AbstractAsyncContextManager[object]:
        return asyncio.timeout(seconds / self.rate)


def run(main: Callable[[], Coroutine[Any, Any, T]], debug: bool | None = None) -> T:
    """Runs main() to its end on a new VirtualLoop and returns its result."""
    with asyncio.Runner(loop_factory=VirtualLoop, debug=debug) as runner:
        return runner.run(main())


def virtual(function: Callable[P, Coroutine[Any, Any, T]]) -> Callable[P, T]:
    """Turns a coroutine function into an ordinary function that runs on a VirtualLoop of its own. A decorator."""

    @functools.wraps(function)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> T:
        return run(lambda: function(*args, **kwargs))

    return wrapper
