"""What a fuzz target is, and what all of them ask of what comes out of a decoder."""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Iterable
from dataclasses import dataclass
from typing import Any, TypeVar

T = TypeVar("T")

# The longest message or log line anything may make of bad input (characters).
MAX_MESSAGE = 4096


@dataclass(frozen=True, slots=True)
class Target:
    """One decoder. run takes any bytes and raises only for what must never be. seeds: input that it understands.

    longest: bytes worth trying.
    """

    name: str
    run: Callable[[bytes], None]
    seeds: Callable[[], Iterable[bytes]]
    longest: int = 4096


def drive(coroutine: Coroutine[Any, Any, T]) -> T:
    """The result of a coroutine that never has to wait."""
    try:
        coroutine.send(None)
    except StopIteration as done:
        result: T = done.value
        return result
    finally:
        coroutine.close()
    raise AssertionError("it waits for something")


def fit_to_show(text: str | None, longest: int = MAX_MESSAGE) -> None:
    """Short, and without anything that could steer a terminal or forge a line of a log."""
    if text is not None:
        assert len(text) <= longest, f"{len(text)} characters"
        assert text.isprintable(), ascii(text[:200])


def fit_to_raise(error: Exception, longest: int = MAX_MESSAGE) -> None:
    """The same for an error's message, which may have several lines."""
    assert len(str(error)) <= longest, f"{len(str(error))} characters"
    for line in str(error).split("\n"):
        fit_to_show(line, longest)
