"""dpo_fast against its peers, in one run on real pairs: seconds, and errors against cpu-fp32.

    python benchmarks/peers.py [--limit 64] [--turns 3] [--recipes cpu-fp32 cpu-int8 …] [--work build/benchmarks]

The peers are TRL's `evaluate()` in float32 and a tuned PyTorch loop (length-sorted batches, head on the completions
alone) in float32 and in bfloat16; `--without-peers` leaves them out. Every contender is a process of its own, alone on
the machine: wall time includes start-up, scoring time does not. The recipes take turns, each with a whole evaluation of
both models, nothing kept in between; a recipe counts with its fastest scoring and that turn's wall time.

Weights are random, so that the speed is a real model's and the errors are not: they say how the precisions compare, not
what they will be, and margins are small. `--policy` and `--reference` name a trained model instead. It needs the
baseline scripts and the preference data, which lie beside the project. Prints tables, then one JSON line.
"""

import argparse
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from bundles import BASELINES, DATA, WORK, call, find_bundles, find_models
from rich.console import Console
from rich.table import Table

from dpo_fast.bundle import Bundle
from dpo_fast.provenance import hardware
from dpo_fast.run_folder import METRICS, SCORES
from dpo_fast.store import ScoreStore
from dpo_fast.types import CompletionScores, Float64Array

EXACT = "cpu-fp32"
RECIPES = (EXACT, "cpu-int8", "cpu-int4", "openvino-bf16", "openvino-int8")
TRL_BATCH = "8"
TORCH_DTYPES = {"fp32": "float32", "bf16": "bfloat16"}
# In what precision PyTorch is the peer of a recipe's; it computes in float32 or bfloat16 alone.
TORCH_PEER = {"fp32": "fp32", "int4": "fp32", "bf16": "bf16", "int8": "bf16"}
# Every metric within 1e-5, relative or absolute; rewards are differences of sums of hundreds: 1e-4 absolute.
TOLERANCE, REWARD_TOLERANCE = 1e-5, 1e-4
ACCURACY = "eval_rewards/accuracies"
SUMS = tuple((role, branch) for role in ("policy", "reference") for branch in ("chosen", "rejected"))


@dataclass(frozen=True, slots=True)
class Run:
    """What a contender said of P pairs, and how fast.

    Attributes:
        score_seconds: of both models, start-up not included.
        wall_seconds: of the whole process; None where it is more than one, each of them for one model.
        metrics: by TRL's names; none for the tuned loop.
        sums: log-prob of each completion in nats, (P,), by role and branch; none for TRL.
    """

    score_seconds: float
    wall_seconds: float | None
    metrics: Mapping[str, Any]
    sums: Mapping[tuple[str, str], Float64Array]


def main() -> None:
    """Run all contenders and print how they compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--limit", type=int, default=64, help="pairs")
    parser.add_argument("--turns", type=int, default=3, help="how often each recipe evaluates")
    parser.add_argument("--recipes", nargs="+", default=RECIPES, help=f"names or files, {EXACT} among them")
    parser.add_argument("--without-peers", action="store_true", help="the recipes alone")
    parser.add_argument("--shape", default="smollm2-135m", help="of the random models")
    parser.add_argument("--policy", help="a trained model instead, with --reference")
    parser.add_argument("--reference")
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--work", type=Path, default=WORK / "benchmarks")
    arguments = parser.parse_args()
    if EXACT not in arguments.recipes:
        parser.error(f"--recipes: {EXACT} is what the others are compared with")
    if (arguments.policy is None) != (arguments.reference is None):
        parser.error("--policy and --reference belong together")

    if arguments.policy is None:
        roles = find_models(arguments.work, arguments.shape, arguments.data)
    else:
        roles = arguments.policy, arguments.reference
    bundles = find_bundles(arguments.work, arguments.recipes, roles)
    what = ["--data", arguments.data, "--limit", arguments.limit]
    runs: dict[str, Run] = {}
    if not arguments.without_peers:
        runs["TRL fp32"] = run_trl(roles, what)
        runs |= {f"PyTorch {name}": run_torch(roles, what, name, arguments.work) for name in TORCH_DTYPES}
    for _ in range(arguments.turns):
        for recipe, bundle in bundles.items():
            run = evaluate(bundle, arguments.data, arguments.limit, arguments.work)
            if recipe not in runs or run.score_seconds < runs[recipe].score_seconds:
                runs[recipe] = run
    results = {name: compare(name, run, runs, bundles) for name, run in runs.items()}
    title = f"{arguments.limit} real pairs, {arguments.policy or arguments.shape}, both models"
    Console(width=130).print(draw(results, title))
    if "TRL fp32" in runs:
        Console(width=130).print(draw_metrics(runs["TRL fp32"].metrics, runs[EXACT].metrics))
    if arguments.policy is None:
        print("Random weights: the speed is a real model's, the errors are not.")
    counted = {"pairs": arguments.limit, "turns": arguments.turns}
    print(json.dumps({**counted, "contenders": results, "hardware": hardware()}))


def run_trl(roles: Sequence[str], what: list[Any]) -> Run:
    """TRL's own evaluation of both models."""
    models = ["--policy", roles[0], "--reference", roles[1], "--batch-size", TRL_BATCH]
    wall_seconds, said = call([BASELINES / "trl_evaluate.py", *models, *what])
    return Run(said["seconds"], wall_seconds, said, {})


