"""The way itself, from rows to metrics, with an engine that costs nothing: 10^3 to 10^6 pairs.

    python benchmarks/scaling.py [--pairs 1000,10000,100000,1000000] [--work build/scaling]

Rows are the real preference pairs, over and over, each with its number in front, so that no two are the same. Each size
is evaluated twice, in processes of their own: first with tokenising, then with the tokens in the cache (reference
scores are not kept in between). Speed is pairs over the seconds of tokenising and scoring; loading, and metrics with
their bootstrapped intervals, are shown beside. Prints a table, then one JSON line. The million needs some 12 GB of
disk and a quarter of an hour.
"""

import argparse
import gzip
import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from dpo_fast.batches import Batch
from dpo_fast.bundle import FORMAT, POLICY, REFERENCE, Bundle, Manifest, ModelEntry, hash_files, write_manifest
from dpo_fast.provenance import hardware
from dpo_fast.recipes import load_recipe
from dpo_fast.types import TokenScores

PROJECT = Path(__file__).parents[1]
TOKEN_BUDGET = 16_384  # what a GPU would be given


class FreeEngine:
    """Says the same of every token."""

    name, precision = "free", "fp32"

    def score(self, batch: Batch) -> TokenScores:
        """N times the same."""
        zeros = np.zeros(batch.target_ids.size, np.float32)
        return TokenScores(zeros - 1, zeros, zeros, zeros, zeros)

    def with_gates(self, gates: object) -> "FreeEngine":
        """Has none."""
        return self


def main() -> None:
    """Evaluate every size twice, and print how it went."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", default="1000,10000,100000,1000000")
    parser.add_argument("--data", type=Path, default=PROJECT.parent / "shared/data/hh-harmless-base-test.jsonl.gz")
    parser.add_argument("--baselines", type=Path, default=PROJECT.parent / "shared" / "bench")
    parser.add_argument("--work", type=Path, default=PROJECT / "build" / "scaling")
    parser.add_argument("--one", nargs=3, metavar=("BUNDLE", "DATA", "RUN"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        evaluate_one(*map(Path, arguments.one))
        return
    for needed in (arguments.baselines / "make_model.py", arguments.data):
        if not needed.exists():
            sys.exit(f"{needed}: not found; name it with --baselines or --data")
    sizes = [int(size) for size in arguments.pairs.split(",")]
    bundle = make_bundle(arguments.work, arguments.baselines, arguments.data)
    data = write_rows(arguments.work, arguments.data, max(sizes))
    results = []
    for size in sizes:
        shutil.rmtree(arguments.work / "cache", ignore_errors=True)
        for tokenised in (False, True):
            shutil.rmtree(arguments.work / "run", ignore_errors=True)
            shutil.rmtree(arguments.work / "cache" / "reference_scores", ignore_errors=True)
            results.append(measure(bundle, data[size], arguments.work, size) | {"tokenised_before": tokenised})
    shutil.rmtree(arguments.work / "run")
    shutil.rmtree(arguments.work / "cache")
    show(results)


def make_bundle(work: Path, baselines: Path, data: Path) -> Path:
    """A bundle with the tokenizer of the peers' model, and no model."""
    models = work / "smollm2-135m"
    if not models.exists():
        subprocess.run([sys.executable, baselines / "make_model.py", "--data", data, "--out", models], check=True)
    bundle = work / "bundle"
    shutil.rmtree(bundle, ignore_errors=True)
    entries = {}
    for role in (POLICY, REFERENCE):
        (bundle / role).mkdir(parents=True)
        (bundle / f"{role}.onnx").write_text(role)
        entries[role] = ModelEntry(
            source=role, revision=None, architecture="LlamaForCausalLM", model_type="llama", stored_dtypes=["F32"],
            parameters=1, vocabulary=49_152, hidden=None, layers=None, heads=None, max_positions=None,
            graph=f"{role}.onnx", engine_graph=f"{role}.onnx", weights=[role], adapter_gates=None, layout="shared",
            self_check=None, engine_check=None,
        )  # fmt: skip
    for file in (models / "policy").iterdir():
        if "token" in file.name or file.name == "config.json":
            shutil.copy(file, bundle / POLICY)
    manifest = Manifest(
        format=FORMAT, versions={}, recipe=asdict(load_recipe("cpu-fp32")), max_length=1024, inputs={}, outputs=[],
        models=entries, files=hash_files(bundle),
    )  # fmt: skip
    write_manifest(bundle, manifest)
    return bundle


