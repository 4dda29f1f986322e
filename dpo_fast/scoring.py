"""A run's parts through the engines, and onto the disk; the engine does not wait for what could have been made ready.

Three threads share the work. While the engine runs a part, the next part's tokens are read, compared with what is on
the disk already, and laid into batches; and the tokenizer is as far ahead as it can be::

    tokenizer  … part 7 | part 8 | part 9 | part 10 …      to the cache on the disk
    rows       | part 2               | part 3               |
    engine     | part 1 policy, reference, written | part 2 …
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

from dpo_fast.ahead import one_ahead
from dpo_fast.batches import Arrangement, Batch, Layout, arrange, longest_row, make_batches
from dpo_fast.bundle import REFERENCE, Bundle
from dpo_fast.engines.base import Engine, PipelinedEngine
from dpo_fast.errors import InterruptedRunError
from dpo_fast.interrupts import Stop
from dpo_fast.progress import Progress
from dpo_fast.reference_scores import KnownScores, ReferenceCache
from dpo_fast.scores import ScoredPairs, ScoreSheet
from dpo_fast.store import PAIRS, Fingerprint, PartRecord, ScoreStore, row_hash, token_hash
from dpo_fast.token_cache import TokenCache
from dpo_fast.token_table import TokenTable
from dpo_fast.types import SkippedRow


@dataclass(slots=True)
class Account:
    """What a run's wall time went to, in seconds, none counted twice, and what came of it.

    Attributes:
        waited_for_tokens: until a part's tokens were there and laid into batches.
        engines: running batches.
        waited_for_disk: until a part was safe on the disk.
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
    skipped: list[SkippedRow] = field(default_factory=list)
    tokens: int = 0
    padding: int = 0
    scored_pairs: int = 0
    computed_tokens: int = 0
    found_reference_scores: int = 0


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
    roles: Sequence[str]
    token_budget: int
    max_length: int
    known: KnownScores
    cache: ReferenceCache
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
class _Ready:
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


def score_parts(
    work: Work,
    to_score: Sequence[str],
    engine_of: Callable[[str], Engine],
    stop: Stop,
    progress: Progress,
    account: Account,
    *,
    share: float = 1.0,
) -> None:
    """Score what is missing of a run's parts, and write them.

    Where `to_score` is the reference alone, and the run wants the policy's scores too, no part is written: the
    reference's scores are kept in the cache, for the next call to find.

    Args:
        work: what is to be scored.
        to_score: roles whose engines may run.
        engine_of: a role's engine; asked for only if there is something to score.
        stop: looked at after each batch.
        progress: told of each batch.
        account: what the time went to; added to.
        share: of the work that this call does, for the progress.

    Raises:
        InterruptedRunError: `stop` said so.
        OutputExistsError: a part is there that was computed from something else.
        EngineOutputError: an engine returned what cannot be right.
        StorageError: the disk refused.
        InputError: as `TokenCache.read`.
    """
    whole = set(to_score) == set(work.roles)
    readies = one_ahead(partial(_prepare, work), work.parts)
    while True:
        started = time.perf_counter()
        ready = next(readies, None)
        account.waited_for_tokens += time.perf_counter() - started
        if ready is None:
            return
        _check(stop, work, ready.part)
        record = ready.record
        if record is None and (whole or not ready.scores.keys() >= set(to_score)):
            scores = _score(work, ready, to_score, engine_of, stop, progress, account, share)
            record = _record(work, ready)
            if whole:
                account.scored_pairs += len(ready.table)
                account.found_reference_scores += len(ready.table) if REFERENCE in ready.scores else 0
            else:  # which the next call will find
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
            progress.skip(share * (ready.rows[1] - ready.rows[0]))
        if whole and record is not None:
            account.skipped += ready.skipped
            account.tokens += record.tokens
            account.padding += record.padding


def _prepare(work: Work, part: int) -> _Ready:
    """Read a part's tokens, see what is there of its scores, and lay out batches for the rest."""
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
    return _Ready(part, rows, table, skipped, fingerprints, record, scores, batches)


def _score(
    work: Work,
    ready: _Ready,
    to_score: Sequence[str],
    engine_of: Callable[[str], Engine],
    stop: Stop,
    progress: Progress,
    account: Account,
    share: float,
) -> dict[str, ScoredPairs]:
    """A part's scores by role: those that were found, and those that engines give now."""
    scores = dict(ready.scores)
    missing = [role for role in to_score if role not in scores]
    completions = sum(len(batch.completions) for role in missing for batch in ready.batches[work.layout(role)][1])
    of_part = share * (ready.rows[1] - ready.rows[0])
    for role in missing:
        engine = engine_of(role)
        arrangement, batches = ready.batches[work.layout(role)]
        sheet = ScoreSheet(arrangement)
        said_of_each = engine.score_all(batches) if isinstance(engine, PipelinedEngine) else map(engine.score, batches)
        for batch in batches:
            started = time.perf_counter()
            said = next(said_of_each)
            account.engines += time.perf_counter() - started
            sheet.add(batch, said)
            account.computed_tokens += batch.input_ids.size
            progress.add(of_part * len(batch.completions) / completions, batch.input_ids.size - batch.padding)
            work.tokens.check()
            _check(stop, work, ready.part)
        scores[role] = sheet.finish()
    if not completions:
        progress.skip(of_part)
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
            f"{work.store.folder.parent}: run the same command again, without --overwrite, to go on",
        )


def _record(work: Work, ready: _Ready) -> PartRecord:
    """What a part says of itself."""
    batches = [batch for role in work.roles for batch in ready.batches[work.layout(role)][1]]
    tokens, padding = sum(batch.input_ids.size for batch in batches), sum(batch.padding for batch in batches)
    return PartRecord(ready.fingerprints, ready.rows, tokens, padding, work.token_budget)
