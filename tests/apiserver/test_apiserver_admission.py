"""rbac/40-admission.yaml as shipped: each attack is refused by its rule, and passes without that rule.

The attackers have the real tokens of the plugin's pods on two nodes. For each rule a copy of the policy without it
applies to a ServiceAccount of its own.
"""

from __future__ import annotations

import asyncio
import contextlib
import copy
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import pytest

from tests.apiserver.node_tokens import ACCOUNT, NAMESPACE, NodeTokens, client_with
from tests.apiserver.objects import LEASES, make_node
from tests.rigs.api_process import ADMIN_TOKEN, Cluster
from tests.rigs.plugin_rights import EFFECT_S, collection, shipped
from usbip_plugin.errors import KubeConflict, KubeForbidden, KubeNotFound
from usbip_plugin.kube.client import KubeClient
from usbip_plugin.kube.events import NORMAL, EventText, event_body, event_name, instance_of
from usbip_plugin.locks import record
from usbip_plugin.locks.record import session_name
from usbip_plugin.model import DeviceKey, NodeIdentity, PodRef, ServerKey

pytestmark = pytest.mark.short

EVENTS = "/apis/events.k8s.io/v1/namespaces/default/events"
NODES = "/api/v1/nodes"
MUTANTS = "usbip-mutants"
_POLL_S = 0.2

POLICY = next(document for document in shipped() if document["kind"] == "ValidatingAdmissionPolicy")
BINDING = next(document for document in shipped() if document["kind"] == "ValidatingAdmissionPolicyBinding")

# A part of the message of each rule, in the order of the policy. No other message contains it.
BOUND = "not bound to a node"
NAME = "may write device locks"
SESSION = "must name it as holder"
HOLDER = "may hold a lock or release its own"
LABEL = "bears the label"
OWNERS = "no ownerReferences"
TEXTS = "its annotations and labels only"
FIELDS = "name the fields of a Lease"
OTHER_NODE = "may not write the status of node"
METADATA = "not its labels"
STATUS = "no other part of its status"
RESOURCES = "resources of its own domain"
COUNT = "USB/IP devices of one resource"
SOURCE = "as its controller and its node"
EVENT_TEXTS = "no annotations and no labels"
ABOUT = "about a pod or about its own node"
RULES = (
    *(BOUND, NAME, SESSION, HOLDER, LABEL, OWNERS, TEXTS, FIELDS),
    *(OTHER_NODE, METADATA, STATUS, RESOURCES, COUNT, SOURCE, EVENT_TEXTS, ABOUT),
)


@dataclass(frozen=True)
class Scene:
    """Two nodes of one test with the clients of their plugins, and a client with a token that names no node."""

    admin: KubeClient
    a: str
    b: str
    by_a: KubeClient
    by_b: KubeClient
    unbound: KubeClient

    async def lock(self, holder: str) -> dict[str, Any]:
        """Returns a new lock with this holder, created by the admin."""
        made: dict[str, Any] = await self.admin.request("create", LEASES, resource="leases", body=lock(holder))
        return made


def lock(holder: str, **metadata: Any) -> dict[str, Any]:
    name = DeviceKey(ServerKey("192.0.2.1"), f"1-{uuid.uuid4().int}").id
    return lease(name, holder, **{"labels": {"usbip.dev/lease": "lock"}, **metadata})


def lease(name: str, holder: str, **metadata: Any) -> dict[str, Any]:
    return {
        "apiVersion": "coordination.k8s.io/v1",
        "kind": "Lease",
        "metadata": {"name": name, **metadata},
        "spec": {"holderIdentity": holder, "leaseDurationSeconds": 40, "leaseTransitions": 1},
    }


def event(node: str, **changes: Any) -> dict[str, Any]:
    """Returns an Event about the node, reported by its plugin."""
    return {
        "apiVersion": "events.k8s.io/v1",
        "kind": "Event",
        "metadata": {"name": f"e-{uuid.uuid4().hex}", "namespace": "default"},
        "eventTime": "2026-01-01T00:00:00.000000Z",
        "type": "Normal",
        "reason": "Attached",
        "action": "Attach",
        "regarding": {"kind": "Node", "apiVersion": "v1", "name": node, "uid": node},
        "reportingController": "usbip.dev/usbip-plugin",
        "reportingInstance": node,
        **changes,
    }


