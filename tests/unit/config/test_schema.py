"""The JSON Schemas accept what the parser accepts, and refuse what it refuses as far as a schema can."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from jsonschema import Draft202012Validator

from tests.unit.config import test_container, test_export, test_format
from tests.unit.config.test_container import TEXT
from tests.unit.config.test_format import GO_PUBLISHED_EXAMPLE, one_extra, one_selector, one_target
from tests.unit.test_project_docs import DOCUMENTS, configurations
from usbip_plugin.config.export import parse_export
from usbip_plugin.config.parse import parse_config
from usbip_plugin.errors import ConfigError

ROOT = Path(__file__).parents[3]
CONFIG, EXPORT = (
    Draft202012Validator(json.loads((ROOT / f"docs/reference/{name}.schema.json").read_text(encoding="utf-8")))
    for name in ("config", "export")
)
EXAMPLES = sorted(ROOT.glob("examples/*/config.yaml"))


class Editor(yaml.SafeLoader):
    """Loads YAML as editors do: version 1.2, in which 0951 is a number, and yes and 2026-05-04 are text."""


Editor.yaml_implicit_resolvers = {}
for _tag, _pattern, _first in (
    ("bool", "true|True|TRUE|false|False|FALSE", "tTfF"),
    ("int", "[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", "-+0123456789"),
    ("float", r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?", "-+.0123456789"),
    ("null", "~|null|", "~n\0"),
    ("merge", "<<", "<"),
):
    Editor.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"^(?:{_pattern})$"), [*_first, ""])
Editor.add_constructor(
    "tag:yaml.org,2002:int", lambda _, node: int(node.value, 0 if node.value[:2] in ("0o", "0x") else 10)
)
Editor.add_constructor("tag:yaml.org,2002:float", lambda _, node: float(node.value))


def loaded(text: str) -> Any:
    return yaml.load(text, Loader=Editor)


def cases(test: Callable[..., object], into: Callable[[str], str] = str) -> Iterator[str]:
    """Yields the configurations with which another test is parametrized."""
    (mark,) = [mark for mark in getattr(test, "pytestmark", ()) if mark.name == "parametrize"]
    for case in mark.args[1]:
        yield into(case if isinstance(case, str) else case[0])


REFUSED = [
    *cases(test_format.test_an_invalid_value_is_an_error_with_its_place_and_the_valid_values),
    *cases(test_format.test_an_invalid_usb_id_is_refused, lambda text: one_selector(f"{{vendor: {text}}}")),
    *cases(test_format.test_an_invalid_list_is_an_error_with_its_place_and_cure, one_selector),
    *cases(test_format.test_a_key_that_would_not_narrow_a_selector_is_an_error, one_selector),
    *cases(test_format.test_a_selector_without_a_condition_is_an_error_that_lists_the_keys, one_selector),
    *cases(test_format.test_an_entry_without_a_selector_is_an_error, lambda entry: f"resources: {{a: [{entry}]}}"),
    *cases(
        test_format.test_a_key_of_another_tool_is_an_error_with_the_right_key_and_all_keys,
        lambda key: one_selector(f'{{{key}: "0951"}}'),
    ),
    *cases(test_format.test_a_misspelt_key_is_an_error_that_names_the_right_one),
    *cases(test_format.test_a_file_without_a_resource_is_an_error),
    *cases(
        test_format.test_a_resource_name_that_kubernetes_refuses_is_an_error,
        lambda name: f"resources: {{{name}: []}}",
    ),
    *cases(test_container.test_a_refused_value_has_an_error_with_its_place_and_a_cure, TEXT.__mod__),
    "resources: {a: {devices: [{target: {host: h}, selector: {all: true}}], onLoss: restart}}",
    "resources: {a: {devices: [{target: {host: h}, selector: {all: true}}], onLoss: restart, cdi: false}}",
    "resources: {a: {devices: [{target: {host: h}, selector: {all: true}}], evictAfter: 2m}}",
    "resources: {a: {devices: [{target: {host: h}, selector: {all: true}}], evictAfter: 2m, onLoss: keep}}",
    "resources: {a: [{target: {host: h}, selector: {vendor: 0x1}, bus_id: 1-1}]}",
    "resources: {a: {onLoss: keep}}",
    "resources: {a: }",
    "resources: {}\nlisten: banana\n",
]
BEYOND_A_SCHEMA = {
    # the same value twice, in other spellings
    one_selector('{vendor: ["0951", "951"]}'),
    one_selector('{usb_ids: ["0951:166a", "0951:166A"]}'),
    # numbers of which an editor sees the value only
    one_selector("{vendor: [0x1, 1666]}"),
    TEXT % "cdi: true, permissions: {mode: 660}",
    # bounds of text, and values that depend on each other
    "resources: {}\nlock: {duration: 20s}",
    "resources: {}\nlock: {duration: 3601s}",
    TEXT % "children: [tty], childrenTimeout: 2m",
    TEXT % "children: [tty], childrenTimeout: 10s",
}
ACCEPTED = [
    GO_PUBLISHED_EXAMPLE,
    "resources: {}",
    "resources: {}\nlock:\nlog-level: ~\n",
    "Resources: {a: [{Target: {HOST: h, Port: 1}, SELECTOR: {BUS_ID: 1-1}, extras: [{host_path: /a}]}]}",
    "comment: x\nresources: {a: [{target: {host: h, at: home}, selector: {vendor: 0x1}, note: stick}]}",
    "resources: {a: {Devices: [{target: {host: h}, selector: {ALL: true}}]}}",
    "resources: {a: [{target: &t {host: h}, selector: {serial: 1}}, {target: {<<: *t}, selector: {serial: 2}}]}",
    one_selector('{vendor: 0x0951, product: 0x0000, bus_id: ""}'),
    one_selector("{all: true, vendor: 0}"),
    *(one_selector(f"{{vendor: {text}}}") for text in ("20a0", "abcd", "7", "0007", "0o17", "65535", '"0X1"')),
    *cases(test_format.test_a_value_at_a_limit_is_accepted),
    *cases(
        test_format.test_blanks_around_a_serial_number_are_removed_with_a_warning,
        lambda written: one_selector(f'{{serial: "{written}"}}'),
    ),
    *(
        one_target(f"{{host: {host}}}")
        for host in cases(test_format.test_a_name_with_and_without_the_dot_at_its_end_is_one_server)
    ),
    *(TEXT % f"children: [{kind}]" for kind in cases(test_container.test_children_takes_the_name_of_any_subsystem)),
    *(
        TEXT % f"cdi: true, permissions: {text}"
        for text in cases(test_container.test_permissions_are_read_with_octal_modes_and_numeric_ids)
    ),
    *(
        TEXT % f"containerPath: '{template}'"
        for template in cases(test_container.test_the_fields_of_a_template_decide_which_nodes_it_names)
    ),
    TEXT % "onLoss: Evict, evictAfter: 2m, cdi: 'true', allowClasses: [HID, 0x08, 'ff'], readOnly: false",
    TEXT % "nodeNames: lab-*",
    TEXT % "nodeNames: [a, 'b[0-9]']",
    one_extra("{hostPath: /dev/a, permissions: wm}"),
]


@pytest.mark.parametrize("text", REFUSED)
def test_what_the_parser_refuses_the_schema_refuses(text: str) -> None:
    with pytest.raises(ConfigError):
        parse_config(text)
    assert CONFIG.is_valid(loaded(text)) == (text in BEYOND_A_SCHEMA)


def test_everything_beyond_a_schema_is_a_case_of_these_tests() -> None:
    assert set(REFUSED) >= BEYOND_A_SCHEMA


@pytest.mark.parametrize("text", ACCEPTED)
def test_what_the_parser_accepts_the_schema_accepts(text: str) -> None:
    parse_config(text)
    CONFIG.validate(loaded(text))


@pytest.mark.parametrize("file", EXAMPLES, ids=lambda file: file.parent.name)
def test_each_example_fits_the_schema_that_its_first_line_names(file: Path) -> None:
    text = file.read_text(encoding="utf-8")
    hint = re.match(r"# yaml-language-server: \$schema=(\S+)\n", text)
    assert hint is not None
    named = (file.parent / hint[1]).resolve()
    assert named == ROOT / "docs/reference/config.schema.json"
    CONFIG.validate(loaded(text))


def test_the_configurations_in_the_documents_fit_the_schema() -> None:
    blocks = [block for document in DOCUMENTS for block in configurations(document)]
    assert blocks
    for block in blocks:
        CONFIG.validate(loaded(block))


@pytest.mark.parametrize("text", list(cases(test_export.test_whatever_is_not_valid_is_an_error_with_its_place)))
def test_the_exporters_schema_refuses_what_its_parser_refuses(text: str) -> None:
    with pytest.raises(ConfigError):
        parse_export(text)
    if text == "export: [":
        return
    beyond = "10.1.2.3/16" in text or text == "export: [{all: true}, {all: true}]"
    assert EXPORT.is_valid(loaded(text)) == beyond


@pytest.mark.parametrize(
    "text",
    [
        "export: []",
        "export: [{all: true}]\nallow: [10.0.0.0/8, 'fd00::/8', 10.1.2.3]",
        "export: [{serial: A}]\nfence: true\nWhenApiIsAway: serve\nnames: [pi]",
        (ROOT / "contrib/server/export.yaml").read_text(encoding="utf-8"),
    ],
)
def test_the_exporters_schema_accepts_what_its_parser_accepts(text: str) -> None:
    parse_export(text)
    EXPORT.validate(loaded(text))


def test_the_schemas_are_valid_themselves() -> None:
    for validator in (CONFIG, EXPORT):
        Draft202012Validator.check_schema(validator.schema)


def _mapping(optional: Mapping[str, list[Any]], **required: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.fixed_dictionaries(required, optional={key: st.sampled_from(values) for key, values in optional.items()})


_ID = ["0951", "0x1", 7, 0, "", "ffff", ["0951", 1], [0], None, 1.5]
_SELECTORS = _mapping(
    {
        "vendor": _ID,
        "product": _ID,
        "usb_ids": ["0951:1666", ["0951:1666"], "951:1"],
        "bus_id": ["1-1", "1-*", "", ["1-1"], "a b", 1],
        "serial": ["A1", 42, " A1 ", "", None, True],
        "class": ["hid", "HID", "09", "8", 8, 9, "hub"],
        "all": [True, False, "true", "yes"],
    }
)
_TARGETS = _mapping({"host": ["h", "[::1]", "h:1", 10, 10.2, "10.2.3.4", "1o"], "port": [3240, "3240", 0]})
_RESOURCES = _mapping(
    {
        "onLoss": ["keep", "RESTART", "evict", None, "no"],
        "evictAfter": ["2m", 1, "0", None],
        "cdi": [True, False, "true", None],
        "nodeNames": ["a-*", ["a", "b"], ["a", "a"], [], "A", 1, None],
        "children": [["tty"], ["net"], [], "tty", None],
        "permissions": [{"mode": "0660"}, {"user": 0}, {}, {"group": "x"}, None],
        "containerPath": ["/dev/a", "/dev/{serial}", "/dev/a{serial}", ["/a", "/b"], "/{busid}{index}", "/../a"],
    },
    devices=st.lists(_mapping({}, target=_TARGETS, selector=_SELECTORS), max_size=2),
)


@settings(max_examples=200, deadline=None)
@given(_RESOURCES, st.sampled_from(["21s", 40, "40.0", 20, 40.5, None]))
def test_no_file_is_valid_that_the_schema_refuses(resource: dict[str, object], duration: object) -> None:
    text = yaml.safe_dump({"resources": {"a": resource}, "lock": {"duration": duration}})
    try:
        parse_config(text)
    except ConfigError:
        return
    CONFIG.validate(loaded(text))
