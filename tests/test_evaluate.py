"""The main job, with engines that need no model: what is written, what is taken again, what is refused."""

import errno
import gc
import hashlib
import json
import math
import os
import shutil
import signal
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_engines import ROWS, FakeEngine, FakeEngines, expected, make_fake_bundle, write_rows
from signals import send

import dpo_fast.evaluate
import dpo_fast.local
import dpo_fast.memory
from dpo_fast.batches import Batch
from dpo_fast.bundle import POLICY, REFERENCE, Bundle, open_bundle
from dpo_fast.errors import (
    BundleError,
    CheckpointError,
    DatasetError,
    EngineOutputError,
    InputError,
    InterruptedRunError,
    OutputExistsError,
    RowError,
    StorageError,
    UsageError,
)
from dpo_fast.evaluate import METRICS, SKIPPED, EvaluateOptions, evaluate
from dpo_fast.merge import merge
from dpo_fast.run_folder import FAILED, locked
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
    assert list(metrics["timing"]) == [
        "load_seconds", "tokenize_seconds", "score_seconds", "metrics_seconds", "total_seconds",
    ]  # fmt: skip
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


class Pipelined(FakeEngine):
    """Two batches under way: a batch is computed when the one before it is given out."""

    def score_all(self, batches: Iterable[Batch]) -> Iterator[TokenScores]:
        under_way: list[TokenScores] = []
        for batch in batches:
            under_way.append(self.score(batch))
            if len(under_way) == 2:
                yield under_way.pop(0)
        yield from under_way


def test_an_engine_with_two_batches_under_way_gives_the_same_numbers(
    bundle: Path, dataset: str, run: Path, tmp_path: Path
) -> None:
    small = EvaluateOptions(token_budget=40, part_size=3)  # several batches a part
    engines: list[Pipelined] = []

    def open_one(_: Bundle, role: str) -> Pipelined:
        engines.append(Pipelined(role))
        return engines[-1]

    found = evaluate(bundle, dataset, run, small, engine=open_one)
    assert max(len(engine.batches) for engine in engines) >= 3
    one_by_one = evaluate(bundle, dataset, tmp_path / "plain", small, engine=FakeEngines())
    assert {key: found[key] for key in TRL_KEYS} == {key: one_by_one[key] for key in TRL_KEYS}
    parts = "scores/part-*.parquet"
    assert [part.read_bytes() for part in sorted(run.glob(parts))] == [
        part.read_bytes() for part in sorted((tmp_path / "plain").glob(parts))
    ]


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
    assert ScoreStore(run / "scores").read_part(0).rows.tolist() == [2, 4]


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


SMALL = EvaluateOptions(part_size=2, token_budget=1000)  # three parts of the five rows, two batches each


def interrupt(bundle: Path, dataset: str, run: Path) -> None:
    """Break off in the second part: a part is two batches, one of each model."""
    with pytest.raises(KeyboardInterrupt):
        evaluate(bundle, dataset, run, SMALL, engine=Failing(3, KeyboardInterrupt()))
    assert sorted(content(run)) == ["scores/part-00000.parquet", "scores/part-00000.sha256"]
    shutil.rmtree(os.environ["DPO_FAST_CACHE"])  # or the reference's scores would be found there


def test_an_interrupted_run_goes_on_where_it_was(bundle: Path, dataset: str, run: Path, tmp_path: Path) -> None:
    whole_engines, engines = FakeEngines(), FakeEngines()
    whole = evaluate(bundle, dataset, tmp_path / "whole", SMALL, engine=whole_engines)
    assert whole_engines.calls == 6  # three parts under two models
    shutil.rmtree(os.environ["DPO_FAST_CACHE"])
    interrupt(bundle, dataset, run)
    first = (run / "scores" / "part-00000.parquet").stat().st_mtime_ns

    resumed = evaluate(bundle, dataset, run, SMALL, engine=engines)

    assert engines.calls == 4
    assert (run / "scores" / "part-00000.parquet").stat().st_mtime_ns == first
    computed = [metrics["provenance"].pop("this_process")["computed_tokens"] for metrics in (whole, resumed)]
    assert computed[1] < computed[0]
    del whole["timing"], resumed["timing"]
    assert resumed == whole
    assert content(run / "scores") == content(tmp_path / "whole" / "scores")


