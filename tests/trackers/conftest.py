"""A finished run to report, and trackers whose settings keep them offline and inside the test's folder."""

import atexit
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from fake_engines import ROWS, FakeEngines, make_fake_bundle, write_rows

from dpo_fast.bundle import MANIFEST
from dpo_fast.evaluate import EvaluateOptions, evaluate
from dpo_fast.generation.files import Sample, write_samples

# Trackio reads it once, when it is imported.
os.environ["TRACKIO_DIR"] = tempfile.mkdtemp(prefix="trackio")
atexit.register(shutil.rmtree, os.environ["TRACKIO_DIR"], ignore_errors=True)
STEP = 200
HOSTILE = '<script>alert(1)</script> | ![x](http://example.com/x.png) \x1b[31m"quoted", 你好\nsecond line'
SAMPLES = [
    Sample(2, "And this?", HOSTILE, "The sea.", 12, 4, True, True),
    Sample(4, "def add(a, b):", "", "pass\n", 128, 3, False, True),
]
OFFLINE = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "DO_NOT_TRACK": "1",
    "WANDB_MODE": "offline",
    "WANDB_ERROR_REPORTING": "false",
    "COMET_START_ONLINE": "0",
    "COMET_INTERNAL_SENTRY_DSN": "",  # where it reports its own errors
    "TRACKIO_PROJECT": "preferences",
}


@pytest.fixture(scope="session")
def settings_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One for all tests of a process, for some clients read their variables only once.

    A process that takes tests over from another one may leave this package, and come back to it.
    """
    return tmp_path_factory.mktemp("trackers")


@pytest.fixture(scope="package", autouse=True)
def settings(settings_folder: Path) -> Iterator[Path]:
    """The folder that the trackers' variables name."""
    with pytest.MonkeyPatch.context() as patch:
        set_variables(settings_folder, patch)
        yield settings_folder


def set_variables(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each tracker's own settings."""
    folders = {
        "WANDB_DIR": "wandb", "WANDB_DATA_DIR": "wandb-data", "WANDB_CACHE_DIR": "wandb-cache",
        "WANDB_CONFIG_DIR": "wandb-config", "COMET_OFFLINE_DIRECTORY": "comet",
        "TENSORBOARD_LOGGING_DIR": "tensorboard",
    }  # fmt: skip
    for name, value in OFFLINE.items():
        monkeypatch.setenv(name, value)
    for name, part in folders.items():
        (folder / part).mkdir(exist_ok=True)
        monkeypatch.setenv(name, str(folder / part))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{folder}/mlflow.db")


@pytest.fixture
def working_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The working folder, in which nothing may be left."""
    working = tmp_path / "working"
    working.mkdir()
    monkeypatch.chdir(working)
    yield working
    assert not list(working.iterdir())


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of a policy that came from checkpoint-200, with samples, a report and a plot. Read only."""
    folder = tmp_path_factory.mktemp("reported")
    bundle = make_fake_bundle(folder / "bundle")
    manifest = json.loads((bundle / MANIFEST).read_text())
    manifest["models"]["policy"]["source"] = f"checkpoint-{STEP}"
    (bundle / MANIFEST).write_text(json.dumps(manifest))
    run = folder / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DPO_FAST_CACHE", str(folder / "cache"))
        rows = write_rows(folder / "pairs.jsonl", ROWS)
        evaluate(bundle, rows, run, EvaluateOptions(group_by="kind"), engine=FakeEngines())
    write_samples(run, SAMPLES, {})
    (run / "report.html").write_text("<p>a report</p>")
    (run / "report" / "data").mkdir(parents=True)
    (run / "report" / "data" / "pairs.js").write_text("let pairs = []")
    return run


@pytest.fixture
def metrics(finished_run: Path) -> dict[str, float]:
    """What metrics.json says under TRL's names."""
    content = json.loads((finished_run / "metrics.json").read_text())
    return {name: value for name, value in content.items() if name.startswith("eval_")}
