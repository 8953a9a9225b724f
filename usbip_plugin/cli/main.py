"""The entry points of the command line: from arguments to an exit status."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Callable, Coroutine, Sequence
from types import ModuleType
from typing import Any

from usbip_plugin.kube import lazy_imports

lazy_imports.make_imports_lazy()  # before any other module imports the libraries

from usbip_plugin.cli.parser import KUBECTL, PROG, Exit, parser  # noqa: E402
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


def main(arguments: Sequence[str] | None = None, prog: str = PROG) -> int:
    """Runs one command line (None: that of the process) and returns its exit status. Problems go to stderr."""
    if "_ARGCOMPLETE" in os.environ:  # a shell asks for completions
        from usbip_plugin.cli.completion import autocomplete  # noqa: PLC0415

        autocomplete()
    top = parser(prog)
    options = top.parse_args(arguments)
    if options.command in (None, "help") or (options.command == "simulate" and options.simulated is None):
        names = options.about if options.command == "help" else [options.command] if options.command else []
        top.command(names).print_help()
        return Exit.DONE
    import logging  # noqa: PLC0415 - --version and --help do not need it

    logging.getLogger().addHandler(logging.NullHandler())  # else libraries log to stderr what is raised as well
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
        case "check" if options.node is not None:
            from usbip_plugin.cli import remote_check  # noqa: PLC0415

            return _run_async(remote_check, options)
        case "devices" | "nodes" | "servers":
            from usbip_plugin.cli import list_commands  # noqa: PLC0415

            return _run_async(list_commands, options)
        case "events" | "trace":
            from usbip_plugin.cli import history_commands  # noqa: PLC0415

            return _run_async(history_commands, options)
        case "support-bundle":
            from usbip_plugin.cli import bundle  # noqa: PLC0415

            return _run_async(bundle, options)
        case "explain" | "release" | "prune":
            from usbip_plugin.cli import cluster_commands  # noqa: PLC0415

            return _run_async(cluster_commands, options)
        case "version":
            from usbip_plugin.cli.version import version  # noqa: PLC0415

            return version(options)
        case "validate":
            from usbip_plugin.cli.validate import validate  # noqa: PLC0415

            return validate(options)
        case _:
            # by name: kubectl-usbip is packed without the code of these commands
            return int(importlib.import_module("usbip_plugin.cli.local_commands").carry_out(options))


def _run_async(module: ModuleType, options: argparse.Namespace) -> int:
    """Runs the coroutine that has the name of the command."""
    import asyncio  # noqa: PLC0415 - a third of the time that --version and --help would take

    command: Callable[[argparse.Namespace], Coroutine[Any, Any, int]] = getattr(
        module, options.command.replace("-", "_")
    )
    return asyncio.run(command(options))
