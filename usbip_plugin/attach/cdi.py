"""CDI specs: what they say, the files they are in, and that they are true of this node's claims."""

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

from usbip_plugin.attach.containers import DeviceSpec, Injected, NodeOwner, injected
from usbip_plugin.claims import Claim, Resources
from usbip_plugin.config.schema import ResourceConfig
from usbip_plugin.errors import CdiError
from usbip_plugin.model import Attachment, DeviceNode

log = logging.getLogger(__name__)


CDI_VERSION = "0.6.0"
MAX_SPEC_BYTES = 1 << 20
_NOT_IN_CLASS = re.compile(r"[^A-Za-z0-9_-]")
_RESOURCE = "resource"


@dataclass(frozen=True, slots=True)
class HandedOut:
    """What a spec says of the Allocate it was written for. container_indexes: sorted, see device_name."""

    resource: str
    container_indexes: tuple[int, ...]


def kind(domain: str, resource: str) -> str:
    """vendor/class for a short resource name. A class begins with a letter and has no dots."""
    class_ = _NOT_IN_CLASS.sub("-", resource).strip("-_")
    return f"{domain}/{class_}" if class_[:1].isalpha() else f"{domain}/r{class_}"


def device_name(domain: str, resource: str, device_id: str, number: int) -> str:
    """The fully qualified CDI name for ContainerResponse.cdi_devices.

    number: which of a container's devices it is. The init container and the app of one pod may count differently.
    """
    return f"{kind(domain, resource)}={device_id}-{number}"


def file_name(domain: str, resource: str, device_id: str) -> str:
    """A spec's file: one for each resource and device."""
    return f"{kind(domain, resource).replace('/', '-')}-{device_id}.json"


def spec(domain: str, resource: str, device_id: str, containers: Mapping[int, Injected]) -> str:
    """The spec for one device as JSON: a CDI device for each number its containers know it by."""
    document = {
        "cdiVersion": CDI_VERSION,
        "kind": kind(domain, resource),
        "annotations": {f"{domain}/{_RESOURCE}": resource},
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


def _node(device: DeviceSpec, node: DeviceNode, owner: NodeOwner) -> dict[str, Any]:
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
    """What spec() was told, None for a text that it did not make for this device."""
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
    """Whether each device of a spec has the first of these nodes, and none that is not among them."""
    known = {(node.path, node.major, node.minor) for node in nodes}
    try:
        edits = [device["containerEdits"]["deviceNodes"] for device in json.loads(text)["devices"]]
        named = [{(one["hostPath"], one["major"], one["minor"]) for one in edit} for edit in edits]
    except (ValueError, KeyError, TypeError, RecursionError):
        return False
    usb = (nodes[0].path, nodes[0].major, nodes[0].minor)
    return bool(named) and all(usb in found and found <= known for found in named)


class SpecFiles(Protocol):
    """The specs of one domain: one file for each resource and device. Files of others are left alone.

    write and remove raise OSError. None waits longer than a small local file takes.
    """

    def file(self, resource: str, device_id: str) -> Path:
        """Where it is, or would be."""
        ...

    def read(self, resource: str, device_id: str) -> str | None:
        """None also for one that cannot be read."""
        ...

    def find(self, device_id: str) -> tuple[str, ...]:
        """The specs of a device, whatever its resource, the one written last first."""
        ...

    def write(self, resource: str, device_id: str, text: str) -> None:
        """Atomic: a runtime that looks meanwhile reads the old spec or the new one; so does one after a failure."""
        ...

    def remove(self, device_id: str) -> None:
        """The specs of a device, whatever its resource. No error if there is none."""
        ...

    def sweep(self, keep: Collection[str]) -> tuple[Path, ...]:
        """Removes specs, and leftovers of a crash, except those of the device IDs in keep; what was removed.

        One that cannot be removed stays.
        """
        ...


class CdiDirectory:
    """SpecFiles in a directory that the container runtime reads. Made with the first spec, if it is not there."""

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
            return file.read(MAX_SPEC_BYTES)
    except OSError:
        return None


class CdiSpecs:
    """The specs of one node, which outlive the process. Synchronous: small local files."""

    def __init__(self, files: SpecFiles, domain: str, resources: Resources) -> None:
        self._files = files
        self._domain = domain
        self._resources = resources

    def write(self, claim: Claim, attachment: Attachment) -> None:
        """After this the claim's spec names the nodes of the attachment. Nothing for a claim not handed out by CDI.

        CdiError: then the spec is as it was.
        """
        if not claim.container_indexes or claim.resource is None:
            return
        resource = self._resources.resource_named(claim.resource)
        if resource is None:
            # taken out of the configuration, and the plugin started anew: what the pod was given stays while it is true
            if self._still_true(claim, attachment):
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

    def _still_true(self, claim: Claim, attachment: Attachment) -> bool:
        text = self._files.read(str(claim.resource), claim.id)
        known = read_spec(self._domain, claim.id, text) if text is not None else None
        return (
            text is not None
            and known is not None
            and known.container_indexes == claim.container_indexes
            and names_nodes(text, attachment.nodes)
        )

    def remove(self, claim: Claim) -> None:
        """Its pod is gone. A spec that cannot be removed is told of, and stays until the next start."""
        if not claim.container_indexes or claim.resource is None:
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
