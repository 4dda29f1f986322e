"""Does a bundle's engine still make the decisions of the weights that it came from?

The engine and the original PyTorch weights score the same pairs; the original does so several times, for its own noise.

rows -> tokens -> engine, original (three times) -> drift, decisions, noise floor -> verdict -> table, verify.json, page
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from dpo_fast.batches import longest_row
from dpo_fast.bundle import POLICY, REFERENCE, Bundle, open_bundle
from dpo_fast.engines import load_engine, open_engine
from dpo_fast.engines.base import Engine
from dpo_fast.engines.endpoint import Dialect, EndpointEngine
from dpo_fast.errors import DatasetError, EngineOutputError, UsageError
from dpo_fast.evaluation import find_bundle_tokens, max_length_of
from dpo_fast.files import new_folder, write_json, write_text
from dpo_fast.progress import Progress
from dpo_fast.provenance import hardware, versions
from dpo_fast.token_cache import TokenCache
from dpo_fast.token_table import TokenTable
from dpo_fast.types import OnError, ReferenceFree
from dpo_fast.verification.attestation import check_files
from dpo_fast.verification.bisect import bisect
from dpo_fast.verification.noise import Floor
from dpo_fast.verification.original import HALVES, Original, several_rows
from dpo_fast.verification.page import write_page
from dpo_fast.verification.repeats import without_repeats
from dpo_fast.verification.scoring import score_tokens
from dpo_fast.verification.served import score_served
from dpo_fast.verification.types import Pairs as VerifiedPairs
from dpo_fast.verification.types import ScoredTokens, Scoring, Scorings
from dpo_fast.verification.verdict import (
    LEAST,
    MOST,
    Check,
    Tolerance,
    Verification,
    default_tolerance,
    verify_scores,
)

RESULT, PAGE, RECIPE = "verify.json", "verify.html", "exact-layers.toml"
EngineChoice = Literal["recipe", "onnxruntime", "openvino"]
ByRole = dict[str, tuple[ScoredTokens, ScoredTokens]]  # chosen and rejected
# The original in two shapes of batches: several rows at a time, and one.
ORIGINAL, RESHAPED = "original", "original, one row a batch"
ONE_ROW = 1  # token budget
PRECISIONS = ("fp32", "fp16", "bf16", "fp8", "int8", "int4")


@dataclass(frozen=True, slots=True)
class VerifyOptions:
    """What a user can choose about a verification.

    Attributes:
        engine: the recipe's; or another, which runs the exact graph in float32.
        endpoint: URL of a server that is verified instead, serving the policy.
        model: its name there.
        endpoint_dialect: how the server is asked for log-probs.
        api_key_variable: the environment variable that holds the server's key, where it needs one.
        endpoint_timeout: seconds that one request to the server may take.
        endpoint_tokens: of one request at most.
        precision: what the engine claims to compute in, which decides the limits; None takes the recipe's, and of a
            server the checkpoint's own.
        split: of a data set that has several.
        limit: only the first rows.
        group_by: a column by whose values drift and decisions are given as well.
        on_error: what a row that cannot be used does: "stop" the verification, or be a "skip".
        max_length: of prompt and completion together, in tokens; None takes the bundle's.
        beta: strength of the reference.
        reference_free: score by the policy's log-probs alone.
        token_budget: of the engine's batches, in tokens; None takes the recipe's.
        floor, max_multiple, max_accuracy_change, near_tie, max_growth: see `verdict.Tolerance`; None takes what suits
            the engine's precision. With the floor "float32" the original is not scored in half precision.
        bisect: whether the layers that drift comes from are looked for.
        threads: of the engine; 0 takes every physical core.
        seed: of the bootstrap.
        trust_remote_code: whether the checkpoint's own Python code may be run.
        overwrite: whether an existing output is replaced.
        progress: whether a bar is shown on standard error.
    """

    engine: EngineChoice = "recipe"
    endpoint: str | None = None
    model: str | None = None
    endpoint_dialect: Dialect = "auto"
    api_key_variable: str = "OPENAI_API_KEY"
    endpoint_timeout: float = 60.0
    endpoint_tokens: int = 8192
    precision: str | None = None
    split: str | None = None
    limit: int | None = None
    group_by: str | None = None
    on_error: OnError = "stop"
    max_length: int | None = None
    beta: float = 0.1
    reference_free: ReferenceFree | None = None
    token_budget: int | None = None
    floor: Floor | None = None
    max_multiple: float | None = None
    max_accuracy_change: float | None = None
    near_tie: float | None = None
    max_growth: float | None = None
    bisect: bool = False
    threads: int = 0
    seed: int = 0
    trust_remote_code: bool = False
    overwrite: bool = False
    progress: bool = False

    @property
    def of_recipe(self) -> bool:
        """Whether it is the bundle's own engine that is verified, as what its recipe says it is."""
        return self.engine == "recipe" and self.endpoint is None and self.precision is None


