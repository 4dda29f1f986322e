"""The demo: its data follow the rules that they claim, its checks can fail, and all of it runs."""

import importlib.util
import io
import json
import random
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from dpo_fast.demo import (
    COMPARED_METRICS,
    MARKER,
    compare_metrics,
    failed_checks,
    print_results,
    run_demo,
)
from dpo_fast.demo_data import WORDS, Row, make_pairs, write_jsonl
from dpo_fast.demo_training import DemoSettings
from dpo_fast.errors import CheckFailedError, MissingDependencyError, OutputExistsError, UsageError
from dpo_fast.quiet import quiet

TITLES = ("Dr.", "Prof.", "Mr.", "Ms.")
COUNTS = (DemoSettings().train_pairs, DemoSettings().held_out_pairs)


def fact_of(row: Row) -> Any:
    """What a row is about, read back from its prompt alone: which of two things, in no order; or who, what and why."""
    if row["task"] == "number":
        return frozenset(re.findall(r"\d+", row["prompt"]))
    if row["task"] == "category":
        return frozenset(word for words in WORDS.values() for word in words if re.search(rf"\b{word}\b", row["prompt"]))
    match = re.match(r"(?:Write|A note) to (.*?)(?:: |, to )(thank|ask) them for the (\w+)\.$", row["prompt"])
    assert match is not None
    return match.groups()


def is_right(row: Row, completion: str) -> bool:
    """The three rules, written down a second time and applied to the text."""
    answer = completion.rstrip(".").split()[-1]
    if row["task"] == "number":
        numbers = [int(number) for number in re.findall(r"\d+", row["prompt"])]
        return int(answer) == (max(numbers) if "larger" in row["prompt"] else min(numbers))
    if row["task"] == "category":
        (category,) = [name for name in WORDS if re.search(rf"\b{name}\b", row["prompt"])]
        return answer in WORDS[category]
    is_formal = completion.startswith(" Dear ") and completion.endswith(" Kind regards.")
    is_informal = completion.startswith(" Hi ") and completion.endswith(" Bye.")
    assert is_formal != is_informal
    return is_formal == any(title in row["prompt"] for title in TITLES)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_held_out_facts_are_not_in_training(seed: int) -> None:
    train, held_out = make_pairs(*COUNTS, seed)

    assert len(train) == COUNTS[0]
    assert len(held_out) == COUNTS[1]
    prompts = [row["prompt"] for row in train + held_out]
    assert len(set(prompts)) == len(prompts)
    facts = [(row["task"], fact_of(row)) for row in train + held_out]
    assert len(set(facts)) == len(facts)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_chosen_follows_the_rule_and_rejected_breaks_it(seed: int) -> None:
    train, held_out = make_pairs(*COUNTS, seed)
    for row in train + held_out:
        assert list(row) == ["prompt", "chosen", "rejected", "task"]
        assert is_right(row, row["chosen"]), row
        assert not is_right(row, row["rejected"]), row
        assert row["chosen"][0] == row["rejected"][0] == " "
        assert not row["prompt"].endswith(" ")  # or the prompt's last token would merge with the completion's first


def test_blind_guesses_win_half_the_pairs() -> None:
    """What needs no rule must not tell chosen from rejected: length, place in the prompt, size, register.

    With n fair coins the share of heads has a standard deviation of 0.5 / sqrt(n), 0.03 for a task's 300 pairs: 0.12 is
    four of them.
    """
    train, _ = make_pairs(*COUNTS)
    by_task = {task: [row for row in train if row["task"] == task] for task in ("category", "number", "courtesy")}

    def place(row: Row, side: str) -> int:
        return row["prompt"].index(f" {row[side].rstrip('.').split()[-1]}")

    guesses = [
        *(row["chosen"] < row["rejected"] for row in by_task["number"]),
        *(row["chosen"] < row["rejected"] for row in by_task["category"]),
        *(row["chosen"].startswith(" Dear") for row in by_task["courtesy"]),
    ]
    first = [place(row, "chosen") < place(row, "rejected") for row in by_task["number"] + by_task["category"]]
    start = 0
    for rows in (by_task["number"], by_task["category"], by_task["courtesy"]):
        assert sum(guesses[start : start + len(rows)]) / len(rows) == pytest.approx(0.5, abs=0.12)
        start += len(rows)
    assert sum(first) / len(first) == pytest.approx(0.5, abs=0.12)


