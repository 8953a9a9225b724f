"""Runs commands in the test process: captures output and log, and restores what a command changes in its process."""

from __future__ import annotations

import asyncio
import asyncio.events
import asyncio.sslproto
import contextlib
import gc
import logging
import os
import signal
import threading
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Self

import pytest

from usbip_plugin.cli.main import main
from usbip_plugin.observe.logs import PACKAGES
from usbip_plugin.sync import Broadcast

LIMIT_S = 60.0
"""Limits a wait for an event that must come, in real seconds. Only a hanging test reaches it."""


NEEDS_IPV6 = pytest.mark.ipv6
LOOPBACKS = ("127.0.0.1", pytest.param("::1", marks=NEEDS_IPV6))


class CommandLoop(asyncio.SelectorEventLoop):
    """The event loop of a command. Before it closes, it aborts the TLS connections that are still open.

    After a request that was given up, the API client forgets a connection that waits for its peer to close it. The end
    of a process would close it; in the tests' process, a later test would be warned of it.
    """

    def close(self) -> None:
        if not self.is_closed():
            for transport in tuple(self._transports.values()):  # type: ignore[attr-defined]
                if isinstance(transport.get_protocol(), asyncio.sslproto.SSLProtocol):
                    transport.abort()
            self.run_until_complete(asyncio.sleep(0))
        super().close()


@contextlib.contextmanager
def process_restored() -> Iterator[None]:
    """Restores what a command changes in its process: logging, environment, garbage collection, TLS buffer size.

    Commands run on a CommandLoop meanwhile.
    """
    loggers = [logging.getLogger(), *map(logging.getLogger, PACKAGES)]
    levels, handlers = [logger.level for logger in loggers], list(loggers[0].handlers)
    environ = dict(os.environ)
    size = asyncio.sslproto.SSLProtocol.max_size
    new_event_loop = asyncio.events.new_event_loop
    asyncio.events.new_event_loop = CommandLoop
    try:
        yield
    finally:
        asyncio.events.new_event_loop = new_event_loop
        asyncio.sslproto.SSLProtocol.max_size = size
        gc.unfreeze()
        os.environ.clear()
        os.environ.update(environ)
        loggers[0].handlers[:] = handlers
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


@dataclass(frozen=True)
class CommandResult:
    """Exit status and output of a command."""

    status: int
    out: str
    err: str


TIMEOUTS = (
    "usbip_plugin.cli.lookup.DEVLIST_TIMEOUT_S",
    "usbip_plugin.cli.completion.TIMEOUT_S",
    "usbip_plugin.cli.export_commands.ASK_S",
    "usbip_plugin.node.check.CHECK_TIMEOUT_S",
    "usbip_plugin.node.check.CONNECT_TIMEOUT_S",
    "usbip_plugin.node.check.DEVLIST_TIMEOUT",
)
"""Timeouts of commands, a few seconds each. No test is about them, and a busy machine exceeds them."""


class Terminal:
    """Runs commands in a thread beside the test's event loop. For commands that handle no signals."""

    def __init__(self, capsys: pytest.CaptureFixture[str], always: Sequence[str] = ()) -> None:
        """always: flags to add to each command."""
        self.capsys, self._always = capsys, tuple(always)

    async def run(self, *arguments: str) -> CommandResult:
        with pytest.MonkeyPatch.context() as patch:
            for name in TIMEOUTS:
                patch.setattr(name, LIMIT_S)
            async with asyncio.timeout(LIMIT_S):
                status = await asyncio.to_thread(main, [*arguments, *self._always])
        out, err = self.capsys.readouterr()
        return CommandResult(status, out, err)


class Log(logging.Handler):
    """Collects the project's log records while entered. For one event loop."""

    def __init__(self) -> None:
        super().__init__()
        self.records: list[logging.LogRecord] = []
        self._changed = Broadcast()

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append(record)
        self._changed.fire()

    def __enter__(self) -> Self:
        for package in PACKAGES:
            logging.getLogger(package).addHandler(self)
        return self

    def __exit__(self, *_error: object) -> None:
        for package in PACKAGES:
            logging.getLogger(package).removeHandler(self)

    def having(self, message: str) -> list[logging.LogRecord]:
        return [record for record in self.records if record.getMessage() == message]

    async def until(self, message: str, number: int = 1) -> logging.LogRecord:
        """Waits for the number-th record with this message."""
        async with asyncio.timeout(LIMIT_S):
            await self._changed.until(lambda: len(self.having(message)) >= number)
        return self.having(message)[number - 1]


def end_process(number: signal.Signals = signal.SIGTERM) -> None:
    """Sends a signal to this process. Fails unless a command handles it, as it would end the tests."""
    assert signal.getsignal(number) not in (signal.SIG_DFL, signal.default_int_handler)
    os.kill(os.getpid(), number)


def simulate(story: Callable[[logging.LogRecord], Awaitable[None]], message: str, *arguments: str) -> int:
    """Runs `usbip-plugin simulate`, ends it with SIGTERM after the story, and returns its exit status.

    The story runs in the command's event loop. It starts when the message is logged, and gets that record.
    """
    failures: list[Exception] = []

    class StoryStarter(Log):
        def emit(self, record: logging.LogRecord) -> None:
            super().emit(record)
            if record.getMessage() == message:
                self.task = asyncio.get_running_loop().create_task(run_story(record))

    async def run_story(record: logging.LogRecord) -> None:
        try:
            async with asyncio.timeout(LIMIT_S):
                await story(record)
        except Exception as error:  # noqa: BLE001 - raised again below
            failures.append(error)
        finally:
            end_process()

    limit = threading.Timer(LIMIT_S, end_process)
    limit.start()
    try:
        with StoryStarter() as log:
            status = main(["simulate", *arguments])
    finally:
        limit.cancel()
    for failure in failures:
        raise failure
    assert status or log.having(message), "the command did not log that it runs"
    return status
