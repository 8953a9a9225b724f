"""Two states of one long sequence of which little has changed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import compress
from operator import is_not


def changed_places(before: Sequence[object], after: Sequence[object]) -> Iterator[int]:
    """The places at which two sequences of the same length have not the very same object.

    Objects are not compared: whoever made `after` of `before` has kept those that did not change.
    """
    return compress(range(len(after)), map(is_not, before, after))
