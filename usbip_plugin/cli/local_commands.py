"""The commands that kubectl-usbip, for people, does not have: for nodes, for hosts of devices and for development."""

from __future__ import annotations

import argparse
import asyncio
import importlib
import os
import sys

from usbip_plugin.cli.parser import Exit


def carry_out(options: argparse.Namespace) -> int:
    """Carries out the command and returns the exit status."""
    # imported where used: a `run` on a node does not load the other commands
    match options.command:
        case "run" | "check":
            from usbip_plugin.cli import node_commands  # noqa: PLC0415

            return node_commands.run(options) if options.command == "run" else node_commands.check(options)
        case "export" | "exported":
            from usbip_plugin.cli import export_commands  # noqa: PLC0415

            return export_commands.export(options) if options.command == "export" else export_commands.exported(options)
        case "completion":
            from usbip_plugin.cli.completion import script  # noqa: PLC0415

            print(script(options.shell))  # noqa: T201 - the command line's own voice
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
