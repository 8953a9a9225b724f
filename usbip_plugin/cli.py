"""The command line: run, check, devices, demo, simulate.

Exit status: 0 done, 1 it failed, 2 the command line or the configuration is wrong.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from usbip_plugin import __version__
from usbip_plugin.config.schema import (
    DEFAULT_CDI_DIRECTORY,
    DEFAULT_CONFIG_PATH,
    DEFAULT_DOMAIN,
    DEFAULT_LISTEN,
    DEFAULT_LOG_LEVEL,
    DEFAULT_PLUGIN_DIRECTORY,
    DEFAULT_POD_RESOURCES_SOCKET,
    LOG_LEVELS,
    FileSettings,
)
from usbip_plugin.errors import ConfigError, PluginError

if TYPE_CHECKING:
    from usbip_plugin.process import Options

DONE, FAILED, USAGE = 0, 1, 2
DEFAULT_NAMESPACE = "usbip-system"
MAX_CONTROLLERS = 15
SERVICE_ACCOUNT_NAMESPACE = Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace")


def parser() -> argparse.ArgumentParser:
    """The whole command line. Flags that the configuration file may set too have no default here."""
    top = argparse.ArgumentParser(
        prog="usbip-plugin", description="USB/IP device plugin for Kubernetes, coordinated through Leases."
    )
    top.add_argument("--version", action="version", version=f"usbip-plugin {__version__}")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")

    run = commands.add_parser("run", help="run the plugin on this node")
    _node_flags(run)
    run.add_argument("--listen", metavar="ADDRESS", help=f"health and metrics, '' for none (default {DEFAULT_LISTEN})")
    run.add_argument("--log-level", choices=LOG_LEVELS, help=f"default {DEFAULT_LOG_LEVEL}")
    run.add_argument("--log-format", choices=("json", "text"), default="json")

    check = commands.add_parser("check", help="is this node able to run the plugin, and what to do if not")
    _node_flags(check)

    devices = commands.add_parser("devices", help="every device of the cluster, by its lock: holder, pod, since")
    _api_flags(devices)
    devices.add_argument("-o", "--output", choices=("table", "json"), default="table")

    demo = commands.add_parser("demo", help="two nodes in this process: what the plugin does, without a cluster")
    demo.add_argument("--real-kernel", action="store_true", help="attach to this machine's vhci_hcd (needs root)")

    simulate = commands.add_parser("simulate", help="for development: stand-ins for what a test cluster has not got")
    _simulate_flags(simulate.add_subparsers(dest="simulated", required=True, metavar="WHAT"))
    return top


def _simulate_flags(stand_ins: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    kernel = stand_ins.add_parser(
        "kernel",
        help="a vhci_hcd that attaches nothing",
        description="A stand-in for vhci_hcd, for plugins that run with --simulated-kernel. It keeps connections and "
        "ports while plugins come and go. A pod gets device nodes that answer like /dev/zero.",
    )
    kernel.add_argument("--socket", metavar="FILE", type=Path, required=True, help="where plugins find it")
    kernel.add_argument(
        "--device-directory", metavar="DIR", type=Path, help="the node's /dev; makes device nodes there (CAP_MKNOD)"
    )
    kernel.add_argument("--controllers", metavar="N", type=_count, default=1, help="of 16 ports each (default 1)")

    server = stand_ins.add_parser(
        "server",
        help="a USB/IP server with virtual devices",
        description="A USB/IP server, exclusive as usbipd is. Unlike usbipd it finds out by itself, within 8 s, that a "
        "client's host has gone.",
    )
    server.add_argument("--listen", metavar="ADDRESS:PORT", default="0.0.0.0:3240", help="default %(default)s")
    form = "BUSID=VVVV:PPPP[,serial=TEXT][,class=CC]"
    server.add_argument("--device", metavar=form, action="append", default=[], help="may be given any number of times")
    server.add_argument(
        "--devices-file", metavar="FILE", type=Path, help="more devices, one a line; followed for changes"
    )
    for command in (kernel, server):
        command.add_argument("--log-level", choices=LOG_LEVELS, default=DEFAULT_LOG_LEVEL, help="default %(default)s")


def _count(text: str) -> int:
    if not text.isascii() or not text.isdecimal() or not 1 <= int(text) <= MAX_CONTROLLERS:
        raise argparse.ArgumentTypeError(f"{text!r} must be a number from 1 to {MAX_CONTROLLERS}")
    return int(text)


def _api_flags(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--kubeconfig", metavar="FILE", help="default: $KUBECONFIG, the pod's ServiceAccount, ~/.kube/config"
    )
    command.add_argument(
        "--namespace", metavar="NAME", help=f"of the Leases (default: the pod's own, else {DEFAULT_NAMESPACE})"
    )


def _node_flags(command: argparse.ArgumentParser) -> None:
    _api_flags(command)
    command.add_argument(
        "--config", metavar="FILE", type=Path, default=Path(DEFAULT_CONFIG_PATH), help="default %(default)s"
    )
    command.add_argument("--domain", metavar="NAME", help=f"of the resource names (default {DEFAULT_DOMAIN})")
    command.add_argument("--plugin-directory", metavar="DIR", help=f"default {DEFAULT_PLUGIN_DIRECTORY}")
    command.add_argument("--pod-resources-socket", metavar="FILE", help=f"default {DEFAULT_POD_RESOURCES_SOCKET}")
    command.add_argument(
        "--cdi-directory",
        metavar="DIR",
        type=Path,
        default=Path(DEFAULT_CDI_DIRECTORY),
        help="where the container runtime reads CDI specs (default %(default)s)",
    )
    command.add_argument(
        "--simulated-kernel",
        metavar="FILE",
        type=Path,
        help="development only: the socket of `simulate kernel` instead of vhci_hcd; no device is attached",
    )
    command.add_argument("--node-name", metavar="NAME", default=os.environ.get("NODE_NAME"), help="default $NODE_NAME")


def main(arguments: Sequence[str] | None = None) -> int:
    """Parses, runs, answers the exit status. Problems go to stderr, one line each."""
    options = parser().parse_args(arguments)
    os.environ.setdefault("GRPC_VERBOSITY", "ERROR")  # else gRPC writes to stderr whenever a kubelet restarts
    try:
        match options.command:
            case "run":
                return _run(options)
            case "check":
                return _check(options)
            case "devices":
                return asyncio.run(_devices(options))
            case "simulate":
                return _simulate(options)
            case _:
                return _demo(options)
    except ConfigError as error:
        print(error, file=sys.stderr)  # noqa: T201 - the command line's own voice
        return USAGE
    except PluginError as error:
        print(f"usbip-plugin: {error}", file=sys.stderr)  # noqa: T201
        return FAILED


def namespace_of(given: str | None) -> str:
    """The namespace of the Leases: as given, else POD_NAMESPACE, else the ServiceAccount's, else the default."""
    if given:
        return given
    if os.environ.get("POD_NAMESPACE"):
        return os.environ["POD_NAMESPACE"]
    try:
        return SERVICE_ACCOUNT_NAMESPACE.read_text(encoding="ascii").strip() or DEFAULT_NAMESPACE
    except OSError:
        return DEFAULT_NAMESPACE


