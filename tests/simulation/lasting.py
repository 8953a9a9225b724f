"""Broken promises, and conditions that break one only if they last."""

from __future__ import annotations

from dataclasses import dataclass

LOOK_S = 0.25
"""Virtual seconds between two checks of conditions that may last for a time."""


class Violation(AssertionError):
    """A broken promise, by its name."""

    def __init__(self, name: str, detail: str) -> None:
        self.name = name
        super().__init__(f"{name}: {detail}")


@dataclass(slots=True)
class _Bad:
    """Loop seconds from which and until which something was bad."""

    since: float
    until: float


class Lasting:
    """Since when each condition has been bad.

    until: loop seconds at which any condition may change next.
    """

    def __init__(self) -> None:
        self.until = 0.0
        self._bad: dict[tuple[object, ...], _Bad] = {}

    def for_long(self, bad: bool, now: float, seconds: float, *key: object) -> bool:
        """Returns whether a condition is bad, and will have been at each check for so long when it may change next."""
        if not bad:
            self._bad.pop(key, None)
            return False
        found = self._bad.get(key)
        if found is None or now - found.until > 4 * LOOK_S:
            found = self._bad[key] = _Bad(now, now)
        found.until = self.until
        return found.until - found.since > seconds
