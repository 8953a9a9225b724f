"""The file format: files of the Go program stay valid, new keys work, and every error names its place."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from usbip_plugin.config import document
from usbip_plugin.config.parse import parse_config
from usbip_plugin.config.schema import (
    DEFAULT_ALLOW_EXTRAS,
    DeviceSelector,
    Extra,
    FileSettings,
    LockConfig,
    NodePermissions,
    OnLoss,
    ResourceConfig,
    Selector,
)
from usbip_plugin.errors import ConfigError
from usbip_plugin.model import ServerKey, UsbId

GO_PUBLISHED_EXAMPLE = """
resources:
  some-device:
    - target:
        host: usbip.example.com
        port: 3240
      selector:
        vendor: 0x1050
        product: 0x0407
  other-device:
    - target:
        host: usbip.example.com
        port: 3240
      selector:
        vendor: 0x20a0
        product: 0x4230
"""

KEYS = (
    *("resources", "target", "host", "port", "selector", "vendor", "bus_id", "serial", "class", "extras", "hostPath"),
    *("usb_ids", "permissions", "devices", "children", "containerPath", "onLoss", "cdi", "a", "b", "<<"),
    *("childrenTimeout", "byId", "mode", "user", "group", "readOnly", "allowClasses", "nodeNames"),
)


def problems_of(text: str) -> tuple[str, ...]:
    with pytest.raises(ConfigError) as caught:
        parse_config(text)
    return caught.value.problems


def one_selector(selector: str) -> str:
    return f"resources: {{a: [{{target: {{host: h}}, selector: {selector}}}]}}"


def one_target(target: str) -> str:
    return f"resources: {{a: [{{target: {target}, selector: {{vendor: 0x1}}}}]}}"


def one_extra(extra: str) -> str:
    return f"resources: {{a: [{{target: {{host: h}}, selector: {{vendor: 0x1}}, extras: [{extra}]}}]}}"


@pytest.fixture(params=["SafeLoader", "CSafeLoader"])
def yaml_loader(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, needs: Callable[[bool, str], None]
) -> None:
    """Selects each of PyYAML's parsers. The one in C is not on every machine and marks plain scalars differently."""
    needs(hasattr(yaml, request.param), "PyYAML with libyaml")
    monkeypatch.setattr(document, "_Loader", getattr(yaml, request.param))


def test_the_published_example_of_the_go_program_is_taken_without_a_warning(yaml_loader: None) -> None:
    parsed = parse_config(GO_PUBLISHED_EXAMPLE)
    server = ServerKey("usbip.example.com", 3240)
    assert parsed.warnings == ()
    assert parsed.config.resources == (
        ResourceConfig("some-device", (DeviceSelector(server, Selector(vendor=0x1050, product=0x0407)),)),
        ResourceConfig("other-device", (DeviceSelector(server, Selector(vendor=0x20A0, product=0x4230)),)),
    )
    assert parsed.config.servers() == {server}


def test_quoted_hexadecimal_numbers_and_extras_are_read(yaml_loader: None) -> None:
    parsed = parse_config("""
resources:
  storage:
    - target: {host: 10.20.30.40, port: 3240}
      selector: {vendor: "0951", product: '1666', bus_id: 1-1.4}
      extras: [{hostPath: /dev/fuse, containerPath: /dev/fuse, permissions: rw}]
""")
    assert parsed.warnings == ()
    (device,) = parsed.config.resources[0].devices
    assert device.selector == Selector(vendor=0x0951, product=0x1666, bus_id="1-1.4")
    assert device.extras == (Extra("/dev/fuse", "/dev/fuse", "rw"),)


@pytest.mark.parametrize("host", ["10", "10.20", "10.20.30.4000", "10.20.30.40.50", "0x0a.20", "[10.20]"])
def test_a_host_that_only_a_resolver_reads_as_an_address_is_refused(host: str) -> None:
    with pytest.raises(ConfigError, match=r"is not an IPv4 address; expected four numbers, such as 10\.20\.30\.40"):
        parse_config(f"resources: {{a: [{{target: {{host: '{host}'}}, selector: {{serial: 1}}}}]}}")


