"""The command line in this process: what a command prints and logs, and the process as it was before."""

from __future__ import annotations

import asyncio
import asyncio.sslproto
import contextlib
import gc
import logging
import os
import signal
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Self

import pytest

from usbip_plugin.cli import main
from usbip_plugin.kubelet.broadcast import Broadcast
from usbip_plugin.observe.logs import PACKAGE

LIMIT_S = 60.0
"""Real seconds after which what must happen counts as missing."""


NEEDS_IPV6 = pytest.mark.ipv6
LOOPBACKS = ("127.0.0.1", pytest.param("::1", marks=NEEDS_IPV6))


@contextlib.contextmanager
def undone() -> Iterator[None]:
    """What a command sets in its process is set back: logging, environment, garbage collection, buffers of TLS."""
    root, ours = logging.getLogger(), logging.getLogger(PACKAGE)
    levels, handlers = (root.level, ours.level), list(root.handlers)
    environ = dict(os.environ)
    size = asyncio.sslproto.SSLProtocol.max_size
    try:
        yield
    finally:
        asyncio.sslproto.SSLProtocol.max_size = size
        gc.unfreeze()
        os.environ.clear()
        os.environ.update(environ)
        root.handlers[:] = handlers
        root.setLevel(levels[0])
        ours.setLevel(levels[1])


@dataclass(frozen=True)
class Ran:
    """One command that has ended."""

    status: int
    out: str
    err: str


class Terminal:
    """Runs commands that need no signals beside the test's own event loop."""

    def __init__(self, capsys: pytest.CaptureFixture[str], always: Sequence[str] = ()) -> None:
        """always: flags that follow each command."""
        self.capsys, self._always = capsys, tuple(always)

    async def run(self, *arguments: str) -> Ran:
        async with asyncio.timeout(LIMIT_S):
            status = await asyncio.to_thread(main, [*arguments, *self._always])
        out, err = self.capsys.readouterr()
        return Ran(status, out, err)


class Log(logging.Handler):
    """The package's records while it is entered, whatever else is logged to. For one event loop."""

    def __init__(self) -> None:
        super().__init__()
        self.records: list[logging.LogRecord] = []
        self._changed = Broadcast()

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append(record)
        self._changed.fire()

    def __enter__(self) -> Self:
        logging.getLogger(PACKAGE).addHandler(self)
        return self

    def __exit__(self, *_error: object) -> None:
        logging.getLogger(PACKAGE).removeHandler(self)

    def having(self, message: str) -> list[logging.LogRecord]:
        return [record for record in self.records if record.getMessage() == message]

    async def until(self, message: str, number: int = 1) -> logging.LogRecord:
        """The first record of that message, or the number-th."""
        async with asyncio.timeout(LIMIT_S):
            await self._changed.until(lambda: len(self.having(message)) >= number)
        return self.having(message)[number - 1]


def end_process(number: signal.Signals = signal.SIGTERM) -> None:
    """A signal to this process, where a command listens for it; elsewhere it would be the end of the tests."""
    assert signal.getsignal(number) not in (signal.SIG_DFL, signal.default_int_handler)
    os.kill(os.getpid(), number)


def simulate(story: Callable[[logging.LogRecord], Awaitable[None]], message: str, *arguments: str) -> int:
    """Runs `usbip-plugin simulate` to its end, which is SIGTERM after the story; its exit status.

    The story takes place in the command's own event loop. It begins when the message is logged, with its record.
    """
    failures: list[Exception] = []

    class Begin(Log):
        def emit(self, record: logging.LogRecord) -> None:
            super().emit(record)
            if record.getMessage() == message:
                self.task = asyncio.get_running_loop().create_task(told(record))

    async def told(record: logging.LogRecord) -> None:
        try:
            async with asyncio.timeout(LIMIT_S):
                await story(record)
        except Exception as error:  # noqa: BLE001 - it is raised where the test is
            failures.append(error)
        finally:
            end_process()

    with Begin():
        status = main(["simulate", *arguments])
    for failure in failures:
        raise failure
    return status
