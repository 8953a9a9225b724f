"""The README's table of what was tested, from the ledger of passed sections to the document."""

from __future__ import annotations

from pathlib import Path

import pytest
import tested_with

from tests.rigs.tested_with import lines, ran_on_nodes, ran_with

ROOT = Path(__file__).parents[2]


def entry(result: str, section: str = "kubelet", time: str = "2026-01-02T03:04:05", tree: str = "abc") -> str:
    return f"{time}\t{tree}\t{section}\t{result}\n"


def test_the_last_run_of_a_version_counts() -> None:
    first, last = entry("kubernetes=1.31.13"), entry("kubernetes=1.31.13", time="2026-02-03T00:00:00", tree="def")
    found = tested_with.parse([first, last, "2026-01-01T00:00:00\tcut off"])
    assert found == {"kubernetes": {"1.31.13": {"section": "kubelet", "date": "2026-02-03", "tree": "def"}}}


def test_the_table_has_what_passed_and_no_row_without_it() -> None:
    kept = tested_with.parse([entry("python=3.13.0", "python-3.13"), entry("kubernetes=1.37.2")])
    found = tested_with.parse([entry("python=3.9.1", "python-3.9"), entry("kubernetes=1.37.2", tree="new")])
    both = tested_with.merged(kept, found)
    assert tested_with.table_rows(both) == [("Kubernetes", "1.37.2"), ("Python", "3.9.1, 3.13.0")]
    assert both["kubernetes"]["1.37.2"]["tree"] == "new"


def test_an_unknown_row_is_an_error_with_its_line() -> None:
    with pytest.raises(ValueError, match=r"line 2: 'phase' is not a row of the table, expected one of kubernetes, "):
        tested_with.parse([entry("python=3.13.0"), entry("phase=full")])


def test_the_kept_results_name_section_date_and_tree_of_their_run() -> None:
    results = tested_with.read()
    assert results
    for row, values in results.items():
        assert row in tested_with.ROWS
        assert all(set(run) == {"section", "date", "tree"} for run in values.values())


def test_the_readme_claims_what_the_kept_results_have() -> None:
    section = (ROOT / "README.md").read_text(encoding="utf-8").partition("\n## Tested with\n")[2]
    claimed = [
        tuple(cell.strip() for cell in line.strip("|").split("|")) for line in section.splitlines() if "|" in line
    ]
    assert claimed[2:] == tested_with.table_rows(tested_with.read())


def test_tests_name_what_they_ran_with(own_config: pytest.Config) -> None:
    info = {"kubeletVersion": "v1.31.13", "containerRuntimeVersion": "containerd://1.7.35"}
    ran_on_nodes(own_config, {"a": {"status": {"nodeInfo": info}}, "b": {"status": {"nodeInfo": info}}})
    ran_with(own_config, "kernel", "6.12.117")
    assert lines(own_config) == [
        "tested with: kernel=6.12.117",
        "tested with: kubernetes=1.31.13",
        "tested with: runtime=containerd 1.7.35",
    ]


@pytest.fixture
def own_config() -> pytest.Config:
    """Returns a configuration of its own, so that this run does not claim what the test names."""
    return pytest.Config(pytest.PytestPluginManager())
