"""The kubelet contract on each simulated kubelet, with the real device-plugin server and, on sockets, registration."""

import pytest

from tests.contract.kubelet_suite import KubeletContract, Make, in_process, on_sockets


class TestOnSockets(KubeletContract):
    @pytest.fixture
    def make(self) -> Make:
        return on_sockets


class TestInProcess(KubeletContract):
    @pytest.fixture
    def make(self) -> Make:
        return in_process