def write_rows(work: Path, source: Path, largest: int) -> dict[int, Path]:
    """The real rows, numbered, over and over, as Parquet; sizes on demand."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    with gzip.open(source, "rt", encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]

    class Sizes(dict[int, Path]):
        def __missing__(self, size: int) -> Path:
            path = work / f"{size}.parquet"
            writer = None
            for start in range(0, size, 10_000):
                numbered = [
                    {name: f"{index}: {rows[index % len(rows)][name]}" for name in ("chosen", "rejected")}
                    for index in range(start, min(start + 10_000, size))
                ]
                table = pa.Table.from_pylist(numbered)
                writer = writer or pq.ParquetWriter(path, table.schema, compression="zstd")
                writer.write_table(table)
            if writer is not None:
                writer.close()
            return path

    return Sizes()


def measure(bundle: Path, data: Path, work: Path, size: int) -> dict[str, Any]:
    """One evaluation in a process of its own: its metrics' timing, and its peak memory."""
    environment = os.environ | {
        "DPO_FAST_CACHE": str(work / "cache"), "HF_DATASETS_CACHE": str(work / "datasets"), "HF_HUB_OFFLINE": "1",
    }  # fmt: skip
    command = [sys.executable, __file__, "--one", bundle, data, work / "run"]
    process = subprocess.Popen([*map(str, command)], env=environment, stdout=subprocess.PIPE)
    anonymous = 0
    while process.poll() is None:
        anonymous = max(anonymous, status_bytes(process.pid, "RssAnon"))
        time.sleep(0.05)
    if process.returncode != 0 or process.stdout is None:
        sys.exit("the evaluation failed")
    said = json.loads(process.stdout.read())
    timing, seconds = said["timing"], said["timing"]["tokenize_seconds"] + said["timing"]["score_seconds"]
    return {
        "pairs": size,
        "pairs_per_second": size / seconds,
        "tokens_per_second": said["tokens"] / seconds,
        **timing,
        "peak_resident_bytes": said["peak_resident_bytes"],
        "peak_anonymous_bytes": anonymous,
        "padding_share": said["padding_share"],
    }


def evaluate_one(bundle: Path, data: Path, run: Path) -> None:
    """The child: evaluate, and say on standard output what it took."""
    from dpo_fast.evaluate import EvaluateOptions, evaluate

    def open_free(bundle: Bundle, role: str) -> FreeEngine:
        return FreeEngine()

    options = EvaluateOptions(token_budget=TOKEN_BUDGET, engines="together")
    metrics = evaluate(bundle, str(data), run, options, engine=open_free)
    provenance = metrics["provenance"]
    print(
        json.dumps(
            {
                "timing": metrics["timing"],
                "tokens": sum(metrics["counts"]["tokens"].values()),
                "padding_share": provenance["padding_tokens"] / provenance["computed_tokens"],
                "peak_resident_bytes": status_bytes(os.getpid(), "VmHWM"),
            }
        )
    )


def status_bytes(process: int, name: str) -> int:
    """A line of /proc/PID/status, in bytes; 0 when the process is gone."""
    try:
        lines = Path(f"/proc/{process}/status").read_text(encoding="utf-8").splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:")), 0)


def show(results: list[dict[str, Any]]) -> None:
    """The table, and the JSON line."""
    table = Table(title="the way itself: an engine that costs nothing, policy and reference", title_justify="left")
    for column in ("pairs", "tokens", "pairs/s", "tokenise s", "score s", "metrics s", "peak MB", "anonymous MB"):
        table.add_column(column, justify="right")
    for result in results:
        table.add_row(
            f"{result['pairs']:,}",
            "cached" if result["tokenised_before"] else "made",
            f"{result['pairs_per_second']:,.0f}",
            f"{result['tokenize_seconds']:.1f}",
            f"{result['score_seconds']:.1f}",
            f"{result['metrics_seconds']:.1f}",
            f"{result['peak_resident_bytes'] / 1e6:,.0f}",
            f"{result['peak_anonymous_bytes'] / 1e6:,.0f}",
        )
    Console(width=110).print(table)
    print(json.dumps({"token_budget": TOKEN_BUDGET, "results": results, "hardware": hardware()}))


if __name__ == "__main__":
    main()
