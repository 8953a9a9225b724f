"""A kubeconfig for a bearer token."""

from __future__ import annotations

import json
from pathlib import Path


def kubeconfig(server: str, token: str | None = "t", *, authority: Path | None = None) -> str:
    """Returns a kubeconfig as JSON. authority: the file with the CA of the server."""
    cluster = {"server": server} | ({"certificate-authority": str(authority)} if authority is not None else {})
    config = {
        "apiVersion": "v1",
        "kind": "Config",
        "current-context": "x",
        "contexts": [{"name": "x", "context": {"cluster": "c", "user": "u"}}],
        "clusters": [{"name": "c", "cluster": cluster}],
        "users": [{"name": "u", "user": {"token": token} if token is not None else {}}],
    }
    return json.dumps(config)
