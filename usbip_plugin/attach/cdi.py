"""CDI specs: their contents, their files, and their update when a claim's device nodes change."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import tempfile
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from usbip_plugin.attach.containers import DeviceSpec, Injected, injected
from usbip_plugin.claims import Claim, Resources
from usbip_plugin.config.schema import NodePermissions, ResourceConfig
from usbip_plugin.errors import CdiError
from usbip_plugin.model import Attachment, DeviceNode

log = logging.getLogger(__name__)

CDI_VERSION = "0.6.0"
"""Version of the CDI specification that the specs follow: the first with annotations."""
FORMAT_VERSION = "1"
"""Version of what a spec contains for the plugin itself, in its annotations. A spec without it has this version."""
MAX_SPEC_CHARACTERS = 1 << 20
"""Maximum number of characters read from a spec file. A longer file counts as not written by this plugin."""
_NOT_IN_CLASS = re.compile(r"[^A-Za-z0-9_-]")
_RESOURCE = "resource"
_FORMAT = "format"


@dataclass(frozen=True, slots=True)
class HandedOut:
    """What a CDI spec shows about the Allocate for which it was written. resource: its name without the domain.

    container_indexes: the numbers by which containers know the device, sorted; see device_name().
    """

    resource: str
    container_indexes: tuple[int, ...]


def kind(domain: str, resource: str) -> str:
    """Returns the CDI kind (vendor/class) for a short resource name. A class begins with a letter and has no dots."""
    class_ = _NOT_IN_CLASS.sub("-", resource).strip("-_")
    return f"{domain}/{class_}" if class_[:1].isalpha() else f"{domain}/r{class_}"


def device_name(domain: str, resource: str, device_id: str, number: int) -> str:
    """Returns the fully qualified CDI name of a device, for ContainerResponse.cdi_devices.

    number: which of a container's devices it is. The number may differ between the containers of one pod.
    """
    return f"{kind(domain, resource)}={device_id}-{number}"


def file_name(domain: str, resource: str, device_id: str) -> str:
    """Returns the file name of a spec. Each resource and device has one file."""
    return f"{kind(domain, resource).replace('/', '-')}-{device_id}.json"


def spec(domain: str, resource: str, device_id: str, containers: Mapping[int, Injected]) -> str:
    """Returns the CDI spec of one device as JSON, with a CDI device for each number by which containers know it."""
    document = {
        "cdiVersion": CDI_VERSION,
        "kind": kind(domain, resource),
        "annotations": {f"{domain}/{_RESOURCE}": resource, f"{domain}/{_FORMAT}": FORMAT_VERSION},
        "devices": [
            {"name": f"{device_id}-{number}", "containerEdits": _edits(injected)}
            for number, injected in sorted(containers.items())
        ],
    }
    return json.dumps(document, indent=1, sort_keys=True)


def _edits(injected: Injected) -> dict[str, Any]:
    edits: dict[str, Any] = {"deviceNodes": [_node(spec_, node, injected.owner) for spec_, node in injected.nodes]}
    if injected.envs:
        edits["env"] = [f"{name}={value}" for name, value in sorted(injected.envs.items())]
    return edits


def _node(device: DeviceSpec, node: DeviceNode, owner: NodePermissions) -> dict[str, Any]:
    owned = {"fileMode": owner.mode, "uid": owner.user, "gid": owner.group}
    return {
        "path": device.container_path,
        "hostPath": device.host_path,
        "permissions": device.permissions,
        "type": "b" if node.block else "c",
        "major": node.major,
        "minor": node.minor,
        **{name: value for name, value in owned.items() if value is not None},
    }


def read_spec(domain: str, device_id: str, text: str) -> HandedOut | None:
    """Returns what a text that spec() made for this device contains, or None for any other text."""
    try:
        document = json.loads(text)
        resource = document["annotations"][f"{domain}/{_RESOURCE}"]
        names = [device["name"] for device in document["devices"]]
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    number = re.compile(re.escape(device_id) + "-(0|[1-9][0-9]{0,5})")
    found = [number.fullmatch(name) if isinstance(name, str) else None for name in names]
    numbers = sorted({int(one[1]) for one in found if one is not None})
    if not isinstance(resource, str) or document.get("kind") != kind(domain, resource) or not numbers:
        return None
    return HandedOut(resource, tuple(numbers))


def names_nodes(text: str, nodes: Sequence[DeviceNode]) -> bool:
    """Returns whether each CDI device of a spec has the first of these nodes, and no node that is not one of them."""
    known = {(node.path, node.major, node.minor) for node in nodes}
    try:
        edits = [device["containerEdits"]["deviceNodes"] for device in json.loads(text)["devices"]]
        named = [{(one["hostPath"], one["major"], one["minor"]) for one in edit} for edit in edits]
    except (ValueError, KeyError, TypeError, RecursionError):
        return False
    usb = (nodes[0].path, nodes[0].major, nodes[0].minor)
    return bool(named) and all(usb in found and found <= known for found in named)


class SpecFiles(Protocol):
    """The CDI spec files of one domain: one for each resource and device. All other files are left alone.

    write and remove raise OSError.
    """

    def file(self, resource: str, device_id: str) -> Path:
        """Returns where the spec is, or would be."""
        ...

    def read(self, resource: str, device_id: str) -> str | None:
        """Returns the text of a spec, or None if there is none or it cannot be read."""
        ...

    def find(self, device_id: str) -> tuple[str, ...]:
        """Returns the texts of a device's specs, whatever the resource, the one written last first."""
        ...

    def write(self, resource: str, device_id: str, text: str) -> None:
        """Writes a spec atomically. A runtime reads the old spec or the new one, also meanwhile and after a failure."""
        ...

    def remove(self, device_id: str) -> None:
        """Removes a device's specs, whatever the resource. It is not an error if there is none."""
        ...

    def sweep(self, keep: Collection[str]) -> tuple[Path, ...]:
        """Removes specs, except those of the device IDs in keep, and leftovers of a crash. Returns what was removed."""
        ...


