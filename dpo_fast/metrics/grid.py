"""Many losses and betas of the same pairs: what depends on the loss, what on beta alone, and what on neither.

The pairs are reduced to branches once; each loss and beta is then arithmetic on P values, and all bootstrapped
intervals come from the same draws.
"""

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import numpy as np

from dpo_fast.errors import UsageError
from dpo_fast.metrics.losses import BATCH_LOSSES, total_losses
from dpo_fast.metrics.rewards import Branch
from dpo_fast.metrics.statistics import THREADS, bootstrap_intervals, wilson_interval
from dpo_fast.types import Float64Array, LossSettings

Value = TypeVar("Value")
Interval = list[float]


@dataclass(frozen=True, slots=True)
class Grid(Generic[Value]):
    """A value, or an interval, of every metric at every setting.

    Attributes:
        losses: `eval_loss`, one for each of the settings, in their order.
        by_beta: `eval_rewards/{chosen,rejected,margins,accuracies}` by beta.
        of_all: `eval_logps/{chosen,rejected}`, and as values `eval_logits/{chosen,rejected}`, `eval_entropy` and
            `eval_mean_token_accuracy`: what depends neither on the loss nor on beta.
    """

    losses: list[Value]
    by_beta: dict[float, dict[str, Value]]
    of_all: dict[str, Value]


def grid_values(
    chosen: Branch, rejected: Branch, settings: Sequence[LossSettings], batch_size: int | None = None
) -> Grid[float]:
    """TRL's metrics at every setting.

    Args:
        chosen: the chosen completions of P pairs, reduced by what all settings have in common.
        rejected: the rejected completions of the same pairs.
        settings: the losses and betas.
        batch_size: None for means over all pairs (over all tokens for logits, entropy, token accuracy and sft), with
            all pairs sorted where a loss sorts. A number for TRL's means over consecutive batches of so many pairs,
            the last batch counting as much as a full one (trl `DPOTrainer.log`), but in the loss, where batches are
            weighted by their pairs (transformers `Trainer.evaluation_loop` repeats each loss once a sample).

    Returns:
        Finite values.

    Raises:
        UsageError: the settings are so extreme that a metric overflows.
    """
    batches = _batches(chosen, rejected, batch_size)

    def loss(setting: LossSettings) -> float:
        with overflow_is_checked():
            of_batches = [total_losses(*batch, setting).ravel() for batch in batches]
            return float((of_batches[0] if len(batches) == 1 else np.concatenate(of_batches)).mean())

    with ThreadPoolExecutor(THREADS) as pool:
        losses = list(pool.map(loss, settings))
    with overflow_is_checked():
        by_beta = {
            beta: _mean_of_batches([reward_metrics(*batch, beta) for batch in batches]) for beta in _betas(settings)
        }
        of_all = _mean_of_batches([model_metrics(*batch) for batch in batches])
    values = Grid(losses, by_beta, of_all)
    check_finite(values, settings)
    return values


def grid_intervals(
    chosen: Branch, rejected: Branch, settings: Sequence[LossSettings], seed: int = 0
) -> Grid[Interval | None]:
    """95 % intervals, [low, high], of the metrics that are means over pairs, at every setting.

    Wilson's for the accuracy, bootstrapped for the others. Rewards are beta times the log-ratios, and so are the ends
    of their intervals.

    Args:
        chosen: the chosen completions of P pairs, reduced by what all settings have in common.
        rejected: the rejected completions of the same pairs.
        settings: the losses and betas.
        seed: of the bootstrap.

    Returns:
        Finite ends; None for a loss that cannot be traced to single pairs (aot, aot_unpaired, sft).

    Raises:
        UsageError: the settings are so extreme that a resampled mean overflows.
    """
    pairs = len(chosen.lengths)
    traceable = [setting for setting in settings if not BATCH_LOSSES.intersection(setting.loss_type)]

    def quantities(block: slice) -> Float64Array:
        of_chosen, of_rejected = chosen.select(block), rejected.select(block)
        ratios = of_chosen.log_ratios, of_rejected.log_ratios
        with overflow_is_checked():
            losses = [total_losses(of_chosen, of_rejected, setting) for setting in traceable]
        return np.array([*ratios, ratios[0] - ratios[1], of_chosen.log_probs, of_rejected.log_probs, *losses]).T

    wins = {beta: int((chosen.rewards(beta) > rejected.rewards(beta)).sum()) for beta in _betas(settings)}
    return intervals_of(quantities, pairs, wins, settings, seed)


def intervals_of(
    quantities: Callable[[slice], Float64Array],
    pairs: int,
    wins: Mapping[float, int],
    settings: Sequence[LossSettings],
    seed: int,
) -> Grid[Interval | None]:
    """The intervals of `grid_intervals`, from the pairs' quantities.

    Args:
        quantities: of some consecutive pairs, (pairs of the slice, M) float64: log-ratios of the chosen and the
            rejected completions, their difference, the log-probs of the two, each loss that can be traced to pairs.
        pairs: P.
        wins: by beta, pairs whose chosen completion has the larger reward.
        settings: the losses and betas.
        seed: of the bootstrap.

    Raises:
        UsageError: a resampled mean overflows.
    """
    traceable = [setting for setting in settings if not BATCH_LOSSES.intersection(setting.loss_type)]
    bounds = bootstrap_intervals(quantities, pairs, seed)
    (*of_ratios, chosen_log_probs, rejected_log_probs), of_losses = bounds[:5], iter(bounds[5:])
    by_beta: dict[float, dict[str, Interval | None]] = {}
    for beta in _betas(settings):
        names = ("eval_rewards/chosen", "eval_rewards/rejected", "eval_rewards/margins")
        by_beta[beta] = {name: (beta * ends).tolist() for name, ends in zip(names, of_ratios, strict=True)}
        by_beta[beta]["eval_rewards/accuracies"] = list(wilson_interval(wins[beta], pairs))
    intervals: Grid[Interval | None] = Grid(
        losses=[next(of_losses).tolist() if setting in traceable else None for setting in settings],
        by_beta=by_beta,
        of_all={"eval_logps/chosen": chosen_log_probs.tolist(), "eval_logps/rejected": rejected_log_probs.tolist()},
    )
    check_finite(intervals, settings)
    return intervals


