"""Score a training's checkpoints as they appear, each once, by refits of one bundle.

::

    look: checkpoint-100 … ──whole, and the same as at the last look?──▶ refit ──▶ evaluate ──▶ watch.json, watch.html
     ▲                                                                                             │
     └───────────────────────────── poll_seconds ──────────────────────────────────────────────────┘
"""

import itertools
import shutil
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from dpo_fast.bundle import REFERENCE, open_bundle
from dpo_fast.errors import (
    CheckpointError,
    InterruptedRunError,
    OutputExistsError,
    SelfCheckError,
    TrackerError,
    UsageError,
)
from dpo_fast.evaluate import EvaluateOptions, evaluate
from dpo_fast.export.refit import RefitOptions, refit
from dpo_fast.files import make_folder, storage_errors
from dpo_fast.interrupts import Stop, stop_on_signals
from dpo_fast.preferences import load_preferences
from dpo_fast.report.charts import plotly_script
from dpo_fast.run_folder import locked, open_scores
from dpo_fast.trackers import Reporter, check_trackers
from dpo_fast.training.checkpoints import (
    TRAINER_STATE,
    Files,
    TrainerState,
    find_checkpoints,
    list_files,
    read_trainer_state,
)
from dpo_fast.training.drift import measure_drift
from dpo_fast.training.page import PAGE, write_page
from dpo_fast.training.steps import WATCH, LeftOut, ScoredStep, Steps, read_steps

RUNS = "runs"
BUNDLE = "bundle"  # the refitted one, there only while it is evaluated
DELETED = "was deleted before it was scored"
NAP = 0.1  # seconds; how long Ctrl-C may wait while nothing else is done


@dataclass(frozen=True, slots=True)
class WatchOptions:
    """What a user can choose about a watch.

    Attributes:
        poll_seconds: between two looks at the checkpoints.
        once: whether to score what is there and end.
        stop_after: to end with so many checkpoints scored, those of earlier processes included; None goes on until the
            training has ended.
        report_to: trackers.
        self_check: whether each refitted graph is compared with PyTorch, on one probe.
        overwrite: whether what an earlier watch found is thrown away.
        evaluate: how each is evaluated; its output, `overwrite` and `progress` are the watch's.
    """

    poll_seconds: float = 10.0
    once: bool = False
    stop_after: int | None = None
    report_to: tuple[str, ...] = ()
    self_check: bool = True
    overwrite: bool = False
    evaluate: EvaluateOptions = field(default_factory=EvaluateOptions)


def watch(
    bundle: Path,
    checkpoints: Path,
    dataset: str,
    output: Path,
    options: WatchOptions = WatchOptions(),
    report: Callable[[str], None] = lambda line: None,
    show: Callable[[dict[str, Any]], None] = lambda steps: None,
) -> dict[str, Any]:
    """Score the checkpoints in a folder, in the order of their steps, until the training has ended.

    A checkpoint that is still being written is waited for, one that is deleted before its turn is left out with a line,
    and so is one that cannot be refitted. What was scored is kept: a later call goes on.

    Args:
        bundle: exported from any checkpoint of this training, and its reference; stays as it is.
        checkpoints: the trainer's `output_dir`, where `checkpoint-STEP` appear.
        dataset: a file, a folder or a Hub id.
        output: the folder of watch.json, watch.html, and a run for each checkpoint.
        options: see `WatchOptions`.
        report: called with a line where something is worth saying.
        show: called with the content of watch.json whenever it has changed.

    Returns:
        The content of watch.json; see `dpo_fast.training.steps`.

    Raises:
        InputError: bundle, data set, options or disk; the message says what to do.
        CheckpointError: there were checkpoints, and none could be scored.
        InterruptedRunError: Ctrl-C or SIGTERM; what was scored is kept.
    """
    _check_options(options)
    plotly_script()  # better missed now than after the first checkpoint
    check_trackers(options.report_to)
    opened = open_bundle(bundle)
    if not opened.has_reference:
        raise UsageError(f"{bundle}: has no reference to measure margins against; export it with --reference")
    data = load_preferences(dataset, split=options.evaluate.split, limit=options.evaluate.limit)
    common = {
        "bundle": bundle.resolve().name,
        "reference": opened.role_hashes(REFERENCE),
        "dataset": Path(dataset).name if Path(dataset).exists() else dataset,
        "dataset_fingerprint": data.fingerprint,
        "split": data.split,
        "limit": options.evaluate.limit,
        "max_length": options.evaluate.max_length or opened.manifest.max_length,
        "settings": asdict(options.evaluate.loss),
        "aggregate": options.evaluate.aggregate,
        "batch_size": options.evaluate.batch_size if options.evaluate.aggregate == "trl" else None,
    }
    _prepare(output, overwrite=options.overwrite)
    with ExitStack() as stack:
        make_folder(output)
        stack.enter_context(locked(output))
        steps = read_steps(output, common)
        stop = stack.enter_context(stop_on_signals())
        stack.callback(shutil.rmtree, output / BUNDLE, ignore_errors=True)
        for remains in output.glob(f".{BUNDLE}.*"):  # of a process that was killed
            shutil.rmtree(remains)
        reporter = stack.enter_context(Reporter(options.report_to, run_name=output.resolve().name))
        watching = _Watch(bundle, checkpoints, dataset, output, options, report, show, steps, stop, reporter)
        try:
            watching.run()
        finally:
            watching.hand_in()
    if steps.left_out and not steps.scored:
        raise CheckpointError(
            f"{checkpoints}: none of {len(steps.left_out)} checkpoints could be scored; the first: "
            f"{steps.left_out[0].reason}"
        )
    return steps.as_dict()


