"""What a cluster's workers cost over one process, where the engine costs nothing; and what the simulation must know.

    python benchmarks/cluster.py [--pairs 100000] [--turns 3] [--work build/cluster]
                                 [--write benchmarks/results/cluster-calibration.json]

The pairs of `benchmarks/scaling.py` are evaluated in processes of their own, by turns: by one process, by a Ray cluster
of this machine that is there already, with one worker and with two, and by one that is started for the run. Each time
first with tokenising, then with the tokens in the cache. What is compared is the whole wall time of `evaluate`, loading
and metrics included, best of all turns. Then single steps are timed for the simulation. Prints a table and one JSON
line.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from datetime import date
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from dpo_fast.provenance import hardware, versions

PROJECT = Path(__file__).parents[1]
sys.path.insert(0, str(PROJECT / "benchmarks"))
LOCAL = "one process"
FAKE_WORKERS = (2, 8, 24)  # actors that do nothing, between which the driver's loop chooses
FAKE_BLOCKS = 600


def main() -> None:
    """Compare, time single steps, and print both."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=100_000)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--data", type=Path, default=PROJECT.parent / "shared/data/hh-harmless-base-test.jsonl.gz")
    parser.add_argument("--baselines", type=Path, default=PROJECT.parent / "shared" / "bench")
    parser.add_argument("--work", type=Path, default=PROJECT / "build" / "cluster")
    parser.add_argument("--write", type=Path, help="where the simulation's parameters are written")
    parser.add_argument(
        "--one", nargs=5, metavar=("BUNDLE", "DATA", "RUN", "ADDRESS", "WORKERS"), help=argparse.SUPPRESS
    )
    arguments = parser.parse_args()
    if arguments.one:
        evaluate_one(*arguments.one)
        return
    import scaling

    arguments.work.mkdir(parents=True, exist_ok=True)
    bundle = scaling.make_bundle(arguments.work, arguments.baselines, arguments.data)
    data = scaling.write_rows(arguments.work, arguments.data, arguments.pairs)[arguments.pairs]
    with ray_nodes() as address:
        contenders = {
            LOCAL: ("", 0),
            "1 worker": (address, 1),
            "2 workers": (address, 2),
            "1 worker, --cluster local": ("local", 1),
        }
        found: dict[tuple[str, bool], list[dict[str, Any]]] = {}
        for _ in range(arguments.turns):
            for name, (place, workers) in contenders.items():
                shutil.rmtree(arguments.work / "cache", ignore_errors=True)
                for cached in (False, True):
                    shutil.rmtree(arguments.work / "run", ignore_errors=True)
                    shutil.rmtree(arguments.work / "cache" / "reference_scores", ignore_errors=True)
                    said = run_one(arguments.work, bundle, data, place, workers)
                    found.setdefault((name, cached), []).append(said)
                    print(name, cached, json.dumps(said["timing"]), file=sys.stderr, flush=True)
        best = {key: min(said, key=lambda each: each["timing"]["total_seconds"]) for key, said in found.items()}
        parameters = calibrate(best, arguments.pairs, arguments.work / "run" / "scores", data, address)
    show(best, arguments.pairs, parameters)
    if arguments.write:
        arguments.write.parent.mkdir(parents=True, exist_ok=True)
        made = {"date": date.today().isoformat(), "hardware": hardware(), "versions": versions((*VERSIONS,))}
        runs = [
            {"contender": name, "tokens_cached": cached, "pairs": arguments.pairs, **said["timing"]}
            for (name, cached), said in best.items()
        ]
        text = json.dumps(made | {"runs": runs, "parameters": parameters}, indent=2)
        arguments.write.write_text(text + "\n", encoding="utf-8")


VERSIONS = ("dpo-fast", "ray", "pyarrow", "numpy", "tokenizers")


class ray_nodes:  # noqa: N801
    """A Ray cluster of this machine: a head without workers, and a node of all cores."""

    def __enter__(self) -> str:
        from ray.cluster_utils import Cluster

        os.environ["PYTHONPATH"] = os.pathsep.join([str(PROJECT), str(PROJECT / "benchmarks")])
        self.cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
        self.cluster.add_node(num_cpus=os.cpu_count())
        return str(self.cluster.address)

    def __exit__(self, *error: object) -> None:
        self.cluster.shutdown()


def run_one(work: Path, bundle: Path, data: Path, address: str, workers: int) -> dict[str, Any]:
    """One evaluation in a process of its own."""
    environment = os.environ | {
        "DPO_FAST_CACHE": str(work / "cache"), "HF_DATASETS_CACHE": str(work / "datasets"), "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": os.pathsep.join([str(PROJECT), str(PROJECT / "benchmarks")]),
    }  # fmt: skip
    command = [sys.executable, __file__, "--one", bundle, data, work / "run", address, workers]
    done = subprocess.run(list(map(str, command)), env=environment, stdout=subprocess.PIPE, check=False)
    if done.returncode != 0:
        sys.exit("the evaluation failed")
    said: dict[str, Any] = json.loads(done.stdout)
    return said


def evaluate_one(bundle: str, data: str, run: str, address: str, workers: str) -> None:
    """The child: evaluate, and say on standard output what it took."""
    from scaling import TOKEN_BUDGET
    from workers_engine import open_free

    from dpo_fast.cluster.options import ClusterOptions
    from dpo_fast.evaluate import EvaluateOptions, evaluate

    cluster = ClusterOptions(address, workers=int(workers)) if address else None
    options = EvaluateOptions(token_budget=TOKEN_BUDGET, engines="together", cluster=cluster)
    metrics = evaluate(Path(bundle), data, Path(run), options, engine=open_free)
    print(
        json.dumps(
            {
                "timing": metrics["timing"],
                "account": metrics["provenance"]["this_process"],
                "tokens": metrics["provenance"]["computed_tokens"],
            }
        )
    )


