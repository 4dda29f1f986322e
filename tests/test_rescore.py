"""Rescoring: the numbers of an evaluation with the same settings, to the last bit; many settings at once; the table."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fake_engines import ROWS, FakeEngines, make_fake_bundle, write_rows
from rich.console import Console

import dpo_fast.cli
from dpo_fast.errors import StorageError, UsageError
from dpo_fast.evaluate import EvaluateOptions, evaluate
from dpo_fast.rescore import open_run, rescore
from dpo_fast.rescore_settings import make_settings
from dpo_fast.rescore_table import print_rescore
from dpo_fast.store import ScoreStore
from dpo_fast.types import LOSS_TYPES, LossSettings

REWARD_KEYS = ("eval_rewards/chosen", "eval_rewards/rejected", "eval_rewards/margins", "eval_rewards/accuracies")
MODEL_KEYS = (
    "eval_logps/chosen", "eval_logps/rejected", "eval_logits/chosen", "eval_logits/rejected", "eval_entropy",
    "eval_mean_token_accuracy",
)  # fmt: skip
# With 36 rows in parts of 8, the pairs are several parts, of which the last is not full.
MANY_ROWS = [{**ROWS[i % 5], "prompt": f"{ROWS[i % 5]['prompt']} {i}"} for i in range(36)]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_fake_bundle(tmp_path_factory.mktemp("bundle") / "bundle")


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_rows(tmp_path_factory.mktemp("data") / "pairs.jsonl", MANY_ROWS)


@pytest.fixture(scope="module")
def run(bundle: Path, dataset: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with beta 0.1, the sigmoid loss and groups. Read only: copy it before changing anything."""
    return evaluated(bundle, dataset, tmp_path_factory.mktemp("run") / "run", group_by="kind")


def evaluated(bundle: Path, dataset: str, output: Path, **options: Any) -> Path:
    evaluate(bundle, dataset, output, EvaluateOptions(part_size=8, **options), engine=FakeEngines())
    return output


def metrics_of(run: Path) -> dict[str, Any]:
    return dict(json.loads((run / "metrics.json").read_text(encoding="utf-8")))


# The numbers.


def assert_same_numbers(found: dict[str, Any], metrics: dict[str, Any]) -> None:
    """One setting's results against what an evaluation says of all pairs, or of a group: equal, not approximately."""
    [result], [rewards] = found["results"], found["by_beta"]
    of_all, intervals = found["of_all"], metrics["intervals"]
    assert result["eval_loss"] == metrics["eval_loss"]
    assert {key: rewards[key] for key in REWARD_KEYS} == {key: metrics[key] for key in REWARD_KEYS}
    assert {key: of_all[key] for key in MODEL_KEYS} == {key: metrics[key] for key in MODEL_KEYS}
    of_result = {} if result["interval"] is None else {"eval_loss": result["interval"]}
    assert of_result | rewards["intervals"] | of_all["intervals"] == intervals


SETTINGS = [
    *(LossSettings(loss_type=(name,), label_smoothing=0.1, beta=0.3) for name in LOSS_TYPES),
    LossSettings(loss_type=("sigmoid", "bco_pair", "sft"), loss_weights=(0.8, 0.2, 1.0)),
    LossSettings(ld_alpha=0.3),
    LossSettings(loss_type=("robust",), label_smoothing=0.2, use_weighting=True),
    LossSettings(loss_type=("discopop",), f_divergence_type="alpha_divergence", f_alpha_divergence_coef=0.7),
    LossSettings(loss_type=("discopop",), discopop_tau=0.5),
    *(LossSettings(loss_type=("ipo",), reference_free=kind, ld_alpha=0.5) for kind in ("sum", "average", "norm")),
]


@pytest.mark.parametrize("aggregate", ["exact", "trl"])
@pytest.mark.parametrize(
    "settings",
    SETTINGS,
    ids=[f"{'+'.join(settings.loss_type)}-{number}" for number, settings in enumerate(SETTINGS)],
)
def test_one_setting_gives_the_numbers_of_an_evaluation(
    bundle: Path, dataset: str, run: Path, tmp_path: Path, settings: LossSettings, aggregate: str
) -> None:
    options = {"loss": settings, "aggregate": aggregate, "batch_size": 5, "seed": 3, "group_by": "kind"}
    expected = metrics_of(evaluated(bundle, dataset, tmp_path / "run", **options))

    result = rescore(run, [settings], aggregate=aggregate, batch_size=5, seed=3)

    assert_same_numbers(result, expected)
    assert result["counts"] | {"ties": result["by_beta"][0]["ties"]} == expected["counts"]
    assert result["completion_lengths"] == expected["completion_lengths"]
    assert list(result["groups"]) == list(expected["groups"]) == ["sea", "sky"]
    for name, group in expected["groups"].items():
        assert result["groups"][name]["pairs"] == group["pairs"]
        assert result["groups"][name]["by_beta"][0]["ties"] == group["ties"]
        assert_same_numbers(result["groups"][name], group)
    for name in ("aggregate", "batch_size", "bootstrap_seed", "dataset", "group_by"):
        assert result["provenance"][name] == expected["provenance"][name]


