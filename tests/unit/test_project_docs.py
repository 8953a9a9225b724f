"""Documents, manifests and scripts agree with the code."""

from __future__ import annotations

import importlib.util
import re
import textwrap
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml
from reference import KNOWN, export_keys, keys

from tests.rigs.tasks import result_of
from usbip_plugin import claims
from usbip_plugin.claims import TRANSITIONS, ClaimState
from usbip_plugin.cli.parser import parser
from usbip_plugin.config import schema
from usbip_plugin.config.export import EXPORT_KEYS, parse_export
from usbip_plugin.config.parse import parse_config
from usbip_plugin.node.check import permissions_needed
from usbip_plugin.observe.metrics import Metrics, NodeCollector, NodeReading

ROOT = Path(__file__).parent.parent.parent
DOCUMENTS = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "CHANGELOG.md",
    ROOT / "deploy/README.md",
    *sorted((ROOT / "contrib").rglob("README.md")),
    *sorted((ROOT / "docs").rglob("*.md")),
]
NAMESPACE = "usbip-system"
FOLDERS = "|".join(
    [
        *("usbip_plugin", "usbip_sim", "tests", "bench", "rbac", "deploy", "contrib", "docs", "proto"),
        *(path.parent.name for path in (ROOT / "usbip_plugin").glob("*/__init__.py")),
    ]
)
"""The directories whose files the documents name: those of the repository and of usbip_plugin."""


def configurations(document: Path) -> list[str]:
    """The configurations that a document shows in full."""
    blocks = re.findall(r"```yaml\n(.*?)```", document.read_text(encoding="utf-8"), re.DOTALL)
    return [block for block in blocks if "target: {host:" in block]


