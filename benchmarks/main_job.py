"""The main job against its peers, in one run: TRL's `evaluate()`, tuned PyTorch, and dpo_fast, on real pairs.

    python benchmarks/main_job.py [--limit 64] [--work build/main_job]

It needs the baseline scripts (`make_model.py`, `trl_evaluate.py`, `torch_tuned.py`) and the preference data, which lie
beside the project. Every contender is a process of its own; wall time includes start-up, scoring time does not.
dpo_fast runs before and after the others, so that a machine that slows down shows. Prints a table, then one JSON line.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from dpo_fast.provenance import hardware

PROJECT = Path(__file__).parents[1]
# Every metric within 1e-5, relative or absolute; rewards are differences of sums of hundreds: 1e-4 absolute.
TOLERANCE, REWARD_TOLERANCE = 1e-5, 1e-4


def main() -> None:
    """Run all contenders and print how they compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--limit", type=int, default=64, help="pairs")
    parser.add_argument("--shape", default="smollm2-135m")
    parser.add_argument("--baselines", type=Path, default=PROJECT.parent / "shared" / "bench")
    parser.add_argument("--data", type=Path, default=PROJECT.parent / "shared/data/hh-harmless-base-test.jsonl.gz")
    parser.add_argument("--work", type=Path, default=PROJECT / "build" / "main_job")
    arguments = parser.parse_args()
    for needed in (arguments.baselines / "trl_evaluate.py", arguments.data):
        if not needed.exists():
            sys.exit(f"{needed}: not found; name it with --baselines or --data")

    models, bundle = arguments.work / arguments.shape, arguments.work / f"{arguments.shape}-bundle"
    data = ["--data", str(arguments.data)]
    if not models.exists():
        call([arguments.baselines / "make_model.py", "--shape", arguments.shape, *data, "--out", models])
    if not bundle.exists():
        roles = ["--policy", models / "policy", "--reference", models / "reference"]
        call(["-m", "dpo_fast.export", *roles, "--output", bundle])

    limit = ["--limit", str(arguments.limit)]
    first = evaluate(bundle, arguments.data, limit, arguments.work / "run")
    tuned = {
        role: call([arguments.baselines / "torch_tuned.py", "--model", models / role, *data, *limit])[1]
        for role in ("policy", "reference")
    }
    roles = ["--policy", models / "policy", "--reference", models / "reference"]
    trl_wall_seconds, trl = call([arguments.baselines / "trl_evaluate.py", *roles, *data, *limit])
    second = evaluate(bundle, arguments.data, limit, arguments.work / "run")

    tuned_seconds = sum(result["seconds"] for result in tuned.values())
    runs = [first, second]
    # The slower of the two runs is the one that is claimed.
    wall_seconds = max(wall for wall, _ in runs)
    score_seconds = max(metrics["timing"]["score_seconds"] for _, metrics in runs)
    errors = {key: abs(first[1][key] - value) for key, value in trl.items() if key in first[1]}
    result = {
        "shape": arguments.shape,
        "pairs": arguments.limit,
        "trl_wall_seconds": trl_wall_seconds,
        "trl_evaluate_seconds": trl["seconds"],
        "tuned_torch_fp32_score_seconds": tuned_seconds,
        "dpo_fast_wall_seconds": [wall for wall, _ in runs],
        "dpo_fast_score_seconds": [metrics["timing"]["score_seconds"] for _, metrics in runs],
        "wall_ratio_to_trl": trl_wall_seconds / wall_seconds,
        "score_ratio_to_tuned_torch": tuned_seconds / score_seconds,
        "largest_metric_error": max(errors.values()),
        "metrics_compared": len(errors),
        "metrics_agree": agree(first[1], trl),
        "hardware": hardware(),
    }
    table = Table(title=f"{arguments.limit} real pairs, {arguments.shape}, fp32, both models", title_justify="left")
    for column in ("contender", "wall s", "scoring s", "pairs/s", "times dpo_fast"):
        table.add_column(column, justify="left" if column == "contender" else "right")
    pairs = arguments.limit
    table.add_row(
        "TRL evaluate(), batch 8",
        f"{trl_wall_seconds:.1f}",
        f"{trl['seconds']:.1f}",
        f"{pairs / trl_wall_seconds:.2f}",
        f"{trl_wall_seconds / wall_seconds:.1f} (wall)",
    )
    table.add_row(
        "tuned PyTorch",
        "",
        f"{tuned_seconds:.1f}",
        f"{pairs / tuned_seconds:.2f}",
        f"{tuned_seconds / score_seconds:.1f}",
    )
    for (wall, metrics), name in zip(runs, ("before", "after"), strict=True):
        scoring = metrics["timing"]["score_seconds"]
        table.add_row(f"dpo_fast evaluate, {name}", f"{wall:.1f}", f"{scoring:.1f}", f"{pairs / wall:.2f}", "")
    Console(width=110).print(table)
    metric_errors = Table(title="TRL's metrics, --aggregate trl --batch-size 8", title_justify="left")
    for column in ("metric", "TRL", "dpo_fast", "difference"):
        metric_errors.add_column(column, justify="left" if column == "metric" else "right")
    for key, error in errors.items():
        metric_errors.add_row(key, f"{trl[key]:.7g}", f"{first[1][key]:.7g}", f"{error:.1e}")
    Console(width=110).print(metric_errors)
    print(json.dumps(result))


def call(arguments: list[Any]) -> tuple[float, dict[str, Any]]:
    """Run Python with arguments; its wall seconds, and the JSON of its last line, if it is one."""
    print(f"running {' '.join(Path(str(part)).name for part in arguments[:3])} …", file=sys.stderr, flush=True)
    started = time.perf_counter()
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, *map(str, arguments)], stdout=subprocess.PIPE, env=environment, check=True)
    seconds = time.perf_counter() - started
    lines = done.stdout.decode().strip().splitlines()
    return seconds, json.loads(lines[-1]) if lines and lines[-1].startswith("{") else {}


def evaluate(bundle: Path, data: Path, limit: list[str], run: Path) -> tuple[float, dict[str, Any]]:
    """One `dpo-fast evaluate`: its wall seconds, and its metrics."""
    shutil.rmtree(run, ignore_errors=True)
    trl_like = ["--aggregate", "trl", "--batch-size", "8"]
    seconds, _ = call(["-m", "dpo_fast", "evaluate", bundle, "--dataset", data, "--output", run, *limit, *trl_like])
    return seconds, json.loads((run / "metrics.json").read_text(encoding="utf-8"))


def agree(ours: dict[str, Any], trl: dict[str, Any]) -> bool:
    """Whether every metric that both have is within its tolerance; accuracies must be equal."""
    for key, value in trl.items():
        if key not in ours:
            continue
        error = abs(ours[key] - value)
        if key == "eval_rewards/accuracies":
            limit = 1e-7  # TRL's is a float32 mean
        elif "rewards" in key:
            limit = REWARD_TOLERANCE
        else:
            limit = TOLERANCE * max(1.0, abs(value))
        if not error <= limit:
            return False
    return True


if __name__ == "__main__":
    main()
