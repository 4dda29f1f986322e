"""Runs against each other: the numbers, what is refused, subsets and families, table, JSON and page."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_engines import ROWS, FakeEngines, make_fake_bundle, write_rows
from rich.console import Console

import dpo_fast.cli
from dpo_fast.compare.compare import ACCURACY, LOSS, MEANS, compare
from dpo_fast.compare.paired import holm
from dpo_fast.compare.run_pairs import pair_keys, read_digests, run_names
from dpo_fast.compare.table import print_comparison
from dpo_fast.errors import StorageError, UsageError
from dpo_fast.evaluate import EvaluateOptions, evaluate
from dpo_fast.rescore import open_run, rescore
from dpo_fast.types import LossSettings

from .runs import pairs_of, write_run

PAIRS = 240
HOSTILE = "<script>document.title='run'</script>\x1b[2J"
GROUPS = [(HOSTILE, "[red]plain", "small")[0 if i < 100 else 1 if i < 230 else 2] for i in range(PAIRS)]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Three policies of one reference: the second differs by chance, the third is better. Read only."""
    folder = tmp_path_factory.mktemp("runs")
    generator = np.random.default_rng(0)
    chosen, rejected = generator.normal(-49, 6, PAIRS), generator.normal(-51, 6, PAIRS)
    pairs = pairs_of(PAIRS, groups=GROUPS)
    steps = {"checkpoint-100": (0, 0), "checkpoint-200": (0, 0.5), "checkpoint-300": (3, 2)}
    return [
        write_run(
            folder / name,
            pairs,
            chosen + generator.normal(gain, spread, PAIRS),
            rejected - generator.normal(gain, spread, PAIRS),
            part_size=size,
        )
        for (name, (gain, spread)), size in zip(steps.items(), (1024, 50, 60), strict=True)
    ]


@pytest.fixture(scope="module")
def result(runs: list[Path]) -> dict[str, Any]:
    return compare(runs)


def altered(run: Path, folder: Path, **changes: Any) -> Path:
    """A copy of a run with other provenance."""
    shutil.copytree(run, folder)
    metrics = json.loads((folder / "metrics.json").read_text())
    metrics["provenance"] |= changes
    (folder / "metrics.json").write_text(json.dumps(metrics))
    return folder


# The numbers.


def test_each_run_has_the_numbers_of_a_rescore(runs: list[Path], result: dict[str, Any]):
    """To some rounding: sums of 240 float64 in another order."""
    for run, found in zip(runs, result["runs"], strict=True):
        expected = rescore(run, [open_run(run)[1]])
        of_beta = expected["by_beta"][0]
        for metric in (ACCURACY, *MEANS[:-1]):
            assert found[metric] == pytest.approx(of_beta[metric], rel=1e-12)
        assert found[LOSS] == pytest.approx(expected["results"][0]["eval_loss"], rel=1e-12)
        assert found["interval"] == pytest.approx(of_beta["intervals"][ACCURACY], rel=1e-12)


def test_differences_are_those_of_the_means(result: dict[str, Any]):
    baseline = result["runs"][0]
    assert [each["against"] for each in result["comparisons"]] == ["checkpoint-100"] * 2
    for run, comparison in zip(result["runs"][1:], result["comparisons"], strict=True):
        assert comparison["run"] == run["name"]
        for metric in (ACCURACY, *MEANS):
            assert comparison[metric]["difference"] == pytest.approx(run[metric] - baseline[metric], abs=1e-12)


def test_what_is_there_is_found_and_what_is_not_is_not(result: dict[str, Any]):
    same, better = result["comparisons"]
    assert all(same[metric]["p_holm"] > 0.05 for metric in (ACCURACY, *MEANS))
    assert all(better[metric]["p_holm"] < 0.01 for metric in (ACCURACY, *MEANS))
    assert better["eval_rewards/margins"]["difference"] > 0 > better[LOSS]["difference"]


def test_a_run_against_itself(runs: list[Path]):
    result = compare([runs[2], runs[2]])
    [comparison] = result["comparisons"]
    assert (comparison["against"], comparison["run"]) == ("checkpoint-300", "checkpoint-300 (2)")
    for metric in (ACCURACY, *MEANS):
        assert (comparison[metric]["difference"], comparison[metric]["p"], comparison[metric]["p_holm"]) == (0, 1, 1)


def test_all_pairs_of_runs(runs: list[Path]):
    sides = [(each["against"], each["run"]) for each in compare(runs, all_pairs=True)["comparisons"]]
    names = [run.name for run in runs]
    assert sides == [(names[0], names[1]), (names[0], names[2]), (names[1], names[2])]


