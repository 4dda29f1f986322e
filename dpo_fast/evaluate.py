"""The main job: a preference set through a bundle's engines, to metrics.

rows -> tokens -> batches -> engine -> scores -> metrics, each in its own module; this one only hands on.
"""

import os
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from dpo_fast.bundle import POLICY, Bundle
from dpo_fast.engines.base import Engine
from dpo_fast.errors import InputError, InterruptedRunError
from dpo_fast.evaluation import EvaluateOptions, Evaluation, begin, settings_of
from dpo_fast.interrupts import Stop
from dpo_fast.local import score_locally
from dpo_fast.metrics.sums import sum_tokens
from dpo_fast.metrics.tally import metrics_of_parts
from dpo_fast.provenance import hardware, versions
from dpo_fast.publish.card import write_card
from dpo_fast.run_folder import METRICS, SKIPPED, check_parts, write_results
from dpo_fast.scoring import ScoredRun
from dpo_fast.types import PairScores

__all__ = ["METRICS", "SKIPPED", "EvaluateOptions", "evaluate"]


def evaluate(
    bundle: Path,
    dataset: str,
    output: Path,
    options: EvaluateOptions = EvaluateOptions(),
    report: Callable[[str], None] = lambda step: None,
    engine: Callable[[Bundle, str], Engine] | None = None,
) -> dict[str, Any]:
    """Score a preference set with a bundle, and write the run.

    A run goes on where it was: parts that were written from the same tokens, weights and engine are kept.

    Args:
        bundle: what `dpo_fast.export` wrote.
        dataset: a file, a folder or a Hub id.
        output: the run's folder.
        options: see `EvaluateOptions`.
        report: called with a line where something is worth saying.
        engine: opens a role's engine; the recipe's by default. For a cluster it has to be importable there.

    Returns:
        The content of metrics.json.

    Raises:
        InputError: bundle, data set, options or disk; the message says what to do.
        EngineOutputError: an engine returned what cannot be right.
        PartsFailedError: on a cluster, some parts failed each time; all others are done.
        InterruptedRunError: Ctrl-C or SIGTERM; the parts that were finished are kept.
    """
    began = time.perf_counter()
    with begin(bundle, dataset, output, options, engine) as evaluation:
        if options.cluster is None:
            scored = score_locally(evaluation)
        else:
            from dpo_fast.cluster.evaluate import score_with_workers

            scored = score_with_workers(evaluation, options.cluster, report)
        # Another driver, or the workers of one that was killed, may have written to the same place.
        parts, fingerprints = evaluation.parts(scored.rows), dict(scored.account.parts)
        check_parts(evaluation.store, parts)
        evaluation.store.finish()

        started = time.perf_counter()
        scores = evaluation.store.read({part: fingerprints[part] for part in parts})
        metrics = metrics_of(_until_stopped(scores, evaluation.stop), options)
        metrics["counts"]["skipped"] = len(scored.account.skipped)
        metrics["timing"] = {
            "load_seconds": scored.load_seconds,
            "tokenize_seconds": scored.tokenize_seconds,
            "score_seconds": scored.score_seconds,
            "metrics_seconds": time.perf_counter() - started,
            "total_seconds": time.perf_counter() - began,
        }
        metrics["provenance"] = _provenance(evaluation, scored)
        write_results(output, metrics, scored.account.skipped)
    if options.shard is None:  # a share of a set is not what a card is asked for
        _update_card(evaluation.bundle, metrics, report)
    return metrics


def metrics_of(scores: Iterable[PairScores], options: EvaluateOptions) -> dict[str, Any]:
    """The metrics of all of a run's parts.

    Args:
        scores: of each part, in order.
        options: see `EvaluateOptions`.

    Raises:
        UsageError: the settings are so extreme that a metric overflows.
    """
    return metrics_of_parts(
        map(sum_tokens, scores),
        options.loss,
        aggregate=options.aggregate,
        batch_size=options.batch_size,
        seed=options.seed,
    )


def _until_stopped(scores: Iterable[PairScores], stop: Stop) -> Iterator[PairScores]:
    """The same, as long as nobody wants it to end.

    Raises:
        InterruptedRunError: `stop` said so.
    """
    for part in scores:
        if stop.signal is not None:
            raise InterruptedRunError(
                stop.signal,
                f"{stop.signal.name}: stopped with all parts scored: run the same command again, without --overwrite, "
                "for the metrics",
            )
        yield part


def _provenance(evaluation: Evaluation, scored: ScoredRun) -> dict[str, Any]:
    """What the numbers were made from; local paths are cut to their last part, since runs are published."""
    bundle, data, account = evaluation.bundle, scored.data, scored.account
    # "." has no last part, and resolve() would give the name of what a link leads to.
    local = Path(os.path.abspath(data.name))  # noqa: PTH100
    return {
        "versions": versions(),
        "hardware": hardware(),
        "engine": scored.engine,
        "precision": scored.precision,
        "recipe": bundle.manifest.recipe["name"],
        "models": {
            role: {
                "source": entry.source,
                "revision": entry.revision,
                "layout": entry.layout,
                "weights_and_graph_sha256": bundle.role_hashes(role),
            }
            for role, entry in bundle.manifest.models.items()
            if role in evaluation.roles
        },
        "dataset": {
            "name": local.name if local.exists() else data.name,
            "split": data.split,
            "fingerprint": data.fingerprint,
            "rows": scored.rows,
        },
        **settings_of(evaluation.options),
        "max_length": evaluation.max_length,
        "token_budget": scored.token_budget,
        "engines": scored.engines,
        "computed_tokens": account.tokens,
        "padding_tokens": account.padding,
        "this_process": {
            "scored_pairs": account.scored_pairs,
            "computed_tokens": account.computed_tokens,
            "pairs_with_known_reference_scores": account.found_reference_scores,
            "engine_seconds": account.engines,
            "waited_for_disk_seconds": account.waited_for_disk,
        },
        **({"cluster": scored.cluster} if scored.cluster else {}),
    }


def _update_card(bundle: Bundle, metrics: dict[str, Any], report: Callable[[str], None]) -> None:
    """Put the numbers on the policy's model card; a bundle that cannot be written keeps its old card."""
    try:
        write_card(bundle.model_folder(POLICY), metrics, base_model=bundle.base_model)
    except InputError as error:
        report(f"the model card was not updated: {error}")
