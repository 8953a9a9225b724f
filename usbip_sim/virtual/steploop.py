"""A virtual event loop without I/O that runs one callback at a time and knows whose it is.

That is what faults need that no code under test can notice by itself: a process that is frozen, or killed after exactly
so many of its steps. A step is one callback run by the loop: a task resumed up to its next await, a timer fired,
something delivered. Everything is repeated exactly by the next run of the same program.
"""

from __future__ import annotations

import asyncio
import collections
import functools
import heapq
import weakref
from collections.abc import Callable, Coroutine
from contextvars import Context, ContextVar, copy_context
from typing import Any, ParamSpec, TypeVar

from usbip_sim.sockets import MemoryStreams
from usbip_sim.virtual.loop import Deadlock

T = TypeVar("T")

P = ParamSpec("P")

MAX_STEPS_AT_ONE_TIME = 50_000
"""Steps in a row without virtual time moving on, before it is called a busy loop."""
_MIN_CANCELLED = 100

_owner: ContextVar[Process | None] = ContextVar("usbip_plugin_sim_process", default=None)


class BusyLoop(RuntimeError):
    """Something goes on for ever without waiting for anything."""


class Process:
    """What is frozen and killed as one: an operating system's process, or a host, whose processes freeze with it.

    What is called, or made a task of, within its context is its own, and so is all that comes of that.
    """

    def __init__(self, loop: StepLoop, name: str, host: Process | None = None) -> None:
        self.name = name
        self.steps = 0
        self.dead = False
        self.halted = False
        """Nothing of it runs: it is frozen, or its host is, or it is dead."""
        self._loop = loop
        self._host = host
        self._guests: list[Process] = []
        self._frozen = False
        self._halted_at = 0.0
        self._halted_for = 0.0
        self._parked: list[asyncio.Handle] = []
        self._tasks: weakref.WeakSet[_Task] = weakref.WeakSet()
        self._remains: list[_Task] = []
        self._last_words: list[Callable[[], None]] = []
        self._traps: list[tuple[int, Callable[[], None]]] = []
        self.context: Context = copy_context()
        self.context.run(_owner.set, self)
        loop.processes.append(self)
        if host is not None:
            host.attend(self)

    @property
    def frozen(self) -> bool:
        return self._frozen

    def freeze(self) -> None:
        """From now on nothing of it runs. Its timers go on, and what others send it waits."""
        self._frozen = True
        self.look_again()

    def thaw(self) -> None:
        """What was due meanwhile runs now, as after a SIGCONT: first what came in, then every timer."""
        self._frozen = False
        self.look_again()

    def halted_time(self) -> float:
        """Seconds of the loop for which it was frozen so far, all told."""
        return self._halted_for + (self._loop.time() - self._halted_at if self.halted else 0.0)

    def kill(self) -> None:
        """Not one more step of it runs, no `finally` either. What was given to `at_death` is called. Idempotent."""
        if self.dead:
            return
        self.dead = True
        self.look_again()
        self._traps.clear()
        self._remains = self.tasks()  # or they were collected, which would run what is left of them
        last_words, self._last_words = self._last_words, []
        for callback in last_words:
            callback()

    def at_death(self, callback: Callable[[], None]) -> Callable[[], None]:
        """Call this when it is killed: what an operating system cleans up. Returns what takes it back."""
        self._last_words.append(callback)

        def forget() -> None:
            if callback in self._last_words:
                self._last_words.remove(callback)

        return forget

    def after_steps(self, count: int, callback: Callable[[], None]) -> None:
        """Call this once, right after so many more of its steps (at least 1), if it lives so long."""
        self._traps.append((self.steps + max(1, count), callback))
        self._traps.sort(key=lambda trap: trap[0])

    def tasks(self) -> list[_Task]:
        """Its tasks that are not done, in the order in which they were made."""
        return sorted((task for task in self._tasks if not task.done()), key=lambda task: task.number)

    def call_soon(self, callback: Callable[..., object], *args: Any) -> None:
        if not self.dead:
            self._loop.call_soon(callback, *args, context=self.context)

    def call_later(self, seconds: float, callback: Callable[..., object], *args: Any) -> asyncio.TimerHandle:
        """seconds of the loop."""
        return self._loop.call_later(seconds, callback, *args, context=self.context)

    def create_task(self, coro: Coroutine[Any, Any, T], name: str) -> asyncio.Task[T]:
        return self._loop.create_task(coro, name=name, context=self.context.copy())

    def release(self) -> None:
        """The simulation is over: whatever is left of it may run, and end. Of the dead, too."""
        self.dead = self._frozen = False
        self.look_again()

    # for the loop

    def park(self, handle: asyncio.Handle) -> None:
        self._parked.append(handle)  # of the dead, too: a task whose wake-up is lost could never be ended

    def stepped(self) -> None:
        self.steps += 1
        while self._traps and self.steps >= self._traps[0][0]:
            self._traps.pop(0)[1]()

    def adopt(self, task: _Task) -> None:
        self._tasks.add(task)

    # for its guests and its host

    def attend(self, guest: Process) -> None:
        self._guests.append(guest)

    def look_again(self) -> None:
        """It or its host was frozen or thawed."""
        before, self.halted = self.halted, self._frozen or self.dead or (self._host is not None and self._host.halted)
        if self.halted and not before:
            self._halted_at = self._loop.time()
        elif before and not self.halted:
            self._halted_for += self._loop.time() - self._halted_at
        for guest in self._guests:
            guest.look_again()
        if not self.halted:
            parked, self._parked = self._parked, []
            self._loop.resume([handle for handle in parked if not isinstance(handle, asyncio.TimerHandle)])
            self._loop.resume([handle for handle in parked if isinstance(handle, asyncio.TimerHandle)])


