"""TRL's fifteen preference losses, by TRL's names (trl 1.16.0, trl/trainer/dpo_trainer.py, `_compute_loss`).

Each takes the two branches of P pairs and returns (P,) float64, of which the mean is the loss; of branches of shape
(B, P), for B batches, it returns (B, P), and what it says of all pairs it says of each batch's. Below, h_w and h_l are
the log-ratios of the chosen and the rejected completion, d_w and d_l their f-divergence scores (the log-ratios
themselves with reverse_kl), and s is the sigmoid. Without a reference, a reference-free score takes the place of the
log-ratio: the loss is that of a reference which gives every completion a score of 0.
"""

from collections.abc import Callable
from math import log, log1p

import numpy as np

from dpo_fast.metrics.rewards import MAX_EXPONENT, Branch, log_sigmoid
from dpo_fast.types import SORTING_LOSSES, Float64Array, LossSettings

Loss = Callable[[Branch, Branch, LossSettings], Float64Array]

# The losses whose values cannot be traced to one pair each: sorting takes pairs apart, and sft averages over tokens.
BATCH_LOSSES = SORTING_LOSSES | {"sft"}


def sigmoid(chosen: Branch, rejected: Branch, settings: LossSettings) -> Float64Array:
    """DPO (arXiv:2305.18290, Eq. 7): -log s(beta (d_w - d_l)).

    Args:
        chosen: the chosen completions of P pairs.
        rejected: the rejected completions of the same pairs.
        settings: `beta` is used.

    Returns:
        (P,) float64, nats.
    """
    return -log_sigmoid(_logits(chosen, rejected, settings))


def hinge(chosen: Branch, rejected: Branch, settings: LossSettings) -> Float64Array:
    """SLiC (arXiv:2305.10425, Section 2), normalised as in RSO (arXiv:2309.06657): max(0, 1 - beta (d_w - d_l)).

    Args:
        chosen: the chosen completions of P pairs.
        rejected: the rejected completions of the same pairs.
        settings: `beta` is used; it is the reciprocal of the margin.

    Returns:
        (P,) float64.
    """
    return np.maximum(0.0, 1.0 - _logits(chosen, rejected, settings))


def ipo(chosen: Branch, rejected: Branch, settings: LossSettings) -> Float64Array:
    """IPO (arXiv:2310.12036, Eq. 17): (d_w / |y_w| - d_l / |y_l| - 1 / (2 beta))^2, beta being the paper's tau.

    The lengths count every token of the completion, scored or not, as TRL's unshifted `completion_mask` does. An
    average (`reference_free="average"`) is divided by them once more; `sum` is what fits here.

    Args:
        chosen: the chosen completions of P pairs.
        rejected: the rejected completions of the same pairs.
        settings: `beta` is used.

    Returns:
        (P,) float64.
    """
    return np.square(_per_token(chosen) - _per_token(rejected) - 1.0 / (2.0 * settings.beta))


def exo_pair(chosen: Branch, rejected: Branch, settings: LossSettings) -> Float64Array:
    """EXO with two completions (arXiv:2402.00856, Eq. 16): the KL divergence of (q, 1 - q) from (1 - e, e).

    q = s(beta (d_w - d_l)) and e is the label smoothing: q log(q / (1 - e)) + (1 - q) log((1 - q) / e).

    Args:
        chosen: the chosen completions of P pairs.
        rejected: the rejected completions of the same pairs.
        settings: `beta` and `label_smoothing` are used.

    Returns:
        (P,) float64, nats.
    """
    logits = _logits(chosen, rejected, settings)
    smoothing = settings.label_smoothing
    chosen_term = _sigmoid(logits) * (log_sigmoid(logits) - log1p(-smoothing))
    rejected_term = _sigmoid(-logits) * (log_sigmoid(-logits) - log(smoothing))
    return chosen_term + rejected_term


def nca_pair(chosen: Branch, rejected: Branch, settings: LossSettings) -> Float64Array:
    """NCA for pairs (arXiv:2402.05369, Section 4.1): -log s(r_w) - (log s(-r_w) + log s(-r_l)) / 2, r = beta h.

    Args:
        chosen: the chosen completions of P pairs.
        rejected: the rejected completions of the same pairs.
        settings: `beta` is used.

    Returns:
        (P,) float64, nats.
    """
    chosen_rewards, rejected_rewards = chosen.rewards(settings.beta), rejected.rewards(settings.beta)
    return -log_sigmoid(chosen_rewards) - 0.5 * (log_sigmoid(-chosen_rewards) + log_sigmoid(-rejected_rewards))


