"""The commands, flags and exit statuses. Flags that the configuration file may set too have no default here."""

from __future__ import annotations

import argparse
import enum
import os
import re
import textwrap
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType

from usbip_plugin import __version__
from usbip_plugin.cli.help_texts import add_texts
from usbip_plugin.cli.usage import CommandParser, Commands
from usbip_plugin.config.schema import (
    DEFAULT_ALLOW_EXTRAS,
    DEFAULT_CDI_DIRECTORY,
    DEFAULT_CONFIG_PATH,
    DEFAULT_DOMAIN,
    DEFAULT_EXPORT_CONFIG_PATH,
    DEFAULT_EXPORT_HTTP,
    DEFAULT_EXPORT_LISTEN,
    DEFAULT_LISTEN,
    DEFAULT_LOG_LEVEL,
    DEFAULT_PLUGIN_DIRECTORY,
    DEFAULT_POD_RESOURCES_SOCKET,
    DEFAULT_STATE_DIRECTORY,
    DEFAULT_SYSFS,
    LOG_LEVELS,
)
from usbip_plugin.model import TRACE_ID


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
        Exit.DONE: "done; check: nothing failed; explain: the device is available",
        Exit.PROBLEM: "a problem was found, or the command failed; explain: the device is unavailable",
        Exit.USAGE: "the command line or the configuration is not valid",
        Exit.API: "the API server is unreachable, or rejects the credentials",
        Exit.NO_DEVICE: "no device has that name, or several have it",
        Exit.REFUSED: "release, prune: not confirmed; release: the lock has changed, or the device may be attached "
        "(see --force)",
    }
)

PROG = "usbip-plugin"
KUBECTL = "kubectl usbip"
"""The command line for people. It has neither the commands of a node or a host of devices, nor their code."""
DEFAULT_NAMESPACE = "usbip-system"
DEFAULT_CONFIG_MAP = "usbip-plugin"
PLUGIN_LABEL = "app.kubernetes.io/name=usbip-plugin"
"""The label of the plugin's pods."""
EXPORT_HTTP = "USBIP_EXPORTER_HTTP"
"""The environment variable with the address of the exporter's pages, for the exporter and for `exported` in its pod."""
EXPORTER_LABEL = "app.kubernetes.io/name=usbip-exporter"
"""The label of the exporter's pods."""
MAX_CONTROLLERS = 15
"""Controllers of 16 ports that a simulated kernel may have."""
SHELLS = ("bash", "zsh", "fish")
FORMATS = ("table", "wide", "json", "yaml", "name")
SORT_COLUMNS = ("device", "resource", "state", "holder", "pod", "age", "reason")
TEXT_FORMATS = ("text", "json", "yaml")
STDIN = "-"
"""The FILE of `validate` that stands for standard input."""
NO_HEADERS = "leave out the names of the columns"
DEVICE = "DEVICE"
DEVICE_HELP = (
    "its ID, SERVER/BUSID, bus ID, serial number, a resource that selects no other device, or a unique prefix of any "
    "of these"
)
_UNITS = {"ms": 0.001, "s": 1.0, "": 1.0, "m": 60.0, "h": 3600.0}
_DURATION = re.compile(r"([0-9]{1,6}(?:\.[0-9]{1,3})?)(ms|s|m|h|)", re.ASCII)
_TRACE_LINK = re.compile(r"https?://[!-~]+", re.ASCII)
WIDTH = 100
"""Characters in a line of the list of exit statuses in the help."""


