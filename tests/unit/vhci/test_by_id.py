"""The by-id names that udev makes of the strings of a device."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from usbip_plugin.vhci import devices

hostile = st.text(max_size=126) | st.text(alphabet="./\\\n\t \0é\u202e%{}", max_size=126)


@given(hostile, hostile, hostile, st.integers(0, 255), st.none() | st.integers(0, 15))
def test_a_link_is_one_file_in_its_directory_for_any_strings_of_a_device(
    vendor: str, model: str, serial: str, interface: int, port: int | None
) -> None:
    name = devices.serial_name(vendor, model, serial)
    for link, folder in (
        (devices.serial_link(name, interface, port), "/dev/serial/by-id/"),
        (devices.link("input", f"{name}-if{interface:02x}-hidraw"), "/dev/input/by-id/"),
        (devices.link("disk", f"{name}-part3"), "/dev/disk/by-id/"),
        (devices.link("v4l", f"{name}-video-index0"), "/dev/v4l/by-id/"),
        (devices.link("snd", f"{name}-{interface:02x}"), "/dev/snd/by-id/"),
        (devices.input_link(name, interface, "event3", "kbd"), "/dev/input/by-id/"),
    ):
        if link:
            assert link.startswith(folder + "usb-")
            file = link.removeprefix(folder)
            assert "/" not in file
            assert file.isprintable()
            assert not any(c.isspace() for c in file)
            assert len(file.encode()) <= devices.MAX_NAME


@pytest.mark.parametrize(
    ("vendor", "model", "serial", "name"),
    [
        ("FTDI", "FT232R USB UART", "A50285BI", "FTDI_FT232R_USB_UART_A50285BI"),
        ("  two   words\t", "a/b", "", "two_words_a_b"),
        ("Ma ker", "Composite é", "GAD/GET 1", "Ma_ker_Composite_é_GAD_GET_1"),
        ("x" * 100, "y", "", "x" * 63 + "_y"),
        ("v", "m", "with,comma", "v_m"),
        ("v", "m", "naïve", "v_m"),
    ],
)
def test_strings_become_names_as_udev_makes_them(vendor: str, model: str, serial: str, name: str) -> None:
    assert devices.serial_name(vendor, model, serial) == name


@pytest.mark.parametrize(
    ("key", "rel", "abs_", "what"),
    [
        ("1000000000007 ff9f207ac14057ff febeffdfffefffff fffffffffffffffe", "0", "0", "kbd"),
        ("70000 0 0 0 0", "103", "0", "mouse"),
        ("70000 0 0 0 0", "100", "3", "mouse"),  # QEMU's tablet
        ("ffff00000000 0 0 0 0", "0", "3003f", "joystick"),
        ("3e000a00000000 0", "0", "0", ""),
        ("not a bitmap", "", "", ""),
    ],
)
def test_the_class_of_an_input_device_follows_from_its_capabilities(key: str, rel: str, abs_: str, what: str) -> None:
    assert devices.input_class({"key": key, "rel": rel, "abs": abs_}) == what


def test_a_name_that_is_too_long_for_a_file_gives_no_link() -> None:
    assert devices.serial_link("é" * 200, 0, 0) == ""