def run_torch(roles: Sequence[str], what: list[Any], precision: str, work: Path) -> Run:
    """The tuned loop, one process a model."""
    seconds, sums, saved = 0.0, {}, work / "log_probs.npy"
    for role, model in zip(("policy", "reference"), roles, strict=True):
        dtype = TORCH_DTYPES[precision]
        said = call([BASELINES / "torch_tuned.py", "--model", model, *what, "--dtype", dtype, "--save", saved])[1]
        seconds += said["seconds"]
        chosen_and_rejected = np.load(saved).reshape(-1, 2)
        sums[role, "chosen"], sums[role, "rejected"] = chosen_and_rejected.T
    return Run(seconds, None, {}, sums)


def evaluate(bundle: Bundle, data: Path, limit: int, work: Path) -> Run:
    """One `dpo-fast evaluate`, with an empty cache: reference scores that are known already would not be computed."""
    folder, cache = work / "run", work / "cache"
    for old in (folder, cache):
        shutil.rmtree(old, ignore_errors=True)
    options = ["--output", folder, "--limit", limit, "--aggregate", "trl", "--batch-size", TRL_BATCH]
    command = ["-m", "dpo_fast", "evaluate", bundle.folder, "--dataset", data, *options]
    wall_seconds, _ = call(command, {"DPO_FAST_CACHE": str(cache)})
    metrics = json.loads((folder / METRICS).read_text(encoding="utf-8"))
    parts = list(ScoreStore(folder / SCORES).read())
    sums = {
        (role, branch): np.concatenate([sum_log_probs(getattr(part, f"{role}_{branch}")) for part in parts])
        for role, branch in SUMS
    }
    return Run(metrics["timing"]["score_seconds"], wall_seconds, metrics, sums)


def sum_log_probs(scores: CompletionScores) -> Float64Array:
    """The log-prob of each completion, (P,), in nats."""
    ends = np.concatenate([[0], np.cumsum(scores.log_probs, dtype=np.float64)])
    last = np.cumsum(scores.lengths)
    sums: Float64Array = ends[last] - ends[last - scores.lengths]
    return sums


def compare(name: str, run: Run, runs: Mapping[str, Run], bundles: Mapping[str, Bundle]) -> dict[str, Any]:
    """A contender's seconds and ratios to its peers, and its errors against cpu-fp32."""
    result: dict[str, Any] = {"wall_seconds": run.wall_seconds, "score_seconds": run.score_seconds}
    exact, trl = runs[EXACT], runs.get("TRL fp32")
    if name in bundles:
        result["score_ratio_to_cpu_fp32"] = exact.score_seconds / run.score_seconds
        if trl is not None and trl.wall_seconds is not None and run.wall_seconds is not None:
            precision = bundles[name].manifest.recipe["precision"]
            result["wall_ratio_to_trl"] = trl.wall_seconds / run.wall_seconds
            result["score_ratio_to_trl"] = trl.score_seconds / run.score_seconds
            for each in TORCH_DTYPES:
                ratio = runs[f"PyTorch {each}"].score_seconds / run.score_seconds
                result[f"score_ratio_to_torch_{each}"] = ratio
            result["peer_precision"] = TORCH_PEER[precision]
    if run.metrics:
        result["largest_metric_error"] = max(metric_errors(run.metrics, exact.metrics).values())
    if run.sums:
        errors = np.concatenate([np.abs(run.sums[key] - exact.sums[key]) for key in SUMS])
        margin, exact_margin = margins(run.sums), margins(exact.sums)
        result |= spread("sequence_error", errors) | spread("margin_error", np.abs(margin - exact_margin))
        result["accuracy"] = float((margin > 0).mean())
        result["accuracy_change_percentage_points"] = 100 * float((margin > 0).mean() - (exact_margin > 0).mean())
        result["pairs_decided_otherwise_percent"] = 100 * float(((margin > 0) != (exact_margin > 0)).mean())
    else:
        result["accuracy"] = run.metrics[ACCURACY]
        result["accuracy_change_percentage_points"] = 100 * (run.metrics[ACCURACY] - exact.metrics[ACCURACY])
    if name == "TRL fp32":
        result["metrics_agree"] = agree(run.metrics, exact.metrics)
    return result


