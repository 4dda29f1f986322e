"""A finished run of `dpo-fast evaluate` to the trackers: metrics, samples, report and plots."""

import re
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from dpo_fast.errors import MissingDependencyError
from dpo_fast.generation.files import SAMPLES, read_samples
from dpo_fast.run_folder import METRICS, read_metrics
from dpo_fast.trackers import check_trackers, report_to

METRIC = re.compile(r"eval_[\w/]+")
CHECKPOINT = re.compile(r"checkpoint-(\d+)")


def report_run(
    names: Sequence[str],
    run: Path,
    *,
    bundle: Path | None = None,
    step: int | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> dict[str, str]:
    """Report a finished run.

    Args:
        names: see `check_trackers`.
        run: the run's folder.
        bundle: that it was evaluated with, for the texts of a report that has to be written first.
        step: the trainer's; None takes it from the name of the policy's checkpoint (checkpoint-N), else 0.
        say: told where each tracker has put it.

    Returns:
        Where a person finds the run, by tracker.

    Raises:
        StorageError: the run cannot be read.
        UsageError, MissingDependencyError, TrackerError: as `dpo_fast.trackers.report_to`.
    """
    if not check_trackers(names):
        return {}
    metrics = read_metrics(run)
    with tempfile.TemporaryDirectory(prefix="dpo-fast-") as working:
        return report_to(
            names,
            metrics={name: value for name, value in metrics.items() if METRIC.fullmatch(name)},
            step=step_of(metrics["provenance"]) if step is None else step,
            samples=read_samples(run),
            artifacts=list(_files(run, metrics, bundle, Path(working), say)),
            run_name=run.resolve().name,
            say=say,
        )


def step_of(provenance: Mapping[str, Any]) -> int:
    """The trainer's step, from the name of the folder that the policy came from: checkpoint-N; else 0."""
    source = str(provenance.get("models", {}).get("policy", {}).get("source", ""))
    found = CHECKPOINT.fullmatch(source.rstrip("/").rpartition("/")[2])
    return int(found[1]) if found else 0


def _files(
    run: Path, metrics: Mapping[str, Any], bundle: Path | None, working: Path, say: Callable[[str], None]
) -> Iterator[Path]:
    """What goes with the numbers; report and plots are made where the run has none of its own."""
    from dpo_fast.report.images import accuracy_by_subset_png, margin_histogram_png
    from dpo_fast.report.write import FOLDER, PAGE, write_report

    yield run / METRICS
    if (run / SAMPLES).is_file():
        yield run / SAMPLES
    try:
        plots = working / "plots"
        plots.mkdir()
        margin_histogram_png(run, plots / "margin_histogram.png")
        if "groups" in metrics:
            accuracy_by_subset_png(run, plots / "accuracy_by_subset.png")
        yield plots
        page = run / PAGE
        if not page.is_file() or page.stat().st_mtime < (run / METRICS).stat().st_mtime:  # none, or an older run's
            page = write_report(run, working, bundle=bundle, report=say)
        yield from (path for path in (page, page.parent / FOLDER) if path.exists())
    except MissingDependencyError as error:
        say(f"the trackers get no report: {error}")