def make_targets() -> set[str]:
    return set(re.findall(r"^([a-z0-9-]+):.*##", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_and_make_targets_exist(document: Path) -> None:
    text = document.read_text(encoding="utf-8")
    inline = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", text)
    for link in inline + re.findall(r"^\[[^\]]+\]: ([^#:\s]+)", text, re.MULTILINE):
        assert (document.parent / link).exists(), link
    for target in re.findall(r"`make ([a-z0-9-]+)", text):
        assert target in make_targets()
    for path in re.findall(rf"`((?:{FOLDERS})/[\w./-]*)`", text):
        assert (ROOT / path).exists() or (ROOT / "usbip_plugin" / path).exists(), path


@pytest.mark.parametrize("document", [path for path in DOCUMENTS if configurations(path)], ids=lambda path: path.name)
def test_the_configurations_in_the_documents_are_valid_without_a_warning(document: Path) -> None:
    for block in configurations(document):
        assert parse_config(block).warnings == ()


def test_the_first_screen_of_the_readme_ends_with_an_install() -> None:
    screen = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()[:40]
    assert screen[2].startswith("A Kubernetes device plugin for USB devices")
    assert any(line.startswith("helm install usbip-plugin") for line in screen)
    assert "## Is it for you?" in screen


def test_every_document_is_in_the_navigation_of_the_site() -> None:
    listed = re.findall(r"^ +- (\S+\.md)$", (ROOT / "mkdocs.yml").read_text(encoding="utf-8"), re.MULTILINE)
    assert {str(document.relative_to(ROOT)) for document in DOCUMENTS} <= set(listed)
    assert len(set(listed)) == len(listed)


def test_the_gitops_guide_names_the_chart_and_values_that_it_has() -> None:
    text = (ROOT / "docs/howto/gitops.md").read_text(encoding="utf-8")
    objects = [
        item for block in re.findall(r"```yaml\n(.*?)```", text, re.DOTALL) for item in yaml.safe_load_all(block)
    ]
    by_kind = {item["kind"]: item["spec"] for item in objects}
    application, release = by_kind["Application"]["source"], by_kind["HelmRelease"]
    assert application["path"] == release["chart"]["spec"]["chart"]
    chart = ROOT / application["path"]
    known = yaml.safe_load((chart / "values.yaml").read_text(encoding="utf-8"))
    for values in application["helm"]["valuesObject"], release["values"]:
        assert values.keys() <= known.keys()
        assert values["image"].keys() <= known["image"].keys()
        assert not parse_config(values["config"]).config.resources
    assert release["chart"]["spec"]["sourceRef"]["kind"] in by_kind


def test_the_exporters_files_in_the_documents_are_valid_without_a_warning() -> None:
    pattern = re.compile(r"^ *```yaml\n( *export:\n.*?)```", re.DOTALL | re.MULTILINE)
    blocks = [block for document in DOCUMENTS for block in pattern.findall(document.read_text(encoding="utf-8"))]
    assert blocks
    for block in blocks:
        assert parse_export(textwrap.dedent(block)).warnings == ()


def test_the_reference_of_the_exporters_file_has_its_keys_and_defaults() -> None:
    assert tuple(key.path for key in export_keys()) == EXPORT_KEYS
    plain = parse_export("export: [{all: true}]").config
    for key in export_keys():
        if key.default.startswith("`"):
            assert parse_export(f"export: [{{all: true}}]\n{key.path}: {key.default.strip('`')}").config == plain


def test_the_first_document_and_the_reference_show_a_configuration() -> None:
    for name in ("README.md", "docs/reference/configuration.md"):
        assert configurations(ROOT / name)


def test_the_defaults_in_the_documents_are_those_of_the_code() -> None:
    text = (ROOT / "docs/reference/configuration.md").read_text(encoding="utf-8")
    for flag, default in (
        ("config", schema.DEFAULT_CONFIG_PATH),
        ("domain", schema.DEFAULT_DOMAIN),
        ("plugin-directory", schema.DEFAULT_PLUGIN_DIRECTORY),
        ("pod-resources-socket", schema.DEFAULT_POD_RESOURCES_SOCKET),
        ("log-level", schema.DEFAULT_LOG_LEVEL),
        ("listen", schema.DEFAULT_LISTEN),
    ):
        assert f"| `--{flag}` | `{default}`" in text


def generator() -> ModuleType:
    spec = importlib.util.spec_from_file_location("generate", ROOT / "docs/generate.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_generated_documents_are_current() -> None:
    for path, text in generator().wanted().items():
        assert path.read_text(encoding="utf-8") == text, f"{path}: make docs"


def test_every_flag_in_the_documents_is_in_the_help() -> None:
    text = (ROOT / "docs/reference/cli.md").read_text(encoding="utf-8")
    for name, command in generator()._commands(parser()):
        section = re.search(rf"### {name}( DEVICE| SHELL)?\n(.*?)(\n### |\Z)", text, re.DOTALL)
        assert section is not None, name
        described = set(re.findall(r"^\| (?:`-\w`, )?`(--[a-z-]+)`", section[2], re.MULTILINE))
        assert described or name in ("completion", "help")
        assert described <= set(re.findall(r"--[a-z-]+", command.format_help())), name


def test_the_reference_has_exactly_the_keys_of_the_parser() -> None:
    expected = {prefix + key for prefix, known in KNOWN.items() for key in known}
    assert {key.path for key in keys()} == expected | {"resources.NAME"}
    assert len(keys()) == len(expected) + 1


def test_the_defaults_of_the_reference_are_valid_and_change_nothing() -> None:
    base = "resources: {a: {devices: [{target: {host: h}, selector: {vendor: '0951'}}]%s}}\n%s"
    plain = parse_config(base % ("", "")).config
    for key in keys():
        if not key.default.startswith("`"):
            continue
        value = key.default.strip("`")
        match key.path.split("."):
            case ["resources", "NAME", name]:
                text = base % (f", {name}: {value}", "")
            case ["lock", name]:
                text = base % ("", f"lock: {{{name}: {value}}}")
            case [name]:
                text = base % ("", f"{name}: {value}")
            case [*_, "port"]:
                text = (base % ("", "")).replace("host: h", f"host: h, port: {value}")
            case _:
                continue
        assert parse_config(text).config == plain, key.path


def test_the_screenshot_is_a_small_png() -> None:
    picture = (ROOT / "docs/status-page.png").read_bytes()
    assert picture.startswith(b"\x89PNG")
    assert len(picture) < 150 * 1024


def test_every_command_is_in_the_document() -> None:
    text = (ROOT / "docs/reference/cli.md").read_text(encoding="utf-8")
    listed = set(re.findall(r"^\| `usbip-plugin ([\w-]+)` \|", text, re.MULTILINE))
    (commands,) = [action.choices for action in parser()._actions if isinstance(action.choices, dict)]
    assert listed == set(commands)


def test_the_docstring_of_claims_has_the_transitions_of_the_code() -> None:
    states = {state.value for state in ClaimState}
    rows = dict(re.findall(r"^    ([A-Z]\w+) +(.*)$", claims.__doc__ or "", re.MULTILINE))
    follow: dict[str, set[str]] = {}
    for (state, _), after in TRANSITIONS.items():
        follow.setdefault(state.value, set()).add(after.value)
    assert {name: set(re.findall(r"\w+", after)) & states for name, after in rows.items()} == {
        name: after - {name} for name, after in follow.items()
    }


def test_the_metrics_named_in_the_documents_exist() -> None:
    exposed = Metrics()
    exposed.devices("r", ())
    exposed.add(NodeCollector(lambda: NodeReading(version="1", ready=True)))
    text = result_of(exposed.render())[0].decode()
    for document in DOCUMENTS:
        for name in re.findall(r"`(\w*device_plugin_\w+)`", document.read_text(encoding="utf-8")):
            assert name in text


def rbac() -> Iterator[dict[str, Any]]:
    for path in sorted((ROOT / "rbac").glob("*.yaml")):
        yield from (item for item in yaml.safe_load_all(path.read_text(encoding="utf-8")) if item)


def test_check_asks_for_exactly_what_rbac_grants() -> None:
    granted = {
        (verb, group, resource, item["metadata"].get("namespace"))
        for item in rbac()
        for rule in item.get("rules", ())
        for group in rule["apiGroups"]
        for resource in rule["resources"]
        for verb in rule["verbs"]
    }
    needed = permissions_needed(NAMESPACE, "node", publish_node_status=True)
    assert granted == {
        (p.verb, p.group, f"{p.resource}/{p.subresource}" if p.subresource else p.resource, p.namespace) for p in needed
    }


def test_kind_has_two_workers() -> None:
    roles = [node["role"] for node in yaml.safe_load((ROOT / "kind-config.yaml").read_text(encoding="utf-8"))["nodes"]]
    assert sorted(roles) == ["control-plane", "worker", "worker"]


def test_every_promise_has_a_test_and_every_named_test_exists() -> None:
    internals = ROOT / "docs/internals"
    promises, _ = (internals / "reliability.md").read_text(encoding="utf-8").split("## Not promised")
    rows = [
        line for line in promises.splitlines() if line.startswith("|") and not re.match(r"\|.* (test|---) \|$", line)
    ]
    cheapest = re.findall(r"\| (\w+) `(test_\w+)` \|$", promises, re.MULTILINE)
    more = (internals / "more-tests.txt").read_text(encoding="utf-8")
    named = re.findall(r"^(test_\w+)$", more, re.MULTILINE)
    assert len(cheapest) == len(rows)
    assert len(set(cheapest)) == len(cheapest)
    assert set(named) <= {name for _, name in cheapest}
    for tier, name in cheapest + re.findall(r"^  (\w+) (test_\w+)$", more, re.MULTILINE):
        sources = (path.read_text(encoding="utf-8") for path in (ROOT / "tests" / tier).rglob("test_*.py"))
        assert any(f"def {name}(" in source for source in sources), name