def parser(prog: str = PROG) -> CommandParser:
    """Returns the parser of a program: PROG with all commands, or KUBECTL with those for people."""
    description = "USB/IP device plugin for Kubernetes, coordinated through Leases."
    top = CommandParser(prog=prog, description=description, epilog=_epilog())
    top.add_argument("--version", action="version", version=f"usbip-plugin {__version__}")
    commands = top.add_subparsers(dest="command", metavar="COMMAND")

    _list_flags(commands)
    form = "output format (default %(default)s)"

    explain = commands.add_parser("explain", help="explain why a device is (un)available and what to do")
    _device_arguments(explain)
    explain.add_argument("-o", "--output", choices=TEXT_FORMATS, default="text", help=form)

    events = commands.add_parser("events", help="list the Kubernetes Events about a device, its pod and its resources")
    _device_arguments(events)
    events.add_argument("-o", "--output", choices=FORMATS, default="table", help=f"{form}; name: only names")
    events.add_argument("--no-headers", action="store_true", help=NO_HEADERS)

    trace = commands.add_parser("trace", help="show the last trace of a device, from the status pages of all nodes")
    _device_arguments(trace)
    trace.add_argument("-o", "--output", choices=TEXT_FORMATS, default="text", help=form)

    release = commands.add_parser(
        "release",
        help="take a device from its holder by emptying its lock",
        description="Empties the lock of a device. If the holder is alive it detaches the device immediately, even "
        "while a pod is using it. Shows the impact and asks for confirmation.",
    )
    _device_arguments(release)
    release.add_argument("--dry-run", action="store_true", help="only show the impact")
    release.add_argument("--force", action="store_true", help="release even if the device may be attached")
    release.add_argument("-y", "--yes", action="store_true", help="do not ask for confirmation")

    prune = commands.add_parser(
        "prune",
        help="remove the Leases of nodes and devices that are gone",
        description="Removes sessions and locks of nodes that do not exist. Also removes locks without a holder, of "
        "devices that the configuration does not name or that nobody has held for a day and their server does not "
        "list. Shows them and asks for confirmation.",
    )
    _connection_flags(prune)
    _config_lookup_flags(prune)
    prune.add_argument("--dry-run", action="store_true", help="only show what would be removed")
    prune.add_argument("-y", "--yes", action="store_true", help="do not ask for confirmation")

    bundle = commands.add_parser(
        "support-bundle",
        help="write an archive for a bug report: configuration, Leases, Events, pods, logs and status pages",
        description="Writes a tar.gz with what others need to help, and prints its name. Reads no Secrets, and leaves "
        "out values of environment variables and whatever looks like a credential. Look into it before you send it.",
    )
    bundle.add_argument(
        "-f", "--file", metavar="FILE", type=Path, help="archive to write (default usbip-support-TIME.tar.gz)"
    )
    _connection_flags(bundle)
    _config_lookup_flags(bundle)

    _validate_flags(commands)

    check = commands.add_parser("check", help="check whether a node can run the plugin")
    asked = "check this node of the cluster by a pod that is deleted again"
    check.add_argument("-o", "--output", choices=TEXT_FORMATS, default="text", help=form)
    if prog == KUBECTL:
        check.add_argument("node", metavar="NODE", help=asked)
        _connection_flags(check)
    else:
        check.add_argument("node", metavar="NODE", nargs="?", help=f"{asked}; without it, check this machine")
        _node_flags(check, _connection_flags)
        _local_commands(commands)

    version = commands.add_parser("version", help="print the version")
    version.add_argument("-o", "--output", choices=TEXT_FORMATS, default="text", help=form)
    about = commands.add_parser("help", help="show the help of a command")
    about.add_argument("about", metavar="COMMAND", nargs="*", help="the command; without it, of the program")
    add_texts(top, prog)
    return top


