"""`.eval_results/dpo_fast.yaml`: the Hub's own classes read what was measured."""

from typing import Any

import pytest
import yaml
from huggingface_hub import parse_eval_result_entries

from dpo_fast.publish.eval_results import render_eval_results

METRICS: dict[str, Any] = {
    "eval_rewards/accuracies": 0.703125,
    "intervals": {"eval_rewards/accuracies": [0.5823, 0.8009]},
    "counts": {"pairs": 64},
    "provenance": {
        "dataset": {"name": "someone/pairs", "split": "test", "revision": "abc123"},
        "settings": {"beta": 0.1, "loss_type": ["sigmoid"]},
    },
}


def test_the_accuracy_its_interval_and_its_settings() -> None:
    text = render_eval_results(METRICS)
    assert text is not None
    [entry] = parse_eval_result_entries(yaml.safe_load(text))
    assert (entry.dataset_id, entry.task_id, entry.dataset_revision) == ("someone/pairs", "default", "abc123")
    assert entry.value == METRICS["eval_rewards/accuracies"]
    assert entry.notes == (
        "Reward accuracy (share of pairs with chosen above rejected), 95 % interval 0.5823 to 0.8009, 64 pairs, "
        "split test, loss sigmoid, beta 0.1"
    )


@pytest.mark.parametrize("dataset", ["pairs.jsonl", "/data/pairs.jsonl", "data/pairs.jsonl.gz", None, "a b/c"])
def test_pairs_that_are_no_data_set_of_the_hub_have_no_leaderboard(dataset: str | None) -> None:
    provenance = {**METRICS["provenance"], "dataset": {"name": dataset}}
    assert render_eval_results({**METRICS, "provenance": provenance}) is None


@pytest.mark.parametrize("accuracy", [None, float("nan"), "0.5", True])
def test_without_an_accuracy_there_is_no_result(accuracy: Any) -> None:
    assert render_eval_results({**METRICS, "eval_rewards/accuracies": accuracy}) is None


def test_hostile_text_stays_text() -> None:
    hostile = "x: [1]\n- dataset:\n    id: a/b # \x1b[31m !!python/object:os.system"
    provenance = {**METRICS["provenance"], "settings": {"loss_type": hostile, "beta": hostile}}
    text = render_eval_results({**METRICS, "provenance": provenance}, task=hostile)
    assert text is not None
    [entry] = parse_eval_result_entries(yaml.safe_load(text))
    assert entry.dataset_id == "someone/pairs"
    assert entry.task_id == hostile
    assert entry.notes is not None
    assert "\n" not in entry.notes
    assert "\x1b" not in text.replace("\\e", "")
