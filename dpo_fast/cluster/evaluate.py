"""An evaluation by a cluster's workers: what `dpo_fast.local` does in one process."""

import json
import os
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

from dpo_fast.bundle import MANIFEST
from dpo_fast.cluster.job import Job
from dpo_fast.cluster.measure import measure_token_budget
from dpo_fast.cluster.options import ClusterOptions
from dpo_fast.cluster.run import FailedPart, Gathered, gathered, score_on_cluster
from dpo_fast.errors import PartsFailedError
from dpo_fast.evaluation import Evaluation
from dpo_fast.files import sha256, write_text
from dpo_fast.local import known_token_budget, no_usable_row
from dpo_fast.progress import Progress
from dpo_fast.run_folder import FAILED, remove_run
from dpo_fast.scoring import ScoredRun
from dpo_fast.storage import LocalFolder
from dpo_fast.store import ScoreStore

PASSED_ON = ("DPO_FAST_CACHE",)
NAMED = 5  # failed parts in a message


def score_with_workers(evaluation: Evaluation, options: ClusterOptions, report: Callable[[str], None]) -> ScoredRun:
    """Score what is missing of a run's parts.

    Args:
        evaluation: see there.
        options: where the cluster is, and what of it is taken.
        report: called with a line where something is worth saying.

    Raises:
        InputError: bundle, data set, options, cluster or disk.
        PartsFailedError: some parts failed each time; all others are done.
        CheckFailedError: nothing works.
        InterruptedRunError: Ctrl-C or SIGTERM; the parts that were finished are kept.
    """
    began = time.perf_counter()
    job = job_of(evaluation)
    with gathered(job, options, evaluation.options.engines) as cluster:
        evaluation.prepare_store(job.parts)  # not before there is somebody who can do the work
        budget = known_token_budget(evaluation.options, evaluation.bundle, job.store, job.parts)
        budget = budget or measure_token_budget(cluster)
        cluster = replace(cluster, job=replace(cluster.job, token_budget=budget))
        report(in_words(cluster))
        started = time.perf_counter()
        rows = sum(stop - start for start, stop in job.parts.values())
        with Progress(rows, shown=evaluation.options.progress) as progress:
            scores = score_on_cluster(cluster, evaluation.stop, progress, report)
        score_seconds = time.perf_counter() - started
    if scores.failed:
        _say_failed(evaluation.output / FAILED, scores.failed, len(job.parts))
    if len(scores.account.skipped) == rows:
        remove_run(evaluation.output, evaluation.store)
        raise no_usable_row(job.tokens.data, rows, scores.account.skipped[0])
    return ScoredRun(
        account=scores.account,
        data=job.tokens.data,
        rows=job.tokens.rows,
        engine=scores.engine,
        precision=scores.precision,
        token_budget=budget,
        engines=cluster.engines,
        load_seconds=started - began,
        tokenize_seconds=0.0,  # beside the scoring, by the workers
        score_seconds=score_seconds,
        cluster={
            "workers": scores.workers,
            "resources_per_worker": dict(cluster.crew.resources),
            "nodes": [{"host": node.host, **node.hardware} for node in cluster.nodes],
        },
    )


def job_of(evaluation: Evaluation) -> Job:
    """An evaluation, as workers are told of it: with whole paths, for they have working folders of their own.

    Raises:
        InputError: data set or options.
    """
    options, bundle = evaluation.options, evaluation.bundle
    bundle = replace(bundle, folder=bundle.folder.absolute())
    dataset = evaluation.dataset
    is_here = dataset and os.path.exists(dataset)  # noqa: PTH110 - Path.exists raises at a name that is too long
    evaluation = replace(evaluation, bundle=bundle, dataset=str(Path(dataset).absolute()) if is_here else dataset)
    tokens = evaluation.find_tokens()
    storage = evaluation.store.storage
    return Job(
        bundle=bundle.folder,
        bundle_sha256=sha256(bundle.folder / MANIFEST),
        tokens=tokens,
        store=ScoreStore(storage.folder.absolute() if isinstance(storage, LocalFolder) else storage),
        parts=evaluation.parts(tokens.rows),
        roles=tuple(evaluation.roles),
        token_budget=int(bundle.manifest.recipe["token_budget"]),
        max_length=evaluation.max_length,
        reference_scores=options.reference_scores.absolute() if options.reference_scores is not None else None,
        threads=options.threads,
        recipe_engine=bundle.manifest.recipe["engine"],
        environment={name: os.environ[name] for name in PASSED_ON if name in os.environ},
        engine=evaluation.engine,
    )


def in_words(cluster: Gathered) -> str:
    """Who will do what, in a line."""
    crew, job = cluster.crew, cluster.job
    takes = ", ".join(f"{name} {amount:g}" for name, amount in crew.resources.items())
    who = f"{sum(crew.sizes)} workers" if sum(crew.sizes) > 1 else "1 worker"
    if len(crew.sizes) > 1:
        who += f" ({crew.sizes[0]} for the reference, {crew.sizes[1]} for the policy)"
    hosts = f"{len(cluster.nodes)} nodes" if len(cluster.nodes) > 1 else "1 node"
    where = f"Ray's dashboard: http://{cluster.dashboard}" if cluster.dashboard else (
        "Ray's dashboard comes with ray[default]"
    )  # fmt: skip
    parts = f"{len(job.parts):,} parts" if len(job.parts) > 1 else "1 part"
    return f"{parts} for {who} ({takes} each) on {hosts}; {where}"


def _say_failed(path: Path, failed: list[FailedPart], parts: int) -> None:
    """Write the parts that failed, and raise.

    Raises:
        PartsFailedError: always.
    """
    write_text(path, "".join(json.dumps(asdict(each)) + "\n" for each in failed))
    named = "; ".join(
        f"part {each.part}, rows {each.rows[0]} to {each.rows[1]}: {each.reason}" for each in failed[:NAMED]
    )
    more = f"; and {len(failed) - NAMED} more" if len(failed) > NAMED else ""
    raise PartsFailedError(
        f"{len(failed)} of {parts} parts failed each time ({named}{more}); all others are done, and {path} has the "
        "list: mend the cause, and run the same command again: it goes on"
    )
