"""Which trackers are meant, and what happens where one fails: nothing is lost, one line says it, no secret is said."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from fake_engines import ROWS, FakeEngines, make_fake_bundle, write_rows

import dpo_fast.trackers
from dpo_fast.cli import run
from dpo_fast.errors import MissingDependencyError, TrackerError, UsageError
from dpo_fast.trackers import TRACKERS, Reporter, check_trackers, report_to
from dpo_fast.trackers.base import files_of
from dpo_fast.trackers.finished_run import report_run, step_of

from .test_read_back import read_tensorboard

SECRET = "a-key-that-nobody-may-see"


def test_names() -> None:
    assert check_trackers([]) == check_trackers(["none"]) == []
    assert check_trackers(["comet_ml,wandb", "mlflow, wandb"]) == ["mlflow", "wandb", "comet_ml"]
    assert check_trackers(["all"]) == list(TRACKERS)
    assert list(TRACKERS)[-1] == "comet_ml"  # which reports on its own what trackers that are imported later are told
    with pytest.raises(
        UsageError, match="'comet' is not known; choose from mlflow, wandb, trackio, tensorboard, comet_ml, all"
    ):
        check_trackers(["comet"])
    for together in ("all,wandb", "none,wandb", "all,none"):
        with pytest.raises(UsageError, match="all and none stand alone"):
            check_trackers([together])


def test_a_tracker_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dpo_fast.trackers, "_is_installed", lambda name: name == "wandb")
    assert check_trackers(["all"]) == ["wandb"]
    with pytest.raises(MissingDependencyError, match=r"--report-to trackio .* pip install 'dpo-fast\[trackers\]'"):
        check_trackers(["wandb,trackio"])
    monkeypatch.setattr(dpo_fast.trackers, "_is_installed", lambda name: False)
    with pytest.raises(MissingDependencyError):
        check_trackers(["all"])


def test_a_folder_that_a_tracker_left_is_no_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "left_behind").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    assert not dpo_fast.trackers._is_installed("left_behind")
    assert dpo_fast.trackers._is_installed("json")


@pytest.mark.parametrize(
    ("source", "step"),
    [("checkpoint-200", 200), ("user/checkpoint-15", 15), ("my-checkpoint-3", 0), ("user/model", 0), ("", 0)],
)
def test_the_step_is_in_the_checkpoints_name(source: str, step: int) -> None:
    assert step_of({"models": {"policy": {"source": source}}}) == step


def test_no_client_is_loaded_before_it_is_needed() -> None:
    code = "import sys, dpo_fast.trackers, dpo_fast.cli; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not {"torch", "transformers", "pandas", *TRACKERS}.intersection(loaded)


class Fake:
    """A tracker that fails where it is told to."""

    place = "a place"

    def __init__(self, fails_at: str = "") -> None:
        self.fails_at = fails_at
        self.seen: list[str] = []

    def _do(self, what: str) -> None:
        self.seen.append(what)
        if what == self.fails_at:
            raise ConnectionError(f"http://user:{SECRET}@host said no\nto key {SECRET}, twice")

    def log(self, metrics: Any, samples: Any, step: int) -> None:
        self._do(f"log {step}")

    def log_files(self, paths: Any) -> None:
        self._do("files")

    def close(self, *, failed: bool) -> None:
        self._do(f"close {failed}")


@pytest.fixture
def fakes(monkeypatch: pytest.MonkeyPatch) -> dict[str, Fake]:
    """In the place of MLflow, W&B and TensorBoard: the second fails."""
    import dpo_fast.trackers.mlflow
    import dpo_fast.trackers.tensorboard
    import dpo_fast.trackers.wandb

    monkeypatch.setenv("WANDB_API_KEY", SECRET)
    found = {"mlflow": Fake(), "wandb": Fake(), "tensorboard": Fake()}
    for name, fake in found.items():
        module = getattr(dpo_fast.trackers, name)
        monkeypatch.setattr(module, TRACKERS[name], lambda run_name, fake=fake: fake)
    return found


@pytest.mark.parametrize("fails_at", ["log 3", "files", "close False"])
def test_one_that_fails_stops_no_other(fakes: dict[str, Fake], fails_at: str) -> None:
    fakes["wandb"].fails_at = fails_at
    said: list[str] = []
    with pytest.raises(TrackerError) as caught:
        report_to(list(fakes), metrics={"eval_loss": 1.0}, step=3, say=said.append)
    message = str(caught.value)
    assert message == (
        "not reported to wandb (ConnectionError: http://***@host said no to key ***, twice); all else is done: see to "
        "the tracker, then run the command again with --report-to wandb"
    )
    assert said == ["mlflow: a place", "tensorboard: a place"]
    for name in ("mlflow", "tensorboard"):
        assert fakes[name].seen == ["log 3", "files", "close False"]
    assert fakes["wandb"].seen[-1].startswith("close")


def test_what_has_failed_is_left_alone_and_told_once(fakes: dict[str, Fake]) -> None:
    fakes["wandb"].fails_at = "log 1"
    with Reporter(list(fakes)) as reporter:
        with pytest.raises(TrackerError):
            reporter.report({"eval_loss": 1.0}, step=1)
        reporter.report({"eval_loss": 1.0}, step=2)
    assert fakes["wandb"].seen == ["log 1", "close True"]
    assert fakes["mlflow"].seen == ["log 1", "files", "log 2", "files", "close False"]


def test_an_error_in_the_block_goes_before_a_trackers(fakes: dict[str, Fake]) -> None:
    fakes["wandb"].fails_at = "close False"
    with pytest.raises(ZeroDivisionError), Reporter(list(fakes)):
        raise ZeroDivisionError


@pytest.fixture
def evaluation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A command that evaluates at once, and where it is run."""
    monkeypatch.setattr("dpo_fast.local.open_engine", lambda bundle, role, threads: FakeEngines()(bundle, role))
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "events"))
    bundle, rows = make_fake_bundle(tmp_path / "bundle"), write_rows(tmp_path / "pairs.jsonl", ROWS)
    return ["evaluate", str(bundle), "--dataset", rows, "--output", str(tmp_path / "run")]