def node_object(name: str) -> dict[str, Any]:
    """Returns a Node as a kubelet writes it."""
    return {
        "apiVersion": "v1",
        "kind": "Node",
        "metadata": {"name": name, "labels": {"zone": "a"}, "annotations": {"note": "kept"}},
        "status": {
            "capacity": {"cpu": "4", "memory": "8Gi", "pods": "110", "nvidia.com/gpu": "2", "usbip.dev/stick": "2"},
            "allocatable": {"cpu": "4", "memory": "7Gi", "pods": "110", "nvidia.com/gpu": "2", "usbip.dev/stick": "2"},
            "addresses": [{"type": "InternalIP", "address": "192.0.2.7"}],
            "conditions": [{"type": "Ready", "status": "True", "reason": "KubeletReady"}],
            "images": [{"names": ["example.org/a@sha256:0"], "sizeBytes": 5}],
        },
    }


async def create(client: KubeClient, body: dict[str, Any], path: str = LEASES) -> dict[str, Any]:
    return await client.request("create", path, resource=path.rsplit("/", 1)[1], body=body)


async def update(client: KubeClient, body: dict[str, Any], **spec: Any) -> dict[str, Any]:
    """Writes a lock by compare-and-swap on the version that was read."""
    changed = {**body, "spec": {**body["spec"], **spec}}
    return await client.request("update", f"{LEASES}/{body['metadata']['name']}", resource="leases", body=changed)


async def patch_status(client: KubeClient, node: str, body: dict[str, Any]) -> dict[str, Any]:
    return await client.request("patch", f"{NODES}/{node}/status", resource="nodes/status", body=body)


def allocatable(counts: Mapping[str, str | None]) -> dict[str, Any]:
    return {"status": {"allocatable": dict(counts)}}


Attack = Callable[[Scene], Awaitable[object]]


def created(make: Callable[[Scene], dict[str, Any]], path: str = LEASES) -> Attack:
    return lambda scene: create(scene.by_a, make(scene), path)


def patched(body: dict[str, Any]) -> Attack:
    """Returns a patch of the attacker's own Node."""
    return lambda scene: patch_status(scene.by_a, scene.a, body)


def updated(holder: Callable[[Scene], str], spec: Callable[[Scene], dict[str, Any]]) -> Attack:
    """Returns an update of the spec of a lock with this holder."""

    async def attack(scene: Scene) -> None:
        await update(scene.by_a, await scene.lock(holder(scene)), **spec(scene))

    return attack


def updated_metadata(**metadata: Any) -> Attack:
    """Returns an update of the metadata of the attacker's own lock."""

    async def attack(scene: Scene) -> None:
        held = await scene.lock(scene.a)
        await update(scene.by_a, {**held, "metadata": {**held["metadata"], **metadata}})

    return attack


async def renew_session_of_b(scene: Scene) -> None:
    made = await create(scene.by_b, lease(session_name(scene.b), scene.b))
    await update(scene.by_a, made, leaseDurationSeconds=3600)


def many_notes() -> dict[str, str]:
    """Returns as many annotations as the API server takes."""
    return {f"a.example.org/{number}": "x" * 10_000 for number in range(25)}


def fields(names: Iterable[str], leaf: dict[str, Any] | None = None) -> list[dict[str, Any]]:
    """Returns managedFields by which the writer owns annotations of these names."""
    owned = {"f:metadata": {"f:annotations": {name: leaf or {} for name in names}}}
    return [
        {
            "manager": "evil",
            "operation": "Update",
            "apiVersion": "coordination.k8s.io/v1",
            "time": "2026-01-01T00:00:00Z",
            "fieldsType": "FieldsV1",
            "fieldsV1": owned,
        }
    ]


LABELS = {"usbip.dev/lease": "lock"}
POD = record.POD
OWNER = [{"apiVersion": "v1", "kind": "ConfigMap", "name": "gone", "uid": "00000000-0000-4000-8000-000000000000"}]

