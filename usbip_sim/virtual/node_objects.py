"""Node objects of a simulated cluster, reduced to their status.allocatable."""

from __future__ import annotations

from collections.abc import Mapping
from contextvars import Context

from usbip_plugin.clock import Clock
from usbip_plugin.kube.node_status import NODES_STATUS
from usbip_sim.leases import FINE, Faults, Operation, carry

PATCH = "patch"
"""Verb of the Operation with which a NodeConnection asks for a call's fate."""


class NodeObject:
    """Node object in the simulated API server. The kubelet and the plugin both write to it; the last write wins.

    allocatable: counts in status.allocatable, by full resource name.
    overtaken: whether a patch arrived after its sender had given it up, and may have overwritten a newer one.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.allocatable: dict[str, int] = {}
        self.overtaken = False

    def write(self, counts: Mapping[str, int], *, overtaken: bool = False) -> None:
        """Overwrites the given counts and keeps all others. overtaken: the sender has given the patch up."""
        self.allocatable.update(counts)
        self.overtaken = self.overtaken or overtaken

    def sync(self, counts: Mapping[str, int]) -> None:
        """Writes the kubelet's counts of all its resources and clears `overtaken`."""
        self.write(counts)
        self.overtaken = False


class NodeConnection:
    """Connection through which a plugin writes its Node's status to the simulated API server.

    faults: returns the fate of each call.
    hindered: number of calls under way that faults delay, lose or fail.
    """

    def __init__(self, node: NodeObject, clock: Clock, faults: Faults) -> None:
        self._node, self._clock, self._faults = node, clock, faults
        self._network = Context()
        self.hindered = 0
        self._dead = False

    def process_died(self) -> None:
        self._dead = True

    async def write(self, counts: Mapping[str, int]) -> None:
        fate = self._faults(Operation(self._node.name, PATCH, self._node.name))
        hindered, given_up = int(fate is not FINE), False

        def arrive() -> None:
            self._node.write(counts, overtaken=given_up or self._dead)

        self.hindered += hindered
        try:
            await carry(PATCH, NODES_STATUS, arrive, fate, self._clock, self._network)
        finally:
            self.hindered -= hindered
            given_up = True
