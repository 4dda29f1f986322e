"""How fast one worker is: a few seconds of its work, measured where it will be done."""

import platform
import resource
import sys
import time
from dataclasses import dataclass
from typing import Any

import numpy as np

from dpo_fast.batches import Batch, arrange, longest_row, make_batches
from dpo_fast.cluster.job import Job
from dpo_fast.cluster.room import ray_options
from dpo_fast.cluster.run import Gathered
from dpo_fast.errors import DpoFastError, InputError
from dpo_fast.loading import Engines
from dpo_fast.local import first_pairs
from dpo_fast.token_budget import tune_token_budget
from dpo_fast.token_cache import TokenCache

SECONDS = 5.0  # of scoring


@dataclass(frozen=True, slots=True)
class Measurement:
    """One worker, measured.

    Attributes:
        load_seconds: until the engines were loaded.
        tokenize_seconds: until the first part's tokens were there; of tokens that were made before, next to none.
        rows: of the data set, in the first part that has pairs.
        tokens: that the engines compute for this part, without padding.
        scored_tokens: that were computed while it was measured.
        score_seconds: that this took.
        peak_bytes: the most memory that the process has had.
        engine, precision: that scored.
        host: where.
    """

    load_seconds: float
    tokenize_seconds: float
    rows: int
    tokens: int
    scored_tokens: int
    score_seconds: float
    peak_bytes: int
    engine: str
    precision: str
    host: str

    @property
    def tokens_per_second(self) -> float:
        """What one worker's engines do."""
        return self.scored_tokens / self.score_seconds


def measure(job: Job, seconds: float = SECONDS) -> Measurement:
    """Load a job's engines in this process, and score some batches of its first part.

    Args:
        job: see there.
        seconds: of scoring, after a first batch that is not timed; the last batch is finished.

    Raises:
        InputError: bundle, data set or engine.
        EngineOutputError: the engine fails.
    """
    started = time.perf_counter()
    bundle = job.open_bundle()
    engines = Engines(bundle, job.open_engine)
    try:
        loaded = {role: engines.get(role) for role in job.computed}
        load_seconds = time.perf_counter() - started
        started = time.perf_counter()
        tokens = TokenCache(job.tokens)
        try:
            table, rows = first_pairs(tokens, job.parts)
        finally:
            tokens.close()
        tokenize_seconds = time.perf_counter() - started
        batches: dict[str, list[Batch]] = {}
        for role in job.computed:
            layout = bundle.manifest.models[role].layout
            arrangement = arrange(table, layout, min(job.token_budget, longest_row(layout, job.max_length)))
            batches[role] = list(make_batches(arrangement, job.token_budget))
        for role, engine in loaded.items():
            engine.score(batches[role][0])
        scored = 0
        started = time.perf_counter()
        for role, engine in loaded.items():
            end = time.perf_counter() + seconds / len(loaded)
            for batch in _spread(batches[role]):
                engine.score(batch)
                scored += batch.input_ids.size - batch.padding
                if time.perf_counter() > end:
                    break
        first = loaded[job.computed[0]]
        return Measurement(
            load_seconds,
            tokenize_seconds,
            rows,
            sum(batch.input_ids.size - batch.padding for each in batches.values() for batch in each),
            scored,
            time.perf_counter() - started,
            # KiB on Linux, bytes on macOS (getrusage(2) of each)
            resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024),
            first.name,
            first.precision,
            platform.node(),
        )
    finally:
        engines.close()


def measure_on_cluster(cluster: Gathered) -> Measurement:
    """The same by a worker of a cluster.

    Raises:
        As `measure`.
    """
    found: Measurement = _remotely(cluster, measure)
    return found


def measure_token_budget(cluster: Gathered) -> int:
    """The token budget at which a worker's engine is fastest.

    Raises:
        As `measure`.
    """
    found: int = _remotely(cluster, tuned)
    return found


def tuned(job: Job) -> int:
    """The same on this machine.

    Raises:
        As `measure`.
    """
    bundle = job.open_bundle()
    engines = Engines(bundle, job.open_engine)
    tokens = TokenCache(job.tokens)
    try:
        role = job.roles[0]
        layout = bundle.manifest.models[role].layout
        return tune_token_budget(engines.get(role), first_pairs(tokens, job.parts)[0], layout)
    finally:
        tokens.close()
        engines.close()


def _remotely(cluster: Gathered, function: Any) -> Any:
    """Call a function of a job in a process that has what a worker has.

    Raises:
        InputError: the function raised one of ours; the message is its.
    """
    import ray

    remote = ray.remote(max_retries=1)(_call).options(**ray_options(cluster.crew.resources))
    value, fault = ray.get(remote.remote(function, cluster.job))
    if fault is not None:
        raise InputError(fault)
    return value


def _call(function: Any, job: Job) -> tuple[Any, str | None]:
    """Errors of ours travel as text: not all of them can be pickled."""
    try:
        return function(job), None
    except DpoFastError as error:
        return None, str(error)


def _spread(batches: list[Batch]) -> list[Batch]:
    """The same batches, the long and the short ones mixed: whatever is done first says something of all."""
    return [batches[index] for index in np.random.default_rng(0).permutation(len(batches))]
