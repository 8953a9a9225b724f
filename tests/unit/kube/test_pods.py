"""The watch on the node's own pods: every end of a pod is reported once."""

import asyncio
import random
from collections.abc import AsyncGenerator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.rigs.api_double import ApiDouble
from usbip_plugin.errors import KubeForbidden, KubeGone, KubeUnreachable
from usbip_plugin.kube.pods import LIST_PAGE, MANY, MAX_RESOURCES, OwnPods, PodPhase, PodState, read_pod
from usbip_plugin.model import PodRef
from usbip_sim.virtual.loop import SimClock, virtual

A = PodRef("default", "a", "uid-a")


def pod(name: str = "a", uid: str | None = None, phase: str = "Running", *, deleted: bool = False) -> dict[str, Any]:
    metadata = {"namespace": "default", "name": name, "uid": uid or f"uid-{name}", "resourceVersion": "7"}
    if deleted:
        metadata["deletionTimestamp"] = "2026-01-01T00:00:00Z"
    return {"metadata": metadata, "status": {"phase": phase}}


def event(kind: str, obj: dict[str, Any]) -> dict[str, Any]:
    return {"type": kind, "object": obj}


def own_pods(api: ApiDouble) -> tuple[OwnPods, list[tuple[PodRef, PodPhase]]]:
    ends: list[tuple[PodRef, PodPhase]] = []
    clock = SimClock(asyncio.get_running_loop())
    return OwnPods(api, "node-a", clock, random.Random(1), lambda ref, phase: ends.append((ref, phase))), ends


async def run_for(pods: OwnPods, seconds: float) -> None:
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(seconds):
            await pods.run()


@virtual
async def test_each_step_of_the_end_of_a_pod_is_reported_once() -> None:
    pods, ends = own_pods(ApiDouble())
    pods.apply(event("ADDED", pod()))
    pods.apply(event("MODIFIED", pod()))
    assert ends == []
    assert pods.find("default", "a") == A
    pods.apply(event("MODIFIED", pod(deleted=True)))
    pods.apply(event("MODIFIED", pod(deleted=True)))
    assert ends == [(A, PodPhase.TERMINATING)]
    assert pods.find("default", "a") == A
    pods.apply(event("MODIFIED", pod(phase="Failed", deleted=True)))
    pods.apply(event("DELETED", pod(phase="Failed", deleted=True)))
    assert ends == [(A, PodPhase.TERMINATING), (A, PodPhase.ENDED)]
    assert pods.find("default", "a") is None


@virtual
async def test_a_pod_replaced_by_one_of_its_name_has_ended() -> None:
    pods, ends = own_pods(ApiDouble())
    pods.apply(event("ADDED", pod()))
    pods.apply(event("ADDED", pod(uid="uid-new")))
    assert ends == [(A, PodPhase.ENDED)]
    assert pods.find("default", "a") == PodRef("default", "a", "uid-new")


@virtual
async def test_a_pod_has_completed_if_it_ended_and_nobody_deleted_it() -> None:
    pods, _ = own_pods(ApiDouble())
    pods.synced = True
    assert not pods.completed(A)
    for obj, completed in (
        (pod(), False),
        (pod(phase="Succeeded"), True),
        (pod(phase="Succeeded", deleted=True), False),
        (pod(uid="uid-new", phase="Succeeded"), False),
    ):
        pods.apply(event("MODIFIED", obj))
        assert pods.completed(A) is completed
    pods.apply(event("MODIFIED", pod(phase="Failed")))
    pods.synced = False
    assert not pods.completed(A)


@virtual
async def test_a_pod_that_vanished_during_a_gap_is_reported_after_the_next_list() -> None:
    api = ApiDouble()
    api.items = [pod("a"), pod("b")]
    api.watches = [[event("BOOKMARK", {"metadata": {"resourceVersion": "5"}}), KubeGone("watch", "pods", "too old")]]
    pods, ends = own_pods(api)
    task = asyncio.create_task(run_for(pods, 60))
    await asyncio.sleep(0.1)
    api.items = [pod("b", phase="Succeeded")]
    await task
    assert sorted(ends) == [(A, PodPhase.ENDED), (PodRef("default", "b", "uid-b"), PodPhase.ENDED)]
    assert {(call.path, call.resource) for call in api.calls} == {("/api/v1/pods", "pods")}
    assert api.of("watch")[0].params == {"fieldSelector": "spec.nodeName=node-a", "resourceVersion": "1"}
    assert len(api.of("list")) == 2
    assert pods.synced


@virtual
async def test_a_watch_that_ends_continues_at_its_last_version() -> None:
    api = ApiDouble()
    api.watches = [[event("ADDED", pod())], [event("DELETED", pod())]]
    pods, ends = own_pods(api)
    await run_for(pods, 60)
    assert ends == [(A, PodPhase.ENDED)]
    assert len(api.of("list")) == 1
    assert [call.params["resourceVersion"] for call in api.of("watch")] == ["1", "7", "7"]


