"""The main job: a preference set through a bundle's engines, to metrics.

rows -> tokens -> batches -> engine -> scores -> metrics, each in its own module; this one only hands on.
"""

import json
import math
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from dpo_fast.batches import Batch
from dpo_fast.bundle import POLICY, REFERENCE, Bundle, open_bundle
from dpo_fast.engines import open_engine, open_engines
from dpo_fast.engines.base import Engine
from dpo_fast.errors import BundleError, DatasetError, InputError, OutputExistsError, UsageError
from dpo_fast.files import make_folder, storage_errors, write_json, write_text
from dpo_fast.metrics.summary import compute_metrics
from dpo_fast.preferences import PreferenceSet, load_preferences
from dpo_fast.provenance import hardware, versions
from dpo_fast.publish.card import write_card
from dpo_fast.scores import ScoredPairs, score_pairs
from dpo_fast.store import PAIRS_PER_PART, Fingerprint, ScoreStore, row_hash, token_hash
from dpo_fast.tokens import load_tokenizer, tokenize
from dpo_fast.types import AGGREGATES, LossSettings, OnError, SkippedRow, TokenizedPair

METRICS = "metrics.json"
SKIPPED = "skipped.jsonl"
SCORES = "scores"


@dataclass(frozen=True, slots=True)
class EvaluateOptions:
    """What a user can choose about an evaluation.

    Attributes:
        split: of a data set that has several.
        limit: only the first rows.
        group_by: a column by whose values the metrics are given as well.
        on_error: what a row that cannot be used does: "stop" the run, or be a "skip" that is counted.
        max_length: of prompt and completion together, in tokens; None takes the bundle's.
        loss: the loss and its parameters.
        aggregate: "exact" over all pairs, or "trl": the mean of batch means.
        batch_size: of `aggregate="trl"`; changes no other number.
        token_budget: of the engine's batches, in tokens; None takes the recipe's. Changes no number.
        seed: of the bootstrap.
        trust_remote_code: whether the tokenizer's own Python code may be run.
        overwrite: whether an existing run is replaced.
        progress: whether a bar is shown on standard error.
    """

    split: str | None = None
    limit: int | None = None
    group_by: str | None = None
    on_error: OnError = "stop"
    max_length: int | None = None
    loss: LossSettings = field(default_factory=LossSettings)
    aggregate: str = "exact"
    batch_size: int = 8
    token_budget: int | None = None
    seed: int = 0
    trust_remote_code: bool = False
    overwrite: bool = False
    progress: bool = False


@dataclass(frozen=True, slots=True)
class _Tokens:
    """The usable pairs of a data set, and the rows that are not."""

    pairs: list[TokenizedPair]
    skipped: list[SkippedRow]


def evaluate(
    bundle: Path,
    dataset: str,
    output: Path,
    options: EvaluateOptions = EvaluateOptions(),
    report: Callable[[str], None] = lambda step: None,
    engine: Callable[[Bundle, str], Engine] = open_engine,
) -> dict[str, Any]:
    """Score a preference set with a bundle, and write the run.

    An interrupted run is taken up again: parts that were written from the same tokens, weights and engine are kept.

    Args:
        bundle: what `dpo_fast.export` wrote.
        dataset: a file, a folder or a Hub id.
        output: the run's folder, which must not hold a finished run.
        options: see `EvaluateOptions`.
        report: called with a line where something is worth saying.
        engine: opens a role's engine; the recipe's by default.

    Returns:
        The content of metrics.json.

    Raises:
        InputError: bundle, data set, options or disk; the message says what to do.
        EngineOutputError: an engine returned what cannot be right.
    """
    began = time.perf_counter()
    _check_options(options)
    _check_output(output, options)
    opened = open_bundle(bundle)
    roles = [POLICY, REFERENCE] if options.loss.reference_free is None else [POLICY]
    if REFERENCE in roles and not opened.has_reference:
        raise UsageError(f"{bundle}: has no reference; say --reference-free sum, average or norm")
    max_length = _max_length(opened, options)

    # Loading and hashing release the interpreter, so they go on while the rows are read and tokenised.
    with ThreadPoolExecutor() as threads:
        verified = threads.submit(opened.verify)
        loading = threads.submit(open_engines, opened, roles, engine)
        started = time.perf_counter()
        preferences = load_preferences(dataset, split=options.split, limit=options.limit, group_by=options.group_by)
        try:
            tokens = _tokenize(preferences, opened, max_length, options)
        except InputError:
            verified.result()  # if the bundle was altered, that explains a tokenizer that fails
            raise
        tokenize_seconds = time.perf_counter() - started
        started = time.perf_counter()
        verified.result()
        engines = loading.result()
        load_seconds = time.perf_counter() - started

    started = time.perf_counter()
    store = ScoreStore(output / SCORES)
    if options.overwrite:
        _remove_run(output, store)
    try:
        parts, computed, padding = _score(tokens.pairs, opened, engines, store, options)
    except BaseException:
        _remove_if_empty(store.folder, output)
        raise
    score_seconds = time.perf_counter() - started

    metrics = compute_metrics(
        store.read(parts), options.loss, aggregate=options.aggregate, batch_size=options.batch_size, seed=options.seed
    )
    metrics["counts"]["skipped"] = len(tokens.skipped)
    metrics["timing"] = {
        "load_seconds": load_seconds,
        "tokenize_seconds": tokenize_seconds,
        "score_seconds": score_seconds,
        "total_seconds": time.perf_counter() - began,
    }
    work = {"computed_tokens": computed, "padding_tokens": padding, "max_length": max_length}
    metrics["provenance"] = _provenance(opened, engines, preferences, options) | work
    with storage_errors(output):
        skipped = (json.dumps({"row": row.row, "reason": row.reason}, ensure_ascii=False) for row in tokens.skipped)
        write_text(output / SKIPPED, "".join(f"{line}\n" for line in skipped))
        write_json(output / METRICS, metrics)
    _update_card(opened, metrics, report)
    return metrics


