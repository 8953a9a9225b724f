"""The modules that `run` loads, so that a new release of a library does not add others unnoticed."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import zipfile
from pathlib import Path
from zipimport import zipimporter

import pytest

from tests.rigs.kubeconfig import kubeconfig
from usbip_plugin.kube import lazy_imports

RUN = """
import sys
from usbip_plugin.cli.main import main
assert main(["run", "--node-name", "n", "--config", "/nonexistent"]) == 2
import usbip_plugin.node.daemon
print(*sys.modules)
"""
FENCE = """
import asyncio, json, pathlib, sys, tempfile
from usbip_plugin.cli.main import main
from usbip_plugin.clock import SystemClock
from usbip_plugin.config.export import parse_export
import usbip_plugin.exporter.daemon
from usbip_plugin.exporter.fence import make_gate

async def make():
    with tempfile.TemporaryDirectory() as directory:
        file = pathlib.Path(directory, "kubeconfig")
        file.write_text(sys.argv[1])
        config = parse_export("export: []\\nfence: true\\nnames: [pi]").config
        gate = await make_gate(config, port=3240, kubeconfig=str(file), namespace="n", clock=SystemClock())
        await gate._close()

asyncio.run(make())
print(*sys.modules)
from kubernetes_asyncio.client import ApiClient
assert ApiClient.call_api
"""
UNTOUCHED = """
import sys
from usbip_plugin.cli.main import main
main(["run", "--node-name", "n", "--config", "/nonexistent"])
import usbip_plugin.node.daemon
from usbip_plugin.kube import lazy_imports
print(*(name for name in lazy_imports.LAZY if type(sys.modules[name]).__name__ == "_LazyModule"))
"""
USED_LATER = """
from usbip_plugin.kube import lazy_imports
lazy_imports.make_imports_lazy()
import attr, bz2, idna
from google.protobuf.internal import python_message
print(idna.encode("bücher").decode(), python_message.GeneratedProtocolMessageType.__name__)
print(bz2.decompress(bz2.compress(b"squeezed")).decode(), attr.validators.in_([1]).options)
"""
NAMES = """
import sys, types
{narrow}
import {package}
print(*sorted({package}.__all__))
for name in sorted(sys.argv[1:]):
    value = getattr({package}, name)
    kind = value.__name__ if isinstance(value, types.ModuleType) else type(value)
    print(name, kind, getattr(value, "__qualname__", ""))
