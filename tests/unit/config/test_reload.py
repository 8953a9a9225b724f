"""The watch on the configuration file: a change is read at once, and an invalid file keeps the old configuration."""

from __future__ import annotations

import asyncio
import contextlib
import os
import threading
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.rigs.tasks import background
from usbip_plugin.clock import SystemClock
from usbip_plugin.config import reload
from usbip_plugin.config.parse import parse_config
from usbip_plugin.config.reload import DEBOUNCE_S, ConfigWatcher, LoadedConfig, load_config
from usbip_plugin.config.schema import Config
from usbip_plugin.errors import ConfigError
from usbip_sim.virtual.loop import virtual

PATIENCE_S = 10  # a bound for a hanging test, not a measurement


def text(*names: str) -> str:
    return "resources: {" + ", ".join(f"{name}: []" for name in names) + "}\n"


class Results:
    """The results of a watcher in order: tuples of resource names, or errors."""

    def __init__(self) -> None:
        self.queue: asyncio.Queue[tuple[str, ...] | ConfigError] = asyncio.Queue()

    def config(self, config: Config, warnings: tuple[str, ...]) -> None:
        self.queue.put_nowait(tuple(resource.name for resource in config.resources))

    def error(self, error: ConfigError) -> None:
        self.queue.put_nowait(error)

    async def next(self) -> tuple[str, ...] | ConfigError:
        async with asyncio.timeout(PATIENCE_S):
            return await self.queue.get()


@contextlib.asynccontextmanager
async def watching(path: Path, initial: LoadedConfig | None = None) -> AsyncIterator[Results]:
    results = Results()
    watcher = ConfigWatcher(path, parse_config, SystemClock(), results.config, results.error, initial)
    async with background(watcher.run()):
        yield results


async def test_a_swap_of_a_config_map_volume_is_noticed(tmp_path: Path) -> None:
    for name, content in (("..1", text("a")), ("..2", text("b"))):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.yaml").write_text(content)
    (tmp_path / "..data").symlink_to("..1")
    path = tmp_path / "config.yaml"
    path.symlink_to("..data/config.yaml")
    async with watching(path) as results:
        assert await results.next() == ("a",)
        (tmp_path / "..data_tmp").symlink_to("..2")
        (tmp_path / "..data_tmp").replace(tmp_path / "..data")
        assert await results.next() == ("b",)


class Reads:
    """A count of the reads of the file."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._count = 0
        self._read = reload._read
        monkeypatch.setattr(reload, "_read", self._counted)

    def _counted(self, path: Path) -> bytes:
        self._count += 1
        return self._read(path)

    async def once_more(self) -> None:
        """Waits until a change just made has been read. Needs virtual time."""
        before = self._count
        await asyncio.sleep(2 * DEBOUNCE_S)
        assert self._count == before + 1


@virtual
async def test_an_invalid_file_is_reported_once_and_the_former_valid_one_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, reads = tmp_path / "config.yaml", Reads(monkeypatch)
    path.write_text(text("a"))
    async with watching(path) as results:
        assert await results.next() == ("a",)
        path.write_text("resources: 1")
        assert isinstance(await results.next(), ConfigError)
        for _ in range(3):
            path.write_text("resources: 1")
            await reads.once_more()
            assert results.queue.empty()
        path.write_text("resources: []")
        assert isinstance(await results.next(), ConfigError), "another error is reported"
        path.unlink()
        gone = await results.next()
        assert isinstance(gone, ConfigError)
        assert "cannot be read" in str(gone)
        path.write_text(text("a"))
        assert await results.next() == ("a",)
        assert results.queue.empty()


@virtual
async def test_a_valid_file_saved_again_without_a_change_is_not_reported_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, reads = tmp_path / "config.yaml", Reads(monkeypatch)
    path.write_text(text("a"))
    async with watching(path) as results:
        assert await results.next() == ("a",)
        path.write_text(text("a"))
        await reads.once_more()
        path.with_name("new").write_text(text("a"))
        path.with_name("new").replace(path)
        await reads.once_more()
        assert results.queue.empty()
        path.write_text(text("b"))
        assert await results.next() == ("b",)


@virtual
async def test_the_last_of_many_changes_in_a_row_is_reported(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(text("a"))
    async with watching(path) as results:
        assert await results.next() == ("a",)
        for n in range(20):
            path.write_text(text(f"n{n}"))
            await asyncio.sleep(0)
        path.write_text(text("last"))
        changes = [await results.next()]
        while changes[-1] != ("last",):
            changes.append(await results.next())
        assert len(changes) < 20, "a burst is read once it is over"


def test_changes_of_settings_that_need_a_restart_are_found(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(text("a"))
    before = load_config(path).config.start_only()
    path.write_text(text("b") + "lock: {duration: 50s}\nallocateTimeout: 20s\nlog-level: debug\n")
    after = load_config(path).config.start_only()
    assert {name for name in after if after[name] != before[name]} == {"lock.duration", "log-level"}


async def test_the_file_loaded_at_start_is_not_reported_again_but_a_change_before_the_start_is(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(text("a"))
    loaded = load_config(path)
    async with watching(path, loaded) as results:
        path.write_text(text("b"))
        assert await results.next() == ("b",)
    path.write_text(text("c"))
    async with watching(path, loaded) as results:
        assert await results.next() == ("c",)


async def test_the_file_is_read_while_every_thread_of_the_default_executor_is_blocked(tmp_path: Path) -> None:
    path, end = tmp_path / "config.yaml", threading.Event()
    path.write_text(text("a"))
    loop = asyncio.get_running_loop()
    loop.set_default_executor(ThreadPoolExecutor(1))
    blocked = loop.run_in_executor(None, end.wait, PATIENCE_S)
    try:
        async with watching(path) as results:
            assert await results.next() == ("a",)
            assert not blocked.done()
    finally:
        end.set()
        await blocked


def test_an_unreadable_file_is_a_config_error(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    latin = tmp_path / "latin"
    latin.write_bytes(b"a: 1\nb: \xe4\n")
    large = tmp_path / "large"
    large.write_bytes(b"#" * (1024 * 1024 + 1))
    for path, word in (
        (tmp_path, "must be a regular file"),
        (pipe, "must be a regular file"),
        (tmp_path / "none", "cannot be read"),
        (latin, "latin:2: must be UTF-8"),
        (large, "larger than"),
    ):
        with pytest.raises(ConfigError, match=word):
            load_config(path)


def test_a_byte_order_mark_is_ignored(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_bytes(b"\xef\xbb\xbf" + text("a").encode())
    assert load_config(path).config.resources[0].name == "a"
