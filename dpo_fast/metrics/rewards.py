"""From a completion's sums to its reward, its divergence and its weight. P is the number of pairs; logs are in nats."""

from dataclasses import dataclass, fields
from math import log

import numpy as np

from dpo_fast.types import CompletionSums, Float64Array, Int64Array, LossSettings, PairSums

# exp() of more than this is cut off: e^300 = 2e130 may still be squared and summed within float64. TRL leaves it
# uncut, so that its float32 becomes infinite beyond 88.7; below that the two agree.
MAX_EXPONENT = 300.0
# TRL's own cut for the alpha-divergence (trl/trainer/dpo_trainer.py, `clamp_max` for float32).
MAX_ALPHA_EXPONENT = 80.0


@dataclass(frozen=True, slots=True)
class Branch:
    """One branch (chosen or rejected) of P pairs, reduced to one value a completion.

    All fields have shape (P,), or (B, P) for B batches of P pairs each: pairs lie along the last axis.

    Attributes:
        log_probs: float64, nats: the policy's log-prob of the completion, LD-weighted where `ld_alpha` says so.
        policy: float64: the policy's side of the log-ratio; differs from `log_probs` only without a reference.
        reference: float64: the reference's side of the log-ratio; 0 without a reference.
        log_ratios: float64, nats: log of the policy's probability over the reference's: `policy - reference`.
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
    log_ratios: Float64Array
    divergence_scores: Float64Array
    weights: Float64Array
    lengths: Int64Array
    scored_lengths: Int64Array
    log_prob_sums: Float64Array
    entropy: Float64Array
    mean_logit: Float64Array
    top1: Int64Array

    def rewards(self, beta: float) -> Float64Array:
        """(P,) float64: DPO's implicit reward, `beta` times the log-ratio (arXiv:2305.18290, Eq. 5 without log Z).

        Whatever the f-divergence, as TRL's `rewards/*` metrics have it.
        """
        return beta * self.log_ratios

    def select(self, pairs: slice | Int64Array) -> "Branch":
        """The same branch of some of P pairs, by a slice or by indices."""
        return Branch(*(getattr(self, field.name)[pairs] for field in fields(self)))

    def batches(self, size: int) -> "Branch":
        """P pairs as consecutive batches of `size` each, which P must be a multiple of: (P,) -> (P / size, size)."""
        return Branch(*(getattr(self, field.name).reshape(-1, size) for field in fields(self)))


def sequence_log_probs(completion: CompletionSums, ld_alpha: float | None = None) -> Float64Array:
    """Log-probability of each completion.

    With `ld_alpha`, the tokens beyond the shorter completion of the pair count `ld_alpha` times: LD-DPO
    (arXiv:2409.06411), as in TRL's `_compute_loss` (`shared_logps + ld_alpha * tail_logps`).

    Args:
        completion: one model's sums of one branch of P pairs.
        ld_alpha: weight of the tokens beyond the shorter completion's length, or None for a plain sum.

    Returns:
        (P,) float64, nats.
    """
    return _weighted(completion.log_probs, 1.0 if ld_alpha is None else ld_alpha)


def reference_free_scores(completion: CompletionSums, kind: str, ld_alpha: float | None = None) -> Float64Array:
    """What stands in for the log-ratio when there is no reference, as RewardBench defines it.

    RewardBench (arXiv:2403.13787; allenai/reward-bench `rewardbench/dpo.py`, `get_batch_logps`), with l the
    log-probs of the completion's tokens: `sum` is the sum of l, `average` their mean over the scored tokens, `norm`
    is -||l||_2. RewardBench ranks by these numbers as they are. Here they take the log-ratio's place, as if a
    reference gave every completion a score of 0, so the reward is `beta` times the score: same ranking, same
    accuracy. For `sum` that is CPO's reward (arXiv:2401.08417), for `average` SimPO's (arXiv:2405.14734, Eq. 4).
    `ld_alpha` weighs the tokens before they are reduced; RewardBench has no such option.

    A completion of which nothing could be scored gets 0, not RewardBench's 0/0.

    Args:
        completion: the policy's sums of one branch of P pairs.
        kind: `sum`, `average` or `norm`.
        ld_alpha: weight of the tokens beyond the shorter completion's length, or None.

    Returns:
        (P,) float64, nats.
    """
    if kind == "norm":
        return -np.sqrt(_weighted(completion.squares, 1.0 if ld_alpha is None else ld_alpha**2))
    scores = sequence_log_probs(completion, ld_alpha)
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


def completion_weights(completion: CompletionSums) -> Float64Array:
    """WPO's weight of each completion (arXiv:2406.11827, Eq. 2, with the paper's sampled alignment).

    The geometric mean over the scored tokens of p(token) / (sum over the vocabulary of p^2); a pair weighs the
    product of its two completions' weights.

    Args:
        completion: the policy's sums of one branch of P pairs.

    Returns:
        (P,) float64, 1 for a completion without scored tokens.
    """
    aligned = sequence_log_probs(completion) - completion.log_sum_sq_prob
    return np.exp(aligned / np.maximum(completion.lengths, 1))


def reduce_pairs(sums: PairSums, settings: LossSettings) -> tuple[Branch, Branch]:
    """Reduce the sums of every completion to the values that losses and metrics are computed from.

    Args:
        sums: of P pairs.
        settings: the divergence, LD and WPO weights, and whether to do without the reference; `reference_free` is
            obeyed even where there is one. Neither beta nor the loss is used, so the branches serve all of them.

    Returns:
        The chosen and the rejected branch.

    Raises:
        ValueError: there are no reference scores and `settings.reference_free` is None.
    """

    def reduce(policy: CompletionSums, reference: CompletionSums | None, lengths: Int64Array) -> Branch:
        log_probs = sequence_log_probs(policy, settings.ld_alpha)
        if settings.reference_free is not None:
            policy_side = reference_free_scores(policy, settings.reference_free, settings.ld_alpha)
            reference_side = np.zeros_like(policy_side)
        elif reference is not None:
            policy_side, reference_side = log_probs, sequence_log_probs(reference, settings.ld_alpha)
        else:
            raise ValueError("no reference scores: score the pairs with a reference, or set reference_free")
        log_ratios = policy_side - reference_side
        return Branch(
            log_probs=log_probs,
            policy=policy_side,
            reference=reference_side,
            log_ratios=log_ratios,
            divergence_scores=divergence_scores(log_ratios, settings),
            weights=completion_weights(policy) if settings.use_weighting else np.ones_like(log_probs),
            lengths=lengths,
            scored_lengths=policy.lengths,
            log_prob_sums=sequence_log_probs(policy),
            entropy=policy.entropy,
            mean_logit=policy.mean_logit,
            top1=policy.top1,
        )

    return (
        reduce(sums.policy_chosen, sums.reference_chosen, sums.chosen_lengths),
        reduce(sums.policy_rejected, sums.reference_rejected, sums.rejected_lengths),
    )


def log_sigmoid(values: Float64Array) -> Float64Array:
    """log(1 / (1 + e^-x)), element by element, without overflow: min(x, 0) - log(1 + e^-|x|)."""
    # Several times faster than logaddexp, for which NumPy has no vector instructions.
    result: Float64Array = np.minimum(values, 0.0) - np.log1p(np.exp(-np.abs(values)))
    return result


def _weighted(sums: Float64Array, weight_beyond: float) -> Float64Array:
    """(P, 2) -> (P,): the sums up to the shorter completion's length, and `weight_beyond` times those beyond it."""
    return sums[:, 0] + weight_beyond * sums[:, 1]
