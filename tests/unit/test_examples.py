"""examples/: each configuration is valid without a warning, and each workload requests its resource."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from usbip_plugin.config.parse import parse_config
from usbip_plugin.config.schema import DEFAULT_DOMAIN, OnLoss, ResourceConfig

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
NAMES = sorted(path.name for path in EXAMPLES.iterdir() if path.is_dir())
FIELDS = ("DEVICE", "BUSID", "SERIAL", "VENDOR", "PRODUCT")
KINDS = {"TTY": "tty", "HIDRAW": "hidraw", "VIDEO": "video4linux", "SOUND": "sound"}


def offered(name: str) -> ResourceConfig:
    """Returns the resource of an example."""
    file = EXAMPLES / name / "config.yaml"
    parsed = parse_config(file.read_text(encoding="utf-8"), str(file))
    assert parsed.warnings == ()
    (resource,) = parsed.config.resources
    return resource


def workload(name: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((EXAMPLES / name / "workload.yaml").read_text(encoding="utf-8")))


def controller(name: str) -> dict[str, Any]:
    """Returns the Deployment or StatefulSet of an example."""
    (found,) = [one for one in workload(name) if "template" in one.get("spec", {})]
    return found


def pod_spec(name: str) -> dict[str, Any]:
    spec: dict[str, Any] = controller(name)["spec"]["template"]["spec"]
    return spec


def with_device(name: str) -> dict[str, Any]:
    (found,) = [one for one in pod_spec(name)["containers"] if one.get("resources")]
    return dict(found)


def texts(value: object) -> Iterator[str]:
    """Yields every string in a value."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        yield from (text for one in value.values() for text in texts(one))
    elif isinstance(value, list):
        yield from (text for one in value for text in texts(one))


def variables(text: str) -> set[str]:
    return set(re.findall(r"USBIP_[A-Z0-9_]+", text))


def known_variables(resource: ResourceConfig) -> set[str]:
    """Returns the variables of a container with one device of the resource."""
    prefix = "USBIP_" + re.sub("[^A-Z0-9]", "_", resource.name.upper()) + "_0_"
    kinds = {word for word, kind in KINDS.items() if kind in (resource.children or ())}
    return {prefix + word for word in (*FIELDS, *kinds)}


def test_the_overview_lists_every_example() -> None:
    text = (EXAMPLES / "README.md").read_text(encoding="utf-8")
    assert re.findall(r"^\| \[[\w-]+\]\(([\w-]+)/README\.md\)", text, re.MULTILINE) == [
        "3d-printer",
        "zigbee-home-assistant",
        "licence-dongle",
        "webcam",
        "phone-farm",
        "smart-card-reader",
    ]
    assert len(NAMES) == 6


def test_the_configurations_can_be_combined() -> None:
    together = {}
    for name in NAMES:
        together.update(yaml.safe_load((EXAMPLES / name / "config.yaml").read_text(encoding="utf-8"))["resources"])
    parsed = parse_config(json.dumps({"resources": together}))  # as YAML 04e6 would lose its quotes
    assert parsed.warnings == ()
    assert len(parsed.config.resources) == len(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_the_workload_asks_for_the_resource_of_its_configuration_and_for_nothing_of_the_host(name: str) -> None:
    resource = offered(name)
    assert with_device(name)["resources"] == {"limits": {f"{DEFAULT_DOMAIN}/{resource.name}": 1}}
    for container in pod_spec(name)["containers"]:
        assert "privileged" not in container.get("securityContext", {})
        repository, colon, tag = container["image"].rpartition(":")
        assert repository, colon
        assert re.fullmatch(r"v?\d[\w.-]*", tag), "a release, not latest"
    assert not [volume for volume in pod_spec(name).get("volumes", ()) if "hostPath" in volume]
    assert not pod_spec(name).get("hostNetwork")


@pytest.mark.parametrize("name", NAMES)
def test_a_new_pod_does_not_wait_for_the_device_of_the_old_one(name: str) -> None:
    found = controller(name)
    if found["kind"] == "Deployment":
        assert (found["spec"]["replicas"], found["spec"]["strategy"]) == (1, {"type": "Recreate"})
    else:
        assert (found["kind"], found["spec"]["podManagementPolicy"]) == ("StatefulSet", "Parallel")


@pytest.mark.parametrize("name", NAMES)
def test_a_container_to_restart_has_a_probe_that_opens_its_device(name: str) -> None:
    resource = offered(name)
    probe = with_device(name).get("livenessProbe", {}).get("exec", {}).get("command", ())
    if resource.on_loss is OnLoss.RESTART:
        assert variables(" ".join(probe)) <= known_variables(resource)
        assert re.fullmatch(r': <>"\$USBIP_\w+"', probe[-1])
    else:
        assert not probe


@pytest.mark.parametrize("name", NAMES)
def test_the_pod_has_the_group_of_its_device(name: str) -> None:
    resource, spec = offered(name), pod_spec(name)
    groups = spec.get("securityContext", {}).get("supplementalGroups", [])
    permissions = resource.permissions
    assert groups == ([] if permissions is None else [permissions.group])
    if permissions is not None:
        assert (permissions.mode, permissions.user) == (0o660, 0)


@pytest.mark.parametrize("name", NAMES)
def test_every_variable_named_in_an_example_exists(name: str) -> None:
    known = known_variables(offered(name))
    for text in (*texts(workload(name)), (EXAMPLES / name / "README.md").read_text(encoding="utf-8")):
        assert variables(text) <= known


@pytest.mark.parametrize(
    "document", [EXAMPLES / "README.md", *(EXAMPLES / name / "README.md" for name in NAMES)], ids=str
)
def test_every_link_and_object_named_in_a_readme_exists(document: Path) -> None:
    text = document.read_text(encoding="utf-8")
    for link in re.findall(r"\]\(([^)#:]*)(?:#[^)]*)?\)", text):
        assert (document.parent / link).exists(), link
    if document.parent != EXAMPLES:
        objects = {(one["kind"].lower(), one["metadata"]["name"]) for one in workload(document.parent.name)}
        for short, named in re.findall(r"\b(deploy|service)/([\w-]+)", text):
            assert (short.replace("deploy", "deployment").replace("deploymentment", "deployment"), named) in objects
    for path in re.findall(r"examples/[\w-]+/[\w.]+", text):
        assert (ROOT / path).is_file(), path