@virtual
async def test_pods_are_listed_in_pages_that_are_reduced_at_once() -> None:
    api = ApiDouble()
    api.items = [pod(f"p{number}") for number in range(2 * LIST_PAGE + 1)]
    sizes: list[int] = []
    listed = api.pages

    async def watched(*args: Any, **options: Any) -> AsyncGenerator[dict[str, Any], None]:
        async for page in listed(*args, **options):
            sizes.append(len(page["items"]))
            yield page

    api.pages = watched  # type: ignore[method-assign]
    pods, _ = own_pods(api)
    await run_for(pods, 1)
    assert sizes == [LIST_PAGE, LIST_PAGE, 1]
    assert all(pods.find("default", f"p{number}") for number in range(2 * LIST_PAGE + 1))


def test_of_a_pod_that_names_any_number_of_resources_a_bounded_number_is_kept() -> None:
    limits = {f"usbip.dev/{number}": "1" for number in range(10_000)}
    found = read_pod(pod() | {"spec": {"containers": [{"resources": {"limits": limits}}]}})
    assert found is not None
    assert len(found[1].resources) == MAX_RESOURCES


@virtual
async def test_the_view_is_not_synced_while_the_api_server_is_unreachable() -> None:
    api = ApiDouble(KubeUnreachable("list", "pods", "refused"))
    api.watches = [[KubeUnreachable("watch", "pods", "reset")]]
    pods, _ = own_pods(api)
    synced = pods.synced
    await run_for(pods, 300)
    assert not synced
    assert pods.synced
    assert len(api.of("list")) == 3


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.sampled_from(["metadata", "status", "phase", "uid"]), inner),
    max_leaves=20,
)


@given(json_values)
def test_an_object_that_is_not_a_pod_is_ignored(value: Any) -> None:
    assert read_pod(value) is None


def test_only_uid_and_phase_are_kept() -> None:
    assert read_pod(pod(phase="Succeeded")) == (("default", "a"), PodState("uid-a", PodPhase.ENDED))
    terminating = PodState("uid-a", PodPhase.TERMINATING, deleted=True)
    assert read_pod(pod(phase="Pending", deleted=True)) == (("default", "a"), terminating)


@pytest.mark.parametrize(
    ("phase", "kind", "container", "wanted"),
    [
        ("Pending", "containers", {}, True),
        ("Running", "containers", {}, True),
        ("Succeeded", "containers", {}, False),
        ("Failed", "containers", {}, False),
        ("Pending", "initContainers", {}, True),
        ("Running", "initContainers", {}, True),  # ended, but run again with a new sandbox
        ("Running", "initContainers", {"restartPolicy": "Always"}, True),  # a sidecar that still runs
        ("Succeeded", "initContainers", {"restartPolicy": "Always"}, False),
    ],
)
@virtual
async def test_pods_that_use_devices_or_will_use_them_are_found(
    phase: str, kind: str, container: Any, wanted: bool
) -> None:
    limits = {"cpu": "1", "usbip.dev/stick": "1"}
    pods, _ = own_pods(ApiDouble())
    pods.apply(event("ADDED", pod(phase=phase) | {"spec": {kind: [container | {"resources": {"limits": limits}}]}}))
    assert pods.wanting("usbip.dev") == ({A: {"stick": 1}} if wanted else {})
    assert pods.wanting("other.dev") == {}


def container(count: object, **more: str) -> dict[str, Any]:
    return {"resources": {"limits": {"usbip.dev/stick": count}}, **more}


@pytest.mark.parametrize(
    ("init", "apps", "count"),
    [
        ([], ["1", "2"], 3),
        (["1"], ["1"], 1),
        (["2"], ["1"], 2),
        (["1", "3"], [], 3),
        (["1"], ["2", "1"], 3),
        ([], ["1k"], MANY),
        ([], [7], MANY),
    ],
)
def test_an_init_container_passes_its_devices_to_later_containers(
    init: list[str], apps: list[object], count: int
) -> None:
    """The kubelet counts the most devices in use at one time."""
    spec = {"initContainers": [container(n) for n in init], "containers": [container(n) for n in apps]}
    found = read_pod(pod() | {"spec": spec})
    assert found is not None
    assert found[1].resources == {"usbip.dev/stick": count}


def test_a_sidecar_keeps_its_devices() -> None:
    init = [container("1", restartPolicy="Always"), container("2")]
    found = read_pod(pod() | {"spec": {"initContainers": init, "containers": [container("1")]}})
    assert found is not None
    assert found[1].resources == {"usbip.dev/stick": 3}


@pytest.mark.parametrize("spec", [None, [], {}, {"initContainers": 7}, {"containers": [7, {"resources": 7}]}])
def test_an_invalid_pod_spec_requests_nothing(spec: object) -> None:
    found = read_pod(pod(phase="Pending") | {"spec": spec})
    assert found is not None
    assert found[1].resources == {}


@virtual
async def test_repeated_failures_of_the_watch_are_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    api = ApiDouble()
    api.watches = [[KubeForbidden("watch", "pods", "no")] for _ in range(50)]
    pods, _ = own_pods(api)
    await run_for(pods, 120)
    assert len(api.of("watch")) > 5
    assert len([record for record in caplog.records if "pod watch failed" in record.getMessage()]) == 1
