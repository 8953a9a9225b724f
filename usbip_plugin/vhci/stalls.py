"""Which ports to leave alone for a while.

A device that is detached before it had an address leaves its hub's worker in the kernel waiting for an answer that
never comes (hub_port_init, initial_descriptor_timeout: 5 s). Meanwhile nothing else enumerates on either root hub of
that controller, which share one address0_mutex, and a device attached to the very same port may stay in status 005 for
good. Other controllers are not affected.
"""

from __future__ import annotations

from usbip_plugin.clock import Clock
from usbip_plugin.vhci.sysfs import Port

STALL_S = 6.0
SAME_PORT, SAME_CONTROLLER = 2, 1


class Stalls:
    """Remembers detachments in status 005, per process: a successor finds out by one AttachStuck."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._ports: dict[int, float] = {}
        self._controllers: dict[int, float] = {}

    def mark(self, port: Port) -> None:
        """The port has just been freed before its device had enumerated."""
        until = self._clock.monotonic() + STALL_S
        self._ports[port.number] = self._controllers[port.controller] = until

    def penalty(self, port: Port) -> int:
        """0 for a port that is as good as any; the higher, the less it should be chosen."""
        now = self._clock.monotonic()
        if now < self._ports.get(port.number, now):
            return SAME_PORT
        return SAME_CONTROLLER if now < self._controllers.get(port.controller, now) else 0
