"""The objects that kustomize and Helm render from deploy/, by name."""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
CHART = DEPLOY / "helm" / "usbip-plugin"
NAMESPACE = "usbip-system"
KUBERNETES = "1.37"
"""Version for which `helm template` renders without a cluster."""
RENDER_S = 60.0

VARIANTS = ("base", "evict", "exporter", "kind", "modules", "monitoring", "openshift", "tracing")
"""Variants, each with a directory for kustomize, and default values or ci/NAME-values.yaml for Helm."""

Object = dict[str, Any]
Objects = dict[tuple[str, str, str, str], Object]
"""Objects by apiVersion, kind, namespace and name."""


def find_tool(name: str, group: str) -> Path:
    """Returns a tool on PATH or in the cache, or raises LookupError. group: of tests/lab/cluster/build.sh."""
    found = shutil.which(name)
    if found:
        return Path(found)
    built = _cache() / "bin" / name
    if os.access(built, os.X_OK):
        return built
    msg = f"{name} is neither on PATH nor at {built}; install it, or build it: tests/lab/cluster/build.sh {group}"
    raise LookupError(msg)


def find_crd(name: str) -> Path:
    """Returns a resource definition of the Prometheus operator or OpenShift, or raises LookupError."""
    file = _cache() / "crds" / f"{name}.yaml"
    if not file.exists():
        msg = f"{file} is missing; fetch it: tests/lab/cluster/build.sh promtool"
        raise LookupError(msg)
    return file


def _cache() -> Path:
    return Path(os.environ.get("USBIP_PLUGIN_CACHE") or Path.home() / ".cache" / "usbip-plugin") / "k8s"


def kustomize_directory(variant: str) -> Path:
    return DEPLOY if variant == "base" else DEPLOY / "overlays" / variant


def chart_values(variant: str) -> tuple[str, ...]:
    return () if variant == "base" else ("--values", str(CHART / "ci" / f"{variant}-values.yaml"))


class Tools:
    """kubectl and helm. Rendered objects are cached, so tests must not change them."""

    def __init__(self, kubectl: Path, helm: Path) -> None:
        self.kubectl = kubectl
        self._helm = helm
        self.kustomize, self.chart = functools.cache(self._kustomize), functools.cache(self._chart)

    def _kustomize(self, directory: Path | str) -> Objects:
        return by_name(run([self.kubectl, "kustomize", directory]).stdout)

    def helm(self, *arguments: str, namespace: str = NAMESPACE) -> subprocess.CompletedProcess[str]:
        """Runs `helm template`, which may fail."""
        command = ("template", "usbip-plugin", CHART, "--namespace", namespace, "--kube-version", KUBERNETES)
        return run([self._helm, *command, *arguments], check=False)

    def _chart(self, *arguments: str, namespace: str = NAMESPACE) -> Objects:
        done = self.helm(*arguments, namespace=namespace)
        assert done.returncode == 0, done.stderr
        return by_name(done.stdout)

    def everything(self) -> Iterator[tuple[str, Object]]:
        """Yields every object of every variant by kustomize and Helm, with a description."""
        for variant in VARIANTS:
            for way, objects in (
                ("kustomize", self.kustomize(kustomize_directory(variant))),
                ("helm", self.chart(*chart_values(variant))),
            ):
                for (_, kind, _, name), found in objects.items():
                    yield f"{way} {variant}: {kind} {name}", found


def run(
    command: Sequence[str | Path], *, check: bool = True, stdin: str | None = None, timeout: float = RENDER_S
) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=timeout, input=stdin)
    if check:
        assert done.returncode == 0, f"{' '.join(map(str, command))}:\n{done.stdout}{done.stderr}"
    return done


def by_name(text: str) -> Objects:
    """Returns the objects of a stream of YAML documents. Asserts that no name occurs twice."""
    found: Objects = {}
    for document in yaml.safe_load_all(text):
        if document is None:
            continue
        meta = document["metadata"]
        key = (document["apiVersion"], document["kind"], meta.get("namespace", ""), meta["name"])
        assert key not in found, f"{key} comes twice"
        found[key] = document
    return found


def pod_template(found: Object) -> Object | None:
    """Returns the pod template of a DaemonSet or Deployment, None for other objects."""
    template: Object | None = found.get("spec", {}).get("template")
    return template


def containers(found: Object) -> Iterator[Object]:
    """Yields the containers of a pod template, init containers first."""
    template = pod_template(found)
    if template is not None:
        yield from template["spec"].get("initContainers", ())
        yield from template["spec"]["containers"]