def test_what_a_run_says_of_its_own_loss_is_reproduced(run: Path) -> None:
    """Nothing said: the run's own beta, loss and parameters."""
    settings, notes = make_settings(open_run(run)[1])

    assert notes == []
    assert settings == [LossSettings()]
    assert_same_numbers(rescore(run, settings), metrics_of(run))


def test_many_settings_are_each_what_they_are_alone(run: Path) -> None:
    """But that intervals of many quantities come from one matrix product, which may add in another order."""
    settings, _ = make_settings(open_run(run)[1], ["0.05,0.5", "2"], ["all"])
    result = rescore(run, settings, seed=1)

    assert result["betas"] == [0.05, 0.5, 2.0]
    assert result["loss_types"] == list(LOSS_TYPES)
    assert len(result["results"]) == 45
    for setting, found in zip(settings, result["results"], strict=True):
        alone = rescore(run, [setting], seed=1)
        [expected], [rewards] = alone["results"], alone["by_beta"]
        assert {**found, "interval": None} == {**expected, "interval": None}
        if expected["interval"] is None:
            assert found["interval"] is None
            assert setting.loss_type[0] in ("aot", "aot_unpaired", "sft")
        else:
            assert found["interval"] == pytest.approx(expected["interval"], rel=1e-12, abs=1e-12)
        [at_beta] = [each for each in result["by_beta"] if each["beta"] == setting.beta]
        assert {**at_beta, "intervals": None} == {**rewards, "intervals": None}
        for key, ends in rewards["intervals"].items():
            assert at_beta["intervals"][key] == pytest.approx(ends, rel=1e-12, abs=1e-12)
    assert {**result["of_all"], "intervals": None} == {**alone["of_all"], "intervals": None}


def test_rewards_grow_with_beta_and_accuracy_does_not(run: Path) -> None:
    settings, _ = make_settings(open_run(run)[1], ["0.25", "0.5"])
    small, large = rescore(run, settings)["by_beta"]
    # Powers of two scale float64 without rounding.
    assert [2 * end for end in small["intervals"]["eval_rewards/margins"]] == large["intervals"]["eval_rewards/margins"]
    assert 2 * small["eval_rewards/margins"] == large["eval_rewards/margins"]
    assert small["eval_rewards/accuracies"] == large["eval_rewards/accuracies"]


def test_the_result_is_json_without_nan_and_has_the_documented_keys(run: Path) -> None:
    settings, _ = make_settings(open_run(run)[1], ["0.1,0.2"], ["all"])
    result = rescore(run, settings)

    assert json.loads(json.dumps(result, allow_nan=False)) == result
    assert list(result) == [
        "run", "pairs", "counts", "betas", "loss_types", "results", "by_beta", "of_all", "completion_lengths", "groups",
        "timing", "provenance",
    ]  # fmt: skip
    assert result["run"] == "run"
    assert result["pairs"] == len(MANY_ROWS)
    documented = rescore.__doc__ or ""
    for keys in (result, result["results"][0], result["by_beta"][0], result["timing"]):
        assert [key for key in keys if f"`{key}`" not in documented and not key.startswith("eval_rewards/")] == []
    assert set(result["provenance"]["settings"]).isdisjoint({"beta", "loss_type", "loss_weights", "label_smoothing"})
    parts = sum(value for name, value in result["timing"].items() if name != "total_seconds")
    assert parts == pytest.approx(result["timing"]["total_seconds"], abs=1e-9)


def test_a_run_without_groups_has_none(bundle: Path, dataset: str, tmp_path: Path) -> None:
    run = evaluated(bundle, dataset, tmp_path / "run")
    assert "groups" not in rescore(run, [LossSettings()])