def verify(
    bundle: Path,
    dataset: str,
    output: Path,
    options: VerifyOptions = VerifyOptions(),
    report: Callable[[str], None] = lambda step: None,
    engine: Callable[[Bundle, str], Engine] | None = None,
) -> dict[str, Any]:
    """Verify a bundle's engine against the original weights, and write verify.json and a page.

    Args:
        bundle: what `dpo_fast.export` wrote.
        dataset: a file, a folder or a Hub id.
        output: the folder to write.
        options: see `VerifyOptions`.
        report: called with a line at each step.
        engine: opens a role's engine; the one that `options` name by default.

    Returns:
        The content of verify.json; its "verdict" is "pass", "fail" or "cannot tell".

    Raises:
        InputError: bundle, data set, options or disk; the message says what to do.
        EngineOutputError: the original gave what cannot be right.
    """
    began = time.perf_counter()
    _check_options(options)
    opened = open_bundle(bundle)
    roles = [POLICY, REFERENCE] if options.reference_free is None else [POLICY]
    if REFERENCE in roles and not opened.has_reference:
        raise UsageError(f"{bundle}: has no reference; say --reference-free sum, average or norm")
    precision = options.precision or _claimed_precision(opened, options)
    tolerance = _tolerance(options, precision)
    max_length = max_length_of(opened, options.max_length)
    if output.resolve().is_relative_to(bundle.resolve()):
        raise UsageError(f"--output {output}: lies within the bundle, whose files are what is verified; name another")
    report("checking the bundle's files")
    check_files(opened)
    with new_folder(output, overwrite=options.overwrite, marker=RESULT) as folder:
        read, data, skipped = _read(opened, dataset, max_length, options)
        table = without_repeats(read)
        original = Original(opened, max_length, trust_remote_code=options.trust_remote_code)
        scored = _score(opened, original, table, roles, precision, max_length, options, report, engine)
        result = {
            **_judge(scored, table, tolerance, options).as_dict(),
            "pairs": len(table),
            "skipped": skipped,
            "repeated": len(read) - len(table),
            "timing": {"scoring_seconds": scored.seconds, "total_seconds": time.perf_counter() - began},
            "provenance": {
                "engine": scored.engine,
                "precision": precision,
                "of_recipe": options.of_recipe,
                "original": original.name or "the original",
                "recipe": opened.manifest.recipe["name"],
                "versions": versions(),
                "hardware": hardware(),
                "dataset": data,
                "max_length": max_length,
                "beta": options.beta,
                "reference_free": options.reference_free,
                "models": {
                    role: {
                        "source": opened.manifest.models[role].source,
                        "revision": opened.manifest.models[role].revision,
                        "weights_and_graph_sha256": opened.role_hashes(role),
                    }
                    for role in roles
                },
            },
        }
        if options.bisect:
            found = bisect(
                opened,
                roles,
                table,
                threads=options.threads,
                trust_remote_code=options.trust_remote_code,
                report=report,
            )
            result["bisect"] = found
            if found["recipe"] is not None:
                write_text(folder / RECIPE, found["recipe"])
        write_json(folder / RESULT, result)
        write_page(folder / PAGE, result)
    return result


@dataclass(slots=True)
class _Scored:
    """What everybody says of the pairs.

    Attributes:
        original: the original's own scorings: in float32, in another shape of batches, and in half precision; none
            where the engine failed.
        served: the engine's, or None where it failed.
        problem: why it failed, or None.
        engine: its name.
        seconds: wall time of each scoring, loading included.
    """

    original: dict[str, Scoring]
    served: Scoring | None = None
    problem: str | None = None
    engine: str = ""
    seconds: dict[str, float] = field(default_factory=dict)


