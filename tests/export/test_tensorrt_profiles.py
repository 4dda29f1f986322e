"""Optimisation profiles: chosen as well as any could be, and wide enough for whatever may come."""

from itertools import combinations, pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dpo_fast.batches import arrange, longest_row, make_batches
from dpo_fast.errors import UsageError
from dpo_fast.tensorrt.plans import WIDTH_STEP
from dpo_fast.tensorrt.profiles import (
    HEADROOM,
    BatchShapes,
    _best_edges,
    batch_shapes,
    choose_profiles,
    describe,
    uses_of,
)
from dpo_fast.token_table import make_table
from dpo_fast.types import TokenizedPair

MAX_LENGTH = 64
PAIR_LENGTHS = st.tuples(st.integers(1, 30), st.integers(1, 34), st.integers(1, 34))


def pairs_of(lengths: list[tuple[int, int, int]]) -> list[TokenizedPair]:
    return [
        TokenizedPair(row, [row] * prompt, [1] * chosen, [2] * rejected)
        for row, (prompt, chosen, rejected) in enumerate(lengths, start=1)
    ]


@given(
    widths=st.lists(st.integers(1, 12), min_size=1, max_size=30),
    weights=st.lists(st.integers(1, 50), min_size=30, max_size=30),
    count=st.integers(1, 4),
)
def test_no_other_edges_are_better(widths: list[int], weights: list[int], count: int) -> None:
    """Against every choice of edges."""
    steps, weight = np.array(widths) * WIDTH_STEP, np.array(weights[: len(widths)])

    def cost(edges: tuple[int, ...]) -> float:
        tuned = np.array(edges)[np.searchsorted(edges, steps)]
        return float((weight * (tuned - steps)).sum())

    candidates = sorted(set(steps.tolist()))
    best = min(
        cost((*others, candidates[-1]))
        for size in range(min(count, len(candidates)))
        for others in combinations(candidates[:-1], size)
    )
    chosen = _best_edges(steps, weight, count)
    assert chosen == sorted(set(chosen))
    assert len(chosen) <= count
    assert cost(tuple(chosen)) == best


@given(
    lengths=st.lists(PAIR_LENGTHS, min_size=1, max_size=40),
    layout=st.sampled_from(["shared", "plain"]),
    budget=st.integers(128, 400),
    count=st.integers(1, 5),
)
def test_every_batch_fits_and_what_is_told_of_it_is_so(
    lengths: list[tuple[int, int, int]], layout: str, budget: int, count: int
) -> None:
    longest = longest_row(layout, MAX_LENGTH)  # type: ignore[arg-type]
    arrangement = arrange(make_table(pairs_of(lengths)), layout, min(budget, longest))  # type: ignore[arg-type]
    batches = list(make_batches(arrangement, budget))
    shapes = batch_shapes([arrangement], budget)
    assert shapes.rows.tolist() == [len(batch.input_ids) for batch in batches]
    assert shapes.width.tolist() == [batch.input_ids.shape[1] for batch in batches]
    assert shapes.tokens.tolist() == [batch.input_ids.size - batch.padding for batch in batches]
    assert shapes.targets.tolist() == [len(batch.target_ids) for batch in batches]

    profiles = choose_profiles(shapes, token_budget=budget, longest_row=longest, count=count)
    assert 1 <= len(profiles) <= count + 1
    assert profiles[-1].width[2] >= longest
    for profile, following in pairwise(profiles):
        assert following.width[0] == profile.width[2] + WIDTH_STEP
    for profile in profiles:
        for low, tuned, high in (profile.rows, profile.width, profile.targets):
            assert 1 <= low <= tuned <= high
        assert profile.width[0] % WIDTH_STEP == profile.width[2] % WIDTH_STEP == 0
        assert profile.rows[2] == 1 or profile.rows[2] * profile.width[2] <= HEADROOM * budget
        assert profile.targets[2] == profile.rows[2] * profile.width[2]
    uses = uses_of(profiles, shapes)
    assert sum(use.rows for use in uses) == shapes.rows.sum()
    assert sum(use.tokens for use in uses) == shapes.tokens.sum()
    assert sum(use.computed for use in uses) >= sum(batch.input_ids.size for batch in batches)
    assert len(describe(uses)) == len(profiles) + 1


def test_profiles_by_hand() -> None:
    """Batches of 16 and of 40 tokens, of a budget of 64, and rows of up to 64: three boxes."""
    shapes = BatchShapes(*(np.array(values) for values in ([4, 1], [14, 40], [50, 40], [20, 22])))
    profiles = choose_profiles(shapes, token_budget=64, longest_row=64, count=2)
    assert [profile.width for profile in profiles] == [(16, 16, 16), (24, 40, 40), (48, 64, 64)]
    # 64 // 16; 64 // 24 would be 2, and 2 x 40 is just what 1.25 budgets allow; 1.
    assert [profile.rows for profile in profiles] == [(1, 4, 4), (1, 1, 2), (1, 1, 1)]
    # 42 of 90 tokens are targets: of 64, 40 and 64 tokens.
    assert [profile.targets for profile in profiles] == [(1, 30, 64), (1, 19, 80), (1, 30, 64)]
    assert describe(uses_of(profiles, shapes)) == [
        "profile 16…16 tokens, up to 4 rows: 1 batches, 4 rows, 55.6% of the tokens, padding 21.9%",
        "profile 24…40 tokens, up to 2 rows: 1 batches, 1 rows, 44.4% of the tokens, padding 0.0%",
        "profile 48…64 tokens, up to 1 rows: none of these rows; for longer ones",
        "all 2 batches fit; 100.0% of the tokens are in profiles whose widths differ by a factor of two at most; "
        "padding 13.5%",
    ]


def test_without_a_data_set_widths_grow_by_a_factor() -> None:
    profiles = choose_profiles(None, token_budget=8192, longest_row=2048, count=5)
    assert [profile.width[2] for profile in profiles] == [128, 256, 512, 1024, 2048]  # from 64, doubled
    assert profiles[0].width[0] == 64


def test_a_row_that_is_longer_than_a_batch_is_refused_before_anything_is_built() -> None:
    with pytest.raises(UsageError, match=r"2048 tokens, .* token_budget is 512; lower --max-length to 256"):
        choose_profiles(None, token_budget=512, longest_row=2048, count=4)
