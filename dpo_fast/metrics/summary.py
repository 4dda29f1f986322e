"""Everything that `metrics.json` says about the scores: TRL's metrics, then counts, lengths, intervals and groups."""

from collections import defaultdict
from typing import Any

import numpy as np

from dpo_fast.errors import EngineOutputError, UsageError
from dpo_fast.metrics.losses import BATCH_LOSSES, total_losses
from dpo_fast.metrics.rewards import Branch, reduce_pairs
from dpo_fast.metrics.statistics import bootstrap_intervals, wilson_interval
from dpo_fast.types import AGGREGATES, Int64Array, LossSettings, PairScores


def compute_metrics(
    scores: PairScores, settings: LossSettings, *, aggregate: str = "exact", batch_size: int = 8, seed: int = 0
) -> dict[str, Any]:
    """Compute every metric of P scored pairs.

    The keys, all values plain Python numbers, all of them finite:

    - `eval_loss`, `eval_rewards/{chosen,rejected,margins,accuracies}`, `eval_logps/{chosen,rejected}`,
      `eval_logits/{chosen,rejected}`, `eval_entropy`, `eval_mean_token_accuracy`: TRL's, see `batch_metrics`.
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
    values, the last batch counting as much as a full one (trl `DPOTrainer.log`), but `eval_loss` is weighted by the
    batches' pairs (transformers `Trainer.evaluation_loop` repeats each loss once a sample). The intervals stay those
    of the means over pairs.

    Without a reference the log-ratios are `settings.reference_free` scores; see `reference_free_scores`. Losses and
    rewards are then those of a reference which scores every completion 0; `eval_logps` are still log-probs.

    Args:
        scores: P >= 1 scored pairs, in the data set's order.
        settings: the loss and its parameters.
        aggregate: `exact` or `trl`.
        batch_size: pairs a batch for `trl`.
        seed: of the bootstrap.

    Returns:
        The metrics, ready for JSON; `counts.skipped` is for the caller to add.

    Raises:
        ValueError: no pairs, no such aggregate, a batch size below 1, or no reference scores and no `reference_free`.
        EngineOutputError: a score is NaN or infinite.
        UsageError: the settings are so extreme that a metric overflows.
    """
    pairs = len(scores.rows)
    if pairs == 0:
        raise ValueError("no pairs to compute metrics from")
    if aggregate not in AGGREGATES:
        raise ValueError(f"aggregate {aggregate!r} is not one of {', '.join(AGGREGATES)}")
    if batch_size < 1:
        raise ValueError(f"batch_size {batch_size} must be at least 1")
    _check_scores(scores)
    # An overflow shows as an infinite metric, which is refused below with more to say than NumPy's warning.
    with np.errstate(over="ignore", invalid="ignore"):
        chosen, rejected = reduce_pairs(scores, settings)
        if aggregate == "exact":
            metrics = batch_metrics(chosen, rejected, settings)
        else:
            metrics = _mean_of_batches(chosen, rejected, settings, batch_size)
        intervals = _intervals(chosen, rejected, settings, seed)
    for name, value in metrics.items():
        if not np.isfinite(value):
            raise UsageError(f"{name} is {value} with --beta {settings.beta}: the numbers overflow; change the loss")
    result: dict[str, Any] = {
        **metrics,
        "counts": {
            "pairs": pairs,
            "ties": _ties(chosen, rejected, settings),
            "truncated": int(scores.truncated.sum()),
            "tokens": {
                "prompt": int(scores.prompt_lengths.sum()),
                "chosen": int(scores.chosen_lengths.sum()),
                "rejected": int(scores.rejected_lengths.sum()),
            },
        },
        "completion_lengths": {
            "chosen": _length_statistics(scores.chosen_lengths),
            "rejected": _length_statistics(scores.rejected_lengths),
        },
        "intervals": intervals,
    }
    if scores.groups is not None:
        result["groups"] = _group_metrics(scores.groups, chosen, rejected, settings, seed)
    return result


def batch_metrics(chosen: Branch, rejected: Branch, settings: LossSettings) -> dict[str, float]:
    """TRL's evaluation metrics of one batch (trl 1.16.0, trl/trainer/dpo_trainer.py, `_compute_loss`).

    Rewards are `beta` times the log-ratio whatever the f-divergence; `logps` are LD-weighted where the loss is;
    `logits` are means over the branch's tokens of the mean over the vocabulary, `entropy` is the mean over both
    branches' tokens, token accuracy is of the chosen branch. A mean over no tokens is 0, as TRL has it.

    Args:
        chosen: the chosen completions of P pairs.
        rejected: the rejected completions of the same pairs.
        settings: the loss and its parameters.

    Returns:
        TRL's keys and values.
    """
    chosen_rewards, rejected_rewards = chosen.rewards(settings.beta), rejected.rewards(settings.beta)
    chosen_tokens, rejected_tokens = int(chosen.scored_lengths.sum()), int(rejected.scored_lengths.sum())
    entropy = chosen.entropy.sum() + rejected.entropy.sum()
    return {
        "eval_loss": float(total_losses(chosen, rejected, settings).mean()),
        "eval_rewards/chosen": float(chosen_rewards.mean()),
        "eval_rewards/rejected": float(rejected_rewards.mean()),
        "eval_rewards/margins": float((chosen_rewards - rejected_rewards).mean()),
        "eval_rewards/accuracies": float((chosen_rewards > rejected_rewards).mean()),
        "eval_logps/chosen": float(chosen.log_probs.mean()),
        "eval_logps/rejected": float(rejected.log_probs.mean()),
        "eval_logits/chosen": float(chosen.mean_logit.sum() / max(1, chosen_tokens)),
        "eval_logits/rejected": float(rejected.mean_logit.sum() / max(1, rejected_tokens)),
        "eval_entropy": float(entropy / max(1, chosen_tokens + rejected_tokens)),
        "eval_mean_token_accuracy": float(chosen.top1.sum() / max(1, chosen_tokens)),
    }


