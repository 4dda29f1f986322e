"""Each real client, offline: what was reported is read back with the tracker's own means and is what the run says."""

import io
import json
import struct
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dpo_fast.trackers import Reporter
from dpo_fast.trackers.finished_run import report_run

from .conftest import HOSTILE, SAMPLES, STEP

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("working_folder")]
TABLE = [asdict(sample) for sample in SAMPLES]
OF_THE_RUN = {"metrics.json", "samples.jsonl", "report.html", "report/data/pairs.js"}
PLOTS = {"plots/margin_histogram.png", "plots/accuracy_by_subset.png"}
FILES = OF_THE_RUN | PLOTS


@pytest.fixture
def experiment(settings: Path) -> None:
    """An MLflow experiment whose artifacts lie beside the store, not in the working folder."""
    import mlflow

    if mlflow.get_experiment_by_name("preferences") is None:
        mlflow.create_experiment("preferences", str(settings / "artifacts"))
    mlflow.set_experiment("preferences")


@pytest.mark.usefixtures("experiment")
def test_mlflow(finished_run: Path, metrics: dict[str, float], settings: Path) -> None:
    import mlflow

    place = report_run(["mlflow"], finished_run)["mlflow"]

    assert mlflow.active_run() is None
    store = f"sqlite:///{settings}/mlflow.db"
    client, run_id = mlflow.MlflowClient(store), place.split()[1]
    assert place == f"run {run_id} at {store}"
    run = client.get_run(run_id)
    assert run.data.metrics == metrics
    assert {client.get_metric_history(run_id, name)[0].step for name in metrics} == {STEP}
    assert (run.info.status, run.info.run_name) == ("FINISHED", "run")
    table = mlflow.load_table("samples.json", [run_id])
    assert table.to_dict("records") == [{"step": STEP, **row} for row in TABLE]
    folders = [None, "plots", "report/data"]
    found = [file for folder in folders for file in client.list_artifacts(run_id, folder)]
    assert {file.path for file in found if not file.is_dir} == FILES | {"samples.json"}
    assert mlflow.artifacts.load_text(f"{run.info.artifact_uri}/report.html") == "<p>a report</p>"


