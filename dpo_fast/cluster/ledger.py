"""Who is at which part, since when, and how often a part took its worker down with it.

The ledger outlives the workers, so it can tell what a worker was at when it died. It runs as an actor of its own on the
driver's node, and is asked by workers and driver alike; nothing in it is needed to go on after a new start.
"""

import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

START_SECONDS = 60.0  # within which workers start, if there is room for them
IN_A_ROW = 3  # parts that a worker fails at while others do not, before it is the worker that is suspected
LONGEST_PAUSE = 30.0  # seconds, of a worker that fails at one part after another


@dataclass(slots=True)
class WorkerState:
    """One worker, as far as the ledger knows.

    Attributes:
        stage: of the work on a part that it does.
        host, node, pid: where it runs now; the node's id is Ray's.
        handle: of its actor, by which it can be killed.
        starts: how often its actor has started.
        last_sign: of life, in the ledger's seconds.
        parts: that it holds, and whether each is on the engine (or still being prepared).
        died_at: how often its process ended, or hung, at a part.
        pairs: of the parts that it holds, how many are scored.
        tokens: that its engine has computed, without padding, for as long as the run goes.
        is_ready: whether its engine is loaded.
        was_ready: whether it was before its actor started again: then parts may wait for it that Ray gives to no other.
        is_gone: whether it was given up.
        failures, failing_since: parts in a row, up to the last one, that it failed or died at on its node; and when the
            first one was.
        refusal: why it had better get no parts, and since when that is known; or None.
        holds_back: whether it gets none for that.
    """

    stage: int
    host: str
    node: str
    pid: int
    handle: Any
    starts: int
    last_sign: float
    parts: dict[int, bool] = field(default_factory=dict)
    died_at: Counter[int] = field(default_factory=Counter)
    pairs: dict[int, float] = field(default_factory=dict)
    tokens: int = 0
    is_ready: bool = False
    was_ready: bool = False
    is_gone: bool = False
    failures: int = 0
    failing_since: float = 0.0
    refusal: tuple[str, float] | None = None
    holds_back: bool = False


@dataclass(frozen=True, slots=True)
class SilentWorker:
    """A worker that has something to do, and has given no sign of life for a while.

    Attributes:
        worker: its name.
        stage: of the work on a part that it does.
        handle: of its actor.
        node: Ray's id.
        seconds: since the last sign.
        what: it was at, in words.
    """

    worker: str
    stage: int
    handle: Any
    node: str
    seconds: float
    what: str


@dataclass(frozen=True, slots=True)
class Snapshot:
    """How far the work has come.

    Attributes:
        pairs: scored, or found to be scored already, with the fractions of parts that are not ended.
        tokens: that engines have computed, without padding.
        workers: that are at work.
        silent: those without a sign of life.
        failing_starts: the most often that one worker has started without ever becoming ready.
        refusals: by worker that holds back: on which host, and why.
        said: all that was worth telling the user until now.
    """

    pairs: float
    tokens: int
    workers: int
    silent: list[SilentWorker]
    failing_starts: int
    refusals: dict[str, str]
    said: list[str]


