"""Keeps the CDI specs of this node's claims true. A claim is handed out by CDI if it has numbers."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection

from usbip_plugin.claims import Claim
from usbip_plugin.config.schema import ResourceConfig
from usbip_plugin.containers import injected
from usbip_plugin.errors import CdiError
from usbip_plugin.kubelet.cdi import HandedOut, SpecFiles, names_nodes, read_spec, spec
from usbip_plugin.model import Attachment

log = logging.getLogger(__name__)


class CdiSpecs:
    """The specs of one node, which outlive the process. Synchronous: small local files.

    resource_of(name) gives a resource's configuration by its name without the domain, None if it has none any more.
    """

    def __init__(self, files: SpecFiles, domain: str, resource_of: Callable[[str], ResourceConfig | None]) -> None:
        self._files = files
        self._domain = domain
        self._resource_of = resource_of

    def write(self, claim: Claim, attachment: Attachment) -> None:
        """After this the claim's spec names the nodes of the attachment. Nothing for a claim not handed out by CDI.

        CdiError: then the spec is as it was.
        """
        if not claim.numbers or claim.resource is None:
            return
        resource = self._resource_of(claim.resource)
        if resource is None:
            # taken out of the configuration, and the plugin started anew: what the pod was given stays while it is true
            if self._still_true(claim, attachment):
                return
            resource = ResourceConfig(claim.resource, (), cdi=True)
        containers = {number: injected(resource, number, attachment) for number in claim.numbers}
        text = spec(self._domain, claim.resource, claim.id, containers)
        if self._files.read(claim.resource, claim.id) == text:
            return
        try:
            self._files.write(claim.resource, claim.id, text)
        except OSError as error:
            raise CdiError("write", str(self._files.file(claim.resource, claim.id)), error) from error

    def _still_true(self, claim: Claim, attachment: Attachment) -> bool:
        text = self._files.read(str(claim.resource), claim.id)
        known = read_spec(self._domain, claim.id, text) if text is not None else None
        return (
            text is not None
            and known is not None
            and known.numbers == claim.numbers
            and names_nodes(text, attachment.nodes)
        )

    def remove(self, claim: Claim) -> None:
        """Its pod is gone. A spec that cannot be removed is told of, and stays until the next start."""
        if not claim.numbers or claim.resource is None:
            return
        try:
            self._files.remove(claim.id)
        except OSError as error:
            problem = CdiError("remove", str(self._files.file(claim.resource, claim.id)), error)
            log.warning("spec left behind", extra={"device": str(claim.key), "cause": str(problem)})

    def recall(self, device_id: str, resource: str | None) -> HandedOut | None:
        """What a previous process had handed out by CDI; as this resource, where that is known."""
        for text in self._files.find(device_id):
            found = read_spec(self._domain, device_id, text)
            if found is not None and resource in (None, found.resource):
                return found
        return None

    def sweep(self, keep: Collection[str]) -> None:
        """Removes the specs of all but these devices. To be called when all that is this node's is known."""
        removed = self._files.sweep(keep)
        if removed:
            log.info("removed CDI specs that nobody uses", extra={"files": [str(path) for path in removed]})
