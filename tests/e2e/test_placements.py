"""Tests of Placements: which failed pods count, by the order of writes. Needs no cluster."""

from __future__ import annotations

from typing import Any

import pytest

from tests.e2e.placements import Placements

Object = dict[str, Any]
SOLO = "usbip.dev/solo"
DENIAL = "Allocate failed due to rpc error: 1-1 is held by node node-1 since now, which is unexpected"

pytestmark = pytest.mark.short


def pod(name: str, version: int, *, node: str | None = None, phase: str = "Pending", message: str = "") -> Object:
    spec: Object = {"containers": [{"resources": {"limits": {SOLO: 1}}}]}
    if node is not None:
        spec["nodeName"] = node
    metadata = {"name": name, "uid": name, "resourceVersion": str(version)}
    return {"metadata": metadata, "spec": spec, "status": {"phase": phase, "message": message}}


def node(name: str, version: int, count: int) -> Object:
    return {
        "metadata": {"name": name, "resourceVersion": str(version)},
        "status": {"allocatable": {SOLO: str(count)}},
    }


def story(*events: Object) -> Placements:
    """Returns the placements after these writes, each seen at once."""
    placements = Placements("solo")
    pods: dict[str, Object] = {}
    nodes: dict[str, Object] = {}
    for event in events:
        kind = pods if "spec" in event else nodes
        kind[event["metadata"]["name"]] = event
        placements.see_pods(pods)
        placements.see_nodes(nodes)
    return placements


def names(found: list[Any]) -> list[str]:
    return [one.name for one in found]


def test_a_pod_bound_before_its_node_published_0_lost_a_fair_race() -> None:
    placements = story(
        node("n", 1, 1),
        pod("p", 2),
        pod("p", 3, node="n"),
        node("n", 4, 0),
        pod("p", 5, node="n", phase="Failed", message=DENIAL),
    )
    assert names(placements.failures()) == ["p"]
    assert placements.without_room() == []
    assert placements.denied_unpublished(1) == []


def test_a_pod_bound_after_its_node_published_0_counts_however_late_the_count_is_seen() -> None:
    placements = story(
        pod("p", 2),
        pod("p", 4, node="n"),
        pod("p", 5, node="n", phase="Failed", message=DENIAL),
        node("n", 3, 0),
    )
    assert names(placements.without_room()) == ["p"]


def test_a_pod_beside_one_that_has_not_ended_has_no_room() -> None:
    begin = [node("n", 1, 1), pod("old", 2), pod("old", 3, node="n", phase="Running"), pod("p", 4)]
    failure = pod("p", 9, node="n", phase="Failed")
    beside = story(*begin, pod("p", 6, node="n"), failure)
    after = story(*begin, pod("old", 5, node="n", phase="Succeeded"), pod("p", 6, node="n"), failure)
    assert names(beside.without_room()) == ["p"]
    assert after.without_room() == []


def test_a_denial_before_the_lower_count_is_reported() -> None:
    denied = pod("p", 5, node="n", phase="Failed", message=DENIAL)
    refused = pod("p", 5, node="n", phase="Failed", message="cannot allocate unhealthy devices")
    begin = [node("n", 1, 1), pod("p", 2), pod("p", 3, node="n")]
    assert names(story(*begin, denied, node("n", 6, 0)).denied_unpublished(1)) == ["p"]
    assert story(*begin, refused).denied_unpublished(1) == []


def test_a_second_failure_on_a_node_without_a_new_count_is_a_repeat() -> None:
    begin = [
        node("n", 1, 1),
        pod("p", 2),
        pod("p", 3, node="n"),
        pod("p", 5, node="n", phase="Failed"),
        pod("q", 6),
    ]
    bound, failure = pod("q", 9, node="n"), pod("q", 10, node="n", phase="Failed")
    assert names(story(*begin, bound, failure).repeated()) == ["q"]
    assert story(*begin, node("n", 7, 0), node("n", 8, 1), bound, failure).repeated() == []
    assert story(*begin, pod("q", 4, node="n"), failure).repeated() == [], "bound before the first had failed"


def test_a_pod_with_an_unseen_binding_does_not_count() -> None:
    placements = story(node("n", 1, 0), pod("p", 4, node="n"), pod("p", 5, node="n", phase="Failed", message=DENIAL))
    assert names(placements.failures()) == ["p"]
    assert placements.without_room() == []