def test_bad_names_are_refused_before_the_work(
    evaluation: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run([*evaluation, "--report-to", "tensorbord"]) == 2
    assert "'tensorbord' is not known; choose from" in capsys.readouterr().err
    assert run(["generate", "nowhere", "--dataset", "x", "--report-to", "tensorbord"]) == 2
    assert "'tensorbord' is not known" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_server_that_is_down_loses_nothing(
    evaluation: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A port of this machine on which nobody listens; then the same command again, with the way out."""
    import mlflow

    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    store = mlflow.get_tracking_uri()
    mlflow.set_tracking_uri(f"http://user:{SECRET}@127.0.0.1:1")
    try:
        code = run([*evaluation, "--json", "--report-to", "mlflow,tensorboard", "--step", "40"])
    finally:
        mlflow.set_tracking_uri(store)
    captured = capsys.readouterr()
    assert code == 2
    printed = json.loads(captured.out)
    assert printed.pop("hints") == []
    assert printed == json.loads((tmp_path / "run" / "metrics.json").read_text())
    *_, where, last = captured.err.splitlines()
    assert where == f"tensorboard: {tmp_path / 'events'}"
    assert last.startswith("dpo-fast: not reported to mlflow (")
    assert last.endswith("run the command again with --report-to mlflow")
    assert "Traceback" not in captured.err
    assert SECRET not in captured.err + captured.out
    loss = json.loads(captured.out)["eval_loss"]
    (scalar,) = read_tensorboard(tmp_path / "events").Scalars("eval_loss")
    assert (scalar.step, scalar.value) == (40, pytest.approx(loss, rel=1e-6))  # it keeps float32

    assert run([*evaluation, "--report-to", "tensorboard", "--step", "41"]) == 0
    steps = [scalar.step for scalar in read_tensorboard(tmp_path / "events").Scalars("eval_loss")]
    assert steps == [40, 41]


def test_a_run_that_is_not_finished_is_refused(tmp_path: Path) -> None:
    with pytest.raises(Exception, match=r"metrics\.json: is missing"):
        report_run(["tensorboard"], tmp_path)


def test_a_report_is_written_where_the_run_has_none(
    evaluation: list[str], fakes: dict[str, Fake], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """For the tracker alone, and anew where the run's is older than its numbers; without Plotly, none, and why."""
    seen: list[set[str]] = []
    fakes["mlflow"].log_files = lambda paths: seen.append({name for name, _ in files_of(paths)})  # type: ignore[method-assign]
    assert run([*evaluation, "--report-to", "mlflow"]) == 0
    assert {"metrics.json", "plots/margin_histogram.png", "report.html", "report/plotly.min.js"} <= seen[0]
    assert not (tmp_path / "run" / "report.html").exists()

    (tmp_path / "run" / "report.html").write_text("an older report")
    os.utime(tmp_path / "run" / "report.html", (1, 1))
    places: list[Path] = []
    fakes["mlflow"].log_files = lambda paths: places.extend(paths)  # type: ignore[method-assign]
    report_run(["mlflow"], tmp_path / "run")
    assert tmp_path / "run" / "report.html" not in places

    def without_plotly(*_: Any, **__: Any) -> None:
        raise MissingDependencyError("plotly", "report", "a report")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dpo_fast.report.write.write_report", without_plotly)
        seen.clear()
        fakes["mlflow"].log_files = lambda paths: seen.append({name for name, _ in files_of(paths)})  # type: ignore[method-assign]
        capsys.readouterr()
        assert run([*evaluation, "--report-to", "mlflow"]) == 0
    assert "metrics.json" in seen[0]
    assert "report.html" not in seen[0]
    assert "the trackers get no report: a report needs the package 'plotly'" in capsys.readouterr().err