def margins(sums: Mapping[tuple[str, str], Float64Array]) -> Float64Array:
    """Log-ratio of chosen minus log-ratio of rejected, in nats: the reward margin at beta 1."""
    chosen, rejected = (sums["policy", branch] - sums["reference", branch] for branch in ("chosen", "rejected"))
    return chosen - rejected


def spread(name: str, errors: Float64Array) -> dict[str, float]:
    """Mean, 99th percentile and largest."""
    return {
        f"{name}_mean_nats": float(errors.mean()),
        f"{name}_p99_nats": float(np.quantile(errors, 0.99)),
        f"{name}_largest_nats": float(errors.max()),
    }


def metric_errors(metrics: Mapping[str, Any], exact: Mapping[str, Any]) -> dict[str, float]:
    """The absolute difference of each of TRL's metrics that both have."""
    ours = (key for key in metrics if key.startswith("eval_") and isinstance(metrics[key], float))
    return {key: abs(metrics[key] - exact[key]) for key in ours if isinstance(exact.get(key), float)}


def agree(trl: Mapping[str, Any], ours: Mapping[str, Any]) -> bool:
    """Whether every metric that both have is within its tolerance; accuracies must be equal."""
    for key, error in metric_errors(trl, ours).items():
        if key == ACCURACY:
            limit = 1e-7  # TRL's is a float32 mean
        elif "rewards" in key:
            limit = REWARD_TOLERANCE
        else:
            limit = TOLERANCE * max(1.0, abs(trl[key]))
        if not error <= limit:
            return False
    return True


def draw(results: Mapping[str, Mapping[str, Any]], title: str) -> Table:
    """One table: what is gained, and what it costs."""
    caption = "errors in nats: mean / 99th percentile / largest; times: how often it fits into the peer's time"
    table = Table(title=title, caption=caption, title_justify="left")
    table.add_column("contender")
    for column in ("wall s", "scoring s", "× TRL wall", "× TRL scoring", "× PyTorch", "sequence log-prob", "accuracy"):
        table.add_column(column, justify="right")
    for name, result in results.items():
        peer = result.get("peer_precision")
        sequence = [result.get(f"sequence_error_{each}_nats") for each in ("mean", "p99", "largest")]
        table.add_row(
            name,
            _number(result["wall_seconds"], ".1f"),
            _number(result["score_seconds"], ".2f"),
            _number(result.get("wall_ratio_to_trl"), ".1f"),
            _number(result.get("score_ratio_to_trl"), ".1f"),
            f"{result[f'score_ratio_to_torch_{peer}']:.2f} ({peer})" if peer else "",
            " / ".join(_number(value, ".2g") for value in sequence) if sequence[0] is not None else "",
            f"{result['accuracy']:.3f} ({result['accuracy_change_percentage_points']:+.1f} points)",
        )
    return table


def draw_metrics(trl: Mapping[str, Any], ours: Mapping[str, Any]) -> Table:
    """TRL's metrics beside those of cpu-fp32."""
    table = Table(title=f"TRL's metrics, --aggregate trl --batch-size {TRL_BATCH}", title_justify="left")
    for column in ("metric", "TRL", EXACT, "difference"):
        table.add_column(column, justify="left" if column == "metric" else "right")
    for key, error in metric_errors(trl, ours).items():
        table.add_row(key, f"{trl[key]:.7g}", f"{ours[key]:.7g}", f"{error:.1e}")
    return table


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


if __name__ == "__main__":
    main()
