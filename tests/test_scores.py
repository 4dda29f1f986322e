"""Scores depend on a token and what it may see, and on nothing else; an engine that cannot be right is refused."""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from pathlib import Path
from random import Random

import numpy as np
import pytest
from fake_engines import FakeEngine, expected, make_pair, numbered, pairs_alike
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dpo_fast.batches import LAYOUTS, Batch, Layout
from dpo_fast.bundle import POLICY, REFERENCE, open_bundle
from dpo_fast.engines import open_engine
from dpo_fast.engines.base import Engine
from dpo_fast.errors import BundleError, EngineOutputError
from dpo_fast.metrics.summary import compute_metrics
from dpo_fast.metrics.sums import sum_tokens
from dpo_fast.scores import LOG_PROB_ROUNDING, ScoredPairs, score_pairs
from dpo_fast.token_table import make_table
from dpo_fast.types import CompletionScores, LossSettings, PairScores, TokenizedPair, TokenScores

# Float32 sums in another order: some 1e-6 nats of a log-prob of some nats, a few operations deep.
ENGINE_TOLERANCE = 1e-5

TOKENS = st.integers(1, 400)


def pairs_of(largest: int, most: int) -> st.SearchStrategy[list[TokenizedPair]]:
    """Up to `most` pairs whose texts have up to `largest` tokens; some without a prompt."""
    tokens, two_tokens = st.lists(TOKENS, min_size=1, max_size=largest), st.lists(TOKENS, min_size=2, max_size=largest)
    pair = st.one_of(
        st.builds(make_pair, tokens, tokens, tokens), st.builds(make_pair, st.just([]), two_tokens, two_tokens)
    )
    return st.lists(pair, min_size=1, max_size=most).map(numbered)


def score(pairs: Sequence[TokenizedPair], engine: Engine, layout: Layout, token_budget: int) -> ScoredPairs:
    return score_pairs(make_table(pairs), engine, layout=layout, token_budget=token_budget)


def per_pair(completions: CompletionScores) -> list[np.ndarray]:
    return np.split(completions.log_probs, np.cumsum(completions.lengths)[:-1])


@given(st.one_of(pairs_of(6, 10), pairs_alike(10)), st.sampled_from(LAYOUTS), st.integers(1, 80), st.randoms())
def test_scores_are_each_completion_s_own(
    pairs: list[TokenizedPair], layout: Layout, token_budget: int, random: Random
) -> None:
    """Whatever the order of the pairs, the budget and the layout, scores equal those of single sequences, exactly.

    However much pairs have in common, too: a prompt, a completion, all of it.
    """
    random.shuffle(pairs)
    engine = FakeEngine()
    scored = score(pairs, engine, layout, token_budget)

    for completions, branch in ((scored.chosen, "chosen_ids"), (scored.rejected, "rejected_ids")):
        wanted = [np.array(expected(pair.prompt_ids, getattr(pair, branch))).reshape(-1, 5) for pair in pairs]
        assert completions.lengths.tolist() == [len(values) for values in wanted]
        assert completions.log_probs.tolist() == np.concatenate(wanted)[:, 0].tolist()
        assert completions.entropy.tolist() == [values[:, 1].sum() for values in wanted]
        assert completions.mean_logit.tolist() == [values[:, 2].sum() for values in wanted]
        assert completions.top1.tolist() == [values[:, 3].sum() for values in wanted]
        assert completions.log_sum_sq_prob.tolist() == [values[:, 4].sum() for values in wanted]
        assert completions.log_probs.dtype == np.float32
        assert completions.top1.dtype == np.int64
    assert scored.tokens == sum(batch.input_ids.size for batch in engine.batches)
    assert scored.padding == sum(int((batch.segment_ids < 0).sum()) for batch in engine.batches)


