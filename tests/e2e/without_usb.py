"""A post-renderer for Helm: takes out the mount of drivers_probe, a file that a machine without USB does not have.

The component simulated-kernel does the same for kustomize, and `simulatedKernel.enabled` in the chart.
"""

from __future__ import annotations

import sys

import yaml

VOLUME = "drivers-probe"


def main() -> None:
    objects = [one for one in yaml.safe_load_all(sys.stdin) if one]
    for one in objects:
        if (one["kind"], one["metadata"]["name"]) == ("DaemonSet", "usbip-plugin"):
            pod = one["spec"]["template"]["spec"]
            for holder, key in (pod, "volumes"), *((container, "volumeMounts") for container in pod["containers"]):
                holder[key] = [entry for entry in holder[key] if entry["name"] != VOLUME]
    yaml.safe_dump_all(objects, sys.stdout)


if __name__ == "__main__":
    main()
