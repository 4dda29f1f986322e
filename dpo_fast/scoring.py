"""A run's parts through the engines, and onto the disk; the engine does not wait for what could have been made ready.

Three threads share the work. While the engine runs a part, the next part's tokens are read, compared with what is on
the disk already, and laid into batches; and the tokenizer is as far ahead as it can be::

    tokenizer  … part 7 | part 8 | part 9 | part 10 …      to the cache on the disk
    rows       | part 2               | part 3               |
    engine     | part 1 policy, reference, written | part 2 …
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import partial
from typing import Any, Protocol

from dpo_fast.ahead import one_ahead
from dpo_fast.batches import Arrangement, Batch, Layout, arrange, longest_row, make_batches
from dpo_fast.bundle import REFERENCE, Bundle
from dpo_fast.engines.base import Engine, PipelinedEngine
from dpo_fast.errors import InterruptedRunError
from dpo_fast.interrupts import Stop
from dpo_fast.reference_scores import KeptScores, KnownScores
from dpo_fast.scores import ScoredPairs, ScoreSheet
from dpo_fast.store import PAIRS, Fingerprint, PartRecord, ScoreStore, fingerprint_hash, row_hash, token_hash
from dpo_fast.token_cache import DataSet, TokenCache
from dpo_fast.token_table import TokenTable
from dpo_fast.types import SkippedRow


@dataclass(slots=True)
class Account:
    """What a run's wall time went to, in seconds, none counted twice, and what came of it.

    Attributes:
        waited_for_tokens: until a part's tokens were there and laid into batches.
        engines: running batches.
        waited_for_disk: until a part was safe on the disk.
        parts: that are there, and the hash of what each depends on (`dpo_fast.store.fingerprint_hash`).
        skipped: rows that are no usable pairs.
        tokens: that engines computed for the run's parts, padding included, in this process or an earlier one.
        padding: of these, how many were padding.
        scored_pairs: by this process.
        computed_tokens: by this process, padding included.
        found_reference_scores: pairs whose reference scores were computed by an earlier run.
    """

    waited_for_tokens: float = 0.0
    engines: float = 0.0
    waited_for_disk: float = 0.0
    parts: list[tuple[int, str]] = field(default_factory=list)
    skipped: list[SkippedRow] = field(default_factory=list)
    tokens: int = 0
    padding: int = 0
    scored_pairs: int = 0
    computed_tokens: int = 0
    found_reference_scores: int = 0

    def add(self, other: "Account") -> None:
        """Take in what another call, in another process perhaps, has to say."""
        for each in fields(self):
            setattr(self, each.name, getattr(self, each.name) + getattr(other, each.name))


@dataclass(frozen=True, slots=True)
class ScoredRun:
    """What scoring a run's parts came to, whoever did it.

    Attributes:
        account: of all that was done.
        data: the preference set.
        rows: of it, that were taken.
        engine, precision: that scored.
        token_budget: of the batches, in tokens.
        engines: whether policy and reference were in memory "together", "in-turn" or "apart".
        load_seconds, tokenize_seconds, score_seconds: wall time, none counted twice.
        cluster: what is worth keeping of the workers, as JSON has it; empty where there were none.
    """

    account: Account
    data: DataSet
    rows: int
    engine: str
    precision: str
    token_budget: int
    engines: str
    load_seconds: float
    tokenize_seconds: float
    score_seconds: float
    cluster: dict[str, Any] = field(default_factory=dict)


class Counter(Protocol):
    """Who is told how far the work has come; see `dpo_fast.progress.Progress`."""

    def skip(self, pairs: float) -> None:
        """Pairs that were scored before this run."""
        ...

    def add(self, pairs: float, tokens: int) -> None:
        """What a batch has finished: pairs, and tokens without padding."""
        ...


@dataclass(frozen=True, slots=True)
class Work:
    """What is to be scored, and with what.

    Attributes:
        bundle: whose engines score.
        tokens: of the preference set.
        store: of the run.
        parts: their numbers, and the rows of each, counted from 0.
        roles: whose scores the parts hold.
        token_budget: of a batch, in tokens.
        max_length: of prompt and completion together, in tokens.
        known: where reference scores may be found.
        cache: where reference scores are kept for later runs.
        engine_name, precision: of the engines that score.
    """

    bundle: Bundle
    tokens: TokenCache
    store: ScoreStore
    parts: Mapping[int, tuple[int, int]]
    roles: tuple[str, ...]
    token_budget: int
    max_length: int
    known: KnownScores
    cache: KeptScores
    engine_name: str
    precision: str

    def fingerprints(self, table: TokenTable, rows: tuple[int, int]) -> dict[str, Fingerprint]:
        """What a part depends on: its pairs, and each role's model."""
        pairs = {"token ids": token_hash(table), "row numbers, truncation or groups": row_hash(table, rows)}
        return {PAIRS: pairs} | {role: self.model_fingerprint(role) for role in self.roles}

    def model_fingerprint(self, role: str) -> Fingerprint:
        """What a role's scores depend on beside the pairs."""
        return {
            "weights and graph": "+".join(self.bundle.role_hashes(role)),
            "engine": self.engine_name,
            "precision": self.precision,
            "layout": self.layout(role),
        }

    def layout(self, role: str) -> Layout:
        """Whether a role's rows share their prompt."""
        return self.bundle.manifest.models[role].layout