def robust(chosen: Branch, rejected: Branch, settings: LossSettings) -> Float64Array:
    """Robust DPO (arXiv:2403.00409, Section 3.1), unbiased where a share e of the labels is flipped.

    With z = beta (d_w - d_l) and e the label smoothing: (-(1 - e) log s(z) + e log s(-z)) / (1 - 2 e).

    Args:
        chosen: the chosen completions of P pairs.
        rejected: the rejected completions of the same pairs.
        settings: `beta` and `label_smoothing` are used.

    Returns:
        (P,) float64, nats; may be negative.
    """
    logits = _logits(chosen, rejected, settings)
    flipped = settings.label_smoothing
    return (-(1.0 - flipped) * log_sigmoid(logits) + flipped * log_sigmoid(-logits)) / (1.0 - 2.0 * flipped)


def bco_pair(chosen: Branch, rejected: Branch, settings: LossSettings) -> Float64Array:
    """BCO for pairs (arXiv:2404.04656, Section 4), without the reward shift: -log s(beta h_w) - log s(-beta h_l).

    Args:
        chosen: the chosen completions of P pairs.
        rejected: the rejected completions of the same pairs.
        settings: `beta` is used.

    Returns:
        (P,) float64, nats.
    """
    return -log_sigmoid(chosen.rewards(settings.beta)) - log_sigmoid(-rejected.rewards(settings.beta))


def sppo_hard(chosen: Branch, rejected: Branch, settings: LossSettings) -> Float64Array:
    """SPPO (arXiv:2405.00675, Eq. 4.7), P = 1 for the winner and 0 for the loser.

    (h_w - 1 / (2 beta))^2 + (h_l + 1 / (2 beta))^2.

    Args:
        chosen: the chosen completions of P pairs.
        rejected: the rejected completions of the same pairs.
        settings: `beta` is used.

    Returns:
        (P,) float64, nats squared.
    """
    target = 0.5 / settings.beta
    return np.square(chosen.log_ratios - target) + np.square(rejected.log_ratios + target)


def aot(chosen: Branch, rejected: Branch, settings: LossSettings) -> Float64Array:
    """AOT, paired (arXiv:2406.05882, Section 3): the smoothed sigmoid loss of sorted margins.

    The policy's margins log pi(y_w) - log pi(y_l) and the reference's are sorted apart, each over all P pairs, and
    compared quantile by quantile. The result depends on which pairs are in the batch.

    Args:
        chosen: the chosen completions of P pairs.
        rejected: the rejected completions of the same pairs.
        settings: `beta` and `label_smoothing` are used.

    Returns:
        (P,) float64, nats, by quantile and not by pair.
    """
    margins = np.sort(chosen.policy - rejected.policy) - np.sort(chosen.reference - rejected.reference)
    return _smoothed_sigmoid(margins, settings)


def aot_unpaired(chosen: Branch, rejected: Branch, settings: LossSettings) -> Float64Array:
    """AOT, unpaired (arXiv:2406.05882, Section 3): the smoothed sigmoid loss of sort(h_w) - sort(h_l).

    The result depends on which pairs are in the batch.

    Args:
        chosen: the chosen completions of P pairs.
        rejected: the rejected completions of the same pairs.
        settings: `beta` and `label_smoothing` are used.

    Returns:
        (P,) float64, nats, by quantile and not by pair.
    """
    return _smoothed_sigmoid(np.sort(chosen.log_ratios) - np.sort(rejected.log_ratios), settings)


def apo_zero(chosen: Branch, rejected: Branch, settings: LossSettings) -> Float64Array:
    """APO-zero (arXiv:2408.06266, Eq. 7): 1 - s(beta h_w) + s(beta h_l).

    Args:
        chosen: the chosen completions of P pairs.
        rejected: the rejected completions of the same pairs.
        settings: `beta` is used.

    Returns:
        (P,) float64 in [0, 2].
    """
    return _sigmoid(-chosen.rewards(settings.beta)) + _sigmoid(rejected.rewards(settings.beta))


def apo_down(chosen: Branch, rejected: Branch, settings: LossSettings) -> Float64Array:
    """APO-down (arXiv:2408.06266, Eq. 8): s(beta h_w) + 1 - s(beta (h_w - h_l)).

    Args:
        chosen: the chosen completions of P pairs.
        rejected: the rejected completions of the same pairs.
        settings: `beta` is used.

    Returns:
        (P,) float64 in [0, 2].
    """
    chosen_rewards = chosen.rewards(settings.beta)
    return _sigmoid(chosen_rewards) + _sigmoid(rejected.rewards(settings.beta) - chosen_rewards)