def test_settings_must_have_the_same_pairs_in_common(run: Path) -> None:
    for settings in (
        [],
        [LossSettings(), LossSettings(ld_alpha=0.5)],
        [LossSettings(), LossSettings(discopop_tau=1.0)],
    ):
        with pytest.raises(ValueError, match="they may differ in beta, loss_type"):
            rescore(run, settings)


# Which settings a command line asks for.


def test_lists_are_taken_apart_and_each_element_is_taken_once() -> None:
    settings, notes = make_settings(LossSettings(), ["0.1, 0.5", "0.10,1"], ["ipo,hinge", "ipo"])
    assert [(setting.beta, setting.loss_type) for setting in settings] == [
        (beta, (name,)) for beta in (0.1, 0.5, 1.0) for name in ("ipo", "hinge")
    ]
    assert notes == []


def test_what_is_not_said_is_the_runs() -> None:
    own = LossSettings(
        beta=0.3, loss_type=("exo_pair", "sft"), loss_weights=(1.0, 0.5), label_smoothing=0.1, ld_alpha=0.4,
        f_divergence_type="alpha_divergence", f_alpha_divergence_coef=0.7, use_weighting=True, discopop_tau=0.2,
    )  # fmt: skip
    assert make_settings(own) == ([own], [])
    [sigmoid], _ = make_settings(own, (), ["sigmoid"], ld_alpha=1.0, use_weighting=False, label_smoothing=0.0)
    assert sigmoid == LossSettings(
        beta=0.3, ld_alpha=1.0, f_divergence_type="alpha_divergence", f_alpha_divergence_coef=0.7, discopop_tau=0.2
    )


def test_all_is_every_loss_and_exo_pair_gets_its_smoothing() -> None:
    settings, [note] = make_settings(LossSettings(), (), ["all"])
    assert [setting.loss_type for setting in settings] == [(name,) for name in LOSS_TYPES]
    assert {setting.loss_type[0]: setting.label_smoothing for setting in settings if setting.label_smoothing} == {
        "exo_pair": 1e-3
    }
    assert "exo_pair has a label smoothing of 0.001" in note
    smoothed, notes = make_settings(LossSettings(), (), ["all"], label_smoothing=0.1)
    assert {setting.label_smoothing for setting in smoothed} == {0.1}
    assert notes == []


@pytest.mark.parametrize(
    ("changes", "left_out", "note"),
    [
        (
            {"f_divergence_type": "js_divergence"},
            {"nca_pair", "bco_pair", "sppo_hard", "aot", "aot_unpaired", "apo_zero", "apo_down"},
            "--f-divergence-type js_divergence: nca_pair, bco_pair, sppo_hard, aot, aot_unpaired, apo_zero, apo_down",
        ),
        ({"use_weighting": True}, {"aot", "aot_unpaired"}, "--use-weighting: aot, aot_unpaired"),
        ({"label_smoothing": 0.5}, {"robust"}, "--label-smoothing 0.5: robust"),
    ],
)
def test_all_leaves_out_what_trl_refuses_and_says_so(changes: dict[str, Any], left_out: set[str], note: str) -> None:
    settings, notes = make_settings(LossSettings(), (), ["all"], **changes)
    assert {setting.loss_type[0] for setting in settings} == set(LOSS_TYPES) - left_out
    assert any(line.endswith(note) for line in notes)


# The command line.

Command = Callable[..., tuple[int, str, str]]


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str], run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Command:
    """Run a command line in this process, in a folder of its own that holds a copy of the run."""
    shutil.copytree(run, tmp_path / "run")
    monkeypatch.chdir(tmp_path)

    def call(*arguments: str) -> tuple[int, str, str]:
        capsys.readouterr()
        code = dpo_fast.cli.run(list(arguments))
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


def assert_refused(result: tuple[int, str, str], *says: str) -> None:
    code, output, errors = result
    assert code == 2, errors
    assert output == ""
    [line] = errors.splitlines()
    assert line.startswith("dpo-fast: ")
    assert len(line) < 500
    for text in says:
        assert text in line