ATTACKS: dict[str, tuple[str, Attack]] = {
    "a lease by a token of no node": (BOUND, lambda s: create(s.unbound, lock(""))),
    "create another node's session": (NAME, created(lambda s: lease(session_name(s.b), s.a))),
    "write another node's session": (NAME, renew_session_of_b),
    "a lease of another name": (NAME, created(lambda s: lease(f"leader-{s.a}", s.a))),
    "a session that only begins like the own": (NAME, created(lambda s: lease(session_name(s.a) + "-x", s.a))),
    "a lock name too long": (NAME, created(lambda s: lease(lock("")["metadata"]["name"] + "a", s.a))),
    "another holder in the own session": (SESSION, created(lambda s: lease(session_name(s.a), s.b))),
    "no holder in the own session": (SESSION, created(lambda s: lease(session_name(s.a), ""))),
    "a lock in another's name": (HOLDER, created(lambda s: lock(s.b))),
    "release another's lock": (HOLDER, updated(lambda s: s.b, lambda _: {"holderIdentity": ""})),
    "edit another's lock": (HOLDER, updated(lambda s: s.b, lambda _: {"leaseDurationSeconds": 1})),
    "edit a free lock without taking it": (HOLDER, updated(lambda _: "", lambda _: {"leaseDurationSeconds": 1})),
    "give the own lock to another": (HOLDER, updated(lambda s: s.a, lambda s: {"holderIdentity": s.b})),
    "a lock without labels": (LABEL, created(lambda s: lock(s.a, labels={}))),
    "a lock labelled as a session": (LABEL, created(lambda s: lock(s.a, labels={"usbip.dev/lease": "session"}))),
    "remove the labels of the own lock": (LABEL, updated_metadata(labels={})),
    "an owner that is gone": (OWNERS, created(lambda s: lock(s.a, ownerReferences=OWNER))),
    "an owner for a lock that is held": (OWNERS, updated_metadata(ownerReferences=OWNER)),
    "a finalizer on a lock": (OWNERS, created(lambda s: lock(s.a, finalizers=["example.org/keep"]))),
    "an annotation of another key": (TEXTS, created(lambda s: lock(s.a, annotations={"usbip.dev/note": "x"}))),
    "250 KB in annotations of other keys": (TEXTS, created(lambda s: lock(s.a, annotations=many_notes()))),
    "250 KB in an annotation of its own": (TEXTS, created(lambda s: lock(s.a, annotations={POD: "x" * 250_000}))),
    "a person's release that was none": (TEXTS, updated_metadata(annotations={record.RELEASED_FROM: "default/p"})),
    "a long annotation for the own lock": (TEXTS, updated_metadata(annotations={POD: "x" * 1025})),
    "a long annotation in the own session": (
        TEXTS,
        created(lambda s: lease(session_name(s.a), s.a, annotations={POD: "x" * 1025})),
    ),
    "a label of another key": (TEXTS, created(lambda s: lock(s.a, labels={**LABELS, "a.example.org/b": "c"}))),
    "a megabyte of fields": (
        FIELDS,
        created(lambda s: lock(s.a, managedFields=fields(f"f:{n}" for n in range(60_000)))),
    ),
    "long names of fields": (FIELDS, created(lambda s: lock(s.a, managedFields=fields(["f:" + "x" * 1_000_000])))),
    "deep fields": (
        FIELDS,
        created(lambda s: lock(s.a, managedFields=fields(["f:x"], {f"f:{n}": {} for n in range(99)}))),
    ),
    "another node's count": (OTHER_NODE, lambda s: patch_status(s.by_a, s.b, allocatable({"usbip.dev/stick": "0"}))),
    "a label": (METADATA, patched({"metadata": {"labels": {"role": "control-plane"}}})),
    "a label changed": (METADATA, patched({"metadata": {"labels": {"zone": "b"}}})),
    "a label taken away": (METADATA, patched({"metadata": {"labels": {"zone": None}}})),
    "all labels taken away": (METADATA, patched({"metadata": {"labels": None}})),
    "an annotation": (METADATA, patched({"metadata": {"annotations": {"scale-down-disabled": "true"}}})),
    "a finalizer": (METADATA, patched({"metadata": {"finalizers": ["example.org/keep"]}})),
    "an owner": (METADATA, patched({"metadata": {"ownerReferences": OWNER}})),
    "a condition": (STATUS, patched({"status": {"conditions": [{"type": "Ready", "status": "False"}]}})),
    "an address": (STATUS, patched({"status": {"addresses": [{"type": "InternalIP", "address": "192.0.2.8"}]}})),
    "capacity": (STATUS, patched({"status": {"capacity": {"usbip.dev/stick": "3"}}})),
    "images taken away": (STATUS, patched({"status": {"images": None}})),
    "volumes in use": (STATUS, patched({"status": {"volumesInUse": ["example.org/v"]}})),
    "kubelet's version": (STATUS, patched({"status": {"nodeInfo": {"kubeletVersion": "v0"}}})),
    "cpu": (RESOURCES, patched(allocatable({"cpu": "3"}))),
    "another plugin's resource": (RESOURCES, patched(allocatable({"nvidia.com/gpu": "1"}))),
    "another plugin's resource taken away": (RESOURCES, patched(allocatable({"nvidia.com/gpu": None}))),
    "a new resource of another domain": (RESOURCES, patched(allocatable({"usbip.dev.example.org/stick": "1"}))),
    "cpu beside the own count": (RESOURCES, patched(allocatable({"usbip.dev/stick": "1", "cpu": "1"}))),
    "a count beyond reason": (COUNT, patched(allocatable({"usbip.dev/stick": "10001"}))),
    "the kubelet's event": (SOURCE, created(lambda s: event(s.a, reportingController="kubelet"), EVENTS)),
    "another node's event": (SOURCE, created(lambda s: event(s.a, reportingInstance=s.b), EVENTS)),
    "an event with annotations": (
        EVENT_TEXTS,
        created(lambda s: event(s.a, metadata={"name": f"e-{uuid.uuid4().hex}", "annotations": many_notes()}), EVENTS),
    ),
    "an event with labels": (
        EVENT_TEXTS,
        created(lambda s: event(s.a, metadata={"name": f"e-{uuid.uuid4().hex}", "labels": {"a": "b"}}), EVENTS),
    ),
    "an event about another node": (
        ABOUT,
        created(lambda s: event(s.a, regarding={"kind": "Node", "name": s.b}), EVENTS),
    ),
    "an event about an object without a kind": (
        ABOUT,
        created(lambda s: event(s.a, regarding={"name": s.a, "namespace": "default"}), EVENTS),
    ),
    "an event about a Service": (
        ABOUT,
        created(lambda s: event(s.a, regarding={"kind": "Service", "name": "x", "namespace": "default"}), EVENTS),
    ),
}


