"""Hand out a run's parts until each has an outcome; whoever is silent for too long is killed.

One pass hands out what is missing. Ray repeats the parts of a worker that dies; what is lost all the same, or fails,
is handed out again in the next pass, to new workers, within `attempts`.
"""

import threading
import time
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, field
from queue import Empty, Queue
from typing import TYPE_CHECKING, Any
from uuid import uuid4

from dpo_fast.cluster.connection import COLLECT, nodes
from dpo_fast.cluster.job import Job
from dpo_fast.cluster.ledger import SilentWorker, Snapshot
from dpo_fast.cluster.outcome import Outcome
from dpo_fast.cluster.room import ray_options
from dpo_fast.cluster.worker import PartWorker
from dpo_fast.errors import CheckFailedError, InputError
from dpo_fast.text import said_by

if TYPE_CHECKING:
    import ray.data

LARGEST_HAND_OUT = 10_000  # pieces of work that Ray Data is given at once; more parts share one
IN_FLIGHT = 2  # parts of a worker: one on the engine, one being prepared
LOOK_SECONDS = 0.5  # between two looks at the ledger
END_SECONDS = 10.0  # for the threads of a pass to end
JOIN_SECONDS = 0.1  # between two looks at them
GRACE_SECONDS = 5.0  # for a worker whose node is lost to start on another one
ALL_FAIL = 8  # parts a worker may fail at, one after another and from the start, before the run is given up


@dataclass(frozen=True, slots=True)
class Crew:
    """Who does the work.

    Attributes:
        sizes: workers by stage.
        resources: of one worker, by Ray's names.
        patience: seconds without a sign of life after which a worker is taken for dead.
        attempts: how often a part is tried.
    """

    sizes: Sequence[int]
    resources: Mapping[str, float]
    patience: float
    attempts: int


@dataclass(slots=True)
class _Watch:
    """Looks for workers that are silent, and kills them.

    Attributes:
        ledger: the handle of its actor.
        crew: see there.
        killed: when, by worker.
        refused: workers that hold back, as was said.
        lost: since when a worker's node is missed.
        given_up: by stage, how many workers were given up in this pass.
    """

    ledger: Any
    crew: Crew
    killed: dict[str, float] = field(default_factory=dict)
    refused: set[str] = field(default_factory=set)
    lost: dict[str, float] = field(default_factory=dict)
    given_up: Counter[int] = field(default_factory=Counter)

    def begin_pass(self, sizes: Sequence[int]) -> None:
        """New workers are expected, as many by stage; none of them is given up."""
        import ray

        ray.get(self.ledger.begin_pass.remote(sizes))
        self.given_up.clear()

    def look(self) -> None:
        """Kill the silent, give up those that cannot come back.

        Raises:
            CheckFailedError: workers die as they start, again and again.
        """
        import ray

        snapshot: Snapshot = ray.get(self.ledger.snapshot.remote(min(GRACE_SECONDS, self.crew.patience)))
        if snapshot.failing_starts > self.crew.attempts:
            raise CheckFailedError(
                f"a worker died {self.crew.attempts} times as it loaded its engine; is there memory for it? Lower "
                "--workers, or give each more with --resources-per-worker; Ray's logs are in /tmp/ray. Does it take "
                f"more than {self.crew.patience:g} seconds to load, for which it is killed? Raise --worker-timeout"
            )
        for name in snapshot.refusals.keys() - self.refused:
            _say(self.ledger, f"a worker holds back on {snapshot.refusals[name]}")
            self.refused.add(name)
        now = time.monotonic()
        there = {node.id for node in nodes()} if snapshot.silent else set()
        for worker in snapshot.silent:
            if worker.node not in there:
                self._lose(worker, now)
            elif worker.seconds > self.crew.patience:
                self._kill(worker, now)

    def _lose(self, worker: SilentWorker, now: float) -> None:
        """Give up a worker whose node is lost, if it has had the time to start on another one."""
        since = self.lost.setdefault(worker.worker, now)
        if now - since > GRACE_SECONDS:
            _say(self.ledger, f"a node was lost, and the worker that was {worker.what} with it")
            self._give_up(worker)

    def _kill(self, worker: SilentWorker, now: float) -> None:
        """Kill a worker that hangs; if it does not come back, give it up."""
        import ray

        before = self.killed.get(worker.worker)
        if before is None or now - before > worker.seconds:  # it has been heard of since
            _say(
                self.ledger,
                f"a worker was silent for {worker.seconds:.0f} seconds, {worker.what}: killed, and started again",
            )
            self.killed[worker.worker] = now
            ray.kill(worker.handle, no_restart=False)
        elif now - before > self.crew.patience:
            self._give_up(worker)

    def _give_up(self, worker: SilentWorker) -> None:
        """Kill a worker for good; its parts come in the next pass."""
        import ray

        ray.get(self.ledger.give_up.remote(worker.worker))
        ray.kill(worker.handle, no_restart=True)
        self.given_up[worker.stage] += 1