def test_wandb(finished_run: Path, metrics: dict[str, float], settings: Path) -> None:
    import wandb

    folder = Path(report_run(["wandb"], finished_run)["wandb"])

    assert wandb.run is None
    assert folder.parent == settings / "wandb" / "wandb"
    records = read_wandb(folder)
    (started,) = records["run"]
    assert (started.project, started.display_name) == ("huggingface", "run")
    (history,) = records["history"]
    said = {"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in history.item}
    assert {name: said[name] for name in metrics} == metrics
    assert said["train/global_step"] == STEP
    table = json.loads((folder / "files" / said["samples/path"]).read_text(encoding="utf-8"))
    assert [dict(zip(table["columns"], row, strict=True)) for row in table["data"]] == TABLE
    (reported,) = [artifact for artifact in records["artifact"] if artifact.type == "evaluation"]
    assert {entry.path for entry in reported.manifest.contents} == FILES


def test_comet(finished_run: Path, metrics: dict[str, float], settings: Path) -> None:
    place = report_run(["comet_ml"], finished_run)["comet_ml"]

    logged, files = read_comet(place, settings)
    found = {item["metricName"]: (item["metricValue"], item["step"]) for item in logged}
    assert {name: found[name] for name in metrics} == {name: (value, STEP) for name, value in metrics.items()}
    assert set(files) == FILES | {f"samples-step-{STEP}.json"}
    assert json.loads(files[f"samples-step-{STEP}.json"]) == TABLE
    for name in OF_THE_RUN:
        assert files[name] == (finished_run / name).read_bytes()


def test_trackio(finished_run: Path, metrics: dict[str, float]) -> None:
    from trackio import context_vars
    from trackio.sqlite_storage import SQLiteStorage

    report_run(["trackio"], finished_run)

    assert context_vars.current_run.get() is None
    (logged,) = SQLiteStorage.get_logs("preferences", "run")
    assert {name: logged[name] for name in metrics} == metrics
    assert logged["step"] == STEP
    assert logged["samples"]["_value"] == TABLE
    manifest = SQLiteStorage.get_artifact_manifest("preferences", "evaluation-run", "latest")
    assert manifest is not None
    assert {entry["path"] for entry in manifest["manifest"]} == FILES


def test_a_run_of_any_name_keeps_its_files(tmp_path: Path) -> None:
    """Of a folder's name, or a trainer's, Trackio's artifacts take some characters only."""
    from trackio.sqlite_storage import SQLiteStorage

    (tmp_path / "numbers.json").write_text("{}")
    with Reporter(["trackio"], run_name="my run (läuft)") as reporter:
        reporter.report({}, step=1, artifacts=[tmp_path / "numbers.json"])

    manifest = SQLiteStorage.get_artifact_manifest("preferences", "evaluation-my_run__l_uft_", "latest")
    assert manifest is not None
    assert [entry["path"] for entry in manifest["manifest"]] == ["numbers.json"]


def test_tensorboard(finished_run: Path, metrics: dict[str, float], tmp_path: Path, monkeypatch: Any) -> None:
    from PIL import Image

    from dpo_fast.report.images import margin_histogram_png

    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "events"))
    assert report_run(["tensorboard"], finished_run) == {"tensorboard": str(tmp_path / "events")}

    events = read_tensorboard(tmp_path / "events")
    assert set(events.Tags()["scalars"]) == set(metrics)
    for name, value in metrics.items():
        (scalar,) = events.Scalars(name)
        assert (np.float32(scalar.value), scalar.step) == (np.float32(value), STEP)  # it keeps float32
    (text,) = events.Tensors("samples/text_summary")
    shown = text.tensor_proto.string_val[0].decode()
    assert text.step == STEP
    assert shown.splitlines()[0].startswith("| row | prompt | policy | reference |")
    assert len(shown.splitlines()) == 2 + len(TABLE)
    assert "The sea\\." in shown
    for hostile in ("<script", "![x]", "\x1b"):
        assert hostile in HOSTILE
        assert hostile not in shown
    assert set(events.Tags()["images"]) == PLOTS
    margin_histogram_png(finished_run, tmp_path / "drawn.png")
    (image,) = events.Images("plots/margin_histogram.png")
    with Image.open(io.BytesIO(image.encoded_image_string)) as found, Image.open(tmp_path / "drawn.png") as drawn:
        np.testing.assert_array_equal(np.asarray(found), np.asarray(drawn.convert("RGB")))


# A watcher reports checkpoint after checkpoint into one run; one that is found late is not lost.

Losses = dict[int, float]


def of_mlflow(place: str, settings: Path) -> Losses:
    import mlflow

    history = mlflow.MlflowClient().get_metric_history(place.split()[1], "eval_loss")
    return {metric.step: metric.value for metric in history}