@pytest.fixture
async def scene(cluster: Cluster, admin: KubeClient, tokens: NodeTokens) -> AsyncIterator[Scene]:
    """Yields a scene with the shipped policy and ServiceAccount."""
    async with scene_of(cluster, admin, tokens) as made:
        yield made


@contextlib.asynccontextmanager
async def scene_of(cluster: Cluster, admin: KubeClient, tokens: NodeTokens) -> AsyncIterator[Scene]:
    a, b = (f"n{uuid.uuid4().hex[:8]}-{letter}" for letter in "ab")
    for name in (a, b):
        await create(admin, node_object(name), NODES)
    async with (
        tokens.client(a) as by_a,
        tokens.client(b) as by_b,
        client_with(cluster, await tokens.unbound()) as unbound,
    ):
        yield Scene(admin, a, b, by_a, by_b, unbound)


def validations() -> list[dict[str, str]]:
    found: list[dict[str, str]] = POLICY["spec"]["validations"]
    return found


def test_every_rule_has_attacks() -> None:
    texts = [rule.get("message") or rule["messageExpression"] for rule in validations()]
    assert [[part for part in RULES if part in " ".join(text.replace("'", " ").split())] for text in texts] == [
        [part] for part in RULES
    ]
    assert {rule for rule, _attack in ATTACKS.values()} == set(RULES)


