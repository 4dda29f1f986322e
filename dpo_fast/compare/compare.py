"""Several runs of the same pairs: which differences between them are more than chance, over all pairs and by subset.

runs -> values by pair at one setting -> paired tests of each comparison -> Holm's correction over each metric's tests.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from dpo_fast.compare.paired import compare_accuracies, compare_means, holm, resamples_for
from dpo_fast.compare.run_pairs import RunPairs, check_same_pairs, read_run, run_names
from dpo_fast.errors import UsageError
from dpo_fast.metrics.statistics import wilson_interval
from dpo_fast.metrics.summary import group_members
from dpo_fast.provenance import versions
from dpo_fast.rescore import open_run
from dpo_fast.types import Float64Array, Int64Array, LossSettings

ACCURACY, LOSS = "eval_rewards/accuracies", "eval_loss"
MEANS = ("eval_rewards/margins", "eval_rewards/chosen", "eval_rewards/rejected", LOSS)
# Settings that a user can make the same for all runs, by the option that does.
OPTIONS = {
    "beta": "--beta",
    "loss_type": "--loss-type",
    "label_smoothing": "--label-smoothing",
    "ld_alpha": "--ld-alpha",
    "reference_free": "--reference-free",
}


def compare(
    runs: Sequence[Path], changes: Mapping[str, Any] | None = None, *, all_pairs: bool = False, seed: int = 0
) -> dict[str, Any]:
    """Compare finished runs of the same pairs.

    All runs are compared at one setting of the loss, for rewards and losses mean nothing beside each other otherwise:
    the one that they share, or what `changes` makes of theirs.

    Two families of tests are corrected by Holm's method, metric by metric: all comparisons over all pairs, and all
    comparisons in all subsets. A `p_holm` below 0.05 is then a difference that is there, with at most 5 % chance of
    any false one in its family. Other metrics are other questions, and have families of their own.

    The keys, all values plain Python numbers:

    - `pairs`; `settings`: the loss; `notes`: what a reader must know, a line each.
    - `runs`: one a run: `name`, `eval_rewards/{accuracies,margins,chosen,rejected}`, `eval_loss` (null where it cannot
      be traced to single pairs), and `interval` of the accuracy (95 %, Wilson's).
    - `comparisons`: `run`, `against`, and by TRL's key what `compare_accuracies` and `compare_means` say of it, with
      `p_holm`.
    - `subsets`, if the runs have any: by name in alphabetical order, each with `pairs`, `runs` and `comparisons`.
    - `provenance`: `dataset`, `group_by`, `bootstrap_seed`, `resamples`, `all_pairs`, `versions`; of each run its
      `models`, `engine` and `precision`.

    Args:
        runs: two or more folders that `dpo-fast evaluate` wrote.
        changes: fields of `LossSettings` that are set for all runs alike.
        all_pairs: compare each run with each other, instead of all with the first.
        seed: of the bootstrap.

    Returns:
        The result, ready for JSON.

    Raises:
        UsageError: fewer than two runs; a folder is none; they are not of the same pairs or settings; a number
            overflows.
        StorageError: a part is missing or damaged.
        EngineOutputError: a score is NaN or infinite.
    """
    if len(runs) < 2:
        raise UsageError(f"{len(runs)} run to compare: name two or more folders that `dpo-fast evaluate` wrote")
    if seed < 0:
        raise UsageError(f"--seed {seed} must be at least 0")
    opened = [open_run(run) for run in runs]
    settings = _common_settings(runs, [own for _, own in opened], dict(changes or {}))
    values = [read_run(run, settings) for run in runs]
    check_same_pairs(runs, [each.rows for each in values])
    provenances = [metrics["provenance"] for metrics, _ in opened]
    names = run_names(runs)
    sides = list(combinations(range(len(runs)), 2)) if all_pairs else [(0, other) for other in range(1, len(runs))]
    groups, group_by = _groups(values, provenances)
    members = dict(group_members(groups)) if groups is not None else {}
    resamples = resamples_for(len(sides) * max(len(members), 1))

    def of_pairs(pairs: Int64Array) -> dict[str, Any]:
        return {
            "runs": [_run_values(name, each, pairs, settings) for name, each in zip(names, values, strict=True)],
            "comparisons": _compare_all(names, values, sides, pairs, settings, seed, resamples),
        }

    whole = of_pairs(np.arange(len(values[0])))
    subsets = {name: {"pairs": len(pairs), **of_pairs(pairs)} for name, pairs in members.items()}
    _correct(whole["comparisons"])
    _correct([each for subset in subsets.values() for each in subset["comparisons"]])
    return {
        "pairs": len(values[0]),
        "settings": asdict(settings),
        **whole,
        **({"subsets": subsets} if subsets else {}),
        "notes": _notes(names, values, provenances, group_by),
        "provenance": {
            "dataset": provenances[0]["dataset"],
            "group_by": group_by,
            "bootstrap_seed": seed,
            "resamples": resamples,
            "all_pairs": all_pairs,
            "versions": versions(("dpo-fast", "numpy")),
            "runs": [
                {"name": name, **{key: provenance.get(key) for key in ("models", "engine", "precision")}}
                for name, provenance in zip(names, provenances, strict=True)
            ],
        },
    }


def _common_settings(runs: Sequence[Path], own: Sequence[LossSettings], changes: dict[str, Any]) -> LossSettings:
    """The one setting that all runs are compared at.

    Raises:
        UsageError: theirs differ in something that `changes` does not make the same.
    """
    if "loss_type" in changes:
        changes["loss_weights"] = None
    settings = [replace(each, **changes) for each in own]
    for run, setting in zip(runs[1:], settings[1:], strict=True):
        mine, first = asdict(setting), asdict(settings[0])
        differing = [name for name in first if mine[name] != first[name]]
        if differing:
            found = ", ".join(f"{name} ({mine[name]}, and {first[name]} there)" for name in differing)
            options = [OPTIONS[name] for name in differing if name in OPTIONS]
            way_out = f"say {' and '.join(options)} for all of them" if options else "evaluate both with the same"
            raise UsageError(f"{run}: was evaluated with other settings than {runs[0]}: {found}; {way_out}")
    return settings[0]


def _groups(values: Sequence[RunPairs], provenances: Sequence[dict[str, Any]]) -> tuple[list[str] | None, str | None]:
    """The subsets of the first run that has any, and the column that they come from; the pairs are the same in all."""
    for each, provenance in zip(values, provenances, strict=True):
        if each.groups is not None:
            return each.groups, provenance.get("group_by")
    return None, None


def _run_values(name: str, run: RunPairs, pairs: Int64Array, settings: LossSettings) -> dict[str, Any]:
    """One run's means over some pairs."""
    margins = run.margins[pairs]
    wins = int((margins > 0).sum())
    losses = None if run.losses is None else float(run.losses[pairs].mean())
    rewards = (margins, run.chosen_log_ratios[pairs], run.rejected_log_ratios[pairs])
    means = [settings.beta * float(values.mean()) for values in rewards]
    accuracy = {ACCURACY: wins / len(pairs), "interval": list(wilson_interval(wins, len(pairs)))}
    return {"name": name, **accuracy, **dict(zip(MEANS, [*means, losses], strict=True))}


def _compare_all(
    names: Sequence[str],
    values: Sequence[RunPairs],
    sides: Sequence[tuple[int, int]],
    pairs: Int64Array,
    settings: LossSettings,
    seed: int,
    resamples: int,
) -> list[dict[str, Any]]:
    """Every comparison over some pairs; `sides` has the numbers of the run that is compared with, and of the run."""
    traceable = all(run.losses is not None for run in values)
    metrics = MEANS if traceable else MEANS[:-1]

    def differences(block: slice) -> Float64Array:
        of_block = pairs[block]
        columns = []
        for against, run in ((values[one], values[other]) for one, other in sides):
            chosen = settings.beta * (run.chosen_log_ratios[of_block] - against.chosen_log_ratios[of_block])
            rejected = settings.beta * (run.rejected_log_ratios[of_block] - against.rejected_log_ratios[of_block])
            columns += [chosen - rejected, chosen, rejected]
            if run.losses is not None and against.losses is not None:
                columns.append(run.losses[of_block] - against.losses[of_block])
        return np.array(columns).T

    found = compare_means(differences, len(pairs), seed, resamples)
    comparisons = []
    for number, (one, other) in enumerate(sides):
        margins, against = values[other].margins[pairs], values[one].margins[pairs]
        of_means = found[number * len(metrics) : (number + 1) * len(metrics)]
        comparisons.append(
            {
                "run": names[other],
                "against": names[one],
                ACCURACY: compare_accuracies(margins, against),
                **dict(zip(metrics, of_means, strict=True)),
            }
        )
    return comparisons


def _correct(comparisons: Sequence[dict[str, Any]]) -> None:
    """Put `p_holm` beside each p-value; a metric's tests are one family."""
    for metric in (ACCURACY, *MEANS):
        tests = [each[metric] for each in comparisons if metric in each]
        tested = [test for test in tests if test["p"] is not None]
        corrected = iter(holm([test["p"] for test in tested]))
        for test in tests:
            test["p_holm"] = None if test["p"] is None else next(corrected)


def _notes(
    names: Sequence[str], values: Sequence[RunPairs], provenances: Sequence[dict[str, Any]], group_by: str | None
) -> list[str]:
    """What the numbers do not say by themselves."""
    notes = []
    for key in ("engine", "precision"):
        found = [provenance.get(key) for provenance in provenances]
        if len(set(found)) > 1:
            of_runs = ", ".join(f"{name}: {value}" for name, value in zip(names, found, strict=True))
            notes.append(f"the runs differ in {key}, which has a part in the differences ({of_runs})")
    references = {
        str(each.get("models", {}).get("reference", {}).get("weights_and_graph_sha256")) for each in provenances
    }
    if len(references) > 1:
        notes.append("the runs' references differ: each one's rewards are relative to its own")
    ties = [int((each.margins == 0).sum()) for each in values]
    if len(set(ties)) > 1:
        of_runs = ", ".join(f"{name}: {count:,}" for name, count in zip(names, ties, strict=True))
        notes.append(f"a tie is counted as wrong, and the runs differ in ties, so in accuracy too ({of_runs})")
    if any(each.losses is None for each in values):
        notes.append("the loss cannot be traced to single pairs, so it is not compared")
    columns = sorted({str(each["group_by"]) for each in provenances if each.get("group_by") not in (None, group_by)})
    if group_by is not None and columns:
        notes.append(f"subsets are of the column {group_by}; other runs have {', '.join(columns)}")
    return notes
