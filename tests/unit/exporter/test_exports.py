"""Who gets a device: the order of an import, its refusals, the ends of exports, and what a successor knows."""

from __future__ import annotations

import asyncio
import contextlib
import tempfile
from collections.abc import AsyncIterator
from functools import partial
from pathlib import Path

import pytest

from tests.rigs.exporter_rig import OTHER, PEER, ExporterRig, closed
from tests.rigs.tasks import virtual_with
from usbip_plugin.errors import BindFailed
from usbip_plugin.exporter.exports import POLL_S, RESET_S, ImportResult
from usbip_plugin.exporter.host import StubStatus
from usbip_plugin.exporter.repeats import MAX_KNOWN
from usbip_plugin.exporter.state import Export
from usbip_plugin.model import Endpoint, UsbId
from usbip_sim.server.usbdevice import VirtualDevice
from usbip_sim.virtual.loop import SimClock


@contextlib.asynccontextmanager
async def exporter(reset_time: float = 0.3) -> AsyncIterator[ExporterRig]:
    with tempfile.TemporaryDirectory() as state:
        rig = ExporterRig(SimClock(asyncio.get_running_loop()), Path(state), reset_time=reset_time)
        try:
            yield rig
        finally:
            rig.close()


@contextlib.asynccontextmanager
async def exporting() -> AsyncIterator[ExporterRig]:
    async with exporter() as rig, rig.running():
        yield rig


running = virtual_with(exporting)


@running
async def test_an_import_gives_the_connection_to_the_kernel_and_hides_the_device(rig: ExporterRig) -> None:
    assert rig.listed() == ["1-1", "1-2.3"]
    answer = await rig.import_device("1-1")
    assert answer.descriptor == rig.host.descriptor("1-1")
    assert (answer.result, rig.host.status("1-1")) == (ImportResult.OK, StubStatus.USED)
    assert rig.listed() == ["1-2.3"]
    assert (rig.exports.current["1-1"].peer, dict(rig.state.read())) == (PEER, dict(rig.exports.current))
    (line,) = rig.logged("device exported")
    assert (line["busid"], line["peer"]) == ("1-1", "10.0.0.1:40001")
    assert not closed(rig.clients[0])


@running
async def test_the_file_names_the_client_before_the_kernel_has_the_connection(
    rig: ExporterRig, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Export] = []

    async def killed(busid: str, _fd: int) -> None:
        seen.append(rig.state.read()[busid])
        raise BindFailed(busid, "here the process is killed")

    monkeypatch.setattr(rig.host, "export", killed)
    assert (await rig.import_device("1-1")).result is ImportResult.FAILED
    assert [export.peer for export in seen] == [PEER]
    assert dict(rig.exports.current) == {}


@running
async def test_a_device_in_use_is_busy_for_everybody_until_its_client_has_gone(rig: ExporterRig) -> None:
    await rig.import_device("1-1")
    for peer in (PEER, OTHER):
        assert (await rig.import_device("1-1", peer)).result is ImportResult.BUSY
    assert rig.exports.current["1-1"].peer == PEER
    rig.clients[0].close()
    await rig.freed("1-1")
    assert (await rig.import_device("1-1", OTHER)).result is ImportResult.OK
    assert rig.exports.current["1-1"].peer == OTHER
    assert [line["peer"] for line in rig.logged("export ended")] == [str(PEER)]


@running
async def test_the_end_of_an_export_is_noticed_by_itself(rig: ExporterRig) -> None:
    await rig.import_device("1-1")
    await rig.clock.sleep(60)
    rig.clients[0].close()
    await rig.clock.sleep(POLL_S + 1)
    assert dict(rig.exports.current) == dict(rig.state.read()) == {}
    (line,) = rig.logged("export ended")
    assert (line["peer"], line["duration_s"]) == (str(PEER), 62)
    assert rig.listed() == ["1-1", "1-2.3"]


@running
async def test_a_device_that_is_missing_while_it_is_reset_after_its_client_is_busy_and_later_gone(
    rig: ExporterRig,
) -> None:
    await rig.import_device("1-1")
    rig.clients[0].close()
    await rig.freed("1-1")
    rig.host.unplug("1-1")
    assert (await rig.import_device("1-1")).result is ImportResult.BUSY
    await rig.clock.sleep(POLL_S + RESET_S)
    assert (await rig.import_device("1-1")).result is ImportResult.NO_DEVICE


@running
async def test_one_of_many_imports_at_once_gets_the_device(rig: ExporterRig) -> None:
    results = [answer.result for answer in await asyncio.gather(*(rig.import_device("1-1") for _ in range(8)))]
    assert results.count(ImportResult.OK) == 1
    assert results.count(ImportResult.BUSY) == 7