class _Task(asyncio.Task[Any]):
    """Hashed by its number and not by its address: asyncio keeps tasks in sets, and cancels them in the sets' order."""

    number: int

    def __hash__(self) -> int:
        return self.number


class StepLoop(MemoryStreams, asyncio.BaseEventLoop):
    """Virtual time that stands still while anything is ready, then jumps to the next timer. No sockets, no threads.

    after_step is called after each step, before_jump(time) before time jumps there: until then all stays as it is.
    unhandled collects what callbacks and tasks raised that nobody looked at.
    """

    _ready: collections.deque[asyncio.Handle]
    _scheduled: list[asyncio.TimerHandle]
    _stopping: bool
    _timer_cancelled_count: int

    def __init__(self) -> None:
        super().__init__()
        self._now = 0.0
        self._at_this_time = 0
        self._made = 0
        self.steps = 0
        self.after_step: Callable[[], None] | None = None
        self.before_jump: Callable[[float], None] | None = None
        self.unhandled: list[dict[str, Any]] = []
        self.processes: list[Process] = []
        self.set_task_factory(self._make_task)
        self.set_exception_handler(lambda _loop, context: self.unhandled.append(context))

    def time(self) -> float:
        return self._now

    def resume(self, handles: list[asyncio.Handle]) -> None:
        """Callbacks that were held back are ready now."""
        self._ready.extend(handles)

    def _make_task(self, _loop: asyncio.AbstractEventLoop, coro: Any, **kwargs: Any) -> _Task:
        task = _Task.__new__(_Task)
        task.number = self._made
        self._made += 1
        _Task.__init__(task, coro, loop=self, **kwargs)
        context = kwargs.get("context")
        owner = context.get(_owner) if context is not None else _owner.get()
        if owner is not None:
            owner.adopt(task)
        return task

    def _run_once(self) -> None:
        self._move_time()
        ready = self._ready
        for _ in range(len(ready)):
            handle = ready.popleft()
            if handle.cancelled():
                continue
            owner = handle._context.get(_owner)  # type: ignore[attr-defined]  # noqa: SLF001
            if owner is not None and owner.halted:
                owner.park(handle)
                continue
            self.steps += 1
            handle._run()  # noqa: SLF001 (this is the loop)
            if owner is not None:
                owner.stepped()
            if self.after_step is not None:
                self.after_step()
            self._at_this_time += 1
        if self._at_this_time > MAX_STEPS_AT_ONE_TIME:
            raise BusyLoop(f"{self._at_this_time} steps at {self._now} s")

    def _move_time(self) -> None:
        """Timers that are due are ready; if nothing is, time jumps to the next one."""
        timers = self._scheduled
        if self._timer_cancelled_count > max(_MIN_CANCELLED, len(timers) // 2):
            for timer in timers:
                if timer.cancelled():
                    timer._scheduled = False  # type: ignore[attr-defined]  # noqa: SLF001
            timers[:] = [timer for timer in timers if not timer.cancelled()]
            heapq.heapify(timers)
            self._timer_cancelled_count = 0
        while timers and timers[0].cancelled():
            self._timer_cancelled_count -= 1
            heapq.heappop(timers)._scheduled = False  # type: ignore[attr-defined]  # noqa: SLF001
        if not self._ready and not self._stopping:
            if not timers:
                raise Deadlock("virtual loop: nothing is ready and no timer is set")
            when = timers[0].when()
            if when > self._now and self.before_jump is not None:
                self.before_jump(when)
            if when > self._now and not self._ready:
                self._now = when
                self._at_this_time = 0
        while timers and timers[0].when() <= self._now:
            timer = heapq.heappop(timers)
            timer._scheduled = False  # type: ignore[attr-defined]  # noqa: SLF001
            self._ready.append(timer)

    def _process_events(self, event_list: object) -> None:
        """There is no I/O."""

    def _write_to_self(self) -> None:
        """There are no threads to be woken by."""


def loop_of() -> StepLoop:
    """The running loop, which must be a StepLoop."""
    loop = asyncio.get_running_loop()
    if not isinstance(loop, StepLoop):
        raise TypeError("this runs on a StepLoop only")
    return loop


def run(main: Callable[[], Coroutine[Any, Any, T]]) -> T:
    """Run main() to its end on a new StepLoop, then end what is left of every process and task.

    An error that nobody looked at is raised, as AssertionError.
    """

    async def whole() -> T:
        loop = loop_of()
        try:
            return await main()
        finally:
            loop.after_step = loop.before_jump = None
            for process in loop.processes:
                process.release()

    with asyncio.Runner(loop_factory=StepLoop, debug=False) as runner:
        result = runner.run(whole())
        loop = runner.get_loop()
        if isinstance(loop, StepLoop) and loop.unhandled:
            raise AssertionError(loop.unhandled[0]) from loop.unhandled[0].get("exception")
        return result


def stepped(function: Callable[P, Coroutine[Any, Any, T]]) -> Callable[P, T]:
    """Decorator: the coroutine function becomes an ordinary one that runs on a StepLoop of its own."""

    @functools.wraps(function)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> T:
        return run(lambda: function(*args, **kwargs))

    return wrapper
