"""The answer to an Allocate, and the choice of devices that a node prefers."""

from dataclasses import replace

import pytest

from tests.rigs.vocabulary import LAB, USB_NODE, attachment, tty
from usbip_plugin.attach.containers import DeviceSpec, injected
from usbip_plugin.config.schema import DeviceSelector, Extra, ResourceConfig
from usbip_plugin.errors import UnknownDevice
from usbip_plugin.kubelet.allocate import container_response, preferred
from usbip_plugin.model import Attachment, DeviceKey, DeviceNode, Health, Reason

DOMAIN = "usbip.dev"
FUSE = Extra("/dev/fuse", "/dev/fuse", "rw")


def device(
    busid: str, number: int, *children: DeviceNode, serial: str | None = None
) -> tuple[DeviceSelector, Attachment]:
    usb = replace(USB_NODE, path=f"/dev/bus/usb/003/{number:03d}", minor=number)
    return DeviceSelector(LAB, extras=(FUSE,)), attachment(usb, *children, key=DeviceKey(LAB, busid), serial=serial)


def test_a_container_gets_the_usb_node_the_children_and_the_extras() -> None:
    answer = container_response(ResourceConfig("meter", ()), DOMAIN, [device("1-1", 2, tty(0), serial="A1")])
    assert answer.devices == (
        DeviceSpec("/dev/bus/usb/003/002", "/dev/bus/usb/003/002"),
        DeviceSpec("/dev/ttyUSB0", "/dev/ttyUSB0"),
        DeviceSpec("/dev/fuse", "/dev/fuse", "rw"),
    )
    assert answer.envs == {
        "USBIP_METER_0_DEVICE": "/dev/bus/usb/003/002",
        "USBIP_METER_0_TTY": "/dev/ttyUSB0",
        "USBIP_METER_0_BUSID": "1-1",
        "USBIP_METER_0_SERIAL": "A1",
        "USBIP_METER_0_VENDOR": "0951",
        "USBIP_METER_0_PRODUCT": "1666",
    }


def test_an_extra_of_several_devices_is_given_once_and_each_device_has_its_number() -> None:
    answer = container_response(ResourceConfig("my-meter", ()), DOMAIN, [device("1-1", 2), device("1-2", 3)])
    assert [spec.host_path for spec in answer.devices].count("/dev/fuse") == 1
    assert answer.envs["USBIP_MY_METER_0_BUSID"] == "1-1"
    assert answer.envs["USBIP_MY_METER_1_BUSID"] == "1-2"


def test_with_cdi_the_answer_has_names_and_extras_and_nothing_that_a_re_attach_changes() -> None:
    resource = ResourceConfig("meter", (), cdi=True)
    devices = [device("1-1", 2, tty(0)), device("1-2", 3, tty(1))]
    answer = container_response(resource, DOMAIN, devices)
    assert answer.cdi_devices == tuple(f"usbip.dev/meter={a.key.id}-{n}" for n, (_, a) in enumerate(devices))
    assert answer.devices == (DeviceSpec("/dev/fuse", "/dev/fuse", "rw"),)
    assert answer.envs == {}


def test_a_cdi_spec_has_the_nodes_and_the_environment_of_an_answer_without_cdi() -> None:
    resource = ResourceConfig("meter", (), container_paths=("/dev/meter-{index}",), children=("tty",))
    selector, attached = device("1-1", 2, tty(0), serial="A1")
    plain = container_response(resource, DOMAIN, [device("1-9", 9), (selector, attached)])
    made = injected(resource, 1, attached)
    paths = {node.path for node in attached.nodes}
    assert [spec for spec, _ in made.nodes] == [s for s in plain.devices if s.host_path in paths]
    assert [node for _, node in made.nodes] == list(attached.nodes)
    assert made.envs == {name: value for name, value in plain.envs.items() if name.startswith("USBIP_METER_1_")}


def test_required_devices_are_preferred_to_attached_ones_and_those_to_healthy_ones() -> None:
    health = {
        "a": Health(Reason.FREE),
        "b": Health(Reason.ATTACHED),
        "c": Health(Reason.NOT_LISTED),
        "d": Health(Reason.FREE),
    }
    assert preferred(["a", "b", "c"], ["c"], 2, "node-a", health) == ("c", "b")
    assert set(preferred(["a", "b", "c", "d"], [], 3, "node-a", health)) == {"a", "b", "d"}
    assert preferred(["a", "b"], [], 3, "node-a", health) in {("b", "a"), ("a", "b")}, "all there are"
    assert preferred(["b", "d"], [], 1, "node-a", health, unwanted={"b"}) == ("d",), (
        "an unwanted device would be refused"
    )


@pytest.mark.parametrize(
    ("must", "size", "words"),
    [
        (["c"], 1, "required devices are not available: c"),
        (["a", "b"], 1, "expected at most 1 required devices, got 2"),
    ],
)
def test_an_impossible_choice_is_refused_with_its_reason(must: list[str], size: int, words: str) -> None:
    with pytest.raises(UnknownDevice, match=words):
        preferred(["a", "b"], must, size, "node-a", {})


def test_nodes_prefer_different_devices_and_a_node_always_the_same_one() -> None:
    health = {f"d{i}": Health(Reason.FREE) for i in range(16)}
    first = {f"node-{n}": preferred(health, [], 1, f"node-{n}", health)[0] for n in range(16)}
    assert len(set(first.values())) > 4
    assert first == {node: preferred(reversed(list(health)), [], 1, node, health)[0] for node in first}
