"""From nothing to a checked evaluation, offline: make data, train with TRL, export, evaluate, compare with TRL.

The models are tiny and the task is a toy, but every step is the real one: TRL's own `DPOTrainer` trains the policy, and
its `evaluate()` gives the numbers that ours must equal. The demo fails where they do not, or where the policy has not
learned to prefer the chosen completions of prompts that it has never seen.
"""

import importlib.util
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from dpo_fast.demo_data import make_pairs, write_jsonl
from dpo_fast.demo_training import (
    DEFAULT_SETTINGS,
    DemoSettings,
    one_thread,
    preference_rate,
    train_policy,
    train_reference,
)
from dpo_fast.errors import CheckFailedError, MissingDependencyError
from dpo_fast.files import new_folder, write_json
from dpo_fast.quiet import quiet
from dpo_fast.types import LossSettings

COMPARED_METRICS = (
    "eval_loss",
    "eval_rewards/chosen",
    "eval_rewards/rejected",
    "eval_rewards/margins",
    "eval_rewards/accuracies",
    "eval_logps/chosen",
    "eval_logps/rejected",
    "eval_logits/chosen",
    "eval_logits/rejected",
    "eval_entropy",
    "eval_mean_token_accuracy",
)
# Differences are taken relative to max(1, |TRL's value|). Both sides compute in float32, so a completion's log-prob is
# good to about 1e-5 nats, and a mean over 200 pairs to about 1e-6 (5e-8 was seen). A wrong token, mask, beta or average
# moves some metric by more than 1e-3.
TOLERANCE = 1e-5
# Where a model's two first tokens are equal to within rounding, either may come first; one token is about 2e-4 here.
TOKEN_ACCURACY_TOLERANCE = 1e-3

# What only a demo's folder holds: `overwrite` replaces no other.
MARKER = "data/held_out.jsonl"


def run_demo(
    output: Path,
    *,
    seed: int = 0,
    overwrite: bool = False,
    settings: DemoSettings = DEFAULT_SETTINGS,
    console: Console | None = None,
) -> dict[str, Any]:
    """Make data, train a reference and a policy, export and evaluate them, and compare with TRL.

    Writes `data/train.jsonl`, `data/held_out.jsonl`, `reference/`, `policy/`, `bundle/`, `run/` and `demo.json` (what
    is returned) under `output`. Progress goes to standard error.

    Args:
        output: folder to write.
        seed: of the data, the weights and the order of training.
        overwrite: whether an existing `output` may be replaced.
        settings: sizes.
        console: where the table goes; standard output where None.

    Returns:
        `passed` and `failures` (the checks); `metrics` (for each name: `dpo_fast`, `trl`, `difference`);
        `largest_difference` and `tolerance`; `reward_accuracy` (a mean over pairs), its
        `reward_accuracy_interval` (95 %, Wilson) and `reward_accuracy_by_task`;
        `preference_rate` (share of held-out pairs where a model gives the chosen completion the higher log-prob;
        `reference`, `policy`); `seconds` (by step); `paths`; `seed` and `settings`.

    Raises:
        MissingDependencyError: TRL or ONNX Runtime is not installed.
        OutputExistsError: `output` exists, and `overwrite` was not given.
        StorageError: the disk refused.
        CheckFailedError: our metrics differ from TRL's, or the held-out reward accuracy is not above one half; the
            table has been printed and everything written by then.
    """
    for package, extra in (("trl", "trl"), ("onnxruntime", "cpu")):
        if importlib.util.find_spec(package) is None:  # better now than after a minute of training
            raise MissingDependencyError(package, extra, "the demo")
    progress = Console(stderr=True, highlight=False, markup=False)
    seconds: dict[str, float] = {}

    @contextmanager
    def step(name: str, text: str) -> Iterator[None]:
        progress.print(f"{len(seconds) + 1}/5 {text} …")
        start = time.perf_counter()
        yield
        seconds[name] = time.perf_counter() - start

    train_rows, held_out_rows = make_pairs(settings.train_pairs, settings.held_out_pairs, seed)
    with new_folder(output, overwrite=overwrite, marker=MARKER) as folder, quiet():
        (folder / "data").mkdir()
        write_jsonl(train_rows, folder / "data" / "train.jsonl")
        write_jsonl(held_out_rows, folder / MARKER)
        with one_thread(), step("train_reference", f"training a tokenizer and a reference on {len(train_rows)} pairs"):
            train_reference(train_rows, folder / "reference", settings, seed)
        with one_thread(), step("train_policy", "training a policy with TRL's DPOTrainer"):
            trainer = train_policy(train_rows, held_out_rows, folder / "reference", folder / "policy", settings, seed)
        with step("trl_evaluate", f"trainer.evaluate() on {len(held_out_rows)} held-out pairs"):
            trl_metrics = trainer.evaluate()
        rates = {
            "reference": preference_rate(trainer, trainer.ref_model),
            "policy": preference_rate(trainer, trainer.model),
        }

    from dpo_fast.evaluate import EvaluateOptions, evaluate
    from dpo_fast.export.exporter import export

    paths = {name: output / name for name in ("data", "reference", "policy", "bundle", "run")}
    with step("export", "dpo-fast export"):
        export(str(paths["policy"]), str(paths["reference"]), paths["bundle"])
    with step("evaluate", "dpo-fast evaluate"):
        our_metrics = evaluate(
            paths["bundle"],
            str(output / MARKER),
            paths["run"],
            EvaluateOptions(
                aggregate="trl",
                batch_size=settings.eval_batch_size,
                loss=LossSettings(beta=settings.beta),
                group_by="task",
            ),
        )
    seconds["evaluate_scoring"] = our_metrics["timing"]["score_seconds"]

    comparison = compare_metrics(our_metrics, trl_metrics)
    low, high = our_metrics["intervals"]["eval_rewards/accuracies"]
    failures = failed_checks(comparison, low)
    groups = our_metrics["groups"]
    # The groups' accuracies are over pairs, whereas the one above is a mean of batch means, as TRL's.
    pairs_won = sum(group["pairs"] * group["eval_rewards/accuracies"] for group in groups.values())
    results = {
        "passed": not failures,
        "failures": failures,
        "metrics": comparison,
        "largest_difference": max(values["difference"] for values in comparison.values()),
        "tolerance": TOLERANCE,
        "reward_accuracy": pairs_won / our_metrics["counts"]["pairs"],
        "reward_accuracy_interval": [low, high],
        "reward_accuracy_by_task": {task: group["eval_rewards/accuracies"] for task, group in groups.items()},
        "preference_rate": rates,
        "seconds": seconds,
        "paths": {name: str(path) for name, path in paths.items()},
        "seed": seed,
        "settings": asdict(settings),
    }
    write_json(output / "demo.json", results)
    print_results(results, console or Console())
    if failures:
        raise CheckFailedError(f"{output}: the demo's check failed: {'; '.join(failures)}")
    return results


