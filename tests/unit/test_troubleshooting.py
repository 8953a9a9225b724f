"""docs/reference/reasons.md leaves no reason out, and the links of the documents lead somewhere."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from usbip_plugin.model import Reason
from usbip_plugin.node.metrics import ALLOCATE_FAILURES, OTHER

DOCS = Path(__file__).parents[2] / "docs"
TEXT = (DOCS / "reference" / "reasons.md").read_text(encoding="utf-8")


def section(heading: str) -> str:
    return TEXT.split(f"# {heading}\n")[1].split("\n#")[0]


def rows(heading: str) -> list[list[str]]:
    table = [line for line in section(heading).splitlines() if line.startswith("| `")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table]


def test_every_reason_of_a_device_is_explained_and_has_a_cure() -> None:
    found = {row[0].strip("`"): row[1:] for row in rows("Devices")}
    assert {name: row[0] for name, row in found.items()} == {r.name.lower(): r.value for r in Reason}
    assert all(cell for row in found.values() for cell in row)


def test_the_first_reasons_are_the_healthy_ones() -> None:
    names = [row[0].strip("`") for row in rows("Devices")]
    healthy = {reason.name.lower() for reason in Reason if reason.healthy}
    assert set(names[: len(healthy)]) == healthy
    assert "The first four are Healthy" in TEXT
    assert len(healthy) == 4


def test_every_reason_of_a_failed_allocate_is_explained_and_has_a_cure() -> None:
    found = {row[0].strip("`"): row[1:] for row in rows("Failed Allocates")}
    assert found.keys() == {*ALLOCATE_FAILURES.values(), OTHER}
    assert all(cell for row in found.values() for cell in row)


def anchors(document: Path) -> set[str]:
    """Returns the anchors that renderers make of the headings."""
    headings = re.findall(r"^#+ (.*)$", document.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("document", sorted(DOCS.rglob("*.md")), ids=lambda path: path.name)
def test_every_link_to_a_heading_has_its_heading(document: Path) -> None:
    for target, anchor in re.findall(r"\]\(([^)#:]*)#([^)]+)\)", document.read_text(encoding="utf-8")):
        assert anchor in anchors(document.parent / target if target else document), f"{target}#{anchor}"
