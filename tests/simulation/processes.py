"""Independent pieces of work on several processes, with the results in order."""

from __future__ import annotations

import multiprocessing
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from typing import TypeVar

Q = TypeVar("Q")
T = TypeVar("T")


def in_order(work: Callable[[Q], T], questions: Iterable[Q], jobs: int) -> Iterator[T]:
    """Yields work(question) of each question. At the end, cancels the few that were begun ahead."""
    if jobs == 1:
        yield from map(work, questions)
        return
    # spawn is the same on every platform and Python
    with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        begun: deque[Future[T]] = deque()
        try:
            for question in questions:
                begun.append(pool.submit(work, question))
                if len(begun) > 2 * jobs:
                    yield begun.popleft().result()
            while begun:
                yield begun.popleft().result()
        finally:
            for future in begun:
                future.cancel()
