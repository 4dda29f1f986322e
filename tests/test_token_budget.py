"""The measured budget is the smallest that is as good as the fastest."""

from collections.abc import Callable

import pytest
from fake_engines import FakeEngine, make_pair

from dpo_fast import token_budget
from dpo_fast.batches import LAYOUTS, Batch, Layout
from dpo_fast.engines.base import Engine
from dpo_fast.errors import EngineOutputError
from dpo_fast.token_budget import AS_GOOD, LARGEST, SMALLEST, TURNS, WORSE, tune_token_budget
from dpo_fast.token_table import TokenTable, make_table
from dpo_fast.types import TokenScores


def table_of(pairs: int, length: int = 16) -> TokenTable:
    """Pairs of `length` tokens each, all different, so that rows are filled without padding."""
    prompt, chosen = length // 2, length // 4
    rows = [
        make_pair([*divmod(row, 300), *[1] * (prompt - 2)], [2] * chosen, [3] * (length - prompt - chosen), row + 1)
        for row in range(pairs)
    ]
    return make_table(rows)


class Recorder:
    """Notes the size of each batch, and refuses those above what its memory holds; says nothing of the tokens."""

    name, precision = "recorder", "fp32"

    def __init__(self, largest: float = float("inf")) -> None:
        self.largest = largest
        self.sizes: list[int] = []

    def score(self, batch: Batch) -> TokenScores:
        self.sizes.append(batch.input_ids.size)
        if batch.input_ids.size > self.largest:
            raise EngineOutputError("no memory for this batch")
        return TokenScores(*[batch.target_ids.astype("float32")] * 5)

    def with_gates(self, gates: object) -> "Recorder":
        return self


def tuned(
    monkeypatch: pytest.MonkeyPatch,
    seconds_of_a_token: Callable[[int], float],
    engine: Engine | None = None,
    table: TokenTable | None = None,
) -> int:
    """The budget for an engine that takes so long for a token of a batch of so many tokens."""

    def time_one(engine: Engine, batch: Batch) -> float:
        engine.score(batch)
        return seconds_of_a_token(batch.input_ids.size) * (batch.input_ids.size - batch.padding)

    monkeypatch.setattr(token_budget, "_time", time_one)
    return tune_token_budget(engine or Recorder(), table or table_of(4096), "shared")


@pytest.mark.parametrize("best", [256, 512, 1024, 4096, 16_384])
def test_the_bottom_of_the_valley_is_found(monkeypatch: pytest.MonkeyPatch, best: int) -> None:
    """A token takes a fifth longer with each doubling or halving away from the best."""
    engine = Recorder()

    def seconds(size: int) -> float:
        return 1.2 ** abs(size.bit_length() - best.bit_length())

    assert tuned(monkeypatch, seconds, engine) == best
    # The next one was worse, so none was tried beyond it.
    assert max(engine.sizes) == 2 * best


