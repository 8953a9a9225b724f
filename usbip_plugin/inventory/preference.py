"""Which devices a node reaches for first: the answer to GetPreferredAllocation."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterable, Mapping

from usbip_plugin.errors import UnknownDevice
from usbip_plugin.model import Health, Reason


def preferred(
    available: Iterable[str],
    must: Iterable[str],
    size: int,
    node: str,
    health_by_id: Mapping[str, Health],
    unwanted: Collection[str] = (),
) -> tuple[str, ...]:
    """GetPreferredAllocation: the must-haves, then attached here, then healthy, in rendezvous order of (node, device).

    Different nodes thus reach for different devices first, and contend less; which servers they come from does not
    matter. unwanted: those that an Allocate would refuse, they come last. The answer has size devices, or all there
    are. UnknownDevice for must-haves that are not available, or more than size: the kubelet then fails the pod.
    """
    chosen, offered = list(dict.fromkeys(must)), set(available)
    if not offered.issuperset(chosen):
        raise UnknownDevice(
            f"the kubelet wants {', '.join(sorted({*chosen} - offered))} out of devices it is not among"
        )
    room = max(0, size) - len(chosen)
    if room < 0:
        raise UnknownDevice(f"the kubelet wants {size} devices and {len(chosen)} of them in any case")

    def order(device_id: str) -> tuple[int, bytes]:
        known = health_by_id.get(device_id)
        rank = 2 if known is None or not known.healthy or device_id in unwanted else 1
        if rank == 1 and known is not None and known.reason is Reason.ATTACHED:
            rank = 0
        return rank, hashlib.sha256(f"{node}/{device_id}".encode()).digest()

    rest = sorted(offered.difference(chosen), key=order)
    return tuple(chosen + rest[:room])