def _score(
    bundle: Bundle,
    original: Original,
    table: TokenTable,
    roles: list[str],
    precision: str,
    max_length: int,
    options: VerifyOptions,
    report: Callable[[str], None],
    engine: Callable[[Bundle, str], Engine] | None,
) -> _Scored:
    """Let the engine score the pairs, and the original several times; one model is in memory at a time.

    The engine comes first: one that fails, or a server that is not there, is found before the long part.
    """
    scored = _Scored({})

    @contextmanager
    def timed(what: str) -> Iterator[None]:
        report(f"scoring {len(table)} pairs: {what}")
        started = time.perf_counter()
        yield
        scored.seconds[what] = scored.seconds.get(what, 0.0) + time.perf_counter() - started

    several = several_rows(table)
    ways = {ORIGINAL: ("fp32", several), RESHAPED: ("fp32", ONE_ROW)}
    # Who asks for float32's floor does not need the original's rounding, which some checkpoints overflow in.
    halves = [] if options.floor == "float32" else original.half_precisions(precision)
    ways |= {f"original in {half}": (half, several) for half in halves}
    said: dict[str, ByRole] = {what: {} for what in ways}
    compared = roles if options.endpoint is None else [POLICY]  # a server has no reference: the original's is taken
    ways_of = {role: ways if role in compared else {ORIGINAL: ways[ORIGINAL]} for role in roles}
    scorings = sum(map(len, ways_of.values())) + len(compared)
    with Progress(scorings * len(table), shown=options.progress) as progress:
        by_engine: ByRole = {}
        try:
            with timed("engine"):
                if options.endpoint is not None:
                    server = _endpoint(options)
                    scored.engine = server.name
                    by_engine = {POLICY: score_served(table, server, progress.add)}
                for role in roles if options.endpoint is None else ():
                    loaded = (engine or _opener(options))(bundle, role)
                    scored.engine = loaded.name
                    entry = bundle.manifest.models[role]
                    by_engine[role] = score_tokens(
                        table,
                        loaded,
                        layout=entry.layout,
                        token_budget=options.token_budget or int(bundle.manifest.recipe["token_budget"]),
                        row_limit=longest_row(entry.layout, max_length),
                        watch=progress.add,
                    )
                    del loaded
        except EngineOutputError as error:  # what it said is no opinion: that is a verdict
            scored.problem = str(error)
            return scored
        scored.served = _scoring(table, by_engine)
        for role in roles:
            for what, (kind, budget) in ways_of[role].items():
                with timed(what):
                    said[what][role] = original.score(role, kind, budget, table, progress.add)
            original.release()
        scored.original = {what: _scoring(table, by_role) for what, by_role in said.items()}
    return scored


def _judge(scored: _Scored, table: TokenTable, tolerance: Tolerance, options: VerifyOptions) -> Verification:
    """The verdict; an engine that failed has one too."""
    if scored.served is None:
        problem = scored.problem or ""
        return Verification(
            "fail", (problem,), None, tolerance, (Check("integrity", None, None, 0.0, "fail", problem),)
        )
    rounded = [scoring for what, scoring in scored.original.items() if what not in (ORIGINAL, RESHAPED)]
    scorings = Scorings(
        pairs=_pairs(table, options),
        original=scored.original[ORIGINAL],
        reshaped=scored.original[RESHAPED],
        rounded=rounded[0] if rounded else None,
        engine=scored.served,
        beta=options.beta,
        reference_free=options.reference_free,
        policy_alone=options.endpoint is not None,
    )
    return verify_scores(scorings, tolerance, seed=options.seed)


def _check_options(options: VerifyOptions) -> None:
    """Refuse values that no data set could make sense of."""
    if options.limit is not None and options.limit < 1:
        raise UsageError(f"--limit {options.limit} must be at least 1")
    if options.max_length is not None and options.max_length < 2:
        raise UsageError(f"--max-length {options.max_length} leaves no room for a prompt and a completion")
    if (options.endpoint is None) != (options.model is None):
        raise UsageError("--endpoint URL and --model NAME go together")
    default = VerifyOptions()
    for name in ("endpoint_dialect", "api_key_variable", "endpoint_timeout", "endpoint_tokens"):
        if options.endpoint is None and getattr(options, name) != getattr(default, name):
            raise UsageError(f"--{name.replace('_', '-')} {getattr(options, name)} is of a server: say --endpoint too")
    if options.endpoint is not None and options.engine != "recipe":
        raise UsageError(f"--engine {options.engine}: with --endpoint it is the server that is verified")
    if options.endpoint is not None and options.bisect:
        raise UsageError("--bisect looks into the bundle's own graphs, of which a server with --endpoint says nothing")
    if options.precision is not None and options.precision not in PRECISIONS:
        raise UsageError(f"--precision {options.precision!r} is not known; choose from {', '.join(PRECISIONS)}")
    if options.seed < 0:
        raise UsageError(f"--seed {options.seed} must be at least 0")
    if options.threads < 0:
        raise UsageError(f"--threads {options.threads} must be at least 0, which takes every core")
    if not LEAST <= options.beta <= MOST:
        raise UsageError(f"--beta {options.beta:g} must be a positive number, {LEAST:g} to {MOST:g}")