@running
async def test_what_cannot_be_imported_has_the_status_of_usbipd(rig: ExporterRig) -> None:
    rig.host.plug(VirtualDevice("1-3", UsbId(1, 2)))  # not bound yet
    assert (await rig.import_device("1-3")).result is ImportResult.NO_DEVICE
    assert (await rig.import_device("9-9")).result is ImportResult.NO_DEVICE
    rig.host.break_reset("1-1")
    assert (await rig.import_device("1-1")).result is ImportResult.ERROR
    assert rig.results == [ImportResult.NO_DEVICE, ImportResult.NO_DEVICE, ImportResult.ERROR]


@running
async def test_another_device_under_the_bus_id_is_not_exported_before_it_was_looked_at(rig: ExporterRig) -> None:
    rig.host.unplug("1-1")
    rig.host.plug(VirtualDevice("1-1", UsbId(0xDEAD, 0xBEEF)))
    await rig.host.bind("1-1")  # as the kernel may do by itself: match_busid has its bus ID
    assert (await rig.import_device("1-1")).result is ImportResult.NO_DEVICE
    await rig.clock.sleep(1)
    assert (await rig.import_device("1-1")).result is ImportResult.OK


@running
async def test_a_device_that_is_not_selected_any_more_is_neither_listed_nor_exported(rig: ExporterRig) -> None:
    await rig.import_device("1-1")
    rig.binder.reconfigure([])
    assert rig.listed() == []
    assert (await rig.import_device("1-2.3")).result is ImportResult.NO_DEVICE
    await rig.clock.sleep(60)
    assert not closed(rig.clients[0]), "its client keeps it"
    rig.clients[0].close()
    await rig.clock.sleep(POLL_S + 1)
    assert rig.host.status("1-1") is None, "it is given back then"


@running
async def test_the_gate_is_asked_first_and_its_refusal_is_logged_once(rig: ExporterRig) -> None:
    rig.gate.refusals["1-1"] = "nobody holds its lock"
    for _ in range(3):
        answer = await rig.import_device("1-1")
        assert (answer.result, answer.cause) == (ImportResult.REFUSED, "nobody holds its lock")
    assert rig.gate.asked == [("1-1", PEER)] * 3
    assert rig.host.status("1-1") is StubStatus.AVAILABLE
    lines = rig.logged("import refused")
    assert [(line["result"], line["cause"]) for line in lines] == [("refused", "nobody holds its lock")]
    rig.gate.refusals.clear()
    await rig.import_device("1-1")
    rig.clients[-1].close()
    rig.gate.refusals["1-1"] = "nobody holds its lock"
    await rig.import_device("1-1")
    assert len(rig.logged("import refused")) == 2


@running
async def test_clients_that_invent_bus_ids_fill_neither_log_nor_memory(rig: ExporterRig) -> None:
    for number in range(3 * MAX_KNOWN):
        await rig.exports.import_device(f"9-{number}", Endpoint("10.0.0.9", 1 + number), 0)
    assert len(rig.logged("import refused")) == 1
    for number in range(3 * MAX_KNOWN):
        await rig.exports.import_device("9-9", Endpoint(f"10.1.{number >> 8}.{number & 255}", 1), 0)
    assert len(rig.exports._refused._known) <= MAX_KNOWN


@running
async def test_a_connection_whose_lock_has_gone_to_another_is_ended_at_once(rig: ExporterRig) -> None:
    await rig.import_device("1-1")
    await rig.import_device("1-2.3")
    rig.gate.hand_over("1-1", OTHER)
    began = rig.clock.monotonic()
    await rig.until(lambda: closed(rig.clients[0]))
    assert rig.clock.monotonic() - began < 1, "by event, not by a poll"
    assert not closed(rig.clients[1])
    await rig.freed("1-1")
    assert (await rig.import_device("1-1", OTHER)).result is ImportResult.OK
    await rig.clock.sleep(60)
    assert not closed(rig.clients[2])
    assert [export.busid for export in rig.ended] == ["1-1"]
    assert [line["peer"] for line in rig.logged("export ended by the fence")] == [str(PEER)]


