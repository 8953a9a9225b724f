"""CDI specs (Container Device Interface 0.6.0): device paths the runtime resolves anew at each container start."""

from __future__ import annotations

import json
import os
import re
import tempfile
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

from usbip_plugin.kubelet.device_plugin import DeviceSpec
from usbip_plugin.model import DeviceNode

CDI_VERSION = "0.6.0"
CDI_DIRECTORY = Path("/var/run/cdi")
_NOT_IN_CLASS = re.compile(r"[^A-Za-z0-9_-]")


def kind(domain: str, resource: str) -> str:
    """vendor/class for a short resource name. A class begins with a letter and has no dots."""
    class_ = _NOT_IN_CLASS.sub("-", resource).strip("-_")
    return f"{domain}/{class_}" if class_[:1].isalpha() else f"{domain}/r{class_}"


def device_name(domain: str, resource: str, device_id: str) -> str:
    """The fully qualified CDI name for ContainerResponse.cdi_devices."""
    return f"{kind(domain, resource)}={device_id}"


def spec(
    domain: str,
    resource: str,
    device_id: str,
    nodes: Iterable[tuple[DeviceSpec, DeviceNode | None]],
    envs: Mapping[str, str],
) -> dict[str, Any]:
    """The spec for one device. A DeviceSpec with its DeviceNode carries type and numbers, without one (an extra) the
    runtime reads them from the host path."""
    edits: dict[str, Any] = {"deviceNodes": [_node(spec_, node) for spec_, node in nodes]}
    if envs:
        edits["env"] = [f"{name}={value}" for name, value in sorted(envs.items())]
    return {
        "cdiVersion": CDI_VERSION,
        "kind": kind(domain, resource),
        "devices": [{"name": device_id, "containerEdits": edits}],
    }


def _node(device: DeviceSpec, node: DeviceNode | None) -> dict[str, Any]:
    entry: dict[str, Any] = {
        "path": device.container_path,
        "hostPath": device.host_path,
        "permissions": device.permissions,
    }
    if node is not None:
        entry |= {"type": "b" if node.block else "c", "major": node.major, "minor": node.minor}
    return entry


class CdiDirectory:
    """The specs of one domain in a CDI directory: one file per resource and device; files of others are left alone.

    Every method may raise OSError; none blocks longer than a small local file takes.
    """

    def __init__(self, path: Path, domain: str) -> None:
        self.path = path
        self.domain = domain

    def file(self, resource: str, device_id: str) -> Path:
        return self.path / f"{kind(self.domain, resource).replace('/', '-')}-{device_id}.json"

    def write(self, resource: str, device_id: str, content: Mapping[str, Any]) -> None:
        """Atomic: a runtime that looks meanwhile reads the old spec or the new one. Makes the directory."""
        self.path.mkdir(mode=0o755, parents=True, exist_ok=True)
        # Runtimes read *.json and *.yaml only, so a leftover of a crash is never taken for a spec.
        handle, temporary = tempfile.mkstemp(prefix=f".{self.domain}-", suffix=".tmp", dir=self.path)
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as out:
                json.dump(content, out, indent=1, sort_keys=True)
                os.fchmod(out.fileno(), 0o644)
            Path(temporary).replace(self.file(resource, device_id))
        except OSError:
            Path(temporary).unlink(missing_ok=True)
            raise

    def remove(self, resource: str, device_id: str) -> None:
        """No error if it is not there."""
        self.file(resource, device_id).unlink(missing_ok=True)

    def sweep(self, keep: Collection[tuple[str, str]]) -> tuple[Path, ...]:
        """Removes this domain's specs, and leftovers of a crash, except those of the (resource, device ID) in keep.

        Returns what was removed.
        """
        kept = {self.file(resource, device_id) for resource, device_id in keep}
        ours = [*self.path.glob(f"{self.domain}-*-usbip-*.json"), *self.path.glob(f".{self.domain}-*.tmp")]
        removed = tuple(sorted(path for path in ours if path not in kept))
        for path in removed:
            path.unlink(missing_ok=True)
        return removed
