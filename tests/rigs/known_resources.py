"""A configuration for the parts of a node that look up resources in it."""

from __future__ import annotations

from usbip_plugin.claims import Claim
from usbip_plugin.config.schema import Config, ResourceConfig


class KnownResources:
    """An implementation of `Resources` whose configuration has these resources."""

    def __init__(self, *resources: ResourceConfig) -> None:
        self.config = Config(resources)

    def resource_named(self, name: str) -> ResourceConfig | None:
        return next((resource for resource in self.config.resources if resource.name == name), None)

    def resource_of(self, claim: Claim) -> ResourceConfig:
        return self.resource_named(claim.resource or "") or ResourceConfig(claim.resource or "", ())
