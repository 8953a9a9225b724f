"""The plugin's process on a node, observed by its pages, /proc and connections."""

from __future__ import annotations

import asyncio
import json
import re
import socket
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tests.e2e.cluster import PLUGIN_NAMESPACE
from tests.e2e.kubectl import Kubectl
from tests.e2e.nodes import PLUGIN, Nodes

PORT = 13240
SERVER = "usbip-e2e-server"
SERVER_PORT = 3240
ESTABLISHED = "01"
POLL_S = 2.0
LOOK_S = 0.5
LIMIT_S = 30.0
MIB = 2**20
_TASKS = re.compile(r"^usbip_device_plugin_tasks (\S+)$", re.MULTILINE)
_POLLS = re.compile(r"^usbip_device_plugin_pod_resources_polls_total (\S+)$", re.MULTILINE)
_ATTACHED = re.compile(r"^usbip_device_plugin_attached_devices\{[^}]*\} (\S+)$", re.MULTILINE)
# A poll of the server is a connection of some milliseconds, so it is in only one of the tables.
_TWO_TABLES = "cat /proc/net/tcp; echo --; sleep 0.3; cat /proc/net/tcp"
# cgroup v1 has a tree for the memory controller, v2 one tree for all
_LOOK = """
set -e
awk '$1 == "Threads:" {print "threads", $2} $1 == "RssAnon:" {print "anon", $2 * 1024}' "/proc/$1/status"
echo fds $(ls "/proc/$1/fd" | wc -l)
group=$(sed -n 's/^[0-9]*:memory://p' "/proc/$1/cgroup")
if [ -n "$group" ]; then
  cd "/sys/fs/cgroup/memory$group"
  echo current $(cat memory.usage_in_bytes); echo peak $(cat memory.max_usage_in_bytes)
  echo limit $(cat memory.limit_in_bytes)
  awk '$1 == "total_inactive_file" {print "inactive", $2}' memory.stat
else
  cd "/sys/fs/cgroup$(sed -n 's/^0:://p' "/proc/$1/cgroup")"
  echo current $(cat memory.current); echo peak $(cat memory.peak || echo 0); echo limit $(cat memory.max)
  awk '$1 == "inactive_file" {print "inactive", $2}' memory.stat
fi
"""


class Pages:
    """The plugin's HTTP pages on a node."""

    def __init__(self, address: str) -> None:
        self._base = f"http://{address}:{PORT}"
        self._opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))

    async def get(self, path: str) -> str:
        """Returns the text of a page. Raises OSError without an answer within LIMIT_S."""

        def request() -> str:
            with self._opener.open(self._base + path, timeout=LIMIT_S) as answer:
                text: str = answer.read().decode()
            return text

        return await asyncio.to_thread(request)

    async def devices(self) -> list[dict[str, Any]]:
        rows: list[dict[str, Any]] = json.loads(await self.get("/api/devices"))["devices"]
        return rows

    async def attached(self) -> int:
        """Returns the number of attached devices of all resources."""
        return int(sum(float(count) for count in _ATTACHED.findall(await self.get("/metrics"))))

    async def polls(self) -> int:
        """Returns how often the plugin has polled the kubelet's pod-resources."""
        (count,) = _POLLS.findall(await self.get("/metrics"))
        return int(float(count))

    async def until_polls(self, count: int) -> None:
        """Waits for this number of polls. Raises TimeoutError after LIMIT_S without a poll."""
        polls = -1
        while polls < count:
            async with asyncio.timeout(LIMIT_S):
                before = polls
                while polls == before:
                    polls = await self.polls()
                    await asyncio.sleep(LOOK_S)  # a page has no event

    async def tasks(self) -> int:
        (count,) = _TASKS.findall(await self.get("/metrics"))
        return int(float(count))


@dataclass(frozen=True)
class Usage:
    """Resources of a plugin's process and cgroup. Memory is in MiB.

    anon: memory of the process without pages of files.
    working_set: of the cgroup, as the kubelet counts it.
    peak: the most of the cgroup ever, page cache included.
    """

    pid: int
    fds: int
    threads: int
    tasks: int
    anon: float
    working_set: float
    peak: float
    limit: float


def addresses(kubectl: Kubectl) -> dict[str, str]:
    return {
        node["metadata"]["name"]: one["address"]
        for node in kubectl.items("nodes")
        for one in node["status"]["addresses"]
        if one["type"] == "InternalIP"
    }


async def usage(nodes: Nodes, node: str, pages: Pages) -> Usage:
    """Returns the usage of the only plugin on the node. Raises ValueError if there is none, or several."""
    tasks = await pages.tasks()
    (pid,) = await asyncio.to_thread(nodes.pids, node, PLUGIN)
    output = await asyncio.to_thread(nodes.run, node, "sh", "-c", _LOOK, "sh", str(pid))
    found = {name: int(number) for name, number in (line.split() for line in output.splitlines())}
    return Usage(
        pid=pid,
        fds=found["fds"],
        threads=found["threads"],
        tasks=tasks,
        anon=found["anon"] / MIB,
        working_set=(found["current"] - found["inactive"]) / MIB,
        peak=found["peak"] / MIB,
        limit=found["limit"] / MIB,
    )


async def imports(nodes: Nodes, node: str) -> frozenset[str]:
    """Returns the connections from the node to the USB/IP server that last, by their local address: the ports in use.

    A poll of the server is a connection of some milliseconds, so only connections in both tables count.
    """
    looks = []
    for pause in (POLL_S, 0.0):
        table = await asyncio.to_thread(nodes.run, node, "cat", "/proc/net/tcp")
        rows = [line.split() for line in table.splitlines()[1:]]
        to_server = f":{SERVER_PORT:04X}"
        looks.append({row[1] for row in rows if row[3] == ESTABLISHED and row[2].endswith(to_server)})
        await asyncio.sleep(pause)
    return frozenset(set.intersection(*looks))


def imports_at_server(kubectl: Kubectl, server_port: int = SERVER_PORT) -> Mapping[str, frozenset[str]]:
    """Returns the imports at a USB/IP server on the node of SERVER, by address of the importing node.

    An import is one connection, named by the importing node's port. Reads the connections in the server's pod.
    """
    tables = kubectl.in_container(PLUGIN_NAMESPACE, SERVER, "server", _TWO_TABLES)
    first, second = (
        {_client(row.split(), server_port) for row in table.splitlines()} for table in tables.split("--\n")
    )
    found: dict[str, set[str]] = {}
    for address, port in (first & second) - {("", "")}:
        found.setdefault(address, set()).add(port)
    return {address: frozenset(ports) for address, ports in found.items()}


def _client(row: list[str], server_port: int) -> tuple[str, str]:
    """Returns address and port of the client in a row of /proc/net/tcp, or two empty texts for other rows."""
    if len(row) < 4 or row[3] != ESTABLISHED or not row[1].endswith(f":{server_port:04X}"):
        return "", ""
    address, _, port = row[2].partition(":")
    return socket.inet_ntoa(bytes.fromhex(address)[::-1]), port