@given(pairs_alike(10), st.sampled_from(LAYOUTS), st.integers(1, 80))
def test_a_completion_is_computed_once(pairs: list[TokenizedPair], layout: Layout, token_budget: int) -> None:
    engine = FakeEngine()
    score(pairs, engine, layout, token_budget)

    completions = {
        (tuple(pair.prompt_ids), tuple(ids)) for pair in pairs for ids in (pair.chosen_ids, pair.rejected_ids)
    }
    targets = sum(len(ids) - (not prompt) for prompt, ids in completions)
    assert sum(len(batch.target_ids) for batch in engine.batches) == targets


def test_a_completion_without_a_scored_token_has_no_scores() -> None:
    """Nothing precedes 9 and 8, so nothing predicts them; what stands beside them is none of theirs."""
    pairs = [make_pair([], [7, 8], [9]), make_pair([], [8], [5, 6]), make_pair([1], [2], [3])]
    scored = score(pairs, FakeEngine(), "shared", 100)

    assert (scored.chosen.lengths.tolist(), scored.rejected.lengths.tolist()) == ([1, 0, 1], [0, 1, 1])
    for completions, ids in ((scored.chosen, [[7, 8], [8], [2]]), (scored.rejected, [[9], [5, 6], [3]])):
        wanted = [expected(pair.prompt_ids, each) for pair, each in zip(pairs, ids, strict=True)]
        assert completions.entropy.tolist() == [sum(values[1] for values in each) for each in wanted]
        assert completions.top1.tolist() == [sum(values[3] for values in each) for each in wanted]
        assert completions.log_probs.tolist() == [values[0] for each in wanted for values in each]


def test_scores_of_no_pairs() -> None:
    """A part of which no row can be used has none."""
    engine = FakeEngine()
    scored = score([], engine, "shared", 100)

    assert engine.batches == []
    assert scored.chosen.log_probs.shape == scored.rejected.lengths.shape == scored.chosen.entropy.shape == (0,)
    assert (scored.tokens, scored.padding) == (0, 0)


class FaultyEngine:
    """Passes a good engine's scores through a fault."""

    name, precision = "faulty", "fp32"

    def __init__(self, fault: Callable[[TokenScores], TokenScores]) -> None:
        self.fault = fault

    def score(self, batch: Batch) -> TokenScores:
        return self.fault(FakeEngine().score(batch))


def spoil(name: str, value: float, position: int) -> Callable[[TokenScores], TokenScores]:
    def fault(scores: TokenScores) -> TokenScores:
        values = getattr(scores, name).copy()
        values[position] = value
        return replace(scores, **{name: values})

    return fault


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *itertools.product([field.name for field in fields(TokenScores)], [np.nan, np.inf, -np.inf]),
        ("log_prob", 2 * LOG_PROB_ROUNDING),
    ],
)
@pytest.mark.parametrize(
    ("position", "row", "token"), [(0, 8, 21), (1, 8, 22), (2, 8, 31), (3, 9, 41), (4, 9, 51), (5, 9, 52)]
)
def test_impossible_value_is_refused_with_the_row_and_the_token(
    name: str, value: float, position: int, row: int, token: int
) -> None:
    """Rows 8 (chosen 21 22, rejected 31) and 9 (chosen 41, rejected 51 52) in one batch: targets in that order."""
    pairs = [make_pair([11], [21, 22], [31], row=8), make_pair([12], [41], [51, 52], row=9)]

    with pytest.raises(EngineOutputError) as caught:
        score(pairs, FaultyEngine(spoil(name, value, position)), "shared", 100)

    message = str(caught.value)
    assert message.startswith(f"row {row}: ")
    assert f"{name} {np.float32(value)}" in message
    assert f"the token id {token};" in message


def test_a_log_prob_that_float32_rounded_above_zero_is_taken() -> None:
    engine = FaultyEngine(spoil("log_prob", LOG_PROB_ROUNDING / 2, 0))

    assert score([make_pair([1], [2], [3])], engine, "shared", 100).chosen.log_probs[0] > 0


def cut(scores: TokenScores) -> TokenScores:
    return TokenScores(*(getattr(scores, field.name)[:-1] for field in fields(scores)))


def repeat(scores: TokenScores) -> TokenScores:
    return TokenScores(*(np.tile(getattr(scores, field.name), 2) for field in fields(scores)))