def _mean_of_batches(chosen: Branch, rejected: Branch, settings: LossSettings, batch_size: int) -> dict[str, float]:
    """The mean over consecutive batches of each batch's metrics, the loss weighted by the batches' pairs."""
    pairs = len(chosen.lengths)
    batches = [slice(start, min(start + batch_size, pairs)) for start in range(0, pairs, batch_size)]
    values = [batch_metrics(chosen.select(batch), rejected.select(batch), settings) for batch in batches]
    metrics = {name: float(np.mean([value[name] for value in values])) for name in values[0]}
    sizes = [batch.stop - batch.start for batch in batches]
    metrics["eval_loss"] = float(np.average([value["eval_loss"] for value in values], weights=sizes))
    return metrics


def _intervals(chosen: Branch, rejected: Branch, settings: LossSettings, seed: int) -> dict[str, list[float]]:
    """95 % intervals of the metrics that are means over pairs."""
    chosen_rewards, rejected_rewards = chosen.rewards(settings.beta), rejected.rewards(settings.beta)
    samples = {
        "eval_rewards/chosen": chosen_rewards,
        "eval_rewards/rejected": rejected_rewards,
        "eval_rewards/margins": chosen_rewards - rejected_rewards,
        "eval_logps/chosen": chosen.log_probs,
        "eval_logps/rejected": rejected.log_probs,
    }
    if not BATCH_LOSSES.intersection(settings.loss_type):
        samples = {"eval_loss": total_losses(chosen, rejected, settings), **samples}
    bounds = bootstrap_intervals(np.stack(list(samples.values()), axis=1), seed)
    wins = int((chosen_rewards > rejected_rewards).sum())
    return {
        **{name: [float(low), float(high)] for name, (low, high) in zip(samples, bounds, strict=True)},
        "eval_rewards/accuracies": list(wilson_interval(wins, len(chosen_rewards))),
    }


def _group_metrics(
    groups: list[str], chosen: Branch, rejected: Branch, settings: LossSettings, seed: int
) -> dict[str, dict[str, Any]]:
    """The metrics of each group's pairs, by the group's name."""
    positions: dict[str, list[int]] = defaultdict(list)
    for position, name in enumerate(groups):
        positions[name].append(position)
    result: dict[str, dict[str, Any]] = {}
    for name in sorted(positions):
        members = np.array(positions[name], dtype=np.int64)
        group_chosen, group_rejected = chosen.select(members), rejected.select(members)
        result[name] = {
            "pairs": len(members),
            "ties": _ties(group_chosen, group_rejected, settings),
            **batch_metrics(group_chosen, group_rejected, settings),
            "intervals": _intervals(group_chosen, group_rejected, settings, seed),
        }
    return result


def _ties(chosen: Branch, rejected: Branch, settings: LossSettings) -> int:
    """How many pairs have equal rewards."""
    return int((chosen.rewards(settings.beta) == rejected.rewards(settings.beta)).sum())


def _length_statistics(lengths: Int64Array) -> dict[str, float | int]:
    """Mean, median and maximum of the completions' lengths, in tokens."""
    return {"mean": float(lengths.mean()), "median": float(np.median(lengths)), "max": int(lengths.max())}


def _check_scores(scores: PairScores) -> None:
    """Refuse scores that are NaN or infinite, which would make every metric so; name the first such row."""
    for name in ("policy_chosen", "policy_rejected", "reference_chosen", "reference_rejected"):
        completion = getattr(scores, name)
        if completion is None:
            continue
        for field in ("log_probs", "entropy", "mean_logit", "log_sum_sq_prob"):
            values = getattr(completion, field)
            bad = np.flatnonzero(~np.isfinite(values))
            if bad.size == 0:
                continue
            first = int(bad[0])
            pair = (
                first if field != "log_probs" else int(np.searchsorted(np.cumsum(completion.lengths), first, "right"))
            )
            raise EngineOutputError(
                f"row {scores.rows[pair]}: {field} of {name} is {values[first]}; score it again in higher precision"
            )