@pytest.mark.parametrize("path", ["/dev/mem", "/dev/sda", "/dev/fuse2", "/dev/snd/controlC0", "/proc/kcore"])
def test_who_edits_the_configuration_gives_no_other_device_node_of_the_host_to_pods(path: str) -> None:
    text = one_extra(f"{{hostPath: {path}, containerPath: /dev/fuse}}")
    with pytest.raises(ConfigError) as caught:
        parse_config(text, allow_extras=DEFAULT_ALLOW_EXTRAS)
    (problem,) = caught.value.problems
    assert problem.startswith(
        f"config.yaml:1: resources.a[0]: extras: {path} is not allowed (/dev/fuse, /dev/snd/timer); remove it, or"
    )
    assert parse_config(text, allow_extras=("/dev/fuse", path)).config == parse_config(text).config


def test_allowed_extras_are_patterns_of_whole_paths() -> None:
    text = one_extra("{hostPath: /dev/snd/seq}")
    assert parse_config(text, allow_extras=("/dev/snd/*",)).config.resources[0].devices[0].extras
    for patterns in ((), ("/dev/snd",), ("snd/*",), ("/dev/SND/*",)):
        with pytest.raises(ConfigError, match="/dev/snd/seq is not allowed"):
            parse_config(text, allow_extras=patterns)


def test_extras_with_underscores_and_any_case_of_keys_are_read_as_by_the_go_program() -> None:
    parsed = parse_config("""
Resources:
  a:
    - Target: {HOST: h, Port: 1}
      SELECTOR: {Vendor: 0x0001, BUS_ID: "1-1"}
      extras: [{host_path: /dev/a, Container_Path: /dev/b}]
""")
    assert parsed.warnings == ()
    assert parsed.config.resources[0].devices == (
        DeviceSelector(ServerKey("h", 1), Selector(vendor=1, bus_id="1-1"), (Extra("/dev/a", "/dev/b"),)),
    )


def test_on_loss_restart_needs_cdi() -> None:
    text = "resources: {a: {devices: [{target: {host: h}, selector: {all: true}}], onLoss: restart%s}}"
    (resource,) = parse_config(text % ", cdi: true").config.resources
    assert (resource.on_loss, resource.cdi) == (OnLoss.RESTART, True)
    for without in ("", ", cdi: false"):
        with pytest.raises(ConfigError, match=r"resources\.a\.onLoss.*restart needs cdi: true in the same resource"):
            parse_config(text % without)


def test_evict_after_needs_on_loss_evict() -> None:
    text = "resources: {a: {devices: [{target: {host: h}, selector: {all: true}}], evictAfter: %s}}"
    (resource,) = parse_config(text % "2m, onLoss: evict").config.resources
    assert (resource.on_loss, resource.evict_after) == (OnLoss.EVICT, 120.0)
    for without in ("2m", "2m, onLoss: keep"):
        with pytest.raises(ConfigError, match=r"resources\.a\.evictAfter.*needs onLoss: evict in the same resource"):
            parse_config(text % without)
    with pytest.raises(ConfigError, match=r"resources\.a\.evictAfter: 0 is out of range"):
        parse_config(text % "0, onLoss: evict")


