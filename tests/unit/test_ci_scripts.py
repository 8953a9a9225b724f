"""The commands in .ci/run and .ci/nightly, and the tools that read their results."""

from __future__ import annotations

import functools
import importlib.util
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

ROOT = Path(__file__).parent.parent.parent
CI = ROOT / ".ci"


def load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"loaded_{path.stem}", path)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    # dataclasses look their module up
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def makefile() -> str:
    return (ROOT / "Makefile").read_text(encoding="utf-8")


def make_targets() -> set[str]:
    return set(re.findall(r"^([a-z0-9-]+):.*##", makefile(), re.MULTILINE))


@functools.cache
def units(shard: str = "") -> list[str]:
    environment = {**os.environ, "SHARD": shard}
    listed = subprocess.run([CI / "nightly", "--list"], env=environment, capture_output=True, text=True, check=True)
    return listed.stdout.splitlines()


def sections_of_run() -> list[str]:
    """Returns the commands of the sections of .ci/run."""
    text = (CI / "run").read_text(encoding="utf-8")
    return re.findall(r"^ *section [\w-]+ (.+)$", text, re.MULTILINE)


def targets_in(commands: list[str]) -> set[str]:
    return {target for command in commands for target in re.findall(r"\bmake ([a-z][a-z0-9-]*)", command)}


@pytest.mark.parametrize("name", ["run", "nightly", "sections.sh"])
def test_the_scripts_have_valid_syntax(name: str) -> None:
    subprocess.run(["bash", "-n", str(CI / name)], check=True)


def test_the_scripts_run_existing_targets() -> None:
    assert targets_in(sections_of_run()) | targets_in(units()) <= make_targets()