def _first(*values: str | None) -> str:
    """The flag, else the file's setting, else the default, which is never None."""
    return next(value for value in values if value is not None)


def _run(options: argparse.Namespace) -> int:
    # imported here: `devices`, `demo` and `--help` need none of it
    from usbip_plugin import _narrow  # noqa: PLC0415

    _narrow.install()  # before the imports below bring protobuf
    from usbip_plugin.config.reload import load_config  # noqa: PLC0415
    from usbip_plugin.observe.logs import set_up_logging  # noqa: PLC0415
    from usbip_plugin.process import run_blocking  # noqa: PLC0415

    if not options.node_name:
        cure = "give the node's name, or set NODE_NAME (downward API: spec.nodeName)"
        raise ConfigError("command line", [f"--node-name: {cure}"])
    loaded = load_config(options.config)
    settings = loaded.config.settings
    level = _first(options.log_level, settings.log_level, DEFAULT_LOG_LEVEL)
    set_up_logging(level, sys.stdout, json_lines=options.log_format == "json")
    return run_blocking(_process_options(options, settings), loaded, loaded.warnings)


def _process_options(options: argparse.Namespace, settings: FileSettings) -> Options:
    from usbip_plugin.process import Options  # noqa: PLC0415

    return Options(
        node=options.node_name or platform.node(),
        namespace=namespace_of(options.namespace),
        config=options.config,
        domain=_first(options.domain, settings.domain, DEFAULT_DOMAIN),
        plugin_directory=Path(_first(options.plugin_directory, settings.plugin_directory, DEFAULT_PLUGIN_DIRECTORY)),
        pod_resources_socket=Path(
            _first(options.pod_resources_socket, settings.pod_resources_socket, DEFAULT_POD_RESOURCES_SOCKET)
        ),
        listen=_first(getattr(options, "listen", None), settings.listen, DEFAULT_LISTEN),
        kubeconfig=options.kubeconfig,
        simulated_kernel=options.simulated_kernel,
        cdi_directory=options.cdi_directory,
    )


def _check(options: argparse.Namespace) -> int:
    from usbip_plugin.checking import check_node  # noqa: PLC0415
    from usbip_plugin.config.reload import Loaded, load_config  # noqa: PLC0415
    from usbip_plugin.observe.logs import set_up_logging  # noqa: PLC0415

    set_up_logging("none", sys.stderr)  # the report says it all
    loaded: Loaded | ConfigError
    try:
        loaded = load_config(options.config)
    except ConfigError as error:
        loaded = error
    settings = FileSettings() if isinstance(loaded, ConfigError) else loaded.config.settings
    report, status = asyncio.run(check_node(_process_options(options, settings), loaded))
    print(report)  # noqa: T201
    return status


async def _devices(options: argparse.Namespace) -> int:
    from usbip_plugin.kube import connect  # noqa: PLC0415
    from usbip_plugin.listing import held_devices, table  # noqa: PLC0415
    from usbip_plugin.locks.kubernetes import KubernetesLeases  # noqa: PLC0415

    kube = await connect(options.kubeconfig)
    try:
        rows = await held_devices(KubernetesLeases(kube, namespace_of(options.namespace)))
    finally:
        await kube.close()
    text = json.dumps(rows, indent=2) if options.output == "json" else table(rows)
    print(text)  # noqa: T201
    return DONE


def _demo(options: argparse.Namespace) -> int:
    from usbip_plugin.observe.logs import set_up_logging  # noqa: PLC0415
    from usbip_plugin.sim import demo  # noqa: PLC0415

    set_up_logging("none", sys.stderr)
    return DONE if asyncio.run(demo.run(print, real_kernel=options.real_kernel)) else FAILED


def _simulate(options: argparse.Namespace) -> int:
    from usbip_plugin.observe.logs import set_up_logging  # noqa: PLC0415
    from usbip_plugin.sim import commands  # noqa: PLC0415

    set_up_logging(options.log_level, sys.stdout, json_lines=True)
    if options.simulated == "kernel":
        return commands.kernel(options.socket, options.device_directory, options.controllers)
    return commands.server(options.listen, options.device, options.devices_file)
