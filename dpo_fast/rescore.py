"""A finished run under other betas and losses, from its scores on disk: no engine, no model.

parts -> sums -> branches -> every loss at every beta, with intervals from the same draws.
"""

import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

from dpo_fast.errors import StorageError, UsageError
from dpo_fast.metrics.grid import Grid, Interval, count_ties, grid_intervals, grid_values
from dpo_fast.metrics.rewards import Branch, reduce_pairs
from dpo_fast.metrics.summary import completion_lengths, count_truncated_and_tokens, group_members
from dpo_fast.metrics.sums import concatenate, sum_tokens
from dpo_fast.provenance import versions
from dpo_fast.run_folder import METRICS, open_scores, read_metrics, read_settings
from dpo_fast.types import AGGREGATES, REFERENCE_FREE, LossSettings, PairSums

READERS = 2  # parts that are read and summed at once
# What belongs to one loss at one beta, and not to all of a rescore's results.
OF_RESULT = ("beta", "loss_type", "loss_weights", "label_smoothing")


def rescore(
    run: Path, settings: Sequence[LossSettings], *, aggregate: str = "exact", batch_size: int = 8, seed: int = 0
) -> dict[str, Any]:
    """Compute the metrics of a finished run at other settings.

    With one setting the numbers are those of `metrics.json` after an evaluation with that setting, to the last bit.

    The keys, all values plain Python numbers, all of them finite:

    - `run`: the folder's name. `pairs`: how many. `betas`, `loss_types`: those of `results`, each once; the name of a
      sum of losses is theirs joined by "+".
    - `counts`: `pairs`; `truncated` pairs; `tokens` of `prompt`, `chosen`, `rejected`; rows that were `skipped`.
    - `results`: one for each setting, in their order: `beta`, `loss_type`, `loss_weights` (of a sum, or null),
      `label_smoothing`, `eval_loss`, and `interval`: 95 %, [low, high], or null where the loss cannot be traced to
      single pairs (aot, aot_unpaired, sft).
    - `by_beta`: one for each beta: `beta`, `eval_rewards/{chosen,rejected,margins,accuracies}`, `ties` (pairs of equal
      rewards) and `intervals` of the four by their keys.
    - `of_all`: what depends on neither: `eval_logps/{chosen,rejected}`, `eval_logits/{chosen,rejected}`,
      `eval_entropy`, `eval_mean_token_accuracy`, and `intervals` of the two log-probs.
    - `completion_lengths`: `chosen` and `rejected`, each `mean`, `median`, `max`, in tokens, scored or not.
    - `groups`, if the run has them: by name in alphabetical order, each with `pairs`, `results`, `by_beta` and `of_all`
      of the group's pairs, aggregated exactly.
    - `timing`: wall seconds, none counted twice: `read_seconds` (reading and summing the parts), `loss_seconds` (all
      values), `interval_seconds`, `group_seconds` (values and intervals of the groups), `total_seconds`.
    - `provenance`: the run's, with `settings` (what all results have in common), `aggregate`, `batch_size` and
      `bootstrap_seed` as given here, and `rescored_by`: the versions that computed these numbers.

    Args:
        run: what `dpo-fast evaluate` wrote.
        settings: at least one; they may differ in `OF_RESULT` alone.
        aggregate: "exact" over all pairs, or "trl": the mean of batch means; see `compute_metrics`.
        batch_size: of `aggregate="trl"`.
        seed: of the bootstrap.

    Returns:
        The result, ready for JSON.

    Raises:
        UsageError: an argument cannot be used, `run` is no finished run, or it has no reference and a setting needs
            one.
        StorageError: a part is missing or damaged.
        EngineOutputError: a score is NaN or infinite.
        ValueError: no settings, or settings that differ in more than `OF_RESULT`.
    """
    if aggregate not in AGGREGATES:
        raise UsageError(f"--aggregate {aggregate!r} is not known; choose from {', '.join(AGGREGATES)}")
    if batch_size < 1:
        raise UsageError(f"--batch-size {batch_size} must be at least 1")
    if seed < 0:
        raise UsageError(f"--seed {seed} must be at least 0")
    in_common = [
        {name: value for name, value in asdict(setting).items() if name not in OF_RESULT} for setting in settings
    ]
    if not settings or any(each != in_common[0] for each in in_common):
        raise ValueError(f"there must be settings, and they may differ in {', '.join(OF_RESULT)} alone")
    metrics, _ = open_run(run)

    marks = [time.perf_counter()]
    sums = _read_sums(run, settings[0])
    marks.append(time.perf_counter())
    pairs = len(sums.rows)
    if pairs != metrics["counts"]["pairs"]:
        raise StorageError(
            f"{run}: {METRICS} counts {metrics['counts']['pairs']} pairs, and the parts hold {pairs}; evaluate again"
        )
    chosen, rejected = reduce_pairs(sums, settings[0])
    values = grid_values(chosen, rejected, settings, batch_size if aggregate == "trl" else None)
    ties = _ties(chosen, rejected, values)
    marks.append(time.perf_counter())
    intervals = grid_intervals(chosen, rejected, settings, seed)
    marks.append(time.perf_counter())
    groups = {
        name: _group(chosen.select(members), rejected.select(members), settings, seed)
        for name, members in group_members(sums.groups or [])
    }
    marks.append(time.perf_counter())

    steps = ("read_seconds", "loss_seconds", "interval_seconds", "group_seconds")
    return {
        "run": run.resolve().name,
        "pairs": pairs,
        "counts": {
            "pairs": pairs,
            **count_truncated_and_tokens(sums),
            "skipped": metrics["counts"].get("skipped", 0),
        },
        "betas": list(values.by_beta),
        "loss_types": list(dict.fromkeys(loss_name(setting) for setting in settings)),
        **_results(settings, values, intervals, ties),
        "completion_lengths": completion_lengths(sums),
        **({"groups": groups} if sums.groups is not None else {}),
        "timing": {
            **{step: end - start for step, start, end in zip(steps, marks[:-1], marks[1:], strict=True)},
            "total_seconds": marks[-1] - marks[0],
        },
        "provenance": {
            **metrics["provenance"],
            "settings": in_common[0],
            "aggregate": aggregate,
            "batch_size": batch_size if aggregate == "trl" else None,
            "bootstrap_seed": seed,
            "rescored_by": versions(("dpo-fast", "numpy")),
        },
    }


