"""The configuration of the exporter: every key, and an error with its place for whatever is not valid."""

from __future__ import annotations

import ipaddress

import pytest

from usbip_plugin.config.export import (
    MAX_NAMES,
    MAX_NETWORKS,
    MAX_SELECTORS,
    ExportConfig,
    WhenApiIsAway,
    parse_export,
)
from usbip_plugin.config.schema import Selector
from usbip_plugin.errors import ConfigError


def problems_of(text: str) -> tuple[str, ...]:
    with pytest.raises(ConfigError) as caught:
        parse_export(text)
    return caught.value.problems


def test_every_key_is_read() -> None:
    parsed = parse_export("""
export:
  - {vendor: "0951", product: "1666"}
  - {bus_id: "1-1.*", class: printer}
  - {serial: A10K2V}
allow: ["192.168.0.0/16", "fd00::/8", "10.0.0.7"]
fence: true
whenApiIsAway: serve
names: [pi.local, "10.0.0.5", "[fd00::5]"]
""")
    assert parsed.warnings == ()
    assert parsed.config == ExportConfig(
        export=(
            Selector(vendor=0x0951, product=0x1666),
            Selector(bus_id="1-1.*", class_=7),
            Selector(serial="A10K2V"),
        ),
        allow=tuple(map(ipaddress.ip_network, ("192.168.0.0/16", "fd00::/8", "10.0.0.7"))),
        fence=True,
        when_api_is_away=WhenApiIsAway.SERVE,
        names=("pi.local", "10.0.0.5", "fd00::5"),
    )


def test_only_export_is_required_and_the_rest_serves_everybody_as_usbipd_does() -> None:
    parsed = parse_export("export: [{all: true}]")
    assert parsed.config == ExportConfig(export=(Selector(),))
    assert (parsed.config.allow, parsed.config.fence, parsed.config.when_api_is_away.value) == (None, False, "refuse")
    assert parsed.warnings == ()


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "export.yaml: empty file; add export, or write export: [] to export nothing"),
        ("fence: false", "export.yaml:1: export is missing; list selectors, or write export: [] to export nothing"),
        ("export: {vendor: '0951'}", "export.yaml:1: export: expected a list of selectors, got a mapping"),
        ("export: [{}]", "export.yaml:1: export[0]: the selector needs a condition"),
        (
            "export:\n- {vendor: '0951'}\n- {vendor: xyz}",
            "export.yaml:3: export[1].vendor: 'xyz' is not a valid USB ID",
        ),
        ("export: [{class: '09'}]", "export.yaml:1: export[0].class: class 09 is a USB hub"),
        ("export: [{all: true}, {all: true}]", "export[1]: same selector as export[0] (line 1); remove one"),
        ("export: []\nalow: []", "export.yaml:2: alow: unknown key; did you mean allow?"),
        ("export: []\nallow: all", "allow: expected a list of networks, got 'all'"),
        ("export: []\nallow: []", "allow: an empty list allows nobody; add a network, or remove the key"),
        (
            "export: []\nallow: [10.1.2.3/16]",
            "allow[0]: '10.1.2.3/16' is not a valid network; did you mean 10.1.0.0/16?",
        ),
        ("export: []\nallow: [lan]", "allow[0]: 'lan' is not a valid network; expected an address or a CIDR"),
        ("export: []\nfence: on", "fence: expected true or false, got 'on'"),
        (
            "export: []\nfence: true\nwhenApiIsAway: open",
            "whenApiIsAway: 'open' is not valid; expected one of refuse, serve",
        ),
        ("export: []\nfence: true\nnames: ['pi:3240']", "names[0]: pi:3240 contains a port"),
        (f"export: [{', '.join(['{all: true}'] * (MAX_SELECTORS + 1))}]", "expected at most 256 selectors, got 257"),
        (f"export: []\nallow: [{', '.join(['10.0.0.1'] * (MAX_NETWORKS + 1))}]", "expected at most 256 networks"),
        (f"export: []\nfence: true\nnames: [{', '.join(['pi'] * (MAX_NAMES + 1))}]", "expected at most 64 names"),
        ("export: [", "not valid YAML"),
    ],
)
def test_whatever_is_not_valid_is_an_error_with_its_place(text: str, problem: str) -> None:
    assert any(problem in found for found in problems_of(text)), problems_of(text)


@pytest.mark.parametrize(
    ("text", "warning"),
    [
        ("export: []", "export.yaml:1: export: empty list; no device is exported"),
        ("export: [{all: true}]\nnames: [pi]", "export.yaml:2: names: has no effect without fence: true"),
        ("export: [{all: true}]\nwhenApiIsAway: serve", "whenApiIsAway: has no effect without fence: true"),
    ],
)
def test_what_has_no_effect_is_a_warning(text: str, warning: str) -> None:
    assert any(warning in found for found in parse_export(text).warnings)
