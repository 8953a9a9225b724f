"""The Node objects of a simulated cluster, as far as their status.allocatable goes."""

from __future__ import annotations

from collections.abc import Mapping
from contextvars import Context
from typing import Any

from usbip_plugin.clock import Clock
from usbip_plugin.kube.node_status import NODES_STATUS
from usbip_sim.leases import FINE, Faults, Operation, carry

PATCH = "patch"
"""The verb under which a fate is asked for."""


class NodeObject:
    """One Node in the API server. Its kubelet and its plugin both write to it; the last one wins."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.allocatable: dict[str, int] = {}
        """By full resource name."""
        self.overtaken = False
        """What it says may be of a patch that arrived after its sender had given it up, and perhaps sent another."""

    def write(self, counts: Mapping[str, int], *, overtaken: bool = False) -> None:
        """Lays these counts over what is there."""
        self.allocatable.update(counts)
        self.overtaken = self.overtaken or overtaken

    def sync(self, counts: Mapping[str, int]) -> None:
        """The kubelet writes what it counts of all resources."""
        self.write(counts)
        self.overtaken = False


class NodeConnection:
    """A plugin's connection to the API server, for its Node's status. A PatchApi; faults decide each call's fate."""

    def __init__(self, node: NodeObject, clock: Clock, faults: Faults) -> None:
        self._node, self._clock, self._faults = node, clock, faults
        self._network = Context()
        self.hindered = 0
        """Calls under way whose fate is any other than to be carried out and answered at once."""
        self._gone = False

    def gone(self) -> None:
        """The process is dead: nobody waits for its calls any more."""
        self._gone = True

    async def request(
        self,
        verb: str,
        path: str,
        *,
        resource: str,
        body: Any = None,
        content_type: str = "application/json",
        timeout: float,
    ) -> dict[str, Any]:
        """Takes a merge patch of status.allocatable; anything else is a ValueError. Raises KubeError."""
        expected = (PATCH, f"/api/v1/nodes/{self._node.name}/status", NODES_STATUS, "application/merge-patch+json")
        if (verb, path, resource, content_type) != expected or body.keys() != {"status"} or timeout <= 0:
            raise ValueError(f"not a patch of the status of {self._node.name}: {verb} {path} {resource} {body}")
        counts = {name: int(count) for name, count in body["status"]["allocatable"].items()}
        fate = self._faults(Operation(self._node.name, verb, self._node.name))
        hindered, given_up = int(fate is not FINE), False

        def arrive() -> None:
            self._node.write(counts, overtaken=given_up or self._gone)

        self.hindered += hindered
        try:
            await carry(verb, resource, arrive, fate, self._clock, self._network)
        finally:
            self.hindered -= hindered
            given_up = True
        return {}
