"""`usbip-plugin export` and `exported` in the test process: pages, reload, signals, a successor, what cannot run."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import signal
import socket
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from tests.rigs.command_rig import LIMIT_S, CommandResult, Log, Terminal, end_process, process_restored
from tests.rigs.host_fake_sysfs import FakeHostSysfs
from tests.rigs.host_suite import CONVERTER, HUB, STICK
from usbip_plugin.cli.main import main
from usbip_plugin.clock import Clock, SystemClock
from usbip_plugin.config.export import ExportConfig
from usbip_plugin.config.reload import Loaded
from usbip_plugin.errors import MalformedReply
from usbip_plugin.exporter import daemon
from usbip_plugin.exporter.host import HostDevice
from usbip_plugin.model import DeviceKey, ServerKey
from usbip_plugin.observe import http
from usbip_plugin.usbip.client import Imported, TcpUsbipClient
from usbip_sim.server.host import SimulatedHost

FILE = "export: [{vendor: '0951'}, {vendor: '0403'}]\n"


@dataclass
class Places:
    """The files and ports of an exporter."""

    home: Path
    usbip: int
    http: int

    @property
    def config(self) -> Path:
        return self.home / "export.yaml"

    def flags(self) -> list[str]:
        return [f"--http=127.0.0.1:{self.http}", f"--state-directory={self.home}/run", f"--sysfs={self.home}/sys"]

    def export(self) -> list[str]:
        return ["export", f"--config={self.config}", f"--listen=127.0.0.1:{self.usbip}", *self.flags()]


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    handler = signal.getsignal(signal.SIGHUP)
    with process_restored():
        yield
    signal.signal(signal.SIGHUP, handler)


@pytest.fixture
def places(tmp_path: Path, unused_tcp_port_factory: Callable[[], int]) -> Places:
    places = Places(tmp_path, unused_tcp_port_factory(), unused_tcp_port_factory())
    places.config.write_text(FILE)
    return places


@dataclass
class Running:
    """An exporter that runs in this process, on a simulated host."""

    places: Places
    host: SimulatedHost
    log: Log
    client: TcpUsbipClient

    @property
    def key(self) -> ServerKey:
        return ServerKey("127.0.0.1", self.places.usbip)

    async def get(self, path: str) -> tuple[int, str]:
        async with (
            aiohttp.ClientSession(f"http://127.0.0.1:{self.places.http}") as session,
            session.get(path) as answer,
        ):
            return answer.status, await answer.text()

    async def exported(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((await self.get("/exported"))[1])
        return found

    async def states(self) -> dict[str, str]:
        return {row["busid"]: row["state"] for row in (await self.exported())["devices"]}

    async def listed(self) -> list[str]:
        return [device.busid for device in (await self.client.devlist(self.key, timeout=LIMIT_S)).devices]

    async def take(self, busid: str) -> Imported:
        return await self.client.import_device(DeviceKey(self.key, busid), timeout=LIMIT_S)


Story = Callable[[Running], Awaitable[None]]


def run(
    monkeypatch: pytest.MonkeyPatch,
    places: Places,
    *stories: Story,
    before: Callable[[SimulatedHost], None] = lambda _host: None,
    number: signal.Signals = signal.SIGTERM,
    flags: Sequence[str] | None = None,
) -> tuple[int, Log]:
    """Runs `usbip-plugin export` on a simulated host; returns the exit status and the log.

    Each story is one life of the exporter: it starts when the exporter runs, and ends with the signal.
    """
    real, failures = daemon.run, list[Exception]()
    with Log() as log:

        async def tell(story: Story, running: Running, count: int) -> None:
            try:
                await log.until("running", count)
                async with asyncio.timeout(LIMIT_S):
                    await story(running)
            except Exception as error:  # noqa: BLE001 - the command takes an OSError for its own
                failures.append(error)
            finally:
                end_process(number)

        async def run_on_host(options: daemon.Options, loaded: Loaded[ExportConfig]) -> None:
            host = SimulatedHost([STICK, CONVERTER], SystemClock(), reset_time=0.0)
            before(host)

            def make_host(_options: daemon.Options, _clock: Clock) -> SimulatedHost:
                host.check()
                return host

            monkeypatch.setattr(daemon, "make_host", make_host)
            client = TcpUsbipClient(SystemClock())
            try:
                for count, story in enumerate(stories, 1):
                    async with asyncio.TaskGroup() as tasks:
                        telling = tasks.create_task(tell(story, Running(places, host, log, client), count))
                        try:
                            await real(options, loaded)
                        finally:
                            telling.cancel()
            finally:
                client.close()
                host.close()
                await asyncio.sleep(0)

        with monkeypatch.context() as patched:
            patched.setattr(daemon, "run", run_on_host)
            status = main(places.export() if flags is None else [*places.export()[:3], *flags])
    for failure in failures:
        raise failure
    return status, log


def test_an_exporter_serves_its_pages_and_leaves_its_clients_to_its_successor(
    monkeypatch: pytest.MonkeyPatch, places: Places
) -> None:
    kept: list[Imported] = []

    async def first(running: Running) -> None:
        assert await running.listed() == ["1-1", "1-2.3"]
        kept.append(await running.take("1-1"))
        assert [await running.get(path) for path in ("/healthz", "/readyz")] == [(200, "ok\n")] * 2
        found = await running.exported()
        assert (found["running"], found["fence"], found["fence_problem"], found["unmatched"]) == (True, False, None, [])
        stick, converter = found["devices"]
        assert isinstance(kept[0].sock, socket.socket)
        address, port = kept[0].sock.getsockname()
        assert (stick["state"], stick["peer"], stick["serial"]) == ("in_use", f"{address}:{port}", "KINGSTON-42")
        assert (converter["state"], converter["peer"], converter["since"]) == ("available", None, None)
        metrics = (await running.get("/metrics"))[1]
        assert 'usbip_exporter_devices{state="in_use"} 1.0' in metrics
        assert 'usbip_exporter_imports_total{result="ok"} 1.0' in metrics
        assert "process_resident_memory_bytes" in metrics

    async def second(running: Running) -> None:
        assert await running.listed() == ["1-2.3"]
        (stick, _) = (await running.exported())["devices"]
        assert isinstance(kept[0].sock, socket.socket)
        address, port = kept[0].sock.getsockname()
        assert (stick["state"], stick["peer"]) == ("in_use", f"{address}:{port}")
        identity = await running.client.probe(kept[0], timeout=LIMIT_S)
        assert identity.serial == STICK.serial, "the connection goes on"

    def slow(host: SimulatedHost) -> None:
        devices = host.devices

        async def later() -> tuple[HostDevice, ...]:
            for _ in range(20):  # other tasks run meanwhile
                await asyncio.sleep(0)
            return await devices()

        monkeypatch.setattr(host, "devices", later)

    status, log = run(monkeypatch, places, first, second, before=slow)
    assert status == 0
    assert len(log.having("stopping; devices stay bound, connections stay with the kernel")) == 2
    assert len(log.having("device bound")) == 2, "the successor finds them bound"
    served = [vars(record)["devices"] for record in log.having("running")]
    assert served == [["1-1", "1-2.3"]] * 2, "it serves when devices and clients are known, not earlier"


def test_a_client_is_refused_while_devices_are_bound(monkeypatch: pytest.MonkeyPatch, places: Places) -> None:
    """In the backlog it would wait for longer than it asks, and then its dead connection would get the device."""
    bound = []

    def before(host: SimulatedHost) -> None:
        bind = host.bind

        async def refused_meanwhile(busid: str) -> None:
            with pytest.raises(ConnectionRefusedError):
                await asyncio.to_thread(socket.create_connection, ("127.0.0.1", places.usbip))
            bound.append(busid)
            await bind(busid)

        monkeypatch.setattr(host, "bind", refused_meanwhile)

    async def served(_running: Running) -> None:
        socket.create_connection(("127.0.0.1", places.usbip)).close()

    status, _log = run(monkeypatch, places, served, before=before)
    assert (status, bound) == (0, ["1-1", "1-2.3"])


def test_an_exporter_that_says_that_it_runs_serves_its_pages(monkeypatch: pytest.MonkeyPatch, places: Places) -> None:
    addresses = http._addresses

    async def slow(host: str | None, port: int) -> Iterable[tuple[int, tuple[Any, ...]]]:
        for _ in range(20):  # other tasks run meanwhile
            await asyncio.sleep(0)
        return await addresses(host, port)

    monkeypatch.setattr(http, "_addresses", slow)

    async def story(running: Running) -> None:
        assert await running.get("/readyz") == (200, "ok\n")

    assert run(monkeypatch, places, story)[0] == 0


def test_a_changed_file_is_in_force_at_once_and_an_invalid_one_is_not(
    monkeypatch: pytest.MonkeyPatch, places: Places
) -> None:
    async def story(running: Running) -> None:
        places.config.write_text("export: [")
        await running.log.until("configuration not valid, the last valid one stays in use")
        assert "usbip_exporter_config_reload_failed 1.0" in (await running.get("/metrics"))[1]
        assert await running.listed() == ["1-1", "1-2.3"]
        places.config.write_text("export: [{vendor: '0951'}, {serial: X1}]\nallow: [192.0.2.1]\nfence: true\n")
        reloaded = await running.log.until("configuration reloaded")
        assert vars(reloaded)["selectors"] == ["vendor 0951", "serial X1"]
        warning = vars(await running.log.until("setting not applied; restart the exporter"))
        assert (warning["setting"], warning["in_force"], warning["in_file"]) == ("fence", False, True)
        await running.log.until("device unbound, not selected")
        assert await running.states() == {"1-1": "available"}
        assert (await running.exported())["unmatched"] == ["serial X1"]
        answer = await running.get("/metrics")
        assert "usbip_exporter_config_reload_failed 0.0" in answer[1]
        assert "usbip_exporter_unmatched_selectors 1.0" in answer[1]
        with pytest.raises(MalformedReply, match="status 1"):
            await running.listed()
        assert (
            'usbip_exporter_connections_refused_total{reason="not_allowed"} 1.0' in (await running.get("/metrics"))[1]
        )

    assert run(monkeypatch, places, story)[0] == 0


def test_systemd_is_told_when_the_exporter_serves_reloads_and_stops(
    monkeypatch: pytest.MonkeyPatch, places: Places
) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(places.home / "notify"))
        manager.settimeout(LIMIT_S)
        monkeypatch.setenv("NOTIFY_SOCKET", str(places.home / "notify"))
        monkeypatch.setenv("WATCHDOG_USEC", "20000000")
        told: list[list[str]] = []

        async def hear(beginning: str) -> None:
            while not told or not any(line.startswith(beginning) for line in told[-1]):
                told.append((await asyncio.to_thread(manager.recv, 4096)).decode().splitlines())

        async def story(running: Running) -> None:
            await hear("READY=1")
            assert told[-1] == ["READY=1", "STATUS=2 devices exported, 0 in use"]
            await hear("WATCHDOG=1")
            assert await running.listed() == ["1-1", "1-2.3"], "it serves by then"
            places.config.write_text("export: [{vendor: '0951'}]")
            os.kill(os.getpid(), signal.SIGHUP)
            await hear("RELOADING=1")
            await running.log.until("configuration reloaded")
            await hear("READY=1")

        assert run(monkeypatch, places, story, number=signal.SIGINT)[0] == 0
        while not told[-1] or told[-1] == ["WATCHDOG=1"] or told[-1][0].startswith(("STATUS", "READY", "RELOADING")):
            told.append(manager.recv(4096).decode().splitlines())
        assert told[-1] == ["STOPPING=1"]


async def ask(running: Running, terminal: Terminal, *arguments: str) -> CommandResult:
    return await terminal.run("exported", *running.places.flags(), *arguments)


def test_exported_shows_devices_and_clients(
    monkeypatch: pytest.MonkeyPatch, places: Places, capsys: pytest.CaptureFixture[str]
) -> None:
    terminal = Terminal(capsys)

    async def story(running: Running) -> None:
        imported = await running.take("1-1")
        shown = await ask(running, terminal)
        assert shown.status == 0
        head, stick, converter = shown.out.splitlines()[-3:]
        assert head.split() == ["BUSID", "USB-ID", "PRODUCT", "STATE", "PEER", "AGE", "PROBLEM"]
        assert stick.split()[:4] == ["1-1", "0951:1666", "stick", "in_use"]
        assert converter.split() == ["1-2.3", "0403:6001", "converter", "available", "-", "-", "-"]
        rows = json.loads((await ask(running, terminal, "-o", "json")).out)["devices"]
        assert [row["busid"] for row in rows] == ["1-1", "1-2.3"]
        assert "busid: 1-1" in (await ask(running, terminal, "-o", "yaml")).out
        imported.close()

    assert run(monkeypatch, places, story)[0] == 0


def test_exported_says_what_is_not_exported_and_why(
    monkeypatch: pytest.MonkeyPatch, places: Places, capsys: pytest.CaptureFixture[str]
) -> None:
    places.config.write_text("export: [{bus_id: '1-2'}, {serial: X1}]\n")

    async def story(running: Running) -> None:
        shown = await ask(running, Terminal(capsys))
        assert "USB/IP cannot carry hubs; select the devices behind the hub" in shown.out
        assert "No device matches the selector serial X1." in shown.err

    assert run(monkeypatch, places, story, before=lambda host: host.plug(HUB, is_hub=True))[0] == 0


def test_exported_asks_where_the_environment_says(
    monkeypatch: pytest.MonkeyPatch, places: Places, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("USBIP_EXPORTER_HTTP", f"[127.0.0.1]:{places.http}")  # as in the exporter's pod

    async def story(_running: Running) -> None:
        capsys.readouterr()  # the log so far
        shown = await Terminal(capsys).run("exported", "-o", "json")
        assert json.loads(shown.out)["running"] is True

    assert run(monkeypatch, places, story, flags=places.flags()[1:])[0] == 0


async def test_a_silent_exporter_is_not_taken_for_none(
    monkeypatch: pytest.MonkeyPatch, places: Places, capsys: pytest.CaptureFixture[str]
) -> None:
    FakeHostSysfs(places.home / "sys")
    monkeypatch.setattr("usbip_plugin.cli.export_commands.ASK_S", 0.1)
    with socket.create_server(("127.0.0.1", places.http)):  # accepts nobody
        assert await asyncio.to_thread(main, ["exported", *places.flags()]) == 1
    shown = capsys.readouterr()
    assert shown.out == ""
    assert f"the exporter at 127.0.0.1:{places.http} has not answered within 0.1 s; see its log" in shown.err


@pytest.mark.parametrize(
    ("answer", "error"),
    [
        (b"", "cannot ask the exporter at 127.0.0.1:"),
        (b"220 mail.example ready\r\n", "cannot ask the exporter at 127.0.0.1:"),
        (b"HTTP/1.1 404 Not Found\r\nContent-Length: 2\r\n\r\nno", "another program answers at 127.0.0.1:"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}", "another program answers at 127.0.0.1:"),
        (b"HTTP/1.1 200 OK\r\n\r\n[" + b" " * (2 << 20), "another program answers at 127.0.0.1:"),
    ],
)
async def test_what_answers_instead_of_the_exporter_is_an_error(
    places: Places, capsys: pytest.CaptureFixture[str], answer: bytes, error: str
) -> None:
    FakeHostSysfs(places.home / "sys")

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError):
            await reader.readuntil(b"\r\n\r\n")
            writer.write(answer)
            await writer.drain()
        writer.close()

    async with await asyncio.start_server(serve, "127.0.0.1", places.http):
        shown = await Terminal(capsys, places.flags()).run("exported")
    assert (shown.status, shown.out) == (1, "")
    assert error in shown.err
    assert "pass the exporter's own --http" in shown.err


async def test_exported_reads_sysfs_if_no_exporter_listens(places: Places, capsys: pytest.CaptureFixture[str]) -> None:
    terminal = Terminal(capsys, places.flags())
    missing = await terminal.run("exported")
    assert missing.status == 1
    assert "no exporter listens at 127.0.0.1:" in missing.err
    assert "this host's kernel has no usbip-host" in missing.err
    fake = FakeHostSysfs(places.home / "sys")
    fake.plug(STICK)
    empty = await terminal.run("exported")
    assert (empty.status, empty.out) == (0, "No device is exported.\n")
    for path, text in (
        (fake.stub / "match_busid", "add 1-1"),
        (fake.root / "bus/usb/drivers/usb/unbind", "1-1"),
        (fake.stub / "bind", "1-1"),
    ):
        fake.write(path, text)
    (fake.root / "bus/usb/devices/1-1/usbip_status").write_text("2\n")
    (places.home / "run").mkdir()
    row = {"peer": "10.0.0.5:40112", "since": "2026-05-04T03:02:01Z"}
    (places.home / "run/exported.json").write_text(json.dumps({"version": 1, "exports": {"1-1": row}}))
    shown = await terminal.run("exported")
    assert shown.out.splitlines()[1].split()[:5] == ["1-1", "0951:1666", "stick", "in_use", "10.0.0.5:40112"]
    assert "The exporter does not run." in shown.err
    assert json.loads((await terminal.run("exported", "-o", "json")).out)["running"] is False


@pytest.mark.parametrize(
    ("break_", "cause"),
    [
        (lambda host: setattr(host, "loaded", False), "usbip-host is not loaded: .*modprobe usbip-host"),
        (lambda host: setattr(host, "writable", False), "the exporter must run as root"),
    ],
)
def test_a_host_that_cannot_export_is_an_error_with_the_cure(
    monkeypatch: pytest.MonkeyPatch, places: Places, break_: Callable[[SimulatedHost], None], cause: str
) -> None:
    async def never(_running: Running) -> None:
        raise AssertionError("it runs")

    status, log = run(monkeypatch, places, never, before=break_)
    (line,) = log.having("cannot run")
    assert status == 1
    assert re.search(cause, str(vars(line)["cause"]))


@pytest.mark.parametrize("taken", ["usbip", "http"])
def test_a_port_that_is_taken_is_an_error(monkeypatch: pytest.MonkeyPatch, places: Places, taken: str) -> None:
    async def never(_running: Running) -> None:
        await asyncio.get_running_loop().create_future()

    with socket.create_server(("127.0.0.1", getattr(places, taken))) as other:
        status, log = run(monkeypatch, places, never)
        assert other.getsockname()[1] == getattr(places, taken)
    (line,) = log.having("cannot run")
    cause = str(vars(line)["cause"]).lower()
    assert status == 1
    assert "address already in use" in cause
    assert ("stop the other server (systemctl stop usbipd)" in cause) == (taken == "usbip")


@pytest.mark.parametrize(
    ("text", "flags", "problem"),
    [
        ("export: [{vendor: '0951'}]\nalow: []", (), "export.yaml:2: alow: unknown key; did you mean allow?"),
        ("", (), "export.yaml: empty file; add export"),
        (None, (), "export.yaml: cannot be read: No such file or directory"),
        (FILE, ("--listen=3240",), "command line: 1 problem\n--listen: '3240' is not a valid listen address"),
        (FILE, ("--listen=",), "--listen: '' is not a valid listen address"),
        (FILE, ("--http=nowhere",), "--http: 'nowhere' is not a valid listen address"),
    ],
)
def test_what_is_not_valid_is_an_error_of_usage(
    places: Places, capsys: pytest.CaptureFixture[str], text: str | None, flags: tuple[str, ...], problem: str
) -> None:
    places.config.unlink()
    if text is not None:
        places.config.write_text(text)
    assert main([*places.export(), *flags]) == 2
    assert problem in capsys.readouterr().err
