"""Invariants of the Nodes in the API server: each has the counts of devices that its kubelet has.

The scheduler reads the Node. The plugin writes its counts at once, and the kubelet every 10 s.
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
"""Limit in seconds of a wrong count on a Node, beyond the turn that its plugin waits for."""


KNOWN = "the Node knows before an Allocate fails"
SAID = "the Node says what its kubelet was told"


class NodeStatuses:
    """Checks the Nodes of a cluster."""

    def __init__(self, lasting: Lasting) -> None:
        self._lasting = lasting
        self._offered: dict[Process, set[str]] = {}
        """Full names of the resources that each process has offered."""
        self._agreed: dict[tuple[Process, str], int] = {}
        """Number of the kubelet's hang-ups when the Node last had the kubelet's count, by process and resource. After
        another hang-up the process does not know what the Node has."""
        self._counted: dict[Process, float] = {}
        """Time (loop seconds) from which a process knows the number of nodes."""
        self._hindered: dict[Process, float] = {}
        """Time (loop seconds) of the last check at which a process could not write to its Node."""

    def answered(self, node: ClusterNode, call: Call, error: BaseException | None) -> tuple[str, str] | None:
        """Returns name and detail of the promise that a plugin breaks with this answer to a call, or None.

        Before an Allocate fails, kubelet and Node must have the new counts. Else the scheduler sends the next pod, too.
        """
        resource, agent = call.resource, node.agent
        if call.name != "allocate_all" or not isinstance(error, PluginError) or agent is None:
            return None
        if not (_can_write(node) and _listens(node, resource)) or call.process.halted_time() != call.halted:
            return None  # the process was frozen for longer than its limits
        if isinstance(error, LockHeld):
            ids = [lock.device_id for lock in agent.locks.locks.values() if str(lock.key) == error.device]
            # an expired lock's device may be offered until the next poll of its server
            held = [i for i in ids if agent.locks.lock_status(i) is LockStatus.HELD]
            if any(node.kubelet.health(resource).get(i) for i in held):
                return "a lost device is withdrawn", f"{node.name}: {error.device}"
        on_node, by_kubelet = _counts(node, resource)
        if on_node > by_kubelet:
            return KNOWN, f"{node.name} refuses {resource}, has {on_node} on its Node and {by_kubelet} in its kubelet"
        return None

    def look(self, node: ClusterNode, now: float) -> None:
        """Checks that the Node has the kubelet's counts, and 0 for a removed resource. Raises Violation."""
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
            on_node, by_kubelet = _counts(node, resource)
            if on_node == by_kubelet and _listens(node, resource) and resource in agent.resources.plugins:
                self._agreed[process, resource] = node.pods.hang_ups
            bad = on_node != by_kubelet and _can_write(node) and _listens(node, resource)
            seconds = STATUS_S / rate + self._turn(node, process, resource, now, lower=on_node > by_kubelet)
            # another count begins its own time: in between, for less than LOOK_S, the Node may have had the right one
            if self._lasting.for_long(bad, now, seconds, "status", node.name, resource, by_kubelet):
                raise Violation(SAID, f"{node.name}: {resource} {on_node}, not {by_kubelet}")

    def _turn(self, node: ClusterNode, process: Process, resource: str, now: float, *, lower: bool) -> float:
        """Returns the loop seconds that a process may take before it writes a count, or leaves it to its kubelet."""
        agent, sync = node.agent, KUBELET_SYNC_S / node.clock.rate
        agreed = self._agreed.get((process, resource)) == node.pods.hang_ups
        hindered = now - self._hindered.get(process, -math.inf) < sync + STATUS_S / node.clock.rate
        if agent is None or resource not in agent.resources.plugins:
            # a process that was frozen or could not write may have given up on a removed resource
            return sync if process.halted_time() > 0 or hindered or not agreed else 0.0
        # a lower count that is revoked before its turn is not written, but the kubelet may have written it
        if not lower and hindered:
            return sync
        # a turn that began before the nodes were counted goes on
        counted = now - self._counted.get(process, math.inf) > sync
        nodes = agent.fleet.nodes if agent.fleet is not None and counted else UNCOUNTED
        return spread(nodes, lower=lower and agreed) / node.clock.rate


def _counts(node: ClusterNode, resource: str) -> tuple[int, int]:
    """Returns a resource's count on the Node and in its kubelet."""
    return node.object.allocatable.get(resource, 0), node.kubelet.manager.allocatable(resource)


def _can_write(node: ClusterNode) -> bool:
    """Returns whether the plugin is not ending, and no fault keeps it from writing to its Node."""
    agent, process, api = node.agent, node.process, node.status_api
    if agent is None or agent.node_status is None or process is None or process.halted or api is None:
        return False
    # an older patch may arrive last; only the kubelet corrects it
    hindered = node.ending or node.partitioned or node.object.overtaken or api.hindered
    return not hindered and agent.node_status.last_error is None


def _listens(node: ClusterNode, resource: str) -> bool:
    """Returns whether the kubelet works and gets the lists of a resource, unless that was removed."""
    agent = node.agent
    if agent is None or not agent.publisher.publishing or not node.pods.up.is_set() or node.pods.process.halted:
        return False
    plugin = agent.resources.plugins.get(resource)
    return plugin is None or (plugin.registered and node.kubelet.connected(resource))