def test_each_change_is_checked_by_the_targets_of_the_readme_and_in_each_real_environment() -> None:
    targets = targets_in(sections_of_run())
    readme = re.findall(r"^make (\w+)", (ROOT / "README.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert readme == ["demo", "test"]
    assert {*readme, "lint", "site", "sim", "image", "test-image", "test-deploy"} <= targets
    assert {"test-apiserver", "test-kernel", "test-node", "test-power", "test-kubelet", "tour"} <= targets


def test_every_target_that_tests_is_in_run_or_nightly() -> None:
    tests = {name for name in make_targets() if name.startswith(("test", "bench", "fuzz", "sim", "model", "e2e"))}
    # long forms of units in the list: their tests for any length of time
    longer = {"test-kills", "test-outage"}
    assert tests - longer <= targets_in(sections_of_run()) | targets_in(units())


def test_a_target_with_a_short_form_is_complete_in_the_nightly_list() -> None:
    shortened = {target for command in sections_of_run() if "-m short" in command for target in targets_in([command])}
    assert shortened
    whole = [command for command in units() if "-m short" not in command]
    assert shortened <= targets_in(whole)


@pytest.mark.parametrize(
    ("target", "kernel"),
    [
        *(("test-kernel", ""), ("test-kernel", "KERNEL=6.1 ")),
        *((target, "") for target in ("test-node", "test-kubelet", "test-power", "e2e")),
    ],
)
def test_the_nightly_list_has_all_parts_of_a_tier(target: str, kernel: str) -> None:
    commands = [unit for unit in units() if f"make {target} " in unit and ("KERNEL=" in unit) == bool(kernel)]
    assert all(f"{kernel}make {target} " in command for command in commands)
    parts = [match for command in commands for match in re.findall(r"(\d+)/(\d+)", command)]
    count = int(parts[0][1])
    assert parts == [(str(number), str(count)) for number in range(1, count + 1)]


@pytest.mark.parametrize("shard", ["0/16", "17/16", "3", "a/b", "1/0"])
def test_an_invalid_shard_is_refused(shard: str) -> None:
    environment = {**os.environ, "SHARD": shard}
    listed = subprocess.run([CI / "nightly", "--list"], env=environment, capture_output=True, text=True, check=False)
    assert (listed.returncode, listed.stdout) == (2, "")
    assert f"SHARD={shard}: expected N/M" in listed.stderr


def test_the_parts_of_a_run_are_together_all_its_tests_in_order() -> None:
    part_of = load(ROOT / "tests/conftest.py").part_of
    for count in range(1, 13):
        parts = [part_of(list(range(10)), f"{number}/{count}") for number in range(1, count + 1)]
        assert [item for kept, _left_out in parts for item in kept] == list(range(10))
        assert all(sorted(kept + left_out) == list(range(10)) for kept, left_out in parts)


@pytest.mark.parametrize("part", ["0/2", "3/2", "1", "a/b", ""])
def test_an_invalid_part_is_refused(part: str) -> None:
    with pytest.raises(pytest.UsageError, match="K/N"):
        load(ROOT / "tests/conftest.py").part_of([], part)


def test_a_shuffled_run_has_the_tests_of_its_part_in_an_order_of_its_seed() -> None:
    def order(part: str, seed: str | None) -> list[int]:
        options = {"--part": part, "--shuffle": seed}
        hook, items = SimpleNamespace(pytest_deselected=lambda items: None), list(range(100))
        conftest.pytest_collection_modifyitems(SimpleNamespace(getoption=options.get, hook=hook), items)
        return items

    conftest = load(ROOT / "tests/conftest.py")
    assert order("1/2", None) == list(range(50))
    assert sorted(order("1/2", "a")) == list(range(50))
    assert order("1/2", "a") == order("1/2", "a")
    assert len({tuple(order("1/2", seed)) for seed in (None, "a", "b")}) == 3


def test_sixteen_shards_are_together_the_whole_list() -> None:
    shards = [units(f"{number}/16") for number in range(1, 17)]
    assert sorted(unit for shard in shards for unit in shard) == sorted(units())
    assert max(map(len, shards)) - min(map(len, shards)) <= 1


def test_a_unit_of_nightly_that_does_not_exist_is_a_mistake() -> None:
    ran = subprocess.run([CI / "nightly", "--only", "kubelet-9"], capture_output=True, text=True, check=False)
    assert (ran.returncode, ran.stderr) == (2, "nightly: no unit matches kubelet-9; see --list\n")


def test_no_unit_of_nightly_has_the_name_of_a_section_of_run() -> None:
    """The ledger would count the short form as a run of the long one."""
    names = {line.split()[1] for line in units()}
    sections = set(re.findall(r"section ([a-z-]+) ", (CI / "run").read_text(encoding="utf-8")))
    assert {"apiserver", "sim", "kernel"} <= sections
    assert not names & sections


def test_every_directory_of_tests_is_run() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    run = settings["tool"]["pytest"]["ini_options"]["testpaths"]
    scripts = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests/lab").rglob("*.sh"))
    for directory in {path.parent for path in (ROOT / "tests").rglob("test_*.py")}:
        top = "/".join(directory.relative_to(ROOT).parts[:2])
        assert top in run or top in makefile() + scripts, f"{directory} is run by no target"


def test_a_change_affects_the_targets_with_its_files_as_inputs() -> None:
    affected = load(CI / "affected.py").affected
    assert affected([]) == []
    assert affected(["docs/concepts/concepts.md"]) == ["check", "site"]
    assert affected(["usbip_plugin/vhci/linux.py"]) == ["check", "sim", "test-kernel", "test-node"]
    assert affected(["usbip_plugin/kubelet/pod_resources.py"]) == ["check", "sim", "test-apiserver", "test-kubelet"]
    targets = affected(["deploy/base/daemonset.yaml", "tests/page/test_page.py"])
    assert targets[:3] == ["check", "test-page", "test-deploy"]
    assert set(affected(["pyproject.toml"])) >= {"check", "nightly", "test-kernel", "e2e"}


def test_the_inputs_of_each_target_exist() -> None:
    module = load(CI / "affected.py")
    assert {"check", "nightly", *module.INPUTS} <= make_targets()
    for path in {path for inputs in module.INPUTS.values() for path in inputs} | set(module.EVERYTHING):
        assert (ROOT / path).exists(), path


def line(tree: str, verdict: str, tests: str = "", section: str = "test") -> str:
    return f"2026-01-01T00:00:00\t{tree}\t{section}\t{verdict}\t10\t9\t1.0\t1.00\t{tests}"


def test_a_test_that_failed_and_passed_on_one_tree_is_a_flake() -> None:
    module = load(CI / "flakes.py")
    ledger = [
        line("a", "ok"),
        line("a", "FAILED", "x.py::one,x.py::two"),
        line("a", "FAILED", "x.py::one"),
        line("b", "FAILED", "x.py::broken"),
        line("c", "ok"),
        line("d", "FAILED", section="other"),
        line("d", "ok", section="other"),
        "2026-01-01T00:00:00\tcut off",
    ]
    found = [(one.name, one.failures, one.runs) for one in module.flakes(module.parse(ledger))]
    assert found == [("other", 1, 2), ("x.py::one", 2, 5), ("x.py::two", 1, 5)]


def test_figures_are_compared_relative_to_the_median_change() -> None:
    module = load(CI / "figures.py")
    kept = {"a": 10.0, "b": 20.0, "c": 30.0, "gone": 1.0}
    median, ratios = module.compared({"a": 20.0, "b": 40.0, "c": 180.0, "new": 1.0}, kept)
    assert median == 2.0
    assert ratios == {"a": 1.0, "b": 1.0, "c": 3.0}
    assert module.compared({"a": 1.0}, {}) == (1.0, {})


def sections(script: str, tmp_path: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "USBIP_PLUGIN_CACHE": str(tmp_path)}
    command = f"set -euo pipefail; . .ci/sections.sh; {script}\nfinish"
    return subprocess.run(
        ["bash", "-c", command], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )


def test_a_section_reports_its_cost_and_a_lane_ends_with_its_first_failure(tmp_path: Path) -> None:
    ran = sections("section one 9 echo hello && section two 9 false && section three 9 true || true", tmp_path)
    assert ran.returncode == 1
    assert "one| hello" in ran.stdout
    assert re.search(r"^one +ok +\d+ s +\d+ core-s  load [\d.]+$", ran.stdout, re.MULTILINE)
    assert re.search(r"^two +FAILED ", ran.stdout, re.MULTILINE)
    assert "three" not in ran.stdout
    ledger = (tmp_path / "ci/sections.tsv").read_text(encoding="utf-8")
    assert [entry.split("\t")[2:4] for entry in ledger.splitlines()] == [["one", "ok"], ["two", "FAILED"]]


def test_only_a_section_without_failures_records_what_it_was_tested_with(tmp_path: Path) -> None:
    says = "echo 'tested with: kubernetes=1.31.13'; echo 'not tested with: python=2.7'"
    ran = sections(f'section one 9 bash -c "{says}"\nsection two 9 bash -c "{says}; false" || true', tmp_path)
    assert ran.returncode == 1
    ledger = (tmp_path / "ci/tested-with.tsv").read_text(encoding="utf-8")
    assert [line.split("\t")[2:] for line in ledger.splitlines()] == [["one", "kubernetes=1.31.13"]]


def test_the_status_of_a_lab_that_make_cannot_set_up_is_75(tmp_path: Path) -> None:
    (tmp_path / "Makefile").write_text("lab:\n\t@exit 75\n", encoding="utf-8")
    ran = sections(f"section lab 9 make -f {tmp_path}/Makefile lab || true", tmp_path)
    assert ran.returncode == 75


def test_the_end_of_a_log_names_the_tests_that_failed_and_why(tmp_path: Path) -> None:
    report = tmp_path / "report"
    reason = ["____ test_two ____", ">       assert held", "E       assert False", "tests/x.py:9: AssertionError"]
    report.write_text("\n".join([*reason, *["a captured line"] * 50, "FAILED tests/x.py::test_two - assert False"]))
    ran = sections(f'section tier 9 bash -c "cat {report}; false" || true\nsection other 9 echo fine', tmp_path)
    end = ran.stdout[ran.stdout.index("=== tier: why") :].splitlines()
    assert end[1 : end.index("=== tier: its last lines")] == [*reason, "FAILED tests/x.py::test_two - assert False"]
    assert end.count("a captured line") < 50
    assert "=== other: why" not in ran.stdout


def test_a_run_without_failures_succeeds(tmp_path: Path) -> None:
    ran = sections("section one 9 echo hello\nsection two 9 true", tmp_path)
    assert ran.returncode == 0
    assert "tests: 0 passed, 0 failed" in ran.stdout


def test_the_output_of_a_section_that_passed_does_not_change_its_result(tmp_path: Path) -> None:
    ran = sections("section one 9 echo 'make: *** [Makefile:1: lab] Error 75'", tmp_path)
    assert ran.returncode == 0


def test_a_failed_download_is_reported_as_infrastructure(tmp_path: Path) -> None:
    ran = sections("section download 9 bash -c 'attempt false' || true", tmp_path)
    assert ran.returncode == 75
    assert ran.stdout.count("| attempt ") == 3
    assert re.search(r"^download +INFRASTRUCTURE ", ran.stdout, re.MULTILINE)


def test_a_section_that_hangs_is_cut_off(tmp_path: Path) -> None:
    ran = sections("section hang 0.2 sleep 60 || true", tmp_path)
    assert ran.returncode == 1
    assert "hang: no end within 0.2 s" in ran.stdout


@pytest.mark.parametrize(
    ("closing", "status"), [("3 passed, 1 skipped in 0.10s", 1), ("3 passed, 9 deselected in 0.10s", 0)]
)
def test_a_tier_with_a_skipped_test_has_failed(tmp_path: Path, closing: str, status: int) -> None:
    ran = sections(f"section tier 9 echo '==== {closing} ====' || true", tmp_path)
    assert ran.returncode == status
    assert "tests: 3 passed, 0 failed" in ran.stdout
