"""Where the lost device of a claim may be, and which of the devices there may be asked if it is the one."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from usbip_plugin.claims import Claim
from usbip_plugin.config.schema import Config, Selector
from usbip_plugin.config.selectors import Match, matches
from usbip_plugin.model import Descriptor, DeviceKey, Identity, ServerKey


def places(config: Config, claims: Iterable[Claim]) -> frozenset[ServerKey]:
    """Where these claims' devices may be: their own servers, and those where a serial number may be looked for."""
    found = set()
    for claim in claims:
        found.add(claim.key.server)
        for resource in config.resources:
            if claim.serial and claim.resource in (resource.name, None):
                found.update(selector.target for selector in resource.devices)
    return frozenset(found)


def may_be(config: Config, claim: Claim, key: DeviceKey, descriptor: Descriptor) -> bool:
    """Whether a listed device may be asked if it is the lost one of this claim: if the configuration names it there.

    On the claim's own server that is whatever some resource would offer; on another, what the claim's resource selects
    by this very serial number. Its class is left out: it may not be listed yet.
    """
    told = Identity(serial=claim.serial)

    def names(resource: str, selector: Selector) -> bool:
        here = key.server == claim.key.server
        return here or (claim.resource in (None, resource) and selector.serial == claim.serial)

    return claim.serial is not None and any(
        device.target == key.server
        and names(resource.name, device.selector)
        and matches(replace(device.selector, class_=None), descriptor, told) is Match.YES
        for resource in config.resources
        for device in resource.devices
    )
