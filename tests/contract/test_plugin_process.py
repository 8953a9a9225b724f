"""`usbip-plugin run` in the test process: registration, pages, Allocate, reload, signals, adoption by a successor."""

from __future__ import annotations

import asyncio
import asyncio.sslproto
import contextlib
import errno
import json
import signal
import socket
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import asyncinotify
import pytest

from tests.rigs.command_rig import LIMIT_S, LOOPBACKS, process_restored
from tests.rigs.fake_api import NAMESPACE
from tests.rigs.node_rig import Node, Places, run
from usbip_plugin.cli.main import main
from usbip_plugin.cli.parser import Exit
from usbip_plugin.config import reload
from usbip_plugin.kube.fleet import MAX_NAMED
from usbip_plugin.model import PodRef, Reason, ServerKey
from usbip_plugin.node import daemon
from usbip_plugin.node.memory import TLS_BUFFER_BYTES

POD = PodRef("default", "reader")


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    with process_restored():
        yield


@pytest.fixture
def places(unused_tcp_port_factory: Callable[[], int], request: pytest.FixtureRequest) -> Iterator[Places]:
    """Takes the host of the USB/IP server as its parameter."""
    server = ServerKey(getattr(request, "param", "127.0.0.1"), unused_tcp_port_factory())
    with tempfile.TemporaryDirectory(prefix="usbip-") as home:
        made = Places(Path(home), server, unused_tcp_port_factory())
        made.configure()
        yield made


async def offered(node: Node) -> None:
    """Waits until the kubelet has the device, Healthy, and the plugin has logged its registration."""
    await node.until("stick", {node.places.device.id: True})
    await node.log.until("resource registered")


