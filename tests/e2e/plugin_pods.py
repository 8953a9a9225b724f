"""The plugin's pods: the one on a node, its restart and its replacement."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping

from tests.e2e.cluster import PLUGIN_NAMESPACE, ClusterView, Object, is_ready
from tests.e2e.kubectl import Kubectl


async def plugin_on(cluster: ClusterView, node: str) -> Object:
    plugins = await cluster.all("plugins")
    return next(one for name, one in plugins.items() if _is_plugin(name, one, node))


async def restarted(cluster: ClusterView, before: Object) -> None:
    """Waits until the plugin's container has been restarted and is ready."""
    name = before["metadata"]["name"]
    count = before["status"]["containerStatuses"][0]["restartCount"]

    def again(plugins: Mapping[str, Object]) -> bool:
        one = plugins[name]
        return is_ready(one) and one["status"]["containerStatuses"][0]["restartCount"] > count

    await cluster.until("plugins", again, f"{name} restarted")


async def replace_plugin(cluster: ClusterView, kubectl: Kubectl, node: str) -> None:
    """Deletes the plugin's pod on the node and waits until another is ready there.

    Does not use the status of the DaemonSet, which is stale for a moment.
    """
    old = (await plugin_on(cluster, node))["metadata"]["name"]
    await asyncio.to_thread(kubectl, "delete", "pod", "-n", PLUGIN_NAMESPACE, old)

    def replaced(plugins: Mapping[str, Object]) -> bool:
        return any(name != old and _is_plugin(name, one, node) and is_ready(one) for name, one in plugins.items())

    await cluster.until("plugins", replaced, f"a new plugin on {node}")


def _is_plugin(name: str, pod: Object, node: str) -> bool:
    return name.startswith("usbip-plugin-") and pod["spec"].get("nodeName") == node
