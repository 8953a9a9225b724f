"""A double of the Api protocol that records its requests, and answers or fails as a test sets it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Mapping
from dataclasses import dataclass
from typing import Any

Step = dict[str, Any] | Exception
"""An event of a watch, or the error that ends it."""


@dataclass(frozen=True)
class Call:
    """One request. at: its time in seconds of the loop."""

    verb: str
    path: str
    resource: str
    params: Mapping[str, str]
    body: Any
    at: float


class ApiDouble:
    """An API server with one collection.

    errors: raised first, by one request or list each.
    answer: returns the answer to a request, or raises.
    items: the objects in a list, whose resourceVersion is the number of lists so far.
    answered: the requests that did not fail, in order.
    watches: the steps of each watch in turn; a later watch has no event and no end.
    """

    def __init__(self, *errors: Exception, answer: Callable[[Call], dict[str, Any]] = lambda _call: {}) -> None:
        self.errors = list(errors)
        self.answer = answer
        self.items: list[dict[str, Any]] = []
        self.watches: list[list[Step]] = []
        self.calls: list[Call] = []
        self.answered: asyncio.Queue[Call] = asyncio.Queue()

    def of(self, verb: str) -> list[Call]:
        return [call for call in self.calls if call.verb == verb]

    async def request(
        self,
        verb: str,
        path: str,
        *,
        resource: str,
        params: Mapping[str, str] | None = None,
        body: Any = None,
        timeout: float = 5.0,
    ) -> dict[str, Any]:
        call = self._note(verb, path, resource, params, body)
        await asyncio.sleep(0)
        if self.errors:
            raise self.errors.pop(0)
        answer = self.answer(call)
        self.answered.put_nowait(call)
        return answer

    async def pages(
        self,
        path: str,
        *,
        resource: str,
        params: Mapping[str, str] | None = None,
        size: int = 50,
        timeout: float = 5.0,
    ) -> AsyncGenerator[dict[str, Any], None]:
        await self.request("list", path, resource=resource, params=params)
        version = str(len(self.of("list")))
        for first in range(0, max(1, len(self.items)), size):
            yield {"metadata": {"resourceVersion": version}, "items": self.items[first : first + size]}

    async def watch(
        self, path: str, *, resource: str, params: Mapping[str, str] | None = None, timeout: float = 300.0
    ) -> AsyncGenerator[dict[str, Any], None]:
        self._note("watch", path, resource, params, None)
        if not self.watches:
            await asyncio.Event().wait()
        for step in self.watches.pop(0):
            if isinstance(step, Exception):
                raise step
            yield step

    def _note(self, verb: str, path: str, resource: str, params: Mapping[str, str] | None, body: Any) -> Call:
        call = Call(verb, path, resource, params or {}, body, asyncio.get_running_loop().time())
        self.calls.append(call)
        return call
