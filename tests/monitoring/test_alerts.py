"""Alerts in a real Prometheus: each cause is real, the alert is pending, fires, and resolves when the cause is gone.

`for` is shortened; expressions, with the time that their increase() looks back, are not. An alert on an increase
therefore does not resolve here. tests/deploy/test_monitoring_alerts.py has the times of every alert.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.monitoring.nodes import METER, METER_AT, STICK, STICKS, watched
from tests.monitoring.prometheus import Monitoring, rendered
from tests.rigs.command_rig import LIMIT_S
from tests.rigs.fake_api import NAMESPACE
from tests.rigs.outdated_kubelet import allocate_error
from usbip_plugin.clock import SystemClock
from usbip_plugin.errors import ImportRefused
from usbip_plugin.model import DeviceKey
from usbip_plugin.usbip.client import TcpUsbipClient
from usbip_sim.server.exports import SILENT
from usbip_sim.server.usbdevice import VirtualDevice

FREE_PORT = Callable[[], int]
"""pytest-asyncio's fixture unused_tcp_port_factory."""
NEVER_CAUSED = {"UsbipWithdrawalSlow"}
"""Alerts that only promtool shows: a kubelet that takes its list of devices after more than half a second."""


@pytest.fixture(scope="module")
def monitoring() -> Monitoring:
    return rendered()


def test_every_alert_is_caused_here_or_named(monitoring: Monitoring) -> None:
    caused = set(re.findall(r'\.fires\("(\w+)"', Path(__file__).read_text(encoding="utf-8")))
    assert caused | NEVER_CAUSED == {rule["alert"] for rule in monitoring.rules()}
    assert not caused & NEVER_CAUSED


async def test_a_server_that_is_away(monitoring: Monitoring, unused_tcp_port_factory: FREE_PORT) -> None:
    async with watched(monitoring, unused_tcp_port_factory) as fleet:
        server, seen = str(fleet.a.server), fleet.prometheus
        await fleet.admit(fleet.a, "reader")
        await fleet.server.stop()
        await seen.fires("UsbipServerUnreachable", server=server, severity="critical")
        await seen.fires("UsbipDeviceLost", node="node-a", resource="usbip.dev/stick", severity="critical")
        await fleet.server.start()
        await seen.resolves("UsbipServerUnreachable")
        await seen.resolves("UsbipDeviceLost")


async def test_a_server_that_one_node_does_not_reach(
    monitoring: Monitoring, unused_tcp_port_factory: FREE_PORT
) -> None:
    async with watched(monitoring, unused_tcp_port_factory) as fleet:
        seen = fleet.prometheus
        fleet.b.way.refusing = True
        fleet.b.way.cut()
        await seen.fires("UsbipServerUnreachableFromNode", node="node-b", server=str(fleet.b.server))
        fleet.b.way.refusing = False
        await seen.resolves("UsbipServerUnreachableFromNode")
        fleet.server.unplug(METER_AT)
        await seen.fires("UsbipDeviceUnavailable", resource="usbip.dev/meter", reason="not_listed")
        fleet.server.plug(VirtualDevice(METER_AT, METER, configured=True))
        await seen.resolves("UsbipDeviceUnavailable")


async def test_a_node_in_trouble(monitoring: Monitoring, unused_tcp_port_factory: FREE_PORT) -> None:
    async with watched(monitoring, unused_tcp_port_factory) as fleet:
        a, seen = fleet.a, fleet.prometheus
        a.break_config()
        await seen.fires("UsbipConfigReloadFailed", node="node-a")
        a.configure()
        await seen.resolves("UsbipConfigReloadFailed")

        filled = a.kernel.fill_ports("hs")
        await seen.fires("UsbipNoFreePort", node="node-a", hub="hs")
        for port in filled:
            a.kernel.free_port(port)
        await seen.resolves("UsbipNoFreePort")

        await a.stop_kernel()
        await seen.fires("UsbipDriverMissing", node="node-a")
        await a.start_kernel()
        await seen.resolves("UsbipDriverMissing")

        await a.kubelet.stop()
        await seen.fires("UsbipPluginNotReady", node="node-a")
        await a.kubelet.start()
        await seen.resolves("UsbipPluginNotReady")
        for _ in range(3):
            await a.offers("stick", "1-1")
            await a.kubelet.restart()
        await seen.fires("UsbipRegistrationFlapping", node="node-a", resource="usbip.dev/stick")


async def test_plugins_that_restart_or_are_gone(monitoring: Monitoring, unused_tcp_port_factory: FREE_PORT) -> None:
    async with watched(monitoring, unused_tcp_port_factory) as fleet:
        a, b, seen = fleet.a, fleet.b, fleet.prometheus
        for count in range(1, 5):
            await a.restart()
            await seen.until(f'changes(process_start_time_seconds{{node="node-a"}}[1h]) >= {count}')
        await seen.fires("UsbipPluginRestarting", node="node-a")
        await a.stop()
        await seen.fires("UsbipPluginDown", node="node-a")
        await b.stop()
        await seen.fires("UsbipPluginAbsent")
        await b.start()
        await seen.resolves("UsbipPluginAbsent")
        await seen.resolves("UsbipPluginDown", node="node-b")
        await a.start()
        await seen.resolves("UsbipPluginDown")