def calibrate(
    best: dict[tuple[str, bool], dict[str, Any]], pairs: int, scores: Path, data: Path, address: str
) -> dict[str, Any]:
    """The simulation's parameters that can be measured on one machine; see `cluster_simulation.Parameters`."""
    from dpo_fast.preferences import fingerprint_of

    made, cached = (best[LOCAL, each]["timing"] for each in (False, True))
    there = best["1 worker", True]["timing"]
    scoring = cached["score_seconds"] + cached["tokenize_seconds"]
    started = time.perf_counter()
    fingerprint_of(str(data))
    fingerprint = (time.perf_counter() - started) / pairs
    block, block_and_worker, start = loop_seconds(address)
    measured = {
        "driver_start_seconds": (there["load_seconds"], "s", "load_seconds of a run with one worker"),
        "worker_start_seconds": (
            max(start, there["score_seconds"] - scoring), "s",
            "scoring with one worker, over the same by one process",
        ),
        "fingerprint_seconds_per_pair": (fingerprint, "s", "SHA-256 of the data set's file"),
        "prepare_seconds_per_pair": (
            (made["tokenize_seconds"] + made["score_seconds"] - scoring) / pairs + 0.5 * scoring / pairs, "s",
            "one process with tokenising, less the same without, and half of that",
        ),
        "prepare_seconds_per_cached_pair": (0.5 * scoring / pairs, "s", "half of one process, tokens cached"),
        "encode_seconds_per_pair": (0.5 * scoring / pairs, "s", "the other half"),
        "part_bytes_per_pair": (
            sum(path.stat().st_size for path in scores.glob("*.parquet")) / pairs, "bytes", "the parts of such a run",
        ),
        "merge_seconds_per_pair": (cached["metrics_seconds"] / pairs, "s", "metrics_seconds of such a run"),
        "seconds_per_block": (block, "s", f"Ray Data with {FAKE_WORKERS} idle actors: what {FAKE_BLOCKS} blocks take"),
        "seconds_per_block_and_worker": (block_and_worker, "s", "the same: what each further actor adds"),
        "ledger_seconds_per_message": (ledger_seconds(address), "s", "1,000 messages to a ledger's actor"),
    }  # fmt: skip
    return {name: {"value": value, "unit": unit, "how": how} for name, (value, unit, how) in measured.items()}


def loop_seconds(address: str) -> tuple[float, float, float]:
    """Seconds of Ray Data's loop a block, the same for each actor that it chooses among, and an actor's start."""
    import numpy as np
    import ray
    import ray.data

    from dpo_fast.cluster.connection import connected

    class Idle:
        """Gives back what it gets."""

        def __call__(self, rows: Any) -> Any:
            return rows

    def seconds(workers: int, blocks: int) -> float:
        data = ray.data.from_items([{"part": part} for part in range(blocks)], override_num_blocks=blocks)
        pool = ray.data.ActorPoolStrategy(size=workers, max_tasks_in_flight_per_actor=2)
        started = time.perf_counter()
        count = sum(1 for _ in data.map_batches(Idle, batch_size=1, compute=pool, num_cpus=0.01).iter_rows())
        assert count == blocks
        return time.perf_counter() - started

    with connected(address):
        ray.data.DataContext.get_current().enable_progress_bars = False
        seconds(2, 20)  # the first one imports
        start = seconds(1, 1)
        few = [seconds(workers, workers) for workers in FAKE_WORKERS]
        many = [seconds(workers, workers + FAKE_BLOCKS) for workers in FAKE_WORKERS]
    a_block = [max(0.0, (m - f) / FAKE_BLOCKS) for m, f in zip(many, few, strict=True)]
    slope, intercept = np.polyfit(FAKE_WORKERS, a_block, 1)
    return max(0.0, float(intercept)), max(0.0, float(slope)), start


def ledger_seconds(address: str) -> float:
    """Seconds that a message takes a ledger's actor."""
    import ray

    from dpo_fast.cluster.connection import connected
    from dpo_fast.cluster.ledger import Ledger

    with connected(address):
        ledger = ray.remote(Ledger).options(num_cpus=0).remote(attempts=3)
        ray.get(ledger.started.remote("a", 0, "host", "node", 1, None))
        started = time.perf_counter()
        for part in range(1000):
            ledger.progress.remote("a", part, 1.0, 1)
        ray.get(ledger.snapshot.remote(1.0))
        return (time.perf_counter() - started) / 1000


def show(best: dict[tuple[str, bool], dict[str, Any]], pairs: int, parameters: dict[str, Any]) -> None:
    """The table, and the JSON line."""
    table = Table(title=f"{pairs:,} pairs, an engine that costs nothing", title_justify="left")
    for column in ("who scores", "tokens", "load s", "tokenise s", "score s", "metrics s", "all s", "over one process"):
        table.add_column(column, justify="left" if column == "who scores" else "right")
    results = []
    for (name, cached), said in best.items():
        timing = said["timing"]
        over = timing["total_seconds"] / best[LOCAL, cached]["timing"]["total_seconds"] - 1
        results.append({"contender": name, "tokens_cached": cached, "overhead": over, **timing})
        shown = [f"{timing[f'{each}_seconds']:.1f}" for each in ("load", "tokenize", "score", "metrics", "total")]
        table.add_row(name, "cached" if cached else "made", *shown, "" if name == LOCAL else f"{over:+.0%}")
    Console(width=110).print(table)
    print(json.dumps({"results": results, "parameters": parameters, "hardware": hardware()}))


if __name__ == "__main__":
    main()