def test_the_document_and_the_table_say_the_same(command: Command) -> None:
    arguments = ("rescore", "run", "--beta", "0.05,0.5", "--beta", "2", "--loss-type", "all", "--ld-alpha", "0.5")
    code, document, errors = command(*arguments, "--json")
    assert (code, errors) == (0, "")
    result = json.loads(document, parse_constant=lambda name: pytest.fail(name))
    assert result["betas"] == [0.05, 0.5, 2.0]
    assert result["provenance"]["settings"]["ld_alpha"] == 0.5
    assert any("exo_pair" in note for note in result["notes"])

    code, table, errors = command(*arguments)
    assert (code, errors) == (0, "")
    assert max(map(len, table.splitlines())) <= 120
    lines = table.splitlines()
    for name in LOSS_TYPES:
        [line] = [line for line in lines if line.startswith(f" {name} ") or line.startswith(f"{name} ")]
        values = [each["eval_loss"] for each in result["results"] if each["loss_type"] == name]
        shown = [float(word) for word in line.split()[1:] if not word.startswith("±")]
        assert shown == pytest.approx(values, rel=0.05)  # two digits of uncertainty, or four decimals
    for key in MODEL_KEYS:
        [line] = [line for line in lines if f" {key} " in line]
        assert f" {result['of_all'][key]:.4f}" in line
    assert "note: exo_pair" in table
    assert "ld_alpha 0.5" in table
    for name in ("sea", "sky"):
        assert any(f" {name} " in line for line in lines)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--beta", ""], ["--beta ''", "empty element"]),
        (["--beta", "0.1,,0.5"], ["--beta '0.1,,0.5'", "empty element"]),
        (["--beta", "0.1,strong"], ["--beta 'strong' is not a number"]),
        (["--beta", "0.1,-1"], ["--beta -1.0", "positive"]),
        (["--beta", "0"], ["--beta 0.0", "positive"]),
        (["--beta", "nan"], ["--beta nan"]),
        (["--beta", "1e308"], ["--beta 1e+308", "overflow"]),
        (["--loss-type", ""], ["--loss-type ''", "empty element"]),
        (["--loss-type", "sigmoid,dpo"], ["--loss-type 'dpo'", "sppo_hard"]),
        (["--loss-type", "exo_pair"], ["exo_pair", "--label-smoothing", "1e-3"]),
        (["--loss-type", "all", "--label-smoothing", "1"], ["--label-smoothing 1.0"]),
        (["--loss-type", "all", "--ld-alpha", "2"], ["--ld-alpha 2.0"]),
        (["--loss-type", "aot", "--f-divergence-type", "js_divergence"], ["js_divergence", "aot"]),
        (["--loss-type", "aot", "--use-weighting"], ["--use-weighting"]),
        (["--f-divergence-type", "js"], ["'js'", "js_divergence"]),
        (["--f-alpha-divergence-coef", "inf"], ["--f-alpha-divergence-coef inf"]),
        (["--discopop-tau", "0"], ["--discopop-tau 0.0"]),
        (["--reference-free", "mean"], ["'mean'", "average"]),
        (["--aggregate", "mean"], ["'mean'", "exact"]),
        (["--batch-size", "0"], ["--batch-size 0"]),
        (["--seed", "-1"], ["--seed -1"]),
    ],
    ids=lambda value: " ".join(value)[:60],
)
def test_bad_arguments(command: Command, arguments: list[str], says: list[str]) -> None:
    assert_refused(command("rescore", "run", *arguments), *says)


