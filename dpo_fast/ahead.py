"""Something is made ready while something else is being used."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

Input = TypeVar("Input")
Output = TypeVar("Output")


def one_ahead(function: Callable[[Input], Output], inputs: Iterable[Input]) -> Iterator[Output]:
    """What a function makes of each input, in order; the next is made in a thread while the last is used.

    An error is raised where its result would have come.
    """
    return several_ahead(function, inputs, 1)


def several_ahead(function: Callable[[Input], Output], inputs: Iterable[Input], count: int) -> Iterator[Output]:
    """The same with so many made at a time, each in a thread of its own: where it takes long, but is no work."""
    with ThreadPoolExecutor(count, "ahead") as threads:
        coming: deque[Future[Output]] = deque()
        for item in inputs:
            coming.append(threads.submit(function, item))
            if len(coming) > count:
                yield coming.popleft().result()
        while coming:
            yield coming.popleft().result()
