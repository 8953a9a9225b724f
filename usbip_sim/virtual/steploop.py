"""A virtual event loop without I/O that knows the process of each callback, and can freeze or kill the process.

A process can be killed after an exact number of its steps. A step is one callback run by the loop: a task resumed up to
its next await, a timer fired, something delivered. The next run of the same program repeats everything exactly.
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

from usbip_plugin.sync import Broadcast
from usbip_sim.sockets import MemoryStreams
from usbip_sim.virtual.loop import Deadlock

T = TypeVar("T")
P = ParamSpec("P")

MAX_STEPS_AT_ONE_TIME = 50_000
"""Limit of steps at one moment of virtual time, above which StepLoop raises BusyLoop."""
_MIN_CANCELLED = 100

_owner: ContextVar[Process | None] = ContextVar("usbip_plugin_sim_process", default=None)


class BusyLoop(RuntimeError):
    """Error of a StepLoop whose callbacks run endlessly while virtual time stands still."""


class Process:
    """Unit that is frozen and killed as one: an operating system's process, or a host with its processes.

    Callbacks and tasks made within the process's context belong to the process, as does everything that they start.

    halted: no callback of the process runs, because the process is frozen or dead, or its host is halted.
    """

    def __init__(self, loop: StepLoop, name: str, host: Process | None = None) -> None:
        self.name = name
        self.steps = 0
        self.dead = False
        self.halted = False
        self._loop = loop
        self._host = host
        self._guests: list[Process] = []
        self.frozen = False
        self._halted_at = 0.0
        self._halted_for = 0.0
        self._parked: list[asyncio.Handle] = []
        self._tasks: weakref.WeakSet[_Task] = weakref.WeakSet()
        self._remains: list[_Task] = []
        self._death = Broadcast()
        self._traps: list[tuple[int, Callable[[], None]]] = []
        self.context: Context = copy_context()
        self.context.run(_owner.set, self)
        loop.processes.append(self)
        if host is not None:
            host._guests.append(self)  # noqa: SLF001
            self._update_halted()

    def freeze(self) -> None:
        """Stops every callback of the process, as SIGSTOP does. Due timers and deliveries wait for thaw()."""
        self.frozen = True
        self._update_halted()

    def thaw(self) -> None:
        """Continues the process, as SIGCONT does: runs deliveries that waited, then the timers."""
        self.frozen = False
        self._update_halted()

    def halted_time(self) -> float:
        """Returns the total time for which the process has been halted, in seconds of the loop."""
        return self._halted_for + (self._loop.time() - self._halted_at if self.halted else 0.0)

    def kill(self) -> None:
        """Kills the process: no further step of it runs, not even a `finally`. Idempotent."""
        if self.dead:
            return
        self.dead = True
        self._update_halted()
        self._traps.clear()
        self._remains = self.tasks()  # keeps the tasks alive: garbage collection would run the rest of their code
        self._death.fire()

    def on_death(self, callback: Callable[[], None]) -> Callable[[], None]:
        """Registers a callback for kill(), for what an operating system cleans up. Returns how to unregister it."""
        return self._death.subscribe(callback)

    def after_steps(self, count: int, callback: Callable[[], None]) -> None:
        """Calls callback once, right after count (at least 1) more steps of the process, if it lives that long."""
        self._traps.append((self.steps + max(1, count), callback))
        self._traps.sort(key=lambda trap: trap[0])

    def tasks(self) -> list[_Task]:
        """Returns the process's tasks that are not done, in the order in which they were made."""
        return sorted((task for task in self._tasks if not task.done()), key=lambda task: task.number)

    def call_soon(self, callback: Callable[..., object], *args: Any) -> None:
        if not self.dead:
            self._loop.call_soon(callback, *args, context=self.context)

    def call_later(self, seconds: float, callback: Callable[..., object], *args: Any) -> asyncio.TimerHandle:
        return self._loop.call_later(seconds, callback, *args, context=self.context)

    def create_task(self, coro: Coroutine[Any, Any, T], name: str) -> asyncio.Task[T]:
        return self._loop.create_task(coro, name=name, context=self.context.copy())

    def release(self) -> None:
        """Lets the process run and end when the simulation is over, also if it is dead."""
        self.dead = self.frozen = False
        self._update_halted()

    # Called by the loop.

    def park(self, handle: asyncio.Handle) -> None:
        self._parked.append(handle)  # also for a dead process: a task whose wake-up is lost could never be ended

    def stepped(self) -> None:
        self.steps += 1
        while self._traps and self.steps >= self._traps[0][0]:
            self._traps.pop(0)[1]()

    def adopt(self, task: _Task) -> None:
        self._tasks.add(task)

    def _update_halted(self) -> None:
        """Updates `halted` of the process and its guests."""
        before, self.halted = self.halted, self.frozen or self.dead or (self._host is not None and self._host.halted)
        if self.halted and not before:
            self._halted_at = self._loop.time()
        elif before and not self.halted:
            self._halted_for += self._loop.time() - self._halted_at
        for guest in self._guests:
            guest._update_halted()  # noqa: SLF001
        if not self.halted:
            parked, self._parked = self._parked, []
            self._loop.resume([handle for handle in parked if not isinstance(handle, asyncio.TimerHandle)])
            self._loop.resume([handle for handle in parked if isinstance(handle, asyncio.TimerHandle)])


class _Task(asyncio.Task[Any]):
    """Task hashed by its number: asyncio cancels tasks in the order of a set, which must be the same in each run."""

    number: int

    def __hash__(self) -> int:
        return self.number


class StepLoop(MemoryStreams, asyncio.BaseEventLoop):
    """Event loop in virtual time, which stands still while anything is ready, then jumps to the next timer.

    after_step: called after each step.
    before_jump: called with the new time before time jumps to it; nothing changes in between.
    unhandled: contexts of errors that callbacks and tasks raised and nobody retrieved.
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
        """Makes callbacks ready that were parked while their process was halted."""
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
        """Makes due timers ready. If nothing is ready, time first jumps to the next timer; raises Deadlock for none."""
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
        """Does nothing: the loop has no I/O."""

    def _write_to_self(self) -> None:
        """Does nothing: no thread can wake the loop."""


def loop_of() -> StepLoop:
    """Returns the running loop. Raises TypeError if it is not a StepLoop."""
    loop = asyncio.get_running_loop()
    if not isinstance(loop, StepLoop):
        raise TypeError(f"expected a StepLoop, got {loop!r}")
    return loop


def run(main: Callable[[], Coroutine[Any, Any, T]]) -> T:
    """Runs main() to its end on a new StepLoop, then ends all processes and tasks.

    Raises AssertionError for an error of a callback or task that nobody retrieved.
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
    """Turns a coroutine function into an ordinary function that runs on a StepLoop of its own. A decorator."""

    @functools.wraps(function)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> T:
        return run(lambda: function(*args, **kwargs))

    return wrapper
