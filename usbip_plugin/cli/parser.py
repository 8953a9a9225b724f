"""The commands, flags and exit statuses. Flags that the configuration file may set too have no default here."""

from __future__ import annotations

import argparse
import enum
import os
import textwrap
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

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
)


class Exit(enum.IntEnum):
    """The exit statuses, explained by MEANING. They are stable, because scripts rely on them."""

    DONE = 0
    PROBLEM = 1
    USAGE = 2
    API = 3
    NO_DEVICE = 4
    REFUSED = 5


MEANING: Mapping[Exit, str] = MappingProxyType(
    {
        Exit.DONE: "done; check: nothing fails; explain: the device can be had",
        Exit.PROBLEM: "a problem was found, or it failed; explain: the device cannot be had now",
        Exit.USAGE: "the command line or the configuration is wrong",
        Exit.API: "the API server cannot be reached, or does not accept the credentials",
        Exit.NO_DEVICE: "no device of that name, or more than one",
        Exit.REFUSED: "release: not confirmed, the device is or may be attached and --force was not given, or its lock "
        "has changed meanwhile",
    }
)

PROG = "usbip-plugin"
DEFAULT_NAMESPACE = "usbip-system"
DEFAULT_CONFIG_MAP = "usbip-plugin"
MAX_CONTROLLERS = 15
"""Controllers of 16 ports that a simulated kernel may have."""
SHELLS = ("bash", "zsh", "fish")
FORMATS = ("table", "wide", "json", "yaml", "name")
TEXT_FORMATS = ("text", "json", "yaml")
DEVICE = "DEVICE"
DEVICE_HELP = (
    "its id, SERVER/BUSID, bus id, serial number, the name of a resource that has only this device, or the beginning "
    "of one of them"
)
WIDTH = 100
"""Characters in a line of the list of exit statuses in the help."""


def parser(prog: str = PROG) -> argparse.ArgumentParser:
    """Returns the parser of the whole command line. prog: the program's name, such as "kubectl usbip"."""
    top = argparse.ArgumentParser(
        prog=prog,
        description="USB/IP device plugin for Kubernetes, coordinated through Leases.",
        epilog=_epilog(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    top.add_argument("--version", action="version", version=f"usbip-plugin {__version__}")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")

    devices = commands.add_parser("devices", help="every device of the cluster, by its lock: holder, pod, since")
    _api_flags(devices)
    devices.add_argument("-o", "--output", choices=FORMATS, default="table", help="default %(default)s; name: ids only")

    explain = commands.add_parser("explain", help="why a device can or cannot be had, and what to do")
    explain.add_argument("device", metavar=DEVICE, help=DEVICE_HELP)
    _api_flags(explain)
    _config_flags(explain)
    explain.add_argument("-o", "--output", choices=TEXT_FORMATS, default="text", help="default %(default)s")

    release = commands.add_parser(
        "release",
        help="take a device from its holder by emptying its lock",
        description="Empties the lock of a device. Its holder, if it lives, detaches the device at once, whatever its "
        "pod does with it. Says first what it would break, and asks.",
    )
    release.add_argument("device", metavar=DEVICE, help=DEVICE_HELP)
    _api_flags(release)
    _config_flags(release)
    release.add_argument("--dry-run", action="store_true", help="only say what it would break")
    release.add_argument("--force", action="store_true", help="also while the device is, or may be, attached")
    release.add_argument("-y", "--yes", action="store_true", help="do not ask")

    check = commands.add_parser("check", help="is this node able to run the plugin, and what to do if not")
    _node_flags(check)

    run = commands.add_parser("run", help="run the plugin on this node")
    _node_flags(run)
    run.add_argument(
        "--listen", metavar="ADDRESS", help=f"status page, health and metrics, '' for none (default {DEFAULT_LISTEN})"
    )
    run.add_argument("--log-level", choices=LOG_LEVELS, help=f"default {DEFAULT_LOG_LEVEL}")
    run.add_argument("--log-format", choices=("json", "text"), default="json", help="default %(default)s")

    completion = commands.add_parser("completion", help="print a script that completes this command line in a shell")
    completion.add_argument("shell", choices=SHELLS, metavar="SHELL", help=", ".join(SHELLS))

    demo = commands.add_parser("demo", help="two nodes in this process: what the plugin does, without a cluster")
    demo.add_argument("--real-kernel", action="store_true", help="attach to this machine's vhci_hcd (needs root)")

    simulate = commands.add_parser("simulate", help="for development: stand-ins for what a test cluster has not got")
    _simulate_flags(simulate.add_subparsers(dest="simulated", required=True, metavar="WHAT"))
    return top


def _epilog() -> str:
    lines = ["exit status:"]
    for number, text in MEANING.items():
        lines += textwrap.wrap(text, WIDTH, initial_indent=f"  {number:d}  ", subsequent_indent="     ")
    return "\n".join(lines)


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
    form = "BUSID=VVVV:PPPP[,serial=TEXT][,class=CC[SS[PP]][+...]][,manufacturer=TEXT][,product=TEXT]"
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
        "-n", "--namespace", metavar="NAME", help=f"of the Leases (default: the pod's own, else {DEFAULT_NAMESPACE})"
    )


def _config_flags(command: argparse.ArgumentParser) -> None:
    """Adds the flags of commands that work without the configuration too, and look for it in its usual places."""
    command.add_argument(
        "--config",
        metavar="FILE",
        type=Path,
        help=f"default: {DEFAULT_CONFIG_PATH} if it is there, else the ConfigMap",
    )
    command.add_argument("--config-map", metavar="NAME", default=DEFAULT_CONFIG_MAP, help="default %(default)s")
    command.add_argument("--domain", metavar="NAME", help=f"of the resource names (default {DEFAULT_DOMAIN})")


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