def _check_options(options: EvaluateOptions) -> None:
    """Refuse values that no data set could make sense of."""
    if options.aggregate not in AGGREGATES:
        raise UsageError(f"--aggregate {options.aggregate!r} is not known; choose from {', '.join(AGGREGATES)}")
    for name, value in (("--batch-size", options.batch_size), ("--token-budget", options.token_budget)):
        if value is not None and value < 1:
            raise UsageError(f"{name} {value} must be at least 1")
    if options.seed < 0:
        raise UsageError(f"--seed {options.seed} must be at least 0")


def _check_output(output: Path, options: EvaluateOptions) -> None:
    """Take a new or an empty folder, an unfinished run, and with `overwrite` a finished one; refuse all else."""
    with storage_errors(output):
        try:
            output.lstat()
        except FileNotFoundError:
            return
    is_empty = output.is_dir() and not any(output.iterdir())
    has_metrics = (output / METRICS).exists()
    is_unfinished = (output / SCORES).is_dir() and not has_metrics
    is_finished = has_metrics and any((output / SCORES).glob("part-*.parquet"))
    if is_finished and not options.overwrite:
        raise OutputExistsError(f"{output}: holds a finished run; name another folder, or say --overwrite")
    if not (is_empty or is_unfinished or is_finished):
        raise OutputExistsError(f"{output}: exists and is no run of `dpo-fast evaluate`; name another folder")


def _remove_run(output: Path, store: ScoreStore) -> None:
    """Remove the files of a run; the metrics first, so that what is left of a run never looks finished."""
    with storage_errors(output):
        (output / METRICS).unlink(missing_ok=True)
        (output / SKIPPED).unlink(missing_ok=True)
        store.clear()


def _max_length(bundle: Bundle, options: EvaluateOptions) -> int:
    """The truncation in tokens, within every model's positions."""
    if options.max_length is None:
        return bundle.manifest.max_length
    for role, entry in bundle.manifest.models.items():
        if entry.max_positions is not None and options.max_length > entry.max_positions:
            raise UsageError(
                f"--max-length {options.max_length}: the {role} has positions for {entry.max_positions} tokens"
            )
    return options.max_length


def _tokenize(preferences: PreferenceSet, bundle: Bundle, max_length: int, options: EvaluateOptions) -> _Tokens:
    """All rows as token ids, by the policy's tokenizer, as TRL has it."""
    tokenizer = load_tokenizer(bundle.model_folder(POLICY), trust_remote_code=options.trust_remote_code)
    rows = preferences.rows(on_error=options.on_error)
    tokens = _Tokens([], [])
    for item in tokenize(rows, tokenizer, max_length=max_length, on_error=options.on_error):
        if isinstance(item, SkippedRow):
            tokens.skipped.append(item)
        else:
            tokens.pairs.append(item)
    if not tokens.pairs:
        first = tokens.skipped[0]
        raise DatasetError(
            f"{preferences.name}: none of {len(preferences)} rows can be used; row {first.row}: {first.reason}"
        )
    vocabulary = bundle.manifest.models[POLICY].vocabulary
    for pair in tokens.pairs:
        largest = max(max(ids, default=0) for ids in (pair.prompt_ids, pair.chosen_ids, pair.rejected_ids))
        if largest >= vocabulary:
            raise BundleError(
                f"row {pair.row}: the tokenizer gave the id {largest}, and the model's vocabulary ends at "
                f"{vocabulary - 1}; export the bundle with the model's own tokenizer"
            )
    return tokens