def test_subsets_are_comparisons_of_their_pairs(runs: list[Path], result: dict[str, Any]):
    assert list(result["subsets"]) == sorted(set(GROUPS))
    assert {name: each["pairs"] for name, each in result["subsets"].items()} == {
        HOSTILE: 100,
        "[red]plain": 130,
        "small": 10,
    }
    members = {name: np.array([group == name for group in GROUPS]) for name in result["subsets"]}
    for number, comparison in enumerate(result["comparisons"]):
        for metric in (ACCURACY, "eval_rewards/margins"):
            parts = [
                members[name].sum() * subset["comparisons"][number][metric]["difference"]
                for name, subset in result["subsets"].items()
            ]
            assert sum(parts) / PAIRS == pytest.approx(comparison[metric]["difference"], abs=1e-12)


def test_each_metric_has_two_families(result: dict[str, Any]):
    """All pairs' comparisons, and the subsets' comparisons; ten pairs have no bootstrap, but McNemar's test."""
    of_subsets = [each for subset in result["subsets"].values() for each in subset["comparisons"]]
    for family in (result["comparisons"], of_subsets):
        for metric in (ACCURACY, *MEANS):
            tested = [each[metric] for each in family if each[metric]["p"] is not None]
            assert [test["p_holm"] for test in tested] == holm([test["p"] for test in tested])
    small = result["subsets"]["small"]["comparisons"][0]
    assert small["eval_rewards/margins"] | {"difference": 0} == {
        "difference": 0,
        "interval": None,
        "p": None,
        "p_holm": None,
    }
    assert small[ACCURACY]["p_holm"] is not None


def test_the_seed_decides(runs: list[Path], result: dict[str, Any]):
    assert compare(runs) == result
    other = compare(runs, seed=1)
    assert other["comparisons"][1][LOSS]["interval"] != result["comparisons"][1][LOSS]["interval"]
    assert other["comparisons"][1][ACCURACY] == result["comparisons"][1][ACCURACY]


def test_one_beta_and_loss_for_all(runs: list[Path], tmp_path: Path):
    other = altered(runs[1], tmp_path / "other", settings={"beta": 0.5, "loss_type": ["ipo"]})
    found = compare([runs[0], other], {"beta": 0.2, "loss_type": ("hinge",)})
    expected = rescore(runs[1], [LossSettings(beta=0.2, loss_type=("hinge",))])
    assert found["runs"][1][LOSS] == pytest.approx(expected["results"][0]["eval_loss"], rel=1e-12)
    assert found["settings"]["beta"] == 0.2


@pytest.mark.parametrize("loss", ["aot", "sft"])
def test_a_loss_that_no_pair_has_is_not_compared(runs: list[Path], loss: str):
    found = compare(runs[:2], {"loss_type": (loss,)})
    assert found["runs"][0][LOSS] is None
    assert LOSS not in found["comparisons"][0]
    assert any("traced" in note for note in found["notes"])
    print_comparison(found, Console(quiet=True))


def test_notes_say_what_else_differs(runs: list[Path], tmp_path: Path):
    other = altered(
        runs[1], tmp_path / "other", precision="int8", group_by="topic",
        models={"reference": {"weights_and_graph_sha256": ["another"]}},
    )  # fmt: skip
    notes = " | ".join(compare([runs[0], other])["notes"])
    assert "precision" in notes
    assert "references differ" in notes
    assert "the column kind; other runs have topic" in notes
    assert compare(runs[:2])["notes"] == []


def test_a_run_of_ties_is_not_a_bad_one_without_a_note(runs: list[Path], tmp_path: Path):
    """A policy that is its own reference: all its margins are 0, and count as wrong."""
    alike = np.full(PAIRS, -50.0)
    itself = write_run(tmp_path / "itself", pairs_of(PAIRS, groups=GROUPS), alike, alike)

    [note] = compare([itself, runs[0]])["notes"]
    assert "a tie is counted as wrong" in note
    assert "(itself: 240, checkpoint-100: 0)" in note


# What is refused.


def test_other_rows_are_refused(runs: list[Path], tmp_path: Path):
    zeros = np.zeros(PAIRS)
    shifted = write_run(tmp_path / "shifted", pairs_of(PAIRS, first_row=2), zeros, zeros)
    with pytest.raises(UsageError, match=r"shifted: is not of the same pairs as .*100: 2 rows .* such as row 1, which"):
        compare([runs[0], shifted])


@pytest.mark.parametrize("part_size", [1024, 7])
def test_other_tokens_are_refused(runs: list[Path], tmp_path: Path, part_size: int):
    """Of two pairs only, whichever way the parts are cut."""
    pairs = pairs_of(PAIRS, groups=GROUPS)
    for position in (100, 239):
        pairs[position].rejected_ids[0] = 9
    zeros = np.zeros(PAIRS)
    other = write_run(tmp_path / "other", pairs, zeros, zeros, part_size=part_size)
    with pytest.raises(UsageError, match=r"the tokens of 2 of 240 rows differ, such as row 101; .*--max-length"):
        compare([runs[0], other])


def test_other_settings_are_refused(runs: list[Path], tmp_path: Path):
    other = altered(runs[1], tmp_path / "beta", settings={"beta": 0.5, "loss_type": ["sigmoid"]})
    with pytest.raises(UsageError, match=r"other settings than .*: beta \(0.5, and 0.1 there\); say --beta for all"):
        compare([runs[0], other])
    other = altered(runs[1], tmp_path / "wpo", settings={"beta": 0.1, "loss_type": ["sigmoid"], "use_weighting": True})
    with pytest.raises(UsageError, match=r"use_weighting \(True, and False there\); evaluate both with the same"):
        compare([runs[0], other])


