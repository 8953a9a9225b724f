"""What a container gets for its devices."""

import pytest

from usbip_plugin.attach.containers import DeviceSpec, injected
from usbip_plugin.config.schema import DeviceSelector, Extra, ResourceConfig
from usbip_plugin.kubelet.allocate import container_response
from usbip_plugin.model import Attachment, DeviceKey, DeviceNode, ServerKey, UsbId

DOMAIN = "usbip.dev"
LAB = ServerKey("lab", 3240)
ID = UsbId(0x0403, 0x6001)
FUSE = Extra("/dev/fuse", "/dev/fuse", "rw")


def device(
    busid: str, number: int, *children: DeviceNode, serial: str | None = None
) -> tuple[DeviceSelector, Attachment]:
    key = DeviceKey(LAB, busid)
    usb = DeviceNode(f"/dev/bus/usb/003/{number:03d}", "usb", block=False, major=189, minor=number)
    return DeviceSelector(LAB, extras=(FUSE,)), Attachment(key, number, "3-1", ID, serial, (usb, *children))


def tty(number: int) -> DeviceNode:
    return DeviceNode(f"/dev/ttyUSB{number}", "tty", block=False, major=188, minor=number)


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
        "USBIP_METER_0_VENDOR": "0403",
        "USBIP_METER_0_PRODUCT": "6001",
    }


def test_extras_of_several_devices_come_once_and_each_device_has_its_number() -> None:
    answer = container_response(ResourceConfig("my-meter", ()), DOMAIN, [device("1-1", 2), device("1-2", 3)])
    assert [spec.host_path for spec in answer.devices].count("/dev/fuse") == 1
    assert answer.envs["USBIP_MY_METER_0_BUSID"] == "1-1"
    assert answer.envs["USBIP_MY_METER_1_BUSID"] == "1-2"


@pytest.mark.parametrize(("children", "paths"), [((), ["usb"]), (("tty",), ["usb", "tty"]), (("block",), ["usb"])])
def test_only_the_children_asked_for_come_along(children: tuple[str, ...], paths: list[str]) -> None:
    answer = container_response(ResourceConfig("meter", (), children=children), DOMAIN, [device("1-1", 2, tty(0))])
    kinds = {"/dev/bus/usb/003/002": "usb", "/dev/ttyUSB0": "tty"}
    assert [kinds[s.host_path] for s in answer.devices if s.host_path in kinds] == paths
    assert ("USBIP_METER_0_TTY" in answer.envs) == ("tty" in paths)


def test_a_container_path_names_the_node_people_mean_in_devices_and_environment() -> None:
    resource = ResourceConfig("meter", (), container_paths=("/dev/meter-{index}",))
    answer = container_response(resource, DOMAIN, [device("1-1", 2, tty(0)), device("1-2", 3, tty(1))])
    assert DeviceSpec("/dev/ttyUSB0", "/dev/meter-0") in answer.devices
    assert DeviceSpec("/dev/ttyUSB1", "/dev/meter-1") in answer.devices
    assert answer.envs["USBIP_METER_1_TTY"] == "/dev/meter-1"


def test_a_template_that_tells_nodes_apart_names_them_all() -> None:
    resource = ResourceConfig("meter", (), container_paths=("/dev/meter-{index}-{kind}",))
    answer = container_response(resource, DOMAIN, [device("1-1", 2, tty(0))])
    assert {s.container_path for s in answer.devices} == {"/dev/meter-0-usb", "/dev/meter-0-tty", "/dev/fuse"}
    assert answer.envs["USBIP_METER_0_DEVICE"] == "/dev/meter-0-usb"


def test_by_cdi_the_answer_has_names_and_extras_and_nothing_that_a_reattach_makes_wrong() -> None:
    resource = ResourceConfig("meter", (), cdi=True)
    devices = [device("1-1", 2, tty(0)), device("1-2", 3, tty(1))]
    answer = container_response(resource, DOMAIN, devices)
    assert answer.cdi_devices == tuple(f"usbip.dev/meter={a.key.id}-{n}" for n, (_, a) in enumerate(devices))
    assert answer.devices == (DeviceSpec("/dev/fuse", "/dev/fuse", "rw"),)
    assert answer.envs == {}


def test_by_cdi_the_spec_has_the_same_nodes_and_environment_as_an_answer_without() -> None:
    resource = ResourceConfig("meter", (), container_paths=("/dev/meter-{index}",), children=("tty",))
    selector, attachment = device("1-1", 2, tty(0), serial="A1")
    plain = container_response(resource, DOMAIN, [device("1-9", 9), (selector, attachment)])
    made = injected(resource, 1, attachment)
    paths = {node.path for node in attachment.nodes}
    assert [spec for spec, _ in made.nodes] == [s for s in plain.devices if s.host_path in paths]
    assert [node for _, node in made.nodes] == list(attachment.nodes)
    assert made.envs == {name: value for name, value in plain.envs.items() if name.startswith("USBIP_METER_1_")}
