"""Tasks that last as long as a block of a test, and tests that run in such a block in virtual time."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import inspect
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import AbstractAsyncContextManager
from typing import Any, Concatenate, ParamSpec, TypeVar

from usbip_plugin.sync import Steps
from usbip_sim.virtual.loop import run

P = ParamSpec("P")
T = TypeVar("T")


@contextlib.asynccontextmanager
async def background(coroutine: Coroutine[Any, Any, None]) -> AsyncIterator[asyncio.Task[None]]:
    """Runs a coroutine for the length of the block, and then cancels it. Raises what the coroutine raised."""
    task = asyncio.create_task(coroutine)
    try:
        yield task
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


def result_of(steps: Steps[T]) -> T:
    """Returns the result of a computation in steps, all at once."""
    try:
        while True:
            next(steps)
    except StopIteration as end:
        result: T = end.value
        return result


def virtual_with(
    block: Callable[[], AbstractAsyncContextManager[T]],
) -> Callable[[Callable[Concatenate[T, P], Coroutine[Any, Any, None]]], Callable[P, None]]:
    """Returns a decorator that runs a test in virtual time in this block, whose value is its first argument."""

    def decorate(test: Callable[Concatenate[T, P], Coroutine[Any, Any, None]]) -> Callable[P, None]:
        @functools.wraps(test)
        def in_block(*args: P.args, **kwargs: P.kwargs) -> None:
            async def main() -> None:
                async with block() as value:
                    await test(value, *args, **kwargs)

            run(main)

        # pytest looks up a fixture for each parameter
        _, *parameters = inspect.signature(test).parameters.values()
        in_block.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        return in_block

    return decorate
