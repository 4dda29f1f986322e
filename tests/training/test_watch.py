"""The watch: which checkpoints it scores, in which order, how often; real refits are in test_watched_training.py."""

import io
import json
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from fake_engines import ROWS, FakeEngine, make_fake_bundle, write_rows
from rich.console import Console
from signals import send

import dpo_fast.cli
import dpo_fast.evaluate
import dpo_fast.training.watch
from dpo_fast.bundle import Bundle
from dpo_fast.errors import CheckpointError, InterruptedRunError, OutputExistsError, TrackerError, UsageError
from dpo_fast.export.checkpoint import open_checkpoint
from dpo_fast.rescore import rescore
from dpo_fast.run_folder import read_metrics
from dpo_fast.training.checkpoints import list_files
from dpo_fast.training.watch import RUNS, WatchOptions, watch
from dpo_fast.types import LossSettings

HOSTILE = "<script>alert(1)</script>"


class Watched:
    """A folder of checkpoints, and a watch of it that can be called again and again.

    Attributes:
        scored: the checkpoints that an engine has scored, in this order.
        said: the lines it has said.
        moments: what happens while the watch waits, one each time; then it is interrupted.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.checkpoints, self.output = folder, folder / "trained", folder / "watched"
        self.bundle = make_fake_bundle(folder / "bundle")
        self.pairs = write_rows(folder / f"{HOSTILE.replace('/', '')}.jsonl", ROWS)
        self.scored: list[str] = []
        self.said: list[str] = []
        self.moments: Iterator[Callable[[], Any]] = iter(())

    def add(self, step: int, *, max_steps: int = 100, name: str = "checkpoint-{}") -> Path:
        """A whole checkpoint, as far as a watch looks: one float of weights, and the trainer's state."""
        folder = self.checkpoints / name.format(step)
        folder.mkdir(parents=True)
        (folder / "config.json").write_text("{}")
        header = b'{"w":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'
        weights = len(header).to_bytes(8, "little") + header + step.to_bytes(4, "little")
        (folder / "model.safetensors").write_bytes(weights)
        state = {"global_step": step, "max_steps": max_steps, "epoch": step / 10}
        (folder / "trainer_state.json").write_text(json.dumps(state))
        return folder

    def watch(self, *moments: Callable[[], Any], **options: Any) -> dict[str, Any]:
        self.moments = iter(moments)
        return watch(self.bundle, self.checkpoints, self.pairs, self.output, WatchOptions(**options), self.said.append)

    def found(self) -> dict[str, Any]:
        value: dict[str, Any] = json.loads((self.output / "watch.json").read_text())
        return value


@pytest.fixture
def watched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Watched:
    """Refits take the checkpoint's bytes for weights, and the engine's word depends on them."""
    here = Watched(tmp_path)

    def refit(bundle: Path, policy: str, output: Path, options: Any) -> None:
        weights = (open_checkpoint(policy).folder / "model.safetensors").read_bytes()
        shutil.rmtree(output, ignore_errors=True)
        make_fake_bundle(output, weights=weights)
        (output / "of").write_text(Path(policy).name)

    def open_engine(bundle: Bundle, role: str) -> FakeEngine:
        if role == "policy":
            here.scored.append((bundle.folder / "of").read_text())
        salt = (bundle.model_folder(role) / "model.safetensors").read_bytes() if role == "policy" else b""
        return FakeEngine(salt.hex())

    evaluate = dpo_fast.evaluate.evaluate
    monkeypatch.setattr(dpo_fast.training.watch, "refit", refit)
    monkeypatch.setattr(
        dpo_fast.training.watch, "evaluate", lambda *arguments: evaluate(*arguments, engine=open_engine)
    )

    def wait(self: Any) -> None:
        moment = next(here.moments, None)
        if moment is None:
            send(signal.SIGINT)
        else:
            moment()
        self._check_stop()

    monkeypatch.setattr(dpo_fast.training.watch._Watch, "_wait", wait)
    return here


def nothing() -> None:
    """A moment in which nothing happens."""


