"""What must be so of the Nodes in the API server: each says how many devices its kubelet was told of.

A scheduler believes the Node. What is said there is written by the plugin at once, and by the kubelet every 10 s.
"""

from __future__ import annotations

import math

from lasting import Lasting, Violation

from usbip_plugin.agent import Agent
from usbip_plugin.errors import LockHeld, PluginError
from usbip_plugin.fleet import UNCOUNTED
from usbip_plugin.inventory.annotations import key_of
from usbip_plugin.kubelet.node_status import KUBELET_SYNC_S, spread
from usbip_plugin.locks.protocol import Standing
from usbip_plugin.sim.cluster import ClusterNode
from usbip_plugin.sim.cluster_kubelet import Call
from usbip_plugin.sim.steploop import Process

STATUS_S = 2.0
"""A Node that says another number than its kubelet was told, besides the turn that its plugin waits for."""


KNOWN = "the Node knows before an Allocate fails"
SAID = "the Node says what its kubelet was told"


class NodeStatuses:
    """Looks at the Nodes of a cluster, for invariants.py."""

    def __init__(self, lasting: Lasting) -> None:
        self._lasting = lasting
        self._offered: dict[Process, set[str]] = {}
        """The resources that each process has offered so far, by their full names."""
        self._agreed: dict[tuple[Process, str], int] = {}
        """Where a process takes its turn among so many nodes as there are, with the hang-ups of its kubelet until then:
        it has counted the nodes, and its Node has said what the kubelet was told. Until then, and once the kubelet has
        hung up, that may be the first to write it."""
        self._hindered: dict[Process, float] = {}
        """When (loop seconds) a process could not write to its Node the last time that was looked at."""

    def answered(self, node: ClusterNode, call: Call, error: BaseException | None) -> tuple[str, str] | None:
        """Returns name and detail of the promise that is broken if a plugin answers a call with this error.

        Kubelet and Node know why before an Allocate fails. Else the scheduler sends the next pod to fail, too.
        """
        resource, agent = call.resource, node.agent
        if call.name != "allocate_all" or not isinstance(error, PluginError) or agent is None:
            return None
        if not _publishes(node, resource) or call.process.halted_time() != call.halted:
            return None  # stopped for longer than it would have waited for anybody
        if isinstance(error, LockHeld):
            ids = [lock.device_id for lock in agent.locks.locks.values() if str(key_of(lock)) == error.device]
            # one that has expired may be offered until the server is asked for its list the next time
            held = [i for i in ids if agent.locks.standing(i) is Standing.HELD]
            if any(node.kubelet.health(resource).get(i) for i in held):
                return "a lost device is withdrawn", f"{node.name}: {error.device}"
        said, told = _said_and_told(node, resource)
        if said > told:
            return KNOWN, f"{node.name} refuses {resource}, and says {said} where its kubelet has {told}"
        return None

    def look(self, node: ClusterNode, now: float) -> None:
        """The Node says what the kubelet was told: of a resource that was taken out, that there is none. Violation."""
        agent, process = node.agent, node.process
        if agent is None or process is None:
            return
        offered = self._offered.setdefault(process, set())
        offered.update(agent.resources.plugins)
        for resource in sorted(offered):
            said, told = _said_and_told(node, resource)
            if resource in agent.resources.plugins and not node.kubelet.connected(resource):
                self._agreed.pop((process, resource), None)
            elif said == told and resource in agent.resources.plugins and _nodes(agent) < UNCOUNTED:
                self._agreed[process, resource] = node.pods.hang_ups
            free = _publishes(node, resource)
            if not free:
                self._hindered[process] = now
            bad = said != told and free
            # a lower count that is taken back before it is written is not written, and the kubelet may have done so
            late = said < told and now - self._hindered.get(process, -math.inf) < KUBELET_SYNC_S / node.clock.rate
            turn = KUBELET_SYNC_S if late else self._turn(node, agent, process, resource, lower=said > told)
            seconds = (STATUS_S + turn) / node.clock.rate
            if self._lasting.for_long(bad, now, seconds, "status", node.name, resource):
                raise Violation(SAID, f"{node.name}: {resource} {said}, not {told}")

    def _turn(self, node: ClusterNode, agent: Agent, process: Process, resource: str, *, lower: bool) -> float:
        """Seconds that a process may take until it writes a count, or leaves it to its kubelet."""
        gone = resource not in agent.resources.plugins
        # one that was stopped may have given up to say that a resource is gone
        agreed = self._agreed.get((process, resource)) == node.pods.hang_ups
        if not agreed or (gone and process.halted_time() > 0):
            return KUBELET_SYNC_S
        return 0.0 if gone else spread(_nodes(agent), lower=lower)


def _nodes(agent: Agent) -> int:
    return agent.fleet.nodes if agent.fleet is not None else UNCOUNTED


def _said_and_told(node: ClusterNode, resource: str) -> tuple[int, int]:
    """What the Node says of a resource, and what its kubelet was told."""
    return node.object.allocatable.get(resource, 0), node.kubelet.manager.allocatable(resource)


def _publishes(node: ClusterNode, resource: str) -> bool:
    """Whether nothing keeps the plugin from having its Node say what its kubelet was told of a resource."""
    agent, process, api = node.agent, node.process, node.status_api
    if agent is None or agent.node_status is None or process is None or process.halted or api is None:
        return False
    if node.partitioned or api.hindered or agent.node_status.last_error is not None or not agent.telling.begun:
        return False
    plugin = agent.resources.plugins.get(resource)
    listens = plugin is None or (plugin.registered and node.kubelet.connected(resource))
    return listens and node.pods.up.is_set() and not node.pods.process.halted