def nothing(scores: TokenScores) -> TokenScores:
    return replace(scores, entropy=np.zeros(0, np.float32))


def column(scores: TokenScores) -> TokenScores:
    return replace(scores, is_top1=scores.is_top1[:, None])


@pytest.mark.parametrize(
    ("fault", "says"),
    [
        (cut, "log_prob of shape [2] for 3"),
        (repeat, "log_prob of shape [6] for 3"),
        (nothing, "entropy of shape [0] for 3"),
        (column, "is_top1 of shape [3, 1] for 3"),
    ],
)
def test_too_few_or_too_many_values_are_refused(fault: Callable[[TokenScores], TokenScores], says: str) -> None:
    with pytest.raises(EngineOutputError) as caught:
        score([make_pair([1], [2, 3], [4], row=7)], FaultyEngine(fault), "shared", 100)

    assert says in str(caught.value)
    assert "row 7" in str(caught.value)


# The real engine.


@pytest.fixture(scope="module")
def engines(tiny_bundle: Path) -> dict[str, Engine]:
    bundle = open_bundle(tiny_bundle)
    return {role: open_engine(bundle, role) for role in (POLICY, REFERENCE)}


few_examples = settings(
    max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)


def assert_same(one: ScoredPairs, other: ScoredPairs) -> None:
    """The same scores of the same pairs, to what float32 leaves open. `top1` may turn where two logits nearly tie."""
    for mine, theirs in ((one.chosen, other.chosen), (one.rejected, other.rejected)):
        np.testing.assert_array_equal(mine.lengths, theirs.lengths)
        np.testing.assert_allclose(mine.log_probs, theirs.log_probs, rtol=0, atol=ENGINE_TOLERANCE)
        for name in ("entropy", "mean_logit", "log_sum_sq_prob"):
            of_a_token = ENGINE_TOLERANCE * np.maximum(mine.lengths, 1)
            assert (np.abs(getattr(mine, name) - getattr(theirs, name)) <= of_a_token).all(), name


@pytest.mark.slow  # exports a model
@few_examples
@given(
    pairs=st.one_of(pairs_of(20, 8), pairs_alike()),
    layout=st.sampled_from(LAYOUTS),
    token_budget=st.sampled_from([1, 64, 200, 100_000]),
)
def test_batch_size_padding_and_layout_change_no_score_of_the_real_engine(
    engines: dict[str, Engine], pairs: list[TokenizedPair], layout: Layout, token_budget: int
) -> None:
    alone = score(pairs, engines[POLICY], "plain", 1)

    assert_same(score(pairs, engines[POLICY], layout, token_budget), alone)


@pytest.mark.slow
@few_examples
@given(pairs=pairs_of(20, 8), data=st.data())
def test_order_changes_no_score_of_the_real_engine(
    engines: dict[str, Engine], pairs: list[TokenizedPair], data: st.DataObject
) -> None:
    order = data.draw(st.permutations(range(len(pairs))))

    scored = score(pairs, engines[POLICY], "shared", 200)
    shuffled = score([pairs[index] for index in order], engines[POLICY], "shared", 200)

    for mine, theirs in ((scored.chosen, shuffled.chosen), (scored.rejected, shuffled.rejected)):
        back = [None] * len(pairs)
        for index, values in zip(order, per_pair(theirs), strict=True):
            back[index] = values
        for value, other in zip(per_pair(mine), back, strict=True):
            np.testing.assert_allclose(value, other, rtol=0, atol=ENGINE_TOLERANCE)


@pytest.mark.slow
@few_examples
@given(pairs=pairs_of(12, 5))
def test_swapping_chosen_and_rejected_negates_the_margin(
    engines: dict[str, Engine], pairs: list[TokenizedPair]
) -> None:
    swapped = [replace(pair, chosen_ids=pair.rejected_ids, rejected_ids=pair.chosen_ids) for pair in pairs]

    metrics, mirrored = (
        compute_metrics(sum_tokens(scores_of(rows, engines)), LossSettings()) for rows in (pairs, swapped)
    )

    # Beta times the sum of up to 12 log-probs under two models on both sides.
    tolerance = 0.1 * 4 * 12 * ENGINE_TOLERANCE
    assert metrics["eval_rewards/margins"] == pytest.approx(-mirrored["eval_rewards/margins"], abs=tolerance)
    assert metrics["eval_rewards/chosen"] == pytest.approx(mirrored["eval_rewards/rejected"], abs=tolerance)
    assert metrics["counts"]["ties"] == mirrored["counts"]["ties"]