def _tolerance(options: VerifyOptions, precision: str) -> Tolerance:
    """What suits the precision, with what the user says in its place.

    Raises:
        UsageError: a limit that is none.
    """
    said = {
        name: getattr(options, name)
        for name in ("floor", "max_multiple", "max_accuracy_change", "near_tie", "max_growth")
        if getattr(options, name) is not None
    }
    try:
        return replace(default_tolerance(precision), **said)
    except ValueError as error:
        name, _, rest = str(error).partition(" ")
        raise UsageError(f"--{name.replace('_', '-')} {rest}") from error


def _read(
    bundle: Bundle, dataset: str, max_length: int, options: VerifyOptions
) -> tuple[TokenTable, dict[str, Any], int]:
    """All pairs as token ids, what is said of the data set, and how many rows were skipped."""
    source = find_bundle_tokens(
        bundle,
        dataset,
        max_length,
        split=options.split,
        limit=options.limit,
        group_by=options.group_by,
        on_error=options.on_error,
        trust_remote_code=options.trust_remote_code,
    )
    tokens = TokenCache(source)
    try:
        tokens.make_ahead(0, tokens.rows)
        table, skipped = tokens.read(0, tokens.rows)
        if not len(table):
            raise DatasetError(f"{dataset}: none of its {tokens.rows} rows can be used; {skipped[0].reason}")
        data = {
            "name": Path(dataset).name if Path(dataset).exists() else dataset,
            "split": tokens.data.split,
            "fingerprint": tokens.data.fingerprint,
            "rows": tokens.rows,
        }
        return table, data, len(skipped)
    finally:
        tokens.close()


def _claimed_precision(bundle: Bundle, options: VerifyOptions) -> str:
    """What is to be expected of the engine, where the user does not say."""
    if options.endpoint is not None:
        stored = bundle.manifest.models[POLICY].stored_dtypes
        return next((half for dtype, half in HALVES.items() if dtype in stored), "bf16")
    return str(bundle.manifest.recipe["precision"]) if options.engine == "recipe" else "fp32"


def _endpoint(options: VerifyOptions) -> EndpointEngine:
    """The server."""
    assert options.endpoint is not None
    assert options.model is not None
    return EndpointEngine(
        options.endpoint,
        options.model,
        dialect=options.endpoint_dialect,
        api_key_variable=options.api_key_variable,
        timeout_seconds=options.endpoint_timeout,
        most_tokens=options.endpoint_tokens,
    )


def _opener(options: VerifyOptions) -> Callable[[Bundle, str], Engine]:
    """Opens a role's engine, or another one on the exact graph."""

    def exact(bundle: Bundle, role: str) -> Engine:
        gates = bundle.manifest.models[role].adapter_gates
        return load_engine(options.engine, "fp32", bundle.graph(role), gates, threads=options.threads)

    def of_the_recipe(bundle: Bundle, role: str) -> Engine:
        return open_engine(bundle, role, threads=options.threads)

    return of_the_recipe if options.engine == "recipe" else exact


def _scoring(table: TokenTable, by_role: ByRole) -> Scoring:
    policy, reference = by_role[POLICY], by_role.get(REFERENCE, (None, None))
    return Scoring(table.rows, *policy, *reference)


def _pairs(table: TokenTable, options: VerifyOptions) -> VerifiedPairs:
    groups = None if options.group_by is None else [str(group) for group in table.groups]
    prompts, chosen, rejected = (np.ascontiguousarray(column) for column in table.lengths.T)
    return VerifiedPairs(table.rows, prompts, chosen, rejected, groups)
