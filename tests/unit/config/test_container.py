"""The keys for what a container gets: values that are refused, their cures, and the paths made from templates."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from usbip_plugin.config.parse import parse_config
from usbip_plugin.config.schema import (
    CHILD_KINDS,
    FIELDS,
    MAX_VALUE,
    Names,
    NodePermissions,
    ResourceConfig,
    distinguishes_devices,
    names,
    render,
    template_problem,
)
from usbip_plugin.errors import ConfigError

TEXT = "resources: {a: {devices: [{target: {host: h}, selector: {vendor: '0403'}}], %s}}"


def resource(keys: str) -> ResourceConfig:
    (found,) = parse_config(TEXT % keys).config.resources
    return found


@pytest.mark.parametrize(
    ("keys", "place", "cure"),
    [
        ("children: [tty, net]", "children[1]", "a network interface is not a device node"),
        ("children: [ttyACM0]", "children[0]", "'ttyACM0' is not a kernel subsystem; expected tty, video4linux, block"),
        ("children: [a/b]", "children[0]", "'a/b' is not a kernel subsystem"),
        (f"children: [{'x' * 33}]", "children[0]", "is not a kernel subsystem"),
        (f"children: [{', '.join(f'x{n}' for n in range(33))}]", "children", "expected at most 32 kinds"),
        ("children: [usb]", "children[0]", "a container gets the USB node in any case; remove usb"),
        ("children: tty", "children", "expected a list of kinds (tty, video4linux, block"),
        ("children: [tty], childrenTimeout: 10s", "childrenTimeout", "shorter than allocateTimeout (10s)"),
        ("children: [tty], childrenTimeout: 2m", "childrenTimeout", "must be 0s to 60s"),
        ("containerPath: [/dev/a, /dev/a]", "containerPath[1]", "duplicate path; remove one"),
        ("containerPath: dev/a", "containerPath", "not an absolute path"),
        ("containerPath: [/dev/../a]", "containerPath[0]", "must not contain .."),
        ("containerPath: '/dev/{seriel}'", "containerPath", "unknown field {seriel}; expected one of {resource}"),
        ("containerPath: {a: b}", "containerPath", "not an absolute path"),
        ("containerPath: [/1, /2, /3, /4, /5, /6, /7, /8, /9]", "containerPath", "at most 8"),
        ("permissions: {mode: '0660'}", "permissions", "needs cdi: true in the same resource"),
        ("permissions: {mode: '0660'}", "permissions", "securityContext.supplementalGroups"),
        ("cdi: true, permissions: {group: dialout}", "permissions.group", "the group's numeric id"),
        ("cdi: true, permissions: {user: root}", "permissions.user", "the user's numeric id"),
        ("cdi: true, permissions: {mode: 660}", "permissions.mode", 'such as "0660"'),
        ("cdi: true, permissions: {mode: 01000}", "permissions.mode", 'such as "0660"'),
        ("cdi: true, permissions: {group: 4294967295}", "permissions.group", "numeric id"),
        ("cdi: true, permissions: {groups: 20}", "permissions.groups", "did you mean group?"),
        ("cdi: true, permissions: {}", "permissions", "expected at least one of mode, user, group"),
        ("cdi: true, permissions: 0660", "permissions", "expected a mapping (keys: mode, user, group), got '0660'"),
        ("readOnly: yes", "readOnly", "expected true or false, got 'yes'"),
        ("allowClasses: hid", "allowClasses", "expected a list of USB classes, such as [hid, vendor], got 'hid'"),
        ("allowClasses: []", "allowClasses", "expected a list of USB classes"),
        ("allowClasses: [hid, keyboard]", "allowClasses[1]", "'keyboard' is not a valid USB class"),
        ("allowClasses: [hub]", "allowClasses[0]", "is not a valid USB class"),
        ("allowClasses: ['09']", "allowClasses[0]", "class 09 is a USB hub"),
        ("nodeNames: []", "nodeNames", "expected 1 to 64 names of nodes, got 0"),
        (
            "nodeNames: [a, Lab-1]",
            "nodeNames[1]",
            "'Lab-1' is not the name of a node; expected one such as lab-1, or a glob",
        ),
        ("nodeNames: [a, b, a]", "nodeNames[2]", "duplicate name; remove one"),
        ("nodeNames: {a: b}", "nodeNames", "is not the name of a node"),
        ("byId: 1", "byId", "expected true or false, got '1'"),
    ],
)
def test_a_refused_value_has_an_error_with_its_place_and_a_cure(keys: str, place: str, cure: str) -> None:
    with pytest.raises(ConfigError) as raised:
        parse_config(TEXT % keys)
    (problem,) = raised.value.problems
    assert f"resources.a.{place}: " in problem
    assert cure in problem


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("{mode: '0660'}", NodePermissions(mode=0o660)),
        ("{mode: 0660, user: 0, group: 20}", NodePermissions(0o660, 0, 20)),
        ("{mode: 0o600}", NodePermissions(mode=0o600)),
        ("{group: '4294967294'}", NodePermissions(group=4294967294)),
    ],
)
def test_permissions_are_read_with_octal_modes_and_numeric_ids(text: str, found: NodePermissions) -> None:
    assert resource(f"cdi: true, permissions: {text}").permissions == found


def test_one_path_is_a_list_of_one() -> None:
    assert resource("containerPath: /dev/a").container_paths == ("/dev/a",)
    assert resource("containerPath: [/dev/a, /dev/b]").container_paths == ("/dev/a", "/dev/b")
    assert resource("cdi: true").container_paths == ()


@pytest.mark.parametrize(
    "kind", [*CHILD_KINDS, "scsi_generic", "scsi_changer", "nvme-generic", "mtd", "infiniband", "x"]
)
def test_children_takes_the_name_of_any_subsystem(kind: str) -> None:
    parsed = parse_config(TEXT % f"children: [{kind}]")
    assert parsed.config.resources[0].children == (kind,)
    assert not parsed.warnings


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        *(("ttys", "tty"), ("hid", "hidraw"), ("video", "video4linux"), ("vidio4linux", "video4linux"), ("sg", None)),
        *(("scsi-generic", None), ("disk", "block"), ("snd", "sound"), ("serial", "tty"), ("i2c", "i2c-dev")),
    ],
)
def test_a_kind_that_looks_misspelled_is_taken_with_a_warning(written: str, meant: str | None) -> None:
    parsed = parse_config(TEXT % f"children: [{written}]")
    assert parsed.config.resources[0].children == (written,)
    (warning,) = parsed.warnings
    assert "resources.a.children[0]: " in warning
    assert f"did you mean {meant or 'scsi_generic'}?" in warning


def test_a_children_timeout_without_children_is_a_warning() -> None:
    (warning,) = parse_config(TEXT % "childrenTimeout: 2s").warnings
    assert "has no effect without children" in warning


@pytest.mark.parametrize(
    ("template", "which"),
    [
        ("/dev/meter", Names.MAIN),
        ("/dev/meter-{index}-{serial}", Names.MAIN),
        ("/dev/meter{number}", Names.CHILDREN),
        ("/dev/meter-{interface}", Names.CHILDREN),
        ("/dev/{kind}{number}", Names.EVERY),
        ("/devices/{name}", Names.EVERY),
    ],
)
def test_the_fields_of_a_template_decide_which_nodes_it_names(template: str, which: Names) -> None:
    assert names(template) is which


@pytest.mark.parametrize("field", FIELDS)
def test_only_some_fields_always_differ_between_two_devices(field: str) -> None:
    assert distinguishes_devices(f"/dev/x-{{{field}}}") is (field in {"index", "name", "busid", "serial"})


hostile = st.text(max_size=300) | st.text(alphabet="./\\\n\t é{}", max_size=300)


@given(
    st.sampled_from(["/dev/{model}", "/dev/.{serial}", "/dev/{manufacturer}{model}/x", "/{model}/{serial}"]), hostile
)
def test_no_string_of_a_device_chooses_the_directory_of_its_path(template: str, value: str) -> None:
    path = render(template, dict.fromkeys(FIELDS, value))
    assert path.isascii()
    assert path.isprintable()
    assert path.count("/") == template.count("/")
    assert not {"", ".", ".."} & set(path.split("/")[1:])
    assert len(path) <= len(template) + 2 * MAX_VALUE


def test_fields_are_replaced_by_their_values() -> None:
    assert render("/dev/{resource}-{index}", {"resource": "a.b", "index": "0"}) == "/dev/a.b-0"
    assert template_problem("/dev/{kind}{index}") is None


@pytest.mark.parametrize("field", ["busid", "serial", "manufacturer", "model"])
def test_a_device_cannot_take_the_name_of_another_file(field: str) -> None:
    for part in (f"{{{field}}}", f"{{{field}}}{{index}}", f"{{model}}{{{field}}}"):
        for template in (f"/dev/{part}", f"/{part}/tty", f"/dev/of-{{serial}}/{part}"):
            problem = template_problem(template)
            assert problem is not None
            assert f"as in usb-{part}" in problem
    assert template_problem(f"/dev/usb-{{{field}}}/{{{field}}}.tty") is None


@pytest.mark.parametrize("template", ["dev/x", "/dev/{foo}", "/dev/../x", "/dev/{", "/dev/}x", "/dev/{index", ""])
def test_an_invalid_template_is_refused(template: str) -> None:
    assert template_problem(template) is not None


@given(st.text(max_size=60))
def test_no_value_leads_out_of_the_directory_of_a_valid_template(template: str) -> None:
    if template_problem(template) is None:
        path = render(template, dict.fromkeys(FIELDS, "../.."))
        assert path.startswith("/")
        assert ".." not in path.split("/")


def test_a_node_has_only_the_resources_that_name_it() -> None:
    entry = "devices: [{target: {host: h}, selector: {all: true}}]"
    text = f"""
resources:
  lab: {{{entry.replace("all: true", "serial: A")}, nodeNames: "lab-*"}}
  two: {{{entry.replace("all: true", "serial: B")}, nodeNames: [lab-1, home]}}
  all: {{{entry.replace("all: true", "serial: C")}}}
"""
    expected = {None: "lab two all", "lab-1": "lab two all", "lab-2": "lab all", "home": "two all"}
    for node, offered in expected.items():
        assert [resource.name for resource in parse_config(text, node=node).config.resources] == offered.split(), node
    with pytest.raises(ConfigError, match=r"two\.nodeNames"):  # a mistake is one on every node
        parse_config(text.replace("home", "HOME"), node="lab-2")
