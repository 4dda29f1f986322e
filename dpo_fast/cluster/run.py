"""A run on a cluster, as the driver's machine sees it: connect, look around, hand out, show how far it is."""

import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass, replace
from threading import Event
from typing import Any

from dpo_fast.cluster.connection import CLIENT, HEAD, connected, nodes
from dpo_fast.cluster.drive import Crew, drive
from dpo_fast.cluster.job import Job
from dpo_fast.cluster.ledger import Ledger, Snapshot
from dpo_fast.cluster.look_around import Sight, look_around
from dpo_fast.cluster.options import ClusterOptions
from dpo_fast.cluster.outcome import Outcome
from dpo_fast.cluster.room import count_workers, engine_threads, room_for, worker_resources
from dpo_fast.errors import CheckFailedError, DpoFastError, InterruptedRunError, UsageError
from dpo_fast.interrupts import Stop
from dpo_fast.progress import Progress
from dpo_fast.scoring import Account

SHOW_SECONDS = 0.5  # between two looks at how far it is
PATIENCE_FOR_A_START = 60.0  # seconds without any worker, after which that is said


@dataclass(frozen=True, slots=True)
class FailedPart:
    """A part that failed as often as it was tried.

    Attributes:
        part: its number.
        rows: the data set's rows that it covers, counted from 1: the first and the last.
        reason: of the last time.
    """

    part: int
    rows: tuple[int, int]
    reason: str


@dataclass(frozen=True, slots=True)
class Gathered:
    """A cluster that is connected, and has what a job needs.

    Attributes:
        job: as its workers get it.
        crew: who will do it.
        nodes: machines with room for workers.
        dashboard: Ray's, if it runs.
        is_client: whether this process is none of the cluster's.
    """

    job: Job
    crew: Crew
    nodes: list[Sight]
    dashboard: str | None
    is_client: bool

    @property
    def engines(self) -> str:
        """Whether a worker has policy and reference "together", or workers of their own have them, "apart"."""
        return "together" if len(self.crew.sizes) == 1 else "apart"


@dataclass(frozen=True, slots=True)
class ClusterScores:
    """What a cluster has made of a job.

    Attributes:
        account: of all workers together.
        engine, precision: that scored.
        workers: what each worker has done, as JSON has it.
        failed: parts that could not be scored.
    """

    account: Account
    engine: str
    precision: str
    workers: list[dict[str, Any]]
    failed: list[FailedPart]


@contextmanager
def gathered(job: Job, options: ClusterOptions, engines: str) -> Iterator[Gathered]:
    """Connect to a cluster, and see that a job can be done there.

    Args:
        job: see there.
        options: where the cluster is, and what of it is taken.
        engines: "together", "apart", or "auto": apart where a node lacks the memory for both.

    Raises:
        MissingDependencyError: Ray is not installed.
        UsageError: no cluster answers, there is no room, or a node lacks something.
    """
    with connected(options.address) as dashboard:
        there = nodes()
        resources = worker_resources(options, job.recipe_engine, there)
        workers = count_workers(options, resources, there, len(job.parts))
        computing = [node for node in there if room_for(resources, [node])]
        job = replace(job, threads=job.threads or engine_threads(resources))
        sights = look_around(job, computing)
        fits = all(sight.fits for sight in sights)
        apart = len(job.computed) > 1 and (engines == "apart" or (engines == "auto" and not fits))
        sizes = [workers]
        if apart:
            room = room_for(resources, computing)
            if room < 2 or options.workers == 1:
                raise UsageError("policy and reference in workers of their own need two at least: raise --workers")
            both = max(2, min(options.workers or room, room))
            sizes = [both // 2, both - both // 2]
        crew = Crew(sizes, resources, options.patience, options.attempts)
        yield Gathered(job, crew, sights, dashboard, options.address.startswith(CLIENT))


def score_on_cluster(cluster: Gathered, stop: Stop, progress: Progress, report: Callable[[str], None]) -> ClusterScores:
    """Score all parts of a job.

    Args:
        cluster: from `gathered`.
        stop: looked at now and then.
        progress: told how far all workers are.
        report: called with a line where something is worth saying.

    Raises:
        InputError: the user's input is at fault.
        CheckFailedError: nothing works.
        InterruptedRunError: `stop` said so; the parts that were finished are kept.
    """
    import ray

    job, crew = cluster.job, cluster.crew
    ledger = ray.remote(Ledger).options(num_cpus=0, resources={HEAD: 0.001}).remote(crew.attempts)
    stopped = Event()
    try:
        with ThreadPoolExecutor(1, "drive") as threads:
            if cluster.is_client:  # Ray Data runs where the cluster is
                far = ray.remote(num_cpus=0, max_retries=0, resources={HEAD: 0.001})(drive).remote(job, crew, ledger)
                driving = threads.submit(_answer, far)
            else:
                driving = threads.submit(drive, job, crew, ledger, stopped.is_set)
            try:
                outcomes = _follow(driving, ledger, stop, progress, report, job)
            finally:
                stopped.set()
                if cluster.is_client:
                    ray.cancel(far)
    finally:
        ray.kill(ledger)  # without which no worker begins another part
    return _put_together(job, outcomes)


def _answer(far: Any) -> dict[int, Outcome]:
    """What the driving in the cluster came to.

    Raises:
        DpoFastError: as it was raised there; Ray's own has the whole traceback for its text.
    """
    import ray

    try:
        outcomes: dict[int, Outcome] = ray.get(far)
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, DpoFastError):
            raise error.cause from error
        raise
    return outcomes


