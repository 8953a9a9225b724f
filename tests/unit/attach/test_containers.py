"""The paths, environment and permissions of the device nodes in a container."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from usbip_plugin.attach.cdi import spec
from usbip_plugin.attach.containers import Injected, check_paths, environment, injected, place, refuse_shared_paths
from usbip_plugin.config.schema import DeviceSelector, NodePermissions, ResourceConfig
from usbip_plugin.errors import PathTaken
from usbip_plugin.kubelet.allocate import container_response
from usbip_plugin.model import Attachment, DeviceKey, DeviceNode, ServerKey, UsbId

LAB = ServerKey("lab")
USB = DeviceNode("/dev/bus/usb/003/002", "usb", False, 189, 257)
BY_ID = "/dev/serial/by-id/usb-FTDI_UART_A1-if00-port0"


def node(path: str, kind: str, interface: int = 0, partition: int = 0, by_id: str = "") -> DeviceNode:
    return DeviceNode(path, kind, kind == "block", 7, abs(hash(path)) % 1000, interface, partition, by_id)


TTYS = (node("/dev/ttyUSB0", "tty", by_id=BY_ID), node("/dev/ttyUSB1", "tty", 1), node("/dev/ttyUSB2", "tty", 2))
DISK = (node("/dev/sda", "block"), node("/dev/sda1", "block", partition=1), node("/dev/sda2", "block", partition=2))
WEBCAM = (
    node("/dev/snd/controlC1", "sound", 2),
    node("/dev/snd/pcmC1D0c", "sound", 2),
    node("/dev/video0", "video4linux"),
    node("/dev/video1", "video4linux"),
)
KEYBOARD = (node("/dev/hidraw0", "hidraw"), node("/dev/input/event1", "input"))


def attachment(*children: DeviceNode, busid: str = "1-1", serial: str | None = "A1") -> Attachment:
    return Attachment(
        DeviceKey(LAB, busid), 0, "3-1", UsbId(0x0403, 0x6001), serial, (USB, *children), "FTDI", "USB UART"
    )


def meter(
    *templates: str, children: tuple[str, ...] | None = None, by_id: bool = False, read_only: bool = False
) -> ResourceConfig:
    return ResourceConfig("meter", (), children=children, container_paths=templates, by_id=by_id, read_only=read_only)


def paths(resource: ResourceConfig, *children: DeviceNode, index: int = 0) -> dict[str, tuple[str, ...]]:
    return {one.node.path: one.paths for one in place(resource, index, attachment(*children))}


class TestPaths:
    def test_without_a_template_nodes_have_the_paths_of_the_host(self) -> None:
        assert paths(meter(), *TTYS[:1]) == {USB.path: (USB.path,), "/dev/ttyUSB0": ("/dev/ttyUSB0",)}

    def test_a_plain_template_names_the_main_node(self) -> None:
        found = paths(meter("/dev/cam{index}"), *WEBCAM, index=2)
        assert found["/dev/video0"] == ("/dev/cam2",)
        assert found["/dev/snd/controlC1"] == ("/dev/snd/controlC1",)
        assert paths(meter("/dev/key", children=("input", "hidraw")), *KEYBOARD)["/dev/input/event1"] == ("/dev/key",)
        assert paths(meter("/dev/key"), *KEYBOARD)["/dev/hidraw0"] == ("/dev/key",)
        assert paths(meter("/dev/key")) == {USB.path: ("/dev/key",)}

    def test_partitions_are_named_after_their_disk(self) -> None:
        assert paths(meter("/dev/stick{index}"), *DISK) == {
            USB.path: (USB.path,),
            "/dev/sda": ("/dev/stick0",),
            "/dev/sda1": ("/dev/stick0p1",),
            "/dev/sda2": ("/dev/stick0p2",),
        }
        assert paths(meter("/dev/stick"), *DISK)["/dev/sda2"] == ("/dev/stick2",)

    def test_a_template_with_number_names_the_children_in_turn(self) -> None:
        found = paths(meter("/dev/modem{number}"), *TTYS)
        assert found == {
            USB.path: (USB.path,),
            **{f"/dev/ttyUSB{number}": (f"/dev/modem{number}",) for number in range(3)},
        }

    def test_a_template_with_kind_names_the_usb_node_too(self) -> None:
        found = paths(meter("/dev/m/{kind}-{interface}-{number}"), *KEYBOARD)
        assert found[USB.path] == ("/dev/m/usb---0",)
        assert found["/dev/input/event1"] == ("/dev/m/input-00-0",)

    def test_a_node_has_every_path_of_a_list_and_its_by_id_name(self) -> None:
        resource = meter("/dev/meter", "/dev/by-model/{manufacturer}/{model}-{vendor}-{product}", by_id=True)
        assert paths(resource, *TTYS[:2]) == {
            USB.path: (USB.path,),
            "/dev/ttyUSB0": ("/dev/meter", "/dev/by-model/FTDI/USB-UART-0403-6001", BY_ID),
            "/dev/ttyUSB1": ("/dev/ttyUSB1",),
        }
        assert paths(meter(by_id=True), *TTYS[:1])["/dev/ttyUSB0"] == ("/dev/ttyUSB0", BY_ID)

    def test_a_by_id_name_is_given_once_within_a_device(self) -> None:
        found = paths(meter(by_id=True), TTYS[0], replace(TTYS[1], by_id=BY_ID))
        assert [BY_ID in names for names in found.values()] == [False, True, False]

    def test_a_node_of_another_kind_takes_no_path_from_the_usual_kinds(self) -> None:
        webcam = (node("/dev/media0", "media"), node("/dev/video0", "video4linux"))
        assert paths(meter("/dev/cam{number}"), *webcam) == {
            USB.path: (USB.path,),
            "/dev/media0": ("/dev/media0",),
            "/dev/video0": ("/dev/cam0",),
        }
        assert paths(meter("/dev/cam/{kind}{number}"), *webcam)["/dev/media0"] == ("/dev/cam/media0",)
        both = meter("/dev/cam{number}", children=("media", "video4linux"))
        with pytest.raises(PathTaken):
            check_paths(both, [attachment(*webcam)])

    def test_a_node_of_another_kind_is_the_main_node_only_if_children_names_it(self) -> None:
        writer = (node("/dev/bsg/6:0:0:0", "bsg"), node("/dev/sg2", "scsi_generic"), node("/dev/sr0", "block"))
        assert paths(meter("/dev/burner"), *writer)["/dev/sr0"] == ("/dev/burner",)
        assert paths(meter("/dev/burner"), *writer[:2])[USB.path] == ("/dev/burner",)
        of_sg = paths(meter("/dev/burner", children=("scsi_generic", "block")), *writer)
        assert of_sg == {USB.path: (USB.path,), "/dev/sg2": ("/dev/burner",), "/dev/sr0": ("/dev/sr0",)}

    def test_only_children_of_the_configured_kinds_are_included(self) -> None:
        assert paths(meter(children=("video4linux",)), *WEBCAM).keys() == {USB.path, "/dev/video0", "/dev/video1"}
        printer = node("/dev/usb/lp0", "printer")
        assert "/dev/usb/lp0" in paths(meter(children=("usbmisc",)), printer)
        assert "/dev/usb/lp0" in paths(meter(children=("printer",)), printer)


class TestCollisions:
    def test_one_path_for_two_devices_is_refused_with_a_cure(self) -> None:
        with pytest.raises(PathTaken, match=r"/dev/meter is the same for 2 devices.*use \{index\}, \{serial\}"):
            refuse_shared_paths(meter("/dev/meter-{index}", "/dev/meter"), 2)
        refuse_shared_paths(meter("/dev/meter"), 1)
        refuse_shared_paths(meter("/dev/meter-{index}"), 2)

    def test_a_path_that_two_attached_devices_share_is_refused(self) -> None:
        twins = [attachment(TTYS[0]), attachment(TTYS[1], busid="1-2")]
        check_paths(meter("/dev/meter-{busid}"), twins)
        with pytest.raises(
            PathTaken, match=r"ttyUSB0 and /dev/ttyUSB1 .* have the path /dev/meter-A1; use \{index\} in"
        ):
            check_paths(meter("/dev/meter-{serial}"), twins)

    def test_one_path_for_two_nodes_of_a_device_is_refused(self) -> None:
        with pytest.raises(PathTaken, match=r"the path /dev/key0; use \{kind\} and \{number\} in"):
            check_paths(meter("/dev/key{number}"), [attachment(*KEYBOARD)])
        check_paths(meter("/dev/{kind}{number}"), [attachment(*KEYBOARD)])

    def test_one_by_id_name_for_two_devices_is_refused(self) -> None:
        twins = [attachment(TTYS[0]), attachment(replace(TTYS[1], by_id=BY_ID), busid="1-2")]
        with pytest.raises(PathTaken, match="; omit byId"):
            check_paths(meter(by_id=True), twins)

    @given(
        st.lists(st.sampled_from(["/dev/a", "/dev/{index}", "/dev/{kind}{number}", "/dev/{name}"]), max_size=3),
        st.lists(st.sampled_from([TTYS, DISK, WEBCAM, KEYBOARD, ()]), max_size=3),
    )
    def test_nodes_that_pass_the_check_have_distinct_paths(
        self, templates: list[str], devices: list[tuple[DeviceNode, ...]]
    ) -> None:
        resource = meter(*dict.fromkeys(templates))
        attachments = [
            replace(
                attachment(*(replace(n, path=f"{n.path}{i}") for n in children), busid=f"1-{i}"),
                nodes=(replace(USB, path=f"{USB.path}{i}"), *(replace(n, path=f"{n.path}-{i}") for n in children)),
            )
            for i, children in enumerate(devices)
        ]
        try:
            check_paths(resource, attachments)
        except PathTaken:
            return
        answer = container_response(resource, "usbip.dev", [(DeviceSelector(LAB), one) for one in attachments])
        assert {s.host_path for s in answer.devices} == {n.path for one in attachments for n in one.nodes}


class TestEnvironment:
    def env(self, resource: ResourceConfig, *children: DeviceNode) -> dict[str, str]:
        return environment(resource.name, 1, attachment(*children), place(resource, 1, attachment(*children)))

    def test_every_node_is_named_by_its_kind_and_number(self) -> None:
        env = self.env(meter(), *TTYS, *WEBCAM, *DISK[:2], *KEYBOARD, node("/dev/usb/lp0", "printer"))
        assert {name.removeprefix("USBIP_METER_1_"): value for name, value in env.items()} == {
            "DEVICE": USB.path,
            "BUSID": "1-1",
            "SERIAL": "A1",
            "VENDOR": "0403",
            "PRODUCT": "6001",
            "TTY": "/dev/ttyUSB0",
            "TTY_1": "/dev/ttyUSB1",
            "TTY_2": "/dev/ttyUSB2",
            "SOUND": "/dev/snd/controlC1",
            "SOUND_1": "/dev/snd/pcmC1D0c",
            "VIDEO": "/dev/video0",
            "VIDEO_1": "/dev/video1",
            "BLOCK": "/dev/sda",
            "BLOCK_1": "/dev/sda1",
            "HIDRAW": "/dev/hidraw0",
            "INPUT": "/dev/input/event1",
            "PRINTER": "/dev/usb/lp0",
        }

    def test_a_node_of_another_kind_is_known_by_its_subsystem(self) -> None:
        others = [
            ("/dev/sg2", "scsi_generic"),
            ("/dev/i2c-7", "i2c-dev"),
            ("/dev/i2c-8", "i2c_dev"),
            ("/dev/s", "serial"),
        ]
        env = self.env(meter(), *(node(path, kind) for path, kind in others))
        assert (env["USBIP_METER_1_SCSI_GENERIC"], env["USBIP_METER_1_I2C_DEV"]) == ("/dev/sg2", "/dev/i2c-7")
        assert env["USBIP_METER_1_I2C_DEV_1"] == "/dev/i2c-8"
        assert env["USBIP_METER_1_SERIAL"] == "A1", "the variables of the device itself stay"

    def test_variables_have_the_paths_in_the_container(self) -> None:
        env = self.env(meter("/dev/m{index}", children=("tty",)), *TTYS[:1], *KEYBOARD)
        assert env["USBIP_METER_1_TTY"] == "/dev/m1"
        assert not any(name.endswith(("HIDRAW", "INPUT")) for name in env)

    @given(st.from_regex(r"[a-z0-9]([a-z0-9._-]{0,61}[a-z0-9])?", fullmatch=True))
    def test_names_are_valid_for_every_resource(self, name: str) -> None:
        env = self.env(ResourceConfig(name, ()), *TTYS)
        assert all(key.isascii() and key.isidentifier() and key == key.upper() for key in env)


class TestPermissions:
    def test_a_read_only_device_is_read_only_in_the_answer_and_in_the_spec(self) -> None:
        resource = meter("/dev/a", "/dev/b", read_only=True)
        one = attachment(*TTYS)
        answer = container_response(resource, "usbip.dev", [(DeviceSelector(LAB), one)])
        assert {s.permissions for s in answer.devices} == {"r"}
        assert {s.permissions for s, _ in injected(resource, 0, one).nodes} == {"r"}

    def edits(self, made: Injected) -> list[dict[str, object]]:
        (device,) = json.loads(spec("usbip.dev", "meter", "usbip-x", {0: made}))["devices"]
        nodes: list[dict[str, object]] = device["containerEdits"]["deviceNodes"]
        return nodes

    def test_mode_user_and_group_are_set_on_every_node_in_the_spec(self) -> None:
        resource = replace(meter(), cdi=True, permissions=NodePermissions(0o660, 0, 20))
        for edit in self.edits(injected(resource, 0, attachment(*TTYS))):
            assert (edit["fileMode"], edit["uid"], edit["gid"]) == (0o660, 0, 20)

    def test_permissions_that_are_not_configured_are_left_to_the_runtime(self) -> None:
        resource = replace(meter(), cdi=True, permissions=NodePermissions(group=20))
        for edit in self.edits(injected(resource, 0, attachment())):
            assert edit["gid"] == 20
            assert not {"fileMode", "uid"} & edit.keys()
        assert not {"fileMode", "uid", "gid"} & self.edits(injected(meter(), 0, attachment()))[0].keys()


strings = st.none() | st.text(max_size=126) | st.text(alphabet="./\\\n é{}", min_size=1, max_size=126)


@given(strings, strings, strings)
def test_a_spec_is_valid_for_any_strings_of_a_device(
    serial: str | None, manufacturer: str | None, model: str | None
) -> None:
    one = replace(attachment(*TTYS), serial=serial, manufacturer=manufacturer, model=model)
    resource = meter("/dev/{serial}/{manufacturer}-{model}-{number}", by_id=True)
    made = injected(resource, 0, one)
    (device,) = json.loads(spec("usbip.dev", "meter", "usbip-x", {0: made}))["devices"]
    for edit in device["containerEdits"]["deviceNodes"]:
        assert edit["path"].startswith("/dev/")
        assert not {"", ".", ".."} & set(edit["path"].split("/")[1:])
        assert edit["hostPath"].startswith("/dev/")
    assert all("=" in line for line in device["containerEdits"]["env"])
