"""A broken promise, and what breaks one only if it lasts."""

from __future__ import annotations

from dataclasses import dataclass

LOOK_S = 0.25
"""Virtual seconds between two looks at what has a time."""


class Violation(AssertionError):
    """A promise that was broken. name: of the promise."""

    def __init__(self, name: str, detail: str) -> None:
        self.name = name
        super().__init__(f"{name}: {detail}")


@dataclass(slots=True)
class _Bad:
    """since when and until when something was bad."""

    since: float
    until: float


class Lasting:
    """Remembers since when something has been bad. until: the time (loop seconds) until which all stays as it is."""

    def __init__(self) -> None:
        self.until = 0.0
        self._bad: dict[tuple[object, ...], _Bad] = {}

    def for_long(self, bad: bool, now: float, seconds: float, *key: object) -> bool:
        """Whether something is bad, and has been so at each look for so long, by the time it may change."""
        if not bad:
            self._bad.pop(key, None)
            return False
        found = self._bad.get(key)
        if found is None or now - found.until > 4 * LOOK_S:
            found = self._bad[key] = _Bad(now, now)
        found.until = self.until
        return found.until - found.since > seconds