def test_each_is_scored_once_in_the_order_of_the_steps_until_the_training_ends(watched: Watched) -> None:
    for step in (10, 9):
        watched.add(step)
    watched.add(11, name="tmp-checkpoint-{}")
    watched.add(12, name="checkpoint-{}-old")

    result = watched.watch(nothing, lambda: watched.add(100), nothing)

    assert watched.scored == ["checkpoint-9", "checkpoint-10", "checkpoint-100"]
    assert [each["step"] for each in result["steps"]] == [9, 10, 100]
    assert [each["epoch"] for each in result["steps"]] == [0.9, 1.0, 10.0]
    assert result == watched.found()
    assert result["left_out"] == []
    assert not (watched.output / "bundle").exists()
    first = read_metrics(watched.output / "runs" / "checkpoint-9")
    assert result["steps"][0]["metrics"]["eval_rewards/margins"] == first["eval_rewards/margins"]
    assert len({each["metrics"]["eval_rewards/margins"] for each in result["steps"]}) == 3
    assert watched.watch() == result  # everything is there: it ends without waiting
    assert len(watched.scored) == 3


def test_what_is_still_being_written_is_waited_for(watched: Watched) -> None:
    """Files come one after another, the trainer's state last; then they must have stayed as they are for one look."""
    whole = watched.add(100, name="whole-{}")
    checkpoint = watched.checkpoints / "checkpoint-100"
    weights, state = ((whole / name).read_bytes() for name in ("model.safetensors", "trainer_state.json"))

    def write(name: str, content: bytes) -> Callable[[], None]:
        def moment() -> None:
            assert watched.scored == []
            checkpoint.mkdir(exist_ok=True)
            (checkpoint / name).write_bytes(content)

        return moment

    watched.watch(
        nothing,
        write("config.json", b"{}"),
        write("model.safetensors", weights[:-2]),
        nothing,  # it stays as it is: a writer that is slow
        write("trainer_state.json", state[:9]),
        nothing,
        write("trainer_state.json", state),
        write("model.safetensors", weights),  # a copy whose files came in another order
        nothing,
    )

    assert watched.scored == ["checkpoint-100"]
    assert watched.said == [f"{watched.checkpoints}: holds no checkpoint yet; waiting"]


def test_one_that_is_deleted_or_damaged_is_left_out_with_a_line(watched: Watched) -> None:
    deleted, damaged = watched.add(1), watched.add(2)
    (damaged / "model.safetensors").write_bytes(b"12345678")
    watched.add(3).joinpath("model.safetensors").rename(watched.checkpoints / "checkpoint-3" / "pytorch_model.bin")
    watched.add(100)

    result = watched.watch(lambda: shutil.rmtree(deleted), nothing)

    assert watched.scored == ["checkpoint-100"]
    assert [each["checkpoint"] for each in result["left_out"]] == ["checkpoint-1", "checkpoint-2", "checkpoint-3"]
    assert watched.said[0] == "checkpoint-1: was deleted before it was scored; left out"
    assert "checkpoint-2/model.safetensors: is truncated" in watched.said[1]
    assert "a pickle" in watched.said[2]
    assert "a pickle" in (watched.output / "watch.html").read_text()


def test_one_that_is_deleted_while_it_is_read_is_left_out(watched: Watched, monkeypatch: pytest.MonkeyPatch) -> None:
    watched.add(1)
    watched.add(100)
    refit = dpo_fast.training.watch.refit

    def race(bundle: Path, policy: str, *arguments: Any) -> Any:
        if policy.endswith("checkpoint-1"):
            shutil.rmtree(policy)
        return refit(bundle, policy, *arguments)

    monkeypatch.setattr(dpo_fast.training.watch, "refit", race)
    result = watched.watch(nothing, nothing)

    assert [each["reason"] for each in result["left_out"]] == ["was deleted before it was scored"]
    assert watched.scored == ["checkpoint-100"]


