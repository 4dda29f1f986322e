"""The metrics of many parts, in little memory: 40 bytes a pair are kept, and all else is added up part by part."""

from collections.abc import Iterable
from itertools import chain
from math import fsum
from typing import Any

import numpy as np

from dpo_fast.metrics.grid import Grid, check_finite, intervals_of, overflow_is_checked
from dpo_fast.metrics.losses import BATCH_LOSSES, total_losses
from dpo_fast.metrics.rewards import reduce_pairs
from dpo_fast.metrics.summary import compute_metrics, count_truncated_and_tokens, length_statistics
from dpo_fast.metrics.sums import concatenate
from dpo_fast.types import Float64Array, Int64Array, LossSettings, PairSums


def metrics_of_parts(
    parts: Iterable[PairSums], settings: LossSettings, *, aggregate: str = "exact", batch_size: int = 8, seed: int = 0
) -> dict[str, Any]:
    """Compute every metric of all parts' pairs: what `compute_metrics` gives for all of them at once.

    The numbers are the same to the last bit, but for `eval_logits` and `eval_entropy`, which are summed part by part.
    Losses that sort all pairs or average over all tokens, groups, and TRL's means of batches need all sums at once:
    about 500 bytes a pair.

    Args:
        parts: at least one pair in all; gone through once.
        settings: the loss and its parameters.
        aggregate: `exact` or `trl`.
        batch_size: pairs a batch for `trl`.
        seed: of the bootstrap.

    Returns:
        The metrics, ready for JSON.

    Raises:
        ValueError, UsageError: as `compute_metrics`.
    """
    remaining = iter(parts)
    seen: list[PairSums] = []
    for part in remaining:
        seen.append(part)
        if len(part.rows):
            break
    at_once = aggregate != "exact" or BATCH_LOSSES.intersection(settings.loss_type)
    if at_once or not seen or seen[-1].groups is not None:
        sums = concatenate([*seen, *remaining])
        return compute_metrics(sums, settings, aggregate=aggregate, batch_size=batch_size, seed=seed)
    return _tally(chain(seen, remaining), settings, seed)


def _tally(parts: Iterable[PairSums], settings: LossSettings, seed: int) -> dict[str, Any]:
    """`compute_metrics` of one loss that can be traced to pairs, without groups."""
    # By pair: log-ratios of the chosen and the rejected, log-probs of the two, the loss.
    columns: list[list[Float64Array]] = [[], [], [], [], []]
    mean_logits: list[list[float]] = [[], []]
    entropies: list[float] = []
    scored_tokens = np.zeros(2, np.int64)
    length_counts = [np.zeros(1, np.int64), np.zeros(1, np.int64)]
    counts: dict[str, Any] = {}
    top1 = 0
    for part in parts:
        branches = chosen, rejected = reduce_pairs(part, settings)
        with overflow_is_checked():
            losses = total_losses(chosen, rejected, settings)
        of_pairs = (chosen.log_ratios, rejected.log_ratios, chosen.log_probs, rejected.log_probs, losses)
        for column, values in zip(columns, of_pairs, strict=True):
            column.append(values)
        for number, branch in enumerate(branches):
            mean_logits[number].append(float(branch.mean_logit.sum()))
            scored_tokens[number] += branch.scored_lengths.sum()
            length_counts[number] = _add_up(length_counts[number], np.bincount(branch.lengths, minlength=1))
        entropies.append(float(chosen.entropy.sum() + rejected.entropy.sum()))
        top1 += int(chosen.top1.sum())
        counts = _add_counts(counts, count_truncated_and_tokens(part))
    # One column after another, so that the parts' pieces of it are free before the next.
    ratios_chosen, ratios_rejected, chosen_log_probs, rejected_log_probs, of_pairs_losses = (
        np.concatenate(columns.pop(0)) for _ in range(5)
    )
    pairs = len(of_pairs_losses)
    beta = settings.beta
    with overflow_is_checked():
        chosen_rewards, rejected_rewards = beta * ratios_chosen, beta * ratios_rejected
        wins, ties = int((chosen_rewards > rejected_rewards).sum()), int((chosen_rewards == rejected_rewards).sum())
        rewards = {
            "eval_rewards/chosen": float(chosen_rewards.mean()),
            "eval_rewards/rejected": float(rejected_rewards.mean()),
            "eval_rewards/margins": float((chosen_rewards - rejected_rewards).mean()),
            "eval_rewards/accuracies": wins / pairs,
        }
        del chosen_rewards, rejected_rewards
        of_all = {
            "eval_logps/chosen": float(chosen_log_probs.mean()),
            "eval_logps/rejected": float(rejected_log_probs.mean()),
            "eval_logits/chosen": fsum(mean_logits[0]) / max(1, int(scored_tokens[0])),
            "eval_logits/rejected": fsum(mean_logits[1]) / max(1, int(scored_tokens[1])),
            "eval_entropy": fsum(entropies) / max(1, int(scored_tokens.sum())),
            "eval_mean_token_accuracy": top1 / max(1, int(scored_tokens[0])),
        }
        loss = float(of_pairs_losses.mean())
    check_finite(Grid([loss], {beta: rewards}, of_all), [settings])

    def quantities(block: slice) -> Float64Array:
        ratios = ratios_chosen[block], ratios_rejected[block]
        of_block = (chosen_log_probs[block], rejected_log_probs[block], of_pairs_losses[block])
        return np.array([*ratios, ratios[0] - ratios[1], *of_block]).T

    intervals = intervals_of(quantities, pairs, {beta: wins}, [settings], seed)
    chosen_lengths, rejected_lengths = length_counts
    return {
        "eval_loss": loss,
        **rewards,
        **of_all,
        "counts": {"pairs": pairs, "ties": ties, **counts},
        "completion_lengths": {
            "chosen": length_statistics(chosen_lengths),
            "rejected": length_statistics(rejected_lengths),
        },
        "intervals": {"eval_loss": intervals.losses[0], **intervals.by_beta[beta], **intervals.of_all},
    }


def _add_up(counts: Int64Array, more: Int64Array) -> Int64Array:
    """Counts by length, of which either may be the longer."""
    longest = max(len(counts), len(more))
    padded = [np.pad(each, (0, longest - len(each))) for each in (counts, more)]
    return padded[0] + padded[1]


def _add_counts(counts: dict[str, Any], more: dict[str, Any]) -> dict[str, Any]:
    """Numbers by name, which may lie in dictionaries."""
    return {
        name: _add_counts(counts.get(name, {}), value) if isinstance(value, dict) else counts.get(name, 0) + value
        for name, value in more.items()
    }
