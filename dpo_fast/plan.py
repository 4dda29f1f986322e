"""What an evaluation would take: parts, tokens, time and memory, from a few seconds of it. Nothing is written."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from dpo_fast.bundle import Bundle
from dpo_fast.cluster.evaluate import job_of
from dpo_fast.cluster.measure import Measurement, measure, measure_on_cluster, measure_token_budget, tuned
from dpo_fast.cluster.run import gathered
from dpo_fast.engines.base import Engine
from dpo_fast.evaluation import EvaluateOptions, begin
from dpo_fast.local import known_token_budget


@dataclass(frozen=True, slots=True)
class Plan:
    """What an evaluation would take.

    Attributes:
        rows: of the data set, that are taken.
        parts: that these are.
        parts_there: that an earlier start of the run has written; the rest is to be scored.
        tokens: that engines have to compute for the rest, without padding, if all parts are like the first one.
        token_budget: of the batches, in tokens.
        workers: for each stage: one stage where policy and reference are in memory together, two where apart.
        resources_per_worker: by Ray's names; empty for this process.
        nodes: names of the machines with room for workers.
        engine, precision: that would score.
        tokens_per_second: of one worker, measured.
        load_seconds: of one worker, measured, until its engines were loaded.
        expected_seconds: until all parts are scored; see `expect`.
        memory_bytes: the most that a worker's process has had while it was measured, on the processor's side.
    """

    rows: int
    parts: int
    parts_there: int
    tokens: int
    token_budget: int
    workers: list[int]
    resources_per_worker: dict[str, float]
    nodes: list[str]
    engine: str
    precision: str
    tokens_per_second: float
    load_seconds: float
    expected_seconds: float
    memory_bytes: int


def plan(
    bundle: Path,
    dataset: str,
    output: Path,
    options: EvaluateOptions = EvaluateOptions(),
    engine: Callable[[Bundle, str], Engine] | None = None,
) -> Plan:
    """Plan an evaluation: open everything as it would, and measure one worker for a few seconds.

    Args:
        bundle: what `dpo_fast.export` wrote.
        dataset: a file, a folder or a Hub id.
        output: the run's folder.
        options: see `EvaluateOptions`.
        engine: opens a role's engine; the recipe's by default.

    Raises:
        As `evaluate`, for what would stop it before the first part.
    """
    with begin(bundle, dataset, output, options, engine, is_plan=True) as evaluation:
        job = job_of(evaluation)
        there = len(set(job.parts) & set(job.store.parts())) if not options.overwrite else 0
        budget = known_token_budget(options, evaluation.bundle, job.store, job.parts)
        if options.cluster is None:
            job = replace(job, token_budget=budget or tuned(job))
            measured = measure(job)
            workers, resources, nodes = [1], {}, [str(measured.host)]
        else:
            with gathered(job, options.cluster, options.engines) as cluster:
                job = replace(cluster.job, token_budget=budget or measure_token_budget(cluster))
                measured = measure_on_cluster(replace(cluster, job=job))
                workers, resources = list(cluster.crew.sizes), dict(cluster.crew.resources)
                nodes = [node.host for node in cluster.nodes]
        parts, rows = len(job.parts), sum(stop - start for start, stop in job.parts.values())
        tokens_a_part = measured.tokens / measured.rows * rows / parts
        return Plan(
            rows=rows,
            parts=parts,
            parts_there=there,
            tokens=round(tokens_a_part * (parts - there)),
            token_budget=job.token_budget,
            workers=workers,
            resources_per_worker=resources,
            nodes=nodes,
            engine=measured.engine,
            precision=measured.precision,
            tokens_per_second=measured.tokens_per_second,
            load_seconds=measured.load_seconds,
            expected_seconds=expect(measured, tokens_a_part, rows / parts, parts - there, sum(workers)),
            memory_bytes=measured.peak_bytes,
        )


def expect(measured: Measurement, tokens_a_part: float, rows_a_part: float, parts: int, workers: int) -> float:
    """Seconds until all parts are scored.

    Workers load at the same time, and then take as many parts each, rounded up; while one part is on the engine the
    next one's tokens are made, so a part takes the longer of the two::

        load + first part's tokens + ceil(parts / workers) * max(tokens / (tokens/s), seconds to tokenise)

    Args:
        measured: one worker.
        tokens_a_part: that engines compute for a part, without padding.
        rows_a_part: of the data set.
        parts: to be scored.
        workers: that score them.
    """
    on_engine = tokens_a_part / measured.tokens_per_second
    tokenise = measured.tokenize_seconds * rows_a_part / measured.rows
    return measured.load_seconds + tokenise + -(-parts // workers) * max(on_engine, tokenise)
