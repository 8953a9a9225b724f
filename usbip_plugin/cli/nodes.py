"""The rows of `usbip-plugin nodes` and `usbip-plugin servers`. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from usbip_plugin.cli.lookup import items, mapping
from usbip_plugin.cli.sources import NodeReading, PluginPod
from usbip_plugin.cli.survey import Survey
from usbip_plugin.cli.tables import Columns, Row
from usbip_plugin.locks.locked_devices import LockedDevice
from usbip_plugin.model import ServerKey

NODE_COLUMNS = Columns(
    table=("node", "state", "version", "module", "offered", "held", "plugin"),
    wide=("node", "state", "version", "module", "offered", "held", "plugin", "restarts", "node_ready", "problem"),
    name="node",
)
SERVER_COLUMNS = Columns(
    table=("server", "reachable", "kind", "listed", "selected", "held", "problem"),
    wide=("server", "reachable", "kind", "listed", "selected", "held", "problem"),
    name="server",
)
LINUX_PATH = "/sys/devices/"
"""Beginning of the path of each device that usbipd or `usbip-plugin export` on Linux lists."""


def node_rows(
    nodes: Sequence[NodeReading] | None,
    plugins: Sequence[PluginPod],
    known: Sequence[LockedDevice],
    pages: Mapping[str, Mapping[str, Any]],
) -> list[Row]:
    """Returns a row for each node.

    nodes: None if they could not be read; then the nodes of the plugin's pods and of the locks are known.
    pages: the /api/status of each plugin pod that answered, by pod name.
    """
    held: dict[str, int] = {}
    for one in known:
        if one.lock.holder:
            held[one.lock.holder] = held.get(one.lock.holder, 0) + 1
    pods = {pod.node: pod for pod in plugins}
    readings = {node.name: node for node in nodes or ()}
    names = sorted({*readings, *(name for name in pods if name), *held})
    return [_node_row(name, readings.get(name), pods.get(name), held.get(name, 0), pages, nodes) for name in names]


def _node_row(
    name: str,
    node: NodeReading | None,
    pod: PluginPod | None,
    held: int,
    pages: Mapping[str, Mapping[str, Any]],
    nodes: Sequence[NodeReading] | None,
) -> Row:
    page = pages.get(pod.name) if pod is not None else None
    problems = [str(line) for line in items(page.get("not_ready"))] if page is not None else []
    if node is None and nodes is not None:
        problems.append("the node does not exist; run `prune`")
    return {
        "node": name,
        "state": "no plugin" if pod is None else "ready" if pod.ready else "not ready",
        "version": (pod.version or None) if pod is not None else None,
        "module": _module(page),
        "offered": sum(node.allocatable.values()) if node is not None else None,
        "held": held,
        "plugin": pod.name if pod is not None else None,
        "restarts": pod.restarts if pod is not None else None,
        "node_ready": None if node is None else "yes" if node.ready else "no",
        "problem": "; ".join(problems) or None,
    }


def _module(page: Mapping[str, Any] | None) -> str | None:
    """Returns the state of vhci_hcd by a node's /api/status: "loaded", "missing" or "unusable"; None without a page."""
    module = mapping(page.get("driver")).get("module") if page is not None else None
    return None if module is None else str(module)


def server_rows(survey: Survey) -> list[Row]:
    """Returns a row for each server of the configuration, of the locks and of those that were asked."""
    servers = {*survey.answers, *(one.lock.key.server for one in survey.known if one.lock.key is not None)}
    if survey.config is not None:
        servers |= survey.config.servers()
    keys = survey.keys().values()
    selected: dict[ServerKey, int] = {}
    for key in keys:
        if survey.listed(key) is not None and survey.offers(key, survey.lock(key.id)):
            selected[key.server] = selected.get(key.server, 0) + 1
    return [_server_row(survey, server, selected.get(server, 0)) for server in sorted(servers)]


def _server_row(survey: Survey, server: ServerKey, selected: int) -> Row:
    answer = survey.answers.get(server)
    listed = answer.devices if answer is not None and not isinstance(answer, str) else None
    held = [one for one in survey.known if one.lock.key is not None and one.lock.key.server == server]
    in_use = survey.listed_in_use(server)
    problems = [answer] if isinstance(answer, str) else []
    if in_use:
        problems.append(f"lists devices in use: {', '.join(in_use)}")
    if answer is None:
        problems.append("not asked: the configuration does not name it")
    elif not isinstance(answer, str):
        problems += [str(problem) for problem in answer.problems]
    return {
        "server": str(server),
        "reachable": None if answer is None else "no" if isinstance(answer, str) else "yes",
        "kind": server_kind([device.path for device in listed or ()]),
        "listed": len(listed) if listed is not None else None,
        "selected": selected if listed is not None and survey.config is not None else None,
        "held": sum(1 for one in held if one.lock.holder),
        "problem": "; ".join(problems) or None,
    }


def server_kind(paths: Sequence[str]) -> str | None:
    """Returns the system of a server by the paths of its devices: "linux" or "other"; None without devices.

    The protocol does not name the program: usbipd and `usbip-plugin export` answer alike.
    """
    if not paths:
        return None
    return "linux" if all(path.startswith(LINUX_PATH) for path in paths) else "other"
