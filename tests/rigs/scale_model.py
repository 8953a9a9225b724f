"""The load of the plugins on the API server and the USB/IP servers, by the number of nodes, devices and handovers.

Arithmetic over the constants of the plugin. Counts are exact unless their function says otherwise.
"""

from __future__ import annotations

from dataclasses import dataclass

from usbip_plugin.config.schema import DEFAULT_LOCK_DURATION_S
from usbip_plugin.kube.node_status import KUBELET_SYNC_S, spread
from usbip_plugin.kube.paging import LIST_PAGE
from usbip_plugin.locks.session import BEAT_FRACTION
from usbip_plugin.usbip.poller import POLL_INTERVAL, share

LOCK_WRITES = 4
"""Writes of a lock from its acquire to its release: acquire, port, pod, release."""
WRITES_BY_HOLDER = LOCK_WRITES + 1
"""Writes of the holder from acquire to release: LOCK_WRITES and the Event on the pod, without heartbeats."""
BOOKMARK_S = 60.0


@dataclass(frozen=True)
class Fleet:
    """A cluster. holders: nodes that hold a device. devices: those that were used at least once."""

    nodes: int
    devices: int
    holders: int
    duration: float = DEFAULT_LOCK_DURATION_S


def rest_writes(fleet: Fleet) -> float:
    """Returns the API writes per second while no holder changes, which are heartbeats."""
    return fleet.holders / (fleet.duration * BEAT_FRACTION)


def heartbeats(fleet: Fleet, seconds: float) -> tuple[int, int]:
    """Returns the fewest and the most heartbeats in a time in seconds: each holder has its own phase."""
    beat = fleet.duration * BEAT_FRACTION
    return fleet.holders * int(seconds / beat), fleet.holders * (int(seconds / beat) + 1)


def start_requests(fleet: Fleet) -> dict[tuple[str, str], int]:
    """Returns the requests of all nodes until their watches are open."""
    pages = max(1, -(-fleet.devices // LIST_PAGE))
    return {
        ("list", "leases"): fleet.nodes * pages,
        ("watch", "leases"): fleet.nodes,
        ("list", "pods"): fleet.nodes * 2,
        ("watch", "pods"): fleet.nodes,
    }


def tenure_events(fleet: Fleet) -> int:
    """Returns the watch events from acquire to release of one lock: every node sees every write."""
    return LOCK_WRITES * fleet.nodes


def bookmarks(fleet: Fleet, seconds: float) -> float:
    """Returns the most bookmarks in a time in seconds: a watch has one a minute, at its begin, and at its end."""
    return fleet.nodes * (seconds / BOOKMARK_S + 2)


def tenure_patches(fleet: Fleet) -> int:
    """Returns the writes of Node status from acquire to release: every other node lowers and raises its count.

    A node leaves a write to the kubelet if the kubelet writes sooner.
    """
    ways = [lower for lower in (True, False) if spread(fleet.nodes, lower=lower) < KUBELET_SYNC_S]
    return len(ways) * (fleet.nodes - 1)


def server_polls(nodes: int) -> float:
    """Returns the average DEVLIST requests per second to each server at rest."""
    return nodes / max(POLL_INTERVAL, share(nodes))
