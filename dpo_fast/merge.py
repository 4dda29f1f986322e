"""Shards of a set, evaluated apart, as one run: its parts and its numbers are those of a single run over all rows."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dpo_fast.errors import StorageError, UsageError
from dpo_fast.evaluate import EvaluateOptions, metrics_of
from dpo_fast.files import new_folder
from dpo_fast.run_folder import METRICS, SCORES, SKIPPED, open_scores, read_metrics, read_settings, write_results
from dpo_fast.store import PAIRS, ScoreStore
from dpo_fast.types import SkippedRow

# Of a shard's provenance, what says how it was computed and not what.
OF_THE_PROCESS = (
    "shard", "hardware", "computed_tokens", "padding_tokens", "this_process", "engines", "token_budget", "cluster",
)  # fmt: skip


def merge(runs: Sequence[Path], output: Path, *, overwrite: bool = False) -> dict[str, Any]:
    """Put the finished runs of all shards together.

    Args:
        runs: one a shard, in any order.
        output: the run to write; it appears whole or not at all.
        overwrite: whether an existing run is replaced.

    Returns:
        The content of metrics.json: as of one run, with the shards' times added up and their provenance listed.

    Raises:
        UsageError: a shard is missing, there twice, or of something else.
        StorageError: a run is unfinished or damaged, or the disk refused.
        OutputExistsError: the output exists.
    """
    shards = {run: read_metrics(run) for run in runs}
    by_number = _in_order(shards)
    with new_folder(output, overwrite=overwrite, marker=METRICS) as folder:
        store = ScoreStore(folder / SCORES)
        fingerprints: dict[str, Any] | None = None
        for run in by_number:
            source = open_scores(run)
            for part in source.parts():
                record = source.record(part)
                if record is None:
                    raise StorageError(f"{source.place(part)}: is damaged; evaluate that shard again: it goes on")
                models = {name: value for name, value in record.fingerprints.items() if name != PAIRS}
                fingerprints = fingerprints or models
                if models != fingerprints:
                    raise UsageError(f"{source.place(part)}: was scored by other models or engines than the first part")
                store.adopt(part, source)
        store.finish()
        merged = [shards[run] for run in by_number]
        parts = store.parts()
        rows, size = merged[0]["provenance"]["dataset"]["rows"], merged[0]["provenance"]["part_size"]
        if parts != list(range(-(-rows // size))):
            raise StorageError(f"{output}: parts are missing in the shards' folders; evaluate the shards again")
        provenance = merged[0]["provenance"]
        options = EvaluateOptions(
            loss=read_settings(merged[0]),
            aggregate=provenance["aggregate"],
            batch_size=provenance["batch_size"] or EvaluateOptions().batch_size,
            seed=provenance["bootstrap_seed"],
        )
        metrics = metrics_of(store.read(), options)
        skipped = [row for run in by_number for row in _skipped(run)]
        metrics["counts"]["skipped"] = len(skipped)
        metrics["timing"] = {name: sum(each["timing"][name] for each in merged) for name in merged[0]["timing"]}
        metrics["provenance"] = {
            **{name: value for name, value in provenance.items() if name not in OF_THE_PROCESS},
            "shard": None,
            "token_budget": provenance["token_budget"],
            "computed_tokens": sum(each["provenance"]["computed_tokens"] for each in merged),
            "padding_tokens": sum(each["provenance"]["padding_tokens"] for each in merged),
            "hardware": provenance["hardware"],
            "shards": [
                {name: each["provenance"][name] for name in OF_THE_PROCESS if name in each["provenance"]}
                | {"timing": each["timing"]}
                for each in merged
            ],
        }
        write_results(folder, metrics, skipped)
    return metrics


def _in_order(shards: dict[Path, dict[str, Any]]) -> list[Path]:
    """The runs by their shards' numbers.

    Raises:
        UsageError: they are not all shards of one evaluation.
    """
    found: dict[int, Path] = {}
    first = next(iter(shards), None)
    if first is None:
        raise UsageError("no runs to merge: name the runs of all shards")
    for run, metrics in shards.items():
        provenance = metrics["provenance"]
        shard = provenance.get("shard")
        if shard is None:
            raise UsageError(f"{run}: is a run over the whole set, not a shard; make shards with --shard i/n")
        wanted = shards[first]["provenance"]
        differing = [
            name
            for name in sorted(wanted.keys() | provenance.keys())
            if name not in OF_THE_PROCESS and wanted.get(name) != provenance.get(name)
        ]
        if shard[1] != wanted["shard"][1]:
            differing.append("the number of shards")
        if differing:
            raise UsageError(f"{run}: differs from {first} in {', '.join(differing)}; they are no shards of one run")
        if shard[0] in found:
            raise UsageError(f"{run}: is shard {shard[0]}/{shard[1]}, and so is {found[shard[0]]}; name each one once")
        found[shard[0]] = run
    shards_in_all = shards[first]["provenance"]["shard"][1]
    missing = [f"{number}/{shards_in_all}" for number in range(1, shards_in_all + 1) if number not in found]
    if missing:
        raise UsageError(f"the shards {', '.join(missing)} are missing; name the runs of all {shards_in_all} shards")
    return [found[number] for number in sorted(found)]


def _skipped(run: Path) -> list[SkippedRow]:
    """The rows that a run could not use.

    Raises:
        StorageError: the list is missing or damaged.
    """
    path = run / SKIPPED
    try:
        return [SkippedRow(**json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError, TypeError) as error:
        raise StorageError(f"{path}: is missing or damaged; evaluate that shard again: it goes on") from error