@dataclass(frozen=True, slots=True)
class ReadyPart:
    """A part whose turn may come.

    Attributes:
        record: what the part on the disk says of itself, if it needs no work.
        scores: found already, by role.
        batches: by layout; for a part that needs work.
    """

    part: int
    rows: tuple[int, int]
    table: TokenTable
    skipped: list[SkippedRow]
    fingerprints: dict[str, Fingerprint]
    record: PartRecord | None
    scores: dict[str, ScoredPairs]
    batches: dict[Layout, tuple[Arrangement, list[Batch]]]


@dataclass(frozen=True, slots=True)
class Turn:
    """Whose engines may run now, and who is told what comes of it.

    Where these are the reference's alone, and the run wants the policy's scores too, no part is written: the
    reference's scores are kept in `Work.cache`, for the policy's turn to find.

    Attributes:
        roles: whose engines may run.
        engine_of: a role's engine; asked for only if there is something to score.
        stop: looked at after each batch.
        progress: told of each batch.
        account: what the time went to; added to.
        share: of the whole work that this turn does, for the progress.
    """

    roles: Sequence[str]
    engine_of: Callable[[str], Engine]
    stop: Stop
    progress: Counter
    account: Account
    share: float = 1.0


def score_parts(work: Work, turn: Turn) -> None:
    """Score what is missing of a run's parts, and write them, in order.

    Raises:
        As `prepare_part` and `score_part`.
    """
    readies = one_ahead(partial(prepare_part, work), work.parts)
    while True:
        started = time.perf_counter()
        ready = next(readies, None)
        turn.account.waited_for_tokens += time.perf_counter() - started
        if ready is None:
            return
        score_part(work, turn, ready)


def score_part(work: Work, turn: Turn, ready: ReadyPart) -> None:
    """Score what is missing of one part, and write it.

    Raises:
        InterruptedRunError: `turn.stop` said so.
        EngineOutputError: an engine returned what cannot be right.
        StorageError: the disk refused.
        InputError: the making of some tokens ahead has failed.
    """
    whole, account = set(turn.roles) == set(work.roles), turn.account
    _check(turn.stop, work, ready.part)
    record = ready.record
    if record is None and (whole or not ready.scores.keys() >= set(turn.roles)):
        scores = _score(work, turn, ready)
        record = _record(work, ready)
        if whole:
            account.scored_pairs += len(ready.table)
            account.found_reference_scores += len(ready.table) if REFERENCE in ready.scores else 0
        else:  # which the policy's turn will find
            account.found_reference_scores -= len(ready.table)
        # The next part waits until this one is safe: whatever happens, one part's work is lost at most.
        started = time.perf_counter()
        if REFERENCE in scores and REFERENCE not in ready.scores:
            token_ids = ready.fingerprints[PAIRS]["token ids"]
            work.cache.keep(token_ids, ready.fingerprints[REFERENCE], scores[REFERENCE])
        if whole:
            work.store.write(ready.part, ready.table, scores, record)
        account.waited_for_disk += time.perf_counter() - started
    else:
        turn.progress.skip(turn.share * (ready.rows[1] - ready.rows[0]))
    if whole and record is not None:
        account.parts.append((ready.part, fingerprint_hash(ready.fingerprints)))
        account.skipped += ready.skipped
        account.tokens += record.tokens
        account.padding += record.padding


