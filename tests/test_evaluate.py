"""The main job, with engines that need no model: what is written, what is taken again, what is refused."""

import errno
import json
import math
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_engines import ROWS, FakeEngine, FakeEngines, expected, make_fake_bundle, write_rows

import dpo_fast.evaluate
from dpo_fast.batches import Batch
from dpo_fast.bundle import POLICY, REFERENCE, Bundle, open_bundle
from dpo_fast.errors import (
    BundleError,
    CheckpointError,
    DatasetError,
    EngineOutputError,
    InputError,
    OutputExistsError,
    RowError,
    StorageError,
    UsageError,
)
from dpo_fast.evaluate import METRICS, SKIPPED, EvaluateOptions, evaluate
from dpo_fast.store import ScoreStore
from dpo_fast.tokens import load_tokenizer, tokenize_pair
from dpo_fast.types import LossSettings, PreferenceRow, TokenScores

EMPTY = {"prompt": "", "chosen": "a", "rejected": "b", "kind": "sky"}
TRL_KEYS = [
    "eval_loss", "eval_rewards/chosen", "eval_rewards/rejected", "eval_rewards/margins", "eval_rewards/accuracies",
    "eval_logps/chosen", "eval_logps/rejected", "eval_logits/chosen", "eval_logits/rejected", "eval_entropy",
    "eval_mean_token_accuracy",
]  # fmt: skip


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    return make_fake_bundle(tmp_path / "bundle")


@pytest.fixture
def dataset(tmp_path: Path) -> str:
    return write_rows(tmp_path / "pairs.jsonl", ROWS)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return tmp_path / "run"


