"""The main job: a preference set through a bundle's engines, to metrics.

rows -> tokens -> batches -> engine -> scores -> metrics, each in its own module; this one only hands on.
"""

import os
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from dpo_fast.batches import Layout
from dpo_fast.bundle import POLICY, REFERENCE, Bundle, open_bundle
from dpo_fast.engines import open_engine
from dpo_fast.engines.base import Engine
from dpo_fast.errors import DatasetError, InputError, UsageError
from dpo_fast.files import make_folder
from dpo_fast.interrupts import stop_on_signals
from dpo_fast.loading import Engines
from dpo_fast.memory import fit_together
from dpo_fast.metrics.sums import sum_tokens
from dpo_fast.metrics.tally import metrics_of_parts
from dpo_fast.progress import Progress
from dpo_fast.provenance import hardware, versions
from dpo_fast.publish.card import write_card
from dpo_fast.reference_scores import KnownScores, ReferenceCache, ScoresOfRun
from dpo_fast.run_folder import (
    METRICS,
    SCORES,
    SKIPPED,
    check_output,
    check_parts,
    locked,
    remove_if_empty,
    remove_remains,
    remove_run,
    write_results,
)
from dpo_fast.scoring import Account, Work, score_parts
from dpo_fast.store import PART_ROWS, ScoreStore
from dpo_fast.token_budget import tune_token_budget
from dpo_fast.token_cache import TokenCache, of_the_tokenizer, open_tokens
from dpo_fast.token_table import TokenTable
from dpo_fast.types import AGGREGATES, LossSettings, OnError

__all__ = ["METRICS", "SKIPPED", "EvaluateOptions", "evaluate"]

EngineUse = Literal["auto", "together", "in-turn"]
# What a finished run's numbers depend on beside its parts: another value of these is another run.
SETTINGS = (
    "settings", "aggregate", "batch_size", "limit", "part_size", "shard", "group_by", "on_error", "bootstrap_seed",
)  # fmt: skip


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
        token_budget: of the engine's batches, in tokens; None takes the recipe's, "auto" measures which is fastest.
            Changes no number.
        part_size: rows of the data set in one part, which is what is kept at a time. Changes no number.
        shard: (i, n): only the i-th of n shares of the parts, i counted from 1.
        threads: of an engine's operators; 0 takes every physical core.
        engines: whether policy and reference are in memory "together" or "in-turn"; "auto" goes by what is free.
        reference_scores: a run whose reference scores are taken.
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
    token_budget: int | Literal["auto"] | None = None
    part_size: int = PART_ROWS
    shard: tuple[int, int] | None = None
    threads: int = 0
    engines: EngineUse = "auto"
    reference_scores: Path | None = None
    seed: int = 0
    trust_remote_code: bool = False
    overwrite: bool = False
    progress: bool = False