def scores_of(pairs: Sequence[TokenizedPair], engines: dict[str, Engine]) -> PairScores:
    scored = {role: score(pairs, engine, "shared", 100) for role, engine in engines.items()}
    return PairScores(
        rows=np.array([pair.row for pair in pairs]),
        prompt_lengths=np.array([len(pair.prompt_ids) for pair in pairs]),
        chosen_lengths=np.array([len(pair.chosen_ids) for pair in pairs]),
        rejected_lengths=np.array([len(pair.rejected_ids) for pair in pairs]),
        truncated=np.zeros(len(pairs), np.bool_),
        groups=None,
        policy_chosen=scored[POLICY].chosen,
        policy_rejected=scored[POLICY].rejected,
        reference_chosen=scored[REFERENCE].chosen,
        reference_rejected=scored[REFERENCE].rejected,
    )


def test_swapping_with_the_fake_engine_negates_the_margin_exactly() -> None:
    engines: dict[str, Engine] = {POLICY: FakeEngine("policy"), REFERENCE: FakeEngine("reference")}
    pairs = [make_pair([1, 2], [3, 4, 5], [6]), make_pair([1], [7], [8, 9]), make_pair([], [1, 2], [3, 4])]
    swapped = [replace(pair, chosen_ids=pair.rejected_ids, rejected_ids=pair.chosen_ids) for pair in pairs]

    metrics, mirrored = (
        compute_metrics(sum_tokens(scores_of(rows, engines)), LossSettings()) for rows in (pairs, swapped)
    )

    assert metrics["eval_rewards/margins"] == pytest.approx(-mirrored["eval_rewards/margins"], abs=1e-12)  # float64
    assert metrics["eval_rewards/margins"] != 0


@pytest.mark.slow
def test_the_real_engine_names_itself_and_refuses_ids_beyond_the_vocabulary(engines: dict[str, Engine]) -> None:
    engine = engines[POLICY]
    assert engine.name.startswith("onnxruntime ")
    assert engine.precision == "fp32"

    with pytest.raises(EngineOutputError, match=r"failed at a batch of 1 x 3 tokens"):
        score([make_pair([10_000], [1], [2])], engine, "shared", 100)


@pytest.mark.slow
def test_a_graph_that_is_none_or_lacks_an_output_is_refused(tiny_bundle: Path, tmp_path: Path) -> None:
    import onnx

    from dpo_fast.engines.onnxruntime import OnnxRuntimeEngine

    text = tmp_path / "text.onnx"
    text.write_text("no graph")
    with pytest.raises(BundleError, match="ONNX Runtime cannot load it"):
        OnnxRuntimeEngine(text)

    # A graph of the contract's outputs but one.
    names = ["log_prob", "entropy", "mean_logit", "is_top1"]
    node = onnx.helper.make_node("Identity", ["input_ids"], ["log_prob"])
    nodes = [node, *(onnx.helper.make_node("Identity", ["input_ids"], [name]) for name in names[1:])]
    values = {name: onnx.helper.make_tensor_value_info(name, onnx.TensorProto.INT64, ["N"]) for name in names}
    inputs = [onnx.helper.make_tensor_value_info("input_ids", onnx.TensorProto.INT64, ["N"])]
    graph = onnx.helper.make_graph(nodes, "short", inputs, list(values.values()))
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=9)
    onnx.save(model, tmp_path / "short.onnx")
    with pytest.raises(BundleError, match=r"puts out log_prob, entropy, mean_logit, is_top1, not .*log_sum_sq_prob"):
        OnnxRuntimeEngine(tmp_path / "short.onnx")
