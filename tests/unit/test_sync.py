"""Waits with a limit, the watch on a directory, and tasks of a group that may be stopping."""

from __future__ import annotations

import asyncio
import errno
import logging
from collections.abc import Callable
from pathlib import Path

import asyncinotify
import pytest

from usbip_plugin.sync import Broadcast, DirectoryWatch, done_within, start_task
from usbip_sim.virtual.loop import SimClock, virtual


@virtual
async def test_a_wait_that_is_over_in_time_is_done() -> None:
    clock, event = SimClock(asyncio.get_running_loop()), asyncio.Event()
    began = clock.monotonic()
    asyncio.get_running_loop().call_later(4.9, event.set)
    assert await done_within(clock, 5, event.wait())
    assert clock.monotonic() - began == pytest.approx(4.9)


@virtual
async def test_a_wait_that_takes_too_long_is_cancelled() -> None:
    clock, ended = SimClock(asyncio.get_running_loop()), asyncio.Event()
    began = clock.monotonic()

    async def wait() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            ended.set()

    assert not await done_within(clock, 5, wait())
    assert ended.is_set()
    assert clock.monotonic() - began == pytest.approx(5)


@virtual
async def test_an_error_of_the_wait_is_raised() -> None:
    async def wait() -> None:
        raise OSError

    with pytest.raises(OSError):  # noqa: PT011 - its words do not matter
        await done_within(SimClock(asyncio.get_running_loop()), 5, wait())


RECHECK, POLL, DEBOUNCE = 60.0, 5.0, 0.2


def watch_of(path: Path) -> DirectoryWatch:
    clock = SimClock(asyncio.get_running_loop())
    return DirectoryWatch(path, clock, recheck=RECHECK, poll=POLL, debounce=DEBOUNCE)


async def waited(watch: DirectoryWatch) -> float:
    """Returns the duration of one wait in seconds."""
    began = asyncio.get_running_loop().time()
    await watch.changed()
    return asyncio.get_running_loop().time() - began


def swap_a_link(directory: Path) -> None:
    (directory / "..data_tmp").symlink_to("..2")
    (directory / "..data_tmp").replace(directory / "..data")


CHANGES: dict[str, Callable[[Path], object]] = {
    "created": lambda directory: (directory / "new").touch(),
    "written": lambda directory: (directory / "file").write_text("new"),
    "replaced": lambda directory: (directory / "other").replace(directory / "file"),
    "moved away": lambda directory: (directory / "file").rename(directory.with_name("elsewhere")),
    "removed": lambda directory: (directory / "file").unlink(),
    "link swapped": swap_a_link,
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
@virtual
async def test_a_change_of_an_entry_ends_the_wait_also_one_that_came_before_it(
    change: Callable[[Path], object], tmp_path: Path
) -> None:
    directory = tmp_path / "watched"
    directory.mkdir()
    for name in ("file", "other"):
        (directory / name).write_text(name)
    (directory / "..data").symlink_to("..1")
    with watch_of(directory) as watch:
        change(directory)
        assert await waited(watch) == pytest.approx(DEBOUNCE)
        assert await waited(watch) == pytest.approx(RECHECK), "the events of one change end one wait"


@virtual
async def test_a_replaced_directory_is_watched_again(tmp_path: Path) -> None:
    directory = tmp_path / "watched"
    directory.mkdir()
    with watch_of(directory) as watch:
        directory.rename(tmp_path / "old")
        directory.mkdir()
        assert await waited(watch) == pytest.approx(DEBOUNCE)
        (directory / "new").touch()
        assert await waited(watch) == pytest.approx(DEBOUNCE)


@virtual
async def test_a_missing_directory_is_polled_and_watched_once_it_is_there(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    directory = tmp_path / "watched"
    with caplog.at_level(logging.WARNING), watch_of(directory) as watch:
        assert await waited(watch) == pytest.approx(POLL)
        directory.mkdir()
        assert await waited(watch) == pytest.approx(POLL)
        (directory / "new").touch()
        assert await waited(watch) == pytest.approx(DEBOUNCE)
        (directory / "new").unlink()
        directory.rmdir()
        assert await waited(watch) == pytest.approx(DEBOUNCE)
        assert await waited(watch) == pytest.approx(POLL)
    (record,) = caplog.records
    assert record.message == "directory cannot be watched, polling instead"


@virtual
async def test_without_an_inotify_instance_the_directory_is_polled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def none_left(**_: object) -> asyncinotify.Inotify:
        raise OSError(errno.EMFILE, "Too many open files")

    with monkeypatch.context() as patched, caplog.at_level(logging.WARNING):
        patched.setattr(asyncinotify, "Inotify", none_left)
        with watch_of(tmp_path) as watch:
            for _ in range(3):
                assert await waited(watch) == pytest.approx(POLL)
            patched.undo()
            assert await waited(watch) == pytest.approx(POLL)
            (tmp_path / "new").touch()
            assert await waited(watch) == pytest.approx(DEBOUNCE)
    assert len(caplog.records) == 1


@virtual
async def test_a_wait_for_a_change_can_be_cancelled(tmp_path: Path) -> None:
    with watch_of(tmp_path) as watch:
        task = asyncio.create_task(watch.changed())
        await asyncio.sleep(1)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        (tmp_path / "new").touch()
        assert await waited(watch) == pytest.approx(DEBOUNCE)


async def test_a_task_is_started_only_while_its_group_accepts_tasks(recwarn: pytest.WarningsRecorder) -> None:
    done: list[str] = []

    async def work(name: str) -> None:
        done.append(name)

    assert start_task(None, work("without a group")) is None
    async with asyncio.TaskGroup() as tasks:
        task = start_task(tasks, work("in time"), "named")
        assert task is not None
        assert task.get_name() == "named"
    assert start_task(tasks, work("too late")) is None
    assert done == ["in time"]
    assert not recwarn.list  # what is not started is closed


async def test_a_broadcast_wakes_every_waiter_and_misses_no_change() -> None:
    value = 0
    broadcast, upstream = Broadcast(), Broadcast()

    async def wait_for(wanted: int) -> None:
        await broadcast.until(lambda: value >= wanted)

    async with asyncio.timeout(10), asyncio.TaskGroup() as group:
        for wanted in range(50):
            group.create_task(wait_for(wanted))
        unsubscribe = upstream.subscribe(broadcast.fire)
        for _ in range(50):
            value += 1
            upstream.fire()
            await asyncio.sleep(0)
        unsubscribe()
    upstream.fire()
    assert value == 50


async def test_a_relay_ends_when_it_is_unsubscribed() -> None:
    a, b = Broadcast(), Broadcast()
    checks = 0

    def condition() -> bool:
        nonlocal checks
        checks += 1
        return checks == 3

    task = asyncio.create_task(b.until(condition))
    await asyncio.sleep(0)
    unsubscribe = a.subscribe(b.fire)
    a.fire()
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    unsubscribe()
    unsubscribe()  # a second call does nothing
    a.fire()
    await asyncio.sleep(0)
    assert checks == 2
    b.fire()
    await task