@pytest.mark.parametrize("name", ATTACKS)
async def test_an_attack_is_refused_by_its_rule(scene: Scene, name: str) -> None:
    rule, attack = ATTACKS[name]
    with pytest.raises(KubeForbidden) as refused:
        await attack(scene)
    assert rule in str(refused.value)
    assert "grant it" not in str(refused.value), "no right would allow it"


async def test_a_token_of_no_node_may_write_nothing(scene: Scene) -> None:
    for write in (
        create(scene.unbound, lock("")),
        patch_status(scene.unbound, scene.a, allocatable({"usbip.dev/stick": "1"})),
        create(scene.unbound, event(scene.a), EVENTS),
    ):
        with pytest.raises(KubeForbidden) as refused:
            await write
        assert BOUND in str(refused.value)
        assert "--bound-object-kind Pod" in str(refused.value), "the cure"


async def test_a_status_patch_does_not_change_the_nodes_spec(scene: Scene) -> None:
    taints = [{"key": "k", "effect": "NoExecute"}]
    after = await patch_status(scene.by_a, scene.a, {"spec": {"taints": taints, "unschedulable": True}})
    assert "unschedulable" not in after["spec"]
    assert not [taint for taint in after["spec"].get("taints", []) if taint["key"] == "k"]


async def test_a_lock_is_taken_renewed_released_and_taken_over(scene: Scene) -> None:
    held = await create(scene.by_a, lock(scene.a))
    held["metadata"]["annotations"] = {"usbip.dev/vhci-port": "3"}
    held = await update(scene.by_a, held, leaseDurationSeconds=41)
    taken = await update(scene.by_b, held, holderIdentity=scene.b, leaseTransitions=2)
    free = await update(scene.by_b, taken, holderIdentity="")
    again = await update(scene.by_a, free, holderIdentity=scene.a, leaseTransitions=3)
    assert again["spec"]["holderIdentity"] == scene.a


@pytest.mark.parametrize("holder", ["", "a"])
async def test_a_write_to_a_deleted_lock_is_not_found_or_a_conflict(scene: Scene, holder: str) -> None:
    held = await scene.lock(scene.a)
    await scene.admin.request("delete", f"{LEASES}/{held['metadata']['name']}", resource="leases")
    with pytest.raises((KubeNotFound, KubeConflict)):
        await update(scene.by_a, held, holderIdentity=scene.a if holder else "")


async def test_what_others_put_on_a_lease_stops_no_write(scene: Scene) -> None:
    notes = {"example.org/note": "x" * 3000, POD: "y" * 2000, record.RELEASED_FROM: "default/p"}
    held = await create(scene.admin, lock(scene.a, annotations=notes, labels={**LABELS, "example.org/team": "lab"}))
    renewed = await update(scene.by_a, held, leaseDurationSeconds=41)
    assert renewed["metadata"]["annotations"] == notes
    renewed["metadata"] |= {"annotations": {POD: "default/p"}, "labels": LABELS}
    assert (await update(scene.by_a, renewed, leaseDurationSeconds=42))["metadata"]["labels"] == LABELS


async def test_a_session_is_renewed(scene: Scene) -> None:
    made = await create(scene.by_a, lease(session_name(scene.a), scene.a))
    assert await update(scene.by_a, made, leaseTransitions=2)


@pytest.mark.parametrize("counts", [{"usbip.dev/stick": "0"}, {"usbip.dev/stick": "9999"}, {"usbip.dev/new": "5"}])
async def test_counts_are_written_whatever_the_kubelet_has_published(scene: Scene, counts: dict[str, str]) -> None:
    after = await patch_status(scene.by_a, scene.a, allocatable(counts))
    assert after["status"]["allocatable"].items() >= counts.items()


async def test_a_node_without_allocatable_gets_its_first_count(tokens: NodeTokens, admin: KubeClient) -> None:
    node = f"n{uuid.uuid4().hex[:8]}-bare"
    await make_node(admin, node)
    async with tokens.client(node) as client:
        after = await patch_status(client, node, allocatable({"usbip.dev/stick": "1"}))
    assert after["status"]["allocatable"] == {"usbip.dev/stick": "1"}


