"""The main job against its peers, in one run: TRL's `evaluate()`, tuned PyTorch, and dpo_fast, on real pairs.

    python benchmarks/main_job.py [--limit 64] [--work build/main_job]

It needs the baseline scripts (`make_model.py`, `trl_evaluate.py`, `torch_tuned.py`) and the preference data, which lie
beside the project. Every contender is a process of its own; wall time includes start-up, scoring time does not.
dpo_fast runs before and after the others, so that a machine that slows down shows. The peak of a float32 matrix
product, measured in the same run, says how much faster it could be. Prints a table, then one JSON line.
"""

import argparse
import json
import math
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
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
    peaks = gemm_peaks()
    needed = needed_flop(bundle, first[1]["counts"]["tokens"])
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
        "onnxruntime_gemm_peak_gflop_per_second": peaks["onnxruntime"] / 1e9,
        "torch_gemm_peak_gflop_per_second": peaks["torch"] / 1e9,
        "needed_tflop": needed / 1e12,
        "share_of_gemm_peak": needed / score_seconds / peaks["onnxruntime"],
        "score_ratio_to_tuned_torch_at_gemm_peak": tuned_seconds * peaks["onnxruntime"] / needed,
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
    print(
        f"GEMM peak, float32, 512 x 576 x 1,536: ONNX Runtime {peaks['onnxruntime'] / 1e9:.0f} GFLOP/s, PyTorch "
        f"{peaks['torch'] / 1e9:.0f}.\nThe weights' products alone are {needed / 1e12:.2f} TFLOP: "
        f"{needed / peaks['onnxruntime']:.1f} s at that peak; scoring runs at "
        f"{needed / score_seconds / peaks['onnxruntime']:.0%} of it.\n"
    )
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
    done = subprocess.run([sys.executable, *map(str, arguments)], capture_output=True, env=environment, check=False)
    seconds = time.perf_counter() - started
    if done.returncode != 0:
        sys.exit(f"{done.stderr.decode()}\nfailed: {' '.join(map(str, arguments))}")
    lines = done.stdout.decode().strip().splitlines()
    return seconds, json.loads(lines[-1]) if lines and lines[-1].startswith("{") else {}


def evaluate(bundle: Path, data: Path, limit: list[str], run: Path) -> tuple[float, dict[str, Any]]:
    """One `dpo-fast evaluate`: its wall seconds, and its metrics."""
    shutil.rmtree(run, ignore_errors=True)
    trl_like = ["--aggregate", "trl", "--batch-size", "8"]
    seconds, _ = call(["-m", "dpo_fast", "evaluate", bundle, "--dataset", data, "--output", run, *limit, *trl_like])
    return seconds, json.loads((run / "metrics.json").read_text(encoding="utf-8"))


def needed_flop(bundle: Path, tokens: dict[str, int]) -> float:
    """Floating-point operations that no float32 evaluation of both models can do without, the prompt shared.

    Two for each weight and token; the embedding (tied to the head) only for the completions' tokens. Attention's own
    products, which grow with the square of the length, come on top.
    """
    models = json.loads((bundle / "bundle.json").read_text(encoding="utf-8"))["models"]
    config = json.loads((bundle / "policy" / "config.json").read_text(encoding="utf-8"))
    head: int = config["vocab_size"] * config["hidden_size"]
    completions = tokens["chosen"] + tokens["rejected"]
    body: int = sum(model["parameters"] - head for model in models.values())
    return 2.0 * (body * (tokens["prompt"] + completions) + len(models) * head * completions)


def gemm_peaks() -> dict[str, float]:
    """The best of 100 float32 matrix products of the model's most frequent shape, in operations a second."""
    import numpy as np
    import onnx
    import onnxruntime
    import torch
    from onnx import TensorProto, helper, numpy_helper

    rows, inner, columns = 512, 576, 1536
    generator = np.random.default_rng(0)
    left = generator.standard_normal((rows, inner), np.float32)
    right = generator.standard_normal((inner, columns), np.float32)
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["left", "right"], ["product"])],
        "gemm",
        [helper.make_tensor_value_info("left", TensorProto.FLOAT, [rows, inner])],
        [helper.make_tensor_value_info("product", TensorProto.FLOAT, [rows, columns])],
        [numpy_helper.from_array(right, "right")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.checker.check_model(model)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    tensors = torch.from_numpy(left), torch.from_numpy(np.ascontiguousarray(right.T))
    contenders: dict[str, Callable[[], Any]] = {
        "onnxruntime": lambda: session.run(None, {"left": left}),
        "torch": lambda: torch.nn.functional.linear(*tensors),
    }
    peaks = {}
    for name, product in contenders.items():
        fastest = math.inf
        for _ in range(100):
            started = time.perf_counter()
            product()
            fastest = min(fastest, time.perf_counter() - started)
        peaks[name] = 2 * rows * inner * columns / fastest
    return peaks


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