"""
LIBRARIES = frozenset(
    {
        "aiohappyeyeballs",
        "aiohttp",
        "aiosignal",
        "asyncinotify",
        "attr",
        "frozenlist",
        "google",
        "grpc",
        "idna",
        "kubernetes_asyncio",
        "multidict",
        "opentelemetry",
        "prometheus_client",
        "propcache",
        "six",
        "tenacity",
        "typing_extensions",
        "urllib3",
        "yaml",
        "yarl",
    }
)
"""The dependencies in pyproject.toml and those that they need."""
# urllib3 looks into the namespace `backports`, in which twine has a package
NOT_INSTALLED_WITH_IT = (
    "__editable__",
    "_distutils_hack",
    "_virtualenv",
    "cython",
    "_cython",
    "grpc_tools",
    "backports",
)


def _python(code: str, *arguments: str) -> str:
    return subprocess.run([sys.executable, "-c", code, *arguments], check=True, capture_output=True, text=True).stdout


@pytest.mark.parametrize(
    "unused",
    [
        "aiohttp.test_utils",
        "aiohttp.web_app",
        "argcomplete",
        "certifi",
        "dateutil",
        "difflib",
        "doctest",
        "google.api",
        "google.protobuf.json_format",
        "google.protobuf.text_format",
        "google.rpc",
        "grpc.beta",
        "grpc.experimental",
        "http.server",
        "idna.core",
        "importlib.metadata",
        "importlib.resources",
        "jinja2",
        "kubernetes_asyncio.client.api",
        "kubernetes_asyncio.client.api_client",
        "kubernetes_asyncio.client.models",
        "kubernetes_asyncio.config.kube_config",
        "kubernetes_asyncio.dynamic",
        "kubernetes_asyncio.watch",
        "markupsafe",
        "msgspec",
        "multiprocessing",
        "opentelemetry._logs",
        "opentelemetry.exporter",
        "opentelemetry.proto",
        "opentelemetry.sdk._logs",
        "opentelemetry.sdk.metrics",
        "prometheus_client.bridge",
        "prometheus_client.exposition",
        "prometheus_client.openmetrics",
        "pydoc",
        "sqlite3",
        "unittest",
        "urllib3.connection",
        "usbip_plugin.observe.otlp",
        "usbip_plugin.observe.page",
        "usbip_sim",
        "wsgiref",
        "xml",
    ],
)
def test_a_run_does_not_load_unused_modules(unused: str, modules_of_a_run: frozenset[str]) -> None:
    assert unused not in modules_of_a_run


def test_a_run_loads_only_the_libraries_that_it_needs(modules_of_a_run: frozenset[str]) -> None:
    packages = {name.partition(".")[0] for name in modules_of_a_run} - sys.stdlib_module_names
    others = {name for name in packages if not name.startswith(NOT_INSTALLED_WITH_IT)}
    assert others - LIBRARIES == {"usbip_plugin", "__main__"}


@pytest.mark.parametrize(
    "unused",
    ["dateutil", "decimal", "grpc", "kubernetes_asyncio.client.api_client", "multiprocessing", "opentelemetry"],
)
def test_a_fenced_exporter_does_not_load_unused_modules(unused: str, modules_of_a_fence: frozenset[str]) -> None:
    assert "kubernetes_asyncio.config.kube_config" in modules_of_a_fence
    assert unused not in modules_of_a_fence


def test_lazy_modules_are_imported_and_not_loaded_by_a_run() -> None:
    assert _python(UNTOUCHED).split() == list(lazy_imports.LAZY)


def test_lazy_modules_work_when_they_are_used() -> None:
    first, second = _python(USED_LATER).splitlines()
    assert first.split() == ["xn--bcher-kva", "GeneratedProtocolMessageType"]
    assert second == "squeezed (1,)"


def test_a_lazy_package_has_the_names_of_a_normal_one() -> None:
    spec = importlib.util.find_spec("prometheus_client")
    assert spec is not None
    assert spec.origin is not None
    names = lazy_imports.origins(Path(spec.origin).read_text(encoding="utf-8"), "prometheus_client")
    assert {"Counter", "generate_latest", "exposition", "REGISTRY"} <= names.keys()
    whole, narrow = (
        _python(NAMES.format(package="prometheus_client", narrow=line), *names).splitlines()
        for line in ("", "from usbip_plugin.kube import lazy_imports; lazy_imports.make_imports_lazy()")
    )
    assert len(whole) == len(names) + 1
    assert whole == narrow


@pytest.fixture(scope="module")
def modules_of_a_run() -> frozenset[str]:
    return frozenset(_python(RUN).split())


def test_a_package_without_a_file_of_its_own_is_imported_as_usual(tmp_path: Path) -> None:
    """As in a program that PyInstaller made, or in a zip file."""
    archive = tmp_path / "packed.zip"
    with zipfile.ZipFile(archive, "w") as packed:
        packed.writestr("packed/__init__.py", "from math import pi\n")
    finder = lazy_imports._Finder(frozenset({"packed"}))

    def loader(where: Path) -> type:
        spec = finder.find_spec("packed", [str(where)])
        assert spec is not None
        return type(spec.loader)

    assert loader(archive) is zipimporter
    (tmp_path / "packed").mkdir()
    (tmp_path / "packed/__init__.py").touch()
    assert loader(tmp_path) is lazy_imports._LazyPackage


@pytest.fixture(scope="module")
def modules_of_a_fence() -> frozenset[str]:
    return frozenset(_python(FENCE, kubeconfig("https://192.0.2.1:6443")).splitlines()[0].split())
