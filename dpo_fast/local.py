"""An evaluation by the engines of this process: the case of one worker."""

import time
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial

from dpo_fast.bundle import POLICY, REFERENCE, Bundle
from dpo_fast.engines import open_engine
from dpo_fast.errors import DatasetError, InputError
from dpo_fast.evaluation import EvaluateOptions, Evaluation
from dpo_fast.loading import Engines
from dpo_fast.memory import fit_together
from dpo_fast.progress import Progress
from dpo_fast.reference_scores import KnownScores, ReferenceCache, ScoresOfRun
from dpo_fast.scoring import Account, ScoredRun, Turn, Work, score_parts
from dpo_fast.store import ScoreStore
from dpo_fast.token_budget import tune_token_budget
from dpo_fast.token_cache import DataSet, TokenCache
from dpo_fast.token_table import TokenTable
from dpo_fast.types import SkippedRow


def score_locally(evaluation: Evaluation) -> ScoredRun:
    """Score what is missing of a run's parts.

    Args:
        evaluation: see there.

    Raises:
        InputError: bundle, data set, options or disk.
        EngineOutputError: an engine returned what cannot be right.
        InterruptedRunError: Ctrl-C or SIGTERM; the parts that were finished are kept.
    """
    began = time.perf_counter()
    bundle, options, roles, store = evaluation.bundle, evaluation.options, evaluation.roles, evaluation.store
    cache = ReferenceCache()
    known: KnownScores = cache
    if options.reference_scores is not None and REFERENCE in roles:
        known = ScoresOfRun(options.reference_scores)
    passes = _passes(bundle, roles, options)

    with ExitStack() as stack:
        engines = Engines(bundle, evaluation.engine or partial(open_engine, threads=options.threads))
        stack.callback(engines.close)
        # Loading and hashing release the interpreter, so they go on while the rows are read and tokenised.
        verified = stack.enter_context(ThreadPoolExecutor(1, "verify")).submit(bundle.verify)
        for role in passes[0]:
            if role == POLICY or not _may_be_known(bundle, known, role):
                engines.load(role)

        try:
            tokens = TokenCache(evaluation.find_tokens())
            stack.callback(tokens.close)
            parts = evaluation.parts(tokens.rows)
            rows = min(parts.values())[0], max(parts.values())[1]
            tokens.make_ahead(*rows)
            tokens.wait_until_open()
            opened_seconds = time.perf_counter() - began
            sample, _ = first_pairs(tokens, parts)
        except InputError:
            verified.result()  # if the bundle was altered, that explains a tokenizer that fails
            raise
        tokenize_seconds = time.perf_counter() - began - opened_seconds
        verified.result()
        first_engine = engines.get(passes[0][0])
        load_seconds = time.perf_counter() - began - tokenize_seconds

        started = time.perf_counter()
        evaluation.prepare_store(parts)
        layout = bundle.manifest.models[passes[0][0]].layout
        token_budget = known_token_budget(options, bundle, store, parts) or tune_token_budget(
            first_engine, sample, layout
        )
        name, precision = first_engine.name, first_engine.precision
        length = evaluation.max_length
        work = Work(bundle, tokens, store, parts, tuple(roles), token_budget, length, known, cache, name, precision)
        del first_engine, sample  # an engine that somebody holds keeps its memory
        account = Account()
        progress = stack.enter_context(Progress(rows[1] - rows[0], shown=options.progress))
        for number, roles_in_memory in enumerate(passes):
            if number > 0:
                engines.release()
            turn = Turn(roles_in_memory, engines.get, evaluation.stop, progress, account, share=1 / len(passes))
            score_parts(work, turn)
        score_seconds = time.perf_counter() - started - account.waited_for_tokens
    return ScoredRun(
        account=account,
        data=tokens.data,
        rows=tokens.rows,
        engine=name,
        precision=precision,
        token_budget=token_budget,
        engines="in-turn" if len(passes) > 1 else "together",
        load_seconds=load_seconds,
        tokenize_seconds=tokenize_seconds + account.waited_for_tokens,
        score_seconds=score_seconds,
    )


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


def first_pairs(tokens: TokenCache, parts: Mapping[int, tuple[int, int]]) -> tuple[TokenTable, int]:
    """The first part that has any pairs, and its number of rows.

    Raises:
        DatasetError: none has.
    """
    first: SkippedRow | None = None
    for start, stop in parts.values():
        table, skipped = tokens.read(start, stop)
        if len(table):
            return table, stop - start
        first = first or skipped[0]
    raise no_usable_row(tokens.data, sum(stop - start for start, stop in parts.values()), first)


def no_usable_row(data: DataSet, rows: int, first: SkippedRow | None) -> DatasetError:
    """What there is to say of a set without pairs; the first of its rows stands for all."""
    why = "" if first is None else f"; row {first.row}: {first.reason}"
    return DatasetError(f"{data.name}: none of {rows} rows can be used{why}")


def known_token_budget(options: EvaluateOptions, bundle: Bundle, store: ScoreStore, parts: Iterable[int]) -> int | None:
    """Tokens of a batch: as asked for, as the recipe has it, or as the run began; None: they are to be measured."""
    if options.token_budget is None:
        return int(bundle.manifest.recipe["token_budget"])
    if isinstance(options.token_budget, int):
        return options.token_budget
    there = sorted(set(parts).intersection(store.parts()))  # or each part would be asked for
    records = (store.record(part) for part in there)
    return next((record.token_budget for record in records if record is not None), None)
