"""`usbip-plugin check NODE`: a pod on that node, made like those of the plugin's DaemonSet, that checks the node."""

from __future__ import annotations

import argparse
import contextlib
import copy
import sys
from collections.abc import Mapping, Sequence
from typing import Any
from uuid import uuid4

from usbip_plugin.cli.lookup import is_object_name, items, mapping
from usbip_plugin.cli.parser import PLUGIN_LABEL
from usbip_plugin.cli.sources import connected
from usbip_plugin.cli.spinner import spinner
from usbip_plugin.clock import SystemClock
from usbip_plugin.errors import CommandError, KubeError, KubeForbidden, KubeNotFound
from usbip_plugin.kube.client import KubeClient

POD_TIMEOUT_S = 90.0
"""Seconds until the pod must have ended. The image is on the node; the checks take 8 s at most."""
DEADLINE_S = 120
"""activeDeadlineSeconds of the pod: the kubelet ends it if this command was killed."""
MEMORY = "128Mi"
"""Memory limit. A check takes 34 MiB besides the page cache, and the plugin's own limit has no room for both."""
MAX_LOG_BYTES = 1 << 20
"""Bytes of the report that are read."""
CONTAINER = "plugin"
RUN_ONLY = ("--listen", "--probes", "--log-level", "--log-format", "--trace-link")
"""Flags of `run` that `check` does not have."""
STUCK = frozenset(
    {"ErrImagePull", "ImagePullBackOff", "InvalidImageName", "CreateContainerConfigError", "CreateContainerError"}
)
"""Reasons of a waiting container for which waiting longer does not help."""
RIGHTS = "create, watch and delete pods, get pods/log and list daemonsets.apps in the plugin's namespace"


async def check(options: argparse.Namespace) -> int:
    """Carries out `usbip-plugin check NODE`: prints the report and returns its exit status. Always deletes the pod.

    Raises CommandError if the node does not exist or the pod cannot run there.
    """
    if not is_object_name(options.node):
        raise CommandError(f"{options.node!r} is not a valid node name")
    async with connected(options) as (kube, namespace):
        try:
            await _require_node(kube, options.node)
            body = check_pod(await _daemon_set(kube, namespace), options.node, options.output, uuid4().hex[:8])
            path, name = f"/api/v1/namespaces/{namespace}/pods", body["metadata"]["name"]
            async with spinner(f"checking node {options.node}"):
                try:
                    made = await kube.request("create", path, resource="pods", body=body)
                    status = await _finished(kube, path, made)
                    params = {"container": CONTAINER, "limitBytes": str(MAX_LOG_BYTES)}
                    report = await kube.text(f"{path}/{name}/log", resource="pods/log", params=params)
                finally:
                    await _delete(kube, path, name)
        except KubeForbidden as error:
            raise CommandError(f"{error}; checking another node needs the rights to {RIGHTS}") from error
    print(report.rstrip("\n"))  # noqa: T201 - the command line's own voice
    return status


async def _require_node(kube: KubeClient, node: str) -> None:
    with contextlib.suppress(KubeForbidden):  # then the pod shows it
        try:
            await kube.request("get", f"/api/v1/nodes/{node}", resource="nodes")
        except KubeNotFound as error:
            raise CommandError(f"there is no node {node!r}; run `nodes` to list them") from error


async def _daemon_set(kube: KubeClient, namespace: str) -> Mapping[str, Any]:
    path = f"/apis/apps/v1/namespaces/{namespace}/daemonsets"
    found = await kube.list(path, resource="daemonsets.apps", params={"labelSelector": PLUGIN_LABEL})
    for item in found["items"]:
        if _plugin_container(_template(mapping(item))):
            return mapping(item)
    raise CommandError(f"namespace {namespace} has no DaemonSet of the plugin; name its namespace with --namespace")


