"""`devices --watch`: what is shown after the list, and how it ends."""

from __future__ import annotations

import asyncio
import io
from collections.abc import Iterable
from dataclasses import replace
from datetime import UTC, datetime

import pytest

from tests.rigs.vocabulary import KEY, OTHER_KEY
from usbip_plugin.cli.list_commands import follow
from usbip_plugin.cli.parser import parser
from usbip_plugin.cli.sources import Sources
from usbip_plugin.cli.survey import Survey
from usbip_plugin.errors import ConfigError
from usbip_plugin.locks.locked_devices import LockedDevice
from usbip_plugin.locks.record import LOCK_LABELS, Lease, lock_of
from usbip_plugin.model import DeviceKey

NOW = datetime(2026, 5, 4, tzinfo=UTC)


class End(Exception):
    """Ends a watch in a test."""


class AtOnce:
    """Changes that happen without end."""

    async def run(self) -> None:
        await asyncio.Event().wait()

    async def next(self) -> None:
        pass


def sources(*holders: str, problems: tuple[str, ...] = ()) -> Sources:
    """Returns what was read: two devices with these holders."""

    def device(key: DeviceKey, holder: str) -> LockedDevice:
        notes = {"usbip.dev/server": str(key.server), "usbip.dev/busid": key.busid}
        lease = Lease(key.id, holder, 40, NOW, NOW, 1, notes, LOCK_LABELS)
        return LockedDevice(lease, lock_of(lease), None)

    known = tuple(device(key, holder) for key, holder in zip((KEY, OTHER_KEY), holders, strict=True))
    return Sources(Survey(known, {}, None, "usbip.dev", NOW), "", True, (), (), problems)


def watch(readings: Iterable[Sources | Exception]) -> None:
    left = iter(readings)

    async def read() -> Sources:
        found = next(left, None)
        if found is None:
            raise End
        if isinstance(found, Exception):
            raise found
        return found

    asyncio.run(follow(parser().parse_args(["devices", "-w"]), read, AtOnce()))


def test_the_list_is_followed_by_each_device_that_changes(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ExceptionGroup):
        watch([sources("", ""), sources("", ""), sources("node-a", ""), sources("node-a", "node-b")])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["DEVICE", str(KEY), str(OTHER_KEY), str(KEY), str(OTHER_KEY)]
    assert [line.split()[3] for line in lines[3:]] == ["node-a", "node-b"]


def test_an_error_while_watching_is_said_once_and_ends_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    error = ConfigError("config.yaml", ["line 1"])
    trouble = replace(sources("", ""), problems=("nodes cannot be read",))
    with pytest.raises(ExceptionGroup):
        watch([sources("", ""), error, error, trouble, trouble, sources("", "node-b")])
    out, err = capsys.readouterr()
    assert err.splitlines() == ["config.yaml: 1 problem", "line 1", "nodes cannot be read"]
    assert out.splitlines()[-1].startswith(str(OTHER_KEY))


def test_a_watch_whose_reader_has_left_ends_as_other_commands_do(monkeypatch: pytest.MonkeyPatch) -> None:
    class Closing(io.StringIO):
        def write(self, text: str) -> int:
            if "node-a" in text:
                raise BrokenPipeError
            return super().write(text)

    monkeypatch.setattr("sys.stdout", Closing())
    with pytest.raises(BrokenPipeError):
        watch([sources("", ""), sources("node-a", "")])
