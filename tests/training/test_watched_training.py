"""The watch over the checkpoints of real trainings: TRL's own numbers again, by other ways of the same weights."""

import json
from pathlib import Path

import pytest

import dpo_fast.cli

from .trained import BATCH, STEPS, Training

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]  # trainings


def test_it_gives_trl_s_metrics_at_each_checkpoint(training: Training, tmp_path: Path) -> None:
    """Tolerance: as in test_callback.py."""
    code = dpo_fast.cli.run(
        ["watch", str(training.folder / "dpo_fast" / "bundle"), "--checkpoints", str(training.folder),
         "--dataset", str(training.pairs), "--output", str(tmp_path / "watched"), "--poll-seconds", "0.05",
         "--beta", "0.2", "--aggregate", "trl", "--batch-size", str(BATCH), "--no-self-check"],
    )  # fmt: skip
    found = json.loads((tmp_path / "watched" / "watch.json").read_text())

    assert code == 0
    assert [each["step"] for each in found["steps"]] == [2, 4, STEPS] == list(training.trls)
    for each in found["steps"]:
        theirs = training.trls[each["step"]]
        for key, ours in each["metrics"].items():
            assert abs(ours - theirs[key]) <= 1e-5 * max(1.0, abs(theirs[key])), f"step {each['step']}, {key}"
        # What the policy has gained on the chosen completions, by another way: their rewards, over beta and length.
        assert abs(each["drift"]["log_ratio/chosen"]) > 1e-4
        assert each["drift"]["k3/chosen"] > 0