def test_other_losses_need_no_scores_again(bundle: Path, dataset: str, run: Path) -> None:
    """The loss is no part of what the scores depend on."""
    interrupt(bundle, dataset, run)
    engines = FakeEngines()
    options = replace(SMALL, loss=LossSettings(beta=0.7, loss_type=("ipo",)))

    evaluate(bundle, dataset, run, options, engine=engines)

    assert engines.calls == 4


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (replace(SMALL, max_length=9), "pairs differ in row numbers, truncation or groups, token ids"),
        (replace(SMALL, part_size=3), "pairs differ in row numbers, truncation or groups, token ids"),
        (replace(SMALL, group_by="kind"), "pairs differ in row numbers, truncation or groups"),
        (replace(SMALL, loss=LossSettings(reference_free="sum")), "reference scores differ"),
    ],
)
def test_an_unfinished_run_of_something_else_is_refused(
    bundle: Path, dataset: str, run: Path, options: EvaluateOptions, says: str
) -> None:
    interrupt(bundle, dataset, run)
    before = content(run)
    engines = FakeEngines()

    with pytest.raises(OutputExistsError, match=f"holds a run whose {says}.*--overwrite"):
        evaluate(bundle, dataset, run, options, engine=engines)

    assert engines.calls == 0
    assert content(run) == before
    evaluate(bundle, dataset, run, replace(options, overwrite=True), engine=FakeEngines())


def test_an_unfinished_run_of_other_weights_or_engine_is_refused(
    bundle: Path, dataset: str, run: Path, tmp_path: Path
) -> None:
    interrupt(bundle, dataset, run)
    other = make_fake_bundle(tmp_path / "other", weights=b"others")

    with pytest.raises(OutputExistsError, match="differ in weights and graph"):
        evaluate(other, dataset, run, SMALL, engine=FakeEngines())
    with pytest.raises(OutputExistsError, match="differ in engine"):
        evaluate(bundle, dataset, run, SMALL, engine=FakeEngines(name="fake 2.0"))
    plain = make_fake_bundle(tmp_path / "plain", layout="plain")
    with pytest.raises(OutputExistsError, match="differ in layout"):
        evaluate(plain, dataset, run, SMALL, engine=FakeEngines())


def test_an_unfinished_run_of_more_rows_is_refused(bundle: Path, dataset: str, run: Path) -> None:
    """Its further parts would stay beside the finished run's, and be taken for its own."""
    with pytest.raises(KeyboardInterrupt):
        evaluate(bundle, dataset, run, SMALL, engine=Failing(5, KeyboardInterrupt()))
    assert len(content(run)) == 4  # two parts, each with its checksum

    with pytest.raises(OutputExistsError, match=r"unfinished run of other rows \(part-00001\.parquet is none of"):
        evaluate(bundle, dataset, run, replace(SMALL, limit=2), engine=FakeEngines())

    metrics = evaluate(bundle, dataset, run, replace(SMALL, limit=2, overwrite=True), engine=FakeEngines())
    assert metrics["counts"]["pairs"] == 2
    assert sorted(content(run)) == [METRICS, "scores/SHA256SUMS", "scores/part-00000.parquet", SKIPPED]


def cut_off(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-20])


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def lose_the_checksum(path: Path) -> None:
    """Of a part alone, or, of a finished run, of all."""
    beside = path.with_suffix(".sha256")
    (beside if beside.exists() else path.parent / "SHA256SUMS").unlink()


@pytest.mark.parametrize("damage", [cut_off, flip_a_bit, lose_the_checksum])
@pytest.mark.parametrize("finished", [False, True])
def test_a_damaged_part_is_computed_again(
    bundle: Path, dataset: str, run: Path, tmp_path: Path, damage: Callable[[Path], None], finished: bool
) -> None:
    whole = evaluate(bundle, dataset, tmp_path / "whole", SMALL, engine=FakeEngines())
    shutil.rmtree(os.environ["DPO_FAST_CACHE"])
    if finished:
        evaluate(bundle, dataset, run, SMALL, engine=FakeEngines())
        shutil.rmtree(os.environ["DPO_FAST_CACHE"])
    else:
        interrupt(bundle, dataset, run)
    damage(run / "scores" / "part-00000.parquet")

    metrics = evaluate(bundle, dataset, run, SMALL, engine=FakeEngines())

    assert content(run / "scores") == content(tmp_path / "whole" / "scores")
    assert {key: metrics[key] for key in TRL_KEYS} == {key: whole[key] for key in TRL_KEYS}