def test_keys_that_the_go_program_does_not_have_are_read() -> None:
    parsed = parse_config("""
resources:
  scanner:
    devices:
      - target: {host: "[fe80::1]"}
        selector: {serial: 0042, class: hid, bus_id: "1-*"}
    onLoss: evict
    cdi: true
    children: [tty, hidraw]
    childrenTimeout: 2s
    containerPath: ["/dev/usb-{index}-{kind}", "/dev/by-model/{manufacturer}-{model}-{number}"]
    byId: true
    permissions: {mode: "0660", user: 0, group: 20}
    readOnly: true
    allowClasses: [vendor, hid, "08"]
    nodeNames: ["lab-*", rack7.example]
lock: {duration: 1m}
allocateTimeout: 2.5
publishNodeStatus: false
log-level: debug
plugin-directory: /plugins
""")
    assert parsed.warnings == ()
    config = parsed.config
    assert config.resources == (
        ResourceConfig(
            "scanner",
            (DeviceSelector(ServerKey("fe80::1"), Selector(serial="0042", class_=3, bus_id="1-*")),),
            on_loss=OnLoss.EVICT,
            cdi=True,
            children=("tty", "hidraw"),
            children_timeout=2.0,
            container_paths=("/dev/usb-{index}-{kind}", "/dev/by-model/{manufacturer}-{model}-{number}"),
            by_id=True,
            permissions=NodePermissions(0o660, 0, 20),
            read_only=True,
            allow_classes=(0x03, 0x08, 0xFF),
            node_names=("lab-*", "rack7.example"),
        ),
    )
    assert config.lock == LockConfig(60.0)
    assert config.allocate_timeout == 2.5
    assert config.publish_node_status is False
    assert config.settings == FileSettings(log_level="debug", plugin_directory="/plugins")


def test_all_problems_are_reported_at_once_by_line_each_with_its_place() -> None:
    problems = problems_of("""
resources:
  a:
    - target: {hst: h}
      selector: {vendor: "xyz"}
  b:
    - target: {host: h, port: 99999}
      selector: {vid: "0951", vendor: }
  c:
    - target: {host: h}
lock: {duration: 20s}
allocateTimeout: soon
""")
    assert [problem.split(": ")[:2] for problem in problems] == [
        ["config.yaml:4", "resources.a[0].target"],
        ["config.yaml:4", "resources.a[0].target.hst"],
        ["config.yaml:5", "resources.a[0].selector.vendor"],
        ["config.yaml:7", "resources.b[0].target.port"],
        ["config.yaml:8", "resources.b[0].selector.vid"],
        ["config.yaml:8", "resources.b[0].selector.vendor"],
        ["config.yaml:10", "resources.c[0]"],
        ["config.yaml:11", "lock.duration"],
        ["config.yaml:12", "allocateTimeout"],
    ]


@pytest.mark.parametrize(
    ("text", "readings"),
    [
        ("1666", ('"1666"', '"0682"')),
        ("0666", ('"0666"', '"01b6"')),  # octal to YAML
        ("0951", ('"0951"', '"03b7"')),  # not octal: a floating point number to yaml.v3
        ("1e3", ('"01e3"', '"03e8"')),
        ("0b11", ('"0b11"', '"0003"')),
    ],
)
def test_an_unquoted_number_with_two_readings_is_refused_with_both(
    text: str, readings: tuple[str, ...], yaml_loader: None
) -> None:
    (problem,) = problems_of(one_selector(f"{{vendor: {text}}}"))
    assert "resources.a[0].selector.vendor" in problem
    assert all(reading in problem for reading in readings)


@pytest.mark.parametrize(
    ("text", "value"), [("20a0", 0x20A0), ("abcd", 0xABCD), ("7", 7), ("0007", 7), ("0o17", 15), ("65535", 65535)]
)
def test_an_unquoted_number_with_one_reading_is_taken_with_a_warning(
    text: str, value: object, yaml_loader: None
) -> None:
    parsed = parse_config(one_selector(f"{{vendor: {text}}}"))
    assert parsed.config.resources[0].devices[0].selector.vendor == value
    assert len(parsed.warnings) == 1
    assert f'"{value:04x}"' in parsed.warnings[0]


@pytest.mark.parametrize(
    "text", ['"12345"', '""', '"g"', "-1", "0x10000", "99999", "1.5", "[]", "{a: 1}", '"0951 "', "true"]
)
def test_an_invalid_usb_id_is_refused(text: str) -> None:
    (problem,) = problems_of(one_selector(f"{{vendor: {text}}}"))
    assert problem.startswith("config.yaml:1: resources.a[0].selector.vendor: ")


@given(st.integers(0, 0xFFFF))
def test_every_id_in_quotes_or_with_0x_has_its_value(value: int) -> None:
    for text in (f'"{value:04x}"', f'"{value:04X}"', f"0x{value:04x}"):
        selector = parse_config(one_selector(f"{{vendor: {text}, product: 0x0001}}")).config.resources[0].devices[0]
        assert selector.selector.vendor == (value or None)