async def test_a_large_node_is_within_the_cost_limit(tokens: NodeTokens, admin: KubeClient) -> None:
    """The API server refuses a write whose policy expressions cost too much."""
    name = f"n{uuid.uuid4().hex[:8]}-large"
    body = node_object(name)
    body["metadata"]["labels"] = {f"example.org/label-{i}": "x" * 63 for i in range(200)}
    body["metadata"]["annotations"] = {f"example.org/annotation-{i}": "x" * 1000 for i in range(200)}
    counts = {f"usbip.dev/stick-{i}": "1" for i in range(500)}
    for part in ("capacity", "allocatable"):
        body["status"][part].update({f"example.org/r-{i}": "1" for i in range(200)} | counts)
    body["status"]["images"] = [
        {"names": [f"example.org/{'a' * 60}/{i}@sha256:{'0' * 64}", f"example.org/{i}:latest"], "sizeBytes": i}
        for i in range(200)
    ]
    body["status"]["volumesInUse"] = [f"kubernetes.io/csi/example.org^{'v' * 60}-{i}" for i in range(200)]
    await create(admin, body, NODES)
    async with tokens.client(name) as client:
        await patch_status(client, name, allocatable(dict.fromkeys(counts, "0")))


async def test_events_about_pods_and_the_own_node_are_accepted(scene: Scene) -> None:
    await create(scene.by_a, event(scene.a), EVENTS)
    pod = {"kind": "Pod", "apiVersion": "v1", "name": "p", "namespace": "default"}
    await create(scene.by_a, event(scene.a, regarding=pod), EVENTS)


async def test_the_policy_does_not_apply_to_others(scene: Scene) -> None:
    await create(scene.admin, lease(f"other-{scene.a}", "anybody"))
    await create(scene.admin, event(scene.a, reportingController="example.org/c"), EVENTS)
    await patch_status(scene.admin, scene.a, allocatable({"cpu": "1"}))


LONG = "n" + "a" * 60 + ".b" * 90
"""A node name of 241 characters, whose session name is as long as can be."""


@pytest.mark.parametrize("node", [LONG, LONG + "c", "f" * 224 + "." + "0" * 28, "f" * 223 + "--" + "0" * 28])
async def test_a_long_node_name_has_its_session_and_no_others(tokens: NodeTokens, admin: KubeClient, node: str) -> None:
    async with tokens.client(node) as client:
        name = session_name(node)
        made = await create(client, lease(name, node))
        await update(client, made, leaseTransitions=2)
        await admin.request("delete", f"{LEASES}/{name}", resource="leases")
        # of another node, of one with a similar name, and two that are not digests
        for other in (
            session_name(node[1:]),
            session_name("g" + node[1:]),
            "usbip-node-" + node[:199],
            name[:-1] + "g",
        ):
            with pytest.raises(KubeForbidden) as refused:
                await create(client, lease(other, node))
            assert "ValidatingAdmissionPolicy" in str(refused.value)
        if name != "usbip-node-" + node:
            theirs = await create(admin, lease(name, node[:-1] + "z"))
            with pytest.raises(KubeForbidden) as refused:
                await update(client, theirs, holderIdentity=node)
            assert "ValidatingAdmissionPolicy" in str(refused.value)
            await admin.request("delete", f"{LEASES}/{name}", resource="leases")


LONG_INSTANCE = "n" + "a" * 60 + "." + "b" * 20 + "." + "k" * 60
"""A node's name of 143 characters: more than reportingInstance takes."""


@pytest.mark.parametrize("node", [LONG_INSTANCE[-128:], LONG_INSTANCE[-129:], LONG_INSTANCE, LONG])
async def test_a_node_with_a_long_name_reports_events_about_itself_and_its_pods(tokens: NodeTokens, node: str) -> None:
    text = EventText(NORMAL, "Attached", "Attach", "as before")
    async with tokens.client(node) as client:
        for pod in (None, PodRef("default", "p", "uid")):
            name = event_name(pod.name if pod else node, uuid.uuid4().int % 2**64)
            body = event_body(NodeIdentity(node, "boot"), text, pod, name, "2026-01-01T00:00:00.000000Z")
            assert (await create(client, body, EVENTS))["reportingInstance"] == instance_of(node)


