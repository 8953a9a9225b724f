"""What must be so of the Nodes in the API server: each says how many devices its kubelet was told of.

A scheduler believes the Node. What is said there is written by the plugin at once, and by the kubelet every 10 s.
"""

from __future__ import annotations

import math

from tests.simulation.lasting import Lasting, Violation
from usbip_plugin.errors import LockHeld, PluginError
from usbip_plugin.kube.fleet import UNCOUNTED
from usbip_plugin.kube.node_status import KUBELET_SYNC_S, spread
from usbip_plugin.locks.protocol import LockStatus
from usbip_sim.virtual.cluster_kubelet import Call
from usbip_sim.virtual.cluster_node import ClusterNode
from usbip_sim.virtual.steploop import Process

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
        """Where a process knows what its Node says of a resource, because that has said what the kubelet was told; with
        how often the kubelet had hung up until then. It knows nothing of it any more when that hangs up again."""
        self._counted: dict[Process, float] = {}
        """Since when (loop seconds) a process knows how many nodes there are."""
        self._hindered: dict[Process, float] = {}
        """When (loop seconds) a process could not write to its Node the last time that was looked at."""

    def answered(self, node: ClusterNode, call: Call, error: BaseException | None) -> tuple[str, str] | None:
        """Returns name and detail of the promise that is broken if a plugin answers a call with this error.

        Kubelet and Node know why before an Allocate fails. Else the scheduler sends the next pod to fail, too.
        """
        resource, agent = call.resource, node.agent
        if call.name != "allocate_all" or not isinstance(error, PluginError) or agent is None:
            return None
        if not (_can_write(node) and _listens(node, resource)) or call.process.halted_time() != call.halted:
            return None  # stopped for longer than it would have waited for anybody
        if isinstance(error, LockHeld):
            ids = [lock.device_id for lock in agent.locks.locks.values() if str(lock.key) == error.device]
            # one that has expired may be offered until the server is asked for its list the next time
            held = [i for i in ids if agent.locks.lock_status(i) is LockStatus.HELD]
            if any(node.kubelet.health(resource).get(i) for i in held):
                return "a lost device is withdrawn", f"{node.name}: {error.device}"
        said, told = _said_and_told(node, resource)
        if said > told:
            return KNOWN, f"{node.name} refuses {resource}, and says {said} where its kubelet has {told}"
        return None

    def look(self, node: ClusterNode, now: float) -> None:
        """The Node says what the kubelet was told: of a resource that was taken out, that there is none. Violation."""
        agent, process, rate = node.agent, node.process, node.clock.rate
        if agent is None or process is None:
            return
        offered = self._offered.setdefault(process, set())
        offered.update(agent.resources.plugins)
        if agent.fleet is not None and agent.fleet.nodes < UNCOUNTED:
            self._counted.setdefault(process, now)
        if not _can_write(node):
            self._hindered[process] = now
        for resource in sorted(offered):
            said, told = _said_and_told(node, resource)
            if said == told and _listens(node, resource) and resource in agent.resources.plugins:
                self._agreed[process, resource] = node.pods.hang_ups
            bad = said != told and _can_write(node) and _listens(node, resource)
            seconds = STATUS_S / rate + self._turn(node, process, resource, now, lower=said > told)
            if self._lasting.for_long(bad, now, seconds, "status", node.name, resource):
                raise Violation(SAID, f"{node.name}: {resource} {said}, not {told}")

    def _turn(self, node: ClusterNode, process: Process, resource: str, now: float, *, lower: bool) -> float:
        """Seconds of the loop that a process may take until it writes a count, or leaves it to its kubelet."""
        agent, sync = node.agent, KUBELET_SYNC_S / node.clock.rate
        agreed = self._agreed.get((process, resource)) == node.pods.hang_ups
        hindered = now - self._hindered.get(process, -math.inf) < sync + STATUS_S / node.clock.rate
        if agent is None or resource not in agent.resources.plugins:
            # one that was stopped, or could not write, may have given up to say that a resource is gone
            return sync if process.halted_time() > 0 or hindered or not agreed else 0.0
        # a lower count that is taken back before it is written is not written, and the kubelet may have done so
        if not lower and hindered:
            return sync
        # a turn that was begun when the nodes were not counted is waited for
        counted = now - self._counted.get(process, math.inf) > sync
        nodes = agent.fleet.nodes if agent.fleet is not None and counted else UNCOUNTED
        return spread(nodes, lower=lower and agreed) / node.clock.rate


def _said_and_told(node: ClusterNode, resource: str) -> tuple[int, int]:
    """What the Node says of a resource, and what its kubelet was told."""
    return node.object.allocatable.get(resource, 0), node.kubelet.manager.allocatable(resource)


def _can_write(node: ClusterNode) -> bool:
    """Whether nothing keeps the plugin from writing to its Node."""
    agent, process, api = node.agent, node.process, node.status_api
    if agent is None or agent.node_status is None or process is None or process.halted or api is None:
        return False
    # a patch of before may arrive last: then only the kubelet puts it right
    hindered = node.partitioned or node.object.overtaken or api.hindered
    return not hindered and agent.node_status.last_error is None


def _listens(node: ClusterNode, resource: str) -> bool:
    """Whether the kubelet is well and has the list of a resource, or of one that was taken out has what it had."""
    agent = node.agent
    if agent is None or not agent.publisher.publishing or not node.pods.up.is_set() or node.pods.process.halted:
        return False
    plugin = agent.resources.plugins.get(resource)
    return plugin is None or (plugin.registered and node.kubelet.connected(resource))