def test_a_folder_that_vanishes_as_its_files_are_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A trainer that rotates its checkpoints removes their subfolders one after another."""
    for name in ("a", "b", "c"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "weights").write_text("1")
    stat = Path.stat

    def race(self: Path, **options: Any) -> Any:
        if self.name == "weights":
            for folder in [folder for folder in tmp_path.iterdir() if folder != self.parent]:
                shutil.rmtree(folder)
        return stat(self, **options)

    monkeypatch.setattr(Path, "stat", race)
    [(name, size, _)] = list_files(tmp_path)
    assert (Path(name).name, size) == ("weights", 1)


def test_where_none_can_be_scored_that_is_an_error(watched: Watched) -> None:
    (watched.add(100) / "model.safetensors").write_bytes(b"12345678")

    with pytest.raises(CheckpointError, match=r"none of 1 checkpoints could be scored; .*is truncated"):
        watched.watch(nothing, once=True)
    watched.add(101)
    assert [each["step"] for each in watched.watch(nothing, once=True)["steps"]] == [101]


def test_an_abandoned_checkpoint_does_not_keep_it_waiting(watched: Watched) -> None:
    (watched.add(1) / "trainer_state.json").unlink()
    watched.add(100)

    watched.watch(nothing)

    assert watched.scored == ["checkpoint-100"]
    assert watched.said == [
        "checkpoint-1: is not whole, since trainer_state.json is missing, or its files still change; left out"
    ]


def test_once_and_stop_after(watched: Watched) -> None:
    for step in (1, 2, 3):
        watched.add(step)

    assert len(watched.watch(nothing, stop_after=2)["steps"]) == 2
    assert len(watched.watch(stop_after=2)["steps"]) == 2  # they are there already
    assert watched.said == []  # checkpoint-3 is whole, and just not asked for
    assert len(watched.watch(nothing, once=True)["steps"]) == 3
    assert watched.scored == ["checkpoint-1", "checkpoint-2", "checkpoint-3"]
    with pytest.raises(UsageError, match="holds no whole checkpoint-STEP"):
        watch(watched.bundle, watched.folder, watched.pairs, watched.folder / "other", WatchOptions(once=True))


def test_a_training_that_was_made_longer_and_late_comers_are_scored(watched: Watched) -> None:
    """An ended training is resumed with more steps; and a checkpoint of before its end is copied there later."""
    watched.add(100)
    watched.watch(nothing)

    watched.add(50)
    assert [each["step"] for each in watched.watch(nothing)["steps"]] == [50, 100]
    watched.add(150, max_steps=200)
    result = watched.watch(nothing, nothing, lambda: watched.add(200, max_steps=200), nothing)

    assert [each["step"] for each in result["steps"]] == [50, 100, 150, 200]
    assert watched.scored == ["checkpoint-100", "checkpoint-50", "checkpoint-150", "checkpoint-200"]
    watched.add(250, max_steps=300)
    assert len(watched.watch(nothing, once=True)["steps"]) == 5


def test_ctrl_c_ends_it_with_what_was_done(watched: Watched) -> None:
    watched.add(1)

    with pytest.raises(InterruptedRunError, match="SIGINT: stopped with 1 checkpoints scored") as caught:
        watched.watch(nothing)

    assert caught.value.exit_code == 130
    assert [each["step"] for each in watched.found()["steps"]] == [1]
    assert (watched.output / "watch.html").is_file()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.parametrize("moment", ["evaluating", "writing"])
def test_one_that_was_killed_goes_on(watched: Watched, monkeypatch: pytest.MonkeyPatch, moment: str) -> None:
    """Killed within the second checkpoint, as its run is written, or as the run is there and watch.json is not."""
    for step in (1, 2, 100):
        watched.add(step)
    steps = dpo_fast.training.watch.Steps
    write, evaluate = steps.write, dpo_fast.training.watch.evaluate

    class Killed(BaseException):
        """What no handler takes for its own."""

    def die_evaluating(*arguments: Any) -> Any:
        if arguments[2].name == "checkpoint-2":
            raise Killed
        return evaluate(*arguments)

    def die_writing(self: Any, folder: Path) -> None:
        if len(self.scored) == 2:
            raise Killed
        write(self, folder)

    with monkeypatch.context() as patch:
        if moment == "evaluating":
            patch.setattr(dpo_fast.training.watch, "evaluate", die_evaluating)
        else:
            patch.setattr(steps, "write", die_writing)
        with pytest.raises(Killed):
            watched.watch(nothing)
    assert [each["step"] for each in watched.found()["steps"]] == [1]
    (watched.output / ".bundle.abcd").mkdir()  # a refit that was cut short
    kept = (watched.output / "runs" / "checkpoint-1" / "metrics.json").stat().st_mtime_ns

    result = watched.watch(nothing)

    assert [each["step"] for each in result["steps"]] == [1, 2, 100]
    assert (watched.output / "runs" / "checkpoint-1" / "metrics.json").stat().st_mtime_ns == kept
    assert watched.scored.count("checkpoint-1") == 1
    assert sorted(path.name for path in watched.output.iterdir()) == ["runs", "watch.html", "watch.json"]


def test_a_folder_of_something_else_is_refused(watched: Watched) -> None:
    watched.add(100)
    watched.watch(nothing)

    with pytest.raises(OutputExistsError, match="holds a watch with other limit; name another folder, or say --over"):
        watched.watch(evaluate=dpo_fast.evaluate.EvaluateOptions(limit=2))
    watched.watch(nothing, evaluate=dpo_fast.evaluate.EvaluateOptions(limit=2), overwrite=True)
    assert watched.found()["steps"][0]["counts"]["pairs"] == 2
    watched.output = watched.bundle
    with pytest.raises(OutputExistsError, match="is no folder of `dpo-fast watch`"):
        watched.watch(overwrite=True)
    assert (watched.bundle / "bundle.json").is_file()


def test_the_data_are_looked_at_before_the_first_checkpoint(watched: Watched) -> None:
    with pytest.raises(dpo_fast.errors.DatasetError, match="no such file"):
        watch(watched.bundle, watched.checkpoints, "nowhere.jsonl", watched.output)
    assert not watched.output.exists()


def test_data_that_change_in_between_are_no_point_of_the_same_curve(watched: Watched) -> None:
    watched.add(1)
    before = Path(watched.pairs).read_text()

    def change() -> None:
        watched.add(100)
        write_rows(Path(watched.pairs), ROWS[:3])

    with pytest.raises(UsageError, match="has changed since this watch began"):
        watched.watch(nothing, change, nothing)
    assert [each["step"] for each in watched.found()["steps"]] == [1]

    Path(watched.pairs).write_text(before)
    assert [each["counts"]["pairs"] for each in watched.watch(nothing)["steps"]] == [len(ROWS)] * 2


def test_trackers_are_told_of_each_step_and_stop_nothing(watched: Watched, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[tuple[int, set[str], list[str]]] = []

    class Reporter(dpo_fast.training.watch.Reporter):
        def report(self, metrics: Any, *, step: Any = None, samples: Any = None, artifacts: Any = ()) -> None:
            told.append((step, set(metrics), [path.name for path in artifacts]))
            raise TrackerError("mlflow is away")

    monkeypatch.setattr(dpo_fast.training.watch, "Reporter", Reporter)
    watched.add(1)
    watched.add(100)
    watched.watch(nothing)

    assert [step for step, *_ in told] == [1, 100, 100]
    assert told[0][1] >= {"eval_loss", "eval_rewards/margins", "eval_log_ratio/chosen", "eval_k3/chosen"}
    assert told[-1][2] == ["watch.json", "watch.html"]
    assert watched.said == ["mlflow is away"] * 3
    with pytest.raises(UsageError, match="--report-to 'tensorbored' is not known"):
        watched.watch(report_to=("tensorbored",))


def test_a_terminal_obeys_no_name(watched: Watched, monkeypatch: pytest.MonkeyPatch) -> None:
    """Above the live table too, a tensor's name is text."""
    screen = io.StringIO()
    terminal = Console(file=screen, force_terminal=True, width=200)
    monkeypatch.setattr("dpo_fast.commands.watch.console", lambda: terminal)
    refit = dpo_fast.training.watch.refit

    def refuse(bundle: Path, policy: str, *arguments: Any) -> Any:
        if policy.endswith("checkpoint-1"):
            raise CheckpointError("tensor '\x1b]0;owned\x07' is missing")
        return refit(bundle, policy, *arguments)

    monkeypatch.setattr(dpo_fast.training.watch, "refit", refuse)
    watched.add(1)
    watched.add(100)
    watched.moments = iter([nothing])
    arguments = ["--checkpoints", str(watched.checkpoints), "--dataset", watched.pairs, "--output", str(watched.output)]
    assert dpo_fast.cli.run(["watch", str(watched.bundle), *arguments, "--once"]) == 0

    assert "tensor ' ]0;owned ' is missing; left out" in screen.getvalue()
    assert "\x1b]0;" not in screen.getvalue()


