"""The callback in real trainings: TRL's own numbers at the same step, and a training that it does not touch.

Tolerance: both sides compute in float32. A completion's log-prob, a sum of some 100 nats, is good to 1e-5 of itself,
and a reward to 1e-5 nats; a wrong token, mask, beta or average moves some metric by more than 1e-3.
"""

import logging
import math
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file
from transformers import EarlyStoppingCallback

import dpo_fast.training.callback
from dpo_fast.bundle import open_bundle
from dpo_fast.errors import EngineOutputError, InterruptedRunError, UsageError
from dpo_fast.run_folder import read_metrics
from dpo_fast.training import DPOFastCallback

from .trained import EVERY, ROWS, STEPS, Training, make_trainer, trl

pytestmark = [
    pytest.mark.slow,  # trainings
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),  # TRL's own use of Transformers
]

KEYS = {
    "eval_loss", "eval_rewards/chosen", "eval_rewards/rejected", "eval_rewards/margins", "eval_rewards/accuracies",
    "eval_logps/chosen", "eval_logps/rejected", "eval_logits/chosen", "eval_logits/rejected", "eval_entropy",
    "eval_mean_token_accuracy",
}  # fmt: skip


def evaluations(trainer: Any) -> dict[int, dict[str, float]]:
    """What the trainer's log has of evaluations, by step."""
    return {entry["step"]: entry for entry in trainer.state.log_history if any(key in entry for key in KEYS)}


def test_the_metrics_are_trl_s_at_the_same_step(training: Training) -> None:
    logged = evaluations(training.trainer)

    assert list(logged) == [2, 4, STEPS]
    for step, ours in logged.items():
        assert ours.keys() >= KEYS | {"eval_runtime", "eval_samples_per_second", "epoch"}
        for key in KEYS:
            theirs = training.trls[step][key]
            assert abs(ours[key] - theirs) <= 1e-5 * max(1.0, abs(theirs)), f"step {step}, {key}: {ours[key]}, {theirs}"
    # The comparison can tell: the policy has moved, further at each step.
    margins = [ours["eval_rewards/margins"] for ours in logged.values()]
    assert len({round(margin, 3) for margin in margins}) == len(margins)


def test_a_step_s_own_metrics_stay_out_of_an_evaluation_s(training: Training) -> None:
    """TRL averages what a step has noted into whatever is logged next, by the model's mode."""
    steps = [entry for entry in training.trainer.state.log_history if "loss" in entry]

    assert [entry["step"] for entry in steps] == [3]
    assert "rewards/margins" in steps[0]
    for entry in evaluations(training.trainer).values():
        assert "rewards/margins" not in entry
    assert training.modes == [True] * 3  # as the training had it


def test_what_lies_on_the_disk(training: Training) -> None:
    """One bundle, whose weights are the last ones; a run for each evaluation; the reference scored once."""
    folder = training.folder / "dpo_fast"
    bundle = open_bundle(folder / "bundle")
    bundle.verify()
    runs = {step: read_metrics(folder / "runs" / f"step-{step:06}") for step in (2, 4, STEPS)}
    known = [run["provenance"]["this_process"]["pairs_with_known_reference_scores"] for run in runs.values()]
    [weights] = (folder / "bundle" / "policy").glob("*.safetensors")

    assert sorted(path.name for path in folder.iterdir()) == ["bundle", "runs"]
    assert known == [0, len(ROWS), len(ROWS)]
    assert runs[2]["provenance"]["settings"]["beta"] == 0.2
    final = load_file(training.folder / f"checkpoint-{STEPS}" / weights.name)
    assert all(torch.equal(tensor, final[name]) for name, tensor in load_file(weights).items())


def test_the_training_is_not_touched(model_training: Training, tiny_pair: tuple[Path, Path], tmp_path: Path) -> None:
    """The same training without any evaluation ends with the same weights, bit for bit: no random number was drawn."""
    alone = make_trainer(*tiny_pair, tmp_path, [])
    alone.train()

    others = model_training.trainer.model.state_dict()
    assert all(torch.equal(tensor, others[name]) for name, tensor in alone.model.state_dict().items())


