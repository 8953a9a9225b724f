"""Any contents of the ConfigMap: no crash, no hang, bounded memory and messages."""

from __future__ import annotations

import contextlib
import tracemalloc
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from tests.fuzz.brief import brief, no_hang
from tests.fuzz.fuzz_config import configuration, export_configuration
from usbip_plugin.config.document import MAX_FILE_BYTES, MAX_PROBLEMS
from usbip_plugin.config.parse import parse_config
from usbip_plugin.config.reload import load_config
from usbip_plugin.errors import ConfigError

MIB = 1 << 20
# Bytes that reading a file of 1 MiB may take beside the file.
MEMORY = 32 * MIB
BIDI = "\u202e"


def refused(text: str) -> tuple[str, ...]:
    with no_hang(), pytest.raises(ConfigError) as caught:
        parse_config(text)
    return caught.value.problems


def selecting(selector: str) -> str:
    return f"resources:\n  a:\n    - target: {{host: h}}\n      selector: {selector}\n"


@pytest.mark.parametrize("number", ["0x_", "0b_", "0o_", "-0x_", "1" * 5000, "0" + "9" * 5000, "-" + "7" * 5000])
@pytest.mark.parametrize("field", ["vendor", "product", "class"])
def test_numbers_that_python_does_not_read_are_problems(field: str, number: str) -> None:
    (problem,) = refused(selecting(f"{{{field}: {number}}}"))
    assert problem.startswith(f"config.yaml:4: resources.a[0].selector.{field}: ")
    assert len(problem) < 500


@pytest.mark.parametrize("number", ["1_0", "0x_1f", "0b_1", "0_17"])
def test_underscores_in_numbers_are_read_as_the_go_program_did(number: str) -> None:
    value = int(number.replace("_", "").replace("017", "0o17"), 0)
    assert parse_config(selecting(f"{{vendor: {number}}}")).config.resources[0].devices[0].selector.vendor == value


@pytest.mark.parametrize("digits", ["1" * 500_000, "1." * 250_000, "1s" * 250_000])
def test_a_duration_of_half_a_million_digits_takes_no_time(digits: str) -> None:
    (problem,) = refused(f"resources: {{}}\nallocateTimeout: {digits}\n")
    assert "is not a valid duration" in problem
    assert len(problem) < 500


def test_tag_directives_that_take_the_square_of_their_number_are_refused() -> None:
    (problem,) = refused("".join(f"%TAG !a{n}! tag:x\n" for n in range(50_000)) + "--- {}\n")
    assert "%TAG" in problem
    assert parse_config("%TAG !e! tag:example.com,2000:\n---\nresources: {}\n").config.resources == ()


def peak(text: str) -> int:
    """Returns the most bytes in use while a text is read."""
    tracemalloc.start()
    try:
        with no_hang(), contextlib.suppress(ConfigError):
            parse_config(text)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    "text",
    [
        f"resources:\n  ? {'k' * 500_000}\n  :\n" + "    - {}\n" * 2_000,
        "resources:\n" + "".join(f"  ? {'k' * 900}{n}\n  : x\n" for n in range(1_000)),
        f"resources: {{a: {'x' * 900_000}}}\n",
        "a: &a [" + "x," * 1000 + "]\nresources: {" + ",".join(f"r{n}: *a" for n in range(45)) + "}",
    ],
    ids=["long key", "long keys", "long value", "aliases"],
)
def test_a_file_within_the_limit_takes_a_bounded_amount_of_memory(text: str) -> None:
    assert len(text) < MAX_FILE_BYTES
    assert peak(text) < MEMORY


def test_a_long_key_is_cut_in_every_message() -> None:
    problems = refused(f"resources:\n  ? {'k' * 100_000}\n  :\n" + "    - {}\n" * 200)
    assert len(problems) == MAX_PROBLEMS + 1
    assert problems[-1] == "config.yaml: and 301 more"  # 200 without target and selector, and the name itself
    assert max(map(len, problems)) < 500


def test_problems_beyond_the_limit_are_counted() -> None:
    problems = refused("resources:\n" + "".join(f"  'r {n}': []\n" for n in range(2000)))
    assert problems[-1] == f"config.yaml: and {2000 - MAX_PROBLEMS} more"


def test_warnings_beyond_the_limit_are_counted() -> None:
    warnings = parse_config("".join(f"x{n}: 1\n" for n in range(2000)) + "resources: {a: []}\n").warnings
    assert len(warnings) == MAX_PROBLEMS + 1
    assert warnings[-1] == f"config.yaml: and {2001 - MAX_PROBLEMS} more"


def test_a_misspelled_selector_is_an_error_however_much_else_is_wrong() -> None:
    text = "".join(f"x{n}: 1\n" for n in range(500)) + selecting('{vendor: "0951", prodcut: "1666"}')
    assert any(".selector.prodcut: unknown key" in problem for problem in refused(text))


@pytest.mark.parametrize(
    "text",
    [
        '"\\e[31m": 1\n',
        f"{BIDI}: 1\n",
        selecting(f"{{vendor: {BIDI}1}}"),
        selecting('{"\\n": 1, vendor: 1}'),
        "resources: {a: [{target: {host: h}}], '\\e': []}\n".replace("'", '"'),
        'resources: {a: {devices: [], containerPath: "\\e/x"}}\n',
        'log-level: "\\e[2J"\nresources: {}\n',
        "- *" + "a" * 300,
    ],
)
def test_control_characters_are_not_printed(text: str) -> None:
    configuration(text.encode())