def _local_commands(commands: Commands) -> None:
    """Adds the commands for nodes, hosts of devices and development, and the completion of PROG."""

    run = commands.add_parser("run", help="run the plugin on this node")
    _node_flags(run)
    listen = f"addresses of the status page, health and metrics; '' disables them (default {DEFAULT_LISTEN})"
    run.add_argument("--listen", metavar="ADDRESS[,...]", help=listen)
    probes = "addresses of /healthz and /readyz alone, which visitors of the other pages cannot block (default none)"
    run.add_argument("--probes", metavar="ADDRESS[,...]", default="", help=probes)
    link = f"where the page links to for a trace, such as https://tempo.example.com/trace/{TRACE_ID} (default none)"
    run.add_argument("--trace-link", metavar="URL", type=_trace_link, default="", help=link)
    run.add_argument("--log-level", choices=LOG_LEVELS, help=f"lowest level to log (default {DEFAULT_LOG_LEVEL})")
    run.add_argument("--log-format", choices=("json", "text"), default="json", help="log format (default %(default)s)")

    _exporter_flags(commands)

    completion = commands.add_parser("completion", help="print the completion script for a shell")
    completion.add_argument("shell", choices=SHELLS, metavar="SHELL", help=", ".join(SHELLS))

    demo = commands.add_parser("demo", help="show what the plugin does on two simulated nodes, without a cluster")
    demo.add_argument("--real-kernel", action="store_true", help="attach to this machine's vhci_hcd (needs root)")

    simulate = commands.add_parser("simulate", help="development helpers: simulated kernel and USB/IP server")
    _simulate_flags(simulate.add_subparsers(dest="simulated", metavar="WHAT"))


def _list_flags(commands: Commands) -> None:
    devices = commands.add_parser("devices", help="list devices with their resource, holder, pod and age")
    devices.add_argument("names", metavar=DEVICE, nargs="*", help="only devices with this name, as `explain` takes it")
    nodes = commands.add_parser("nodes", help="list nodes with their plugin, kernel module and devices")
    servers = commands.add_parser("servers", help="list USB/IP servers, as this machine reaches them")
    for command in (devices, nodes, servers):
        form = "output format (default %(default)s); name: only IDs or names"
        command.add_argument("-o", "--output", choices=FORMATS, default="table", help=form)
        command.add_argument("--no-headers", action="store_true", help=NO_HEADERS)
    order = "column to sort by; age: those held longest come first"
    devices.add_argument("--sort-by", choices=SORT_COLUMNS, default="device", help=f"{order} (default %(default)s)")
    devices.add_argument("-w", "--watch", action="store_true", help="after the list, show each device that changes")
    devices.add_argument("--resource", metavar="NAME", help="only devices of this resource, with or without its domain")
    devices.add_argument("--node", metavar="NAME", help="only devices that this node holds")
    devices.add_argument("--server", metavar="HOST[:PORT]", help="only devices of this USB/IP server")
    for command in (devices, nodes, servers):
        _connection_flags(command)
        _config_lookup_flags(command)


def _epilog() -> str:
    lines = ["exit status:"]
    for number, text in MEANING.items():
        lines += textwrap.wrap(text, WIDTH, initial_indent=f"  {number:d}  ", subsequent_indent="     ")
    return "\n".join(lines)


def _exporter_flags(commands: Commands) -> None:
    export = commands.add_parser(
        "export",
        help="export this host's USB devices, in place of usbipd",
        description="Binds the selected USB devices of this host to usbip-host and exports them to USB/IP clients. "
        "When it ends, the devices stay bound and connections go on.",
    )
    path = Path(DEFAULT_EXPORT_CONFIG_PATH)
    export.add_argument(
        "--config", metavar="FILE", type=Path, default=path, help="configuration file (default %(default)s)"
    )
    clients = "address for USB/IP clients (default %(default)s)"
    export.add_argument("--listen", metavar="ADDRESS:PORT", default=DEFAULT_EXPORT_LISTEN, help=clients)
    http = os.environ.get(EXPORT_HTTP, DEFAULT_EXPORT_HTTP)
    otherwise = f"(default ${EXPORT_HTTP}, else {DEFAULT_EXPORT_HTTP})"
    pages = f"address of health, metrics and /exported; '' disables them {otherwise}"
    export.add_argument("--http", metavar="ADDRESS", default=http, help=pages)
    _log_flags(export)
    _api_flags(export)

    exported = commands.add_parser("exported", help="list the USB devices that this host exports, and to whom")
    form = "output format (default %(default)s)"
    exported.add_argument("-o", "--output", choices=("table", "json", "yaml"), default="table", help=form)
    asked = f"address of the exporter's pages; if nothing listens there, sysfs is read {otherwise}"
    exported.add_argument("--http", metavar="ADDRESS", default=http, help=asked)
    for command in (export, exported):
        sysfs, state = Path(DEFAULT_SYSFS), Path(DEFAULT_STATE_DIRECTORY)
        command.add_argument(
            "--sysfs", metavar="DIR", type=Path, default=sysfs, help="where sysfs is mounted (default %(default)s)"
        )
        kept = "directory of the file that names the clients of exported devices (default %(default)s)"
        command.add_argument("--state-directory", metavar="DIR", type=Path, default=state, help=kept)