def reward_metrics(chosen: Branch, rejected: Branch, beta: float) -> dict[str, Any]:
    """TRL's reward metrics of a batch (trl 1.16.0, trl/trainer/dpo_trainer.py, `_compute_loss`).

    Rewards are `beta` times the log-ratio whatever the f-divergence; a tie counts as wrong.

    Args:
        chosen: the chosen completions of P pairs, or of B batches of P pairs.
        rejected: the rejected completions of the same pairs.
        beta: strength of the reference.

    Returns:
        TRL's keys; a number each, or (B,) float64.
    """
    chosen_rewards, rejected_rewards = chosen.rewards(beta), rejected.rewards(beta)
    return {
        "eval_rewards/chosen": chosen_rewards.mean(axis=-1),
        "eval_rewards/rejected": rejected_rewards.mean(axis=-1),
        "eval_rewards/margins": (chosen_rewards - rejected_rewards).mean(axis=-1),
        "eval_rewards/accuracies": (chosen_rewards > rejected_rewards).mean(axis=-1),
    }


def model_metrics(chosen: Branch, rejected: Branch) -> dict[str, Any]:
    """TRL's metrics of a batch that depend neither on the loss nor on beta (from the same place).

    `logps` are LD-weighted where the loss is; `logits` are means over the branch's tokens of the mean over the
    vocabulary, `entropy` is the mean over both branches' tokens, token accuracy is of the chosen branch. A mean over no
    tokens is 0, as TRL has it.

    Args:
        chosen: the chosen completions of P pairs, or of B batches of P pairs.
        rejected: the rejected completions of the same pairs.

    Returns:
        TRL's keys; a number each, or (B,) float64.
    """
    chosen_tokens, rejected_tokens = chosen.scored_lengths.sum(axis=-1), rejected.scored_lengths.sum(axis=-1)
    entropy = chosen.entropy.sum(axis=-1) + rejected.entropy.sum(axis=-1)
    return {
        "eval_logps/chosen": chosen.log_probs.mean(axis=-1),
        "eval_logps/rejected": rejected.log_probs.mean(axis=-1),
        "eval_logits/chosen": chosen.mean_logit.sum(axis=-1) / np.maximum(1, chosen_tokens),
        "eval_logits/rejected": rejected.mean_logit.sum(axis=-1) / np.maximum(1, rejected_tokens),
        "eval_entropy": entropy / np.maximum(1, chosen_tokens + rejected_tokens),
        "eval_mean_token_accuracy": chosen.top1.sum(axis=-1) / np.maximum(1, chosen_tokens),
    }


def count_ties(chosen: Branch, rejected: Branch, beta: float) -> int:
    """How many pairs have equal rewards."""
    return int((chosen.rewards(beta) == rejected.rewards(beta)).sum())


def _betas(settings: Sequence[LossSettings]) -> list[float]:
    """Each beta once, in the order of the settings."""
    return list(dict.fromkeys(setting.beta for setting in settings))


def _batches(chosen: Branch, rejected: Branch, batch_size: int | None) -> list[tuple[Branch, Branch]]:
    """All pairs as one batch; or all full batches at once, (B, batch_size), and then what is left, (1, fewer)."""
    if batch_size is None:
        return [(chosen, rejected)]
    pairs = len(chosen.lengths)
    full = pairs - pairs % batch_size
    pieces = [(slice(0, full), batch_size), (slice(full, pairs), pairs - full)]
    return [
        (chosen.select(piece).batches(size), rejected.select(piece).batches(size))
        for piece, size in pieces
        if piece.stop > piece.start
    ]


def _mean_of_batches(metrics: list[dict[str, Any]]) -> dict[str, float]:
    """The mean over all batches; each entry has some batches' values by name."""
    return {name: float(np.concatenate([np.atleast_1d(each[name]) for each in metrics]).mean()) for name in metrics[0]}


def overflow_is_checked() -> np.errstate:
    """An overflow shows as an infinite metric, which `check_finite` refuses with more to say than NumPy's warning."""
    return np.errstate(over="ignore", invalid="ignore")


def check_finite(grid: Grid[Any], settings: Sequence[LossSettings]) -> None:
    """Refuse what overflowed; the message names the metric and the setting."""
    found = [("eval_loss", setting, value) for setting, value in zip(settings, grid.losses, strict=True)]
    for setting in settings:
        found += [(name, setting, value) for name, value in grid.by_beta[setting.beta].items()]
        found += [(name, setting, value) for name, value in grid.of_all.items()]
    for name, setting, value in found:
        if value is not None and not np.isfinite(value).all():
            raise UsageError(
                f"{name} is {value} with --beta {setting.beta} and --loss-type {','.join(setting.loss_type)}: "
                "the numbers overflow; change the loss"
            )