@pytest.mark.parametrize("places", LOOPBACKS, indirect=True)
def test_a_process_allocates_a_device_and_leaves_it_attached_for_its_successor(
    monkeypatch: pytest.MonkeyPatch, places: Places
) -> None:
    device = places.device

    async def first(node: Node) -> None:
        await offered(node)
        assert asyncio.sslproto.SSLProtocol.max_size == TLS_BUFFER_BYTES, "TLS buffers are small"
        assert [await node.get(path) for path in ("/healthz", "/readyz")] == [(200, "ok\n")] * 2
        (row,) = (await node.get_json("/api/devices"))["devices"]
        assert (row["device"], row["healthy"], row["state"], row["here"]) == (str(device), True, "Free", False)
        node.pod(POD.name)
        answer = await node.kubelet.admit(POD, {"usbip.dev/stick": 1})
        (allocation,) = answer.values()
        assert [spec.host_path for spec in allocation.devices] == ["/dev/bus/usb/003/002"]
        # the lock names the pod only after the kubelet lists it
        await node.until_api(lambda _api: "usbip.dev/pod" in node.leases.leases[device.id].annotations)
        lock = node.leases.leases[device.id]
        assert (lock.holder, lock.annotations["usbip.dev/pod"]) == ("node-a", "default/reader/uid-of-reader")
        host, port = device.server.host, device.server.port
        address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        assert (lock.annotations["usbip.dev/server"], lock.annotations["usbip.dev/busid"]) == (address, "1-1")
        await node.until_api(lambda api: "create events" in api.rights_used())
        (event,) = [request.body for request in node.api.requests if request.right == "create events"]
        assert (event["reason"], event["regarding"]["name"]) == ("DeviceAttached", "reader")
        await node.until_allocatable(1)
        counted = [request for request in node.api.requests if request.params.get("limit") == str(MAX_NAMED)]
        assert {(request.right, request.namespace) for request in counted} == {("list pods", NAMESPACE)}, (
            "nodes are counted"
        )
        # the ports are counted when they have not changed for a moment
        status = await node.until_status(lambda status: status["driver"]["used_hs"] == 1)
        (row,) = status["devices"]
        assert [row[name] for name in ("holder", "pod", "state", "here", "port", "server", "selector", "usb_id")] == [
            *("node-a", "default/reader", "Attached", True, 0, address, "vendor 0951", "0951:1666"),
        ]
        assert (row["reason"], row["reason_code"]) == (Reason.ATTACHED.value, "attached")
        (server,) = status["servers"]
        assert (server["server"], server["reachable"], server["error"]) == (address, True, None)
        (registration,) = status["registrations"]
        assert (registration["resource"], registration["registered"]) == ("usbip.dev/stick", True)
        locks = status["locks"]
        assert (locks["read"], locks["reachable"], locks["held"], locks["known"]) == (True, True, 1, 1)
        assert locks["heartbeat"] >= 0
        assert (status["node"], status["not_ready"], status["not_alive"]) == ("node-a", [], [])
        assert (status["driver"]["error"], status["driver"]["module"]) == (None, "loaded")
        assert [(one["reason"], one["about"]) for one in status["events"]] == [("DeviceAttached", "default/reader")]
        cluster = await node.get_json("/api/cluster")
        (row,) = cluster["devices"]
        assert [row[name] for name in ("device", "holder", "pod", "resources")] == [
            *(f"{address}/1-1", "node-a", "default/reader", ["usbip.dev/stick"]),
        ]
        assert row["held_for"] >= 0
        assert cluster["nodes"] == [{"node": "node-a", "url": None, "held": 1}], (
            "the pages are served to this host only"
        )
        assert f"{address}/1-1" in (await node.get("/cluster"))[1]
        assert f"{address}/1-1" in (await node.get("/"))[1]
        (trace,) = [one for one in (await node.get_json("/api/traces"))["traces"] if one["name"] == "Allocate"]
        assert (await node.get(f"/api/traces/{trace['trace_id']}"))[0] == 200
        assert 'usbip_device_plugin_available_devices{resource="usbip.dev/stick"}' in (await node.get("/metrics"))[1]

    async def second(node: Node) -> None:
        assert node.leases.leases[device.id].holder == "node-a"
        await node.log.until("device adopted")
        await node.until("stick", {device.id: True})
        (row,) = (await node.get_json("/api/devices"))["devices"]
        assert (row["state"], row["here"], row["port"], row["pod"]) == ("Attached", True, 0, "default/reader")
        assert (node.server.table.granted, node.server.importers("1-1")) == (1, 1), "it is not imported again"
        node.pod(POD.name, "Succeeded")
        node.kubelet.end(POD)
        await node.log.until("device released")
        assert node.leases.leases[device.id].holder == ""

    status, log = run(monkeypatch, places, first, second)
    assert status == 0
    assert len(log.having("stopping; attachments and locks stay for the next process")) == 2
    assert not list(places.plugins.glob("usbip-*.sock")), "sockets are removed"


def test_a_changed_configuration_is_reloaded_and_start_only_settings_are_reported(
    monkeypatch: pytest.MonkeyPatch, places: Places
) -> None:
    async def story(node: Node) -> None:
        await offered(node)
        places.config.write_text("resources: [")
        await node.log.until("configuration not valid, the last valid one stays in use")
        config = (await node.get_json("/api/status"))["config"]
        assert (config["path"], config["resources"]) == (str(places.config), 1)
        assert config["problems"][0].startswith(f"{places.config}:2: not valid YAML")
        assert config["failed"] is not None
        assert "usbip_device_plugin_config_reload_failed 1.0" in (await node.get("/metrics"))[1]
        assert node.kubelet.health("usbip.dev/stick") == {places.device.id: True}
        assert "config.yaml:2: not valid YAML" in (await node.get("/"))[1]

        places.configure("dongle", selector='vendor: "0951", product: 0')
        places.config.write_text(places.config.read_text() + "lock: {duration: 50s}\n")
        warning = await node.log.until("setting not applied; restart the plugin")
        assert vars(warning).items() >= {"setting": "lock.duration", "in_force": 40.0, "in_file": 50.0}.items()
        problem = vars(await node.log.until("configuration warning"))["problem"]
        assert "0 matches any ID" in problem
        reloaded = await node.log.until("configuration reloaded")
        assert vars(reloaded)["resources"] == ["dongle"]
        await node.until("dongle", {places.device.id: True})
        config = (await node.get_json("/api/status"))["config"]
        assert (config["problems"], config["failed"], config["warnings"]) == ([], None, [problem])
        assert "usbip_device_plugin_config_reload_failed 0.0" in (await node.get("/metrics"))[1]
        async with asyncio.timeout(LIMIT_S):
            await node.kubelet.changed.until(lambda: not node.kubelet.connected("usbip.dev/stick"))

    status, log = run(monkeypatch, places, story)
    assert (status, len(log.having("configuration warning"))) == (0, 1)


