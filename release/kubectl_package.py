"""Writes the source tree of kubectl-usbip, the command line for people: python release/kubectl_package.py DIRECTORY

The tree has the modules of usbip_plugin that the command line imports, as a package of its own, kubectl_usbip. So it
can be installed beside usbip-plugin, and needs neither gRPC nor OpenTelemetry. Then: python -m build DIRECTORY
"""

from __future__ import annotations

import argparse
import ast
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SOURCE, PACKAGE = "usbip_plugin", "kubectl_usbip"
ENTRIES = (f"{SOURCE}.cli.main", f"{SOURCE}.cli.completion")
"""The modules of the entry points."""
MAIN = f'''"""`python -m {PACKAGE}`."""

import sys

from {PACKAGE}.cli.main import kubectl

sys.exit(kubectl())
'''


def modules(root: Path = ROOT) -> dict[str, Path]:
    """Returns the files of all modules that the entry points import, at any place in their code, by module name."""
    found: dict[str, Path] = {}
    left = [SOURCE, *ENTRIES]
    while left:
        name = left.pop()
        file = _file(root, name)
        if name in found or file is None:
            continue
        found[name] = file
        left += _imported(ast.parse(file.read_text(encoding="utf-8")))
        left += [name.rpartition(".")[0]] if "." in name else []
    return found


def _file(root: Path, name: str) -> Path | None:
    path = root / name.replace(".", "/")
    return next((file for file in (path / "__init__.py", path.with_suffix(".py")) if file.is_file()), None)


def _imported(tree: ast.Module) -> Iterator[str]:
    """Yields the names in usbip_plugin that a module imports, except for the checking of types."""
    left: list[ast.AST] = [tree]
    while left:
        node = left.pop()
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            left += node.orelse
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.startswith(SOURCE))
        elif isinstance(node, ast.ImportFrom) and node.module and node.module.startswith(SOURCE):
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        left += ast.iter_child_nodes(node)


def write(directory: Path, root: Path = ROOT) -> None:
    """Writes the tree into the directory, which must be missing or empty. Raises FileExistsError otherwise."""
    if directory.exists() and any(directory.iterdir()):
        raise FileExistsError(f"{directory}: must be empty")
    for file in modules(root).values():
        target = directory / PACKAGE / file.relative_to(root / SOURCE)
        target.parent.mkdir(parents=True, exist_ok=True)
        text = re.sub(rf"\b{SOURCE}\b", PACKAGE, file.read_text(encoding="utf-8"))
        target.write_text(text, encoding="utf-8", newline="\n")
    (directory / PACKAGE / "__main__.py").write_text(MAIN, encoding="utf-8", newline="\n")
    (directory / PACKAGE / "py.typed").touch()
    shutil.copy(root / "LICENSE", directory)
    for file in (root / "packaging/kubectl-usbip").iterdir():
        shutil.copy(file, directory)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0].partition(":")[0])
    parser.add_argument("directory", type=Path, metavar="DIRECTORY", help="new or empty")
    try:
        write(parser.parse_args().directory)
    except OSError as error:
        sys.stderr.write(f"kubectl_package.py: {error}\n")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
