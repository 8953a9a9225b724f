"""rbac/ as shipped: each verb the plugin uses is granted, others are refused, and the refusal says what to grant."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest

from tests.apiserver.conftest import ACCOUNT_NODE
from usbip_plugin.errors import KubeForbidden, KubeNotFound
from usbip_plugin.kube.client import KubeClient

pytestmark = pytest.mark.short

LEASES = "leases.coordination.k8s.io"
BASE = "/apis/coordination.k8s.io/v1/namespaces/{}/leases"
OWN = BASE.format("usbip-system")
LOCK = "usbip-rbactest" + "a" * 12
ABSENT = "usbip-absent" + "a" * 14


@dataclass(frozen=True)
class Call:
    verb: str
    path: str
    resource: str
    body: dict[str, Any] | None = None

    def __str__(self) -> str:
        return f"{self.verb} {self.path}"

    async def by(self, client: KubeClient) -> None:
        await client.request(self.verb, self.path, resource=self.resource, body=self.body)


def lease(name: str, version: str = "") -> dict[str, Any]:
    """A lock that the plugin's pod of `account` may write."""
    return {
        "apiVersion": "coordination.k8s.io/v1",
        "kind": "Lease",
        "metadata": {"name": name, "resourceVersion": version, "labels": {"usbip.dev/lease": "lock"}},
        "spec": {"holderIdentity": ACCOUNT_NODE},
    }


EVENT = {
    "apiVersion": "events.k8s.io/v1",
    "kind": "Event",
    "metadata": {"name": "rbac-test", "namespace": "default"},
    "eventTime": "2026-01-01T00:00:00.000000Z",
    "action": "Attach",
    "reason": "Attached",
    "type": "Normal",
    "note": "n",
    "reportingController": "usbip.dev/usbip-plugin",
    "reportingInstance": ACCOUNT_NODE,
    "regarding": {"kind": "Node", "name": ACCOUNT_NODE},
}
PATCH: dict[str, Any] = {"status": {"allocatable": {"usbip.dev/storage": "1"}}}

# After authorisation a missing object is 404: that is enough to see that the verb is granted.
GRANTED = [
    Call("list", OWN, LEASES),
    Call("get", f"{OWN}/absent", LEASES),
    Call("create", OWN, LEASES, lease(LOCK)),
    Call("update", f"{OWN}/{ABSENT}", LEASES, lease(ABSENT, "1")),
    Call("list", "/api/v1/pods?fieldSelector=spec.nodeName%3Dnode", "pods"),
    Call("create", "/apis/events.k8s.io/v1/namespaces/default/events", "events.events.k8s.io", EVENT),
    Call("patch", "/api/v1/nodes/absent/status", "nodes/status", PATCH),
]
REFUSED = [
    Call("delete", f"{OWN}/absent", LEASES),
    Call("patch", f"{OWN}/absent", LEASES, {}),
    Call("list", BASE.format("default"), LEASES),
    Call("create", BASE.format("kube-system"), LEASES, lease("x")),
    Call("get", "/api/v1/nodes/absent", "nodes"),
    Call("patch", "/api/v1/nodes/absent", "nodes", PATCH),
    Call("update", "/api/v1/nodes/absent/status", "nodes/status", PATCH),
    Call("list", "/api/v1/secrets", "secrets"),
    Call("delete", "/api/v1/namespaces/default/pods/absent", "pods"),
]


@pytest.mark.parametrize("call", GRANTED, ids=str)
async def test_what_the_plugin_does_is_granted(account: KubeClient, call: Call) -> None:
    try:
        await call.by(account)
    except KubeNotFound:
        assert "absent" in call.path


@pytest.mark.parametrize("call", REFUSED, ids=str)
async def test_anything_else_is_refused_by_name(account: KubeClient, call: Call) -> None:
    with pytest.raises(KubeForbidden) as refused:
        await call.by(account)
    assert (refused.value.verb, refused.value.resource) == (call.verb, call.resource)
    assert f"{call.verb} {call.resource}" in str(refused.value)
    assert "rbac/" in str(refused.value)


@pytest.mark.parametrize(("path", "resource"), [(OWN, LEASES), ("/api/v1/pods", "pods")])
async def test_watches_are_granted(account: KubeClient, path: str, resource: str) -> None:
    listed = await account.list(path, resource=resource)
    params = {"resourceVersion": listed["metadata"]["resourceVersion"]}
    events = [event async for event in account.watch(path, resource=resource, params=params, timeout=1)]
    assert all(event["type"] == "BOOKMARK" for event in events)


async def test_a_refused_watch_names_what_to_grant(account: KubeClient) -> None:
    with pytest.raises(KubeForbidden) as refused:
        async for _event in account.watch("/api/v1/secrets", resource="secrets"):
            pass
    assert (refused.value.verb, refused.value.resource) == ("watch", "secrets")
