"""Advice from runs on disk, a trainer's log, and the command line."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from compare.runs import pairs_of, write_run

import dpo_fast.cli
from dpo_fast.advice.advise import advise
from dpo_fast.advice.evidence import read_trainer_state
from dpo_fast.advice.hints import hints_as_json
from dpo_fast.errors import StorageError, UsageError

from .simulated import HEALTHY, Policy, make_world, run_of

PAIRS = 600
OVERFIT = replace(HEALTHY, error=3, scale=1.5)
MEMORISED = replace(HEALTHY, memorised=3, error=0.5, scale=1.5)


def write(folder: Path, policy: Policy, *, seed: int = 0, pairs: Any = None, **provenance: Any) -> Path:
    """A run of a made-up policy; the reference's log-probs are such that its gap comes out."""
    world = make_world(seed, PAIRS)
    run = run_of(world, policy)
    lengths = np.stack([run.chosen_lengths, run.rejected_lengths], axis=1)
    reference_chosen = -300 + run.reference_gaps / 2
    reference_rejected = -300 - run.reference_gaps / 2
    return write_run(
        folder,
        pairs_of(PAIRS, lengths=lengths, salt=seed) if pairs is None else pairs,
        reference_chosen + run.chosen_log_ratios,
        reference_rejected + run.rejected_log_ratios,
        reference_chosen=reference_chosen,
        reference_rejected=reference_rejected,
        **provenance,
    )


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A policy that has overfit, on held-out and on training pairs, and an earlier step of it. Read only."""
    folder = tmp_path_factory.mktemp("runs")
    return {
        "held_out": write(folder / "held-out", OVERFIT),
        "training": write(folder / "training", MEMORISED, seed=1),
        "earlier": write(folder / "checkpoint-100", replace(HEALTHY, scale=0.4)),
        "healthy": write(folder / "healthy", HEALTHY),
    }


def test_runs_are_read(runs: dict[str, Path]):
    [hint] = advise(runs["held_out"], train_run=runs["training"], earlier=[runs["earlier"]])
    assert (hint.kind, hint.sureness) == ("overfit", "sure")
    assert "run training" in hint.evidence
    assert hint.numbers["since"] == "checkpoint-100"
    # The pairs' own count of what is right, in float32, is the simulation's.
    margins = run_of(make_world(0, PAIRS), OVERFIT).margins
    assert hint.numbers["held_out_accuracy"] == pytest.approx((margins > 0).mean(), abs=1 / PAIRS)


def test_a_healthy_run_gets_none(runs: dict[str, Path]):
    assert advise(runs["healthy"]) == []


def test_contradictions_are_found_by_the_tokens(tmp_path: Path):
    """Every other pair is the one before, the other way round."""
    pairs = pairs_of(PAIRS)
    for i in range(1, PAIRS, 2):
        before = pairs[i - 1]
        pairs[i] = replace(before, row=i + 1, chosen_ids=before.rejected_ids, rejected_ids=before.chosen_ids)
    margins = np.repeat(np.random.default_rng(0).normal(0, 3, PAIRS // 2), 2) * np.tile([1, -1], PAIRS // 2)
    run = write_run(tmp_path / "run", pairs, -50 + margins, -50 - margins, part_size=7)
    [hint] = advise(run)
    assert (hint.kind, hint.sureness, hint.numbers["count"]) == ("contradictions", "sure", PAIRS)


# What is refused.


def test_runs_of_other_pairs_are_refused(runs: dict[str, Path]):
    with pytest.raises(UsageError, match="not of the same pairs"):
        advise(runs["held_out"], earlier=[runs["training"]])
    with pytest.raises(UsageError, match="100% of the pairs of"):
        advise(runs["held_out"], train_run=runs["earlier"])
    with pytest.raises(UsageError, match="no such run"):
        advise(runs["held_out"], earlier=[runs["training"].parent / "none"])


def test_a_training_run_of_another_policy_is_refused(tmp_path: Path):
    held_out, training = (
        write(tmp_path / name, HEALTHY, seed=seed, models={"policy": {"weights_and_graph_sha256": [name]}})
        for seed, name in enumerate(("one", "other"))
    )
    with pytest.raises(UsageError, match="another policy"):
        advise(held_out, train_run=training)


# The trainer's log.


def trainer_state(folder: Path, accuracies: dict[float, float], **state: Any) -> Path:
    """A checkpoint with an accuracy by epoch; an epoch has 100 steps of 8 pairs."""
    logs = [
        {"epoch": epoch, "step": round(100 * epoch), "loss": 0.5, "rewards/accuracies": accuracy}
        for epoch, accuracy in accuracies.items()
    ]
    folder.mkdir()
    content = {"train_batch_size": 8, "log_history": [*logs, {"epoch": 9.0, "step": 900, "eval_loss": 0.7}], **state}
    (folder / "trainer_state.json").write_text(json.dumps(content))
    return folder


def test_the_last_epoch_of_the_trainers_log_counts(tmp_path: Path, runs: dict[str, Path]):
    checkpoint = trainer_state(tmp_path / "checkpoint-300", {0.5: 0.5, 1.5: 0.8, 2.0: 0.9, 2.5: 0.98, 3.0: 1.0})
    found = read_trainer_state(checkpoint / "trainer_state.json")
    assert found is not None
    assert (found.right, found.pairs) == (792, 800)  # epochs 2.5 and 3: steps 201 to 300
    for path in (checkpoint, checkpoint / "trainer_state.json"):
        [hint] = advise(runs["held_out"], train_run=path)
        assert (hint.kind, hint.sureness) == ("overfit", "likely")
        assert "the trainer's log, epochs 2.0 to 3.0" in hint.evidence


def test_the_first_epoch_says_nothing(tmp_path: Path, runs: dict[str, Path]):
    """A batch is logged before the policy has learned from it."""
    checkpoint = trainer_state(tmp_path / "checkpoint-100", {0.5: 0.9, 1.0: 1.0})
    assert read_trainer_state(checkpoint / "trainer_state.json") is None
    assert advise(runs["held_out"], train_run=checkpoint) == []


@pytest.mark.parametrize(
    "content",
    ["", "[]", "{}", '{"log_history": [{"rewards/accuracies": 1}]}',
     '{"log_history": [{"epoch": 2.0, "step": 1, "rewards/accuracies": NaN}]}',
     '{"log_history": [{"epoch": 2.0, "step": 1, "rewards/accuracies": 7}]}',
     '{"log_history": [{"epoch": 2.0, "step": 1, "rewards/accuracies": "high"}]}'],
)  # fmt: skip
def test_a_damaged_log_is_refused(tmp_path: Path, content: str):
    path = tmp_path / "trainer_state.json"
    path.write_text(content)
    with pytest.raises(StorageError, match="is no trainer's state, or damaged"):
        read_trainer_state(path)


def test_a_log_that_is_not_there_is_refused(tmp_path: Path):
    with pytest.raises(StorageError, match="cannot be read"):
        read_trainer_state(tmp_path / "trainer_state.json")


# The command line.


def test_the_command(runs: dict[str, Path], capsys: pytest.CaptureFixture[str]):
    held_out, training, earlier = (str(runs[name]) for name in ("held_out", "training", "earlier"))
    arguments = ["advise", held_out, "--train-run", training, "--earlier", earlier]
    assert dpo_fast.cli.run(arguments) == 0
    shown = capsys.readouterr().out
    assert "hint, sure: overfit" in shown
    assert "a gap of" in shown
    assert dpo_fast.cli.run([*arguments, "--json"]) == 0
    expected = hints_as_json(advise(runs["held_out"], train_run=runs["training"], earlier=[runs["earlier"]]))
    assert json.loads(capsys.readouterr().out) == expected


def test_the_command_on_a_healthy_run(runs: dict[str, Path], capsys: pytest.CaptureFixture[str]):
    assert dpo_fast.cli.run(["advise", str(runs["healthy"])]) == 0
    assert "no hints" in capsys.readouterr().out


def test_the_command_refuses_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert dpo_fast.cli.run(["advise", str(tmp_path)]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
