"""The LeaseStore contract on a real API server."""

import asyncio

import pytest

from tests.apiserver.node_tokens import NAMESPACE
from tests.rigs.api_process import Cluster
from tests.rigs.lease_store_suite import Compact, Delete, LeaseStoreContract
from usbip_plugin.kube.client import KubeClient
from usbip_plugin.locks.kubernetes import RESOURCE, KubernetesLeases
from usbip_plugin.locks.record import Lease, LeaseStore

pytestmark = pytest.mark.short


class TestKubernetesLeases(LeaseStoreContract):
    @pytest.fixture
    def store(self, admin: KubeClient) -> LeaseStore:
        return KubernetesLeases(admin, NAMESPACE)

    @pytest.fixture
    def delete(self, admin: KubeClient) -> Delete:
        async def remove(lease: Lease) -> None:
            path = f"/apis/coordination.k8s.io/v1/namespaces/usbip-system/leases/{lease.name}"
            await admin.request("delete", path, resource=RESOURCE)

        return remove

    @pytest.fixture
    def compact(self, cluster: Cluster) -> Compact:
        return lambda: asyncio.to_thread(cluster.forget)