def test_one_run_is_none_to_compare(runs: list[Path]):
    with pytest.raises(UsageError, match="name two or more"):
        compare(runs[:1])


def test_a_damaged_part_is_refused(runs: list[Path], tmp_path: Path):
    other = altered(runs[1], tmp_path / "damaged")
    part = other / "scores" / "part-00001.parquet"
    part.write_bytes(part.read_bytes()[:-9])
    with pytest.raises(StorageError, match=r"part-00001.parquet: is not what was written"):
        compare([runs[0], other])


# Real runs.


def test_runs_of_an_evaluation(tmp_path: Path):
    """The same evaluation in parts of 8 and of 5, one with groups: the same pairs, and nothing differs."""
    bundle = make_fake_bundle(tmp_path / "bundle")
    rows = [{**ROWS[i % 5], "prompt": f"{ROWS[i % 5]['prompt']} {i}"} for i in range(36)]
    dataset = write_rows(tmp_path / "pairs.jsonl", rows)
    for name, options in (("one", {"part_size": 8}), ("two", {"part_size": 5, "group_by": "kind"})):
        evaluate(bundle, dataset, tmp_path / name, EvaluateOptions(**options), engine=FakeEngines())
    result = compare([tmp_path / "one", tmp_path / "two"])
    assert [result["comparisons"][0][metric]["difference"] for metric in (ACCURACY, *MEANS)] == [0] * 5
    assert list(result["subsets"]) == ["sea", "sky"]


def test_digests_tell_pairs_and_places_apart(tmp_path: Path):
    pairs = pairs_of(3)
    pairs[2] = pairs[0]
    zeros = np.zeros(3)
    digests = read_digests(write_run(tmp_path / "run", pairs, zeros, zeros, part_size=2))
    keys, swapped = pair_keys(digests), pair_keys(digests[:, [0, 2, 1]])
    assert keys[0] == keys[2]
    assert len({*keys.tolist(), *swapped.tolist()}) == 4


def test_names_tell_runs_apart():
    assert run_names([Path("/a/x/run"), Path("/a/y/run")]) == ["x/run", "y/run"]
    assert run_names([Path("/a/x"), Path("/a/y")]) == ["x", "y"]
    assert run_names([Path("/a/x"), Path("/a/y"), Path("/a/x")]) == ["x", "y", "x (2)"]


# What a person sees.


def test_the_command_writes_json_and_page(runs: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    output = tmp_path / "comparison"
    arguments = ["compare", *map(str, runs), "--output", str(output)]
    assert dpo_fast.cli.run(arguments) == 0
    shown = capsys.readouterr().out
    assert "checkpoint-300 against checkpoint-100" in shown
    assert "\x1b[2J" not in shown
    assert "[red]plain" in shown
    expected = json.loads(json.dumps(compare(runs)))
    assert json.loads((output / "compare.json").read_text()) == expected
    page = (output / "compare.html").read_text()
    assert "<script" not in page
    assert "&lt;script&gt;" in page
    assert "default-src 'none'" in page

    assert dpo_fast.cli.run(arguments) == 2
    assert "exists already" in capsys.readouterr().err
    assert dpo_fast.cli.run([*arguments, "--overwrite", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == expected


def test_nothing_is_left_of_a_comparison_that_fails(
    runs: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    assert dpo_fast.cli.run(["compare", str(runs[0]), str(tmp_path), "--output", str(tmp_path / "out")]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_settings_from_the_command_line(runs: list[Path], capsys: pytest.CaptureFixture[str]):
    arguments = [
        "compare",
        *map(str, runs[:2]),
        "--beta",
        "0.5",
        "--loss-type",
        "ipo",
        "--reference-free",
        "sum",
        "--json",
    ]
    assert dpo_fast.cli.run(arguments) == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["settings"]["beta"], result["settings"]["loss_type"]) == (0.5, ["ipo"])
    expected = rescore(runs[0], [LossSettings(beta=0.5, loss_type=("ipo",), reference_free="sum")])
    assert result["runs"][0][LOSS] == pytest.approx(expected["results"][0]["eval_loss"], rel=1e-12)


@pytest.mark.parametrize("command", ["compare", "advise"])
def test_neither_torch_nor_an_engine_is_loaded(runs: list[Path], command: str):
    program = (
        "import sys, dpo_fast.cli; code = dpo_fast.cli.run(sys.argv[1:]); "
        "print(code, sorted({'torch', 'transformers', 'onnxruntime', 'onnx'} & set(sys.modules)), file=sys.stderr)"
    )
    arguments = [command, *map(str, runs[: 2 if command == "compare" else 1]), "--json"]
    done = subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True, check=True)
    assert done.stderr.strip() == "0 []"
