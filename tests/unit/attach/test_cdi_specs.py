"""Specs of claims whose resource the configuration may not have any more."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.rigs.known_resources import KnownResources
from usbip_plugin.attach.cdi import CdiSpecs, HandedOut
from usbip_plugin.claims import Claim, ClaimState
from usbip_plugin.config.schema import ResourceConfig
from usbip_plugin.errors import CdiError
from usbip_plugin.model import Attachment, DeviceKey, DeviceNode, ServerKey, UsbId
from usbip_sim.kubelet.specs import MemorySpecs, resolve

DOMAIN = "usbip.dev"
KEY = DeviceKey(ServerKey("lab"), "1-1")
ID = UsbId(0x0403, 0x6001)
METER = ResourceConfig("meter", (), cdi=True, container_paths=("/dev/meter-{index}",))
CLAIM = Claim(KEY, ID, ClaimState.ATTACHED, resource="meter", container_indexes=(0,))


def attachment(number: int) -> Attachment:
    usb = DeviceNode(f"/dev/bus/usb/003/{number:03d}", "usb", block=False, major=189, minor=number)
    tty = DeviceNode(f"/dev/ttyUSB{number}", "tty", block=False, major=188, minor=number)
    return Attachment(KEY, 0, "3-1", ID, None, (usb, tty))


def paths(files: MemorySpecs, number: int = 0) -> dict[str, str]:
    """{path in the container: path on the host}"""
    got = resolve(files.texts.values(), [f"usbip.dev/meter={KEY.id}-{number}"])
    return {path: host for path, (host, _, _) in got.nodes.items()}


def specs(files: MemorySpecs, *resources: ResourceConfig) -> CdiSpecs:
    return CdiSpecs(files, DOMAIN, KnownResources(*resources))


def test_a_spec_follows_the_attachment_under_the_same_path_in_the_container() -> None:
    files = MemorySpecs(DOMAIN)
    specs(files, METER).write(CLAIM, attachment(1))
    specs(files, METER).write(CLAIM, attachment(2))
    assert paths(files)["/dev/meter-0"] == "/dev/ttyUSB2"
    assert specs(files).recall(KEY.id, None) == HandedOut("meter", (0,))
    assert specs(files).recall(KEY.id, "other") is None


def test_without_its_configuration_a_spec_stays_while_it_is_true() -> None:
    files = MemorySpecs(DOMAIN)
    specs(files, METER).write(CLAIM, attachment(1))
    specs(files).write(CLAIM, attachment(1))
    assert paths(files)["/dev/meter-0"] == "/dev/ttyUSB1"
    specs(files).write(replace(CLAIM, container_indexes=(0, 1)), attachment(1))
    assert paths(files, 1), "another number is another name"


def test_without_its_configuration_a_spec_that_became_a_lie_is_written_with_the_paths_of_the_host() -> None:
    files = MemorySpecs(DOMAIN)
    specs(files, METER).write(CLAIM, attachment(1))
    specs(files).write(CLAIM, attachment(2))
    assert paths(files) == {n.path: n.path for n in attachment(2).nodes}


def test_a_claim_that_was_not_handed_out_by_cdi_has_no_spec() -> None:
    files = MemorySpecs(DOMAIN)
    specs(files, METER).write(replace(CLAIM, container_indexes=()), attachment(1))
    assert not files.texts


def test_a_spec_that_is_true_is_not_written_again() -> None:
    """Nothing is to fail, or to be looked at by a runtime, for nothing."""
    files = MemorySpecs(DOMAIN)
    specs(files, METER).write(CLAIM, attachment(1))
    files.failing = 28
    specs(files, METER).write(CLAIM, attachment(1))
    with pytest.raises(CdiError, match="cannot write the CDI spec /var/run/cdi/usbip"):
        specs(files, METER).write(CLAIM, attachment(2))
