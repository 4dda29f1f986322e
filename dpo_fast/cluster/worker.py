"""A worker: an actor that has loaded the engine once, and is given one part after another.

Ray gives a worker two parts at a time, in two threads. While one is on the engine the other is prepared, as on one
machine; the lock is the engine's::

    thread 1   | prepare 4 | score, write 4      | prepare 6 | (waits)   | score, write 6
    thread 2               | prepare 5 | (waits) | score, write 5        | prepare 7 |
"""

import os
import platform
import time
from collections.abc import Iterator
from threading import Lock
from typing import TYPE_CHECKING, Any

from dpo_fast.bundle import REFERENCE
from dpo_fast.cluster.in_hand import ScoresInHand
from dpo_fast.cluster.job import Job, Stage
from dpo_fast.cluster.outcome import Outcome
from dpo_fast.errors import InputError, StorageError
from dpo_fast.interrupts import Stop
from dpo_fast.loading import Engines
from dpo_fast.reference_scores import ReferenceCache, ScoresOfRun
from dpo_fast.scoring import Account, ReadyPart, Turn, prepare_part, score_part
from dpo_fast.store import PAIRS
from dpo_fast.text import reason_of
from dpo_fast.token_cache import TokenCache

if TYPE_CHECKING:
    import pyarrow as pa

SECONDS_BETWEEN_WORDS = 0.5  # to the ledger, of how far a part is


class PartWorker:
    """Scores one part after another; Ray Data makes one of each actor."""

    def __init__(self, job: Job, stage: Stage, ledger: Any) -> None:
        """Load the engine; what goes wrong is said of the first part that comes.

        Args:
            job: what is to be scored.
            stage: of it, what this worker does.
            ledger: the handle of the ledger's actor.
        """
        import ray

        context = ray.get_runtime_context()
        self._ledger, self._stage, self._job = ledger, stage, job
        self._name, self._host = str(context.get_actor_id()), platform.node()
        said = (self._name, stage.number, self._host, context.get_node_id(), os.getpid(), context.current_actor)
        doubt = ray.get(ledger.started.remote(*said))
        self._on_engine = Lock()
        self._engine_was_left = time.perf_counter()
        self._refusal: Exception | None = None
        try:
            self._open()
        except Exception as error:  # an actor that cannot be made would be made again, without end
            self._refusal = error
            doubt = None if _is_fatal(error) else f"cannot load its engine: {reason_of(error)}"
        while doubt is not None and ray.get(ledger.refuse.remote(self._name, doubt)):
            time.sleep(SECONDS_BETWEEN_WORDS)
        time.sleep(ray.get(ledger.ready.remote(self._name)))

    def _open(self) -> None:
        """Open the bundle, the engine and the tokens, and check that the bundle is whole."""
        job = self._job
        bundle = job.open_bundle()
        bundle.verify()
        tokens = TokenCache(job.tokens)
        tokens.open_ahead()  # while the engines are loaded
        self._engines = Engines(bundle, job.open_engine)
        for role in self._stage.to_load:
            self._engines.load(role)
        engines = [self._engines.get(role) for role in self._stage.to_load]
        cache = ReferenceCache()
        known = cache if job.reference_scores is None else ScoresOfRun(job.reference_scores)
        self._in_hand = ScoresInHand(known, cache)
        self._work = job.open(bundle, tokens, engines[0], self._in_hand)

    def __call__(self, rows: "pa.Table") -> "Iterator[pa.Table]":
        """Score the parts of some rows.

        Args:
            rows: columns "part" (int64), and from an earlier stage "outcome" (JSON), "token_ids" and "reference".

        Yields:
            For each part one row with these columns.
        """
        import pyarrow as pa

        for row in rows.to_pylist():
            outcome = Outcome.from_json(row["outcome"]) if "outcome" in row else Outcome(row["part"])
            token_ids, reference = row.get("token_ids", ""), row.get("reference", b"")
            if outcome.reason is None:
                token_ids, reference = self._score(outcome, token_ids, reference)
            values = {"part": outcome.part, "outcome": outcome.to_json(), "token_ids": token_ids}
            yield pa.Table.from_pylist([values | {"reference": reference}], schema=_schema())

    def _score(self, outcome: Outcome, token_ids: str, reference: bytes) -> tuple[str, bytes]:
        """Score a part, and say in its outcome what came of it.

        Returns:
            What another stage needs to know: the hash of the token ids, and the reference's scores.
        """
        import ray

        part = outcome.part
        outcome.worker, outcome.host = self._name, self._host
        pairs = pause = 0.0
        try:
            if self._refusal is not None:
                raise self._refusal
            outcome.engine, outcome.precision = self._work.engine_name, self._work.precision
            outcome.reason = ray.get(self._ledger.begin.remote(self._name, part))
            if outcome.reason is not None:
                return "", b""
            self._in_hand.take(token_ids, reference)
            ready = prepare_part(self._work, part)
            token_ids = ready.fingerprints[PAIRS]["token ids"]
            with self._on_engine:
                self._ledger.on_engine.remote(self._name, part)
                self._score_ready(ready, outcome.account)
            pairs = self._stage.share * (ready.rows[1] - ready.rows[0])
            if not self._stage.is_last:
                return token_ids, self._in_hand.hand_over(token_ids, ready.scores.get(REFERENCE))
            self._in_hand.forget(token_ids)
        except Exception as error:
            outcome.reason, outcome.is_fatal = reason_of(error), _is_fatal(error)
            pause = ray.get(self._ledger.fail.remote(self._name, outcome.reason))
        finally:
            self._ledger.end.remote(self._name, part, self._stage.number, pairs)
        time.sleep(pause)
        return "", b""

    def _score_ready(self, ready: ReadyPart, account: Account) -> None:
        """Score a part whose turn on the engine has come."""
        account.waited_for_tokens += time.perf_counter() - self._engine_was_left
        words = _Words(self._ledger, self._name, ready.part)
        turn = Turn(self._stage.to_score, self._engines.get, Stop(), words, account, self._stage.share)
        score_part(self._work, turn, ready)
        words.send()
        self._engine_was_left = time.perf_counter()


def _is_fatal(error: Exception) -> bool:
    """Whether all parts would fail: what a disk refuses once it may take later; what a user's input lacks, it lacks."""
    return isinstance(error, InputError) and not isinstance(error, StorageError)


class _Words:
    """Tells the ledger how far a part is, not more often than it helps."""

    def __init__(self, ledger: Any, worker: str, part: int) -> None:
        self._ledger, self._worker, self._part = ledger, worker, part
        self._pairs, self._tokens = 0.0, 0
        self._sent = time.perf_counter()

    def skip(self, pairs: float) -> None:
        """Pairs that were scored before this run."""

    def add(self, pairs: float, tokens: int) -> None:
        """What a batch has finished."""
        self._pairs += pairs
        self._tokens += tokens
        if time.perf_counter() - self._sent >= SECONDS_BETWEEN_WORDS:
            self.send()

    def send(self) -> None:
        """Say what has not been said yet."""
        if self._tokens:
            self._ledger.progress.remote(self._worker, self._part, self._pairs, self._tokens)
        self._pairs, self._tokens, self._sent = 0.0, 0, time.perf_counter()


def _schema() -> "pa.Schema":
    """Of the rows that stages hand on."""
    import pyarrow as pa

    texts = [pa.field("outcome", pa.string()), pa.field("token_ids", pa.string())]
    return pa.schema([pa.field("part", pa.int64()), *texts, pa.field("reference", pa.large_binary())])