def evaluate(
    bundle: Path,
    dataset: str,
    output: Path,
    options: EvaluateOptions = EvaluateOptions(),
    report: Callable[[str], None] = lambda step: None,
    engine: Callable[[Bundle, str], Engine] | None = None,
) -> dict[str, Any]:
    """Score a preference set with a bundle, and write the run.

    A run goes on where it was: parts that were written from the same tokens, weights and engine are kept.

    Args:
        bundle: what `dpo_fast.export` wrote.
        dataset: a file, a folder or a Hub id.
        output: the run's folder.
        options: see `EvaluateOptions`.
        report: called with a line where something is worth saying.
        engine: opens a role's engine; the recipe's by default.

    Returns:
        The content of metrics.json.

    Raises:
        InputError: bundle, data set, options or disk; the message says what to do.
        EngineOutputError: an engine returned what cannot be right.
        InterruptedRunError: Ctrl-C or SIGTERM; the parts that were finished are kept.
    """
    began = time.perf_counter()
    _check_options(options)
    opened = open_bundle(bundle)
    roles = [POLICY, REFERENCE] if options.loss.reference_free is None else [POLICY]
    if REFERENCE in roles and not opened.has_reference:
        raise UsageError(f"{bundle}: has no reference; say --reference-free sum, average or norm")
    max_length = _max_length(opened, options)
    check_output(output, _settings(options), overwrite=options.overwrite)
    cache = ReferenceCache()
    known: KnownScores = cache
    if options.reference_scores is not None and REFERENCE in roles:
        known = ScoresOfRun(options.reference_scores)
    passes = _passes(opened, roles, options)

    with ExitStack() as stack:
        make_folder(output / SCORES)  # a disk that refuses is better found now than after the first part
        stack.callback(remove_if_empty, output / SCORES, output)
        stack.enter_context(locked(output))
        stop = stack.enter_context(stop_on_signals())
        engines = Engines(opened, engine or (lambda of, role: open_engine(of, role, threads=options.threads)))
        stack.callback(engines.close)
        # Loading and hashing release the interpreter, so they go on while the rows are read and tokenised.
        verified = stack.enter_context(ThreadPoolExecutor(1, "verify")).submit(opened.verify)
        for role in passes[0]:
            if role == POLICY or not _may_be_known(opened, known, role):
                engines.load(role)

        try:
            tokens = bundle_tokens(
                opened,
                dataset,
                max_length,
                split=options.split,
                limit=options.limit,
                group_by=options.group_by,
                on_error=options.on_error,
                trust_remote_code=options.trust_remote_code,
            )
            stack.callback(tokens.close)
            parts = _parts(tokens.rows, options)
            rows = min(parts.values())[0], max(parts.values())[1]
            tokens.make_ahead(*rows)
            tokens.wait_until_open()
            opened_seconds = time.perf_counter() - began
            sample = _first_pairs(tokens, parts)
        except InputError:
            verified.result()  # if the bundle was altered, that explains a tokenizer that fails
            raise
        tokenize_seconds = time.perf_counter() - began - opened_seconds
        verified.result()
        first_engine = engines.get(passes[0][0])
        load_seconds = time.perf_counter() - began - tokenize_seconds

        started = time.perf_counter()
        remove_remains(output)
        store = ScoreStore(output / SCORES)
        if options.overwrite:
            remove_run(output, store)
        check_parts(store, parts)
        layout = opened.manifest.models[passes[0][0]].layout
        token_budget = _token_budget(options, opened, store, parts, first_engine, sample, layout)
        name, precision = first_engine.name, first_engine.precision
        work = Work(opened, tokens, store, parts, roles, token_budget, max_length, known, cache, name, precision)
        del first_engine, sample  # an engine that somebody holds keeps its memory
        account = Account()
        progress = stack.enter_context(Progress(rows[1] - rows[0], shown=options.progress))
        for number, to_score in enumerate(passes):
            if number > 0:
                engines.release()
            score_parts(work, to_score, engines.get, stop, progress, account, share=1 / len(passes))
        score_seconds = time.perf_counter() - started - account.waited_for_tokens
        tokenize_seconds += account.waited_for_tokens

    started = time.perf_counter()
    metrics = metrics_of(store, options)
    metrics["counts"]["skipped"] = len(account.skipped)
    metrics["timing"] = {
        "load_seconds": load_seconds,
        "tokenize_seconds": tokenize_seconds,
        "score_seconds": score_seconds,
        "metrics_seconds": time.perf_counter() - started,
        "total_seconds": time.perf_counter() - began,
    }
    metrics["provenance"] = _provenance(work, options) | {
        "max_length": max_length,
        "token_budget": token_budget,
        "engines": "in-turn" if len(passes) > 1 else "together",
        "computed_tokens": account.tokens,
        "padding_tokens": account.padding,
        "this_process": {
            "scored_pairs": account.scored_pairs,
            "computed_tokens": account.computed_tokens,
            "pairs_with_known_reference_scores": account.found_reference_scores,
            "engine_seconds": account.engines,
            "waited_for_disk_seconds": account.waited_for_disk,
        },
    }
    write_results(output, metrics, account.skipped)
    _update_card(opened, metrics, report)
    return metrics


