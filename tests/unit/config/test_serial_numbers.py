"""A serial number is the same text in the configuration, in a probe and in the kernel's sysfs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from usbip_plugin.config.parse import parse_config
from usbip_plugin.usbip.identify import parse_string
from usbip_plugin.vhci.devices import read_attributes

ATTRIBUTES = {"idVendor": "0951", "idProduct": "1666", "devnum": "2", "authorized": "1", "dev": "189:1"}


@pytest.fixture(scope="module")
def sysfs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("1-1")
    for name, text in ATTRIBUTES.items():
        (made / name).write_text(f"{text}\n")
    return made


@given(st.from_regex(r"[ \t\u00a0\u3000]{0,3}[0-9A-Za-z ä]{0,20}[ \t\u00a0\0]{0,3}[x\0]?", fullmatch=True))
def test_configuration_probe_and_kernel_agree_on_a_serial_number(sysfs: Path, text: str) -> None:
    body = text.encode("utf-16-le")
    probed = parse_string(bytes([2 + len(body), 3]) + body)
    (sysfs / "serial").write_bytes(text.partition("\0")[0].encode() + b"\n")  # the kernel ends the text at a NUL
    attributes = read_attributes(sysfs)
    assert attributes is not None
    assert attributes.serial == probed
    if probed is not None and "\0" not in text:
        selector = f"{{serial: {json.dumps(text)}}}"
        (resource,) = parse_config(
            f"resources: {{a: [{{target: {{host: h}}, selector: {selector}}}]}}"
        ).config.resources
        assert resource.devices[0].selector.serial == probed