@virtual_with(partial(exporter, 0.0))
async def test_the_next_client_is_not_cut_for_the_one_before_it(
    rig: ExporterRig, monkeypatch: pytest.MonkeyPatch
) -> None:
    ended, may_return, end = asyncio.Event(), asyncio.Event(), rig.host.end

    async def slow(busid: str) -> None:
        await end(busid)
        ended.set()
        await may_return.wait()

    async with rig.running():
        await rig.import_device("1-1")
        monkeypatch.setattr(rig.host, "end", slow)
        rig.gate.hand_over("1-1", OTHER)
        await ended.wait()
        following = asyncio.ensure_future(rig.import_device("1-1", OTHER))
        await rig.until(lambda: ("1-1", OTHER) in rig.gate.asked)
        rig.gate.hand_over("1-1", OTHER)  # so that the exporter looks at its exports once more, behind this import
        may_return.set()
        assert (await following).result is ImportResult.OK
        await rig.clock.sleep(60)
        assert not closed(rig.clients[1])
        assert rig.exports.current["1-1"].peer == OTHER


@running
async def test_a_lock_that_goes_to_another_during_the_import_refuses_it(rig: ExporterRig) -> None:
    rig.gate.on_ask = lambda: rig.gate.holders.update({"1-1": OTHER})
    assert (await rig.import_device("1-1", PEER)).result is ImportResult.REFUSED
    await rig.until(lambda: closed(rig.clients[0]))
    await rig.freed("1-1")


@running
async def test_a_device_that_is_deselected_during_the_import_is_not_given_away(rig: ExporterRig) -> None:
    rig.gate.on_ask = lambda: rig.binder.reconfigure([])
    answer = await rig.import_device("1-1")
    assert (answer.result, answer.cause) == (ImportResult.NO_DEVICE, "no longer selected")


@running
async def test_an_export_whose_client_got_no_reply_is_ended(rig: ExporterRig) -> None:
    await rig.import_device("1-1")
    rig.exports.abandon("1-1", OTHER)
    await rig.clock.sleep(10)
    assert not closed(rig.clients[0]), "it is another's"
    rig.exports.abandon("1-1", PEER)
    await rig.until(lambda: closed(rig.clients[0]))
    assert rig.ended == [], "the fence did not end it"


@running
async def test_a_cancelled_import_is_ended(rig: ExporterRig, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = asyncio.Event()

    async def hanging(_busid: str, _fd: int) -> None:
        asked.set()
        await asyncio.get_running_loop().create_future()

    monkeypatch.setattr(rig.host, "export", hanging)
    importing = asyncio.ensure_future(rig.import_device("1-1"))
    await asked.wait()
    importing.cancel()
    with pytest.raises(asyncio.CancelledError):
        await importing
    await rig.clock.sleep(POLL_S + 1)
    assert dict(rig.exports.current) == {}
    monkeypatch.undo()
    assert (await rig.import_device("1-1")).result is ImportResult.OK


@virtual_with(exporter)
async def test_a_successor_knows_who_has_what_and_ends_nothing(rig: ExporterRig) -> None:
    async with rig.running():
        await rig.import_device("1-1")
        since = rig.exports.current["1-1"].since
        await rig.import_device("1-2.3", OTHER)
    rig.clients[1].close()  # while no exporter runs
    await rig.clock.sleep(60)
    async with rig.running():
        assert not closed(rig.clients[0])
        assert list(rig.exports.current.values()) == [Export("1-1", PEER, since.replace(microsecond=0))]
        assert dict(rig.state.read()) == dict(rig.exports.current)
        assert rig.listed() == ["1-2.3"]
        assert [line["peer"] for line in rig.logged("export found")] == [str(PEER)]
        rig.gate.hand_over("1-1", OTHER)
        await rig.until(lambda: closed(rig.clients[0]))


@virtual_with(exporter)
async def test_an_export_of_another_program_is_found_and_its_client_is_unknown(rig: ExporterRig) -> None:
    await rig.host.bind("1-1")
    rig.host.hold("1-1")
    async with rig.running():
        assert [(export.busid, export.peer) for export in rig.exports.current.values()] == [("1-1", None)]
        assert (await rig.import_device("1-1")).result is ImportResult.BUSY
        rig.gate.hand_over("1-1", PEER)
        await rig.freed("1-1")
        assert (await rig.import_device("1-1")).result is ImportResult.OK


@running
async def test_a_file_that_cannot_be_written_is_said_once_and_stops_nothing(
    rig: ExporterRig, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_exports: object) -> None:
        raise PermissionError(13, "Permission denied", "/run/usbip-plugin")

    monkeypatch.setattr(rig.state, "write", refuse)
    for busid in ("1-1", "1-2.3"):
        assert (await rig.import_device(busid)).result is ImportResult.OK
    (line,) = rig.logged("state not written")
    assert "/run/usbip-plugin" in str(line["cause"])