class Ledger:
    """The book of a run's parts and workers."""

    def __init__(self, attempts: int, clock: Callable[[], float] = time.monotonic) -> None:
        """An empty book.

        Args:
            attempts: how often a worker may die or hang at a part before the part is refused.
            clock: seconds.
        """
        self._attempts, self._clock = attempts, clock
        self._sizes: Sequence[int] = ()
        self._workers: dict[str, WorkerState] = {}
        self._ended: dict[tuple[int, int], float] = {}  # pairs by part and stage: one that is ended twice counts once
        self._suspected: dict[str, str] = {}  # by node: what a worker there failed with, at one part after another
        self._said: list[str] = []

    def begin_pass(self, sizes: Sequence[int]) -> None:
        """Parts are about to be handed out to new workers; those of the pass before have gone with theirs.

        Args:
            sizes: workers by stage.
        """
        self._sizes = sizes
        for state in self._workers.values():
            state.parts.clear()
            state.pairs.clear()
            state.is_gone = True

    def started(self, worker: str, stage: int, host: str, node: str, pid: int, handle: Any) -> str | None:
        """A worker's actor has started, for the first time or again; what it was at before has taken it down.

        Returns:
            Why it had better hold back (see `refuse`), or None: on its node one part after another has failed.
        """
        state = WorkerState(stage, host, node, pid, handle, starts=1, last_sign=self._clock())
        before = self._workers.get(worker)
        self._workers[worker] = state
        if before is not None:
            died_at_work = self._blame(before)
            state.starts = 1 if before.is_ready else before.starts + 1
            state.was_ready = before.is_ready or before.was_ready
            state.tokens, state.died_at = before.tokens, before.died_at
            if before.node == node:
                state.failures, state.failing_since = before.failures, before.failing_since
                if died_at_work:
                    self._count_failure(state, "its process ended, or hung")
        return None if state.was_ready else self._suspected.get(node)

    def ready(self, worker: str) -> float:
        """A worker's engine is loaded.

        Returns:
            Seconds for which it had better take no part; see `_pause`.
        """
        self._sign(worker)
        state = self._workers[worker]
        state.is_ready = True
        return self._pause(state)

    def refuse(self, worker: str, reason: str) -> bool:
        """A worker's engine cannot be loaded, or is not to be trusted.

        Returns:
            Whether others of its stage may do the work: then it had better not become ready, for whoever fails at once
            would be given one part after another, and fail at all of them. One that started again holds none back that
            only it can fail at, for others to be given them.
        """
        self._sign(worker)
        state = self._workers[worker]
        state.refusal = state.refusal or (reason, self._clock())
        state.holds_back = not state.was_ready and self._others_may_work(state, state.refusal[1])
        return state.holds_back

    def begin(self, worker: str, part: int) -> str | None:
        """A worker is about to prepare a part.

        Returns:
            None; or why it had better not. The last attempt is another worker's, in the next pass: Ray gives a part
            again and again to the one that died at it, whose device may be to blame, and not the part. Who is suspected
            has one.
        """
        self._sign(worker)
        state = self._workers[worker]
        most = 1 if self._is_suspect(state) else max(self._attempts - 1, 1)
        deaths = self._deaths(part)
        if deaths >= self._attempts or state.died_at[part] >= most:
            return f"its worker died or hung {'once' if deaths == 1 else f'{deaths} times'}"
        state.parts[part] = False
        return None

    def refused(self) -> set[int]:
        """Parts at which workers have died or hung as often as parts are tried."""
        died_at = {part for state in self._workers.values() for part in state.died_at}
        return {part for part in died_at if self._deaths(part) >= self._attempts}

    def on_engine(self, worker: str, part: int) -> None:
        """A part is prepared, and its turn on the engine has come."""
        self._sign(worker)
        self._workers[worker].parts[part] = True

    def progress(self, worker: str, part: int, pairs: float, tokens: int) -> None:
        """A part's batches have scored so many pairs and tokens since the last word of it."""
        self._sign(worker)
        state = self._workers[worker]
        state.pairs[part] = state.pairs.get(part, 0.0) + pairs
        state.tokens += tokens

    def end(self, worker: str, part: int, stage: int, pairs: float) -> None:
        """A worker is done with a part, well or not.

        Args:
            worker: its name.
            part: that it held.
            stage: of the work on the part.
            pairs: what this stage counts for where it went well; 0 where it failed.
        """
        self._sign(worker)
        state = self._workers[worker]
        state.parts.pop(part, None)
        state.pairs.pop(part, None)
        if pairs:
            self._ended[part, stage] = pairs
            if state.failures >= IN_A_ROW or state.refusal:  # the node has recovered
                self._suspected.pop(state.node, None)
            state.failures, state.refusal = 0, None

    def fail(self, worker: str, reason: str) -> float:
        """A worker has failed at a part, by the part's fault or its own.

        Returns:
            Seconds for which it had better take no other; see `_pause`.
        """
        state = self._workers[worker]
        self._count_failure(state, reason)
        return self._pause(state)

    def give_up(self, worker: str) -> None:
        """A worker was killed, and its actor will not start again."""
        state = self._workers[worker]
        self._blame(state)
        state.is_gone = True

    def say(self, line: str) -> None:
        """Something is worth telling the user, who may be on a machine that is none of the cluster's."""
        self._said.append(line)

    def snapshot(self, patience: float) -> Snapshot:
        """How far the work has come.

        Args:
            patience: seconds after which a worker is silent.
        """
        now = self._clock()
        at_work = {name: state for name, state in self._workers.items() if not state.is_gone}
        silent = [
            SilentWorker(name, state.stage, state.handle, state.node, now - state.last_sign, _what(state))
            for name, state in at_work.items()
            if now - state.last_sign > patience and (state.parts or not state.is_ready)
        ]
        fractions = sum(sum(state.pairs.values()) for state in at_work.values())
        return Snapshot(
            pairs=sum(self._ended.values()) + fractions,
            tokens=sum(state.tokens for state in self._workers.values()),
            workers=len(at_work),
            silent=silent,
            failing_starts=max((state.starts for state in at_work.values() if not state.is_ready), default=0),
            refusals={
                name: f"{state.host}: {state.refusal[0]}"
                for name, state in at_work.items()
                if state.refusal and state.holds_back
            },
            said=list(self._said),
        )

    def _sign(self, worker: str) -> None:
        """Note a sign of life."""
        self._workers[worker].last_sign = self._clock()

    def _deaths(self, part: int) -> int:
        """How often workers have died or hung at a part."""
        return sum(state.died_at[part] for state in self._workers.values())

    def _count_failure(self, state: WorkerState, reason: str) -> None:
        """A worker has failed at a part; after several, its node is suspected."""
        if not state.failures:
            state.failing_since = self._clock()
        state.failures += 1
        if not self._is_suspect(state):
            return
        if state.node not in self._suspected:
            self.say(f"a worker on {state.host} fails at one part after another, and is given fewer: {reason}")
        self._suspected[state.node] = f"the last one failed at one part after another: {reason}"

    def _is_suspect(self, state: WorkerState) -> bool:
        """Whether a worker has failed at several parts in a row while others of its stage do not."""
        return state.failures >= IN_A_ROW and self._others_may_work(state, state.failing_since)

    def _pause(self, state: WorkerState) -> float:
        """Seconds for which who is suspected had better take no part: a broken device fails faster than others work."""
        return float(min(2.0 ** (state.failures - IN_A_ROW), LONGEST_PAUSE)) if self._is_suspect(state) else 0.0

    def _others_may_work(self, state: WorkerState, since: float) -> bool:
        """Whether another of a worker's stage neither holds back nor fails, or may start, some time after `since`."""
        there = [each for each in self._workers.values() if each.stage == state.stage and not each.is_gone]
        if any(each.refusal is None and each.failures < IN_A_ROW for each in there if each is not state):
            return True
        return len(there) < self._sizes[state.stage] and self._clock() - since < START_SECONDS

    def _blame(self, state: WorkerState) -> bool:
        """Blame the part that was on the engine; where none was, all that were being prepared.

        Returns:
            Whether there were any.
        """
        on_engine = [part for part, is_on_engine in state.parts.items() if is_on_engine]
        blamed = on_engine or list(state.parts)
        state.died_at.update(blamed)
        state.parts.clear()
        state.pairs.clear()
        return bool(blamed)


def _what(state: WorkerState) -> str:
    """What a worker was at when it was heard of last."""
    if not state.is_ready:
        return "loading its engine"
    on_engine = [part for part, is_on_engine in state.parts.items() if is_on_engine]
    return f"at part {on_engine[0]}" if on_engine else f"preparing part {min(state.parts)}"
