"""The watcher: a change reaches it by an event, a bad file keeps the old configuration."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from usbip_plugin.clock import SystemClock
from usbip_plugin.config import reload
from usbip_plugin.config.reload import DEBOUNCE_S, ConfigWatcher, LoadedConfig, load_config
from usbip_plugin.config.schema import Config
from usbip_plugin.errors import ConfigError
from usbip_sim.virtual.loop import virtual

PATIENCE_S = 10  # a bound for a hanging test, not a measurement


def text(*names: str) -> str:
    return "resources: {" + ", ".join(f"{name}: []" for name in names) + "}\n"


class Heard:
    """What the watcher told, in order: tuples of resource names, or errors."""

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
async def watching(path: Path, initial: LoadedConfig | None = None) -> AsyncIterator[Heard]:
    heard = Heard()
    watcher = ConfigWatcher(path, SystemClock(), heard.config, heard.error, initial)
    task = asyncio.create_task(watcher.run())
    try:
        yield heard
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


async def test_a_config_map_volume_swap_is_noticed(tmp_path: Path) -> None:
    for name, content in (("..1", text("a")), ("..2", text("b"))):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.yaml").write_text(content)
    (tmp_path / "..data").symlink_to("..1")
    path = tmp_path / "config.yaml"
    path.symlink_to("..data/config.yaml")
    async with watching(path) as heard:
        assert await heard.next() == ("a",)
        (tmp_path / "..data_tmp").symlink_to("..2")
        (tmp_path / "..data_tmp").replace(tmp_path / "..data")
        assert await heard.next() == ("b",)


class Reads:
    """Counts how often the file is read."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._count = 0
        self._read = reload._read
        monkeypatch.setattr(reload, "_read", self._counted)

    def _counted(self, path: Path) -> bytes:
        self._count += 1
        return self._read(path)

    async def once_more(self) -> None:
        """Returns when a change that has just been made has been read. Needs virtual time."""
        before = self._count
        await asyncio.sleep(2 * DEBOUNCE_S)
        assert self._count == before + 1


@virtual
async def test_a_bad_file_is_told_once_and_the_same_good_one_is_told_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, reads = tmp_path / "config.yaml", Reads(monkeypatch)
    path.write_text(text("a"))
    async with watching(path) as heard:
        assert await heard.next() == ("a",)
        path.write_text("resources: 1")
        assert isinstance(await heard.next(), ConfigError)
        for _ in range(3):
            path.write_text("resources: 1")  # the same mistake saved again
            await reads.once_more()
            assert heard.queue.empty()
        path.write_text("resources: []")
        assert isinstance(await heard.next(), ConfigError), "another mistake is told"
        path.unlink()
        gone = await heard.next()
        assert isinstance(gone, ConfigError)
        assert "cannot be read" in str(gone)
        path.write_text(text("a"))
        assert await heard.next() == ("a",)
        assert heard.queue.empty()


@virtual
async def test_a_good_file_that_is_saved_again_without_a_change_is_not_told_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, reads = tmp_path / "config.yaml", Reads(monkeypatch)
    path.write_text(text("a"))
    async with watching(path) as heard:
        assert await heard.next() == ("a",)
        path.write_text(text("a"))
        await reads.once_more()
        path.with_name("new").write_text(text("a"))
        path.with_name("new").replace(path)
        await reads.once_more()
        assert heard.queue.empty()
        path.write_text(text("b"))
        assert await heard.next() == ("b",)


@virtual
async def test_of_many_changes_in_a_row_the_last_is_told(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(text("a"))
    async with watching(path) as heard:
        assert await heard.next() == ("a",)
        for n in range(20):
            path.write_text(text(f"n{n}"))
            await asyncio.sleep(0)
        path.write_text(text("last"))
        told = [await heard.next()]
        while told[-1] != ("last",):
            told.append(await heard.next())
        assert len(told) < 20, "what is saved in a burst is read when it is over"


def test_settings_that_are_read_at_start_only_are_known(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(text("a"))
    before = load_config(path).config.start_only()
    path.write_text(text("b") + "lock: {duration: 50s}\nallocateTimeout: 20s\nlog-level: debug\n")
    after = load_config(path).config.start_only()
    assert {name for name in after if after[name] != before[name]} == {"lock.duration", "log-level"}


async def test_what_was_loaded_at_start_is_not_told_again_but_a_change_before_the_start_is(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(text("a"))
    loaded = load_config(path)
    async with watching(path, loaded) as heard:
        path.write_text(text("b"))
        assert await heard.next() == ("b",)
    path.write_text(text("c"))
    async with watching(path, loaded) as heard:
        assert await heard.next() == ("c",)


async def test_a_directory_that_is_replaced_is_watched_anew(tmp_path: Path) -> None:
    directory = tmp_path / "etc"
    directory.mkdir()
    path = directory / "config.yaml"
    path.write_text(text("a"))
    async with watching(path) as heard:
        assert await heard.next() == ("a",)
        (tmp_path / "new").mkdir()
        (tmp_path / "new" / "config.yaml").write_text(text("b"))
        directory.rename(tmp_path / "old")
        (tmp_path / "new").rename(directory)
        heard_next = await heard.next()
        while isinstance(heard_next, ConfigError):  # the moment between the two renames
            heard_next = await heard.next()
        assert heard_next == ("b",)
        path.write_text(text("c"))
        assert await heard.next() == ("c",)


def test_what_is_no_readable_file_is_a_config_error(tmp_path: Path) -> None:
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


def test_a_byte_order_mark_is_no_part_of_the_file(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_bytes(b"\xef\xbb\xbf" + text("a").encode())
    assert load_config(path).config.resources[0].name == "a"
