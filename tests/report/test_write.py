"""A report's folder: what is written, what is refused, and what the command says."""

import json
import shutil
import sys
from pathlib import Path

import pytest
from fake_engines import ROWS, FakeEngines, make_fake_bundle, write_rows

import dpo_fast.cli
from dpo_fast.errors import (
    BundleError,
    DatasetError,
    InputError,
    MissingDependencyError,
    OutputExistsError,
    StorageError,
    UsageError,
)
from dpo_fast.evaluate import EvaluateOptions, evaluate
from dpo_fast.report.write import write_report
from dpo_fast.types import LossSettings


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle, its run, and the run's data. Read only."""
    folder = tmp_path_factory.mktemp("report")
    make_fake_bundle(folder / "bundle")
    dataset = write_rows(folder / "pairs.jsonl", ROWS)
    evaluate(folder / "bundle", dataset, folder / "run", EvaluateOptions(group_by="kind"), engine=FakeEngines())
    return folder


@pytest.fixture
def run(folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(folder / "run", tmp_path / "run"))


def names(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def test_a_report_lies_in_the_run_which_stays_a_run(folder: Path, run: Path) -> None:
    before = names(run)
    page = write_report(run, bundle=folder / "bundle")

    assert page == run / "report.html"
    assert names(run) - before == {
        "report.html",
        "report/style.css",
        "report/plotly.min.js",
        *(f"report/{name}.js" for name in ("loader", "table", "tokens", "charts")),
        *(f"report/data/{name}.js" for name in ("pairs", "figures", "tokens-00000", "excerpts-00000")),
    }
    metrics = (run / "metrics.json").read_bytes()
    engines = FakeEngines()
    evaluate(
        folder / "bundle", str(folder / "pairs.jsonl"), run, EvaluateOptions(group_by="kind"), engine=engines
    )  # the same evaluation again finds its run
    assert engines.calls == 0
    assert json.loads(metrics)["eval_loss"] == json.loads((run / "metrics.json").read_bytes())["eval_loss"]
    assert write_report(run, overwrite=True) == page


def test_metrics_stand_on_the_page_with_their_intervals(folder: Path, run: Path) -> None:
    page = write_report(run, bundle=folder / "bundle").read_text(encoding="utf-8")
    metrics = json.loads((run / "metrics.json").read_text(encoding="utf-8"))

    for key in ("eval_loss", "eval_rewards/margins", "eval_rewards/accuracies"):
        low, high = metrics["intervals"][key]
        assert f"<td>{metrics[key]:.4f}</td><td>{low:.4f} … {high:.4f}</td>" in page
    for key in ("eval_entropy", "eval_logits/chosen"):
        assert f"<td>{metrics[key]:.4f}</td>" in page


def test_a_report_is_not_written_over(folder: Path, run: Path, tmp_path: Path) -> None:
    output = tmp_path / "elsewhere"
    write_report(run, output, bundle=folder / "bundle")

    with pytest.raises(OutputExistsError, match="--overwrite"):
        write_report(run, output)
    assert names(run) == names(folder / "run")
    (tmp_path / "mine" / "report").mkdir(parents=True)
    (tmp_path / "mine" / "report" / "work.txt").write_text("mine")
    with pytest.raises(OutputExistsError, match="does not touch"):
        write_report(run, tmp_path / "mine", overwrite=True)
    assert names(tmp_path / "mine") == {"report/work.txt"}
    (tmp_path / "page").mkdir()
    (tmp_path / "page" / "report.html").write_text("mine")
    with pytest.raises(OutputExistsError, match="none of dpo-fast's reports"):
        write_report(run, tmp_path / "page", overwrite=True)
    assert (tmp_path / "page" / "report.html").read_text() == "mine"


def test_without_the_bundle_or_with_another_the_page_says_why_it_has_no_texts(run: Path, tmp_path: Path) -> None:
    page = write_report(run).read_text(encoding="utf-8")
    assert "dpo-fast report RUN --bundle BUNDLE" in page
    assert "[" in (run / "report/data/tokens-00000.js").read_text(encoding="utf-8")

    said: list[str] = []
    other = make_fake_bundle(tmp_path / "other", weights=b"other weights")
    page = write_report(run, bundle=other, overwrite=True, report=said.append).read_text(encoding="utf-8")
    assert "its tokenizer is not used" in page
    assert "its tokenizer is not used" in said[0]
    assert not list((run / "report/data").glob("excerpts-*"))


def test_a_run_without_a_reference_has_a_report(tmp_path: Path) -> None:
    bundle = make_fake_bundle(tmp_path / "bundle", reference=False)
    dataset = write_rows(tmp_path / "pairs.jsonl", ROWS)
    options = EvaluateOptions(loss=LossSettings(reference_free="average"))
    evaluate(bundle, dataset, tmp_path / "run", options, engine=FakeEngines())

    page = write_report(tmp_path / "run", bundle=bundle).read_text(encoding="utf-8")
    assert "This run has no reference" in page
    assert 'data-chart="models"' not in page


@pytest.mark.parametrize("where", ["in the run", "file", "folder"])
def test_samples_are_found_and_escaped(run: Path, tmp_path: Path, where: str) -> None:
    folder = run if where == "in the run" else tmp_path
    samples = folder / "samples.jsonl"
    text = "<b>\u2028bold</b>"  # a line end to some, and not to JSON
    sample = {"row": 3, "prompt": "Why?", "policy": text, "reference": None, "policy_tokens": 4}
    samples.write_text(json.dumps(sample, ensure_ascii=False) + "\n", encoding="utf-8")
    named = {"in the run": None, "file": samples, "folder": tmp_path}[where]

    page = write_report(run, samples=named).read_text(encoding="utf-8")
    assert "&lt;b&gt;\u2028bold&lt;/b&gt;" in page


def test_a_verification_is_shown_and_one_of_other_weights_is_called_so(run: Path, tmp_path: Path) -> None:
    provenance = json.loads((run / "metrics.json").read_text(encoding="utf-8"))["provenance"]
    result = {
        "verdict": "cannot tell", "reasons": ["too few <pairs>"], "pairs": 5, "drift": None,
        "checks": [{"name": "flips", "value": 0.1, "interval": [0, 0.2], "limit": 0.1, "outcome": "fail",
                    "reason": "of <b>"}],
        "tolerance": {"floor": "float32", "max_multiple": 100.0},
        "provenance": provenance | {"original": "torch", "precision": "fp32"},
    }  # fmt: skip
    (tmp_path / "verify.json").write_text(json.dumps(result))
    page = write_report(run, verification=tmp_path).read_text(encoding="utf-8")
    assert "too few &lt;pairs&gt;" in page
    assert "of &lt;b&gt;" in page
    assert "Limit by choice: max-multiple 100.0 (usually 10.0)" in page
    assert "another policy" not in page

    result["provenance"]["models"]["policy"]["weights_and_graph_sha256"] = ["0"]  # type: ignore[index]
    (tmp_path / "verify.json").write_text(json.dumps(result))
    assert "another policy" in write_report(run, verification=tmp_path, overwrite=True).read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"bundle": "nowhere"}, BundleError, "no such bundle"),
        ({"samples": "nowhere.jsonl"}, StorageError, "dpo-fast generate"),
        ({"samples": "bad.jsonl"}, DatasetError, "line 2 is no sample"),
        ({"verification": "nowhere"}, StorageError, "dpo-fast verify"),
        ({"verification": "damaged"}, StorageError, "damaged"),
        ({"verification": "old"}, StorageError, "another version"),
    ],
)
def test_bad_input_leaves_nothing_behind(
    folder: Path, run: Path, tmp_path: Path, options: dict[str, str], error: type[InputError], says: str
) -> None:
    (tmp_path / "bad.jsonl").write_text('{"row": 1, "prompt": "a", "policy": "b"}\n{"row": 2}\n')
    for name, content in (("damaged", "{"), ("old", "{}")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "verify.json").write_text(content)

    with pytest.raises(error, match=says) as raised:
        write_report(run, **{name: tmp_path / value for name, value in options.items()})  # type: ignore[arg-type]
    assert "\n" not in str(raised.value)
    assert names(run) == names(folder / "run")


def test_what_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no such run"):
        write_report(tmp_path / "nowhere")


def test_a_run_of_another_version_is_refused(run: Path) -> None:
    metrics = json.loads((run / "metrics.json").read_text(encoding="utf-8"))
    del metrics["provenance"]["hardware"]
    (run / "metrics.json").write_text(json.dumps(metrics))

    with pytest.raises(StorageError, match="names no hardware"):
        write_report(run)


def test_plotly_missing_names_the_extra(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "plotly.offline", None)

    with pytest.raises(MissingDependencyError, match=r"dpo-fast\[report\]"):
        write_report(run)
    assert not (run / "report.html").exists()


def test_the_command(folder: Path, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["report", str(run), "--bundle", str(folder / "bundle")]

    assert dpo_fast.cli.run(arguments) == 0
    assert capsys.readouterr().out == f"report: {run / 'report.html'}\n"
    assert dpo_fast.cli.run(arguments) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert "--overwrite" in line
    assert dpo_fast.cli.run([*arguments, "--overwrite"]) == 0
