"""Trackers: metrics, samples and files into a run at MLflow, W&B, Comet, Trackio or TensorBoard.

Each takes its settings from its own environment variables, such as MLFLOW_TRACKING_URI or WANDB_MODE; see its module. A
run that is open in this process, such as a trainer's, is joined and left open. What a tracker does not take stays on
disk, and stops no other tracker.
"""

import contextlib
import importlib
import importlib.util
import io
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from dpo_fast.errors import MissingDependencyError, TrackerError, UsageError
from dpo_fast.text import named_line, without_secrets
from dpo_fast.trackers.base import Tracker

# The classes, each in the module of its package's name. Comet comes last: once imported, it changes those of the others
# that are imported after it, to log on its own what they log.
TRACKERS = {
    "mlflow": "MlflowTracker",
    "wandb": "WandbTracker",
    "trackio": "TrackioTracker",
    "tensorboard": "TensorBoardTracker",
    "comet_ml": "CometTracker",
}
ALL, NONE = "all", "none"  # as Transformers' `report_to` has them


def check_trackers(names: Sequence[str]) -> list[str]:
    """The trackers that are meant, each once, in the order in which they are opened.

    Args:
        names: of trackers, also several with commas between them; "none", or "all" that are installed.

    Raises:
        UsageError: a name is not known.
        MissingDependencyError: a tracker is not installed.
    """
    wanted = list(dict.fromkeys(part.strip() for name in names for part in name.split(",")))
    unknown = [name for name in wanted if name not in (*TRACKERS, ALL, NONE)]
    if unknown:
        raise UsageError(f"--report-to {unknown[0]!r} is not known; choose from {', '.join((*TRACKERS, ALL, NONE))}")
    if len(wanted) > 1 and {ALL, NONE}.intersection(wanted):
        raise UsageError(f"--report-to {','.join(wanted)}: all and none stand alone")
    if wanted in ([], [NONE]):
        return []
    if wanted == [ALL]:
        wanted = [name for name in TRACKERS if _is_installed(name)] or list(TRACKERS)
    for name in wanted:
        if not _is_installed(name):
            raise MissingDependencyError(name, "trackers", f"--report-to {name}")
    return [name for name in TRACKERS if name in wanted]


def report_to(
    names: Sequence[str],
    *,
    metrics: Mapping[str, float],
    step: int | None = None,
    samples: Sequence[Mapping[str, Any]] | None = None,
    artifacts: Sequence[Path] = (),
    run_name: str | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> dict[str, str]:
    """Report once: open a run at each tracker, or join one that is open, and close what was opened.

    Args:
        names: see `check_trackers`.
        metrics: by TRL's names.
        step: the trainer's; None counts as 0.
        samples: rows of a table, with the same keys.
        artifacts: files, and folders with all that is in them.
        run_name: of a new run, where the tracker's environment variables name none.
        say: told where each tracker has put it.

    Returns:
        Where a person finds the run, by tracker.

    Raises:
        UsageError, MissingDependencyError: as `check_trackers`.
        TrackerError: a tracker failed; the others have everything.
    """
    reporter = Reporter(names, run_name=run_name)
    try:
        with reporter:
            reporter.report(metrics, step=step, samples=samples, artifacts=artifacts)
    finally:
        for name, place in reporter.places.items():
            say(f"{name}: {place}")
    return reporter.places


class Reporter:
    """Runs at some trackers, open from the first report to the last; to be used in a `with` block.

    Attributes:
        places: where a person finds the run, by tracker.
    """

    def __init__(self, names: Sequence[str], *, run_name: str | None = None) -> None:
        """Open, or join, a run at each tracker; one that fails is told of at the first report.

        Args:
            names: see `check_trackers`.
            run_name: of new runs, where the trackers' environment variables name none.

        Raises:
            UsageError, MissingDependencyError: as `check_trackers`.
        """
        self.places: dict[str, str] = {}
        self._trackers: dict[str, Tracker] = {}
        self._failures: dict[str, str] = {}
        for name in check_trackers(names):
            with self._apart(name):
                module = importlib.import_module(f"dpo_fast.trackers.{name}")
                tracker: Tracker = getattr(module, TRACKERS[name])(run_name)
                self._trackers[name] = tracker
                self.places[name] = without_secrets(tracker.place)

    def report(
        self,
        metrics: Mapping[str, float],
        *,
        step: int | None = None,
        samples: Sequence[Mapping[str, Any]] | None = None,
        artifacts: Sequence[Path] = (),
    ) -> None:
        """Log to every tracker; see `report_to`.

        Raises:
            TrackerError: some failed, and are left out from now on; the others have everything.
        """
        for name, tracker in list(self._trackers.items()):
            with self._apart(name):
                tracker.log(metrics, list(samples or ()), step or 0)
                tracker.log_files(artifacts)
        self._tell()

    def close(self) -> None:
        """Close the runs that were opened here.

        Raises:
            TrackerError: some failed, and nobody has been told.
        """
        for name, tracker in list(self._trackers.items()):
            with self._apart(name):
                del self._trackers[name]
                tracker.close(failed=False)
        self._tell()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.close()
        except TrackerError:
            if value is None:  # else that explains more
                raise

    @contextmanager
    def _apart(self, name: str) -> Iterator[None]:
        """What one tracker does: quietly, and its failure kept for later."""
        try:
            with _quiet():
                yield
        except Exception as error:  # whatever client, network and server come up with
            self._failures[name] = named_line(error)
            self.places.pop(name, None)
            tracker = self._trackers.pop(name, None)
            if tracker is not None:
                with contextlib.suppress(Exception), _quiet():
                    tracker.close(failed=True)

    def _tell(self) -> None:
        """Raise what has failed, once."""
        failures, self._failures = self._failures, {}
        if failures:
            reasons = "; ".join(f"{name} ({reason})" for name, reason in failures.items())
            raise TrackerError(
                f"not reported to {reasons}; all else is done: see to the tracker, then run the command again "
                f"with --report-to {','.join(failures)}"
            )


def _is_installed(name: str) -> bool:
    """Whether a package can be imported; a folder of its name, which trackers leave behind, is none."""
    spec = importlib.util.find_spec(name)
    return spec is not None and spec.origin is not None


@contextmanager
def _quiet() -> Iterator[None]:
    """Within the block, clients print nothing on standard output, which belongs to results, and log nothing."""
    disabled = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with redirect_stdout(io.StringIO()):
            yield
    finally:
        logging.disable(disabled)