def test_the_trainer_makes_of_it_what_it_makes_of_its_own(
    model_training: Training, tiny_pair: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The best model, early stopping, `trainer.evaluate()`; the data are the trainer's own, two sets by name.

    The bundle is the other training's, which has the same reference, to save the time of another export.
    """
    exported = model_training.folder / "dpo_fast" / "bundle"
    monkeypatch.setattr(
        dpo_fast.training.callback, "export", lambda policy, reference, output, *_: shutil.copytree(exported, output)
    )
    monkeypatch.setattr(trl.DPOTrainer, "evaluation_loop", lambda *a, **k: pytest.fail("the trainer evaluated itself"))
    rows = Dataset.from_list(ROWS)
    impatient = EarlyStoppingCallback(early_stopping_patience=1, early_stopping_threshold=100.0)
    trainer = make_trainer(
        *tiny_pair, tmp_path, [DPOFastCallback(on_error="raise", aggregate="exact", limit=5), impatient],
        eval_dataset={"all": rows, "long": rows.select(range(9))}, eval_strategy="steps", eval_steps=EVERY,
        save_strategy="steps", save_steps=EVERY, load_best_model_at_end=True, save_only_model=True,
        metric_for_best_model="all_rewards/margins", greater_is_better=True,
    )  # fmt: skip
    trainer.train()
    logged = {e["step"]: e for e in trainer.state.log_history if "eval_all_loss" in e}

    assert trainer.state.global_step == 4  # whatever it gained, it was not 100
    best = max(logged, key=lambda step: logged[step]["eval_all_rewards/margins"])
    assert trainer.state.best_global_step == best
    assert trainer.state.best_metric == logged[best]["eval_all_rewards/margins"]
    assert logged[4]["eval_all_loss"] == logged[4]["eval_long_loss"]  # of both, the first 5 rows
    again = trainer.evaluate(metric_key_prefix="test")  # of the best model, which the trainer has loaded
    assert again["test_all_loss"] == pytest.approx(logged[best]["eval_all_loss"], abs=1e-6)
    with pytest.raises(pytest.fail.Exception, match="evaluated itself"):
        trainer.evaluate(rows)  # a set that is handed over is the trainer's


# Without an export.


@pytest.fixture
def exported(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """An export and a refit that do nothing but note what they were given."""
    calls: list[dict[str, Any]] = []

    def export(policy: str, reference: str, output: Path, options: Any, report: Any) -> None:
        weights = {} if reference == "base" else load_file(Path(reference, "model.safetensors"))
        calls.append({"reference": reference, "weights": weights, "options": options})

    monkeypatch.setattr(dpo_fast.training.callback, "export", export)
    monkeypatch.setattr(dpo_fast.training.callback, "refit", lambda *arguments: None)
    return calls


def fail(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def evaluate(*arguments: Any) -> None:
        raise error

    monkeypatch.setattr(dpo_fast.training.callback, "evaluate", evaluate)


@pytest.mark.usefixtures("exported")
def test_an_evaluation_that_fails_is_a_warning(
    tiny_pair: tuple[Path, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    fail(monkeypatch, EngineOutputError("the engine said NaN"))
    trainer = make_trainer(
        *tiny_pair, tmp_path, [DPOFastCallback(every=2)], metric_for_best_model="loss", greater_is_better=False
    )
    with caplog.at_level(logging.WARNING):
        trainer.train()

    assert trainer.state.global_step == STEPS
    assert evaluations(trainer) == {}
    assert trainer.state.best_global_step is None
    assert math.isnan(trainer.evaluate()["eval_loss"])
    said = [record.getMessage() for record in caplog.records if record.name == dpo_fast.training.callback.__name__]
    # Each step once, and the last one again by the call above.
    assert [line.split(" was ")[0] for line in said] == ["step 2", "step 4", "step 5", "step 5"]
    assert said[0] == "step 2 was not evaluated; training goes on: the engine said NaN"


@pytest.mark.usefixtures("exported")
@pytest.mark.parametrize(
    ("on_error", "error", "raised"),
    [
        ("raise", EngineOutputError("the engine said NaN"), EngineOutputError),
        ("raise", RuntimeError("what nobody thought of"), RuntimeError),
        ("warn", InterruptedRunError(2, "SIGINT: stopped"), KeyboardInterrupt),  # the user means the training
    ],
)
def test_an_evaluation_that_fails_ends_the_training(
    tiny_pair: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, on_error: Any, error: Exception,
    raised: type[BaseException],
) -> None:  # fmt: skip
    fail(monkeypatch, error)
    trainer = make_trainer(*tiny_pair, tmp_path, [DPOFastCallback(every=1, on_error=on_error)])

    with pytest.raises(raised):
        trainer.train()
    assert trainer.state.global_step == 1


@pytest.mark.parametrize("precompute", [True, False])
def test_the_reference_is_the_trainer_s(
    tiny_pair: tuple[Path, Path], tmp_path: Path, exported: list[dict[str, Any]], precompute: bool
) -> None:
    """With `precompute_ref_log_probs` TRL keeps no reference: it is the policy before its first step."""
    policy, reference = tiny_pair
    callback = DPOFastCallback(every=2)
    trainer = make_trainer(
        policy,
        None if precompute else reference,
        tmp_path,
        [callback],
        max_steps=1,
        precompute_ref_log_probs=precompute,
        max_length=None if precompute else 48,
    )
    trainer.train()

    expected = load_file((policy if precompute else reference) / "model.safetensors")
    [call] = exported
    assert all(torch.equal(tensor, expected[name]) for name, tensor in call["weights"].items())
    assert len(call["weights"]) == len(expected)
    assert call["options"].link  # the reference was written for the bundle alone
    assert call["options"].self_check
    assert call["options"].max_length == (256 if precompute else 48)  # where nothing is truncated, the positions
    if precompute:
        callback._is_exported = False
        with pytest.raises(UsageError, match=r"precompute_ref_log_probs keeps no reference.*reference="):
            callback._export()


def test_models_that_lie_in_the_output_folder_stay(
    tiny_pair: tuple[Path, Path], tmp_path: Path, exported: list[dict[str, Any]]
) -> None:
    """The user's own policy/ and reference/ are not taken for what is written on the way to the bundle."""
    for folder, name in zip(tiny_pair, ("policy", "reference"), strict=True):
        shutil.copytree(folder, tmp_path / name)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    callback = DPOFastCallback(every=1, output=tmp_path, reference=str(tmp_path / "reference"))
    make_trainer(*tiny_pair, tmp_path / "trained", [callback], max_steps=1).train()

    assert {path: path.read_bytes() for path in before if path.is_file()} == before
    [call] = exported
    assert not call["options"].link  # of weights that the user may write over
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data", "policy", "reference", "trained"]


@pytest.mark.parametrize(
    ("callback", "arguments", "says"),
    [
        ({}, {}, "every=STEPS"),
        ({"every": 2, "eval_dataset": iter(())}, {}, r"datasets.Dataset, and was given \w*iterator"),
        ({"every": 2}, {"sync_ref_model": True}, "sync_ref_model"),
        ({"every": 2}, {"truncation_mode": "keep_end"}, "keep_end"),
        ({"every": 2}, {"max_length": 1024}, "--max-length 1024: the model has positions for 256"),
        ({"every": 2}, {"compute_metrics": lambda prediction: {}}, "compute_metrics"),
        ({"every": 2}, {"eval_dataset": None}, "nothing to evaluate"),
    ],
)
@pytest.mark.filterwarnings("ignore:`compute_metrics`")
def test_what_cannot_work_is_refused_before_the_first_step(
    tiny_pair: tuple[Path, Path], tmp_path: Path, callback: dict[str, Any], arguments: dict[str, Any], says: str
) -> None:
    """Even where a failure is but a warning."""
    trainer = make_trainer(*tiny_pair, tmp_path, [DPOFastCallback(**callback)], **arguments)

    with pytest.raises(UsageError, match=says):
        trainer.train()
    assert trainer.state.global_step == 0


def test_values_without_a_meaning() -> None:
    with pytest.raises(UsageError, match="every=0"):
        DPOFastCallback(every=0)
    with pytest.raises(UsageError, match="on_error='ignore'"):
        DPOFastCallback(on_error="ignore")  # type: ignore[arg-type]


def test_only_dpo_is_evaluated(tiny_pair: tuple[Path, Path], tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

    model = AutoModelForCausalLM.from_pretrained(tiny_pair[0])
    arguments = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none")
    with pytest.raises(UsageError, match=r"trl\.DPOTrainer, and this is a Trainer"):
        Trainer(model=model, args=arguments, callbacks=[DPOFastCallback(every=1)])


def test_it_is_there_under_both_names_and_loaded_late() -> None:
    code = (
        "import sys, dpo_fast, dpo_fast.training; assert not {'torch', 'transformers'}.intersection(sys.modules);"
        "assert not hasattr(dpo_fast, 'Callback')"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)

    assert dpo_fast.DPOFastCallback is DPOFastCallback