def content(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


class Failing:
    """Opens engines of which one fails at its `after`-th batch; NaN, or an error."""

    def __init__(self, after: int, error: BaseException | None = None) -> None:
        self.after, self.error, self.calls = after, error, 0

    def __call__(self, bundle: Bundle, role: str) -> Any:
        outer, engine = self, FakeEngine(salt=role)

        def score(batch: Batch) -> TokenScores:
            outer.calls += 1
            scores = type(engine).score(engine, batch)
            if outer.calls <= outer.after:
                return scores
            if outer.error is not None:
                raise outer.error
            return replace(scores, log_prob=np.full_like(scores.log_prob, np.nan))

        engine.score = score  # type: ignore[method-assign]
        return engine


# What is written.


def test_metrics_are_those_of_the_tokens_by_hand(bundle: Path, dataset: str, run: Path) -> None:
    """Rewards, accuracy and the sigmoid loss from the fake engine's own words, row by row, in plain Python."""
    metrics = evaluate(bundle, dataset, run, engine=FakeEngines())

    tokenizer = load_tokenizer(bundle / POLICY)
    margins, losses, chosen_rewards = [], [], []
    for number, row in enumerate(ROWS, start=1):
        pair = tokenize_pair(PreferenceRow(number, row["prompt"], row["chosen"], row["rejected"]), tokenizer, 64)

        def reward(completion: list[int], prompt: list[int] = pair.prompt_ids) -> float:
            policy, reference = (
                sum(values[0] for values in expected(prompt, completion, salt)) for salt in (POLICY, REFERENCE)
            )
            return 0.1 * (policy - reference)

        chosen_rewards.append(reward(pair.chosen_ids))
        margins.append(chosen_rewards[-1] - reward(pair.rejected_ids))
        losses.append(math.log1p(math.exp(-margins[-1])))
    # The scores are eighths, exact in float32; what is left is float64's rounding.
    assert metrics["eval_rewards/chosen"] == pytest.approx(np.mean(chosen_rewards), rel=1e-12)
    assert metrics["eval_rewards/margins"] == pytest.approx(np.mean(margins), rel=1e-12)
    assert metrics["eval_rewards/accuracies"] == np.mean(np.array(margins) > 0)
    assert metrics["eval_loss"] == pytest.approx(np.mean(losses), rel=1e-12)
    assert metrics["counts"]["pairs"] == len(ROWS)


def test_metrics_json_has_the_documented_keys_in_order(bundle: Path, dataset: str, run: Path) -> None:
    returned = evaluate(bundle, dataset, run, engine=FakeEngines())

    text = (run / METRICS).read_text(encoding="utf-8")
    metrics = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert metrics == json.loads(json.dumps(returned))
    assert list(metrics) == [*TRL_KEYS, "counts", "completion_lengths", "intervals", "timing", "provenance"]
    assert set(metrics["counts"]) == {"pairs", "ties", "truncated", "skipped", "tokens"}
    assert list(metrics["timing"]) == ["load_seconds", "tokenize_seconds", "score_seconds", "total_seconds"]
    assert {"versions", "hardware", "recipe", "models", "dataset", "settings"} <= set(metrics["provenance"])
    for key, (low, high) in metrics["intervals"].items():
        assert low <= metrics[key] <= high
    assert {path.name for path in run.iterdir()} == {METRICS, SKIPPED, "scores"}
    assert (run / SKIPPED).read_text() == ""


def test_no_second_is_counted_twice(bundle: Path, dataset: str, run: Path) -> None:
    timing = evaluate(bundle, dataset, run, engine=FakeEngines())["timing"]

    parts = [seconds for name, seconds in timing.items() if name != "total_seconds"]
    assert min(parts) >= 0
    assert sum(parts) <= timing["total_seconds"]


def test_nothing_of_this_machine_s_folders_is_published(
    bundle: Path, dataset: str, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluate(bundle, dataset, run, engine=FakeEngines())

    for path in (run / METRICS, run / SKIPPED, bundle / POLICY / "README.md"):
        assert str(tmp_path) not in path.read_text(encoding="utf-8")
        assert str(Path.home()) + "/" not in path.read_text(encoding="utf-8")
    assert json.loads((run / METRICS).read_text())["provenance"]["dataset"]["name"] == "pairs.jsonl"

    folder = tmp_path / "folder"
    folder.mkdir()
    write_rows(folder / "test.jsonl", ROWS)
    monkeypatch.chdir(folder)
    metrics = evaluate(bundle, ".", tmp_path / "run2", engine=FakeEngines())
    assert metrics["provenance"]["dataset"]["name"] == "folder"
    metrics = evaluate(bundle, "../folder/", tmp_path / "run3", engine=FakeEngines())
    assert metrics["provenance"]["dataset"]["name"] == "folder"


def test_provenance_names_what_was_used(bundle: Path, dataset: str, run: Path) -> None:
    settings = LossSettings(beta=0.3, loss_type=("ipo", "sft"), loss_weights=(1.0, 0.5))
    options = EvaluateOptions(loss=settings, aggregate="trl", batch_size=2, limit=4, seed=3, max_length=40)

    provenance = evaluate(bundle, dataset, run, options, engine=FakeEngines(name="fake 2.0"))["provenance"]

    opened = open_bundle(bundle)
    for role in (POLICY, REFERENCE):
        hashes = provenance["models"][role]["weights_and_graph_sha256"]
        assert hashes == [
            opened.manifest.files[name]["sha256"] for name in (f"{role}.onnx", f"{role}/model.safetensors")
        ]
    assert provenance["engine"] == "fake 2.0"
    assert provenance["settings"]["loss_type"] == ("ipo", "sft")
    assert provenance["settings"]["beta"] == 0.3
    assert provenance["dataset"]["rows"] == 4
    assert len(provenance["dataset"]["fingerprint"]) == 64
    assert (provenance["aggregate"], provenance["batch_size"], provenance["bootstrap_seed"]) == ("trl", 2, 3)
    assert (provenance["max_length"], provenance["limit"]) == (40, 4)
    assert 0 <= provenance["padding_tokens"] < provenance["computed_tokens"]


def test_the_card_gets_the_numbers_and_keeps_its_text(bundle: Path, dataset: str, run: Path) -> None:
    (bundle / POLICY / "README.md").write_text("# Mine\n\nMy text.\n")

    metrics = evaluate(bundle, dataset, run, engine=FakeEngines())

    card = (bundle / POLICY / "README.md").read_text(encoding="utf-8")
    assert "My text." in card
    assert "pairs.jsonl" in card
    assert f"value: {metrics['eval_loss']}" in card
    open_bundle(bundle).verify()  # the card is no part of what was exported


def test_a_card_that_cannot_be_written_is_said_and_costs_no_run(bundle: Path, dataset: str, run: Path) -> None:
    (bundle / POLICY / "README.md").write_text("---\n: not yaml [\n---\n# Mine\n")
    lines: list[str] = []

    evaluate(bundle, dataset, run, report=lines.append, engine=FakeEngines())

    assert (run / METRICS).is_file()
    assert len(lines) == 1
    assert lines[0].startswith("the model card was not updated: ")


def test_groups(bundle: Path, dataset: str, run: Path) -> None:
    metrics = evaluate(bundle, dataset, run, EvaluateOptions(group_by="kind"), engine=FakeEngines())

    groups = metrics["groups"]
    assert {name: group["pairs"] for name, group in groups.items()} == {"sea": 2, "sky": 3}
    weighted = sum(group["pairs"] * group["eval_rewards/margins"] for group in groups.values()) / len(ROWS)
    assert weighted == pytest.approx(metrics["eval_rewards/margins"], rel=1e-12)


def test_truncated_pairs_are_counted(bundle: Path, dataset: str, run: Path, tmp_path: Path) -> None:
    """A limit at which the longest pair of the set is cut off, and no other."""
    tokenizer = load_tokenizer(bundle / POLICY)
    pairs = [
        tokenize_pair(PreferenceRow(number, row["prompt"], row["chosen"], row["rejected"]), tokenizer, None)
        for number, row in enumerate(ROWS, start=1)
    ]
    lengths = sorted(len(pair.prompt_ids) + max(len(pair.chosen_ids), len(pair.rejected_ids)) for pair in pairs)
    assert lengths[-2] < lengths[-1]

    whole = evaluate(bundle, dataset, run, EvaluateOptions(max_length=lengths[-1]), engine=FakeEngines())
    cut = evaluate(bundle, dataset, tmp_path / "cut", EvaluateOptions(max_length=lengths[-2]), engine=FakeEngines())

    assert whole["counts"]["truncated"] == 0
    assert cut["counts"]["truncated"] == 1
    tokens = [sum(metrics["counts"]["tokens"].values()) for metrics in (whole, cut)]
    assert tokens[0] - tokens[1] >= lengths[-1] - lengths[-2]


def test_budget_and_layout_change_no_number(dataset: str, tmp_path: Path) -> None:
    metrics = []
    for number, (layout, budget) in enumerate([("shared", 1), ("shared", 10_000), ("plain", 1), ("plain", 100)]):
        folder = make_fake_bundle(tmp_path / f"bundle{number}", layout=layout)  # type: ignore[arg-type]
        options = EvaluateOptions(token_budget=budget)
        result = evaluate(folder, dataset, tmp_path / f"run{number}", options, engine=FakeEngines())
        metrics.append({name: value for name, value in result.items() if name not in ("timing", "provenance")})

    assert metrics[1:] == metrics[:-1]


# Rows that cannot be used.


def test_a_bad_row_stops_the_run_and_leaves_nothing(bundle: Path, run: Path, tmp_path: Path) -> None:
    dataset = write_rows(tmp_path / "bad.jsonl", [*ROWS[:2], EMPTY])

    with pytest.raises(RowError, match="row 3: 'prompt' is empty"):
        evaluate(bundle, dataset, run, engine=FakeEngines())

    assert not run.exists()


def test_skipped_rows_are_listed_and_counted(bundle: Path, run: Path, tmp_path: Path) -> None:
    long = {"prompt": "weather " * 80, "chosen": "a", "rejected": "b", "kind": "sky"}
    dataset = write_rows(tmp_path / "bad.jsonl", [EMPTY, ROWS[0], long, ROWS[1]])

    metrics = evaluate(bundle, dataset, run, EvaluateOptions(on_error="skip"), engine=FakeEngines())

    assert metrics["counts"]["pairs"] == 2
    assert metrics["counts"]["skipped"] == 2
    skipped = [json.loads(line) for line in (run / SKIPPED).read_text().splitlines()]
    assert [row["row"] for row in skipped] == [1, 3]
    assert "is empty" in skipped[0]["reason"]
    assert "--max-length 64" in skipped[1]["reason"]
    assert ScoreStore(run / "scores").read(1).rows.tolist() == [2, 4]


def test_a_set_without_a_usable_row_is_refused(bundle: Path, run: Path, tmp_path: Path) -> None:
    dataset = write_rows(tmp_path / "bad.jsonl", [EMPTY, EMPTY])

    with pytest.raises(DatasetError, match="none of 2 rows can be used; row 1: 'prompt' is empty"):
        evaluate(bundle, dataset, run, EvaluateOptions(on_error="skip"), engine=FakeEngines())

    assert not run.exists()


# Engines that fail, runs that are interrupted.


@pytest.mark.parametrize("after", [0, 1])
def test_a_faulty_engine_leaves_nothing(bundle: Path, dataset: str, run: Path, after: int) -> None:
    with pytest.raises(EngineOutputError, match=r"row \d: the engine returned log_prob nan"):
        evaluate(bundle, dataset, run, engine=Failing(after))

    assert not run.exists()


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three parts of the five rows."""
    monkeypatch.setattr(dpo_fast.evaluate, "PAIRS_PER_PART", 2)


def interrupt(bundle: Path, dataset: str, run: Path) -> None:
    """Break off after the first part: with this budget a part is two batches, one of each model."""
    with pytest.raises(KeyboardInterrupt):
        evaluate(bundle, dataset, run, EvaluateOptions(token_budget=1000), engine=Failing(3, KeyboardInterrupt()))
    assert sorted(content(run)) == ["scores/part-00000.parquet"]


@pytest.mark.usefixtures("small_parts")
def test_an_interrupted_run_goes_on_where_it_was(bundle: Path, dataset: str, run: Path, tmp_path: Path) -> None:
    options = EvaluateOptions(token_budget=1000)
    whole_engines, engines = FakeEngines(), FakeEngines()
    whole = evaluate(bundle, dataset, tmp_path / "whole", options, engine=whole_engines)
    assert whole_engines.calls == 6  # three parts under two models
    interrupt(bundle, dataset, run)
    first = (run / "scores" / "part-00000.parquet").stat().st_mtime_ns

    resumed = evaluate(bundle, dataset, run, options, engine=engines)

    assert engines.calls == 4
    assert (run / "scores" / "part-00000.parquet").stat().st_mtime_ns == first
    for metrics in (whole, resumed):
        del metrics["timing"]
    assert resumed["provenance"].pop("computed_tokens") < whole["provenance"].pop("computed_tokens")
    del whole["provenance"]["padding_tokens"], resumed["provenance"]["padding_tokens"]
    assert resumed == whole


@pytest.mark.usefixtures("small_parts")
def test_other_losses_need_no_scores_again(bundle: Path, dataset: str, run: Path) -> None:
    """The loss is no part of what the scores depend on."""
    interrupt(bundle, dataset, run)
    engines = FakeEngines()
    options = EvaluateOptions(token_budget=1000, loss=LossSettings(beta=0.7, loss_type=("ipo",)))

    evaluate(bundle, dataset, run, options, engine=engines)

    assert engines.calls == 4


@pytest.mark.usefixtures("small_parts")
@pytest.mark.parametrize(
    ("options", "says"),
    [
        (EvaluateOptions(max_length=9), "token ids"),
        (EvaluateOptions(group_by="kind"), "row numbers, truncation or groups"),
        (EvaluateOptions(loss=LossSettings(reference_free="sum")), "reference scores differ"),
    ],
)
def test_an_unfinished_run_of_something_else_is_refused(
    bundle: Path, dataset: str, run: Path, options: EvaluateOptions, says: str
) -> None:
    interrupt(bundle, dataset, run)
    before = content(run)
    engines = FakeEngines()

    with pytest.raises(OutputExistsError, match=f"unfinished run.*{says}.*--overwrite"):
        evaluate(bundle, dataset, run, options, engine=engines)

    assert engines.calls == 0
    assert content(run) == before
    evaluate(bundle, dataset, run, replace(options, overwrite=True), engine=FakeEngines())


@pytest.mark.usefixtures("small_parts")
def test_an_unfinished_run_of_other_weights_or_engine_is_refused(
    bundle: Path, dataset: str, run: Path, tmp_path: Path
) -> None:
    interrupt(bundle, dataset, run)
    other = make_fake_bundle(tmp_path / "other", weights=b"others")

    with pytest.raises(OutputExistsError, match="differ in weights and graph"):
        evaluate(other, dataset, run, engine=FakeEngines())
    with pytest.raises(OutputExistsError, match="differ in engine"):
        evaluate(bundle, dataset, run, engine=FakeEngines(name="fake 2.0"))
    plain = make_fake_bundle(tmp_path / "plain", layout="plain")
    with pytest.raises(OutputExistsError, match="differ in layout"):
        evaluate(plain, dataset, run, engine=FakeEngines())


@pytest.mark.usefixtures("small_parts")
def test_an_unfinished_run_of_more_pairs_is_refused(bundle: Path, dataset: str, run: Path) -> None:
    """Its further parts would stay beside the finished run's, and be taken for its own."""
    with pytest.raises(KeyboardInterrupt):
        evaluate(bundle, dataset, run, EvaluateOptions(token_budget=1000), engine=Failing(5, KeyboardInterrupt()))
    assert len(content(run)) == 2

    with pytest.raises(OutputExistsError, match="unfinished run of more than 2 pairs"):
        evaluate(bundle, dataset, run, EvaluateOptions(limit=2), engine=FakeEngines())

    metrics = evaluate(bundle, dataset, run, EvaluateOptions(limit=2, overwrite=True), engine=FakeEngines())
    assert metrics["counts"]["pairs"] == 2
    assert sorted(content(run)) == [METRICS, "scores/part-00000.parquet", SKIPPED]


@pytest.mark.usefixtures("small_parts")
def test_a_damaged_part_is_named(bundle: Path, dataset: str, run: Path) -> None:
    interrupt(bundle, dataset, run)
    part = run / "scores" / "part-00000.parquet"
    part.write_bytes(part.read_bytes()[:-20])

    with pytest.raises(StorageError, match=r"part-00000\.parquet: cannot be read; remove it"):
        evaluate(bundle, dataset, run, engine=FakeEngines())

    part.unlink()
    evaluate(bundle, dataset, run, engine=FakeEngines())


def test_a_bar_is_shown_on_request(bundle: Path, dataset: str, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    evaluate(bundle, dataset, run, EvaluateOptions(progress=True), engine=FakeEngines())

    assert "20/20" in capsys.readouterr().err  # both completions of five pairs, under two models


# Outputs that exist.


def test_a_finished_run_is_kept_unless_overwritten(bundle: Path, dataset: str, run: Path) -> None:
    evaluate(bundle, dataset, run, engine=FakeEngines())
    before, engines = content(run), FakeEngines()

    with pytest.raises(OutputExistsError, match=r"holds a finished run.*--overwrite"):
        evaluate(bundle, dataset, run, engine=engines)
    assert content(run) == before

    evaluate(bundle, dataset, run, EvaluateOptions(limit=2, overwrite=True), engine=engines)
    assert json.loads((run / METRICS).read_text())["counts"]["pairs"] == 2


def test_bad_input_does_not_cost_the_run_that_would_be_overwritten(bundle: Path, dataset: str, run: Path) -> None:
    evaluate(bundle, dataset, run, engine=FakeEngines())
    before = content(run)

    with pytest.raises(InputError):
        evaluate(bundle, dataset, run, EvaluateOptions(overwrite=True, group_by="nothing"), engine=FakeEngines())

    assert content(run) == before


def test_overwriting_touches_no_file_of_others(bundle: Path, dataset: str, run: Path) -> None:
    evaluate(bundle, dataset, run, engine=FakeEngines())
    (run / "notes.txt").write_text("mine")
    (run / "scores" / "notes.txt").write_text("mine")

    evaluate(bundle, dataset, run, EvaluateOptions(overwrite=True), engine=FakeEngines())

    assert (run / "notes.txt").read_text() == (run / "scores" / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize(
    "names",
    [["thesis.tex"], [METRICS], [METRICS, "scores/mine.csv"], [METRICS, SKIPPED]],
)
def test_a_folder_of_others_is_never_touched(
    bundle: Path, dataset: str, run: Path, names: list[str], overwrite: bool
) -> None:
    for name in names:
        (run / name).parent.mkdir(parents=True, exist_ok=True)
        (run / name).write_text("mine")
    before = content(run)

    with pytest.raises(OutputExistsError, match="is no run of `dpo-fast evaluate`; name another folder"):
        evaluate(bundle, dataset, run, EvaluateOptions(overwrite=overwrite), engine=FakeEngines())

    assert content(run) == before


def test_a_file_or_a_dead_link_in_the_way_is_refused(bundle: Path, dataset: str, run: Path) -> None:
    run.symlink_to(run.parent / "nowhere")
    with pytest.raises(OutputExistsError):
        evaluate(bundle, dataset, run, EvaluateOptions(overwrite=True), engine=FakeEngines())

    run.unlink()
    run.write_text("mine")
    with pytest.raises(OutputExistsError):
        evaluate(bundle, dataset, run, EvaluateOptions(overwrite=True), engine=FakeEngines())
    assert run.read_text() == "mine"


def test_an_empty_folder_is_filled(bundle: Path, dataset: str, run: Path) -> None:
    run.mkdir()

    evaluate(bundle, dataset, run, engine=FakeEngines())

    assert (run / METRICS).is_file()


def test_a_folder_that_cannot_be_written_is_found_before_anything_is_scored(
    bundle: Path, dataset: str, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make = Path.mkdir

    def refuse(path: Path, *arguments: Any, **keywords: Any) -> None:
        if path.is_relative_to(run):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        make(path, *arguments, **keywords)

    monkeypatch.setattr(Path, "mkdir", refuse)
    engines = FakeEngines()

    with pytest.raises(StorageError, match="Permission denied; name a folder that you may write to"):
        evaluate(bundle, dataset, run, engine=engines)
    assert engines.calls == 0


def test_a_file_on_the_way_is_found_before_anything_is_scored(bundle: Path, dataset: str, tmp_path: Path) -> None:
    engines = FakeEngines()

    with pytest.raises(StorageError, match="a part of the path is a file"):
        evaluate(bundle, dataset, Path(dataset) / "run", engine=engines)
    assert engines.calls == 0


# Bundles and options that do not fit.


def test_without_a_reference_a_score_must_be_chosen(dataset: str, run: Path, tmp_path: Path) -> None:
    bundle = make_fake_bundle(tmp_path / "bundle", reference=False)
    with pytest.raises(UsageError, match="has no reference; say --reference-free sum, average or norm"):
        evaluate(bundle, dataset, run, engine=FakeEngines())

    engines = FakeEngines()
    metrics = evaluate(bundle, dataset, run, EvaluateOptions(loss=LossSettings(reference_free="sum")), engine=engines)

    assert set(engines.engines) == {POLICY}
    # The reward is then beta times the sum of log-probs.
    assert metrics["eval_rewards/chosen"] == pytest.approx(0.1 * metrics["eval_logps/chosen"], rel=1e-12)
    assert set(metrics["provenance"]["models"]) == {POLICY}


def test_reference_free_does_not_run_a_reference_that_is_there(bundle: Path, dataset: str, run: Path) -> None:
    engines = FakeEngines()

    evaluate(bundle, dataset, run, EvaluateOptions(loss=LossSettings(reference_free="average")), engine=engines)

    assert set(engines.engines) == {POLICY}


@pytest.mark.parametrize(
    "name", ["policy/model.safetensors", "policy/tokenizer.json", "policy/config.json", "policy.onnx"]
)
@pytest.mark.parametrize("damage", ["altered", "missing", "same size"])
def test_an_altered_bundle_is_refused_by_the_file_s_name(
    bundle: Path, dataset: str, run: Path, name: str, damage: str
) -> None:
    path = bundle / name
    if damage == "missing":
        path.unlink()
    elif damage == "altered":
        path.write_bytes(path.read_bytes() + b"x")
    else:
        path.write_bytes(bytes([path.read_bytes()[0] ^ 1]) + path.read_bytes()[1:])

    with pytest.raises(BundleError, match=f"{name}: is .*export the bundle again"):
        evaluate(bundle, dataset, run, engine=FakeEngines())

    assert not run.exists()


def test_ids_beyond_the_vocabulary_are_refused(dataset: str, run: Path, tmp_path: Path) -> None:
    bundle = make_fake_bundle(tmp_path / "bundle")
    manifest = json.loads((bundle / "bundle.json").read_text())
    manifest["models"][POLICY]["vocabulary"] = 100
    (bundle / "bundle.json").write_text(json.dumps(manifest))

    with pytest.raises(BundleError, match=r"row 1: the tokenizer gave the id \d+, and .* vocabulary ends at 99"):
        evaluate(bundle, dataset, run, engine=FakeEngines())


def conversations(tmp_path: Path) -> str:
    def turn(role: str, text: str) -> list[dict[str, str]]:
        return [{"role": role, "content": text}]

    row = {"prompt": turn("user", "hi"), "chosen": turn("assistant", "yes"), "rejected": turn("assistant", "no")}
    return write_rows(tmp_path / "conversations.jsonl", [row])


def test_conversations_need_a_chat_template(bundle: Path, run: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no chat template"):
        evaluate(bundle, conversations(tmp_path), run, engine=FakeEngines())


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (EvaluateOptions(aggregate="mean"), "--aggregate 'mean' is not known; choose from exact, trl"),
        (EvaluateOptions(batch_size=0), "--batch-size 0 must be at least 1"),
        (EvaluateOptions(token_budget=0), "--token-budget 0 must be at least 1"),
        (EvaluateOptions(limit=0), "--limit 0 must be at least 1"),
        (EvaluateOptions(max_length=0), "--max-length 0 must be at least 1"),
        (EvaluateOptions(max_length=257), "--max-length 257: the policy has positions for 256 tokens"),
        (EvaluateOptions(seed=-1), "--seed -1 must be at least 0"),
        (EvaluateOptions(group_by="colour"), "--group-by 'colour'"),
        (EvaluateOptions(split="test"), "--split 'test'"),
    ],
)
def test_options_that_cannot_be_are_refused(
    bundle: Path, dataset: str, run: Path, options: EvaluateOptions, says: str
) -> None:
    with pytest.raises(UsageError) as caught:
        evaluate(bundle, dataset, run, options, engine=FakeEngines())

    assert says in str(caught.value)
    assert not run.exists()


def test_an_engine_that_does_not_open_is_an_error_of_its_own(bundle: Path, dataset: str, run: Path) -> None:
    """The default engine, on a graph that is none."""
    with pytest.raises(BundleError, match="ONNX Runtime cannot load it"):
        evaluate(bundle, dataset, run)

    assert not run.exists()


def raise_overflow(*arguments: object, **keywords: object) -> Callable[..., Any]:
    raise UsageError("eval_loss is inf: the numbers overflow; change the loss")


@pytest.mark.usefixtures("small_parts")
def test_scores_outlive_a_loss_that_overflows(
    bundle: Path, dataset: str, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(dpo_fast.evaluate, "compute_metrics", raise_overflow)
        with pytest.raises(UsageError, match="overflow"):
            evaluate(bundle, dataset, run, engine=FakeEngines())
    engines = FakeEngines()

    evaluate(bundle, dataset, run, engine=engines)

    assert engines.calls == 0
