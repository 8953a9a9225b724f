"""Reads a collection of the API server in pages that fit into the memory of a small process, whatever others wrote."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from typing import Any

from usbip_plugin.errors import KubeServerError, KubeTooLong
from usbip_plugin.kube.responses import MAX_BODY_BYTES, decoded

LIST_PAGE = 50
"""Objects in one page at most. 50 honest Leases are 50 KB."""
PAGE_BYTES = 1 << 20
"""Bytes in a page of several objects at most.

Decoded, a page takes up to ten times its length, and an idle plugin has 25 MiB left below its limit.
"""
SHRINK = 5
"""A page that is too long is requested again with so many times fewer objects."""
MAX_PAGES = 4000
"""Requests for one list at most: 200,000 Leases."""

Fetch = Callable[[Mapping[str, str], int], Awaitable[bytes]]
"""Requests one page: fetch(query parameters, most bytes). Raises KubeTooLong, or another KubeError."""


async def pages(fetch: Fetch, resource: str, size: int) -> AsyncGenerator[tuple[dict[str, Any], int], None]:
    """Yields the pages of a list, each with its length in bytes. "items" is always a list.

    size: objects in one page at most. Raises KubeServerError after MAX_PAGES requests.
    """
    count, query = size, dict[str, str]()
    for _ in range(MAX_PAGES):
        try:
            data = await fetch({**query, "limit": str(count)}, PAGE_BYTES if count > 1 else MAX_BODY_BYTES)
        except KubeTooLong:
            if count == 1:
                raise
            count = max(1, count // SHRINK)
            continue
        if len(data) * SHRINK <= PAGE_BYTES:
            count = min(size, count * SHRINK)
        length, page = len(data), decoded(data, "list", resource)
        del data
        metadata, items = page.get("metadata"), page.get("items") or []
        if not isinstance(metadata, dict) or not isinstance(items, list):
            raise KubeServerError("list", resource, "the answer is not a list")
        token = metadata.get("continue")
        yield {**page, "items": items}, length
        del page, items
        if not token:
            return
        query["continue"] = str(token)
    raise KubeServerError("list", resource, f"the list has more than {MAX_PAGES} pages")