def test_a_bar_is_shown_on_request(bundle: Path, dataset: str, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    evaluate(bundle, dataset, run, EvaluateOptions(progress=True), engine=FakeEngines())

    shown = capsys.readouterr().err
    assert "5/5 pairs" in shown
    assert "pairs/s" in shown
    assert "tokens/s" in shown
    assert "left" in shown


# Scores of the reference that are there already.


def test_one_pass_of_the_reference_serves_every_policy(bundle: Path, dataset: str, run: Path, tmp_path: Path) -> None:
    """The cache finds them by itself, and the numbers are those of a run that computed everything."""
    first = evaluate(bundle, dataset, tmp_path / "first", SMALL, engine=FakeEngines())
    assert first["provenance"]["this_process"]["pairs_with_known_reference_scores"] == 0
    engines = FakeEngines()

    second = evaluate(bundle, dataset, run, SMALL, engine=engines)

    assert set(engines.engines) == {POLICY}
    assert second["provenance"]["this_process"]["pairs_with_known_reference_scores"] == 5
    assert {key: second[key] for key in TRL_KEYS} == {key: first[key] for key in TRL_KEYS}


def test_reference_scores_of_a_run_that_is_named(bundle: Path, dataset: str, run: Path, tmp_path: Path) -> None:
    first = evaluate(bundle, dataset, tmp_path / "first", SMALL, engine=FakeEngines())
    shutil.rmtree(os.environ["DPO_FAST_CACHE"])
    engines = FakeEngines()

    options = replace(SMALL, reference_scores=tmp_path / "first")
    second = evaluate(bundle, dataset, run, options, engine=engines)

    assert set(engines.engines) == {POLICY}
    assert {key: second[key] for key in TRL_KEYS} == {key: first[key] for key in TRL_KEYS}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (replace(SMALL, part_size=3), "differ in token ids"),
        (replace(SMALL, max_length=9), "differ in token ids"),
        (replace(SMALL, limit=1), "differ in token ids"),
    ],
)
def test_reference_scores_of_other_tokens_are_refused(
    bundle: Path, dataset: str, run: Path, tmp_path: Path, change: EvaluateOptions, says: str
) -> None:
    evaluate(bundle, dataset, tmp_path / "first", SMALL, engine=FakeEngines())

    with pytest.raises(UsageError, match=f"--reference-scores .*first: its reference scores {says}"):
        evaluate(bundle, dataset, run, replace(change, reference_scores=tmp_path / "first"), engine=FakeEngines())


def test_reference_scores_of_another_model_or_of_none_are_refused(
    bundle: Path, dataset: str, run: Path, tmp_path: Path
) -> None:
    evaluate(bundle, dataset, tmp_path / "first", SMALL, engine=FakeEngines())
    other = make_fake_bundle(tmp_path / "other", weights=b"others")
    options = replace(SMALL, reference_scores=tmp_path / "first")

    with pytest.raises(UsageError, match="its reference scores differ in weights and graph"):
        evaluate(other, dataset, run, options, engine=FakeEngines())
    with pytest.raises(UsageError, match="holds no scores"):
        evaluate(bundle, dataset, run, replace(SMALL, reference_scores=tmp_path), engine=FakeEngines())


# Memory, budgets, shards.