def drive(
    job: Job,
    crew: Crew,
    ledger: Any,
    is_cancelled: Callable[[], bool] = lambda: False,
) -> dict[int, Outcome]:
    """Score all parts of a job.

    Args:
        job: see there.
        crew: see there.
        ledger: the handle of its actor; it is also told of what is worth saying.
        is_cancelled: asked now and then.

    Returns:
        What came of each part; of those that failed as often as they were tried, why.

    Raises:
        InputError: the user's input is at fault, as a worker found out.
        CheckFailedError: nothing works.
    """
    import ray

    done: dict[int, Outcome] = {}
    failed: dict[int, Outcome] = {}
    watch = _Watch(ledger, crew)
    for attempt in range(crew.attempts):
        refused: set[int] = ray.get(ledger.refused.remote())
        missing = [part for part in job.parts if part not in done and part not in refused]
        if not missing or is_cancelled():
            break
        if attempt:
            _say(ledger, f"parts that failed or were lost, and are handed out again: {len(missing)}")
        with closing(_hand_out(job, crew, ledger, missing, watch, is_cancelled)) as outcomes:
            for outcome in outcomes:
                if outcome.reason is None:
                    done[outcome.part] = outcome
                    failed.pop(outcome.part, None)
                    continue
                if outcome.is_fatal:
                    raise InputError(outcome.reason)
                failed[outcome.part] = outcome
                if not done and len(failed) >= ALL_FAIL * sum(crew.sizes):
                    raise CheckFailedError(f"the first {len(failed)} parts all failed: {outcome.reason}")
    for part in job.parts:
        if part not in done and part not in failed:
            failed[part] = Outcome(part, reason="its workers died, hung or were lost each time")
    return done | failed


def _say(ledger: Any, line: str) -> None:
    """Tell the user, wherever that is."""
    import ray

    ray.get(ledger.say.remote(line))


def _hand_out(
    job: Job, crew: Crew, ledger: Any, parts: Sequence[int], watch: _Watch, is_cancelled: Callable[[], bool]
) -> Generator[Outcome]:
    """Hand out parts once; those that are lost have no outcome."""
    sizes = [min(size, len(parts)) for size in crew.sizes]
    watch.begin_pass(sizes)
    found: Queue[Outcome | BaseException | None] = Queue()
    rows = _pipeline(job, sizes, crew.resources, ledger, parts)

    def collect() -> None:
        """Ray Data waits without an end for what does not come, so it does that in a thread."""
        try:
            for row in rows.iter_rows():
                found.put(Outcome.from_json(row["outcome"]))
        except BaseException as error:
            found.put(error)
        else:
            found.put(None)

    collecting = threading.Thread(target=collect, name=COLLECT, daemon=True)
    collecting.start()
    looked = time.monotonic()
    try:
        while not is_cancelled():
            if time.monotonic() - looked >= LOOK_SECONDS:
                watch.look()
                looked = time.monotonic()
                if any(watch.given_up[stage] >= size for stage, size in enumerate(sizes)):
                    return  # Ray Data starts no others in their place
            try:
                item = found.get(timeout=LOOK_SECONDS)
            except Empty:
                continue
            if item is None:
                return
            if isinstance(item, BaseException):
                raise CheckFailedError(f"Ray Data stopped: {said_by(item)}") from item
            yield item
    finally:
        _end(rows, collecting)


def _end(rows: "ray.data.Dataset", collecting: threading.Thread) -> None:
    """End what Ray Data is at, and wait for its threads, but not for ever: a cluster may be lost, and silent.

    A thread that asks something of a connection as it ends has Ray end the whole process, without a word and with exit
    code 1 (`CoreWorkerProcess::GetCoreWorker` in src/ray/core_worker/core_worker_process.cc).
    """
    from ray.data._internal.execution.streaming_executor import StreamingExecutor

    end = time.monotonic() + END_SECONDS
    while time.monotonic() < end:
        # Who collects may be about to start an executor, so both are looked for until neither is left.
        executors = [
            thread
            for thread in threading.enumerate()
            if isinstance(thread, StreamingExecutor) and f"-{rows.name}_" in thread.name
        ]
        if not executors and not collecting.is_alive():
            return
        for executor in executors:
            with suppress(Exception):  # of a cluster that is gone
                executor.shutdown(force=False)  # by force, it waits without an end for what is lost
        for thread in (*executors, collecting):
            thread.join(JOIN_SECONDS)


def _pipeline(
    job: Job, sizes: Sequence[int], resources: Mapping[str, float], ledger: Any, parts: Iterable[int]
) -> "ray.data.Dataset":
    """Parts as a data set of a name of its own, mapped by each stage's workers."""
    import ray.data

    rows = [{"part": part} for part in parts]
    data = ray.data.from_items(rows, override_num_blocks=min(len(rows), LARGEST_HAND_OUT))
    data.context.enable_progress_bars = False
    data.context.max_errored_blocks = -1  # of a worker that was given up; they come in the next pass
    data.context.execution_no_progress_timeout_s = -1  # a part may take hours; `_Watch` looks for who is silent
    for stage, size in zip(job.stages(apart=len(sizes) > 1), sizes, strict=True):
        data = data.map_batches(
            PartWorker,
            fn_constructor_args=(job, stage, ledger),
            batch_size=1,
            batch_format="pyarrow",
            compute=ray.data.ActorPoolStrategy(
                size=size,
                max_tasks_in_flight_per_actor=IN_FLIGHT,
                max_concurrent_calls_per_actor=IN_FLIGHT,
                enable_true_multi_threading=True,
            ),
            **ray_options(resources),
        )
    data.set_name(f"parts-{uuid4().hex}")
    return data