def compare_metrics(ours: dict[str, Any], trl: dict[str, float]) -> dict[str, dict[str, float]]:
    """Put our metrics beside TRL's.

    Args:
        ours: what `dpo_fast.evaluate` returned.
        trl: what `trainer.evaluate()` returned.

    Returns:
        For each of `COMPARED_METRICS`: `dpo_fast`, `trl` and `difference`, |ours - TRL's| / max(1, |TRL's|).

    Raises:
        CheckFailedError: a metric is missing, NaN or infinite on either side.
    """
    comparison = {}
    for name in COMPARED_METRICS:
        our_value, trl_value = float(ours.get(name, math.nan)), float(trl.get(name, math.nan))
        if not (math.isfinite(our_value) and math.isfinite(trl_value)):
            raise CheckFailedError(f"{name} is {our_value}, TRL's {trl_value}: the demo needs two numbers to compare")
        difference = abs(our_value - trl_value) / max(1.0, abs(trl_value))
        comparison[name] = {"dpo_fast": our_value, "trl": trl_value, "difference": difference}
    return comparison


def failed_checks(comparison: dict[str, dict[str, float]], accuracy_low: float) -> list[str]:
    """What is wrong, in words; empty where all is well.

    Args:
        comparison: what `compare_metrics` returned.
        accuracy_low: lower end of the 95 % interval of the held-out reward accuracy.
    """
    failures = []
    for name, values in comparison.items():
        tolerance = TOKEN_ACCURACY_TOLERANCE if name == "eval_mean_token_accuracy" else TOLERANCE
        if not values["difference"] <= tolerance:
            failures.append(
                f"{name} is {values['dpo_fast']:.6g}, TRL's {values['trl']:.6g}, "
                f"a difference of {values['difference']:.1e}, more than {tolerance:.0e}"
            )
    if not accuracy_low > 0.5:
        failures.append(
            f"the lower end of the held-out reward accuracy's interval is {accuracy_low:.3f}, not above 0.5"
        )
    return failures


def print_results(results: dict[str, Any], console: Console) -> None:
    """Print the comparison, the times and where everything lies.

    Args:
        results: what `run_demo` returns.
        console: where to print.
    """
    table = Table(title="The held-out pairs, evaluated twice")
    table.add_column("metric")
    for column in ("dpo-fast", "TRL evaluate()", "difference"):
        table.add_column(column, justify="right")
    for name, values in results["metrics"].items():
        table.add_row(name, f"{values['dpo_fast']:.6f}", f"{values['trl']:.6f}", f"{values['difference']:.1e}")
    console.print(table)

    seconds, rates, paths = results["seconds"], results["preference_rate"], results["paths"]
    low, high = results["reward_accuracy_interval"]
    tasks = ", ".join(f"{task} {accuracy:.3f}" for task, accuracy in results["reward_accuracy_by_task"].items())
    lines = [
        f"Largest difference, relative to max(1, |TRL's value|): {results['largest_difference']:.1e}",
        f"Held-out reward accuracy: {results['reward_accuracy']:.3f}, 95 % interval {low:.3f} to {high:.3f} ({tasks})",
        f"Held-out pairs whose chosen completion is the likelier: reference {rates['reference']:.3f}, "
        f"policy {rates['policy']:.3f}",
        f"TRL evaluate(): {seconds['trl_evaluate']:.2f} s with both models, loaded and tokenised beforehand",
        f"dpo-fast evaluate: {seconds['evaluate']:.2f} s with loading, tokenising, metrics and files, "
        f"of which {seconds['evaluate_scoring']:.2f} s scoring with both models",
        f"dpo-fast export: {seconds['export']:.1f} s, once",
        "(Each timed once, on models too small to say much about speed; the benchmarks measure that.)",
        f"Bundle: {paths['bundle']}",
        f"Run:    {paths['run']}",
        f"Card:   {Path(paths['bundle']) / 'policy' / 'README.md'}",
    ]
    for line in lines:
        console.print(escape(line), highlight=False, soft_wrap=True)