def test_one_seed_makes_one_data_set(tmp_path: Path) -> None:
    random.seed(1)
    first = make_pairs(60, 24, seed=5)
    random.seed(2)  # the global generator has no say
    assert make_pairs(60, 24, seed=5) == first
    assert make_pairs(60, 24, seed=6) != first

    write_jsonl(first[0], tmp_path / "train.jsonl")
    lines = (tmp_path / "train.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line) for line in lines] == first[0]


@given(train_pairs=st.integers(0, 300), held_out_pairs=st.integers(0, 100), seed=st.integers(0, 10**6))
@settings(max_examples=20)
def test_any_count_is_made_and_divided_evenly(train_pairs: int, held_out_pairs: int, seed: int) -> None:
    for rows, count in zip(make_pairs(train_pairs, held_out_pairs, seed), (train_pairs, held_out_pairs), strict=True):
        assert len(rows) == count
        per_task = [sum(row["task"] == task for row in rows) for task in ("category", "number", "courtesy")]
        assert max(per_task) - min(per_task) <= 1


def test_more_pairs_than_facts_are_refused() -> None:
    """Four categories of eight words: 6 * 64 = 384 facts, a third of 1,152 pairs."""
    make_pairs(1152 - 24, 24)
    with pytest.raises(UsageError, match="'category', which has 384; ask for fewer"):
        make_pairs(1152, 24)


def agreeing_metrics() -> dict[str, float]:
    return {name: -20.0 if "logps" in name else 0.5 for name in COMPARED_METRICS}


def test_differences_are_relative_above_one() -> None:
    """|-20.002 - -20| / 20 = 1e-4; |0.503 - 0.5| / max(1, 0.5) = 3e-3."""
    ours = agreeing_metrics() | {"eval_logps/chosen": -20.002, "eval_loss": 0.503}
    comparison = compare_metrics(ours, agreeing_metrics())

    assert list(comparison) == list(COMPARED_METRICS)
    assert comparison["eval_logps/chosen"]["difference"] == pytest.approx(1e-4, rel=1e-6)
    assert comparison["eval_loss"]["difference"] == pytest.approx(3e-3, rel=1e-6)
    assert comparison["eval_entropy"]["difference"] == 0


def test_agreement_and_a_clear_accuracy_pass() -> None:
    comparison = compare_metrics(agreeing_metrics(), agreeing_metrics())
    assert failed_checks(comparison, accuracy_low=0.51) == []


@pytest.mark.parametrize("name", COMPARED_METRICS)
def test_a_difference_in_any_metric_fails(name: str) -> None:
    ours = agreeing_metrics()
    ours[name] += 0.003 * max(1.0, abs(ours[name]))
    (failure,) = failed_checks(compare_metrics(ours, agreeing_metrics()), accuracy_low=0.9)
    assert failure.startswith(f"{name} is ")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), None])
def test_a_missing_number_is_no_agreement(value: float | None) -> None:
    broken = agreeing_metrics() | {"eval_loss": value}
    if value is None:
        del broken["eval_loss"]
    with pytest.raises(CheckFailedError, match="eval_loss"):
        compare_metrics(broken, agreeing_metrics())
    with pytest.raises(CheckFailedError, match="eval_loss"):
        compare_metrics(broken, broken)


@pytest.mark.parametrize("low", [0.5, 0.2, float("nan")])
def test_an_accuracy_that_may_be_chance_fails(low: float) -> None:
    comparison = compare_metrics(agreeing_metrics(), agreeing_metrics())
    (failure,) = failed_checks(comparison, accuracy_low=low)
    assert "not above 0.5" in failure


