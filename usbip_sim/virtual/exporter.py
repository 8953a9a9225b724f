"""The exporter of a simulated cluster: a USB/IP server whose fence reads the cluster's Leases."""

from __future__ import annotations

import random

from usbip_plugin.clock import Clock
from usbip_plugin.config.export import WhenApiIsAway
from usbip_plugin.errors import KubeUnreachable
from usbip_plugin.exporter.fence import LeaseGate
from usbip_sim.leases import RESOURCE, Fate, Lost, MemoryLeases, Operation
from usbip_sim.server.server import VirtualServer
from usbip_sim.virtual.loop import SimClock
from usbip_sim.virtual.steploop import Process, loop_of
from usbip_sim.virtual.surroundings import Surroundings


class Exporter:
    """The process of an exporter, which decides who gets the devices of its VirtualServer.

    The connections to the server outlive the process, as those in a kernel do.
    """

    def __init__(self, server: VirtualServer, cluster: Surroundings, when_away: WhenApiIsAway) -> None:
        self.server = server
        self.name = f"exporter on {server.key.host}"
        self._cluster, self._when_away = cluster, when_away
        self._clock: Clock = SimClock(loop_of())
        self._process: Process | None = None
        self._leases: MemoryLeases | None = None
        self._starts = 0
        self._cut = self._silent = False

    def restart(self) -> None:
        """Starts the process, and kills the one before."""
        if self._process is not None:
            self._process.kill()
        self._starts += 1
        process = self._process = Process(loop_of(), f"{self.name} {self._starts}")
        rng = random.Random(f"{self._cluster.seed}/{self.name}/{self._starts}")  # noqa: S311 - to be repeated
        leases = self._leases = MemoryLeases(self._cluster.backend, self._clock, self.name, self._fate)
        process.on_death(leases.process_died)
        if self._silent:
            leases.stall()
        gate = LeaseGate(leases, lambda key: key == self.server.key, self._when_away, self._clock, rng)
        self.server.use_gate(gate)
        process.create_task(gate.run(), "fence")

    def partition(self, *, cut: bool) -> None:
        """Refuses the connections to the API server, or ends that."""
        self._cut = cut
        if cut and self._leases is not None:
            self._leases.cut()

    def silence(self, *, silent: bool) -> None:
        """Loses requests to the API server and the events of its watch, or ends that."""
        self._silent = silent
        if self._leases is not None:
            if silent:
                self._leases.stall()
            else:
                self._leases.resume()

    def _fate(self, operation: Operation) -> Fate:
        if self._cut:
            return Fate(refused=KubeUnreachable(operation.verb, RESOURCE, "connection refused"))
        if self._silent and operation.verb != "event":
            return Fate(lost=Lost.REQUEST)
        return self._cluster.spec.faults(self.name, operation)
