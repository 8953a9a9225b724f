"""Imports parts of libraries without the rest: all of kubernetes_asyncio is 1,259 modules and 58 MiB.

make_imports_lazy() makes the package __init__ files of PACKAGES lazy. A name that such a file imports is then imported
on first use (PEP 562), from the module that the file's import lines name. The modules of LAZY, which others import but
which a run does not call, are loaded on first use.
"""

from __future__ import annotations

import ast
import contextlib
import importlib
import importlib.util
import os
import sys
from collections.abc import Iterator, Sequence
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from importlib.abc import Loader, MetaPathFinder
else:  # the classes below inherit nothing; in Python 3.11 importlib.abc imports importlib.resources, tempfile and more
    Loader = MetaPathFinder = object


PACKAGES = (
    "kubernetes_asyncio",
    "prometheus_client",  # its exposition module alone imports http.server, wsgiref and urllib.request, 1 MiB
)
LAZY = (
    "attr.converters",  # imported for aiohttp, which defines one class with attr; 0.3 MiB with the next two
    "attr.filters",
    "attr.validators",
    "bz2",  # imported by shutil, for archives; 0.2 MiB with lzma
    "google.protobuf.internal.python_message",  # used only without protobuf's C extension; 11 modules, 0.7 MiB
    "idna",  # imported by yarl, for host names that are not ASCII; 0.2 MiB
    "lzma",
    "urllib3",  # imported by kubernetes_asyncio, for one function
)


def origins(source: str, package: str) -> dict[str, tuple[str, str | None]]:
    """Returns the names that a package file binds by importing: name -> (module, attribute, None for the module)."""
    found: dict[str, tuple[str, str | None]] = {}
    for node in ast.parse(source).body:
        if isinstance(node, ast.ImportFrom) and node.module != "__future__":
            base = package.rsplit(".", node.level - 1)[0] if node.level else ""
            module = ".".join(part for part in (base, node.module) if part)
            for alias in node.names:  # "from . import" names submodules of the package
                submodule = (f"{module}.{alias.name}", None)
                found[alias.asname or alias.name] = submodule if module == package else (module, alias.name)
        elif isinstance(node, ast.Import):
            found.update({alias.asname: (alias.name, None) for alias in node.names if alias.asname})
    return found


def origin(attribute: str, source: str, package: str) -> tuple[str, str | None] | None:
    """Returns one entry of origins(), or None if there is none.

    Parses only the lines that may hold the entry, if that suffices: Python keeps the 2 MiB that a whole tree takes.
    """
    lines = [line for line in source.splitlines() if line.startswith(("from ", "import ")) and attribute in line]
    try:
        found = origins("\n".join(lines), package).get(attribute)
    except SyntaxError:  # a statement over several lines
        found = None
    return found or origins(source, package).get(attribute)


def constants(source: str) -> dict[str, Any]:
    """Returns the names that a package file binds to literals, and their values: __version__, __all__ and so on."""
    found: dict[str, Any] = {}
    for node in ast.parse(source).body:
        if isinstance(node, ast.Assign) and len(node.targets) == 1 and isinstance(node.targets[0], ast.Name):
            try:
                found[node.targets[0].id] = ast.literal_eval(node.value)
            except ValueError:
                continue
    return found


class _LazyPackage(Loader):
    """Loader that gives a package a __getattr__ instead of running its __init__ file."""

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        """Returns None: the module object is made as for any other module."""

    def exec_module(self, module: ModuleType) -> None:
        name, file = module.__name__, str(module.__file__)

        def getattr_(attribute: str) -> Any:
            source = Path(file).read_text(encoding="utf-8")
            value: Any
            if found := origin(attribute, source, name):
                value = importlib.import_module(found[0])
                if found[1] is not None:
                    value = getattr(value, found[1])
            elif attribute in (literals := constants(source)):
                value = literals[attribute]
            else:
                msg = f"module {name!r} has no attribute {attribute!r}"
                raise AttributeError(msg)
            setattr(module, attribute, value)
            return value

        module.__dict__["__getattr__"] = getattr_


class _Finder(MetaPathFinder):
    def __init__(self, packages: frozenset[str]) -> None:
        self._packages = packages

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        lazy = fullname in LAZY
        if not lazy and fullname.partition(".")[0] not in self._packages:
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None and lazy and spec.loader is not None:
            spec.loader = importlib.util.LazyLoader(spec.loader)
        elif spec is not None and spec.submodule_search_locations is not None and _has_source(spec):
            spec.loader = _LazyPackage()
        return spec


def _has_source(spec: ModuleSpec) -> bool:
    """Returns whether the package's file can be read. A program that is packed into one file may have none."""
    return spec.origin is not None and Path(spec.origin).is_file()


def make_imports_lazy() -> None:
    """Makes later imports lazy. Does not change packages that are imported already; a second call does nothing."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder(frozenset(PACKAGES) - sys.modules.keys()))


@contextlib.contextmanager
def placeholder(package: str, name: str) -> Iterator[None]:
    """Gives a lazy package an empty class of this name within the block, unless the real one is imported already.

    For the import of a module that imports the name and needs it only in functions that are not called here.
    """
    module = importlib.import_module(package)
    if name in vars(module):
        yield
        return
    setattr(module, name, type(name, (), {}))
    try:
        yield
    finally:
        delattr(module, name)


@contextlib.contextmanager
def no_default_roots() -> Iterator[None]:
    """Keeps OpenSSL from finding root certificates by itself within the block.

    On its first import aiohttp makes a TLS context with all of them, 2 MiB and 50 ms, for requests that name no
    context. Here each request names its own: RESTClientObject makes it from the configuration's CA or the system's.
    """
    before = {name: os.environ.get(name) for name in ("SSL_CERT_FILE", "SSL_CERT_DIR")}
    os.environ.update(dict.fromkeys(before, os.devnull))
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
