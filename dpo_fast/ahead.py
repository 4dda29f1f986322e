"""One thing is made ready while another is being used."""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

Input = TypeVar("Input")
Output = TypeVar("Output")


def one_ahead(function: Callable[[Input], Output], inputs: Iterable[Input]) -> Iterator[Output]:
    """What a function makes of each input, in order; the next is made in a thread while the last is used.

    An error is raised where its result would have come.
    """
    with ThreadPoolExecutor(1, "ahead") as threads:
        coming: Future[Output] | None = None
        for item in inputs:
            following = threads.submit(function, item)
            if coming is not None:
                yield coming.result()
            coming = following
        if coming is not None:
            yield coming.result()