def test_zero_and_empty_match_any_device_as_in_the_go_program_with_a_warning() -> None:
    parsed = parse_config(one_selector('{vendor: 0x0951, product: 0x0000, bus_id: ""}'))
    assert parsed.config.resources[0].devices[0].selector == Selector(vendor=0x0951)
    assert ["remove the key" in warning for warning in parsed.warnings] == [True, True]


@pytest.mark.parametrize("selector", ["{}", "{vendor: 0, product: 0x0, bus_id: ''}", "{all: false}"])
def test_a_selector_without_a_condition_is_an_error_that_lists_the_keys(selector: str) -> None:
    (problem,) = problems_of(one_selector(selector))
    assert problem.startswith("config.yaml:1: resources.a[0].selector: the selector needs a condition (vendor, product")
    assert "write {all: true}" in problem


@pytest.mark.parametrize("entry", ["{target: {host: h}}", "{target: {host: h}, selector: }"])
def test_an_entry_without_a_selector_is_an_error(entry: str) -> None:
    (problem,) = problems_of(f"resources: {{a: [{entry}]}}")
    assert problem.startswith("config.yaml:1: resources.a[0]: selector is missing; it needs a condition (vendor")


@pytest.mark.parametrize("selector", ["{all: true}", "{ALL: true}"])
def test_every_device_of_a_server_is_selected_on_purpose(selector: str) -> None:
    assert selector_of(selector) == Selector()


@pytest.mark.parametrize(
    ("selector", "words"),
    [
        ("{all: true, vendor: 0x1}", "selector.all: selects every device of this server; remove it, or the other keys"),
        ("{all: yes}", "selector.all: expected true or false"),
        ("{all: }", "selector.all: has no value; add one, or remove the key"),
        ("{vendor: 0x1, serial: }", "selector.serial: has no value"),
        ("{vendor: 0x1, bus_id: ~}", "selector.bus_id: has no value"),
        ("{vendor: 0x1, <<: {product: null}}", "selector.product: has no value"),
        ("{vendor: 0x1, note: stick}", "selector.note: unknown key; expected one of vendor, product, usb_ids"),
        ("[{vendor: 0x1}]", "selector: expected a mapping (keys: vendor, product, usb_ids"),
    ],
)
def test_a_key_that_would_not_narrow_a_selector_is_an_error(selector: str, words: str) -> None:
    (problem,) = problems_of(one_selector(selector))
    assert words in problem


@pytest.mark.parametrize(
    ("key", "meant"),
    [
        ("vid", "vendor"),
        ("idVendor", "vendor"),
        ("ID_VENDOR_ID", "vendor"),
        ("pid", "product"),
        ("idProduct", "product"),
        ("ID_MODEL_ID", "product"),
        ("hardware-id", "usb_ids"),
        ("device_or_bus_id", "bus_id"),
        ("busids", "bus_id"),
        ("serialNumber", "serial"),
        ("ID_SERIAL_SHORT", "serial"),
        ("iSerial", "serial"),
        ("bInterfaceClass", "class"),
    ],
)
def test_a_key_of_another_tool_is_an_error_with_the_right_key_and_all_keys(key: str, meant: str) -> None:
    (problem,) = problems_of(one_selector(f'{{{key}: "0951"}}'))
    keys = "vendor, product, usb_ids, bus_id, serial, class, all"
    assert problem.endswith(f"selector.{key}: unknown key; did you mean {meant}? (keys: {keys})")


def test_a_condition_beside_the_selector_is_an_error() -> None:
    (problem,) = problems_of("resources: {a: [{target: {host: h}, selector: {vendor: 0x1}, bus_id: 1-1}]}")
    assert "resources.a[0].bus_id: unknown key; did you mean selector?" in problem