def test_a_node_offers_only_the_resources_that_name_it(monkeypatch: pytest.MonkeyPatch, places: Places) -> None:
    places.configure("elsewhere", fields=', nodeNames: "other-*"')

    async def story(node: Node) -> None:
        assert vars(await node.log.until("running"))["node"] == "node-a"
        places.configure(fields=", nodeNames: [other-1, node-?]")
        await node.until("stick", {places.device.id: True})
        places.configure(fields=", nodeNames: node-b")
        async with asyncio.timeout(LIMIT_S):
            await node.kubelet.changed.until(lambda: not node.kubelet.connected("usbip.dev/stick"))
        assert (await node.get_json("/api/status"))["config"]["resources"] == 0

    status, log = run(monkeypatch, places, story)
    assert status == 0
    assert [vars(record)["resource"] for record in log.having("resource registered")] == ["usbip.dev/stick"]


def test_without_an_inotify_instance_on_the_node_the_plugin_runs_and_reloads(
    monkeypatch: pytest.MonkeyPatch, places: Places
) -> None:
    def none_left(**_: object) -> asyncinotify.Inotify:
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(asyncinotify, "Inotify", none_left)
    monkeypatch.setattr(reload, "RETRY_S", 0.1)

    async def story(node: Node) -> None:
        await offered(node)
        places.configure("dongle")
        await node.log.until("configuration reloaded")
        await node.until("dongle", {places.device.id: True})

    status, log = run(monkeypatch, places, story)
    said = log.having("directory cannot be watched, polling instead")
    assert status == 0
    assert sorted(vars(record)["directory"] for record in said) == [str(places.home), str(places.plugins)], "once each"


def test_without_readable_locks_the_plugin_is_alive_and_not_ready(
    monkeypatch: pytest.MonkeyPatch, places: Places
) -> None:
    def before(node: Node) -> None:
        node.api.refused["list leases"] = 403

    async def story(node: Node) -> None:
        await node.until_api(lambda api: [request.right for request in api.requests].count("list leases") >= 2)
        await node.log.until("resource registered")
        assert (await node.get("/healthz")) == (200, "ok\n")
        status, text = await node.get("/readyz")
        assert (status, text.count("\n")) == (503, 1)
        assert text.startswith("locks not read: API server: list leases.coordination.k8s.io: forbidden")
        found = await node.get_json("/api/status")
        assert (found["not_ready"], found["not_alive"]) == ([text.strip()], [])
        assert (found["locks"]["read"], found["locks"]["reachable"]) == (False, False)
        del node.api.refused["list leases"]
        await node.until_api(lambda api: "watch leases" in api.rights_used())
        await node.until("stick", {places.device.id: True})
        assert (await node.get("/readyz")) == (200, "ok\n")

    assert run(monkeypatch, places, story, before=before)[0] == 0


