"""The one progress bar: pairs a second, tokens a second, time left."""

import time
from types import TracebackType

from tqdm import tqdm


class Progress:
    """Counts pairs, of which a batch may finish fractions, and the tokens that engines computed for them."""

    def __init__(self, pairs: int, *, shown: bool) -> None:
        """Begin at no pairs.

        Args:
            pairs: how many there will be.
            shown: whether a bar is drawn on standard error.
        """
        self._bar = tqdm(
            total=pairs,
            disable=not shown,
            desc="scoring",
            unit=" pairs",
            bar_format="{desc} {percentage:3.0f}%|{bar}| {n:,}/{total:,} pairs "
            "[{elapsed}, {remaining} left, {rate_fmt}{postfix}]",
        )
        self._begun = time.perf_counter()
        self._pairs = 0.0  # with the fractions of pairs that are not finished
        self._tokens = 0

    def __enter__(self) -> "Progress":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.close()

    def skip(self, pairs: float) -> None:
        """Pairs that were scored before this run, and say nothing about its speed."""
        self._pairs += pairs
        if not self._bar.disable:
            self._bar.initial += round(pairs)
        self._draw()

    def add(self, pairs: float, tokens: int) -> None:
        """What a batch has finished: pairs, and tokens without padding."""
        self._tokens += tokens
        rate = self._tokens / (time.perf_counter() - self._begun)
        self._bar.set_postfix_str(f"{rate:,.0f} tokens/s", refresh=False)
        self._pairs += pairs
        self._draw()

    def set(self, pairs: float, tokens: int) -> None:
        """How far several workers are together; what a worker loses as it dies is not taken back."""
        self._tokens = 0
        self._pairs = max(self._pairs, pairs)
        self.add(0.0, tokens)

    def _draw(self) -> None:
        self._bar.update(round(self._pairs - 1e-6) - self._bar.n)