def _validate_flags(commands: Commands) -> None:
    validate = commands.add_parser(
        "validate",
        help="check configuration files before they are applied",
        description="Checks configurations of the plugin or the exporter, and connects to nothing. A FILE is a "
        f"configuration or a manifest with ConfigMaps, {STDIN} standard input. Exits with 2 if one is not valid.",
    )
    validate.add_argument("file", metavar="FILE", nargs="+", help=f"configuration or manifest; {STDIN} for stdin")
    form = "output format (default %(default)s)"
    validate.add_argument("-o", "--output", choices=("text", "json"), default="text", help=form)
    _extras_flag(validate)


def _extras_flag(command: argparse.ArgumentParser) -> None:
    extras = f"device nodes that `extras` may name, separated by commas (default {','.join(DEFAULT_ALLOW_EXTRAS)})"
    command.add_argument("--allow-extras", metavar="GLOB,...", type=_globs, default=DEFAULT_ALLOW_EXTRAS, help=extras)


def _log_flags(command: argparse.ArgumentParser) -> None:
    level = "lowest level to log (default %(default)s)"
    command.add_argument("--log-level", choices=LOG_LEVELS, default=DEFAULT_LOG_LEVEL, help=level)
    form = "log format (default %(default)s)"
    command.add_argument("--log-format", choices=("json", "text"), default="json", help=form)


def _simulate_flags(simulated: Commands) -> None:
    kernel = simulated.add_parser(
        "kernel",
        help="a vhci_hcd that attaches nothing",
        description="Simulates vhci_hcd for plugins that run with --simulated-kernel. Keeps connections and ports "
        "while plugins restart. Pods get device nodes that behave like /dev/zero.",
    )
    kernel.add_argument(
        "--socket", metavar="FILE", type=Path, required=True, help="unix socket that plugins connect to"
    )
    directory = "the node's /dev, in which device nodes are created (needs CAP_MKNOD)"
    kernel.add_argument("--device-directory", metavar="DIR", type=Path, help=directory)
    kernel.add_argument(
        "--controllers", metavar="N", type=_count, default=1, help="controllers of 16 ports (default 1)"
    )

    server = simulated.add_parser(
        "server",
        help="a USB/IP server with virtual devices",
        description="Runs a USB/IP server that, like usbipd, exports a device to one client at a time. Unlike usbipd, "
        "it notices within 8 s that a client's host is gone.",
    )
    server.add_argument(
        "--listen", metavar="ADDRESS:PORT", default="0.0.0.0:3240", help="address (default %(default)s)"
    )
    form = "BUSID=VVVV:PPPP[,serial=TEXT][,class=CC[SS[PP]][+...]][,manufacturer=TEXT][,product=TEXT]"
    server.add_argument("--device", metavar=form, action="append", default=[], help="device to export; can be repeated")
    devices = "file with further devices, one per line; reloaded when it changes"
    server.add_argument("--devices-file", metavar="FILE", type=Path, help=devices)
    for command in (kernel, server):
        level = "lowest level to log (default %(default)s)"
        command.add_argument("--log-level", choices=LOG_LEVELS, default=DEFAULT_LOG_LEVEL, help=level)


def _globs(text: str) -> tuple[str, ...]:
    globs = tuple(part.strip() for part in text.split(",") if part.strip())
    for glob in globs:
        if not glob.startswith("/"):
            raise argparse.ArgumentTypeError(
                f"{glob!r} must be an absolute path or a pattern of one, such as /dev/snd/*"
            )
    return globs