@pytest.mark.parametrize("written", ["5B1243T00000  ", "  5B1243T00000", "5B1243T00000\\t"])
def test_blanks_around_a_serial_number_are_removed_with_a_warning(written: str) -> None:
    parsed = parse_config(one_selector(f'{{serial: "{written}"}}'))
    assert parsed.config.resources[0].devices[0].selector == Selector(serial="5B1243T00000")
    (warning,) = parsed.warnings
    assert warning.endswith("resources.a[0].selector.serial: removed blanks at the ends: '5B1243T00000'")


def selector_of(text: str) -> Selector:
    parsed = parse_config(one_selector(text))
    assert parsed.warnings == ()
    return parsed.config.resources[0].devices[0].selector


def test_a_selector_may_have_lists_and_a_list_of_one_equals_its_value(yaml_loader: None) -> None:
    lists = '{vendor: ["1050", "0951"], product: [0x1, 0xa], usb_ids: ["1050:0407", 0951:1666], bus_id: ["2-*", 1-1]}'
    assert selector_of(lists) == Selector(
        vendor=(0x0951, 0x1050),
        product=(1, 0xA),
        usb_ids=(UsbId(0x0951, 0x1666), UsbId(0x1050, 0x0407)),
        bus_id=("1-1", "2-*"),
    )
    assert selector_of('{vendor: ["0951"], usb_ids: "1050:0407", bus_id: ["1-1"]}') == Selector(
        vendor=0x0951, usb_ids=(UsbId(0x1050, 0x0407),), bus_id="1-1"
    )


@pytest.mark.parametrize(
    ("text", "place", "words"),
    [
        ("{vendor: []}", "vendor", "empty list matches no device"),
        ("{usb_ids: []}", "usb_ids", "empty list matches no device"),
        ("{bus_id: []}", "bus_id", "empty list matches no device"),
        ('{vendor: ["0951", "951"]}', "vendor[1]", "duplicate value '951' (first on line 1)"),
        ('{usb_ids: ["0951:166a", "0951:166A"]}', "usb_ids[1]", "duplicate value"),
        ("{vendor: [0x1, 1666]}", "vendor[1]", "ambiguous"),
        ("{product: [0x1, 0]}", "product[1]", "0 matches any ID"),
        ("{vendor: [0x1, ~]}", "vendor[1]", "not a valid USB ID"),
        ("{vendor: [[0x1]]}", "vendor[0]", "not a valid USB ID"),
        ('{usb_ids: ["0951"]}', "usb_ids[0]", '"0951:1666"'),
        ('{usb_ids: ["951:1666"]}', "usb_ids[0]", '"0951:1666"'),
        ('{bus_id: ["1-1", ""]}', "bus_id[1]", "not a valid bus ID"),
        (f"{{vendor: [{', '.join(hex(n) for n in range(1, 66))}]}}", "vendor", "at most 64"),
        ('{usb_id: ["0951:1666"]}', "usb_id", "did you mean usb_ids?"),
    ],
)
def test_an_invalid_list_is_an_error_with_its_place_and_cure(text: str, place: str, words: str) -> None:
    (problem,) = problems_of(one_selector(text))
    assert problem.startswith(f"config.yaml:1: resources.a[0].selector.{place}: ")
    assert words in problem


