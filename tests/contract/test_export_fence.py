"""The exporter with its fence on a fake API server: clients of the plugin's own code, over the loopback."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest

from tests.rigs.command_rig import LIMIT_S
from tests.rigs.exporter_rig import ExporterRig
from tests.rigs.fake_api import NAMESPACE, FakeApi, serving
from tests.rigs.tasks import background
from usbip_plugin.clock import SystemClock
from usbip_plugin.config.export import ExportConfig
from usbip_plugin.errors import ConfigError, DeviceBusy, ImportRefused
from usbip_plugin.exporter import daemon
from usbip_plugin.exporter.exports import ImportResult
from usbip_plugin.exporter.gate import OpenGate
from usbip_plugin.exporter.server import ExportServer, bind_sockets
from usbip_plugin.locks.protocol import LockMeta, Write, decide_acquire
from usbip_plugin.model import DeviceKey, Endpoint, NodeIdentity, ServerKey
from usbip_plugin.usbip.client import Imported, TcpUsbipClient


def options(home: Path, kubeconfig: str) -> daemon.Options:
    config = home / "kubeconfig"
    config.write_text(kubeconfig)
    return daemon.Options(
        config=home / "export.yaml",
        listen="127.0.0.1:0",
        http="",
        namespace=NAMESPACE,
        kubeconfig=str(config),
        sysfs=home,
        state_directory=home,
        after_start=lambda: None,
    )


class Lab(ExporterRig):
    """A served exporter whose gate the daemon has made. key: the device, by this host's name in configurations."""

    def __init__(self, home: Path, api: FakeApi) -> None:
        super().__init__(SystemClock(), home, reset_time=0.0)
        self.api = api
        self.client = TcpUsbipClient(SystemClock())

    @contextlib.asynccontextmanager
    async def serving(self, home: Path) -> AsyncIterator[None]:
        sockets = bind_sockets("127.0.0.1", 0)
        port = sockets[0].getsockname()[1]
        self.key = DeviceKey(ServerKey("127.0.0.1", port), "1-1")
        made = options(home, self.api.kubeconfig())
        self.gate = await daemon.make_gate(made, ExportConfig((), fence=True), port, self.clock)  # type: ignore[assignment]
        async with contextlib.AsyncExitStack() as contexts:
            await contexts.enter_async_context(self.running())
            await contexts.enter_async_context(background(self.gate.run()))
            server = ExportServer(sockets, self.exports, self.clock, None)
            server.listen()
            await contexts.enter_async_context(background(server.run()))
            yield
        self.client.close()
        self.close()

    def take(self, node: str, source: Endpoint) -> None:
        """Takes the device's lock for a node, whoever holds it."""
        backend, before = self.api.leases[NAMESPACE], self.api.leases[NAMESPACE].leases.get(self.key.id)
        write = Write(NodeIdentity(node, f"boot-of-{node}"), self.clock.now(), "w", 40.0)
        free, meta = replace(before, holder="") if before else None, LockMeta("0951:1666", import_from=source)
        taken = decide_acquire(free, self.key, meta, write, None, importable=True).lease
        assert taken is not None
        backend.replace(taken) if before else backend.create(taken)

    async def imported(self, node: str) -> Imported:
        """Imports the device as the plugin of a node does: the lock names the source port first."""
        with contextlib.closing(await self.client.bind(self.key.server, timeout=LIMIT_S)) as source:
            self.take(node, source.endpoint)
            return await self.client.import_device(self.key, source=source, timeout=LIMIT_S)


@pytest.fixture
async def lab(tmp_path: Path) -> AsyncIterator[Lab]:
    async with serving() as api:
        lab = Lab(tmp_path, api)
        async with lab.serving(tmp_path):
            yield lab


async def test_only_the_connection_that_the_lock_names_gets_the_device(lab: Lab) -> None:
    with pytest.raises(ImportRefused, match="status 1"):
        await lab.client.import_device(lab.key, timeout=LIMIT_S)
    with contextlib.closing(await lab.imported("node-a")) as imported:
        assert (await lab.client.probe(imported, timeout=LIMIT_S)).serial == "KINGSTON-42"
    assert lab.results == [ImportResult.REFUSED, ImportResult.OK]
    await lab.freed("1-1")
    with pytest.raises(ImportRefused, match="status 1"):
        await lab.client.import_device(lab.key, timeout=LIMIT_S)
    causes = [line["cause"] for line in lab.logged("import refused")]
    assert causes[0] == "no lock names it; add this host to names as the plugins' configuration names it"
    assert str(causes[1]).startswith("its lock is held by node-a (127.0.0.1:")
    assert lab.api.rights_used() == {"list leases", "watch leases", "get leases"}


async def test_the_next_holder_of_the_lock_gets_the_device_from_a_node_that_still_has_it(lab: Lab) -> None:
    first = await lab.imported("node-a")
    assert isinstance(first.sock, socket.socket)
    peer = Endpoint.of(first.sock.getsockname())
    with contextlib.closing(first):
        try:
            second = await lab.imported("node-b")
        except DeviceBusy:  # the kernel has not ended the connection yet
            await lab.freed("1-1")
            second = await lab.imported("node-b")
        second.close()
    assert [export.peer for export in lab.ended] == [peer]


async def test_without_the_api_server_nothing_new_is_exported_and_exports_go_on(lab: Lab) -> None:
    with contextlib.closing(await lab.imported("node-a")) as imported:
        lab.api.refused |= {"get leases": 500, "list leases": 500, "watch leases": 500}
        lab.api.break_watches()
        await lab.until(lambda: lab.gate.problem() is not None)
        with pytest.raises(ImportRefused, match="status 1"):
            await lab.client.import_device(lab.key, timeout=LIMIT_S)
        assert (await lab.client.probe(imported, timeout=LIMIT_S)).serial == "KINGSTON-42"
    await lab.freed("1-1")
    lab.api.refused.clear()
    await lab.until(lambda: lab.gate.problem() is None)
    (await lab.imported("node-a")).close()


async def test_without_a_kubeconfig_the_exporter_does_not_start_with_the_fence(tmp_path: Path) -> None:
    made, clock = options(tmp_path, "{}"), SystemClock()
    with pytest.raises(ConfigError, match="kubeconfig"):
        await daemon.make_gate(made, ExportConfig((), fence=True), 3240, clock)
    assert isinstance(await daemon.make_gate(made, ExportConfig(()), 3240, clock), OpenGate)
