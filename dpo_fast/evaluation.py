"""What an evaluation is asked to do: options, roles, truncation, parts."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from dpo_fast.bundle import POLICY, REFERENCE, Bundle, open_bundle
from dpo_fast.cluster.options import ClusterOptions, check_cluster_options
from dpo_fast.engines.base import Engine
from dpo_fast.errors import UsageError
from dpo_fast.files import make_folder, storage_errors
from dpo_fast.interrupts import Stop, stop_on_signals
from dpo_fast.run_folder import (
    FAILED,
    check_output,
    check_parts,
    folders_to_make,
    locked,
    make_scores,
    remove_remains,
    remove_run,
    removed_if_empty,
)
from dpo_fast.store import PART_ROWS, ScoreStore
from dpo_fast.token_cache import TokenSource, find_tokens, of_the_tokenizer
from dpo_fast.types import AGGREGATES, LossSettings, OnError

EngineUse = Literal["auto", "together", "in-turn", "apart"]


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
        engines: whether policy and reference are in memory "together" or "in-turn", or, on a cluster, in workers
            "apart"; "auto" goes by what is free.
        reference_scores: a run whose reference scores are taken.
        scores: where the parts are written: a folder or a URL; None: in the run's folder.
        cluster: the workers that score; None: this process.
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
    scores: str | None = None
    cluster: ClusterOptions | None = None
    seed: int = 0
    trust_remote_code: bool = False
    overwrite: bool = False
    progress: bool = False


@dataclass(frozen=True, slots=True)
class Evaluation:
    """One evaluation: what was asked for, and what follows from it.

    Attributes:
        bundle: whose engines score.
        dataset: a file, a folder or a Hub id.
        output: the run's folder.
        store: of the run's parts.
        options: see there.
        roles: whose scores the parts hold.
        max_length: of prompt and completion together, in tokens.
        stop: looked at now and then: whether Ctrl-C or SIGTERM came.
        engine: opens a role's engine; None: the recipe's.
    """

    bundle: Bundle
    dataset: str
    output: Path
    store: ScoreStore
    options: EvaluateOptions
    roles: list[str]
    max_length: int
    stop: Stop
    engine: Callable[[Bundle, str], Engine] | None = None

    def find_tokens(self) -> TokenSource:
        """What the tokens of the data set are; see `dpo_fast.token_cache.find_tokens`."""
        options = self.options
        return find_bundle_tokens(
            self.bundle,
            self.dataset,
            self.max_length,
            split=options.split,
            limit=options.limit,
            group_by=options.group_by,
            on_error=options.on_error,
            trust_remote_code=options.trust_remote_code,
        )

    def parts(self, rows: int) -> dict[int, tuple[int, int]]:
        """This run's parts: their numbers in the whole set, and the rows of each, counted from 0.

        Args:
            rows: of the set.

        Raises:
            UsageError: there are fewer parts than shards.
        """
        size = self.options.part_size
        parts = {number: (start, min(start + size, rows)) for number, start in enumerate(range(0, rows, size))}
        if self.options.shard is None:
            return parts
        shard, shards = self.options.shard
        if len(parts) < shards:
            raise UsageError(
                f"--shard {shard}/{shards}: {rows} rows are {len(parts)} parts of {size}, fewer than shards; lower "
                "--part-size or the number of shards"
            )
        first, end = (shard - 1) * len(parts) // shards, shard * len(parts) // shards
        return {number: parts[number] for number in range(first, end)}

    def prepare_store(self, parts: Iterable[int]) -> None:
        """Remove what a killed process left half written, and what is to be replaced; refuse another run's parts.

        Raises:
            OutputExistsError: there is a part that this run has not.
            StorageError: the disk refused.
        """
        remove_remains(self.output, self.store)
        with storage_errors(self.output):
            (self.output / FAILED).unlink(missing_ok=True)  # these parts are tried again now
        if self.options.overwrite:
            remove_run(self.output, self.store)
        check_parts(self.store, parts)


@contextmanager
def begin(
    bundle: Path,
    dataset: str,
    output: Path,
    options: EvaluateOptions,
    engine: Callable[[Bundle, str], Engine] | None = None,
    *,
    is_plan: bool = False,
) -> Iterator[Evaluation]:
    """An evaluation that has its folder, for as long as the block takes; nothing is left of one that wrote no part.

    Args:
        bundle: what `dpo_fast.export` wrote.
        dataset: a file, a folder or a Hub id.
        output: the run's folder.
        options: see `EvaluateOptions`.
        engine: opens a role's engine; the recipe's by default.
        is_plan: whether nothing is to be left of it.

    Raises:
        InputError: bundle, options or disk.
    """
    check_options(options)
    opened = open_bundle(bundle)
    roles = roles_of(opened, options)
    max_length = max_length_of(opened, options.max_length)
    check_output(output, settings_of(options), overwrite=options.overwrite)
    made = folders_to_make(output, options.scores)
    with ExitStack() as stack:
        make_folder(output)
        stack.enter_context(locked(output))
        stack.enter_context(removed_if_empty(output, made, is_plan=is_plan))
        store = make_scores(output, options.scores)  # what refuses is better found now than after the first part
        stop = stack.enter_context(stop_on_signals())
        yield Evaluation(opened, dataset, output, store, options, roles, max_length, stop, engine)


def find_bundle_tokens(
    bundle: Bundle,
    dataset: str,
    max_length: int,
    *,
    split: str | None,
    limit: int | None,
    group_by: str | None,
    on_error: OnError,
    trust_remote_code: bool,
) -> TokenSource:
    """All rows as token ids, by the policy's tokenizer, as TRL has it; see `dpo_fast.token_cache.find_tokens`."""
    folder = f"{POLICY}/"
    hashes = {name: file["sha256"] for name, file in bundle.manifest.files.items() if name.startswith(folder)}
    return find_tokens(
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


def settings_of(options: EvaluateOptions) -> dict[str, Any]:
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


def check_options(options: EvaluateOptions) -> None:
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
    if options.cluster is None:
        if options.engines == "apart":
            raise UsageError("--engines apart is of a cluster's workers: say --cluster, or --engines in-turn")
        return
    check_cluster_options(options.cluster)
    if options.engines == "in-turn":
        raise UsageError("--engines in-turn is of one process: on a cluster, say --engines apart")


def roles_of(bundle: Bundle, options: EvaluateOptions) -> list[str]:
    """Whose scores the loss needs.

    Raises:
        UsageError: the bundle lacks one.
    """
    if options.loss.reference_free is not None:
        return [POLICY]
    if not bundle.has_reference:
        raise UsageError(f"{bundle.folder}: has no reference; say --reference-free sum, average or norm")
    return [POLICY, REFERENCE]


def max_length_of(bundle: Bundle, max_length: int | None) -> int:
    """The truncation in tokens, within every model's positions; None takes the bundle's.

    Raises:
        UsageError: a model, or its plans, take fewer.
    """
    if max_length is None:
        return bundle.manifest.max_length
    for role, entry in bundle.manifest.models.items():
        if entry.max_positions is not None and max_length > entry.max_positions:
            raise UsageError(f"--max-length {max_length}: the {role} has positions for {entry.max_positions} tokens")
        if entry.plan is not None and max_length > bundle.manifest.max_length:
            raise UsageError(
                f"--max-length {max_length}: the bundle's plans take rows of --max-length "
                f"{bundle.manifest.max_length}; export it with more"
            )
    return max_length