@pytest.mark.parametrize(
    ("text", "place", "words"),
    [
        (one_target("{host: h, port: 0}"), "resources.a[0].target.port", "not a valid TCP port (1-65535)"),
        (one_target("{host: h, port: 65536}"), "resources.a[0].target.port", "not a valid TCP port (1-65535)"),
        (one_target("{host: h, port: usbip}"), "resources.a[0].target.port", "not a valid TCP port (1-65535)"),
        (one_target('{host: "lab:3240"}'), "resources.a[0].target.host", "write the port in target.port"),
        (one_target("{host: lab pc}"), "resources.a[0].target.host", "not a valid host name or address"),
        (one_target("{host: %s}" % ("h" * 254)), "resources.a[0].target.host", "not a valid host name or address"),
        (one_extra("{hostPath: dev/a}"), "resources.a[0].extras[0].hostPath", "not an absolute path"),
        (one_extra('{hostPath: "/dev/\\n"}'), "resources.a[0].extras[0].hostPath", "not an absolute path"),
        (one_extra("{hostPath: /%s}" % ("d" * 4096)), "resources.a[0].extras[0].hostPath", "not an absolute path"),
        (one_extra("{hostPath: /dev/../etc}"), "resources.a[0].extras[0].hostPath", "must not contain .."),
        (one_extra("{hostPath: /.., containerPath: /a}"), "resources.a[0].extras[0].hostPath", "must not contain .."),
        (one_extra("{hostPath: /a, containerPath: /a/..}"), "resources.a[0].extras[0].containerPath", "not contain .."),
        *(
            (
                one_extra(f"{{hostPath: /dev/a, permissions: {permissions}}}"),
                "resources.a[0].extras[0].permissions",
                "expected some of r, w and m",
            )
            for permissions in ("rr", "rwx", "rwmr", '""', "[r]")
        ),
        (
            one_selector("{class: hidd}"),
            "resources.a[0].selector.class",
            "expected 2 hex digits or one of audio, comm, cdc, hid",
        ),
        (
            one_selector("{class: [hid]}"),
            "resources.a[0].selector.class",
            "a list is not a valid USB class; expected 2 hex digits or one of",
        ),
        *(
            (one_selector(f'{{class: "{hub}"}}'), "resources.a[0].selector.class", "class 09 is a USB hub")
            for hub in ("09", "0x9", "9")
        ),
        (
            one_selector('{vendor: "12345"}'),
            "resources.a[0].selector.vendor",
            "'12345' is not a valid USB ID; expected up to 4 hex digits in quotes",
        ),
        (one_selector('{serial: ""}'), "resources.a[0].selector.serial", "1 to 126 printable characters"),
        (one_selector('{serial: "  "}'), "resources.a[0].selector.serial", "1 to 126 printable characters"),
        (one_selector('{serial: "a\\tb"}'), "resources.a[0].selector.serial", "1 to 126 printable characters"),
        (one_selector("{serial: %s}" % ("s" * 127)), "resources.a[0].selector.serial", "1 to 126 printable characters"),
        ("resources: {a: {devices: [], onLoss: wait}}", "resources.a.onLoss", "expected one of keep, restart, evict"),
        ("resources: {a/b: []}", "resources.a/b", "up to 63 letters, digits, '-', '_' or '.'"),
        ("resources: {}\nlock: {duration: 40.5}", "lock.duration", "whole seconds"),
        ("resources: {}\nlock: {duration: 20s}", "lock.duration", "21s to 3600s"),
        ("resources: {}\nlock: {duration: 3601s}", "lock.duration", "21s to 3600s"),
        ("resources: {}\nallocateTimeout: 0.5", "allocateTimeout", "1s to 120s"),
        ("resources: {}\nallocateTimeout: soon", "allocateTimeout", "'soon' is not a valid duration; expected seconds"),
        ("resources: {}\npublishNodeStatus: yes", "publishNodeStatus", "expected true or false, got 'yes'"),
        ("resources: {}\nlog-level: loud", "log-level", "expected one of all, debug, info, warn, error, none"),
        ("resources: {}\nlisten: []", "listen", "printable characters"),
    ],
)
def test_an_invalid_value_is_an_error_with_its_place_and_the_valid_values(text: str, place: str, words: str) -> None:
    (problem,) = problems_of(text)
    assert f": {place}: " in problem
    assert words in problem