def test_the_smallest_that_is_as_good(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fastest at 2048; 1024 is within 2 % of it, and 512 is not."""
    seconds = {256: 1.5, 512: 1.0 + 1.1 * (AS_GOOD - 1), 1024: 1.0 + 0.9 * (AS_GOOD - 1), 2048: 1.0, 4096: 1.5}

    assert tuned(monkeypatch, seconds.__getitem__) == 1024


def test_a_little_worse_does_not_end_the_search(monkeypatch: pytest.MonkeyPatch) -> None:
    """A bump below the limit at 512, and the fastest behind it; at 4096 it is above."""
    seconds = {256: 1.0, 512: 1.0 + 0.9 * (WORSE - 1), 1024: 0.9, 2048: 0.5, 4096: 0.5 * (WORSE + 0.01), 8192: 0.0}

    assert tuned(monkeypatch, seconds.__getitem__) == 2048


def test_an_engine_that_gains_nothing_gets_small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    assert tuned(monkeypatch, lambda size: 1.0) == SMALLEST


def test_an_engine_that_always_gains_gets_large_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    """Up to the first budget that takes in half of the pairs, beyond which there is nothing to measure."""
    assert tuned(monkeypatch, lambda size: 1 / size) == 32_768  # of 65,536 tokens
    assert tuned(monkeypatch, lambda size: 1 / size, table=table_of(100)) == 512  # of 1,600
    assert tuned(monkeypatch, lambda size: 1 / size, table=table_of(1)) == SMALLEST


def test_no_budget_is_larger_than_the_largest(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Recorder()

    assert tuned(monkeypatch, lambda size: 1 / size, engine, table_of(300, length=1024)) == LARGEST
    assert max(engine.sizes) == LARGEST


@pytest.mark.parametrize("largest", [256, 300, 1024, 10_000])
def test_an_engine_that_lacks_the_memory_gets_what_it_can_hold(monkeypatch: pytest.MonkeyPatch, largest: int) -> None:
    engine = Recorder(largest)

    budget = tuned(monkeypatch, lambda size: 1 / size, engine)

    assert budget == max(size for size in (256, 512, 1024, 2048, 4096, 8192) if size <= largest)
    assert sorted(set(engine.sizes))[-1] == 2 * budget  # tried once
    assert engine.sizes.count(2 * budget) == 1


def test_an_engine_that_fails_at_the_smallest_batch_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(EngineOutputError, match="no memory for this batch"):
        tuned(monkeypatch, lambda size: 1.0, Recorder(0))


def test_each_budget_is_run_once_untimed_and_then_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Recorder()

    tuned(monkeypatch, lambda size: float(size), engine)

    assert engine.sizes == [256] * (1 + TURNS) + [512] * (1 + TURNS)


def test_the_best_turn_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each batch's first turns are slowed by something else, 512's the most."""
    turns: dict[int, int] = {}

    def seconds(size: int) -> float:
        turns[size] = turns.get(size, 0) + 1
        slowed = 1.0 + size * (TURNS - turns[size])
        return slowed * {256: 2.0, 512: 1.0, 1024: 3.0}[size]

    assert tuned(monkeypatch, seconds) == 512
    assert turns == {256: TURNS, 512: TURNS, 1024: TURNS}


def test_padding_is_no_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nine rows of 128 tokens and ten of 20; the engine computes larger batches a tenth faster, padding too::

    budget 256    128 128 | 128 128 | 128 128 | 128 128 | ...       in the middle: no padding
    budget 512    128 128 128 128 | 128 128 128 128 | 128 20 20 20 | ...      512 tokens, of which 188 are real
    """
    lengths = [128] * 9 + [20] * 10
    pairs = [make_pair([row] * (length - 8), [2] * 4, [3] * 4, row) for row, length in enumerate(lengths, start=10)]
    sizes: list[tuple[int, int]] = []

    def time_one(engine: Engine, batch: Batch) -> float:
        sizes.append((batch.input_ids.size, batch.padding))
        return batch.input_ids.size * {256: 1.0, 512: 0.9}[batch.input_ids.size]

    monkeypatch.setattr(token_budget, "_time", time_one)

    assert tune_token_budget(FakeEngine(), make_table(pairs), "shared") == 256
    assert sizes == [(256, 0)] * TURNS + [(512, 324)] * TURNS


@pytest.mark.parametrize("layout", LAYOUTS)
def test_batches_are_laid_out_as_they_will_be(monkeypatch: pytest.MonkeyPatch, layout: Layout) -> None:
    """In the plain layout a pair is two rows of its prompt and one completion."""
    widths: set[int] = set()
    monkeypatch.setattr(token_budget, "_time", lambda engine, batch: widths.add(batch.input_ids.shape[1]) or 1.0)

    tune_token_budget(FakeEngine(), table_of(100), layout)

    assert widths == {{"shared": 16, "plain": 12}[layout]}


def test_the_batch_is_of_the_pairs_middle_lengths(monkeypatch: pytest.MonkeyPatch) -> None:
    """Some are long, some short: neither says what a token takes in most batches."""
    pairs = [
        make_pair([*divmod(row, 300), *[1] * prompt], [2], [3], row)
        for row, prompt in enumerate([4] * 40 + [60] * 400 + [250] * 5)
    ]
    widths: set[int] = set()
    monkeypatch.setattr(token_budget, "_time", lambda engine, batch: widths.add(batch.input_ids.shape[1]) or 1.0)

    tune_token_budget(FakeEngine(), make_table(pairs), "shared")

    assert widths == {64}


def test_time_is_the_clock_s(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a clock that only the engine moves, by a token's time for each token of the batch."""
    now = 0.0

    class Clocked(Recorder):
        def score(self, batch: Batch) -> TokenScores:
            nonlocal now
            now += batch.input_ids.size * {256: 3.0, 512: 2.0, 1024: 1.0, 2048: 1.5}[batch.input_ids.size]
            return super().score(batch)

    monkeypatch.setattr(token_budget.time, "perf_counter", lambda: now)

    assert tune_token_budget(Clocked(), table_of(4096), "shared") == 1024