@dataclass(slots=True)
class _Watch:
    """A watch as it goes on: what it was asked for, and what it has seen.

    Attributes:
        steps: what is done.
        stop: looked at between two checkpoints, and while waiting.
        seen: each waiting checkpoint's files at the last look.
        reported: the step that trackers were told of last.
    """

    bundle: Path
    checkpoints: Path
    dataset: str
    output: Path
    options: WatchOptions
    report: Callable[[str], None]
    show: Callable[[dict[str, Any]], None]
    steps: Steps
    stop: Stop
    reporter: Reporter
    seen: dict[tuple[int, str], Files] = field(default_factory=dict)
    reported: int | None = None

    def run(self) -> None:
        """Look, score, wait, until there is nothing to wait for."""
        self._publish()
        for look in itertools.count(1):
            self._look()
            if self._has_enough() or (self.options.once and (look == 2 or not self.seen)):
                break
            if look == 1 and not self.seen and not self.steps.scored:
                self.report(f"{self.checkpoints}: holds no checkpoint yet; waiting")
            self._wait()
        for _, name in [] if self._has_as_many_as_asked() else sorted(self.seen):
            self.report(f"{name}: is not whole, since {TRAINER_STATE} is missing, or its files still change; left out")
        if self.options.once and not self.steps.scored and not self.steps.left_out:
            raise UsageError(f"--checkpoints {self.checkpoints}: holds no whole checkpoint-STEP of a trainer")

    def _has_as_many_as_asked(self) -> bool:
        """Whether as many checkpoints were scored as `stop_after` says."""
        return self.options.stop_after is not None and len(self.steps.scored) >= self.options.stop_after

    def _has_enough(self) -> bool:
        """Whether as many checkpoints were scored as were asked for, or as there will be."""
        if self._has_as_many_as_asked():
            return True
        # One that has no state by the end of the training will never have one: its trainer was killed.
        waiting = (name for _, name in self.seen if read_trainer_state(self.checkpoints / name) is not None)
        return self.steps.training_has_ended and next(waiting, None) is None

    def _look(self) -> None:
        """Score the checkpoints that are whole, and that have stayed as they were at the last look."""
        found = [
            (step, path) for step, path in find_checkpoints(self.checkpoints) if not self.steps.is_done_with(path.name)
        ]
        for step, name in sorted(self.seen.keys() - {(step, path.name) for step, path in found}):
            self._leave_out(step, name, DELETED)
        for step, path in found:
            if self._has_as_many_as_asked():
                return
            files, state = list_files(path), read_trainer_state(path)
            if state is None or self.seen.get((step, path.name)) != files:
                self.seen[step, path.name] = files
                continue
            self._score(step, path, state, files)
            self._check_stop()

    def _score(self, step: int, path: Path, state: TrainerState, files: Files) -> None:
        """Refit the bundle to one checkpoint, evaluate it, and write what there is by now."""
        began = time.perf_counter()
        options, refitted = self.options.evaluate, self.output / BUNDLE
        try:
            # The copy lives as long as its evaluation, and the trainer replaces files, so both may share their blocks.
            refit(
                self.bundle,
                str(path),
                refitted,
                RefitOptions(
                    self_check=self.options.self_check,
                    link=True,
                    trust_remote_code=options.trust_remote_code,
                    overwrite=True,
                ),
            )
        except (CheckpointError, SelfCheckError, FileNotFoundError) as error:
            if not path.is_dir():
                self._leave_out(step, path.name, DELETED)
            elif list_files(path) != files:  # it is being deleted, or written again: the next look will tell
                pass
            elif isinstance(error, FileNotFoundError):
                raise
            else:
                self._leave_out(step, path.name, str(error))
            return
        self._check_stop()
        run = self.output / RUNS / path.name
        metrics = evaluate(refitted, self.dataset, run, options, self.report)
        shutil.rmtree(refitted)
        if metrics["provenance"]["dataset"]["fingerprint"] != self.steps.common["dataset_fingerprint"]:
            shutil.rmtree(run)
            raise UsageError(
                f"{self.dataset}: has changed since this watch began, so {path.name} cannot be put beside the others; "
                "bring it back and run the same command again, or say --overwrite"
            )
        del self.seen[step, path.name]
        scored = ScoredStep(
            step=step,
            max_steps=state.max_steps,
            epoch=state.epoch,
            checkpoint=path.name,
            metrics={key: value for key, value in metrics.items() if key.startswith("eval_")},
            intervals=metrics["intervals"],
            drift=measure_drift(open_scores(run).read()),
            counts=metrics["counts"],
            seconds=time.perf_counter() - began,
        )
        self.steps.add(scored)
        self._publish()
        drift = {f"eval_{key}": value for key, value in scored.drift.items() if value is not None}
        self._report_to_trackers({**scored.metrics, **drift}, step)

    def hand_in(self) -> None:
        """Give the trackers what there is in the end."""
        if self.reported is not None:
            self._report_to_trackers({}, self.reported, (self.output / WATCH, self.output / PAGE))

    def _report_to_trackers(self, metrics: dict[str, float], step: int, artifacts: tuple[Path, ...] = ()) -> None:
        """Tell the trackers; one that fails stops nothing."""
        try:
            self.reporter.report(metrics, step=step, artifacts=artifacts)
        except TrackerError as error:
            self.report(str(error))
        self.reported = step

    def _leave_out(self, step: int, name: str, reason: str) -> None:
        """Say that a checkpoint is not scored, and why."""
        del self.seen[step, name]
        self.report(f"{name}: {reason}; left out" if name not in reason else f"{reason}; left out")
        self.steps.add(LeftOut(step, name, reason))
        self._publish()

    def _publish(self) -> None:
        """Write watch.json and its page, and show them."""
        self.steps.write(self.output)
        write_page(self.output / PAGE, self.steps.as_dict())
        self.show(self.steps.as_dict())

    def _wait(self) -> None:
        """Wait for the next look."""
        end = time.monotonic() + self.options.poll_seconds
        while (left := end - time.monotonic()) > 0:
            time.sleep(min(left, NAP))
            self._check_stop()

    def _check_stop(self) -> None:
        """Stop if that was asked for.

        Raises:
            InterruptedRunError: it was.
        """
        if self.stop.signal is not None:
            raise InterruptedRunError(
                self.stop.signal,
                f"{self.stop.signal.name}: stopped with {len(self.steps.scored)} checkpoints scored; they are in "
                f"{self.output}: run the same command again to go on",
            )


def _prepare(output: Path, *, overwrite: bool) -> None:
    """Refuse a folder that is no watch's; empty one that shall be written over.

    Raises:
        OutputExistsError: it is somebody else's.
        StorageError: the disk refused.
    """
    with storage_errors(output):
        if not output.exists() or (output.is_dir() and not any(output.iterdir())):
            return
        if not (output / WATCH).is_file():
            raise OutputExistsError(f"{output}: exists and is no folder of `dpo-fast watch`; name another folder")
        if overwrite:
            shutil.rmtree(output)


def _check_options(options: WatchOptions) -> None:
    """Refuse values that make no sense of any folder."""
    if not options.poll_seconds > 0:
        raise UsageError(f"--poll-seconds {options.poll_seconds} must be above 0")
    if options.stop_after is not None and options.stop_after < 1:
        raise UsageError(f"--stop-after {options.stop_after} must be at least 1")
