"""What the plugins cost the API server and the USB/IP servers, by the number of nodes, devices and handovers.

Pure arithmetic over the constants of the plugin. Counts are exact where nothing else is said.
"""

from __future__ import annotations

from dataclasses import dataclass

from usbip_plugin.kube.client import LIST_PAGE, WATCH_SERVER_TIMEOUT_S, WATCH_SPREAD
from usbip_plugin.kube.fleet import COUNT_INTERVAL_S
from usbip_plugin.kube.node_status import KUBELET_SYNC_S, spread
from usbip_plugin.locks.manager import DURATION_S
from usbip_plugin.locks.session import BEAT_FRACTION
from usbip_plugin.usbip.poller import POLL_INTERVAL, share

LOCK_WRITES = 4
"""Of one tenure: taken, port noted, pod noted, released."""
WRITES_BY_HOLDER = LOCK_WRITES + 1
"""Those, and the Event about the pod. Heartbeats come on top."""
WATCHES = 2
"""Of each node: the locks, the own pods."""
BOOKMARK_S = 60.0


@dataclass(frozen=True)
class Fleet:
    """nodes that run the plugin, of which holders hold something; devices that have been used at least once."""

    nodes: int
    devices: int
    holders: int
    duration: float = DURATION_S


def rest_writes(fleet: Fleet) -> float:
    """API writes per second while nothing changes hands: heartbeats, and nothing else."""
    return fleet.holders / (fleet.duration * BEAT_FRACTION)


def rest_reads(fleet: Fleet) -> float:
    """API requests per second that are not writes, on average: watches opened again, and the count of nodes."""
    reopened = (1 + WATCH_SPREAD) / 2
    watches = WATCHES / (WATCH_SERVER_TIMEOUT_S * reopened)
    return fleet.nodes * (watches + 1 / COUNT_INTERVAL_S)


def heartbeats(fleet: Fleet, seconds: float) -> tuple[int, int]:
    """The fewest and the most within so many seconds: each holder has a phase of its own."""
    beat = fleet.duration * BEAT_FRACTION
    return fleet.holders * int(seconds / beat), fleet.holders * (int(seconds / beat) + 1)


def start_requests(fleet: Fleet) -> dict[tuple[str, str], int]:
    """Of all nodes, until their watches are open."""
    pages = max(1, -(-fleet.devices // LIST_PAGE))
    return {
        ("list", "leases"): fleet.nodes * pages,
        ("watch", "leases"): fleet.nodes,
        ("list", "pods"): fleet.nodes * 2,
        ("watch", "pods"): fleet.nodes,
    }


def tenure_events(fleet: Fleet) -> int:
    """Watch events from one tenure of a device: every node sees every write of a lock."""
    return LOCK_WRITES * fleet.nodes


def bookmarks(fleet: Fleet, seconds: float) -> float:
    """Most events that come with no change: each watch has one a minute, and one when it is opened or about to end."""
    return fleet.nodes * (seconds / BOOKMARK_S + 2)


def tenure_patches(fleet: Fleet) -> int:
    """Writes of Node status from one tenure: every other node takes the device off its count and puts it on again.

    Either only while that is sooner than the kubelets do it.
    """
    ways = [lower for lower in (True, False) if spread(fleet.nodes, lower=lower) < KUBELET_SYNC_S]
    return len(ways) * (fleet.nodes - 1)


def server_polls(nodes: int) -> float:
    """DEVLIST requests per second to each server at rest, on average."""
    return nodes / max(POLL_INTERVAL, share(nodes))