def test_what_is_no_finished_run(command: Command, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert_refused(command("rescore", "nowhere"), "nowhere: no such run", "dpo-fast evaluate")
    assert_refused(command("rescore", "empty"), "empty: is no run", "metrics.json")
    (tmp_path / "run" / "metrics.json").rename(tmp_path / "metrics.json")
    assert_refused(command("rescore", "run"), "run: is not finished", "without --overwrite")
    shutil.rmtree(tmp_path / "run" / "scores")
    (tmp_path / "metrics.json").rename(tmp_path / "run" / "metrics.json")
    assert_refused(command("rescore", "run"), "run: holds no scores", "evaluate again")


@pytest.mark.parametrize(
    "content", ["", "[]", "{}", '{"provenance": {}}', '{"provenance": {"settings": {"beta": 1}}, "counts": {}}']
)
def test_a_damaged_metrics_json(command: Command, tmp_path: Path, content: str) -> None:
    (tmp_path / "run" / "metrics.json").write_text(content, encoding="utf-8")
    assert_refused(command("rescore", "run"), "metrics.json: is damaged", "remove it, and evaluate again")


def test_a_missing_and_a_damaged_part(command: Command, tmp_path: Path) -> None:
    part = tmp_path / "run" / "scores" / "part-00001.parquet"
    content = bytearray(part.read_bytes())
    part.unlink()
    assert_refused(command("rescore", "run"), "counts 36 pairs, and the parts hold 28", "evaluate again")
    content[len(content) // 2] ^= 1
    part.write_bytes(content)
    assert_refused(command("rescore", "run"), "part-00001.parquet", "evaluate again")


def test_a_run_without_a_reference(bundle: Path, dataset: str, tmp_path: Path, command: Command) -> None:
    own = LossSettings(reference_free="average", beta=2.0)
    alone = evaluated(bundle, dataset, tmp_path / "alone", loss=own)

    assert_refused(command("rescore", "alone"), "alone: was evaluated without a reference", "--reference-free")

    code, document, _ = command("rescore", "alone", "--reference-free", "average", "--json")
    assert code == 0
    assert_same_numbers(json.loads(document), metrics_of(alone))


def test_a_reader_that_fails_is_heard_and_the_others_stop(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read_part, asked = ScoreStore.read_part, []

    def failing(self: ScoreStore, part: int) -> Any:
        asked.append(part)
        if part == 1:
            raise StorageError("part-00001.parquet: is missing")
        return read_part(self, part)

    monkeypatch.setattr(ScoreStore, "read_part", failing)
    with pytest.raises(StorageError, match="part-00001"):
        rescore(run, [LossSettings()])
    assert asked.count(1) == 1


def test_neither_engine_nor_model_is_loaded(run: Path) -> None:
    heavy = ("torch", "onnxruntime", "transformers", "datasets", "onnx", "trl", "rich.console")
    code = (
        "import sys, dpo_fast.cli\n"
        f"code = dpo_fast.cli.run(['rescore', {str(run)!r}, '--json'])\n"
        f"loaded = [name for name in {heavy!r} if name in sys.modules]\n"
        "sys.exit(f'{code} {loaded}')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stderr.strip() == "0 []"


# The table.


def shown(run: Path, betas: str, width: int) -> str:
    settings, notes = make_settings(open_run(run)[1], [betas], ["all"])
    console = Console(width=width, record=True, file=open(os.devnull, "w"))  # noqa: SIM115, PTH123
    print_rescore({**rescore(run, settings), "notes": notes}, console)
    return console.export_text()


@pytest.mark.parametrize(
    ("betas", "width", "has_spread"),
    [("0.1", 100, True), ("0.05,0.1", 60, True), ("0.01,0.05,0.1,0.2,0.5", 100, True), ("0.1,0.2,0.3,0.4", 52, False)],
)
def test_the_table_fits(run: Path, betas: str, width: int, has_spread: bool) -> None:
    """Whatever is left out, all betas and losses are there, and no number is cut."""
    text = shown(run, betas, width)
    lines = text.splitlines()
    assert max(map(len, lines)) <= width
    assert "…" not in "".join(line for line in lines if line.strip().startswith(LOSS_TYPES))
    [header] = [line for line in lines if line.split()[1:] == betas.split(",")][:1]
    assert header.split()[0] == "beta"
    assert ("±" in "".join(line for line in lines if line.strip().startswith("sigmoid "))) == has_spread


def test_too_many_betas_are_several_tables(run: Path) -> None:
    betas = [f"{number / 100:g}" for number in range(1, 25)]
    lines = shown(run, ",".join(betas), 60).splitlines()
    headers = [line.split()[1:] for line in lines if line.split()[:1] == ["beta"]]
    assert len(headers) > 2
    assert [beta for header in headers[: len(headers) // 2] for beta in header] == betas
    assert max(map(len, lines)) <= 60


def test_names_of_the_users_data_are_not_obeyed(run: Path) -> None:
    settings, _ = make_settings(open_run(run)[1])
    result = {**rescore(run, settings), "notes": []}
    result["provenance"]["dataset"]["name"] = "[red]\x1b[31mred[/red]:smile:"
    result["groups"] = {"[blue]\x1b[31m:bug:": result["groups"]["sea"]}
    console = Console(width=100, record=True, file=open(os.devnull, "w"))  # noqa: SIM115, PTH123
    print_rescore(result, console)
    text = console.export_text()
    assert all(character.isprintable() or character == "\n" for character in text)
    for markup in ("[red]", ":smile:", "[blue]", ":bug:"):
        assert markup in text


def test_rescore_is_refused_before_it_reads(run: Path) -> None:
    for options, says in (
        ({"aggregate": "mean"}, "--aggregate 'mean'"),
        ({"batch_size": 0}, "--batch-size 0"),
        ({"seed": -1}, "--seed -1"),
    ):
        with pytest.raises(UsageError, match=says):
            rescore(run, [LossSettings()], **options)
