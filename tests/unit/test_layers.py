"""The direction of imports: each layer knows only those below it."""

from __future__ import annotations

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import usbip_plugin

ROOT = Path(usbip_plugin.__file__).parent
BOTTOM = frozenset(
    {
        "",
        "__init__",
        "model",
        "errors",
        "clock",
        "retry",
        "kube",
        "kube_answers",
        "redaction",
        "sequences",
        "spans",
        "_narrow",
    }
)
PARTS = frozenset({"usbip", "vhci", "locks", "kubelet", "observe", "config"})
TOP = frozenset({"__main__", "cli", "process", "check", "checking", "figures", "status", "sim"})
FILES = sorted(path for path in ROOT.rglob("*.py") if not path.stem.endswith(("_pb2", "_pb2_grpc")))


def layer(part: str) -> int:
    """0 bottom, 1 one of the six parts, 2 inventory, claims and their helpers, 3 agent, 4 command line and sim."""
    if part in BOTTOM:
        return 0
    if part in PARTS:
        return 1
    if part in TOP:
        return 4
    return 3 if part == "agent" else 2


def part_of(module: str) -> str:
    """usbip_plugin.vhci.sysfs is of the part vhci."""
    return module.split(".")[1] if "." in module else ""


def imported(path: Path) -> set[str]:
    """What of this project a file imports anywhere in it, as usbip_plugin.x.y: modules, and names that may be some."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: a relative import"
            found.add(node.module or "")
            found.update(f"{node.module}.{alias.name}" for alias in node.names)
    return {name for name in found if name.split(".")[0] == "usbip_plugin"}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_module_imports_only_its_own_part_and_lower_layers(path: Path) -> None:
    parts = path.relative_to(ROOT).with_suffix("").parts
    own = parts[0]
    for module in imported(path):
        other = part_of(module)
        if other == own:
            continue
        allowed = layer(other) <= layer(own) and not (layer(own) == layer(other) == 1)
        assert allowed, f"{path.relative_to(ROOT)} (layer {layer(own)}) imports {module} (layer {layer(other)})"


def test_the_rule_sees_something() -> None:
    assert len(FILES) > 15
    assert any("usbip_plugin.model" in imported(path) for path in FILES)


def test_no_module_imports_itself_by_way_of_others() -> None:
    """Where each can be read without the other; the package files, which only hand on, are left out."""
    modules = {".".join(("usbip_plugin", *path.relative_to(ROOT).with_suffix("").parts)): path for path in FILES}
    waits_for = {name: imported(path) & (modules.keys() - {name}) for name, path in modules.items()}
    try:
        TopologicalSorter(waits_for).prepare()
    except CycleError as error:
        pytest.fail(f"a circle: {' <- '.join(error.args[1])}")


def test_files_stay_small() -> None:
    lengths = sorted(len(path.read_text(encoding="utf-8").splitlines()) for path in FILES)
    assert lengths[len(lengths) // 2] < 180