def test_in_turn_never_has_two_engines(bundle: Path, dataset: str, run: Path, tmp_path: Path) -> None:
    alive: list[str] = []
    most = 0

    class Counted(FakeEngine):
        def __init__(self, salt: str) -> None:
            super().__init__(salt)
            alive.append(salt)
            nonlocal most
            most = max(most, len(alive))

        def __del__(self) -> None:
            alive.remove(self.salt)

    together = evaluate(bundle, dataset, tmp_path / "together", SMALL, engine=lambda _, role: Counted(role))
    assert most == 2
    shutil.rmtree(os.environ["DPO_FAST_CACHE"])
    gc.collect()
    most = 0

    in_turn = evaluate(bundle, dataset, run, replace(SMALL, engines="in-turn"), engine=lambda _, role: Counted(role))

    assert most == 1
    assert in_turn["provenance"]["engines"] == "in-turn"
    assert in_turn["provenance"]["this_process"]["pairs_with_known_reference_scores"] == 0
    assert in_turn["provenance"]["this_process"]["scored_pairs"] == len(ROWS)
    assert content(run / "scores").keys() == content(tmp_path / "together" / "scores").keys()
    assert {key: in_turn[key] for key in TRL_KEYS} == {key: together[key] for key in TRL_KEYS}


def test_memory_that_is_short_means_in_turn(
    bundle: Path, dataset: str, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dpo_fast.memory, "available_memory", lambda: 10)

    metrics = evaluate(bundle, dataset, run, SMALL, engine=FakeEngines())

    assert metrics["provenance"]["engines"] == "in-turn"


def test_a_tuned_budget_is_recorded_and_kept(
    bundle: Path, dataset: str, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dpo_fast.local, "tune_token_budget", lambda *_: 321)
    options = replace(SMALL, token_budget="auto")
    with pytest.raises(KeyboardInterrupt):
        evaluate(bundle, dataset, run, options, engine=Failing(3, KeyboardInterrupt()))
    monkeypatch.setattr(dpo_fast.local, "tune_token_budget", lambda *_: pytest.fail("it was tuned already"))

    metrics = evaluate(bundle, dataset, run, options, engine=FakeEngines())

    assert metrics["provenance"]["token_budget"] == 321


@pytest.mark.parametrize("shards", [1, 2, 3])
def test_merged_shards_are_one_run(bundle: Path, dataset: str, run: Path, tmp_path: Path, shards: int) -> None:
    """Parts byte for byte, and every number; rows that are skipped too."""
    rows = write_rows(tmp_path / "skips.jsonl", [ROWS[0], EMPTY, *ROWS[1:]])
    options = replace(SMALL, on_error="skip", group_by="kind")
    whole = evaluate(bundle, rows, tmp_path / "whole", options, engine=FakeEngines())
    folders = [tmp_path / f"shard{number}" for number in range(1, shards + 1)]
    for number, folder in enumerate(folders, start=1):
        shutil.rmtree(os.environ["DPO_FAST_CACHE"])
        evaluate(bundle, rows, folder, replace(options, shard=(number, shards)), engine=FakeEngines())

    merged = merge(folders[::-1], run)

    assert content(run / "scores") == content(tmp_path / "whole" / "scores")
    assert (run / SKIPPED).read_bytes() == (tmp_path / "whole" / SKIPPED).read_bytes()
    for metrics in (merged, whole):
        del metrics["timing"]
        for name in ("shards", "this_process", "engines"):
            metrics["provenance"].pop(name, None)
    assert merged == json.loads(json.dumps(whole))
    assert json.loads((run / METRICS).read_text())["eval_loss"] == whole["eval_loss"]


def test_shards_of_clusters_are_merged(bundle: Path, dataset: str, run: Path, tmp_path: Path) -> None:
    """What provenance says of the workers is another thing in each shard."""
    whole = evaluate(bundle, dataset, tmp_path / "whole", SMALL, engine=FakeEngines())
    folders = [tmp_path / "shard1", tmp_path / "shard2"]
    for number, folder in enumerate(folders, start=1):
        metrics = evaluate(bundle, dataset, folder, replace(SMALL, shard=(number, 2)), engine=FakeEngines())
        if number == 2:  # the other one was scored by one process
            metrics["provenance"]["cluster"] = {"workers": [{"host": "far", "parts": 1}]}
            (folder / METRICS).write_text(json.dumps(metrics))

    merged = merge(folders, run)

    assert merged["eval_loss"] == whole["eval_loss"]
    assert "cluster" not in merged["provenance"]
    of_shards = [shard.get("cluster") for shard in merged["provenance"]["shards"]]
    assert of_shards == [None, {"workers": [{"host": "far", "parts": 1}]}]


