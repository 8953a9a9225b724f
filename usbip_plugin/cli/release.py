"""The release of a device by a person: what it would break, and the one write that does it. The rest is pure."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime, timedelta

from usbip_plugin.cli.devices import LockedDevice, last_sign, stamp
from usbip_plugin.cli.explain import Facts, PodStatus, ServerSays, ago
from usbip_plugin.config.schema import IMPORT_WINDOW_S
from usbip_plugin.errors import KubeConflict, KubeForbidden, KubeNotFound, ReleaseRefused
from usbip_plugin.locks.protocol import Replace, Write, decide_release
from usbip_plugin.locks.record import BY_HAND, LeaseStore
from usbip_plugin.model import NodeIdentity


@dataclass(frozen=True, slots=True)
class Plan:
    """The consequences of a release.

    sentences: what the release would do, for people.
    refusal: why the release is not done without --force, "" if it is.
    """

    sentences: tuple[str, ...]
    refusal: str


def plan(facts: Facts) -> Plan:
    """Returns the consequences of releasing a device, which must have a holder."""
    return Plan(tuple(_sentences(facts)), _refusal(facts))


def _sentences(facts: Facts) -> Iterator[str]:
    assert facts.known is not None  # noqa: S101 - it is held
    lock = facts.known.lock
    since = f" since {stamp(lock.acquired_at)}" if lock.acquired_at is not None else ""
    yield f"{facts.device} is held by node {lock.holder}{since}."
    sign = last_sign(facts.known)
    heard = ago(facts.now, sign) if sign is not None else "never"
    if facts.silent:
        yield f"The node is silent (last sign: {heard}); other nodes may take the device over without this command."
    else:
        yield f"The node lives (last sign: {heard}): it detaches the device as soon as it sees the empty lock."
    pod = lock.pod
    if pod is not None and facts.pod in (PodStatus.GONE, PodStatus.ENDED):
        yield f"Its pod {pod} is {facts.pod.value}."
    elif pod is not None:
        yield f"Its pod {pod} loses the device while it runs; open files answer with errors."
    else:
        yield "The lock names no pod: the device is being allocated, or its pod is not known yet."


def _refusal(facts: Facts) -> str:
    """Returns why the device is or may be attached, "" if it is not.

    The device is certainly not attached only if its server lists it as free and its lock was not written just now.
    """
    assert facts.known is not None  # noqa: S101 - it is held
    port = facts.known.lock.port
    where = f"the lock names vhci port {port} of node {facts.holder}" if port is not None else "the lock names no port"
    match facts.server.says:
        case ServerSays.LISTED:
            return "its lock was written a moment ago: an import may be under way" if _fresh(facts) else ""
        case ServerSays.UNLISTED:
            return f"it is attached: its server does not list it as free, and {where}"
        case _:
            cause = facts.server.error or "its server is not known"
            return f"it may be attached: {where}, and its server cannot be asked from here ({cause})"


def _fresh(facts: Facts) -> bool:
    renewed = facts.known.lease.renew_time if facts.known is not None else None
    return renewed is not None and facts.now - renewed < timedelta(seconds=IMPORT_WINDOW_S)


async def release(store: LeaseStore, known: LockedDevice, now: datetime) -> None:
    """Empties the lock, if it still has the version that was shown. Keeps the record, its epoch included.

    The write is a compare-and-swap on the resourceVersion that was shown. Raises ReleaseRefused if the lock has no
    holder, if it has changed since then, or if an admission policy refuses the write. Raises KubeError if the write
    fails otherwise.
    """
    if not known.lease.holder:
        raise ReleaseRefused(f"{known.lock.device_id} is not held")
    write = Write(NodeIdentity(known.lease.holder, ""), now, BY_HAND, float(known.lease.duration_seconds or 0))
    decision = decide_release(known.lease, write)
    assert isinstance(decision, Replace)  # noqa: S101 - it is decided in the holder's own name
    try:
        await store.replace(decision.lease)
    except (KubeConflict, KubeNotFound) as error:
        text = f"the lock of {known.device or known.lock.device_id} has changed since it was shown; nothing was written"
        raise ReleaseRefused(text + ", look again") from error
    except KubeForbidden as error:
        if not error.by_policy:
            raise
        cure = "run this with a kubeconfig of your own instead of the plugin's ServiceAccount"
        raise ReleaseRefused(f"a plugin may empty its own node's locks only; {cure}") from error
