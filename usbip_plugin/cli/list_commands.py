"""The commands that list what a cluster has: devices, nodes, servers."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import sys
from collections.abc import Awaitable, Callable, Iterable, Sequence
from typing import NoReturn, Protocol

from usbip_plugin.cli.devices import COLUMNS, by_column, changes, rows, select
from usbip_plugin.cli.nodes import NODE_COLUMNS, SERVER_COLUMNS, node_rows, server_rows
from usbip_plugin.cli.pages import read_statuses
from usbip_plugin.cli.parser import Exit
from usbip_plugin.cli.sources import ASKING, Sources, connected, read_sources
from usbip_plugin.cli.spinner import spinner
from usbip_plugin.cli.tables import Columns, Row, show, structured, widths
from usbip_plugin.clock import Clock, SystemClock
from usbip_plugin.errors import KubeError, PluginError
from usbip_plugin.locks.kubernetes import KubernetesLeases
from usbip_plugin.locks.record import LOCK_LABELS, LeaseStore

REFRESH_S = 10.0
"""Seconds after which `devices --watch` asks servers and nodes again. A change of a lock is shown at once."""
SETTLE_S = 0.2
"""Seconds that `devices --watch` waits after a change of a lock: a pod with several devices changes several."""


async def devices(options: argparse.Namespace) -> int:
    """Carries out `usbip-plugin devices`."""
    async with connected(options) as (kube, namespace):

        async def read() -> Sources:
            return await read_sources(options, kube, namespace)

        if options.watch:
            store, clock = KubernetesLeases(kube, namespace), SystemClock()
            await follow(options, read, LockChanges(store, clock))
        async with spinner(ASKING):
            sources = await read()
    _note(sources.problems)
    found = _chosen(options, sources)
    if not found and options.output in ("table", "wide"):
        _note(["no device matches" if _is_filtered(options) else "no device is configured, locked or listed"])
    show(found, COLUMNS, options.output, head=not options.no_headers)
    return Exit.DONE


async def nodes(options: argparse.Namespace) -> int:
    """Carries out `usbip-plugin nodes`."""
    async with connected(options) as (kube, namespace), spinner("asking the API server and the plugins"):
        sources = await read_sources(options, kube, namespace, ask=False)
        pages, problems = await read_statuses(kube, namespace, sources.plugins or ())
    _note([*sources.problems, *problems])
    found = node_rows(sources.nodes, sources.plugins or (), sources.survey.known, pages)
    _show(found, NODE_COLUMNS, options, "no node")
    return Exit.DONE


async def servers(options: argparse.Namespace) -> int:
    """Carries out `usbip-plugin servers`."""
    async with connected(options) as (kube, namespace), spinner(ASKING):
        sources = await read_sources(options, kube, namespace)
    _note(sources.problems)
    _show(server_rows(sources.survey), SERVER_COLUMNS, options, "no USB/IP server is configured or locked")
    return Exit.DONE


class Changes(Protocol):
    """Says when to look at the devices again. next() works only while run() runs."""

    async def run(self) -> None: ...

    async def next(self) -> None: ...


class LockChanges:
    """Says when a lock has changed. Works only while run() runs."""

    def __init__(self, store: LeaseStore, clock: Clock) -> None:
        self._store, self._clock = store, clock
        self._changed = asyncio.Event()

    async def run(self) -> None:
        """Watches the locks until cancelled. An error is no change: the next look at the devices reports it."""
        while True:
            with contextlib.suppress(KubeError):
                version = (await self._store.list(LOCK_LABELS, lambda _lease: False)).resource_version
                async with contextlib.aclosing(self._store.watch(LOCK_LABELS, version)) as changes:
                    async for change in changes:
                        if change.lease is not None:
                            self._changed.set()
            await self._clock.sleep(REFRESH_S)

    async def next(self) -> None:
        """Returns after the next change of a lock, or after REFRESH_S."""
        with contextlib.suppress(TimeoutError):
            async with self._clock.timeout(REFRESH_S):
                await self._changed.wait()
                await self._clock.sleep(SETTLE_S)
        self._changed.clear()


async def follow(options: argparse.Namespace, read: Callable[[], Awaitable[Sources]], changed: Changes) -> NoReturn:
    """Shows the devices, and then each one that changes, until cancelled.

    Raises the error of the first read, and BrokenPipeError if nobody reads the output. Says later errors once each.
    """
    sources = await read()
    shown = _chosen(options, sources)
    problems = frozenset(sources.problems)
    _note(sources.problems)
    sizes = widths(shown, COLUMNS.table)
    _show_changes(shown, options, sizes, head=not options.no_headers)
    unread: BrokenPipeError | None = None
    async with asyncio.TaskGroup() as tasks:
        watching = tasks.create_task(changed.run())
        while unread is None:
            await changed.next()
            try:
                sources = await read()
                now_wrong = sources.problems
                found = _chosen(options, sources, missing_ok=True)
            except PluginError as error:
                now_wrong, found = (str(error),), shown
            _note(line for line in now_wrong if line not in problems)
            try:
                _show_changes(changes(shown, found), options, sizes, head=False)
            except BrokenPipeError as error:  # raised below: the group would wrap it
                unread = error
            problems, shown = frozenset(now_wrong), found
        watching.cancel()
    raise unread


def _show_changes(found: Sequence[Row], options: argparse.Namespace, sizes: Sequence[int], *, head: bool) -> None:
    """Writes rows as they come: JSON one object a line, YAML as documents."""
    if options.output == "json":
        for row in found:
            _say(json.dumps(row))
    elif options.output == "yaml":
        for row in found:
            _say("---\n" + structured(dict(row), "yaml"))
    else:
        show(found, COLUMNS, options.output, head=head, sizes=sizes)
    sys.stdout.flush()


def _chosen(options: argparse.Namespace, sources: Sources, *, missing_ok: bool = False) -> list[Row]:
    found = rows(sources.survey, sources.offered(), locks_read=sources.locks_read)
    wanted = {"resource": options.resource, "node": options.node, "server": options.server}
    return by_column(select(found, options.names, **wanted, missing_ok=missing_ok), options.sort_by)


def _is_filtered(options: argparse.Namespace) -> bool:
    return any((options.names, options.resource, options.node, options.server))


def _show(found: Sequence[Row], columns: Columns, options: argparse.Namespace, nothing: str) -> None:
    if not found and options.output in ("table", "wide"):
        _note([nothing])
    show(found, columns, options.output, head=not options.no_headers)


def _note(lines: Iterable[str]) -> None:
    """Writes what could not be read to standard error; standard output is for programs."""
    for line in lines:
        print(line, file=sys.stderr)  # noqa: T201 - the command line's own voice


def _say(text: str) -> None:
    print(text)  # noqa: T201 - the command line's own voice
