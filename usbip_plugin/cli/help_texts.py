"""The description and the examples in the help of each command."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from types import MappingProxyType

from usbip_plugin.cli.usage import CommandParser

WIDTH = 80
"""Characters in a line of a description."""


class CommandText:
    """The text about a command. description: "" for the one that the parser has. examples: without the program."""

    def __init__(self, description: str, *examples: str) -> None:
        self.description, self.examples = description, examples


TEXTS: Mapping[str, CommandText] = MappingProxyType(
    {
        "devices": CommandText(
            "Lists what the configuration selects, USB/IP servers list, Leases lock and nodes offer. Leaves "
            "out what you may not read or this machine cannot reach, and says so on stderr.",
            "devices",
            "devices --resource stick --watch",
            "devices lab-pi:3240/1-1.2 -o json",
        ),
        "nodes": CommandText(
            "Lists the nodes with the state and version of their plugin, and how many devices they offer and "
            "hold. MODULE shows whether vhci_hcd is loaded, and needs the right to get pods/proxy.",
            "nodes",
            "nodes -o wide",
        ),
        "servers": CommandText(
            "Asks each USB/IP server of the configuration from this machine, all at once. Nodes may reach others.",
            "servers",
            "servers -o json",
        ),
        "explain": CommandText(
            "Says whether a pod would get the device now, why not, and what to do.",
            "explain lab-pi:3240/1-1.2",
            "explain usbip.dev/stick",
        ),
        "events": CommandText(
            "Lists the Events of the plugin, scheduler and kubelet about the device, its resources and the "
            "pod that holds it, the latest last.",
            "events lab-pi:3240/1-1.2",
            "events stick -o wide",
        ),
        "trace": CommandText(
            "Shows the steps of the last Allocate, re-attach or release of a device, from all nodes that "
            "took part. Needs the right to get pods/proxy.",
            "trace lab-pi:3240/1-1.2",
            "trace stick -o json",
        ),
        "release": CommandText(
            "",
            "release lab-pi:3240/1-1.2 --dry-run",
            "release lab-pi:3240/1-1.2 --force --yes",
        ),
        "prune": CommandText(
            "",
            "prune --dry-run",
            "prune --yes",
        ),
        "support-bundle": CommandText(
            "",
            "support-bundle",
            "support-bundle --file /tmp/usbip.tar.gz",
        ),
        "validate": CommandText(
            "",
            "validate config.yaml",
            "validate -o json manifests.yaml",
        ),
        "check": CommandText(
            "Checks module, kubelet, rights and servers, and changes nothing. For a NODE it creates a pod "
            "there like those of the plugin, shows its report and deletes it.",
            "check node-a",
            "check node-a -o json",
        ),
        "run": CommandText(
            "Runs the plugin until SIGTERM. The manifests run it.",
            "run --node-name node-a --listen :13240",
        ),
        "export": CommandText(
            "",
            "export --config /etc/usbip-plugin/export.yaml",
        ),
        "exported": CommandText(
            "Asks the exporter of this host what it exports, to whom and since when; without an answer reads sysfs.",
            "exported",
            "exported -o json",
        ),
        "completion": CommandText(
            "Prints a script that a shell runs at its start. `kubectl usbip` needs none.",
            "completion bash > ~/.local/share/bash-completion/completions/usbip-plugin",
        ),
        "demo": CommandText(
            "Runs two plugins with simulated kernels and kubelets, and checks each promise.",
            "demo",
            "demo --real-kernel",
        ),
        "simulate": CommandText(
            "Stands in for a kernel or a USB/IP server.",
            "simulate server --device 1-1=0951:1666",
        ),
        "simulate kernel": CommandText(
            "",
            "simulate kernel --socket /run/vhci_hcd/simulated.sock",
        ),
        "simulate server": CommandText(
            "",
            "simulate server --listen 127.0.0.1:3240 --device 1-1=0951:1666,serial=A1",
        ),
        "version": CommandText(
            "Prints the version of the command line, as JSON also Python and system.",
            "version",
            "version -o json",
        ),
        "help": CommandText(
            "Shows the help of the program or of a command.",
            "help devices",
        ),
    }
)
"""The text about each command, by its names."""


def add_texts(top: CommandParser, program: str, before: str = "") -> None:
    """Adds descriptions and examples to the commands of a parser."""
    for name, command in top.commands().items():
        text = TEXTS[before + name]
        command.description = textwrap.fill(text.description or command.description or "", WIDTH)
        command.epilog = "\n".join(["examples:", *(f"  {program} {example}" for example in text.examples)])
        add_texts(command, program, f"{before}{name} ")
