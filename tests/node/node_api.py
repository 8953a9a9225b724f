"""Requests to the API server as cluster admin, and waits for conditions."""

from __future__ import annotations

import json
import os
import ssl
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

REQUEST_S = 30.0
LIMIT_S = 150.0  # for an event that must come; the guest is emulated and slow
POLL_S = 0.5

Object: TypeAlias = dict[str, Any]
T = TypeVar("T")

_COLLECTIONS = {
    "Namespace": "/api/v1/namespaces",
    "ServiceAccount": "/api/v1/namespaces/{namespace}/serviceaccounts",
    "ConfigMap": "/api/v1/namespaces/{namespace}/configmaps",
    "Pod": "/api/v1/namespaces/{namespace}/pods",
    "Node": "/api/v1/nodes",
    "Event": "/apis/events.k8s.io/v1/namespaces/{namespace}/events",
    "Lease": "/apis/coordination.k8s.io/v1/namespaces/{namespace}/leases",
    "DaemonSet": "/apis/apps/v1/namespaces/{namespace}/daemonsets",
    "Role": "/apis/rbac.authorization.k8s.io/v1/namespaces/{namespace}/roles",
    "RoleBinding": "/apis/rbac.authorization.k8s.io/v1/namespaces/{namespace}/rolebindings",
    "ClusterRole": "/apis/rbac.authorization.k8s.io/v1/clusterroles",
    "ClusterRoleBinding": "/apis/rbac.authorization.k8s.io/v1/clusterrolebindings",
    "ValidatingAdmissionPolicy": "/apis/admissionregistration.k8s.io/v1/validatingadmissionpolicies",
    "ValidatingAdmissionPolicyBinding": "/apis/admissionregistration.k8s.io/v1/validatingadmissionpolicybindings",
}


def until(check: Callable[[], T | None], what: str) -> T:
    """Returns the first result of check that is neither None nor False. Raises AssertionError after LIMIT_S."""
    end = time.monotonic() + LIMIT_S
    while True:
        found = check()
        if found is not None and found is not False:
            return found
        assert time.monotonic() < end, f"not within {LIMIT_S:g} s: {what}"
        time.sleep(POLL_S)


class Api:
    """A client of the API server, which names objects by kind, namespace and name."""

    def __init__(self) -> None:
        access = json.loads((Path(os.environ["NODE_STATE"]) / "api.json").read_text())
        self._server: str = access["server"]
        self._token: str = access["token"]
        self._tls = ssl.create_default_context(cafile=access["ca"])

    def apply(self, body: Object) -> Object:
        """Applies an object on the server. Removes fields that were applied before and are not in body."""
        path = self._path(body["kind"], body["metadata"].get("namespace", ""), body["metadata"]["name"])
        return self._request("PATCH", path + "?fieldManager=test&force=true", body, "application/apply-patch+yaml")

    def create(self, body: Object) -> Object:
        path = self._path(body["kind"], body["metadata"].get("namespace", ""))
        return self._request("POST", path, body)

    def get(self, kind: str, namespace: str, name: str) -> Object | None:
        try:
            return self._request("GET", self._path(kind, namespace, name))
        except urllib.error.HTTPError as error:
            if error.code == 404:
                return None
            raise

    def all(self, kind: str, namespace: str, selector: str = "") -> list[Object]:
        items: list[Object] = self._request("GET", f"{self._path(kind, namespace)}?labelSelector={selector}")["items"]
        return items

    def delete(self, kind: str, namespace: str, name: str, *, wait: bool = True) -> None:
        try:
            self._request("DELETE", self._path(kind, namespace, name))
        except urllib.error.HTTPError as error:
            if error.code != 404:
                raise
        if wait:
            until(lambda: self.get(kind, namespace, name) is None, f"{kind} {name} gone")

    @staticmethod
    def _path(kind: str, namespace: str, name: str = "") -> str:
        return _COLLECTIONS[kind].format(namespace=namespace) + (f"/{name}" if name else "")

    def _request(
        self, method: str, path: str, body: Mapping[str, Any] | None = None, content_type: str = "application/json"
    ) -> Object:
        request = urllib.request.Request(
            self._server + path,
            data=None if body is None else json.dumps(body).encode(),
            method=method,
            headers={"Authorization": f"Bearer {self._token}", "Content-Type": content_type},
        )
        try:
            with urllib.request.urlopen(request, timeout=REQUEST_S, context=self._tls) as answer:
                decoded: Object = json.load(answer)
                return decoded
        except urllib.error.HTTPError as error:
            with error:
                error.add_note(error.read(4096).decode(errors="replace"))
            raise