def test_the_plugin_is_not_ready_while_its_kubelet_is_away(monkeypatch: pytest.MonkeyPatch, places: Places) -> None:
    async def story(node: Node) -> None:
        await offered(node)
        await node.kubelet.stop()
        again = await node.log.until("resource registering again")
        assert vars(again)["cause"] == "the kubelet closed the ListAndWatch stream"
        status, text = await node.get("/readyz")
        assert (status, text.startswith("usbip.dev/stick: not registered: ")) == (503, True)
        (row,) = (await node.get_json("/api/status"))["registrations"]
        assert (row["resource"], row["registered"], row["registrations"]) == ("usbip.dev/stick", False, 1)
        await node.kubelet.start()
        await node.log.until("resource registered", 2)
        assert (await node.get("/readyz")) == (200, "ok\n")

    assert run(monkeypatch, places, story)[0] == 0


def test_a_late_event_loop_is_not_alive(monkeypatch: pytest.MonkeyPatch, places: Places) -> None:
    monkeypatch.setattr(daemon, "BEAT_WITHIN", -1.0)  # every beat is too late

    async def story(node: Node) -> None:
        await offered(node)
        status, text = await node.get("/healthz")
        assert (status, text.startswith("event loop: no turn for ")) == (503, True)
        assert [line[:10] for line in (await node.get_json("/api/status"))["not_alive"]] == ["event loop"]

    assert run(monkeypatch, places, story)[0] == 0


def test_specs_are_written_to_the_cdi_directory_and_removed(monkeypatch: pytest.MonkeyPatch, places: Places) -> None:
    places.configure(fields=", cdi: true")

    async def story(node: Node) -> None:
        await offered(node)
        node.pod(POD.name)
        answer = await node.kubelet.admit(POD, {"usbip.dev/stick": 1})
        (allocation,) = answer.values()
        (path,) = places.cdi.iterdir()
        spec = json.loads(path.read_text())
        assert (spec["kind"], allocation.devices) == ("usbip.dev/stick", ())
        assert allocation.cdi_devices == tuple(f"usbip.dev/stick={device['name']}" for device in spec["devices"])
        (nodes,) = (device["containerEdits"]["deviceNodes"] for device in spec["devices"])
        assert [one["path"] for one in nodes] == ["/dev/bus/usb/003/002"]
        await node.until_api(lambda _api: "usbip.dev/pod" in node.leases.leases[places.device.id].annotations)
        node.pod(POD.name, "Succeeded")
        node.kubelet.end(POD)
        await node.log.until("device released")
        assert list(places.cdi.iterdir()) == []

    assert run(monkeypatch, places, story)[0] == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_an_empty_address_starts_no_http_server_and_either_signal_ends_the_process(
    monkeypatch: pytest.MonkeyPatch, places: Places, capsys: pytest.CaptureFixture[str], number: signal.Signals
) -> None:
    def no_server(*_arguments: object) -> None:
        raise AssertionError

    monkeypatch.setattr(daemon, "HttpServer", no_server)
    flags = ("--listen", "", "--log-format", "text", "--log-level", "info")
    status, _log = run(monkeypatch, places, offered, flags=flags, number=number)
    out, err = capsys.readouterr()
    assert (status, err) == (0, "")
    assert "warn  simulated kernel in use, no USB device is attached socket=" in out
    assert "info  resource registered resource=usbip.dev/stick" in out


def test_probes_have_an_address_of_their_own_that_visitors_of_the_pages_cannot_keep_busy(
    monkeypatch: pytest.MonkeyPatch, places: Places, unused_tcp_port: int
) -> None:
    async def story(node: Node) -> None:
        await offered(node)
        with contextlib.ExitStack() as stack:
            for number in range(2, 40):
                for _ in range(4):
                    sock = stack.enter_context(socket.socket())
                    sock.bind((f"127.0.0.{number}", 0))
                    sock.setblocking(False)
                    await asyncio.get_running_loop().sock_connect(sock, ("127.0.0.1", places.page))
                    sock.send(b"GET / HTTP/1.1\r\nHost: ")
            for path in ("/healthz", "/readyz"):
                assert await node.get(path, unused_tcp_port) == (200, "ok\n")
            for path in ("/", "/metrics", "/api/devices"):
                assert (await node.get(path, unused_tcp_port))[0] == 404
        assert (await node.get("/healthz")) == (200, "ok\n"), "as before there were two addresses"

    assert run(monkeypatch, places, story, flags=("--probes", f"127.0.0.1:{unused_tcp_port}"))[0] == 0


