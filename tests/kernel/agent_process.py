"""agent_process.py CONFIG DIRECTORY LEASES: forks processes of one node's agent for plugin_spawner.

CONFIG: a configuration file. DIRECTORY: the kubelet's directory of agent_rig. LEASES: the socket of lease_socket.
"""

from __future__ import annotations

import asyncio
import random
import sys
from collections.abc import Mapping
from pathlib import Path

from opentelemetry.trace import NoOpTracer

from tests.kernel.lease_socket import SocketLeases
from tests.kernel.plugin_spawner import serve
from tests.rigs.agent_rig import DOMAIN, NODE, plugin_directory, pod_resources_socket, real_driver
from usbip_plugin.attach.cdi import CdiDirectory
from usbip_plugin.clock import SystemClock
from usbip_plugin.config.reload import load_config
from usbip_plugin.kubelet.plugins import SocketRegistrar
from usbip_plugin.kubelet.pod_resources import GrpcPodResources
from usbip_plugin.kubelet.registration import PluginDirectory
from usbip_plugin.model import NodeIdentity, PodRef
from usbip_plugin.node.agent import Agent, AgentDependencies
from usbip_plugin.node.daemon import boot_id
from usbip_plugin.observe.logs import set_up_logging
from usbip_plugin.usbip.client import TcpUsbipClient


class AgreeingApi:
    """A PodView of an API server that has every pod. Pods that the kubelet does not list have ended."""

    synced = True

    def find(self, namespace: str, name: str) -> PodRef | None:
        return PodRef(namespace, name, f"uid-of-{name}")

    def ended(self, namespace: str, name: str) -> bool:
        return False

    def completed(self, pod: PodRef) -> bool:
        return False

    def wanting(self, domain: str) -> Mapping[PodRef, Mapping[str, int]]:
        return {}


async def main(config: Path, directory: Path, leases: Path) -> None:
    clock, rng = SystemClock(), random.Random()
    async with GrpcPodResources(pod_resources_socket(directory), DOMAIN) as pod_resources:
        outside = AgentDependencies(
            me=NodeIdentity(NODE, boot_id()),
            client=TcpUsbipClient(clock),
            driver=real_driver(),
            leases=SocketLeases(leases, clock),
            pod_resources=pod_resources,
            specs=CdiDirectory(directory / "cdi", DOMAIN),
            kube=None,
            registrar=SocketRegistrar(PluginDirectory(plugin_directory(directory), clock), clock, rng),
            clock=clock,
            rng=rng,
            tracer=NoOpTracer(),
            pods=AgreeingApi(),
        )
        await Agent(outside, load_config(config).config, domain=DOMAIN).run()


if __name__ == "__main__" and serve():
    set_up_logging("info", sys.stderr, json_lines=False)
    asyncio.run(main(*(Path(argument) for argument in sys.argv[1:4])))
