"""Scored pairs for the tests: from token values, at random, and cut from others; and how to compare them."""

from dataclasses import replace
from typing import Any

import numpy as np

from dpo_fast.metrics.summary import compute_metrics
from dpo_fast.metrics.sums import sum_tokens
from dpo_fast.types import CompletionScores, LossSettings, PairScores


def completion(
    token_log_probs: list[list[float]],
    log_sum_sq_prob: list[float] | None = None,
    entropy: list[float] | None = None,
    mean_logit: list[float] | None = None,
    top1: list[int] | None = None,
) -> CompletionScores:
    """One branch from each completion's token log-probs and, per completion, its other sums (0 where not given)."""
    zeros = [0.0] * len(token_log_probs)
    return CompletionScores(
        log_probs=np.array([value for tokens in token_log_probs for value in tokens], dtype=np.float32),
        lengths=np.array([len(tokens) for tokens in token_log_probs], dtype=np.int64),
        entropy=np.array(entropy or zeros, dtype=np.float64),
        mean_logit=np.array(mean_logit or zeros, dtype=np.float64),
        top1=np.array(top1 or zeros, dtype=np.int64),
        log_sum_sq_prob=np.array(log_sum_sq_prob or zeros, dtype=np.float64),
    )


def pair_scores(
    policy_chosen: CompletionScores,
    policy_rejected: CompletionScores,
    reference_chosen: CompletionScores | None = None,
    reference_rejected: CompletionScores | None = None,
    prompt_lengths: list[int] | None = None,
    groups: list[str] | None = None,
    unscored: int = 0,
) -> PairScores:
    """Pairs whose completions have `unscored` tokens more than were scored."""
    pairs = len(policy_chosen.lengths)
    return PairScores(
        rows=np.arange(1, pairs + 1, dtype=np.int64),
        prompt_lengths=np.array(prompt_lengths or [3] * pairs, dtype=np.int64),
        chosen_lengths=policy_chosen.lengths + unscored,
        rejected_lengths=policy_rejected.lengths + unscored,
        truncated=np.zeros(pairs, dtype=np.bool_),
        groups=groups,
        policy_chosen=policy_chosen,
        policy_rejected=policy_rejected,
        reference_chosen=reference_chosen,
        reference_rejected=reference_rejected,
    )


def random_scores(seed: int, pairs: int, groups: int = 0) -> PairScores:
    """Pairs of random lengths (0 scored tokens included) and log-ratios of some nats; some pairs are exact ties."""
    generator = np.random.default_rng(seed)

    def branch(lengths: np.ndarray) -> CompletionScores:
        return CompletionScores(
            log_probs=-generator.gamma(1.0, 2.0, lengths.sum()).astype(np.float32),
            lengths=lengths,
            entropy=lengths * generator.uniform(0.0, 4.0, pairs),
            mean_logit=lengths * generator.normal(0.0, 3.0, pairs),
            top1=generator.integers(0, lengths + 1),
            log_sum_sq_prob=-lengths * generator.uniform(0.0, 3.0, pairs),
        )

    chosen_lengths, rejected_lengths = generator.integers(0, 9, pairs), generator.integers(0, 9, pairs)
    tied = generator.random(pairs) < 0.2
    rejected_lengths[tied] = chosen_lengths[tied] = 0
    names = [f"group {number}" for number in generator.integers(0, groups, pairs)] if groups else None
    scores = pair_scores(
        branch(chosen_lengths),
        branch(rejected_lengths),
        branch(chosen_lengths),
        branch(rejected_lengths),
        prompt_lengths=list(generator.integers(1, 20, pairs)),
        groups=names,
        unscored=1,
    )
    return replace(scores, truncated=generator.random(pairs) < 0.3)


def metrics_of(scores: PairScores, settings: LossSettings, **options: Any) -> dict[str, Any]:
    """The metrics of pairs whose tokens have not been summed yet."""
    return compute_metrics(sum_tokens(scores), settings, **options)


def assert_equal(one: Any, other: Any) -> None:
    """Field by field and to the last bit, dtypes included."""
    for name in one.__slots__:
        mine, theirs = getattr(one, name), getattr(other, name)
        if isinstance(mine, np.ndarray):
            assert mine.dtype == theirs.dtype
            assert np.array_equal(mine, theirs), name
        elif hasattr(mine, "__slots__"):
            assert_equal(mine, theirs)
        else:
            assert mine == theirs


def slice_pairs(scores: PairScores, start: int, stop: int) -> PairScores:
    """The pairs from `start` up to, but without, `stop` (0-based positions, clipped to what is there).

    Args:
        scores: P pairs.
        start: position of the first pair to keep.
        stop: position after the last pair to keep.

    Returns:
        The pairs; their arrays are views, not copies.
    """
    part = slice(start, stop)

    def cut(completion: CompletionScores) -> CompletionScores:
        offsets = np.concatenate([[0], np.cumsum(completion.lengths)])
        kept = offsets[start : stop + 1]
        tokens = slice(kept[0], kept[-1]) if len(kept) else slice(0, 0)
        return CompletionScores(
            log_probs=completion.log_probs[tokens],
            lengths=completion.lengths[part],
            entropy=completion.entropy[part],
            mean_logit=completion.mean_logit[part],
            top1=completion.top1[part],
            log_sum_sq_prob=completion.log_sum_sq_prob[part],
        )

    return PairScores(
        rows=scores.rows[part],
        prompt_lengths=scores.prompt_lengths[part],
        chosen_lengths=scores.chosen_lengths[part],
        rejected_lengths=scores.rejected_lengths[part],
        truncated=scores.truncated[part],
        groups=None if scores.groups is None else scores.groups[part],
        policy_chosen=cut(scores.policy_chosen),
        policy_rejected=cut(scores.policy_rejected),
        reference_chosen=None if scores.reference_chosen is None else cut(scores.reference_chosen),
        reference_rejected=None if scores.reference_rejected is None else cut(scores.reference_rejected),
    )