def _count(text: str) -> int:
    if not text.isascii() or not text.isdecimal() or not 1 <= int(text) <= MAX_CONTROLLERS:
        raise argparse.ArgumentTypeError(f"{text!r} must be a number from 1 to {MAX_CONTROLLERS}")
    return int(text)


def _api_flags(command: argparse.ArgumentParser) -> None:
    kubeconfig = "kubeconfig file (default: $KUBECONFIG, the pod's ServiceAccount, ~/.kube/config)"
    command.add_argument("--kubeconfig", metavar="FILE", help=kubeconfig)
    namespace = f"namespace of the Leases (default: the pod's own, else {DEFAULT_NAMESPACE})"
    command.add_argument("-n", "--namespace", metavar="NAME", help=namespace)


def _connection_flags(command: argparse.ArgumentParser) -> None:
    """Adds kubectl's flags of the same names, for commands of people."""
    _api_flags(command)
    command.add_argument("--context", metavar="NAME", help="context of the kubeconfig")
    command.add_argument("--cluster", metavar="NAME", help="cluster of the kubeconfig")
    command.add_argument("--user", metavar="NAME", help="user of the kubeconfig")
    timeout = "longest time for one request to the API server, such as 500ms, 10s or 2m (default: the command's own)"
    command.add_argument("--request-timeout", metavar="TIME", type=_duration, help=timeout)


def _duration(text: str) -> float | None:
    """Returns seconds; None for 0, as kubectl has it. A number without a unit is in seconds."""
    found = _DURATION.fullmatch(text)
    if found is None:
        raise argparse.ArgumentTypeError(f"{text!r} must be a time such as 500ms, 10s, 2m or 0")
    return float(found[1]) * _UNITS[found[2]] or None


def _trace_link(text: str) -> str:
    if text and not (_TRACE_LINK.fullmatch(text) and TRACE_ID in text):
        raise argparse.ArgumentTypeError(f"{text!r} must be an http:// or https:// URL with {TRACE_ID}")
    return text


def _config_flags(command: argparse.ArgumentParser, path: Path | None, default: str) -> None:
    command.add_argument("--config", metavar="FILE", type=Path, default=path, help=f"configuration file ({default})")
    command.add_argument("--domain", metavar="NAME", help=f"domain of the resource names (default {DEFAULT_DOMAIN})")


def _device_arguments(command: argparse.ArgumentParser) -> None:
    """Adds the arguments of commands about one device. They look for the configuration, and work without it too."""
    command.add_argument("device", metavar=DEVICE, help=DEVICE_HELP)
    _connection_flags(command)
    _config_lookup_flags(command)


def _config_lookup_flags(command: argparse.ArgumentParser) -> None:
    _config_flags(command, None, f"default: {DEFAULT_CONFIG_PATH} if it exists, else the ConfigMap")
    config_map = "ConfigMap with the configuration (default %(default)s)"
    command.add_argument("--config-map", metavar="NAME", default=DEFAULT_CONFIG_MAP, help=config_map)


def _node_flags(
    command: argparse.ArgumentParser, api_flags: Callable[[argparse.ArgumentParser], None] = _api_flags
) -> None:
    api_flags(command)
    _config_flags(command, Path(DEFAULT_CONFIG_PATH), "default %(default)s")
    add = command.add_argument
    add("--plugin-directory", metavar="DIR", help=f"device-plugin directory (default {DEFAULT_PLUGIN_DIRECTORY})")
    add("--pod-resources-socket", metavar="FILE", help=f"pod-resources socket (default {DEFAULT_POD_RESOURCES_SOCKET})")
    _extras_flag(command)
    specs = "directory from which the container runtime reads CDI specs (default %(default)s)"
    add("--cdi-directory", metavar="DIR", type=Path, default=Path(DEFAULT_CDI_DIRECTORY), help=specs)
    kernel = "development only: the socket of `simulate kernel`, instead of vhci_hcd; attaches no device"
    add("--simulated-kernel", metavar="FILE", type=Path, help=kernel)
    add(
        "--node-name",
        metavar="NAME",
        default=os.environ.get("NODE_NAME"),
        help="name of this node (default $NODE_NAME)",
    )