@pytest.mark.parametrize("flag", ["--listen", "--probes"])
def test_an_address_that_is_not_valid_is_an_error_of_the_command_line(
    places: Places, capsys: pytest.CaptureFixture[str], flag: str
) -> None:
    assert main(["run", *places.flags(), flag, "8080"]) == Exit.USAGE
    assert f"{flag}: '8080' is not a valid listen address" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flag", "name"), [("--domain", "Not Valid!"), ("--node-name", "Bad_Name"), ("--domain", "a..b")]
)
def test_a_name_that_no_api_server_takes_is_an_error_of_the_command_line(
    places: Places, capsys: pytest.CaptureFixture[str], flag: str, name: str
) -> None:
    assert main(["run", *places.flags(), flag, name]) == Exit.USAGE
    assert f"{flag}: {name!r} is not a valid DNS name; expected " in capsys.readouterr().err


def test_an_address_that_the_file_sets_is_an_error_of_the_file(
    places: Places, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    config = tmp_path / "listen.yaml"
    config.write_text("listen: banana\nresources: {}\n")
    assert main(["run", *places.flags(), "--config", str(config)]) == Exit.USAGE
    assert f"{config}: 1 problem\n{config}:1: listen: 'banana' is not a valid listen address" in capsys.readouterr().err


@pytest.mark.parametrize("works", [True, False])
def test_the_process_releases_memory_after_its_start(
    monkeypatch: pytest.MonkeyPatch, places: Places, works: bool
) -> None:
    settled: list[bool] = []

    def settle() -> None:
        settled.append(True)
        if not works:
            raise OSError(1, "not this kernel")

    monkeypatch.setattr(daemon, "START_OVER_S", 0.0)
    monkeypatch.setattr(daemon, "trim_after_start", settle)
    status, log = run(monkeypatch, places, offered, flags=("--log-level", "debug"))
    assert (status, settled) == (0, [True])
    assert len(log.having("startup memory not released")) == (not works)


def test_a_missing_kubeconfig_is_logged_and_exits_with_1(places: Places, capsys: pytest.CaptureFixture[str]) -> None:
    places.configure(selector='vendor: "0951", product: 0')
    assert main(["run", *places.flags(), "--kubeconfig", str(places.home / "absent")]) == 1
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(line["level"], line["msg"]) for line in found] == [
        ("warn", "configuration warning"),
        ("error", "cannot run"),
    ]
    assert "absent" in found[1]["cause"]


def test_an_address_in_use_is_logged_and_exits_with_1(
    monkeypatch: pytest.MonkeyPatch, places: Places, capsys: pytest.CaptureFixture[str]
) -> None:
    async def story(_node: Node) -> None:
        await asyncio.Event().wait()

    with socket.create_server(("127.0.0.1", places.page)):
        assert run(monkeypatch, places, story)[0] == 1
    (line,) = [line for line in map(json.loads, capsys.readouterr().out.splitlines()) if line["msg"] == "cannot run"]
    assert "address already in use" in line["cause"]


@pytest.mark.parametrize(
    ("flags", "text", "problem"),
    [
        (("--node-name", ""), "resources: {}\n", "--node-name: missing; pass it, or set NODE_NAME"),
        ((), "resources: [\n", "config.yaml:2: not valid YAML"),
        (("--config", "/nonexistent/config.yaml"), "", "/nonexistent/config.yaml: cannot be read: No such file"),
    ],
)
def test_a_wrong_command_line_or_configuration_exits_with_2(
    places: Places, capsys: pytest.CaptureFixture[str], flags: tuple[str, ...], text: str, problem: str
) -> None:
    places.config.write_text(text)
    assert main(["run", *places.flags(), *flags]) == Exit.USAGE
    out, err = capsys.readouterr()
    assert out == ""
    assert problem in err