@pytest.mark.parametrize(
    "text",
    [
        one_target("{host: h, port: 1}"),
        one_target("{host: h, port: 65535}"),
        one_target("{host: %s}" % ("h" * 253)),
        one_target('{host: "::1"}'),
        one_target('{host: "[::1]"}'),
        one_extra("{hostPath: /..a, containerPath: /a..}"),
        one_extra("{hostPath: /%s}" % ("d" * 4095)),
        one_extra("{hostPath: /dev/a, permissions: r}"),
        one_extra("{hostPath: /dev/a, permissions: mwr}"),
        one_selector("{class: HID}"),
        one_selector('{class: "ff"}'),
        one_selector("{serial: %s}" % ("s" * 126)),
        one_selector("{vendor: 0x1}") + "\nlock: {duration: 21}",
        one_selector("{vendor: 0x1}") + "\nlock: {duration: 60m}",
        one_selector("{vendor: 0x1}") + "\nallocateTimeout: 1s",
        one_selector("{vendor: 0x1}") + "\nallocateTimeout: 1m60s",
        *(one_selector("{vendor: 0x1}") + f"\nlog-level: {level}" for level in ("all", "warn", "none")),
    ],
)
def test_a_value_at_a_limit_is_accepted(text: str) -> None:
    assert parse_config(text).warnings == ()


def test_each_bus_id_of_a_list_counts_as_a_device() -> None:
    entry = "{target: {host: h%d}, selector: {bus_id: [" + ", ".join(f'"{n}-1"' for n in range(1, 65)) + "]}}"
    text = "resources: {a: [%s]}"
    assert parse_config(text % ", ".join(entry % n for n in range(16))).config.resources
    (problem,) = problems_of(text % ", ".join(entry % n for n in range(17)))
    assert "expected at most 1024 devices, got 1088" in problem


def test_the_text_of_a_selector_names_four_values_of_a_list() -> None:
    many = Selector(vendor=tuple(range(1, 65)), usb_ids=(UsbId(0x0951, 0x1666),), bus_id=("1-1", "1-2"))
    assert str(many) == "vendor 0001 or 0002 or 0003 or 0004 or 60 more, usb_ids 0951:1666, bus_id 1-1 or 1-2"


def test_an_unknown_key_of_the_old_format_is_ignored_with_a_warning() -> None:
    parsed = parse_config("comment: x\nresources: {a: [{target: {host: h}, selector: {vendor: 0x1}, note: stick}]}")
    assert len(parsed.warnings) == 2
    assert parsed.warnings[0].startswith("config.yaml:1: comment: ignored unknown key")
    assert parsed.warnings[1].startswith("config.yaml:2: resources.a[0].note: ignored unknown key")


@pytest.mark.parametrize(
    ("text", "meant"),
    [
        (one_selector("{vendr: 0x1}"), "vendor"),
        ("resources: {a: {devices: [], onLos: keep}}", "onLoss"),
        ("lock: {durations: 40}\n" + GO_PUBLISHED_EXAMPLE, "duration"),
    ],
)
def test_a_misspelt_key_is_an_error_that_names_the_right_one(text: str, meant: str) -> None:
    (problem,) = problems_of(text)
    assert f"did you mean {meant}?" in problem


def test_a_duplicate_key_is_an_error_in_any_case_of_letters() -> None:
    problems = problems_of("resources:\n  a: []\n  A: []\n")
    assert problems == ("config.yaml:3: resources.A: duplicate key (first defined on line 2)",)


def test_resource_names_that_differ_in_more_than_case_are_two() -> None:
    assert len(parse_config("resources: {a-b: [], a_b: [], a.b: []}").config.resources) == 3


@pytest.mark.parametrize("name", ["-a", "a/b", "a" * 64, '""', '"a b"'])
def test_a_resource_name_that_kubernetes_refuses_is_an_error(name: str) -> None:
    assert problems_of(f"resources: {{{name}: []}}")


def test_the_same_selector_twice_in_a_resource_is_an_error_and_overlap_between_resources_a_warning() -> None:
    entry = "{target: {host: h}, selector: {vendor: 0x1}}"
    (problem,) = problems_of(f"resources:\n  a:\n  - {entry}\n  - {entry}\n")
    assert problem == "config.yaml:4: resources.a[1]: same target and selector as resources.a[0] (line 3); remove one"
    parsed = parse_config(f"resources: {{a: [{entry}], b: [{entry}]}}")
    (warning,) = parsed.warnings
    assert warning.startswith("config.yaml:1: resources.b[0]: may select the same device as resources.a[0]")


@pytest.mark.parametrize("text", ["", "~", "# nothing\n", "a: 1", "resources:", "[]", "x"])
def test_a_file_without_a_resource_is_an_error(text: str) -> None:
    assert problems_of(text)