class CdiDirectory:
    """SpecFiles in a directory that the container runtime reads. Makes the directory with the first spec if needed."""

    def __init__(self, path: Path, domain: str) -> None:
        self.path = path
        self.domain = domain

    def file(self, resource: str, device_id: str) -> Path:
        return self.path / file_name(self.domain, resource, device_id)

    def read(self, resource: str, device_id: str) -> str | None:
        return _read(self.file(resource, device_id))

    def find(self, device_id: str) -> tuple[str, ...]:
        found = []
        for path in self._of(device_id):
            with contextlib.suppress(OSError):
                if (text := _read(path)) is not None:
                    found.append((path.stat().st_mtime_ns, text))
        return tuple(text for _, text in sorted(found, reverse=True))

    def write(self, resource: str, device_id: str, text: str) -> None:
        self.path.mkdir(mode=0o755, parents=True, exist_ok=True)
        # Runtimes read *.json and *.yaml only, so a leftover of a crash is never taken for a spec.
        handle, temporary = tempfile.mkstemp(prefix=f".{self.domain}-", suffix=".tmp", dir=self.path)
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as out:
                out.write(text)
                os.fchmod(out.fileno(), 0o644)
            Path(temporary).replace(self.file(resource, device_id))
        except OSError:
            with contextlib.suppress(OSError):
                Path(temporary).unlink(missing_ok=True)
            raise

    def remove(self, device_id: str) -> None:
        for path in self._of(device_id):
            path.unlink(missing_ok=True)

    def _of(self, device_id: str) -> list[Path]:
        return list(self.path.glob(f"{self.domain}-*-{device_id}.json"))

    def sweep(self, keep: Collection[str]) -> tuple[Path, ...]:
        kept = {path for device_id in keep for path in self._of(device_id)}
        ours = [*self.path.glob(f"{self.domain}-*-usbip-*.json"), *self.path.glob(f".{self.domain}-*.tmp")]
        removed = []
        for path in sorted(path for path in ours if path not in kept):
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)
                removed.append(path)
        return tuple(removed)


def _read(path: Path) -> str | None:
    try:
        # O_NONBLOCK: a pipe in the file's place must not hang the plugin
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        with os.fdopen(handle, encoding="utf-8", errors="replace") as file:
            return file.read(MAX_SPEC_CHARACTERS)
    except OSError:
        return None


class CdiSpecs:
    """The CDI specs of one node's claims, which outlive the process. Synchronous, as the files are small and local."""

    def __init__(self, files: SpecFiles, domain: str, resources: Resources) -> None:
        self._files = files
        self._domain = domain
        self._resources = resources

    def write(self, claim: Claim, attachment: Attachment) -> None:
        """Makes the claim's spec name the nodes of the attachment. Does nothing for a claim not handed out by CDI.

        Raises CdiError if the spec cannot be written; the old spec stays.
        """
        if not claim.container_indexes or claim.resource is None:
            return
        resource = self._resources.resource_named(claim.resource)
        if resource is None:
            # the resource left the configuration, and the plugin restarted: the spec stays while it is up to date
            if self._is_up_to_date(claim, attachment):
                return
            resource = ResourceConfig(claim.resource, (), cdi=True)
        containers = {number: injected(resource, number, attachment) for number in claim.container_indexes}
        text = spec(self._domain, claim.resource, claim.id, containers)
        if self._files.read(claim.resource, claim.id) == text:
            return
        try:
            self._files.write(claim.resource, claim.id, text)
        except OSError as error:
            raise CdiError("write", str(self._files.file(claim.resource, claim.id)), error) from error

    def _is_up_to_date(self, claim: Claim, attachment: Attachment) -> bool:
        text = self._files.read(str(claim.resource), claim.id)
        known = read_spec(self._domain, claim.id, text) if text is not None else None
        return (
            text is not None
            and known is not None
            and known.container_indexes == claim.container_indexes
            and names_nodes(text, attachment.nodes)
        )

    def remove(self, claim: Claim) -> None:
        """Removes the specs of a claim whose pod is gone. Logs a failure: the spec stays until the next start then."""
        if not claim.container_indexes or claim.resource is None:
            return
        try:
            self._files.remove(claim.id)
        except OSError as error:
            problem = CdiError("remove", str(self._files.file(claim.resource, claim.id)), error)
            log.warning("could not remove CDI spec", extra={"device": str(claim.key), "cause": str(problem)})

    def recall(self, device_id: str, resource: str | None) -> HandedOut | None:
        """Returns how a previous process handed out this device by CDI, or None if it did not.

        resource: limits the search to specs of this resource; None for any.
        """
        for text in self._files.find(device_id):
            found = read_spec(self._domain, device_id, text)
            if found is not None and resource in (None, found.resource):
                return found
        return None

    def sweep(self, keep: Collection[str]) -> None:
        """Removes the specs of all devices except these IDs. To be called once all devices of this node are known."""
        removed = self._files.sweep(keep)
        if removed:
            log.info("unused CDI specs removed", extra={"files": [str(path) for path in removed]})
