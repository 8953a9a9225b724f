"""`usbip-plugin check` on the real node: composes the checks of check.py. No logic of its own."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from functools import partial

from usbip_plugin.check import (
    Check,
    Finding,
    Status,
    admission_check,
    api_check,
    cdi_directory_check,
    config_findings,
    driver_findings,
    exit_status,
    permissions_needed,
    plugin_directory_check,
    render,
    run_checks,
    server_check,
    socket_check,
)
from usbip_plugin.clock import SystemClock
from usbip_plugin.config.reload import Loaded
from usbip_plugin.config.schema import Config, OnLoss
from usbip_plugin.errors import ConfigError
from usbip_plugin.kube.client import connect
from usbip_plugin.process import MakeDriver, Options
from usbip_plugin.usbip.client import TcpUsbipClient

DEVLIST_TIMEOUT = 5.0
"""Seconds one server may take to list its devices."""


async def check_node(options: Options, loaded: Loaded | ConfigError, make_driver: MakeDriver) -> tuple[str, int]:
    """The report for people and the exit status: 0 if nothing fails. Changes nothing."""
    clock = SystemClock()
    config = Config(()) if isinstance(loaded, ConfigError) else loaded.config
    known = loaded if isinstance(loaded, ConfigError) else (loaded.config, loaded.warnings)
    by_cdi = any(resource.cdi for resource in config.resources)
    driver = make_driver(clock)
    with contextlib.closing(TcpUsbipClient(clock)) as client:

        async def vhci() -> Sequence[Finding]:
            return driver_findings(await driver.check())

        async def api() -> Sequence[Finding]:
            try:
                kube = await connect(options.kubeconfig, clock=clock)
            except ConfigError as error:
                return [Finding("API server", Status.FAIL, "\n".join(error.problems))]
            try:
                needed = permissions_needed(
                    options.namespace,
                    options.node,
                    publish_node_status=config.publish_node_status,
                    evict=any(resource.on_loss is OnLoss.EVICT for resource in config.resources),
                )
                granted = await api_check(kube, needed)
                return [*granted, *await admission_check(kube, options.namespace, options.node)]
            finally:
                await kube.close()

        async def configuration() -> Sequence[Finding]:
            return config_findings(options.config, known)

        devlist = partial(client.devlist, timeout=DEVLIST_TIMEOUT)
        checks: list[tuple[str, Check]] = [
            ("configuration", configuration),
            ("vhci_hcd", vhci),
            ("device-plugin directory", partial(plugin_directory_check, options.plugin_directory)),
            ("pod-resources", partial(socket_check, "pod-resources", options.pod_resources_socket)),
            *((("CDI directory", partial(cdi_directory_check, options.cdi_directory)),) if by_cdi else ()),
            ("API server", api),
            *((f"server {s}", partial(server_check, s, config, devlist)) for s in sorted(config.servers())),
        ]
        findings = await run_checks(checks, clock)
    return render(findings), exit_status(findings)
