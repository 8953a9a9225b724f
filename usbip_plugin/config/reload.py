"""The configuration file on disk: reading it, and watching it for changes."""

from __future__ import annotations

import asyncio
import hashlib
import os
import stat
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeAlias, TypeVar

from usbip_plugin.clock import Clock
from usbip_plugin.config.document import MAX_FILE_BYTES, TOO_LARGE, Parsed, decoded
from usbip_plugin.config.parse import parse_config
from usbip_plugin.config.problems import ConfigProblem
from usbip_plugin.config.schema import Config
from usbip_plugin.errors import ConfigError
from usbip_plugin.sync import DirectoryWatch, OwnThreads

DEBOUNCE_S = 0.2
"""Seconds from the first event to the reading: a ConfigMap update and a save in an editor cause several events."""
RECHECK_S = 60.0
"""Seconds between readings without events, for file systems that have none."""
RETRY_S = 5.0
"""Seconds between readings while the file's directory cannot be watched, for instance because it is missing."""
# O_NONBLOCK: a pipe in place of the file must not hang the plugin. Windows, which runs the command line, has O_BINARY
_OPEN = os.O_RDONLY | sum(getattr(os, flag, 0) for flag in ("O_NONBLOCK", "O_CLOEXEC", "O_BINARY"))


C = TypeVar("C")
Parse: TypeAlias = Callable[[str, str], Parsed[C]]
"""A parser of a configuration's text, such as parse_config: takes the text and its source, raises ConfigError."""


@dataclass(frozen=True)  # no slots: Loaded[Config](...) sets an attribute, which fails in a frozen class with slots
class Loaded(Generic[C]):
    """A configuration as read from disk, its warnings (one line each), and the SHA-256 of the file's bytes."""

    config: C
    warnings: tuple[str, ...]
    digest: bytes


LoadedConfig: TypeAlias = Loaded[Config]


def load(path: Path, parse: Parse[C]) -> Loaded[C]:
    """Reads and checks the file. Blocks.

    Raises ConfigError if the file cannot be read, is larger than MAX_FILE_BYTES or is not valid.
    """
    return _parse(path, _read(path), parse)


def load_config(path: Path) -> LoadedConfig:
    """Reads and checks the plugin's file, as load()."""
    return load(path, parse_config)


def _read(path: Path) -> bytes:
    try:
        descriptor = os.open(path, _OPEN)
        try:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise ConfigError(str(path), [ConfigProblem(str(path), "must be a regular file")])
            with os.fdopen(descriptor, "rb", closefd=False) as file:
                data = file.read(MAX_FILE_BYTES + 1)
        finally:
            os.close(descriptor)
    except OSError as error:
        raise ConfigError(str(path), [ConfigProblem(str(path), f"cannot be read: {error.strerror}")]) from error
    if len(data) > MAX_FILE_BYTES:
        raise ConfigError(str(path), [ConfigProblem(str(path), TOO_LARGE)])
    return data


def _parse(path: Path, data: bytes, parse: Parse[C]) -> Loaded[C]:
    parsed = parse(decoded(data, str(path)), str(path))
    return Loaded(parsed.config, parsed.warnings, hashlib.sha256(data).digest())


class ConfigWatcher(Generic[C]):
    """A watcher of a configuration file. Works only while `run()` runs.

    Follows also a file in a ConfigMap volume, where the kubelet swaps the symbolic link ..data.

    on_config(config, warnings): called when the file has new valid contents, or is valid again after an error.
    on_error(error): called when the file has become invalid or unreadable or has vanished. Called once for as long as
    the error stays the same. The last configuration passed to on_config, or else initial, stays in force.
    Both run in the event loop and must not block.
    initial: the result of load at start. With None, on_config is called for the first reading too.
    """

    def __init__(
        self,
        path: Path,
        parse: Parse[C],
        clock: Clock,
        on_config: Callable[[C, tuple[str, ...]], None],
        on_error: Callable[[ConfigError], None],
        initial: Loaded[C] | None = None,
    ) -> None:
        self._path = path
        self._parse = parse
        self._clock = clock
        self._on_config = on_config
        self._on_error = on_error
        self._digest = initial.digest if initial else None
        self._error: str | None = None

    async def run(self) -> None:
        """Runs until cancelled: reads the file at each change and calls on_config or on_error. Cancel-safe."""
        directory = DirectoryWatch(self._path.parent, self._clock, recheck=RECHECK_S, poll=RETRY_S, debounce=DEBOUNCE_S)
        with directory:
            while True:
                await self.check()
                await directory.changed()

    async def check(self) -> None:
        """Reads the file, and calls on_config or on_error if it has changed. Cancel-safe."""
        loop, thread = asyncio.get_running_loop(), OwnThreads("configuration")
        try:
            data = await loop.run_in_executor(thread, _read, self._path)
            digest = hashlib.sha256(data).digest()
            if digest == self._digest and self._error is None:
                return
            loaded = await loop.run_in_executor(thread, _parse, self._path, data, self._parse)
        except ConfigError as error:
            if str(error) != self._error:
                self._error = str(error)
                self._on_error(error)
            return
        self._digest, self._error = loaded.digest, None
        self._on_config(loaded.config, loaded.warnings)
