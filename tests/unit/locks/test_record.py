"""The device of a lock, as read from its Lease."""

from __future__ import annotations

import ast
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from tests.rigs.vocabulary import KEY
from usbip_plugin.locks.record import (
    BUSID,
    FAILED_EPOCH,
    MAX_RELEASED_FROM,
    MAX_RELEASED_FROM_TEXT,
    OWN,
    RELEASED_FROM,
    SERVER,
    USB_ID,
    Lease,
    lock_of,
    released_from_of,
    released_from_text,
)
from usbip_plugin.model import DeviceKey, PodRef, ServerKey

ROOT = Path(__file__).parents[3]


def lease(key: DeviceKey = KEY, **notes: str) -> Lease:
    """Returns the lock Lease of a device. notes: annotations that differ from those of the device."""
    right = {SERVER: str(key.server), BUSID: key.busid, USB_ID: "0951:1666"}
    named = {"server": SERVER, "busid": BUSID, "usb_id": USB_ID}
    return Lease(name=key.id, annotations=right | {named[name]: text for name, text in notes.items()})


@pytest.mark.parametrize("text", ["lab", "lab:", "lab:x", "lab:0", "lab:65536", ":3240", ""])
def test_a_lock_with_an_invalid_server_has_no_device(text: str) -> None:
    assert lock_of(lease(server=text)).key is None


def test_a_lock_with_the_name_of_another_device_has_no_device() -> None:
    other = lock_of(lease(busid="9-9"))
    assert (other.key, other.busid) == (None, "9-9"), "the bus ID is still shown"
    assert lock_of(lease()).key == KEY


def test_an_ipv6_server_is_read_back_as_configured() -> None:
    six = DeviceKey(ServerKey("fd00::1", 3240), "1-1")
    assert lock_of(lease(six)).key == six


@pytest.mark.parametrize("text", ["", "0951", "951:1666", "0951:166g", "0951:1666:1"])
def test_an_invalid_usb_id_is_none(text: str) -> None:
    assert lock_of(lease(usb_id=text)).usb_id is None
    assert str(lock_of(lease()).usb_id) == "0951:1666"


@pytest.mark.parametrize(
    ("text", "epoch"), [("7", 7), ("", None), ("-1", None), ("7 ", None), ("\u0667", None), ("9" * 11, None)]
)
def test_only_a_short_number_is_the_epoch_of_a_failure(text: str, epoch: int | None) -> None:
    assert lock_of(Lease(name=KEY.id, annotations={FAILED_EPOCH: text})).failed_epoch == epoch


PODS = tuple(PodRef("ns", f"pod-{number}", "u" * 36) for number in range(12))


@pytest.mark.parametrize(
    ("text", "pods"),
    [
        ("ns/a/u,ns/b", (PodRef("ns", "a", "u"), PodRef("ns", "b"))),
        ("ns/a/u,,/,x", (PodRef("ns", "a", "u"),)),
        ("", ()),
        ("ns/a/u," * 200, ()),  # nobody wrote that
        (",".join(f"ns/{number}" for number in range(90)), tuple(PodRef("ns", str(n)) for n in range(82, 90))),
    ],
)
def test_the_pods_of_a_persons_release_are_read_one_by_one(text: str, pods: tuple[PodRef, ...]) -> None:
    assert lock_of(Lease(name=KEY.id, annotations={RELEASED_FROM: text})).released_from == pods


@pytest.mark.parametrize("long", [1, 200])
def test_the_latest_pods_of_a_persons_release_are_kept_in_a_value_of_bounded_length(long: int) -> None:
    pods = [replace(pod, name=pod.name + "x" * long) for pod in PODS]
    kept: list[PodRef] = []
    for pod in pods:
        text = released_from_text([*kept, pod])
        assert text is not None
        assert len(text) <= MAX_RELEASED_FROM_TEXT
        kept = list(released_from_of(text))
        assert kept[-1] == pod
    assert kept == pods[-len(kept) :]
    assert len(kept) == (MAX_RELEASED_FROM if long == 1 else 2)
    assert released_from_text([]) is None


def test_the_admission_policy_knows_every_key_that_the_plugin_writes() -> None:
    policy = next(yaml.safe_load_all((ROOT / "rbac/40-admission.yaml").read_text(encoding="utf-8")))
    (keys,) = [one["expression"] for one in policy["spec"]["variables"] if one["name"] == "keys"]
    later = {"usbip.dev/format", "usbip.dev/import-from"}  # a plugin of the next version may write them
    persons = {RELEASED_FROM}  # a node may keep it, but must not say what a person has done
    assert set(ast.literal_eval(" ".join(keys.split()))) == (OWN | later) - persons
