"""Changes of the running plugins' configuration, faster than the minute a kubelet takes."""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping

import yaml

from tests.e2e.cluster import DOMAIN, PLUGIN_NAMESPACE
from tests.e2e.kubectl import Kubectl, KubectlFailed

PLUGINS = ("-n", PLUGIN_NAMESPACE, "-l", "app.kubernetes.io/name=usbip-plugin")
RELOADS = 12
RELOAD_S = 5


def configure(kubectl: Kubectl, nodes: Collection[str], text: str, counts: Mapping[str, int]) -> None:
    """Sets the plugins' configuration and waits until the nodes show these counts. Raises KubectlFailed.

    A kubelet updates a mounted ConfigMap once a minute, and whenever the pod changes. So this annotates the pods, and
    repeats that as long as a kubelet has not read the ConfigMap.
    """
    body = yaml.safe_dump({"data": {"config.yaml": text}})
    kubectl("patch", "configmap", "usbip-plugin", "-n", PLUGIN_NAMESPACE, "--type=merge", f"--patch={body}")
    for again in range(1, RELOADS + 1):
        kubectl("annotate", "pods", *PLUGINS, "--overwrite", f"e2e/changed-at={time.time_ns()}")
        try:
            for resource, count in counts.items():
                shown = (
                    f"--for=jsonpath={{.status.allocatable.{DOMAIN.replace('.', chr(92) + '.')}/{resource}}}={count}"
                )
                kubectl("wait", *(f"node/{node}" for node in nodes), shown, f"--timeout={RELOAD_S}s")
        except KubectlFailed:
            if again == RELOADS:
                raise
        else:
            return
