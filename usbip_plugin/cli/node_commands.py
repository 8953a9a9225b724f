"""The commands that run on a node: run and check."""

from __future__ import annotations

import argparse
import asyncio
import importlib
import logging
import platform
import random
import re
import sys
from collections.abc import Awaitable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from usbip_plugin.cli.namespace import namespace_of
from usbip_plugin.config.schema import (
    DEFAULT_DOMAIN,
    DEFAULT_LISTEN,
    DEFAULT_LOG_LEVEL,
    DEFAULT_PLUGIN_DIRECTORY,
    DEFAULT_POD_RESOURCES_SOCKET,
    FileSettings,
)
from usbip_plugin.errors import ConfigError

if TYPE_CHECKING:
    from usbip_plugin.clock import Clock
    from usbip_plugin.config.reload import LoadedConfig
    from usbip_plugin.node.daemon import MakeDriver, Options
    from usbip_plugin.vhci.driver import VhciDriver

log = logging.getLogger(__name__)
T = TypeVar("T")

MAX_DNS_NAME = 253
"""Characters of a DNS name: of a node, and of the domain of the resource names."""
_DNS_NAME = re.compile(r"[a-z0-9]([a-z0-9-]*[a-z0-9])?(\.[a-z0-9]([a-z0-9-]*[a-z0-9])?)*", re.ASCII)


def _first(*values: str | None) -> str:
    return next(value for value in values if value is not None)


def run(options: argparse.Namespace) -> int:
    """Carries out `usbip-plugin run` until a signal. Raises ConfigError, also if the node's name is not given."""
    # imported here: neither --help nor the commands for people need these modules
    from usbip_plugin.node.memory import gc_paused  # noqa: PLC0415

    with gc_paused():
        from usbip_plugin.node.daemon import run_blocking  # noqa: PLC0415
        from usbip_plugin.observe.logs import set_up_logging  # noqa: PLC0415

        make_driver = _driver_of(options)

    if not options.node_name:
        cure = "pass it, or set NODE_NAME (downward API: spec.nodeName)"
        raise ConfigError("command line", [f"--node-name: missing; {cure}"])
    _dns_name(options.node_name, "command line", "--node-name")
    loaded = _load(options)
    settings = loaded.config.settings
    level = _first(options.log_level, settings.log_level, DEFAULT_LOG_LEVEL)
    set_up_logging(level, sys.stdout, json_lines=options.log_format == "json")
    return run_blocking(_process_options(options, settings), loaded, make_driver)


def check(options: argparse.Namespace) -> int:
    """Carries out `usbip-plugin check`: prints the report and returns the exit status."""
    from usbip_plugin.cli.tables import structured  # noqa: PLC0415
    from usbip_plugin.node.check import as_json, check_node, exit_status, render  # noqa: PLC0415
    from usbip_plugin.observe.logs import set_up_logging  # noqa: PLC0415

    set_up_logging("none", sys.stderr)  # the report has everything
    loaded: LoadedConfig | ConfigError
    try:
        loaded = _load(options)
    except ConfigError as error:
        loaded = error
    settings = FileSettings() if isinstance(loaded, ConfigError) else loaded.config.settings
    process = _process_options(options, settings)
    findings = asyncio.run(_spun(check_node(process, loaded, _driver_of(options))))
    text = options.output == "text"
    report = render(findings) if text else structured(as_json(findings, process.node), options.output)
    print(report)  # noqa: T201 - the command line's own voice
    return exit_status(findings)


async def _spun(checking: Awaitable[T]) -> T:
    from usbip_plugin.cli.spinner import spinner  # noqa: PLC0415

    async with spinner("checking"):
        return await checking


def _load(options: argparse.Namespace) -> LoadedConfig:
    from usbip_plugin.config.parse import parse_config  # noqa: PLC0415
    from usbip_plugin.config.reload import load  # noqa: PLC0415

    return load(options.config, partial(parse_config, allow_extras=options.allow_extras, node=_node_of(options)))


def _node_of(options: argparse.Namespace) -> str:
    return str(options.node_name or platform.node())


def _driver_of(options: argparse.Namespace) -> MakeDriver:
    """Returns the function that makes the driver: of vhci_hcd, or of the kernel simulated at --simulated-kernel."""
    if options.simulated_kernel is None:
        from usbip_plugin.vhci.linux import SysfsVhci  # noqa: PLC0415
        from usbip_plugin.vhci.uevents import NetlinkUevents  # noqa: PLC0415

        return lambda clock: SysfsVhci(clock, NetlinkUevents(clock))

    def simulated(clock: Clock) -> VhciDriver:
        log.warning("simulated kernel in use, no USB device is attached", extra={"socket": options.simulated_kernel})
        # by name: the product does not depend on its doubles
        double = importlib.import_module("usbip_sim.kernel.remote")
        driver: VhciDriver = double.RemoteVhci(options.simulated_kernel, clock, random.Random())  # noqa: S311 - jitter
        return driver

    return simulated


def _dns_name(text: str, source: str, key: str) -> str:
    """Returns the text if it is a DNS name (RFC 1123), else raises ConfigError."""
    if len(text) > MAX_DNS_NAME or not _DNS_NAME.fullmatch(text):
        form = "expected lower-case letters, digits, - and ., as in worker-1.example.org"
        raise ConfigError(source, [f"{key}: {text[:MAX_DNS_NAME]!r} is not a valid DNS name; {form}"])
    return text


def _addresses(listen: str, source: str, key: str) -> str:
    from usbip_plugin.observe.listen import split_addresses  # noqa: PLC0415

    try:
        if listen:
            split_addresses(listen)
    except ValueError as error:
        raise ConfigError(source, [f"{key}: {error}"]) from error
    return listen


def _process_options(options: argparse.Namespace, settings: FileSettings) -> Options:
    from usbip_plugin.node.daemon import Options  # noqa: PLC0415

    flag, file = "command line", str(options.config)
    domain = _first(options.domain, settings.domain, DEFAULT_DOMAIN)
    listen = _first(getattr(options, "listen", None), settings.listen, DEFAULT_LISTEN)
    listen_from = (file, "listen") if getattr(options, "listen", None) is None else (flag, "--listen")
    return Options(
        node=_node_of(options),
        namespace=namespace_of(options.namespace),
        config=options.config,
        domain=_dns_name(domain, *((file, "domain") if options.domain is None else (flag, "--domain"))),
        plugin_directory=Path(_first(options.plugin_directory, settings.plugin_directory, DEFAULT_PLUGIN_DIRECTORY)),
        pod_resources_socket=Path(
            _first(options.pod_resources_socket, settings.pod_resources_socket, DEFAULT_POD_RESOURCES_SOCKET)
        ),
        listen=_addresses(listen, *listen_from),
        probes=_addresses(getattr(options, "probes", ""), flag, "--probes"),
        trace_link=getattr(options, "trace_link", ""),
        kubeconfig=options.kubeconfig,
        cdi_directory=options.cdi_directory,
        allow_extras=options.allow_extras,
    )
