"""The release of a device by a person: the impact, which is pure, and the one write that does it."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import datetime, timedelta

from usbip_plugin.cli.explain import DeviceDetails, Listing, PodStatus
from usbip_plugin.cli.tables import ago, stamp
from usbip_plugin.config.schema import IMPORT_WINDOW_S
from usbip_plugin.errors import KubeConflict, KubeForbidden, KubeNotFound, ReleaseRefused
from usbip_plugin.locks.locked_devices import LockedDevice, last_sign
from usbip_plugin.locks.protocol import released_by_person
from usbip_plugin.locks.record import LeaseStore


def impact(details: DeviceDetails, known: LockedDevice) -> Iterator[str]:
    """Yields what a release of the device would do, in sentences. known: its lock, which must have a holder."""
    lock, sign = known.lock, last_sign(known)
    since = f" (since {stamp(lock.acquired_at)})" if lock.acquired_at is not None else ""
    yield f"{details.device} is held by node {lock.holder}{since}."
    heartbeat = f"(last heartbeat: {ago(details.now, sign) if sign is not None else 'never'})"
    if details.silent:
        yield f"The node is silent {heartbeat}; other nodes can take over the device without this command."
    else:
        yield f"The node is alive {heartbeat}: it detaches the device as soon as it sees the empty lock."
    if lock.pod is None:
        yield "The lock does not name a pod: the device is being allocated, or its pod is not known yet."
        yield "Wait a few seconds until it does: otherwise that pod takes the device again after the next one."
    elif details.pod in (PodStatus.GONE, PodStatus.ENDED):
        yield f"Its pod {lock.pod} {details.pod.value}."
    else:
        yield f"Its pod {lock.pod} loses the device while it is running; open device files return errors."
        yield "It does not get the device back."


def refusal(details: DeviceDetails, known: LockedDevice) -> str:
    """Returns why a release needs --force: the device may be attached. Returns "" if it does not need it.

    The device is certainly not attached only if its server lists it as available and its lock was not written just now.
    """
    port = known.lock.port
    where = (
        f"the lock names vhci port {port} of node {details.holder}" if port is not None else "the lock names no port"
    )
    match details.server.listing:
        case Listing.LISTED:
            renewed = known.lease.renew_time
            fresh = renewed is not None and details.now - renewed < timedelta(seconds=IMPORT_WINDOW_S)
            if fresh:
                return "its lock was written a moment ago, so an import may be in progress"
            listed = details.device.rpartition("/")[2] in details.listed_in_use
            return f"it may be attached: its server lists it, but node {details.holder} is alive" if listed else ""
        case Listing.UNLISTED:
            return f"it may be attached: its server does not list it as available, and {where}"
        case _:
            cause = details.server.error or "its server is not known"
            return f"it may be attached: {where}, and its server cannot be queried from here ({cause})"


async def release(store: LeaseStore, known: LockedDevice, now: datetime) -> None:
    """Empties the lock by compare-and-swap on the resourceVersion that was shown. Keeps its record and epoch.

    Raises ReleaseRefused if the lock has no holder or has changed since then, or if an admission policy refuses the
    write. Raises KubeError if the write fails otherwise.
    """
    if not known.lease.holder:
        raise ReleaseRefused(f"{known.lock.device_id} has no holder")
    try:
        await store.replace(released_by_person(known.lease, now).lease)
    except (KubeConflict, KubeNotFound) as error:
        name = known.device or known.lock.device_id
        text = f"the lock of {name} has changed since it was shown; nothing was written; run the command again"
        raise ReleaseRefused(text) from error
    except KubeForbidden as error:
        if not error.by_policy:
            raise
        cure = "use your own kubeconfig instead of the plugin's ServiceAccount"
        raise ReleaseRefused(f"a plugin can release only the locks of its own node; {cure}") from error
