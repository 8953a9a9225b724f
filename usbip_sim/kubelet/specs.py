"""The CDI directory of a simulated node, and a container runtime's injection of CDI devices."""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

from usbip_plugin.attach.cdi import file_name

PLACE = Path("/var/run/cdi")


class UnresolvableDevice(Exception):
    """Error of a runtime for a container with a CDI name that no spec contains."""


@dataclass(frozen=True, slots=True)
class Resolved:
    """Edits that a runtime makes to a container for its CDI devices.

    nodes: (path on the host, major, minor) by path in the container.
    envs: environment variables.
    """

    nodes: Mapping[str, tuple[str, int, int]]
    envs: Mapping[str, str]


class MemorySpecs:
    """SpecFiles in memory.

    failing: errno with which each write and removal fails; None if they succeed.
    texts: texts of the specs by file, in the order of their last write.
    """

    def __init__(self, domain: str) -> None:
        self.domain = domain
        self.failing: int | None = None
        self.texts: dict[Path, str] = {}

    def clear(self) -> None:
        self.texts.clear()

    def file(self, resource: str, device_id: str) -> Path:
        return PLACE / file_name(self.domain, resource, device_id)

    def read(self, resource: str, device_id: str) -> str | None:
        return self.texts.get(self.file(resource, device_id))

    def find(self, device_id: str) -> tuple[str, ...]:
        return tuple(self.texts[path] for path in reversed(self._of(device_id)))

    def _of(self, device_id: str) -> list[Path]:
        return [path for path in self.texts if path.name.endswith(f"-{device_id}.json")]

    def write(self, resource: str, device_id: str, text: str) -> None:
        self._may_fail()
        path = self.file(resource, device_id)
        self.texts.pop(path, None)
        self.texts[path] = text

    def remove(self, device_id: str) -> None:
        self._may_fail()
        for path in self._of(device_id):
            del self.texts[path]

    def sweep(self, keep: Collection[str]) -> tuple[Path, ...]:
        if self.failing is not None:
            return ()
        kept = {path for device_id in keep for path in self._of(device_id)}
        removed = tuple(sorted(path for path in self.texts if path not in kept))
        for path in removed:
            del self.texts[path]
        return removed

    def _may_fail(self) -> None:
        if self.failing is not None:
            raise OSError(self.failing, os.strerror(self.failing))


def resolve(texts: Collection[str], names: Collection[str]) -> Resolved:
    """Returns the edits that a runtime makes for fully qualified CDI names. Raises UnresolvableDevice.

    texts: all specs, as JSON.
    """
    nodes: dict[str, tuple[str, int, int]] = {}
    envs: dict[str, str] = {}
    known = {
        f"{spec['kind']}={device['name']}": device["containerEdits"]
        for spec in map(json.loads, texts)
        for device in spec["devices"]
    }
    for name in names:
        if name not in known:
            raise UnresolvableDevice(f"unresolvable CDI devices {name}")
        for node in known[name]["deviceNodes"]:
            nodes[node["path"]] = (node["hostPath"], node["major"], node["minor"])
        envs.update(line.split("=", 1) for line in known[name].get("env", ()))
    return Resolved(nodes, envs)
