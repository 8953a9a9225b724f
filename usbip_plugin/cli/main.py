"""The entry points of the command line: from arguments to an exit status."""

from __future__ import annotations

import argparse
import asyncio
import importlib
import os
import sys
from collections.abc import Sequence

from usbip_plugin.kube import lazy_imports

lazy_imports.make_imports_lazy()  # before any other module imports the libraries

from usbip_plugin.cli.parser import PROG, Exit, parser  # noqa: E402
from usbip_plugin.errors import (  # noqa: E402
    AmbiguousDevice,
    ConfigError,
    KubeUnauthorized,
    KubeUnreachable,
    NoSuchDevice,
    PluginError,
    PruneRefused,
    ReleaseRefused,
)

KUBECTL = "kubectl usbip"


def main(arguments: Sequence[str] | None = None, prog: str = PROG) -> int:
    """Runs one command line (None: that of the process) and returns its exit status. Problems go to stderr."""
    if "_ARGCOMPLETE" in os.environ:  # a shell asks for completions
        from usbip_plugin.cli.completion import autocomplete  # noqa: PLC0415

        autocomplete()
    options = parser(prog).parse_args(arguments)
    os.environ.setdefault("GRPC_VERBOSITY", "ERROR")  # else gRPC writes to stderr whenever a kubelet restarts
    try:
        return _run(options)
    except ConfigError as error:
        print(error, file=sys.stderr)  # noqa: T201 - the command line's own voice
        return Exit.USAGE
    except PluginError as error:
        print(f"{prog}: {error}", file=sys.stderr)  # noqa: T201
        return _status(error)
    except BrokenPipeError:
        # the reader closed the pipe; the flush of buffered output at the exit of the process must not fail on it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return Exit.DONE
    except KeyboardInterrupt:
        return 130


def kubectl() -> int:
    """Runs the command line as `kubectl usbip`. kubectl finds this entry point as kubectl-usbip in the PATH."""
    return main(prog=KUBECTL)


def _status(error: PluginError) -> Exit:
    match error:
        case KubeUnreachable() | KubeUnauthorized():
            return Exit.API
        case NoSuchDevice() | AmbiguousDevice():
            return Exit.NO_DEVICE
        case ReleaseRefused() | PruneRefused():
            return Exit.REFUSED
        case _:
            return Exit.PROBLEM


def _run(options: argparse.Namespace) -> int:
    # imported where used: a `run` on a node does not load the commands for people, and they do not load the plugin
    match options.command:
        case "run" | "check":
            from usbip_plugin.cli import node_commands  # noqa: PLC0415

            return node_commands.run(options) if options.command == "run" else node_commands.check(options)
        case "export" | "exported":
            from usbip_plugin.cli import export_commands  # noqa: PLC0415

            return export_commands.export(options) if options.command == "export" else export_commands.exported(options)
        case "devices" | "explain" | "release" | "prune":
            from usbip_plugin.cli.cluster_commands import devices, explain, prune, release  # noqa: PLC0415

            command = {"devices": devices, "explain": explain, "release": release, "prune": prune}[options.command]
            return asyncio.run(command(options))
        case "validate":
            from usbip_plugin.cli.validate import validate  # noqa: PLC0415

            return validate(options)
        case "completion":
            from usbip_plugin.cli.completion import script  # noqa: PLC0415

            print(script(options.shell))  # noqa: T201
            return Exit.DONE
        case _:
            return _simulate(options)


def _simulate(options: argparse.Namespace) -> int:
    """Carries out `demo` and `simulate`, whose code is loaded by name: the product does not depend on its doubles."""
    from usbip_plugin.observe.logs import set_up_logging  # noqa: PLC0415

    if options.command == "demo":
        set_up_logging("none", sys.stderr)
        demo, screen = (importlib.import_module(f"usbip_sim.{name}") for name in ("demo", "screen"))
        shown = screen.Screen.of(sys.stdout, os.environ)
        held = asyncio.run(demo.run(print, real_kernel=options.real_kernel, screen=shown))
        return Exit.DONE if held else Exit.PROBLEM
    set_up_logging(options.log_level, sys.stdout, json_lines=True)
    commands = importlib.import_module("usbip_sim.commands")
    if options.simulated == "kernel":
        return int(commands.kernel(options.socket, options.device_directory, options.controllers))
    return int(commands.server(options.listen, options.device, options.devices_file))
