"""Everything that `metrics.json` says about the scores: TRL's metrics, then counts, lengths, intervals and groups."""

from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import numpy as np

from dpo_fast.metrics.grid import Interval, count_ties, grid_intervals, grid_values
from dpo_fast.metrics.rewards import Branch, reduce_pairs
from dpo_fast.types import AGGREGATES, Int64Array, LossSettings, PairSums


def compute_metrics(
    sums: PairSums, settings: LossSettings, *, aggregate: str = "exact", batch_size: int = 8, seed: int = 0
) -> dict[str, Any]:
    """Compute every metric of P scored pairs.

    The keys, all values plain Python numbers, all of them finite:

    - `eval_loss`, `eval_rewards/{chosen,rejected,margins,accuracies}`, `eval_logps/{chosen,rejected}`,
      `eval_logits/{chosen,rejected}`, `eval_entropy`, `eval_mean_token_accuracy`: TRL's, see `reward_metrics` and
      `model_metrics`.
    - `counts`: `pairs`; `ties`, the pairs of equal rewards, which TRL's accuracy counts as wrong; `truncated` pairs;
      `tokens` of `prompt`, `chosen`, `rejected`, scored or not.
    - `completion_lengths`: `chosen` and `rejected`, each `mean`, `median`, `max`, in tokens, scored or not.
    - `intervals`: 95 %, [low, high] by metric: Wilson's for the accuracy, bootstrapped for the other means over pairs.
      `eval_loss` is left out where the loss cannot be traced to single pairs (aot, aot_unpaired, sft).
    - `groups`, if the scores have them: by name in alphabetical order, each with `pairs`, `ties`, `intervals` and
      TRL's metrics of the group's pairs, aggregated exactly.

    `aggregate="exact"` takes means over all pairs (over all tokens for logits, entropy, token accuracy and sft), and
    sorts all pairs where a loss sorts: as if the data set were one batch, so `batch_size` has no say.
    `aggregate="trl"` cuts consecutive batches of `batch_size` pairs; a metric is the unweighted mean of the batches'
    values, the last batch counting as much as a full one, but `eval_loss` is weighted by the batches' pairs; see
    `grid_values`. The intervals stay those of the means over pairs.

    Without a reference the log-ratios are `settings.reference_free` scores; see `reference_free_scores`. Losses and
    rewards are then those of a reference which scores every completion 0; `eval_logps` are still log-probs.

    Args:
        sums: of P >= 1 scored pairs, in the data set's order.
        settings: the loss and its parameters.
        aggregate: `exact` or `trl`.
        batch_size: pairs a batch for `trl`.
        seed: of the bootstrap.

    Returns:
        The metrics, ready for JSON; `counts.skipped` is for the caller to add.

    Raises:
        ValueError: no pairs, no such aggregate, a batch size below 1, or no reference scores and no `reference_free`.
        UsageError: the settings are so extreme that a metric overflows.
    """
    pairs = len(sums.rows)
    if pairs == 0:
        raise ValueError("no pairs to compute metrics from")
    if aggregate not in AGGREGATES:
        raise ValueError(f"aggregate {aggregate!r} is not one of {', '.join(AGGREGATES)}")
    if batch_size < 1:
        raise ValueError(f"batch_size {batch_size} must be at least 1")
    chosen, rejected = reduce_pairs(sums, settings)
    metrics, intervals = _measure(chosen, rejected, settings, batch_size if aggregate == "trl" else None, seed)
    result: dict[str, Any] = {
        **metrics,
        "counts": {
            "pairs": pairs,
            "ties": count_ties(chosen, rejected, settings.beta),
            **count_truncated_and_tokens(sums),
        },
        "completion_lengths": completion_lengths(sums),
        "intervals": intervals,
    }
    if sums.groups is not None:
        result["groups"] = {
            name: _group_metrics(chosen.select(members), rejected.select(members), settings, seed)
            for name, members in group_members(sums.groups)
        }
    return result


def count_truncated_and_tokens(sums: PairSums) -> dict[str, Any]:
    """`truncated` pairs, and `tokens` of `prompt`, `chosen` and `rejected`, scored or not."""
    return {
        "truncated": int(sums.truncated.sum()),
        "tokens": {
            "prompt": int(sums.prompt_lengths.sum()),
            "chosen": int(sums.chosen_lengths.sum()),
            "rejected": int(sums.rejected_lengths.sum()),
        },
    }


def completion_lengths(sums: PairSums) -> dict[str, dict[str, float | int]]:
    """`mean`, `median` and `max` of the `chosen` and `rejected` completions' lengths, in tokens, scored or not."""
    return {
        "chosen": length_statistics(np.bincount(sums.chosen_lengths)),
        "rejected": length_statistics(np.bincount(sums.rejected_lengths)),
    }


def length_statistics(counts: Int64Array) -> dict[str, float | int]:
    """`mean`, `median` and `max` of lengths.

    Args:
        counts: (longest + 1,) int64, how many have each length; at least one has one.
    """
    up_to = np.cumsum(counts)
    total = int(up_to[-1])
    middle = np.searchsorted(up_to, [(total - 1) // 2, total // 2], side="right")
    mean = float(counts @ np.arange(len(counts)) / total)
    return {"mean": mean, "median": float(middle.mean()), "max": int(np.flatnonzero(counts)[-1])}


def group_members(groups: list[str]) -> Iterator[tuple[str, Int64Array]]:
    """The groups' names in alphabetical order, each with the positions of its pairs."""
    positions: dict[str, list[int]] = defaultdict(list)
    for position, name in enumerate(groups):
        positions[name].append(position)
    for name in sorted(positions):
        yield name, np.array(positions[name], dtype=np.int64)


def _measure(
    chosen: Branch, rejected: Branch, settings: LossSettings, batch_size: int | None, seed: int
) -> tuple[dict[str, float], dict[str, Interval]]:
    """TRL's metrics and their intervals, by TRL's keys."""
    values = grid_values(chosen, rejected, [settings], batch_size)
    intervals = grid_intervals(chosen, rejected, [settings], seed)
    flat = {"eval_loss": intervals.losses[0], **intervals.by_beta[settings.beta], **intervals.of_all}
    return (
        {"eval_loss": values.losses[0], **values.by_beta[settings.beta], **values.of_all},
        {name: interval for name, interval in flat.items() if interval is not None},
    )


def _group_metrics(chosen: Branch, rejected: Branch, settings: LossSettings, seed: int) -> dict[str, Any]:
    """The metrics of one group's pairs."""
    metrics, intervals = _measure(chosen, rejected, settings, None, seed)
    ties = count_ties(chosen, rejected, settings.beta)
    return {"pairs": len(chosen.lengths), "ties": ties, **metrics, "intervals": intervals}