def test_files_on_disk_are_bounded_before_they_are_read(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    with file.open("wb") as large:
        large.truncate(8 << 30)
    tracemalloc.start()
    try:
        with pytest.raises(ConfigError, match="larger than 1024 KiB"):
            load_config(file)
        assert tracemalloc.get_traced_memory()[1] < 16 * MIB
    finally:
        tracemalloc.stop()


ODD = st.sampled_from(
    [
        "",
        "~",
        "0x_",
        "0666",
        "1e3",
        "1e999",
        "-1",
        ".inf",
        "1_0",
        "true",
        "*",
        "[",
        "1-*",
        "/x/../y",
        "{serial}",
        "h:1",
        "9" * 30,
    ]
)
SCALARS = st.one_of(ODD, st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=6))
KEYS = st.sampled_from(
    [
        *("target", "selector", "extras", "host", "port", "vendor", "product", "bus_id", "serial", "class", "hostPath"),
        *(
            "usb_ids",
            "containerPath",
            "permissions",
            "devices",
            "onLoss",
            "cdi",
            "children",
            "duration",
            "<<",
            "Vendor",
        ),
        "vendro",
    ]
)


def almost(value: st.SearchStrategy[object]) -> st.SearchStrategy[object]:
    """Returns a strategy of mostly valid values."""
    return st.one_of(
        value, value, value, SCALARS, st.lists(SCALARS, max_size=2), st.dictionaries(KEYS, SCALARS, max_size=2)
    )


def mapping(**fields: st.SearchStrategy[object]) -> st.SearchStrategy[object]:
    return st.fixed_dictionaries({}, optional={name: almost(value) for name, value in fields.items()})


HEX = st.one_of(st.integers(0, 0xFFFF).map(lambda n: f"{n:04x}"), st.integers(0, 0xFFFF), ODD)
TARGET = mapping(host=st.sampled_from(["h", "10.0.0.1", "[fd00::1]"]), port=st.one_of(st.just(3240), st.integers()))
HEXES = st.one_of(HEX, st.lists(HEX, max_size=4))
BUS_ID = st.sampled_from(["1-1", "1-*", "?[!a"])
SELECTOR = mapping(
    vendor=HEXES,
    product=HEXES,
    usb_ids=st.lists(st.sampled_from(["0951:1666", "1050:0407", "0:1", "0951:166A"]), max_size=3),
    bus_id=st.one_of(BUS_ID, st.lists(BUS_ID, max_size=3)),
    serial=SCALARS,
    **{"class": HEX},
)
EXTRAS = st.lists(
    almost(mapping(hostPath=st.just("/dev/fuse"), containerPath=SCALARS, permissions=st.just("rw"))), max_size=2
)
DEVICES = st.lists(almost(mapping(target=TARGET, selector=SELECTOR, extras=EXTRAS)), max_size=3)
RESOURCE = st.one_of(
    DEVICES,
    mapping(
        devices=DEVICES,
        onLoss=st.sampled_from(["keep", "restart", "evict"]),
        evictAfter=st.sampled_from(["2m", 1, "25h"]),
        cdi=st.booleans(),
        children=st.lists(st.sampled_from(["tty", "block"]), max_size=2),
        containerPath=st.sampled_from(["/dev/{resource}", "/dev/{serial}/{x}", "{"]),
    ),
)
CONFIGURATIONS = mapping(
    resources=st.dictionaries(st.sampled_from(["a", "b", "A", "x y", ""]), almost(RESOURCE), max_size=3),
    lock=mapping(duration=st.sampled_from(["40s", "1m30s", 21, 3601, 1.5])),
    allocateTimeout=st.sampled_from(["500ms", 10, "1h"]),
    publishNodeStatus=st.booleans(),
    domain=SCALARS,
    listen=SCALARS,
)


@brief(200)
@given(CONFIGURATIONS, st.booleans())
def test_any_document_is_a_configuration_or_is_refused(value: object, flow: bool) -> None:
    configuration(yaml.safe_dump(value, default_flow_style=flow, allow_unicode=True).encode("utf-8", "surrogatepass"))


EXPORTS = mapping(
    export=st.lists(almost(SELECTOR), max_size=3),
    allow=st.lists(st.one_of(ODD, st.sampled_from(["10.0.0.0/8", "10.1.0.0/8", "fd00::/8", "::1"])), max_size=3),
    fence=st.booleans(),
    whenApiIsAway=st.sampled_from(["refuse", "serve", "Serve"]),
    names=st.lists(st.one_of(ODD, st.sampled_from(["pi.local", "[fd00::1]"])), max_size=3),
)


@brief(200)
@given(EXPORTS, st.booleans())
def test_any_document_is_an_export_configuration_or_is_refused(value: object, flow: bool) -> None:
    data = yaml.safe_dump(value, default_flow_style=flow, allow_unicode=True).encode("utf-8", "surrogatepass")
    export_configuration(data)