def _follow(
    driving: "Future[dict[int, Outcome]]",
    ledger: Any,
    stop: Stop,
    progress: Progress,
    report: Callable[[str], None],
    job: Job,
) -> dict[int, Outcome]:
    """Show how far the work is until it is done.

    Raises:
        InterruptedRunError: `stop` said so.
        What the driving raises.
    """
    import ray

    began, is_waiting, told = time.monotonic(), True, 0
    while True:
        done, _ = wait([driving], timeout=SHOW_SECONDS)
        snapshot: Snapshot = ray.get(ledger.snapshot.remote(0.0))
        progress.set(snapshot.pairs, snapshot.tokens)
        for line in snapshot.said[told:]:
            report(line)
        told = len(snapshot.said)
        if done:
            return driving.result()
        if stop.signal is not None:
            raise InterruptedRunError(
                stop.signal,
                f"{stop.signal.name}: stopped with {snapshot.pairs:,.0f} pairs scored; what is finished is in "
                f"{job.store.name}: run the same command again, without --overwrite, to go on",
            )
        if is_waiting and snapshot.workers:
            is_waiting = False
        elif is_waiting and time.monotonic() - began > PATIENCE_FOR_A_START:
            report("no worker has started yet: is the cluster busy with something else?")
            is_waiting = False


def _put_together(job: Job, outcomes: Mapping[int, Outcome]) -> ClusterScores:
    """The outcomes of all parts as one.

    Raises:
        CheckFailedError: workers had different engines, so their numbers are not those of one run.
    """
    account = Account()
    failed = []
    engines: dict[tuple[str, str], str] = {}
    workers: dict[str, dict[str, Any]] = {}
    for part in sorted(outcomes):
        outcome = outcomes[part]
        account.add(outcome.account)
        if outcome.reason is not None:
            first, end = job.parts[part]
            failed.append(FailedPart(part, (first + 1, end), outcome.reason))
            continue
        engines.setdefault((outcome.engine, outcome.precision), outcome.host)
        worker = workers.setdefault(
            outcome.worker,
            {"host": outcome.host, "parts": 0, "scored_pairs": 0, "computed_tokens": 0, "engine_seconds": 0.0},
        )
        worker["parts"] += 1
        for name, value in (
            ("scored_pairs", outcome.account.scored_pairs),
            ("computed_tokens", outcome.account.computed_tokens),
            ("engine_seconds", outcome.account.engines),
        ):
            worker[name] += value
    if len(engines) > 1:
        different = "; ".join(f"{engine} {precision} on {host}" for (engine, precision), host in engines.items())
        raise CheckFailedError(f"workers scored with different engines: {different}; install the same on all nodes")
    engine, precision = next(iter(engines), ("", ""))
    in_order = [workers[name] for name in sorted(workers, key=lambda name: (workers[name]["host"], name))]
    return ClusterScores(account, engine, precision, in_order, failed)