def prepare_part(work: Work, part: int) -> ReadyPart:
    """Read a part's tokens, see what is there of its scores, and lay out batches for the rest.

    Raises:
        OutputExistsError: the part is there, and was computed from something else.
        StorageError: the disk refused.
        InputError: as `TokenCache.read`.
    """
    rows = work.parts[part]
    table, skipped = work.tokens.read(*rows)
    fingerprints = work.fingerprints(table, rows)
    record = work.store.record(part)
    scores: dict[str, ScoredPairs] = {}
    batches: dict[Layout, tuple[Arrangement, list[Batch]]] = {}
    if record is not None:
        work.store.check(part, record, fingerprints)
    else:
        if REFERENCE in work.roles:
            found = work.known.find(part, fingerprints[PAIRS]["token ids"], fingerprints[REFERENCE])
            if found is not None:
                scores[REFERENCE] = found
        # For scores that were found, too: what a part says of itself must not depend on who computed it.
        for layout in {work.layout(role) for role in work.roles}:
            # Rows of many pairs are no wider than rows of one may be: engines are built for widths.
            arrangement = arrange(table, layout, min(work.token_budget, longest_row(layout, work.max_length)))
            batches[layout] = arrangement, list(make_batches(arrangement, work.token_budget))
    return ReadyPart(part, rows, table, skipped, fingerprints, record, scores, batches)


def _score(work: Work, turn: Turn, ready: ReadyPart) -> dict[str, ScoredPairs]:
    """A part's scores by role: those that were found, and those that engines give now."""
    scores = dict(ready.scores)
    missing = [role for role in turn.roles if role not in scores]
    completions = sum(len(batch.completions) for role in missing for batch in ready.batches[work.layout(role)][1])
    of_part = turn.share * (ready.rows[1] - ready.rows[0])
    for role in missing:
        engine = turn.engine_of(role)
        arrangement, batches = ready.batches[work.layout(role)]
        sheet = ScoreSheet(arrangement)
        said_of_each = engine.score_all(batches) if isinstance(engine, PipelinedEngine) else map(engine.score, batches)
        for batch in batches:
            started = time.perf_counter()
            said = next(said_of_each)
            turn.account.engines += time.perf_counter() - started
            sheet.add(batch, said)
            turn.account.computed_tokens += batch.input_ids.size
            turn.progress.add(of_part * len(batch.completions) / completions, batch.input_ids.size - batch.padding)
            work.tokens.check()
            _check(turn.stop, work, ready.part)
        scores[role] = sheet.finish()
    if not completions:
        turn.progress.skip(of_part)
    return scores


def _check(stop: Stop, work: Work, part: int) -> None:
    """Stop if that was asked for.

    Raises:
        InterruptedRunError: it was.
    """
    if stop.signal is not None:
        raise InterruptedRunError(
            stop.signal,
            f"{stop.signal.name}: stopped in part {part} of {max(work.parts) + 1}; what is finished is in "
            f"{work.store.name}: run the same command again, without --overwrite, to go on",
        )


def _record(work: Work, ready: ReadyPart) -> PartRecord:
    """What a part says of itself."""
    batches = [batch for role in work.roles for batch in ready.batches[work.layout(role)][1]]
    tokens, padding = sum(batch.input_ids.size for batch in batches), sum(batch.padding for batch in batches)
    return PartRecord(ready.fingerprints, ready.rows, tokens, padding, work.token_budget)
