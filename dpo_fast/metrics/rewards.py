"""From per-token log-probabilities to one reward a completion.

Tokens arrive as flat ragged arrays, one completion after another; every sum over them is a segmented sum in float64.
Shapes use P (pairs) and C (scored tokens of one branch, all pairs together); logs are in nats.
"""

from dataclasses import dataclass, fields
from math import log
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dpo_fast.types import CompletionScores, Float64Array, Int64Array, LossSettings, PairScores

# exp() of more than this is cut off: e^300 = 2e130 may still be squared and summed within float64. TRL leaves it
# uncut, so that its float32 becomes infinite beyond 88.7; below that the two agree.
MAX_EXPONENT = 300.0
# TRL's own cut for the alpha-divergence (trl/trainer/dpo_trainer.py, `clamp_max` for float32).
MAX_ALPHA_EXPONENT = 80.0


@dataclass(frozen=True, slots=True)
class Branch:
    """One branch (chosen or rejected) of P pairs, reduced to one value a completion; all fields have shape (P,).

    Attributes:
        log_probs: float64, nats: the policy's log-prob of the completion, LD-weighted where `ld_alpha` says so.
        policy: float64: the policy's side of the log-ratio; differs from `log_probs` only without a reference.
        reference: float64: the reference's side of the log-ratio; 0 without a reference.
        divergence_scores: float64: f'(ratio), which the losses on a difference of rewards are built on.
        weights: float64: WPO's weight of the completion; 1 without weighting.
        lengths: int64 tokens of the completion, scored or not.
        scored_lengths: int64 scored tokens; one fewer than `lengths` where the prompt is empty.
        log_prob_sums: float64, nats: the policy's log-probs, summed without LD weights.
        entropy: float64, nats: the policy's entropy, summed over the scored tokens.
        mean_logit: float64: the policy's mean logits, summed over the scored tokens.
        top1: int64: scored tokens that are the policy's first choice.
    """

    log_probs: Float64Array
    policy: Float64Array
    reference: Float64Array
    divergence_scores: Float64Array
    weights: Float64Array
    lengths: Int64Array
    scored_lengths: Int64Array
    log_prob_sums: Float64Array
    entropy: Float64Array
    mean_logit: Float64Array
    top1: Int64Array

    @property
    def log_ratios(self) -> Float64Array:
        """(P,) float64, nats: log of the policy's probability over the reference's."""
        return self.policy - self.reference

    def rewards(self, beta: float) -> Float64Array:
        """(P,) float64: DPO's implicit reward, `beta` times the log-ratio (arXiv:2305.18290, Eq. 5 without log Z).

        Whatever the f-divergence, as TRL's `rewards/*` metrics have it.
        """
        return beta * self.log_ratios

    def select(self, pairs: slice | Int64Array) -> "Branch":
        """The same branch of some of the pairs, by a slice or by indices."""
        return Branch(*(getattr(self, field.name)[pairs] for field in fields(self)))


def segment_sums(values: NDArray[Any], lengths: Int64Array) -> Float64Array:
    """Sum consecutive segments of a flat array; takes a float64 copy of it for as long as it runs.

    Args:
        values: (C,) numbers of any type.
        lengths: (S,) int64, elements of each segment, 0 allowed; their sum is C.

    Returns:
        (S,) float64, summed in float64; 0 for an empty segment.
    """
    sums = np.zeros(len(lengths), dtype=np.float64)
    # reduceat has no empty segments: it would return an element of the next one.
    filled = lengths > 0
    if filled.any():
        starts = np.cumsum(lengths) - lengths
        sums[filled] = np.add.reduceat(values, starts[filled], dtype=np.float64)
    return sums


def sequence_log_probs(
    completion: CompletionScores, shared_lengths: Int64Array, ld_alpha: float | None = None
) -> Float64Array:
    """Log-probability of each completion.

    With `ld_alpha`, the tokens beyond the shorter completion of the pair count `ld_alpha` times: LD-DPO
    (arXiv:2409.06411), as in TRL's `_compute_loss` (`shared_logps + ld_alpha * tail_logps`).

    Args:
        completion: one model's scores of one branch of P pairs.
        shared_lengths: (P,) int64, scored tokens of the shorter completion of each pair.
        ld_alpha: weight of the tokens beyond the shared length, or None for a plain sum.

    Returns:
        (P,) float64, nats.
    """
    if ld_alpha is None:
        return segment_sums(completion.log_probs, completion.lengths)
    return _weighted_sums(completion.log_probs, completion.lengths, shared_lengths, ld_alpha)


def reference_free_scores(
    completion: CompletionScores, shared_lengths: Int64Array, kind: str, ld_alpha: float | None = None
) -> Float64Array:
    """What stands in for the log-ratio when there is no reference, as RewardBench defines it.

    RewardBench (arXiv:2403.13787; allenai/reward-bench `rewardbench/dpo.py`, `get_batch_logps`), with l the
    log-probs of the completion's tokens: `sum` is the sum of l, `average` their mean over the scored tokens, `norm`
    is -||l||_2. RewardBench ranks by these numbers as they are. Here they take the log-ratio's place, as if a
    reference gave every completion a score of 0, so the reward is `beta` times the score: same ranking, same
    accuracy. For `sum` that is CPO's reward (arXiv:2401.08417), for `average` SimPO's (arXiv:2405.14734, Eq. 4).
    `ld_alpha` weighs the tokens before they are reduced; RewardBench has no such option.

    A completion of which nothing could be scored gets 0, not RewardBench's 0/0.

    Args:
        completion: the policy's scores of one branch of P pairs.
        shared_lengths: (P,) int64, scored tokens of the shorter completion of each pair.
        kind: `sum`, `average` or `norm`.
        ld_alpha: weight of the tokens beyond the shared length, or None.

    Returns:
        (P,) float64, nats.
    """
    if kind == "norm":
        squares = np.square(completion.log_probs, dtype=np.float64)
        tail_weight = 1.0 if ld_alpha is None else ld_alpha
        return -np.sqrt(_weighted_sums(squares, completion.lengths, shared_lengths, tail_weight**2))
    scores = sequence_log_probs(completion, shared_lengths, ld_alpha)
    if kind == "average":
        scores /= np.maximum(completion.lengths, 1)
    return scores