def metrics_of(store: ScoreStore, options: EvaluateOptions) -> dict[str, Any]:
    """The metrics of all of a run's parts.

    Raises:
        StorageError: a part is missing or damaged.
        UsageError: the settings are so extreme that a metric overflows.
    """
    return metrics_of_parts(
        map(sum_tokens, store.read()),
        options.loss,
        aggregate=options.aggregate,
        batch_size=options.batch_size,
        seed=options.seed,
    )


def _settings(options: EvaluateOptions) -> dict[str, Any]:
    """What the numbers depend on beside the parts, as provenance has it."""
    return {
        "settings": asdict(options.loss),
        "aggregate": options.aggregate,
        "batch_size": options.batch_size if options.aggregate == "trl" else None,
        "limit": options.limit,
        "part_size": options.part_size,
        "shard": options.shard,
        "group_by": options.group_by,
        "on_error": options.on_error,
        "bootstrap_seed": options.seed,
    }


def _passes(bundle: Bundle, roles: list[str], options: EvaluateOptions) -> list[list[str]]:
    """Which roles' engines are in memory, pass by pass: all of them, or one after the other if memory is short.

    Where both fit, a part's policy and reference run one after the other, part by part: batch by batch, each engine's
    waiting threads would slow the other.
    """
    if REFERENCE not in roles or options.reference_scores is not None or options.engines == "together":
        return [roles]
    if options.engines == "in-turn" or not fit_together(bundle, roles):
        return [[REFERENCE], roles]
    return [roles]


def _may_be_known(bundle: Bundle, known: KnownScores, role: str) -> bool:
    """Whether a role's engine is better loaded only when its scores turn out to be missing."""
    return role == REFERENCE and known.knows("+".join(bundle.role_hashes(role)))


def _parts(rows: int, options: EvaluateOptions) -> dict[int, tuple[int, int]]:
    """This run's parts: their numbers in the whole set, and the rows of each, counted from 0.

    Raises:
        UsageError: there are fewer parts than shards.
    """
    size = options.part_size
    parts = {number: (start, min(start + size, rows)) for number, start in enumerate(range(0, rows, size))}
    if options.shard is None:
        return parts
    shard, shards = options.shard
    if len(parts) < shards:
        raise UsageError(
            f"--shard {shard}/{shards}: {rows} rows are {len(parts)} parts of {size}, fewer than shards; lower "
            "--part-size or the number of shards"
        )
    first, end = (shard - 1) * len(parts) // shards, shard * len(parts) // shards
    return {number: parts[number] for number in range(first, end)}


def bundle_tokens(
    bundle: Bundle,
    dataset: str,
    max_length: int,
    *,
    split: str | None,
    limit: int | None,
    group_by: str | None,
    on_error: OnError,
    trust_remote_code: bool,
) -> TokenCache:
    """All rows as token ids, by the policy's tokenizer, as TRL has it; see `dpo_fast.token_cache.open_tokens`."""
    folder = f"{POLICY}/"
    hashes = {name: file["sha256"] for name, file in bundle.manifest.files.items() if name.startswith(folder)}
    return open_tokens(
        dataset,
        bundle.model_folder(POLICY),
        {name: value for name, value in hashes.items() if of_the_tokenizer(name.removeprefix(folder))},
        max_length=max_length,
        vocabulary=bundle.manifest.models[POLICY].vocabulary,
        split=split,
        limit=limit,
        group_by=group_by,
        on_error=on_error,
        trust_remote_code=trust_remote_code,
    )


def _first_pairs(tokens: TokenCache, parts: Mapping[int, tuple[int, int]]) -> TokenTable:
    """The first part that has any pairs.

    Raises:
        DatasetError: none has.
    """
    first_reason = ""
    for rows in parts.values():
        table, skipped = tokens.read(*rows)
        if len(table):
            return table
        first_reason = first_reason or f"row {skipped[0].row}: {skipped[0].reason}"
    start, stop = min(parts.values())[0], max(parts.values())[1]
    raise DatasetError(f"{tokens.data.name}: none of {stop - start} rows can be used; {first_reason}")


