"""Fuzz targets, and the limits of every text that a decoder returns."""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Iterable
from dataclasses import dataclass
from typing import Any, ParamSpec, TypeVar

T = TypeVar("T")
P = ParamSpec("P")
Errors = type[Exception] | tuple[type[Exception], ...]

# Characters of the longest message or log line about invalid input.
MAX_MESSAGE = 4096


@dataclass(frozen=True, slots=True)
class Target:
    """A decoder.

    run: takes any bytes, and raises only for an error of the decoder.
    seeds: valid input.
    longest: number of bytes to try.
    """

    name: str
    run: Callable[[bytes], None]
    seeds: Callable[[], Iterable[bytes]]
    longest: int = 4096


def drive(coroutine: Coroutine[Any, Any, T]) -> T:
    """Returns the result of a coroutine that never waits."""
    try:
        coroutine.send(None)
    except StopIteration as done:
        result: T = done.value
        return result
    finally:
        coroutine.close()
    raise AssertionError("it waits for something")


def attempt(expected: Errors, decode: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T | None:
    """Returns the result of a decoder, or None if it raises an expected error, whose message must be fit to show."""
    try:
        return decode(*args, **kwargs)
    except expected as error:
        fit_to_raise(error)
        return None


def fit_to_show(text: str | None, longest: int = MAX_MESSAGE) -> None:
    """Checks that a text is short and has no control characters."""
    if text is not None:
        assert len(text) <= longest, f"{len(text)} characters"
        assert text.isprintable(), ascii(text[:200])


def fit_to_raise(error: Exception, longest: int = MAX_MESSAGE) -> None:
    """Checks that each line of an error's message is short and has no control characters."""
    assert len(str(error)) <= longest, f"{len(str(error))} characters"
    for line in str(error).split("\n"):
        fit_to_show(line, longest)
