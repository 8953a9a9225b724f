"""The configuration of the exporter: which devices of its host it exports, and to whom."""

from __future__ import annotations

import enum
import ipaddress
from dataclasses import dataclass
from typing import TypeAlias

from usbip_plugin.config import scalars
from usbip_plugin.config.document import (
    Fields,
    Node,
    Parsed,
    Problems,
    Unknown,
    read_document,
    read_fields,
)
from usbip_plugin.config.problems import ConfigProblem
from usbip_plugin.config.schema import Selector
from usbip_plugin.config.selectors import read_selector
from usbip_plugin.errors import ConfigError

EXPORT_KEYS = ("export", "allow", "fence", "whenApiIsAway", "names")
MAX_SELECTORS = 256
"""Entries of `export`. Each device of the host is compared with each of them; usbip-host takes 16 devices."""
MAX_NETWORKS = 256
"""Entries of `allow`. Each connection is compared with each of them."""
MAX_NAMES = 64
"""Entries of `names`."""

IpNetwork: TypeAlias = ipaddress.IPv4Network | ipaddress.IPv6Network


class WhenApiIsAway(enum.Enum):
    """The answer to an import while the exporter cannot read the locks. Exports under way go on in any case.

    REFUSE: nothing more is exported.
    SERVE: every import is granted, as by usbipd.
    """

    REFUSE = "refuse"
    SERVE = "serve"


@dataclass(frozen=True, slots=True)
class ExportConfig:
    """A valid configuration of the exporter.

    export: the devices of this host that are exported, each if one selector matches it.
    allow: the networks whose clients are served; None for every client.
    fence: whether a device is exported only to the holder of its lock.
    names: the names and addresses of this host in the plugins' configurations; () for its own names and addresses.
    """

    export: tuple[Selector, ...]
    allow: tuple[IpNetwork, ...] | None = None
    fence: bool = False
    when_api_is_away: WhenApiIsAway = WhenApiIsAway.REFUSE
    names: tuple[str, ...] = ()

    def start_only(self) -> dict[str, object]:
        """Returns the settings that the exporter reads only at start, by their names in the file."""
        return {"fence": self.fence, "whenApiIsAway": self.when_api_is_away.value, "names": list(self.names)}


def parse_export(text: str, source: str = "export.yaml") -> Parsed[ExportConfig]:
    """Returns the configuration in YAML text. Raises ConfigError with all problems found. source: for messages."""
    root = read_document(text, source)
    if root is None or root.empty:
        raise ConfigError(
            source, [ConfigProblem(source, "empty file; add export, or write export: [] to export nothing")]
        )
    problems = Problems(source)
    top = read_fields(root, problems, EXPORT_KEYS, Unknown.ERROR) or Fields()
    if root.is_mapping and "export" not in top:
        problems.error(root, "export is missing; list selectors, or write export: [] to export nothing")
    config = ExportConfig(
        export=top.read("export", problems, _selectors, ()),
        allow=top.read("allow", problems, _networks, None),
        fence=top.read("fence", problems, scalars.boolean, False),
        when_api_is_away=top.read("whenApiIsAway", problems, scalars.choice, WhenApiIsAway.REFUSE, WhenApiIsAway),
        names=top.read("names", problems, _names, ()),
    )
    for key in ("whenApiIsAway", "names"):
        if key in top and not config.fence:
            problems.warn(top[key], "has no effect without fence: true")
    problems.raise_if_any()
    return Parsed(config, problems.warnings)


def _selectors(node: Node, problems: Problems) -> tuple[Selector, ...] | None:
    found: dict[Selector, Node] = {}
    for item in _items(node, problems, "selectors", MAX_SELECTORS):
        before = problems.errors
        selector = read_selector(item, problems)
        if problems.errors != before:
            continue
        if selector in found:
            problems.error(item, f"same selector as {found[selector].path} (line {found[selector].line}); remove one")
        found.setdefault(selector, item)
    if node.is_sequence and not node.yaml.value:
        problems.warn(node, "empty list; no device is exported")
    return tuple(found)


def _networks(node: Node, problems: Problems) -> tuple[IpNetwork, ...] | None:
    networks: list[IpNetwork] = []
    for item in _items(node, problems, "networks", MAX_NETWORKS):
        text = item.scalar or ""
        try:
            networks.append(ipaddress.ip_network(text))
        except ValueError:
            problems.error(item, f"{item.describe()} is not a valid network; {_network_cure(text)}")
    if node.is_sequence and not node.yaml.value:
        problems.error(node, "an empty list allows nobody; add a network, or remove the key to allow everybody")
    return tuple(networks)


def _network_cure(text: str) -> str:
    try:
        return f"did you mean {ipaddress.ip_network(text, strict=False)}?"
    except ValueError:
        return 'expected an address or a CIDR, such as "192.168.0.0/16"'


def _names(node: Node, problems: Problems) -> tuple[str, ...] | None:
    names = [scalars.host(item, problems) for item in _items(node, problems, "names", MAX_NAMES)]
    return tuple(name for name in names if name is not None)


def _items(node: Node, problems: Problems, what: str, most: int) -> tuple[Node, ...]:
    """Returns the elements of a list, none with an error if the node is not a list or has more than `most`."""
    items = tuple(node.items())
    if not node.is_sequence:
        problems.error(node, f"expected a list of {what}, got {node.describe()}")
    elif len(items) > most:
        problems.error(node, f"expected at most {most} {what}, got {len(items)}")
        return ()
    return items