async def test_a_node_with_a_long_name_cannot_report_as_another(tokens: NodeTokens) -> None:
    node = LONG_INSTANCE
    own = instance_of(node)
    others = {
        "another beginning": instance_of("m" + node[1:]),
        "another end": instance_of(node[:-1] + "l"),
        "the first 128 characters": node[:128],
        "a short name": "worker-1",
        "an invalid digest": own[:-1] + "g",
        "no digest": own[:-16],
        "text between beginning and digest": own.replace("~", "~x~", 1)[:128],
    }
    async with tokens.client(node) as client:
        for what, instance in others.items():
            with pytest.raises(KubeForbidden) as refused:
                await create(client, event(node, reportingInstance=instance), EVENTS)
            assert SOURCE in str(refused.value), what


async def test_a_node_with_a_short_name_cannot_report_as_one_with_a_long_name(scene: Scene) -> None:
    with pytest.raises(KubeForbidden) as refused:
        await create(scene.by_a, event(scene.a, reportingInstance=instance_of(scene.a + LONG)), EVENTS)
    assert SOURCE in str(refused.value)


class Mutants:
    """ServiceAccounts for which a copy of the policy without one rule holds, one for each rule."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster

    def tokens(self, rule: str) -> NodeTokens:
        return NodeTokens(self._cluster, MUTANTS, account_of(rule))

    async def make(self, admin: KubeClient) -> None:
        """Creates the accounts and policies, and waits until every policy is enforced."""
        await create(
            admin, {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": MUTANTS}}, "/api/v1/namespaces"
        )
        for document in shipped():
            if document["kind"] in {"RoleBinding", "ClusterRoleBinding"}:
                bound = copy.deepcopy(document)
                bound["metadata"]["name"] = MUTANTS
                bound["subjects"] = [{"kind": "Group", "name": f"system:serviceaccounts:{MUTANTS}"}]
                bound["subjects"][0]["apiGroup"] = "rbac.authorization.k8s.io"
                await create(admin, bound, collection(bound))
        for rule in RULES:
            account = {"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": account_of(rule)}}
            await create(admin, account, f"/api/v1/namespaces/{MUTANTS}/serviceaccounts")
            for document in without(rule):
                await create(admin, document, collection(document))
        for rule in RULES:
            async with asyncio.timeout(EFFECT_S):
                await self._enforced(rule, admin)

    async def _enforced(self, rule: str, admin: KubeClient) -> None:
        """Waits until another rule of the copy refuses an attack."""
        other = "a finalizer on a lock" if rule == BOUND else "a lease by a token of no node"
        async with scene_of(self._cluster, admin, self.tokens(rule)) as scene:
            while True:
                try:
                    await ATTACKS[other][1](scene)
                except KubeForbidden:
                    return
                await asyncio.sleep(_POLL_S)  # the API server has no event for the enforcement of a policy


def account_of(rule: str) -> str:
    return f"without-{RULES.index(rule)}"


def without(rule: str) -> list[dict[str, Any]]:
    """Returns the policy without the rule, and its binding, for account_of(rule)."""
    policy, binding = copy.deepcopy(POLICY), copy.deepcopy(BINDING)
    name = policy["metadata"]["name"] = binding["metadata"]["name"] = binding["spec"]["policyName"] = account_of(rule)
    (condition,) = policy["spec"]["matchConditions"]
    before = condition["expression"]
    condition["expression"] = before.replace(f"{NAMESPACE}:{ACCOUNT}", f"{MUTANTS}:{name}")
    assert condition["expression"] != before
    del policy["spec"]["validations"][RULES.index(rule)]
    return [policy, binding]


@pytest.fixture(scope="session")
def mutants(cluster: Cluster) -> Mutants:
    async def make() -> Mutants:
        made = Mutants(cluster)
        async with client_with(cluster, ADMIN_TOKEN) as admin:
            await made.make(admin)
        return made

    return asyncio.run(make())


@pytest.mark.parametrize("name", ATTACKS)
async def test_without_its_rule_an_attack_passes(
    cluster: Cluster, admin: KubeClient, mutants: Mutants, name: str
) -> None:
    rule, attack = ATTACKS[name]
    async with scene_of(cluster, admin, mutants.tokens(rule)) as scene:
        await attack(scene)
