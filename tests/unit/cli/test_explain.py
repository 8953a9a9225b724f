"""`usbip-plugin explain`: the sentences, for each way in which a device can and cannot be had."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.unit.cli.cli_facts import FREE, HELD, HELD_NOTES, KEY, LISTED, NOTES, NOW, UNLISTED, UNREACHABLE, known
from usbip_plugin.cli.explain import Facts, PluginWord, PodStatus, age, explain, render
from usbip_plugin.cli.lookup import plugin_word, pod_word
from usbip_plugin.model import PodRef

TOLD = replace(FREE, known=known(notes=NOTES | {"usbip.dev/serial": "RED"}))
GONE_NODE = replace(HELD, known=known("node-a", heard=500, written=500), pod=PodStatus.GONE, plugin=PluginWord.NONE)


@pytest.mark.parametrize(
    ("facts", "available", "verdict"),
    [
        (FREE, True, "lab:3240/1-1 is free."),
        (replace(FREE, known=None), True, "lab:3240/1-1 is free."),
        (HELD, False, "lab:3240/1-1 is in use on node node-a, by pod ns/reader."),
        (replace(HELD, known=known("node-a", notes={})), False, "lab:3240/1-1 is in use on node node-a."),
        (replace(FREE, server=UNLISTED), False, "lab:3240/1-1 cannot be had: its server does not offer it."),
        (replace(FREE, server=UNREACHABLE), False, "its server does not answer."),
        (replace(FREE, offers=()), False, "no resource of the configuration selects it."),
        (replace(FREE, offers=None, config_source="no right to"), True, "is free."),
        (GONE_NODE, False, "its server does not offer it."),
        (replace(GONE_NODE, server=LISTED), True, "may be taken over: node node-a, which holds it, is silent."),
        (replace(TOLD, twins=("lab:3240/1-2",)), False, "by its serial number: it is not the only one with it."),
        (replace(HELD, twins=("lab:3240/1-2",)), False, "is in use on node node-a, by pod ns/reader."),
        (replace(GONE_NODE, key=None, server=LISTED), False, "its lock does not say which device it is for."),
    ],
)
def test_the_verdict(facts: Facts, available: bool, verdict: str) -> None:
    found = explain(facts)
    assert found.available is available
    assert found.verdict.endswith(verdict)


@pytest.mark.parametrize(
    ("facts", "said"),
    [
        (FREE, ["no holder; it has had 5 so far", "lists it as free", "offered as usbip.dev/stick (vendor 0951)"]),
        (replace(FREE, known=None), ["nobody has ever used it"]),
        (
            replace(HELD, known=known("node-a", notes=HELD_NOTES | {"usbip.dev/in-place-of": "usbip-" + "a" * 20})),
            ["held for the device usbip-aaaa"],
        ),
        (
            HELD,
            [
                "names node node-a since 2026-05-04T03:02:01Z (3 h ago), as holder number 5",
                "vhci port 3",
                "last sign was 2026-05-04T06:01:58Z (3 s ago)",
                "Pod ns/reader is there",
                "does not list it, as is right",
                "kubectl -n ns delete pod reader",
                "usbip-plugin release lab:3240/1-1 --force",
            ],
        ),
        (replace(HELD, pod=PodStatus.GONE), ["Pod ns/reader is gone", "within half a minute", "logs daemonset"]),
        (replace(HELD, pod=PodStatus.ENDING), ["being deleted", "Wait: it comes free"]),
        (replace(HELD, plugin=PluginWord.NONE), ["there is none", "lets nothing go", "spec.nodeName=node-a"]),
        (replace(HELD, server=LISTED), ["attached nowhere now"]),
        (replace(HELD, known=known("node-a", heard=None, written=10)), ["last sign was 2026-05-04T06:01:51Z"]),
        (GONE_NODE, ["silent: its last sign of life was 2026-05-04T05:53:41Z", "usbip detach -p 3", "usbip unbind"]),
        (replace(FREE, server=UNLISTED), ["unplugged, not bound, or in use by somebody outside", "usbip bind -b 1-1"]),
        (replace(FREE, server=UNREACHABLE), ["connection refused", "is usbipd running"]),
        (replace(FREE, offers=None, config_source="X cannot be read"), ["not known: X cannot be read"]),
        (
            replace(TOLD, twins=("attic:3240/7-2", "lab:3240/1-2")),
            ["serial number RED is also that of attic:3240/7-2 and lab:3240/1-2", "Tell them apart by bus_id"],
        ),
        (replace(TOLD, server=UNLISTED, twins=("attic:3240/7-2",)), ["serial number RED is attic:3240/7-2 now"]),
        (replace(FREE, offers=()), ["No resource of ConfigMap usbip-system/usbip-plugin selects it", "Add a selector"]),
        (replace(FREE, server=replace(LISTED, usb_id="1050:0407")), ["is 1050:0407; the lock was for 0951:1666"]),
    ],
)
def test_it_says(facts: Facts, said: list[str]) -> None:
    text = render(explain(facts))
    assert [words for words in said if words not in text] == []
    assert KEY.id in text


def test_what_it_says_is_whole_sentences() -> None:
    for facts in (FREE, HELD, GONE_NODE, replace(FREE, offers=()), replace(FREE, server=UNREACHABLE)):
        assert all(sentence.endswith((".", ")")) for sentence in (explain(facts).verdict, *explain(facts).because))


@pytest.mark.parametrize(
    ("found", "word"),
    [
        ({"metadata": {"uid": "u"}, "status": {"phase": "Running"}}, PodStatus.LIVES),
        ({"metadata": {"uid": "u", "deletionTimestamp": "t"}, "status": {"phase": "Running"}}, PodStatus.ENDING),
        ({"metadata": {"uid": "u"}, "status": {"phase": "Failed"}}, PodStatus.ENDED),
        ({"metadata": {"uid": "another"}, "status": {"phase": "Running"}}, PodStatus.GONE),
        ({}, PodStatus.LIVES),
        ({"metadata": None, "status": 3}, PodStatus.LIVES),
    ],
)
def test_what_the_api_server_says_of_the_pod(found: dict[str, object], word: PodStatus) -> None:
    assert pod_word(found, PodRef("ns", "reader", "u")) is word


def test_what_the_api_server_says_of_the_plugin() -> None:
    ready = {"status": {"conditions": [{"type": "Ready", "status": "True"}]}}
    assert plugin_word({"items": [{}, ready]}) is PluginWord.READY
    assert plugin_word({"items": [{"status": {"conditions": "?"}}]}) is PluginWord.NOT_READY
    assert plugin_word({"items": []}) is plugin_word({}) is PluginWord.NONE


def test_ages_are_rounded_down_to_one_unit() -> None:
    assert [age(seconds) for seconds in (0.9, 119, 120, 7199, 7200, 172_799, 172_800)] == [
        *("0 s", "119 s", "2 min", "119 min", "2 h", "47 h", "2 d")
    ]
    assert NOW is not None