async def test_a_node_without_the_api_server(monitoring: Monitoring, unused_tcp_port_factory: FREE_PORT) -> None:
    async with watched(monitoring, unused_tcp_port_factory) as fleet:
        a, seen = fleet.a, fleet.prometheus
        await fleet.admit(a, "reader")
        a.api.refusing = True
        a.api.cut()
        await seen.fires("UsbipApiUnreachable", node="node-a")
        await seen.fires("UsbipSessionStale", node="node-a")
        a.api.refusing = False
        await seen.resolves("UsbipApiUnreachable")
        await seen.resolves("UsbipSessionStale")


async def test_attachments_and_locks_that_are_lost(monitoring: Monitoring, unused_tcp_port_factory: FREE_PORT) -> None:
    async with watched(monitoring, unused_tcp_port_factory) as fleet:
        a, seen = fleet.a, fleet.prometheus
        fleet.api.refused["create events"] = 403
        await fleet.admit(a, "reader", "meter")
        for count in range(1, 5):
            fleet.server.drop(METER_AT)
            await seen.until(f'usbip_device_plugin_attachments_lost_total{{node="node-a"}} == {count}')
            await seen.until('usbip_device_plugin_devices{node="node-a", reason="attached"} > 0')
        await seen.fires("UsbipAttachmentFlapping", node="node-a")
        await seen.fires("UsbipEventsDropped", node="node-a")
        backend, name = fleet.api.leases[NAMESPACE], a.device(METER_AT).id
        backend.delete(name, backend.leases[name].resource_version)
        await seen.fires("UsbipLockLost", node="node-a")


async def test_allocates_that_fail(monitoring: Monitoring, unused_tcp_port_factory: FREE_PORT) -> None:
    closed = f"http://127.0.0.1:{unused_tcp_port_factory()}"
    environ = {
        "OTEL_EXPORTER_OTLP_ENDPOINT": closed,
        "OTEL_EXPORTER_OTLP_TIMEOUT": "1",
        "OTEL_BSP_SCHEDULE_DELAY": "100",
    }
    async with watched(monitoring, unused_tcp_port_factory, environ) as fleet:
        a, b, seen = fleet.a, fleet.b, fleet.prometheus
        await fleet.admit(a, "reader", "meter")
        await b.offers("meter", METER_AT, healthy=False)
        for _ in range(11):
            error = await allocate_error(b.home / "plugins", "meter", b.device(METER_AT).id, LIMIT_S)
            assert "node-a" in error
        await seen.fires("UsbipManyDenials", resource="usbip.dev/meter")
        fleet.server.table.refusals |= dict.fromkeys(STICKS, 1)
        for busid in ("1-1", "1-2", "1-1"):  # a device is paused after two failures in a row
            assert await allocate_error(a.home / "plugins", "stick", a.device(busid).id, LIMIT_S)
        await seen.fires("UsbipAllocateFailing", resource="usbip.dev/stick")
        fleet.server.table.refusals["1-2"] = SILENT
        a.configure(allocate_timeout="8s")
        await seen.until('usbip_device_plugin_config_reloads_total{node="node-a", result="success"} == 1')
        assert await allocate_error(a.home / "plugins", "stick", a.device("1-2").id, LIMIT_S)
        await seen.fires("UsbipAllocateSlow", node="node-a")
        await seen.fires("UsbipTraceExportFailing", node="node-a")


async def test_an_exporter_in_trouble(monitoring: Monitoring, unused_tcp_port_factory: FREE_PORT) -> None:
    async with watched(monitoring, unused_tcp_port_factory) as fleet:
        exporter, seen = fleet.exporter, fleet.prometheus
        exporter.configure("export: 1\n")
        await seen.fires("UsbipExporterConfigReloadFailed", node="pi")
        exporter.configure()
        await seen.resolves("UsbipExporterConfigReloadFailed")

        exporter.host.break_reset("1-1")
        await seen.fires("UsbipExporterDeviceFailed", node="pi", state="error")
        exporter.host.unplug("1-1")
        await seen.resolves("UsbipExporterDeviceFailed")
        exporter.host.plug(VirtualDevice("1-1", STICK))
        await seen.until('usbip_exporter_devices{state="available"} == 1')

        client = TcpUsbipClient(SystemClock())
        for _ in range(6):
            with pytest.raises(ImportRefused):
                await client.import_device(DeviceKey(exporter.server, "1-1"), timeout=LIMIT_S)
        client.close()
        await seen.fires("UsbipExporterRefusing", node="pi", result="refused")

        exporter.api.refusing = True
        exporter.api.cut()
        await seen.fires("UsbipExporterFenceProblem", node="pi")
        exporter.api.refusing = False
        await seen.resolves("UsbipExporterFenceProblem")

        await exporter.stop()
        await seen.fires("UsbipExporterDown", node="pi")
        exporter.start()
        await seen.resolves("UsbipExporterDown")