def _token_budget(
    options: EvaluateOptions,
    bundle: Bundle,
    store: ScoreStore,
    parts: Iterable[int],
    engine: Engine,
    sample: TokenTable,
    layout: Layout,
) -> int:
    """Tokens of a batch: as asked for, as the recipe has it, or measured; a run goes on with what it began with."""
    if options.token_budget is None:
        return int(bundle.manifest.recipe["token_budget"])
    if isinstance(options.token_budget, int):
        return options.token_budget
    records = (store.record(part) for part in parts)
    begun = next((record.token_budget for record in records if record is not None), None)
    return begun or tune_token_budget(engine, sample, layout)


def _check_options(options: EvaluateOptions) -> None:
    """Refuse values that no data set could make sense of."""
    if options.aggregate not in AGGREGATES:
        raise UsageError(f"--aggregate {options.aggregate!r} is not known; choose from {', '.join(AGGREGATES)}")
    budget = options.token_budget
    sizes = {"--batch-size": options.batch_size, "--token-budget": budget, "--part-size": options.part_size}
    for name, value in sizes.items():
        if isinstance(value, int) and value < 1:
            raise UsageError(f"{name} {value} must be at least 1")
    if options.limit is not None and options.limit < 1:
        raise UsageError(f"--limit {options.limit} must be at least 1")
    if options.threads < 0:
        raise UsageError(f"--threads {options.threads} must be at least 0, which takes every core")
    if options.shard is not None and not 1 <= options.shard[0] <= options.shard[1]:
        raise UsageError(f"--shard {options.shard[0]}/{options.shard[1]}: shards are numbered from 1 to their number")
    if options.seed < 0:
        raise UsageError(f"--seed {options.seed} must be at least 0")


def _max_length(bundle: Bundle, options: EvaluateOptions) -> int:
    """The truncation in tokens, within every model's positions."""
    if options.max_length is None:
        return bundle.manifest.max_length
    for role, entry in bundle.manifest.models.items():
        if entry.max_positions is not None and options.max_length > entry.max_positions:
            raise UsageError(
                f"--max-length {options.max_length}: the {role} has positions for {entry.max_positions} tokens"
            )
        if entry.plan is not None and options.max_length > bundle.manifest.max_length:
            raise UsageError(
                f"--max-length {options.max_length}: the bundle's plans take rows of --max-length "
                f"{bundle.manifest.max_length}; export it with more"
            )
    return options.max_length


def _provenance(work: Work, options: EvaluateOptions) -> dict[str, Any]:
    """What the numbers were made from; local paths are cut to their last part, since runs are published."""
    bundle, data = work.bundle, work.tokens.data
    # "." has no last part, and resolve() would give the name of what a link leads to.
    local = Path(os.path.abspath(data.name))  # noqa: PTH100
    return {
        "versions": versions(),
        "hardware": hardware(),
        "engine": work.engine_name,
        "precision": work.precision,
        "recipe": bundle.manifest.recipe["name"],
        "models": {
            role: {
                "source": entry.source,
                "revision": entry.revision,
                "layout": entry.layout,
                "weights_and_graph_sha256": bundle.role_hashes(role),
            }
            for role, entry in bundle.manifest.models.items()
            if role in work.roles
        },
        "dataset": {
            "name": local.name if local.exists() else data.name,
            "split": data.split,
            "fingerprint": data.fingerprint,
            "rows": work.tokens.rows,
        },
        **_settings(options),
    }


def _update_card(bundle: Bundle, metrics: dict[str, Any], report: Callable[[str], None]) -> None:
    """Put the numbers on the policy's model card; a bundle that cannot be written keeps its old card."""
    try:
        write_card(bundle.model_folder(POLICY), metrics, base_model=bundle.base_model)
    except InputError as error:
        report(f"the model card was not updated: {error}")
