"""The spans of the plugin, for docs/reference/tracing.md: what they mean, and their kinds from its syntax trees."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import usbip_plugin

ROOT = Path(usbip_plugin.__file__).parent


class SpanText(NamedTuple):
    """The attributes of a span, as Markdown, and what it stands for."""

    attributes: str
    meaning: str


SPANS = {
    "Allocate": SpanText(
        "of a call, `rpc.response.status_code`, `usbip.resource`, `usbip.device.ids`, `usbip.reused`, "
        "`usbip.lock.former_holder`",
        "the root; links to a former holder's trace, or the attachment's",
    ),
    "lock": SpanText(
        "of a device",
        "",
    ),
    "lock.acquire": SpanText(
        "of a device, `usbip.lock.epoch`",
        "the decision",
    ),
    "lock.write": SpanText(
        "of a device, `usbip.lock.conflict`",
        "one compare-and-swap on the Lease: holder, port, serial number or pod",
    ),
    "import": SpanText(
        "of a device, `server.address`, `server.port`, `network.transport`, `network.protocol.name`",
        "",
    ),
    "attach": SpanText(
        "of a device, `usbip.vhci.port`",
        "",
    ),
    "device node": SpanText(
        "of a device, `usbip.nodes`",
        "until the device is verified and its nodes exist",
    ),
    "CDI spec": SpanText(
        "of a device",
        "",
    ),
    "response": SpanText(
        "",
        "what the container gets",
    ),
    "withdraw": SpanText(
        "of a device, `usbip.lock.holder`, `usbip.lock.epoch`",
        "on other nodes, until the kubelet knows",
    ),
    "ListAndWatch": SpanText(
        "of a call, `usbip.resource`, `usbip.streams`",
        "until the list is written",
    ),
    "pod": SpanText(
        "of a device, of a pod",
        "the pod is known",
    ),
    "re-attach": SpanText(
        "of a device, of a pod, `usbip.tries`, `usbip.same_nodes`, `usbip.moved_to`",
        "from the loss to the re-attach or the pod's end",
    ),
    "adopt": SpanText(
        "of a device, of a pod, `usbip.adoption`",
        "a new process found the lock",
    ),
    "release": SpanText(
        "of a device, of a pod, `usbip.tries`, `usbip.lock.lost`",
        "detach and release; links to a new holder's trace",
    ),
    "detach": SpanText(
        "of a device",
        "until the port is free",
    ),
    "lock.release": SpanText(
        "of a device",
        "",
    ),
    "probe": SpanText(
        "of a device",
        "reading serial number and interfaces, a trace of its own",
    ),
}
"""By name, in the order of a hold. Attributes with a group are those of docs/reference/tracing.md."""


def span_kinds() -> dict[str, str]:
    """Returns the kind of each span that usbip_plugin starts, by name. Raises ValueError if SPANS has other names."""
    kinds = {name: kind for path in sorted(ROOT.rglob("*.py")) for name, kind in _started(path)}
    if kinds.keys() != SPANS.keys():
        raise ValueError(f"docs/spans.py: SPANS and the code differ in {sorted(kinds.keys() ^ SPANS.keys())}")
    return kinds


def _started(path: Path) -> Iterator[tuple[str, str]]:
    """Yields name and kind of each span that a module starts with span(...)."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        match node:
            case ast.Call(func=ast.Name(id="span") | ast.Attribute(attr="span"), args=args, keywords=keywords):
                values = [*args, *(keyword.value for keyword in keywords)]
                names = [
                    value.value for value in args if isinstance(value, ast.Constant) and isinstance(value.value, str)
                ]
                given = [kind for value in values for kind in _kind(value)]
                if names:
                    yield names[0], given[0] if given else "internal"


def _kind(value: ast.expr) -> Iterator[str]:
    match value:
        case ast.Attribute(value=ast.Name(id="SpanKind"), attr=name):
            yield name.lower()