def open_run(run: Path) -> tuple[dict[str, Any], LossSettings]:
    """A finished run's metrics.json, and the loss that it was evaluated with.

    Raises:
        UsageError: it is no run of `dpo-fast evaluate`, or none that has finished.
        StorageError: metrics.json is damaged.
    """
    name_one = "name the folder that `dpo-fast evaluate` wrote"
    if not run.is_dir():
        raise UsageError(f"{run}: no such run; {name_one}")
    store = open_scores(run)
    has_parts = bool(store.parts())
    if not (run / METRICS).is_file():
        if not has_parts:
            raise UsageError(f"{run}: is no run, for it holds no {METRICS}; {name_one}")
        raise UsageError(f"{run}: is not finished; the same `dpo-fast evaluate` again, without --overwrite, goes on")
    if not has_parts:
        raise UsageError(f"{run}: holds no scores, {store.storage.place('part-*.parquet')}; evaluate again")
    metrics = read_metrics(run)
    try:
        int(metrics["counts"]["pairs"])
        return metrics, read_settings(metrics)
    except (ValueError, KeyError, TypeError, UsageError) as error:
        raise StorageError(
            f"{run / METRICS}: is damaged, or of another version; remove it, and evaluate again: the scores are kept"
        ) from error


def loss_name(settings: LossSettings) -> str:
    """The loss's name; of a sum, the names joined by "+"."""
    return "+".join(settings.loss_type)


def _read_sums(run: Path, settings: LossSettings) -> PairSums:
    """The sums of all parts; a part's tokens are kept no longer than it takes to add them up."""
    store = open_scores(run)

    def read(part: int) -> PairSums:
        sums = sum_tokens(store.read_part(part))
        if sums.reference_chosen is None and settings.reference_free is None:
            raise UsageError(
                f"{run}: was evaluated without a reference; say --reference-free {', '.join(REFERENCE_FREE[:-1])} or "
                f"{REFERENCE_FREE[-1]}"
            )
        return sums

    with ThreadPoolExecutor(READERS) as readers:
        return concatenate(list(readers.map(read, store.parts())))


def _group(chosen: Branch, rejected: Branch, settings: Sequence[LossSettings], seed: int) -> dict[str, Any]:
    """One group's pairs, values and intervals."""
    values = grid_values(chosen, rejected, settings)
    intervals = grid_intervals(chosen, rejected, settings, seed)
    return {
        "pairs": len(chosen.lengths),
        **_results(settings, values, intervals, _ties(chosen, rejected, values)),
    }


def _ties(chosen: Branch, rejected: Branch, values: Grid[float]) -> dict[float, int]:
    """By beta, how many pairs have equal rewards."""
    return {beta: count_ties(chosen, rejected, beta) for beta in values.by_beta}


def _results(
    settings: Sequence[LossSettings], values: Grid[float], intervals: Grid[Interval | None], ties: dict[float, int]
) -> dict[str, Any]:
    """`results`, `by_beta` and `of_all` as `rescore` describes them."""
    return {
        "results": [
            {
                "beta": setting.beta,
                "loss_type": loss_name(setting),
                "loss_weights": setting.loss_weights and list(setting.loss_weights),
                "label_smoothing": setting.label_smoothing,
                "eval_loss": value,
                "interval": interval,
            }
            for setting, value, interval in zip(settings, values.losses, intervals.losses, strict=True)
        ],
        "by_beta": [
            {"beta": beta, **rewards, "ties": ties[beta], "intervals": intervals.by_beta[beta]}
            for beta, rewards in values.by_beta.items()
        ],
        "of_all": {**values.of_all, "intervals": intervals.of_all},
    }
