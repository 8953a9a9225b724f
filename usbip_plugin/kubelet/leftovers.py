"""Sockets that a plugin which was killed has left in the kubelet's directory: removed at start.

One that ends in order removes its own, and a kubelet that starts removes all. Between the two they would pile up: the
next plugin takes other names, and a resource that is not configured any more has no next plugin.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from pathlib import Path

from usbip_plugin.clock import Clock
from usbip_plugin.kubelet.directory import SocketIdentity, identify, is_stale

LOOK_AGAIN_S = 1.0
"""To the second look: a server that has bound its socket and does not yet listen looks like a dead one."""

_OURS = re.compile(r"usbip-[A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9])?\.sock")

log = logging.getLogger(__name__)


def named_by_us(name: str) -> bool:
    """Whether registration.endpoint_name may have given this name, for whatever resource."""
    return _OURS.fullmatch(name) is not None


def left_behind(then: Mapping[str, SocketIdentity], now: Mapping[str, SocketIdentity]) -> tuple[str, ...]:
    """The names to remove, of the sockets on which nobody listened then and nobody does now: the very same sockets."""
    return tuple(sorted(name for name, found in now.items() if then.get(name) == found))


def unheard(directory: Path) -> Mapping[str, SocketIdentity]:
    """By name, the sockets of our naming on which nobody listens; others are not touched. OSError of the directory."""
    ours = [path for path in directory.iterdir() if named_by_us(path.name)]
    found = {path.name: identify(path) for path in ours if is_stale(path)}
    return {name: identity for name, identity in found.items() if identity is not None}


async def sweep(directory: Path, clock: Clock) -> None:
    """Removes what was left behind, within LOOK_AGAIN_S. Never fails; what cannot be removed is told, and stays."""
    try:
        first = unheard(directory)
        if not first:
            return
        await clock.sleep(LOOK_AGAIN_S)
        for name in left_behind(first, unheard(directory)):
            (directory / name).unlink(missing_ok=True)
            log.info("removed the socket of a plugin that is gone", extra={"socket": str(directory / name)})
    except FileNotFoundError:
        return  # a kubelet that makes its directory leaves nothing in it
    except OSError as error:
        log.warning(
            "cannot remove the sockets of a plugin that is gone",
            extra={"directory": str(directory), "cause": str(error)},
        )