def divergence_scores(log_ratios: Float64Array, settings: LossSettings) -> Float64Array:
    """f'(u) of the density ratio u = exp(log-ratio): f-DPO's reward without beta (arXiv:2309.16240, Table 1).

    =================  ==========================================
    reverse_kl         log u
    forward_kl         1 - 1/u
    js_divergence      log(2u / (1 + u))
    alpha_divergence   (u^(alpha-1) - 1) / (alpha - 1)
    =================  ==========================================

    The constants follow TRL (`_compute_loss`): f'(1) = 0 in each. The alpha-divergence tends to reverse_kl as alpha
    tends to 1, and is taken as that within 1e-6; its exponent is cut off at 80 as in TRL, forward_kl's at 300.

    Args:
        log_ratios: (P,) float64, nats.
        settings: `f_divergence_type` and `f_alpha_divergence_coef` are used.

    Returns:
        (P,) float64.
    """
    kind = settings.f_divergence_type
    if kind == "forward_kl":
        return -np.expm1(np.minimum(-log_ratios, MAX_EXPONENT))
    if kind == "js_divergence":
        return log(2.0) + log_sigmoid(log_ratios)
    order = settings.f_alpha_divergence_coef - 1.0
    if kind == "alpha_divergence" and abs(order) >= 1e-6:
        powers: Float64Array = np.expm1(np.minimum(order * log_ratios, MAX_ALPHA_EXPONENT))
        return powers / order
    return log_ratios


def completion_weights(completion: CompletionScores) -> Float64Array:
    """WPO's weight of each completion (arXiv:2406.11827, Eq. 2, with the paper's sampled alignment).

    The geometric mean over the scored tokens of p(token) / (sum over the vocabulary of p^2); a pair weighs the
    product of its two completions' weights.

    Args:
        completion: the policy's scores of one branch of P pairs.

    Returns:
        (P,) float64, 1 for a completion without scored tokens.
    """
    aligned = segment_sums(completion.log_probs, completion.lengths) - completion.log_sum_sq_prob
    return np.exp(aligned / np.maximum(completion.lengths, 1))


def reduce_pairs(scores: PairScores, settings: LossSettings) -> tuple[Branch, Branch]:
    """Reduce the tokens of every completion to the values that losses and metrics are computed from.

    Args:
        scores: per-token scores of P pairs.
        settings: the divergence, LD and WPO weights, and whether to do without the reference; `reference_free` is
            obeyed even where reference scores are there.

    Returns:
        The chosen and the rejected branch.

    Raises:
        ValueError: there are no reference scores and `settings.reference_free` is None.
    """
    shared = np.minimum(scores.policy_chosen.lengths, scores.policy_rejected.lengths)

    def reduce(policy: CompletionScores, reference: CompletionScores | None, lengths: Int64Array) -> Branch:
        log_probs = sequence_log_probs(policy, shared, settings.ld_alpha)
        if settings.reference_free is not None:
            policy_side = reference_free_scores(policy, shared, settings.reference_free, settings.ld_alpha)
            reference_side = np.zeros_like(policy_side)
        elif reference is not None:
            policy_side, reference_side = log_probs, sequence_log_probs(reference, shared, settings.ld_alpha)
        else:
            raise ValueError("no reference scores: score the pairs with a reference, or set reference_free")
        return Branch(
            log_probs=log_probs,
            policy=policy_side,
            reference=reference_side,
            divergence_scores=divergence_scores(policy_side - reference_side, settings),
            weights=completion_weights(policy) if settings.use_weighting else np.ones_like(log_probs),
            lengths=lengths,
            scored_lengths=policy.lengths,
            log_prob_sums=segment_sums(policy.log_probs, policy.lengths),
            entropy=policy.entropy,
            mean_logit=policy.mean_logit,
            top1=policy.top1,
        )

    return (
        reduce(scores.policy_chosen, scores.reference_chosen, scores.chosen_lengths),
        reduce(scores.policy_rejected, scores.reference_rejected, scores.rejected_lengths),
    )


def log_sigmoid(values: Float64Array) -> Float64Array:
    """log(1 / (1 + e^-x)), element by element, without overflow: -log(e^0 + e^-x)."""
    result: Float64Array = -np.logaddexp(0.0, -values)
    return result


def _weighted_sums(
    values: NDArray[Any], lengths: Int64Array, shared_lengths: Int64Array, tail_weight: float
) -> Float64Array:
    """(P,) float64: the sum over the first `shared_lengths` tokens, and `tail_weight` times that over the rest."""
    pieces = np.stack([shared_lengths, lengths - shared_lengths], axis=1)  # (P, 2)
    sums = segment_sums(values, pieces.ravel())  # (2P,): head, tail, head, tail …
    return sums[0::2] + tail_weight * sums[1::2]
