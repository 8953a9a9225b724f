"""The namespace of the Leases."""

from __future__ import annotations

import os
from pathlib import Path

from usbip_plugin.cli.parser import DEFAULT_NAMESPACE

SERVICE_ACCOUNT_NAMESPACE = Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace")


def namespace_of(given: str | None) -> str:
    """Returns the namespace of the Leases: the given one, else POD_NAMESPACE, the ServiceAccount's or the default."""
    if named := given or os.environ.get("POD_NAMESPACE"):
        return named
    try:
        return SERVICE_ACCOUNT_NAMESPACE.read_text(encoding="ascii").strip() or DEFAULT_NAMESPACE
    except OSError:
        return DEFAULT_NAMESPACE
