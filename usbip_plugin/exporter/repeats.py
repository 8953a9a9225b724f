"""Says whether something is new, so that a client that repeats itself does not fill the log."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

MAX_KNOWN = 256
"""Things remembered. With more, all are forgotten and logged once more."""


T = TypeVar("T", bound=Hashable)


class FirstTimes(Generic[T]):
    """The things that were logged. At most MAX_KNOWN of them."""

    def __init__(self) -> None:
        self._known: set[T] = set()

    def is_new(self, thing: T) -> bool:
        """Returns whether this is the first time since it was forgotten."""
        if thing in self._known:
            return False
        if len(self._known) >= MAX_KNOWN:
            self._known.clear()
        self._known.add(thing)
        return True

    def forget(self, which: Callable[[T], bool]) -> None:
        self._known = {thing for thing in self._known if not which(thing)}