def test_an_empty_mapping_of_resources_is_accepted_with_a_warning() -> None:
    parsed = parse_config("resources: {}")
    assert parsed.config.resources == ()
    assert parsed.warnings == ("config.yaml:1: resources: no resources; the plugin offers nothing to the kubelet",)


@pytest.mark.parametrize(
    "text",
    [
        "[" * 100,
        "a: &a [*a]",
        "a: 1\n---\nb: 2",
        "? [a]\n: b",
        "a: [",
        "\ta: 1",
        "a: \x00",
        "a: \ud800",
        "x" * (document.MAX_FILE_BYTES + 1),
        "a: [" + "1," * (3 * document.MAX_NODES) + "1]",
        "\n".join(["a0: &a0 [x]"] + [f"a{n}: &a{n} [{','.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 12)]),
    ],
    ids=["nesting", "loop", "two", "key", "syntax", "tab", "nul", "surrogate", "size", "nodes", "bomb"],
)
def test_a_hostile_file_is_refused_at_little_cost(text: str, yaml_loader: None) -> None:
    assert problems_of(text)


def test_a_tab_is_an_error_with_a_cure(yaml_loader: None) -> None:
    (problem,) = problems_of("resources:\n\ta: []\n")
    assert problem.startswith("config.yaml:2: not valid YAML: ")
    assert "indent with spaces, not tabs" in problem


def test_lists_within_lists_are_read_down_to_the_deepest_level_allowed(yaml_loader: None) -> None:
    def nested(levels: int) -> str:
        return "resources: {}\nx: " + "[" * (levels - 1) + "]" * (levels - 1)  # the mapping itself is a level

    (warning,) = [one for one in parse_config(nested(document.MAX_DEPTH)).warnings if ": x: " in one]
    assert "unknown key" in warning
    assert problems_of(nested(document.MAX_DEPTH + 1)) == ("config.yaml:2: nested deeper than 16 levels",)


def test_merge_keys_are_resolved_and_explicit_keys_take_precedence() -> None:
    parsed = parse_config("""
resources:
  a:
    - target: &lab {host: lab, port: 3241}
      selector: {vendor: 0x1}
    - target: {<<: *lab, port: 3242}
      selector: {vendor: 0x1}
""")
    assert [device.target for device in parsed.config.resources[0].devices] == [
        ServerKey("lab", 3241),
        ServerKey("lab", 3242),
    ]


@settings(max_examples=150, deadline=None)
@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(KEYS), inner, max_size=4),
        max_leaves=12,
    )
)
def test_any_yaml_leads_to_a_config_error_or_a_configuration(value: object) -> None:
    text = yaml.safe_dump({"resources": value}) + "".join(f"{key}: 1s\n" for key in ("lock", "allocateTimeout"))
    with pytest.raises(ConfigError):  # lock is not a mapping here, so there is always an error
        parse_config(text)


def test_a_duplicate_and_a_misspelt_key_are_reported_at_once() -> None:
    same, missing, hint = problems_of("""
resources:
  a:
    - {target: {host: a}, selector: {vendor: 0x0951, product: 0x1666}}
    - {target: {host: a}, selector: {vendor: 0x0951, product: 0x1666}}
  b:
    - {target: {hots: a, port: 1}, selector: {all: true}}
""")
    assert same.startswith("config.yaml:5: resources.a[1]: same target and selector as resources.a[0] (line 4)")
    assert missing.startswith("config.yaml:7: resources.b[0].target: host is missing")
    assert "did you mean host?" in hint


@pytest.mark.parametrize(
    ("written", "host"),
    [("lab.lan.", "lab.lan"), ("lab.lan", "lab.lan"), ("10.0.0.1.", "10.0.0.1"), ("lab.", "lab."), ("lab", "lab")],
)
def test_a_name_with_and_without_the_dot_at_its_end_is_one_server(written: str, host: str) -> None:
    (server,) = parse_config(one_target(f"{{host: {written}}}")).config.servers()
    assert server.host == host