def test_shards_that_do_not_fit_are_refused(bundle: Path, dataset: str, run: Path, tmp_path: Path) -> None:
    folders = [tmp_path / f"shard{number}" for number in (1, 2, 3)]
    for number, folder in enumerate(folders, start=1):
        evaluate(bundle, dataset, folder, replace(SMALL, shard=(number, 3)), engine=FakeEngines())
    evaluate(bundle, dataset, tmp_path / "whole", SMALL, engine=FakeEngines())
    evaluate(bundle, dataset, tmp_path / "half", replace(SMALL, shard=(1, 2)), engine=FakeEngines())
    evaluate(
        bundle,
        dataset,
        tmp_path / "beta",
        replace(SMALL, shard=(2, 3), loss=LossSettings(beta=1)),
        engine=FakeEngines(),
    )

    for runs, says in [
        (folders[:2], "the shards 3/3 are missing"),
        ([folders[0], tmp_path / "whole"], "is a run over the whole set"),
        ([folders[0], tmp_path / "half"], "differs from .* in the number of shards"),
        ([folders[0], tmp_path / "beta", folders[2]], "differs from .* in settings"),
        ([], "no runs to merge"),
    ]:
        with pytest.raises(UsageError, match=says):
            merge(runs, run)
    flip_a_bit(folders[1] / "scores" / "part-00001.parquet")
    with pytest.raises(StorageError, match=r"part-00001\.parquet: is damaged; evaluate that shard again"):
        merge(folders, run)
    (folders[1] / METRICS).unlink()
    with pytest.raises(StorageError, match="so the run is not finished"):
        merge(folders, run)
    assert not run.exists()
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


@pytest.mark.parametrize(
    ("part", "error", "says"),
    [
        (0, StorageError, r"part-00000\.parquet: another run has written it since; .* with --overwrite"),
        (7, OutputExistsError, r"part-00007\.parquet is none of this run's parts"),
        (None, StorageError, r"part-00000\.parquet: is missing; evaluate again"),
    ],
    ids=["in the place of a part", "beside the parts", "a part is removed"],
)
def test_what_others_write_meanwhile_is_never_counted(
    bundle: Path, dataset: str, run: Path, tmp_path: Path, part: int | None, error: type[Exception], says: str
) -> None:
    """The worker of a driver that was killed, say, after the run has been begun again with --overwrite."""
    others = write_rows(tmp_path / "others.jsonl", [{**row, "chosen": f"{row['chosen']} And more."} for row in ROWS])
    evaluate(bundle, others, tmp_path / "others", SMALL, engine=FakeEngines())
    content = (tmp_path / "others" / "scores" / "part-00000.parquet").read_bytes()
    store = ScoreStore(run / "scores")

    class Disturbed(FakeEngine):
        def score(self, batch: Batch) -> TokenScores:
            if 1 in store.parts() and part is None:
                store.storage.remove(["part-00000.parquet"])
            elif 1 in store.parts():
                store._note(part, hashlib.sha256(content).hexdigest())
                store.storage.write(f"part-{part:05}.parquet", content)
            return super().score(batch)

    with pytest.raises(error, match=says):
        evaluate(bundle, dataset, run, SMALL, engine=lambda bundle, role: Disturbed(role))
    assert not (run / METRICS).exists()