def test_the_command(watched: Watched, capsys: pytest.CaptureFixture[str]) -> None:
    watched.add(50)
    watched.add(100)
    watched.moments = iter([nothing, nothing])
    arguments = [
        "watch", str(watched.bundle), "--checkpoints", str(watched.checkpoints), "--dataset", watched.pairs,
        "--output", str(watched.output), "--beta", "0.5",
    ]  # fmt: skip

    output = arguments.index("--output")
    assert dpo_fast.cli.run([*arguments[:output], *arguments[output + 2 :], "--once"]) == 0
    assert (watched.checkpoints / "watched" / "watch.html").is_file()  # where nothing else is said
    assert dpo_fast.cli.run([*arguments, "--once"]) == 0
    shown = capsys.readouterr().out
    assert dpo_fast.cli.run([*arguments, "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)

    margin = printed["steps"][1]["metrics"]["eval_rewards/margins"]
    assert f"{margin:.4f}" in shown
    assert "beta 0.5" in shown
    assert printed == watched.found()
    assert dpo_fast.cli.run([*arguments, "--poll-seconds", "0"]) == 2
    assert dpo_fast.cli.run([*arguments, "--stop-after", "0"]) == 2
    assert capsys.readouterr().err.splitlines() == [
        "dpo-fast: --poll-seconds 0.0 must be above 0", "dpo-fast: --stop-after 0 must be at least 1",
    ]  # fmt: skip


def test_the_loss_is_the_trainings_own(watched: Watched) -> None:
    """One that needs a parameter of its own, by the command's options: the same that the runs give when rescored."""
    watched.add(50)
    watched.moments = iter([nothing, nothing])
    arguments = ["--checkpoints", str(watched.checkpoints), "--dataset", watched.pairs, "--output", str(watched.output)]
    loss = ["--loss-type", "robust", "--loss-type", "sft", "--loss-weight", "1", "--loss-weight", "0.2"]

    assert dpo_fast.cli.run(
        ["watch", str(watched.bundle), *arguments, "--once", *loss, "--label-smoothing", "0.1", "--ld-alpha", "0.5"]
    ) == 0  # fmt: skip

    [step] = watched.found()["steps"]
    settings = LossSettings(loss_type=("robust", "sft"), loss_weights=(1, 0.2), label_smoothing=0.1, ld_alpha=0.5)
    [result] = rescore(watched.output / RUNS / "checkpoint-50", [settings])["results"]
    assert step["metrics"]["eval_loss"] == result["eval_loss"]


def test_the_page_obeys_no_data(watched: Watched) -> None:
    watched.add(100)
    watched.watch(nothing)
    page = (watched.output / "watch.html").read_text()

    assert HOSTILE.replace("/", "").replace("<", "&lt;").replace(">", "&gt;") in page
    assert "<script>alert" not in page


@pytest.mark.slow  # a browser
def test_the_page_in_a_browser(watched: Watched) -> None:
    """Three charts of two points each, drawn without a network, and nothing else is run."""
    playwright = pytest.importorskip("playwright.sync_api")
    if not Path("/usr/bin/chromium").exists():
        pytest.skip("no Chromium")
    watched.add(50)
    watched.add(100)
    watched.watch(nothing)
    with playwright.sync_playwright() as engine:
        browser = engine.chromium.launch(
            executable_path="/usr/bin/chromium",
            args=["--no-sandbox", "--disable-gpu", "--disable-background-networking"],
        )
        page = browser.new_page(viewport={"width": 400, "height": 900}, color_scheme="dark")
        wrong: list[str] = []
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("console", lambda message: wrong.append(message.text) if message.type == "error" else None)
        page.on("dialog", lambda dialog: wrong.append(dialog.message))
        page.goto(f"file://{watched.output / 'watch.html'}")
        page.wait_for_function("document.querySelectorAll('.js-plotly-plot .main-svg').length >= 6")
        points = [page.locator(".js-plotly-plot").nth(chart).locator("path.point").count() for chart in range(3)]
        too_wide = page.evaluate("document.documentElement.scrollWidth > window.innerWidth")
        page.screenshot(path=watched.folder / "watch.png", full_page=True)
        browser.close()

    assert wrong == []
    assert points == [2, 2, 8]
    assert not too_wide