async def _finished(kube: KubeClient, path: str, made: Mapping[str, Any]) -> int:
    """Returns the exit status of the pod's container. Raises CommandError if it cannot run or takes too long."""
    name, pod = str(mapping(made.get("metadata")).get("name")), made
    clock = SystemClock()
    try:
        async with clock.timeout(POD_TIMEOUT_S):
            while True:
                version = str(mapping(pod.get("metadata")).get("resourceVersion") or "0")
                params = {"fieldSelector": f"metadata.name={name}", "resourceVersion": version}
                async with contextlib.aclosing(kube.watch(path, resource="pods", params=params)) as events:
                    async for event in events:
                        if event["type"] == "DELETED":
                            raise CommandError(f"pod {name} was deleted before it had ended")
                        pod = mapping(event["object"])
                        if event["type"] != "BOOKMARK" and (status := exit_status(pod)) is not None:
                            return status
                pod = await kube.request("get", f"{path}/{name}", resource="pods")
                if (status := exit_status(pod)) is not None:
                    return status
    except TimeoutError as error:
        phase = mapping(pod.get("status")).get("phase") or "Pending"
        raise CommandError(f"pod {name} is still {phase} after {POD_TIMEOUT_S:g} s; is the node ready?") from error


async def _delete(kube: KubeClient, path: str, name: str) -> None:
    """Deletes the pod. A failure is said, and hides no other error."""
    try:
        await kube.request("delete", f"{path}/{name}", resource="pods", body={"gracePeriodSeconds": 0})
    except KubeNotFound:
        pass
    except KubeError as error:
        print(f"pod {name} was not deleted: {error}", file=sys.stderr)  # noqa: T201


def exit_status(pod: Mapping[str, Any]) -> int | None:
    """Returns the exit status of a pod's container, None while it may still end. Raises CommandError if it cannot."""
    status = mapping(pod.get("status"))
    for one in items(status.get("containerStatuses")):
        state = mapping(mapping(one).get("state"))
        ended, waiting = mapping(state.get("terminated")), mapping(state.get("waiting"))
        if isinstance(code := ended.get("exitCode"), int):
            if ended.get("reason") == "OOMKilled":
                raise CommandError(f"the check was killed: it needs more memory than {MEMORY}")
            return code
        if waiting.get("reason") in STUCK:
            raise CommandError(f"the pod cannot start: {waiting.get('reason')}: {waiting.get('message') or ''}")
    if status.get("phase") == "Failed":
        raise CommandError(f"the node refused the pod: {status.get('reason') or ''}: {status.get('message') or ''}")
    return None


def check_pod(daemon_set: Mapping[str, Any], node: str, form: str, suffix: str) -> dict[str, Any]:
    """Returns a pod that runs `check` on the node with the image, flags, mounts and rights of the DaemonSet's pods.

    form: of the report, "text", "json" or "yaml". suffix: makes the pod's name unique.
    """
    template = _template(daemon_set)
    spec = copy.deepcopy(dict(mapping(template.get("spec"))))
    container = dict(_plugin_container(template))
    for key in ("ports", "startupProbe", "livenessProbe", "readinessProbe", "lifecycle"):
        container.pop(key, None)
    container["args"] = check_arguments(container.get("args") or [], form)
    resources = dict(mapping(container.get("resources")))
    container["resources"] = resources | {"limits": {**mapping(resources.get("limits")), "memory": MEMORY}}
    for key in ("initContainers", "nodeSelector", "affinity", "topologySpreadConstraints"):
        spec.pop(key, None)
    spec |= {
        "containers": [container],
        "restartPolicy": "Never",
        "nodeName": node,
        "activeDeadlineSeconds": DEADLINE_S,
    }
    metadata = {"name": f"usbip-check-{suffix}", "labels": {"app.kubernetes.io/name": "usbip-check"}}
    return {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": spec}


def check_arguments(arguments: Sequence[str], form: str) -> list[str]:
    """Returns the arguments of `check` for those of `run`."""
    kept: list[str] = []
    skip = False
    for argument in map(str, arguments):
        flag, equals, _value = argument.partition("=")
        if skip:
            skip = False
        elif flag in RUN_ONLY:
            skip = not equals
        elif argument != "run":
            kept.append(argument)
    return ["check", *kept, f"--output={form}"]


def _template(daemon_set: Mapping[str, Any]) -> Mapping[str, Any]:
    return mapping(mapping(daemon_set.get("spec")).get("template"))


def _plugin_container(template: Mapping[str, Any]) -> Mapping[str, Any]:
    found = map(mapping, items(mapping(template.get("spec")).get("containers")))
    return next((one for one in found if one.get("name") == CONTAINER), {})