def test_nobody_else_writes_a_run_before_its_metrics_are_there(
    bundle: Path, dataset: str, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = dpo_fast.evaluate.write_results

    def write_results(*arguments: Any) -> None:
        with pytest.raises(OutputExistsError, match="another process is writing this run"):
            evaluate(bundle, dataset, run, replace(SMALL, overwrite=True), engine=FakeEngines())
        write(*arguments)

    monkeypatch.setattr(dpo_fast.evaluate, "write_results", write_results)
    evaluate(bundle, dataset, run, SMALL, engine=FakeEngines())
    assert (run / METRICS).exists()


def test_a_signal_as_the_metrics_are_computed(
    bundle: Path, dataset: str, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sum_tokens = dpo_fast.evaluate.sum_tokens
    monkeypatch.setattr(dpo_fast.evaluate, "sum_tokens", lambda part: (send(signal.SIGINT), sum_tokens(part))[1])
    with pytest.raises(InterruptedRunError, match="stopped with all parts scored: run the same command again"):
        evaluate(bundle, dataset, run, SMALL, engine=FakeEngines())
    assert not (run / METRICS).exists()
    monkeypatch.undo()
    assert evaluate(bundle, dataset, run, SMALL, engine=FakeEngines())["counts"]["pairs"] == 5


def test_a_list_of_failed_parts_is_of_the_last_start(bundle: Path, dataset: str, run: Path) -> None:
    """A cluster's workers failed at all of them; one process is asked to go on."""
    (run / "scores").mkdir(parents=True)
    (run / FAILED).write_text('{"part": 0}\n')
    with pytest.raises(EngineOutputError):
        evaluate(bundle, dataset, run, SMALL, engine=Failing(0))
    assert not run.exists()
    (run / "scores").mkdir(parents=True)
    (run / FAILED).write_text('{"part": 0}\n')

    evaluate(bundle, dataset, run, SMALL, engine=FakeEngines())

    assert sorted(path.name for path in run.iterdir()) == [METRICS, "scores", SKIPPED]


def test_a_tuned_budget_asks_for_no_part_that_is_not_there(bundle: Path, tmp_path: Path) -> None:
    """Each would be a request to an object store, one after another."""
    store, options = ScoreStore(tmp_path / "scores"), EvaluateOptions(token_budget="auto")
    store.record = pytest.fail  # type: ignore[method-assign]
    assert dpo_fast.local.known_token_budget(options, open_bundle(bundle), store, range(1000)) is None


def test_two_processes_on_one_run(bundle: Path, dataset: str, run: Path) -> None:
    run.mkdir()
    with locked(run), pytest.raises(OutputExistsError, match="another process is writing this run"):
        evaluate(bundle, dataset, run, SMALL, engine=FakeEngines())

    evaluate(bundle, dataset, run, SMALL, engine=FakeEngines())


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_finishes_the_batch_and_says_how_to_go_on(
    bundle: Path, dataset: str, run: Path, tmp_path: Path, number: signal.Signals
) -> None:
    whole = evaluate(bundle, dataset, tmp_path / "whole", SMALL, engine=FakeEngines())
    shutil.rmtree(os.environ["DPO_FAST_CACHE"])
    engines = FakeEngines()

    class Signalled(FakeEngine):
        def score(self, batch: Batch) -> TokenScores:
            if engines.calls == 2:
                send(number)
            return super().score(batch)

    def open_one(bundle: Bundle, role: str) -> FakeEngine:
        engines.engines[role] = Signalled(salt=role)
        return engines.engines[role]

    with pytest.raises(
        InterruptedRunError, match=f"{number.name}: stopped in part 1 of 3.*run the same command"
    ) as caught:
        evaluate(bundle, dataset, run, SMALL, engine=open_one)
    assert caught.value.exit_code == 128 + number
    assert engines.calls == 3  # the batch was finished, and no other begun
    assert signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler)

    resumed = evaluate(bundle, dataset, run, SMALL, engine=FakeEngines())
    assert content(run / "scores") == content(tmp_path / "whole" / "scores")
    assert {key: resumed[key] for key in TRL_KEYS} == {key: whole[key] for key in TRL_KEYS}


# Outputs that exist.


def test_a_finished_run_goes_on_to_the_same_numbers(bundle: Path, dataset: str, run: Path) -> None:
    first = evaluate(bundle, dataset, run, engine=FakeEngines())
    before, engines = content(run / "scores"), FakeEngines()

    second = evaluate(bundle, dataset, run, engine=engines)

    assert engines.calls == 0
    assert content(run / "scores") == before
    del first["provenance"]["this_process"], second["provenance"]["this_process"], first["timing"], second["timing"]
    assert second == first


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (EvaluateOptions(loss=LossSettings(beta=0.2)), "other settings"),
        (EvaluateOptions(limit=2), "other limit"),
        (EvaluateOptions(aggregate="trl"), "other aggregate, batch_size"),
    ],
)
def test_a_finished_run_of_something_else_is_kept_unless_overwritten(
    bundle: Path, dataset: str, run: Path, options: EvaluateOptions, says: str
) -> None:
    evaluate(bundle, dataset, run, engine=FakeEngines())
    before, engines = content(run), FakeEngines()

    with pytest.raises(OutputExistsError, match=f"holds a finished run with {says}.*--overwrite"):
        evaluate(bundle, dataset, run, options, engine=engines)
    assert content(run) == before
    assert engines.calls == 0

    evaluate(bundle, dataset, run, replace(options, overwrite=True), engine=engines)
    assert json.loads((run / METRICS).read_text())["provenance"]["limit"] == options.limit


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
        (EvaluateOptions(part_size=0), "--part-size 0 must be at least 1"),
        (EvaluateOptions(threads=-1), "--threads -1 must be at least 0"),
        (EvaluateOptions(shard=(0, 2)), "--shard 0/2: shards are numbered from 1"),
        (EvaluateOptions(shard=(3, 2)), "--shard 3/2: shards are numbered from 1"),
        (EvaluateOptions(shard=(1, 2)), "--shard 1/2: 5 rows are 1 parts of 1024, fewer than shards"),
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


