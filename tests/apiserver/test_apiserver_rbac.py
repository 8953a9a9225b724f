"""Requests that rbac/ does not grant are refused with the right to grant. test_apiserver_rights tests granted ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest

from tests.apiserver.objects import LEASES as OWN
from usbip_plugin.errors import KubeForbidden
from usbip_plugin.kube.client import KubeClient

pytestmark = pytest.mark.short

LEASES = "leases.coordination.k8s.io"
BASE = "/apis/coordination.k8s.io/v1/namespaces/{}/leases"


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


PATCH: dict[str, Any] = {"status": {"allocatable": {"usbip.dev/storage": "1"}}}

REFUSED = [
    Call("delete", f"{OWN}/absent", LEASES),
    Call("patch", f"{OWN}/absent", LEASES, {}),
    Call("list", BASE.format("default"), LEASES),
    Call("create", BASE.format("kube-system"), LEASES, {"kind": "Lease", "metadata": {"name": "x"}}),
    Call("get", "/api/v1/nodes/absent", "nodes"),
    Call("patch", "/api/v1/nodes/absent", "nodes", PATCH),
    Call("update", "/api/v1/nodes/absent/status", "nodes/status", PATCH),
    Call("list", "/api/v1/secrets", "secrets"),
    Call("delete", "/api/v1/namespaces/default/pods/absent", "pods"),
]


@pytest.mark.parametrize("call", REFUSED, ids=str)
async def test_other_requests_are_refused_with_verb_and_resource(account: KubeClient, call: Call) -> None:
    with pytest.raises(KubeForbidden) as refused:
        await call.by(account)
    assert (refused.value.verb, refused.value.resource) == (call.verb, call.resource)
    assert f"{call.verb} {call.resource}" in str(refused.value)
    assert "rbac/" in str(refused.value)


async def test_a_refused_watch_names_what_to_grant(account: KubeClient) -> None:
    with pytest.raises(KubeForbidden) as refused:
        async for _event in account.watch("/api/v1/secrets", resource="secrets"):
            pass
    assert (refused.value.verb, refused.value.resource) == ("watch", "secrets")