def test_an_existing_folder_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(OutputExistsError, match="exists already"):
        run_demo(tmp_path)
    with pytest.raises(OutputExistsError, match=MARKER):
        run_demo(tmp_path, overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_without_trl_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "trl" else find_spec(name))
    with pytest.raises(MissingDependencyError, match=r"pip install 'dpo-fast\[trl\]'"):
        run_demo(tmp_path / "demo")
    assert not (tmp_path / "demo").exists()


def test_importing_the_demo_loads_no_framework() -> None:
    code = "import sys, dpo_fast.demo; sys.exit(any(name in sys.modules for name in ('torch', 'transformers', 'trl')))"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_libraries_are_quiet_only_inside() -> None:
    import datasets
    from transformers.utils import logging as transformers_logging

    def bars() -> tuple[bool, bool]:
        return transformers_logging.is_progress_bar_enabled(), not datasets.are_progress_bars_disabled()

    before = bars()
    with quiet():
        assert bars() == (False, False)
    assert bars() == before


def test_paths_are_printed_as_they_are() -> None:
    results = {
        "metrics": compare_metrics(agreeing_metrics(), agreeing_metrics()),
        "largest_difference": 0.0,
        "reward_accuracy": 0.9,
        "reward_accuracy_interval": [0.85, 0.94],
        "reward_accuracy_by_task": {"number": 0.9},
        "preference_rate": {"reference": 0.5, "policy": 0.9},
        "seconds": {"trl_evaluate": 1.0, "export": 2.0, "evaluate": 3.0, "evaluate_scoring": 1.5},
        "paths": {"bundle": "/tmp/[red]x[/red]/" + "long/" * 30 + "bundle", "run": "/tmp/run"},
    }
    output = io.StringIO()
    print_results(results, Console(file=output, width=80))

    text = output.getvalue()
    assert results["paths"]["bundle"] + "\n" in text  # neither taken for markup nor broken
    assert all(name in text for name in COMPARED_METRICS)
    assert "0.900, 95 % interval 0.850 to 0.940" in text


@pytest.mark.slow
def test_the_demo_runs_and_its_check_can_fail(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """All of it, small: half a minute. Then with the wrong beta and the wrong average, which must be seen."""
    from dpo_fast.evaluate import EvaluateOptions, evaluate
    from dpo_fast.types import LossSettings

    sizes = DemoSettings(
        train_pairs=300, held_out_pairs=60, hidden_size=64, layers=2, reference_epochs=2, policy_epochs=8,
        policy_learning_rate=1e-3, train_batch_size=8, beta=0.3,
    )  # fmt: skip
    output = tmp_path / "demo"
    table = io.StringIO()
    results = run_demo(output, settings=sizes, console=Console(file=table))

    assert results["passed"]
    assert results["reward_accuracy_interval"][0] > 0.5
    assert results["preference_rate"]["policy"] > results["preference_rate"]["reference"]
    assert json.loads((output / "demo.json").read_text()) == results
    assert set(results["metrics"]) == set(COMPARED_METRICS)
    printed = capfd.readouterr()
    assert printed.out == ""
    assert [line[:3] for line in printed.err.splitlines()] == ["1/5", "2/5", "3/5", "4/5", "5/5"]
    assert (output / "bundle" / "policy" / "README.md").is_file()

    trl = {name: values["trl"] for name, values in results["metrics"].items()}
    held_out = str(output / MARKER)
    options = {
        "wrong beta": EvaluateOptions(aggregate="trl", batch_size=sizes.eval_batch_size),
        "wrong average": EvaluateOptions(aggregate="exact", loss=LossSettings(beta=sizes.beta)),
    }
    for name, wrong in options.items():
        metrics = evaluate(output / "bundle", held_out, output / name, wrong)
        assert failed_checks(compare_metrics(metrics, trl), accuracy_low=0.9), name