def test_scores_outlive_a_loss_that_overflows(
    bundle: Path, dataset: str, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(dpo_fast.evaluate, "metrics_of_parts", raise_overflow)
        with pytest.raises(UsageError, match="overflow"):
            evaluate(bundle, dataset, run, engine=FakeEngines())
    engines = FakeEngines()

    evaluate(bundle, dataset, run, engine=engines)

    assert engines.calls == 0


# The disk, and what must not matter.


@pytest.mark.parametrize("failing", range(4))
def test_a_disk_that_fills_up_loses_nothing_that_was_finished(
    bundle: Path, dataset: str, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: int
) -> None:
    """At the first to fourth sync of a run: of a part, or of the list of checksums."""
    evaluate(bundle, dataset, tmp_path / "whole", SMALL, engine=FakeEngines())
    shutil.rmtree(os.environ["DPO_FAST_CACHE"])
    calls, sync = 0, os.fsync

    def full(handle: int) -> None:
        nonlocal calls
        calls += 1
        # The first one is of what the token cache says of the set.
        if calls == failing + 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        sync(handle)

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        with pytest.raises(StorageError, match="No space left on device; free some space"):
            evaluate(bundle, dataset, run, SMALL, engine=FakeEngines())
    left = content(run) if run.exists() else {}
    assert all(name.startswith("scores/") and "/." not in name for name in left)

    evaluate(bundle, dataset, run, SMALL, engine=FakeEngines())

    assert content(run / "scores") == content(tmp_path / "whole" / "scores")


def test_neither_budget_nor_threads_nor_part_size_matter(tiny_bundle: Path, tmp_path: Path) -> None:
    """A real engine: every token's log-prob within 1e-5 nats, whatever it was computed beside."""
    rows = [
        {"prompt": f"{'The sky is' * (n % 7 + 1)}", "chosen": f"{' blue' * (n % 4 + 1)}", "rejected": f" {n} is it?"}
        for n in range(23)
    ]
    dataset = write_rows(tmp_path / "rows.jsonl", rows)
    log_probs = []
    for number, (budget, threads, part_size) in enumerate([(1, 1, 1024), (100, 1, 5), (700, 2, 9), (10_000, 2, 1024)]):
        options = EvaluateOptions(token_budget=budget, threads=threads, part_size=part_size)
        run = tmp_path / f"run{number}"
        evaluate(tiny_bundle, dataset, run, options)
        shutil.rmtree(os.environ["DPO_FAST_CACHE"])
        parts = list(ScoreStore(run / "scores").read())
        columns = ("policy_chosen", "policy_rejected", "reference_chosen", "reference_rejected")
        log_probs.append([np.concatenate([getattr(part, name).log_probs for part in parts]) for name in columns])

    for other in log_probs[1:]:
        for found, expected_values in zip(other, log_probs[0], strict=True):
            assert found.size > 50
            assert np.abs(found - expected_values).max() < 1e-5
