"""`usbip-plugin explain`: the sentences, for each reason why a device is available or unavailable."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.rigs.vocabulary import KEY
from tests.unit.cli.device_facts import FREE, HELD, LISTED, NOTES, UNLISTED, UNREACHABLE, known
from usbip_plugin.cli.explain import (
    DeviceDetails,
    Listing,
    Offer,
    PluginStatus,
    PodStatus,
    ServerAnswer,
    explain,
    render,
)
from usbip_plugin.cli.lookup import plugin_status, pod_status
from usbip_plugin.model import InterfaceClass, PodRef

HUB = ServerAnswer(Listing.HUB, "0951:1666")
WITH_SERIAL = replace(FREE, known=known(notes=NOTES | {"usbip.dev/serial": "RED"}))
KEYBOARD, ETHERNET = InterfaceClass(3, 1, 1), InterfaceClass(2, 6, 0)
WITHHELD = replace(FREE, offers=(Offer("usbip.dev/stick", "", withheld=(KEYBOARD,), classes=(3, 8)),))
KEYS = Offer("usbip.dev/keys", "", withheld=(KEYBOARD,), refused=True, classes=(3,))
REFUSED = replace(FREE, offers=(KEYS,))
ALSO_ALLOWED = replace(FREE, offers=(KEYS, Offer("usbip.dev/stick", "vendor 0951")))
GONE_NODE = replace(HELD, known=known("node-a", heard=500, written=500), pod=PodStatus.GONE, plugin=PluginStatus.NONE)
PODS = "kubectl -n usbip-system get pods -l app.kubernetes.io/name=usbip-plugin --field-selector spec.nodeName=node-a"
LOG = f"read the log of the plugin on that node: kubectl -n usbip-system logs $({PODS} -o name)"


@pytest.mark.parametrize(
    ("facts", "available", "verdict"),
    [
        (FREE, True, "lab:3240/1-1 is available."),
        (replace(FREE, known=None), True, "lab:3240/1-1 is available."),
        (HELD, False, "lab:3240/1-1 is in use on node node-a by pod ns/reader."),
        (replace(HELD, known=known("node-a", notes={})), False, "lab:3240/1-1 is in use on node node-a."),
        (replace(FREE, server=UNLISTED), False, "lab:3240/1-1 is unavailable: its server does not export it."),
        (replace(FREE, server=UNREACHABLE), False, "its server does not answer this machine."),
        (replace(FREE, server=UNREACHABLE, nodes=0), False, "its server does not answer this machine."),
        (replace(FREE, server=UNREACHABLE, nodes=2), True, "offer it, but its server does not answer this machine."),
        (replace(FREE, nodes=0), False, "lab:3240/1-1 is unavailable: no node offers it."),
        (replace(FREE, nodes=1), True, "lab:3240/1-1 is available."),
        (replace(FREE, server=HUB, offers=()), False, "it is a USB hub, and USB/IP cannot carry hubs."),
        (replace(FREE, offers=()), False, "no resource in the configuration selects it."),
        (replace(FREE, offers=None, config_source="no right to"), True, "is available."),
        (GONE_NODE, False, "lab:3240/1-1 is unavailable: node node-a is silent, and its server does not list it."),
        (replace(GONE_NODE, server=replace(UNLISTED, error="?")), False, "its server does not export it."),
        (replace(GONE_NODE, server=LISTED), True, "can be taken over: its holder, node node-a, is silent."),
        (
            replace(GONE_NODE, server=LISTED, listed_in_use=("1-2",)),
            False,
            "is unavailable: node node-a is silent, but its server lists devices in use.",
        ),
        (
            replace(WITH_SERIAL, twins=("lab:3240/1-2",)),
            False,
            "it is selected by serial number, and another device has the same one.",
        ),
        (WITHHELD, True, "lab:3240/1-1 is available."),
        (REFUSED, False, "lab:3240/1-1 is refused: it has interfaces that its resource does not allow."),
        (ALSO_ALLOWED, True, "lab:3240/1-1 is available."),
        (replace(HELD, twins=("lab:3240/1-2",)), False, "is in use on node node-a by pod ns/reader."),
        (replace(GONE_NODE, key=None, server=LISTED), False, "its lock does not name its server and bus ID."),
    ],
)
def test_the_verdict_says_whether_the_device_is_available(facts: DeviceDetails, available: bool, verdict: str) -> None:
    found = explain(facts)
    assert found.available is available
    assert found.verdict.endswith(verdict)


@pytest.mark.parametrize(
    ("facts", "phrases"),
    [
        (FREE, ["no holder (epoch 5)", "lists it as available.", "offered as usbip.dev/stick (vendor 0951)"]),
        (replace(FREE, known=None), ["no node has used it yet, or its Lease was deleted."]),
        (replace(FREE, nodes=0), ["which nodes have the plugin and vhci_hcd: usbip-plugin nodes"]),
        (
            replace(HELD, held_for="attic:3240/7-2"),
            ["It is held for attic:3240/7-2: that device is plugged in here now."],
        ),
        (
            HELD,
            [
                "Node node-a has held the lock since 2026-05-04T03:02:01Z (3h ago), epoch 5",
                "attached there to vhci port 3.",
                "alive (last heartbeat: 2026-05-04T06:01:58Z, 3s ago)",
                "Pod ns/reader is alive.",
                "does not list it, as expected",
                "kubectl -n ns delete pod reader",
                "usbip-plugin release lab:3240/1-1 --force",
            ],
        ),
        (
            WITHHELD,
            [
                "usbip.dev/stick does not allow a keyboard (03/01/01), so nodes attach it without.",
                "To allow all its interfaces to new pods, set allowClasses: [hid, mass-storage] for usbip.dev/stick.",
                "resources.limits: {usbip.dev/stick: 1}",
            ],
        ),
        (REFUSED, ["does not allow a keyboard (03/01/01), so no node attaches it.", "allowClasses: [hid] for"]),
        (ALSO_ALLOWED, ["resources.limits: {usbip.dev/stick: 1}"]),
        (
            replace(HELD, withheld=(KEYBOARD, ETHERNET)),
            [
                "Node node-a withholds a keyboard (03/01/01) and a network interface (02/06/00), which the resource",
                "set allowClasses of the resource to the classes of all interfaces, comm and hid included.",
            ],
        ),
        (replace(HELD, pod=PodStatus.GONE), ["Pod ns/reader is gone", "within half a minute", LOG]),
        (
            replace(GONE_NODE, server=LISTED, listed_in_use=("1-2", "1-3")),
            ["lists it, but also lists devices in use: 1-2, 1-3.", "usbip-plugin release lab:3240/1-1 --force"],
        ),
        (replace(HELD, pod=PodStatus.ENDING), ["being deleted", "Wait: it becomes available"]),
        (
            replace(HELD, plugin=PluginStatus.NONE),
            ["node-a has no plugin pod.", "releases nothing", PODS],
        ),
        (replace(HELD, server=LISTED), ["so no node has it attached"]),
        (replace(HELD, known=known("node-a", heard=None, written=10)), ["last heartbeat: 2026-05-04T06:01:51Z"]),
        (
            GONE_NODE,
            [
                "silent for longer",
                "05:53:41Z, 8m ago)",
                "Server lab:3240 does not list it: it is unplugged, or stuck there with node node-a.",
                "usbipd never notices that a node is dead",
                "If node node-a is dead, end its connection: run on host lab: echo -1 | ",
                "| sudo tee /sys/bus/usb/drivers/usbip-host/1-1/usbip_sockfd",
                "usbip detach -p 3",
            ],
        ),
        (replace(FREE, server=UNLISTED), ["unplugged, not bound, or in use outside", "usbip bind -b 1-1"]),
        (
            replace(FREE, server=replace(UNLISTED, error="1-1: speed 9 is not a valid USB speed")),
            ["not all of its list can be used: 1-1: speed 9 is not a valid USB speed."],
        ),
        (replace(FREE, server=HUB, offers=()), ["lists a hub (class 09) under this bus ID", "devices behind the hub"]),
        (replace(FREE, server=UNREACHABLE), ["connection refused", "usbip-plugin export or usbipd is running"]),
        (replace(FREE, offers=None, config_source="X cannot be read"), ["are unknown: X cannot be read"]),
        (
            replace(WITH_SERIAL, twins=("attic:3240/7-2", "lab:3240/1-2")),
            ["serial number RED is shared with attic:3240/7-2 and lab:3240/1-2", "Select each of them by bus_id"],
        ),
        (replace(WITH_SERIAL, server=UNLISTED, twins=("attic:3240/7-2",)), ["serial number RED is now attic:3240/7-2"]),
        (replace(FREE, offers=()), ["No resource in ConfigMap usbip-system/usbip-plugin selects it", "Add a selector"]),
        (
            replace(FREE, server=replace(LISTED, usb_id="1050:0407")),
            ["lists 1050:0407 under this", "the lock was for 0951:1666"],
        ),
    ],
)
def test_the_explanation_names_what_it_found_and_what_to_do(facts: DeviceDetails, phrases: list[str]) -> None:
    text = render(explain(facts))
    assert [words for words in phrases if words not in text] == []
    assert KEY.id in text


@pytest.mark.parametrize("facts", [FREE, HELD, replace(FREE, server=UNLISTED), replace(GONE_NODE, server=LISTED)])
def test_only_a_silent_holder_whose_device_is_not_listed_is_called_stuck(facts: DeviceDetails) -> None:
    text = render(explain(facts))
    assert "stuck" not in text
    assert "usbip_sockfd" not in text


def test_a_command_to_copy_quotes_the_holder() -> None:
    held = replace(HELD, known=known("a; reboot"), pod=PodStatus.GONE, plugin=PluginStatus.UNKNOWN)
    assert "--field-selector 'spec.nodeName=a; reboot' -o name)" in render(explain(held))


def test_the_explanation_is_made_of_whole_sentences() -> None:
    for facts in (FREE, HELD, GONE_NODE, replace(FREE, offers=()), replace(FREE, server=UNREACHABLE)):
        assert all(sentence.endswith((".", ")")) for sentence in (explain(facts).verdict, *explain(facts).because))


@pytest.mark.parametrize(
    ("found", "status"),
    [
        ({"metadata": {"uid": "u"}, "status": {"phase": "Running"}}, PodStatus.LIVES),
        ({"metadata": {"uid": "u", "deletionTimestamp": "t"}, "status": {"phase": "Running"}}, PodStatus.ENDING),
        ({"metadata": {"uid": "u"}, "status": {"phase": "Failed"}}, PodStatus.ENDED),
        ({"metadata": {"uid": "another"}, "status": {"phase": "Running"}}, PodStatus.GONE),
        ({}, PodStatus.LIVES),
        ({"metadata": None, "status": 3}, PodStatus.LIVES),
    ],
)
def test_the_status_of_a_pod_is_read_from_its_object(found: dict[str, object], status: PodStatus) -> None:
    assert pod_status(found, PodRef("ns", "reader", "u")) is status


def test_the_status_of_the_plugin_is_read_from_its_pods() -> None:
    ready = {"status": {"conditions": [{"type": "Ready", "status": "True"}]}}
    assert plugin_status({"items": [{}, ready]}) is PluginStatus.READY
    assert plugin_status({"items": [{"status": {"conditions": "?"}}]}) is PluginStatus.NOT_READY
    assert plugin_status({"items": []}) is plugin_status({}) is PluginStatus.NONE


def test_a_failed_allocate_is_shown_until_one_succeeds() -> None:
    failed = explain(replace(FREE, known=known(notes=NOTES | {"usbip.dev/failed-epoch": "6"})))
    assert "The last Allocate (epoch 6) failed because of the device or its server." in failed.because
    assert any("the pod's event" in step for step in failed.next)
    assert not any("last Allocate" in sentence for sentence in explain(FREE).because)