def _score(
    pairs: Sequence[TokenizedPair],
    bundle: Bundle,
    engines: dict[str, Engine],
    store: ScoreStore,
    options: EvaluateOptions,
) -> tuple[int, int, int]:
    """Score all parts that are not there yet; how many parts, tokens computed in this run, and padding among them."""
    from tqdm import tqdm

    token_budget = options.token_budget or bundle.manifest.recipe["token_budget"]
    parts = math.ceil(len(pairs) / PAIRS_PER_PART)
    # A disk that refuses is better found now than after the first part.
    make_folder(store.folder)
    # Parts are consecutive: one more than there should be means that the run was of more pairs.
    if store.path(parts).exists():
        raise OutputExistsError(
            f"{store.folder.parent}: holds an unfinished run of more than {len(pairs)} pairs; name another folder, "
            "or say --overwrite"
        )
    computed = padding = 0
    # A completion under one model is the unit, so that the bar moves evenly.
    bar = tqdm(total=2 * len(pairs) * len(engines), unit=" completions", disable=not options.progress, desc="scoring")
    with bar:
        for part in range(parts):
            chunk = pairs[part * PAIRS_PER_PART : (part + 1) * PAIRS_PER_PART]
            of_pairs = {"token ids": token_hash(chunk), "row numbers, truncation or groups": row_hash(chunk)}
            fingerprints = {role: of_pairs | _fingerprint(bundle, role, engine) for role, engine in engines.items()}
            if store.has(part, fingerprints):
                bar.update(2 * len(chunk) * len(engines))
                continue

            def on_batch(batch: Batch) -> None:
                bar.update(len(batch.completions))

            scores: dict[str, ScoredPairs] = {}
            for role, engine in engines.items():
                layout = bundle.manifest.models[role].layout
                scores[role] = score_pairs(chunk, engine, layout=layout, token_budget=token_budget, on_batch=on_batch)
                computed += scores[role].tokens
                padding += scores[role].padding
            store.write(part, chunk, scores, fingerprints)
    return parts, computed, padding


def _fingerprint(bundle: Bundle, role: str, engine: Engine) -> Fingerprint:
    """What a role's scores depend on beside the pairs."""
    return {
        "weights and graph": "+".join(bundle.role_hashes(role)),
        "engine": engine.name,
        "precision": engine.precision,
        "layout": bundle.manifest.models[role].layout,
    }


def _remove_if_empty(*folders: Path) -> None:
    """Leave nothing behind of a run that failed before its first part; a part that was written stays for later."""
    for folder in folders:
        try:
            folder.rmdir()
        except OSError:
            return


def _provenance(
    bundle: Bundle, engines: dict[str, Engine], preferences: PreferenceSet, options: EvaluateOptions
) -> dict[str, Any]:
    """What the numbers were made from; local paths are cut to their last part, since runs are published."""
    # "." has no last part, and resolve() would give the name of what a link leads to.
    local = Path(os.path.abspath(preferences.name))  # noqa: PTH100
    return {
        "versions": versions(),
        "hardware": hardware(),
        "engine": engines[POLICY].name,
        "precision": engines[POLICY].precision,
        "recipe": bundle.manifest.recipe["name"],
        "models": {
            role: {
                "source": entry.source,
                "revision": entry.revision,
                "layout": entry.layout,
                "weights_and_graph_sha256": bundle.role_hashes(role),
            }
            for role, entry in bundle.manifest.models.items()
            if role in engines
        },
        "dataset": {
            "name": local.name if local.exists() else preferences.name,
            "split": preferences.split,
            "fingerprint": preferences.fingerprint,
            "rows": len(preferences),
        },
        "settings": asdict(options.loss),
        "aggregate": options.aggregate,
        "batch_size": options.batch_size if options.aggregate == "trl" else None,
        "limit": options.limit,
        "group_by": options.group_by,
        "on_error": options.on_error,
        "bootstrap_seed": options.seed,
    }


def _update_card(bundle: Bundle, metrics: dict[str, Any], report: Callable[[str], None]) -> None:
    """Put the numbers on the policy's model card; a bundle that cannot be written keeps its old card."""
    try:
        write_card(bundle.model_folder(POLICY), metrics, base_model=bundle.base_model)
    except InputError as error:
        report(f"the model card was not updated: {error}")