def discopop(chosen: Branch, rejected: Branch, settings: LossSettings) -> Float64Array:
    """DiscoPOP (arXiv:2406.08414, Eq. 5): -log s(z) (1 - m) + exp(-z) m, z = beta (d_w - d_l), m = s(z / tau).

    exp(-z) m is computed as exp(log m - z): where exp(-z) overflows, m vanishes faster if tau < 1.

    Args:
        chosen: the chosen completions of P pairs.
        rejected: the rejected completions of the same pairs.
        settings: `beta` and `discopop_tau` are used.

    Returns:
        (P,) float64.
    """
    logits = _logits(chosen, rejected, settings)
    modulation = logits / settings.discopop_tau
    exponential = np.exp(np.minimum(log_sigmoid(modulation) - logits, MAX_EXPONENT))
    return -log_sigmoid(logits) * _sigmoid(-modulation) + exponential


def sft(chosen: Branch, rejected: Branch, settings: LossSettings) -> Float64Array:
    """Negative log-likelihood of the chosen completions, the generation loss of MPO (arXiv:2411.10442).

    The mean over all the batch's scored tokens, not over pairs; 0 where there are none (TRL: NaN).

    Args:
        chosen: the chosen completions of P pairs.
        rejected: not used.
        settings: not used.

    Returns:
        (P,) float64, nats a token: the same number P times, for WPO to weigh by pair (where TRL 1.16.0 fails: it
        multiplies an expanded scalar in place).
    """
    tokens = np.maximum(1, chosen.scored_lengths.sum(axis=-1, keepdims=True))
    mean = -chosen.log_prob_sums.sum(axis=-1, keepdims=True) / tokens
    return np.broadcast_to(mean, chosen.lengths.shape)


def sigmoid_norm(chosen: Branch, rejected: Branch, settings: LossSettings) -> Float64Array:
    """Length-normalised DPO (Tülu 3, arXiv:2411.15124, Eq. 6): -log s(beta (d_w / |y_w| - d_l / |y_l|)).

    The lengths are ipo's: every token of the completion, scored or not.

    Args:
        chosen: the chosen completions of P pairs.
        rejected: the rejected completions of the same pairs.
        settings: `beta` is used.

    Returns:
        (P,) float64, nats.
    """
    return -log_sigmoid(settings.beta * (_per_token(chosen) - _per_token(rejected)))


LOSSES: dict[str, Loss] = {
    "sigmoid": sigmoid,
    "hinge": hinge,
    "ipo": ipo,
    "exo_pair": exo_pair,
    "nca_pair": nca_pair,
    "robust": robust,
    "bco_pair": bco_pair,
    "sppo_hard": sppo_hard,
    "aot": aot,
    "aot_unpaired": aot_unpaired,
    "apo_zero": apo_zero,
    "apo_down": apo_down,
    "discopop": discopop,
    "sft": sft,
    "sigmoid_norm": sigmoid_norm,
}


def total_losses(chosen: Branch, rejected: Branch, settings: LossSettings) -> Float64Array:
    """The losses asked for, added up with their weights (MPO, arXiv:2411.10442) and weighted by pair (WPO).

    Args:
        chosen: the chosen completions of P pairs.
        rejected: the rejected completions of the same pairs.
        settings: the losses and all their parameters.

    Returns:
        (P,) float64, of which the mean is the batch's loss; one value a pair unless a loss is in `BATCH_LOSSES`.
    """
    loss_weights = settings.loss_weights or (1.0,) * len(settings.loss_type)
    total = np.zeros(chosen.lengths.shape)
    for name, loss_weight in zip(settings.loss_type, loss_weights, strict=True):
        total += loss_weight * LOSSES[name](chosen, rejected, settings)
    return total * (chosen.weights * rejected.weights) if settings.use_weighting else total


def _logits(chosen: Branch, rejected: Branch, settings: LossSettings) -> Float64Array:
    """(P,) float64: beta (d_w - d_l)."""
    return settings.beta * (chosen.divergence_scores - rejected.divergence_scores)


def _per_token(branch: Branch) -> Float64Array:
    """(P,) float64: the divergence score divided by the completion's tokens, scored or not."""
    return branch.divergence_scores / np.maximum(branch.lengths, 1)


def _smoothed_sigmoid(margins: Float64Array, settings: LossSettings) -> Float64Array:
    """-(1 - e) log s(beta x) - e log s(-beta x), e being the label smoothing; (P,) -> (P,)."""
    logits, smoothing = settings.beta * margins, settings.label_smoothing
    return -(1.0 - smoothing) * log_sigmoid(logits) - smoothing * log_sigmoid(-logits)


def _sigmoid(values: Float64Array) -> Float64Array:
    """1 / (1 + e^-x), element by element, without overflow."""
    return np.exp(log_sigmoid(values))