def of_wandb(place: str, settings: Path) -> Losses:
    rows = [
        {"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in history.item}
        for history in read_wandb(Path(place))["history"]
    ]
    return {row["train/global_step"]: row["eval_loss"] for row in rows}


def of_comet(place: str, settings: Path) -> Losses:
    logged, _ = read_comet(place, settings)
    return {item["step"]: item["metricValue"] for item in logged if item["metricName"] == "eval_loss"}


def of_trackio(place: str, settings: Path) -> Losses:
    from trackio.sqlite_storage import SQLiteStorage

    return {log["step"]: log["eval_loss"] for log in SQLiteStorage.get_logs("preferences", "watched")}


def of_tensorboard(place: str, settings: Path) -> Losses:
    return {scalar.step: scalar.value for scalar in read_tensorboard(Path(place)).Scalars("eval_loss")}


READERS = {
    "mlflow": of_mlflow,
    "wandb": of_wandb,
    "comet_ml": of_comet,
    "trackio": of_trackio,
    "tensorboard": of_tensorboard,
}


@pytest.mark.usefixtures("experiment")
def test_reports_of_one_reporter_are_one_run(settings: Path) -> None:
    said = {200: 0.5, 100: 0.25}
    with Reporter(["all"], run_name="watched") as reporter:
        for step, loss in said.items():
            reporter.report({"eval_loss": loss}, step=step)

    readers: dict[str, Callable[[str, Path], Losses]] = READERS
    assert {name: readers[name](place, settings) for name, place in reporter.places.items()} == dict.fromkeys(
        readers, said
    )


@pytest.mark.usefixtures("experiment")
def test_a_run_that_is_open_is_joined_and_left_open(settings: Path) -> None:
    """As in a trainer's callback, beside Transformers' own."""
    import mlflow
    import trackio
    import wandb

    import comet_ml  # isort: skip  # last: it changes what is imported after it

    theirs = mlflow.start_run()
    run = wandb.init(project="training", settings=wandb.Settings(silent=True))
    comet = comet_ml.start(experiment_config=comet_ml.ExperimentConfig(log_env_details=False))  # which asks the network
    trackio_run = trackio.init("preferences", "training", embed=False, auto_log_cpu=False)
    try:
        with Reporter(["mlflow", "wandb", "comet_ml", "trackio"], run_name="another") as reporter:
            reporter.report({"eval_loss": 0.5}, step=10)
        assert mlflow.active_run().info.run_id == theirs.info.run_id
        assert wandb.run is run
        assert not comet.ended
        assert trackio.context_vars.current_run.get() is trackio_run
    finally:
        mlflow.end_run()
        run.finish()
        comet.end()
        trackio.finish()
    assert of_mlflow(reporter.places["mlflow"], settings) == {10: 0.5}
    assert reporter.places["mlflow"].split()[1] == theirs.info.run_id
    assert of_wandb(reporter.places["wandb"], settings) == {10: 0.5}
    assert of_comet(reporter.places["comet_ml"], settings) == {10: 0.5}
    assert [log["step"] for log in trackio.sqlite_storage.SQLiteStorage.get_logs("preferences", "training")] == [10]


# Reading back.


def read_tensorboard(folder: Path) -> Any:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    return events


def read_comet(place: str, settings: Path) -> tuple[list[dict[str, Any]], dict[str, bytes]]:
    """The metrics and the files of an offline archive."""
    (archive,) = (settings / "comet").glob(f"{place.split()[1]}*.zip")
    with zipfile.ZipFile(archive) as content:
        messages = [json.loads(line) for line in content.read("messages.json").splitlines()]
        uploads = [message["payload"] for message in messages if message["type"] == "file_upload"]
        files = {upload["additional_params"]["fileName"]: content.read(upload["file_path"]) for upload in uploads}
    return [message["payload"]["metric"] for message in messages if message["type"] == "metric_msg"], files


def read_wandb(folder: Path) -> dict[str, list[Any]]:
    """The records of an offline run, by their type."""
    (file,) = folder.glob("*.wandb")
    records: dict[str, list[Any]] = {}
    for record in wandb_records(file.read_bytes()):
        kind = record.WhichOneof("record_type")
        records.setdefault(kind, []).append(getattr(record, kind))
    return records


def wandb_records(data: bytes) -> Iterator[Any]:
    """W&B's own messages, from a log in LevelDB's format behind a header of 7 bytes.

    Each record, or piece of one, has a CRC (4 bytes), its length (2) and its kind (1: full, 2: first, 3: middle,
    4: last); none crosses a block of 32 KiB, whose end is padded. The client (0.31) brings no reader in Python.
    """
    from wandb.proto.wandb_internal_pb2 import Record

    assert data[:4] == b":W&B"
    position, pieces = 7, b""
    while position < len(data):
        left = 32768 - position % 32768
        if left < 7:
            position += left
            continue
        _, length, kind = struct.unpack_from("<IHB", data, position)
        assert kind in (1, 2, 3, 4)
        pieces += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):
            yield Record.FromString(pieces)
            pieces = b""
