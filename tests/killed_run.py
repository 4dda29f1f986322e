"""A process that evaluates and merges, and kills itself at a chosen moment; see test_killed.py.

    python killed_run.py MOMENT LOG evaluate BUNDLE DATASET RUN [SHARD SHARDS]
    python killed_run.py MOMENT LOG merge RUN SHARD…

Moments are counted: each file that is opened, renamed or removed, each folder that is made, each batch. At the one that
is asked for, SIGKILL comes before it happens; at -1 it never comes, and their number goes to standard output. What the
engine is asked goes to LOG, a line a batch.
"""

import os
import signal
import sys
import zlib
from pathlib import Path

import numpy as np

from dpo_fast.batches import Batch
from dpo_fast.bundle import Bundle
from dpo_fast.evaluate import EvaluateOptions, evaluate
from dpo_fast.merge import merge
from dpo_fast.types import TokenScores

EVENTS = ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.link", "batch")
OPTIONS = EvaluateOptions(part_size=4, token_budget=60)


class Engine:
    """Says something of each token that depends on the token, its place and the model."""

    name, precision = "fake 1.0", "fp32"

    def __init__(self, role: str, log: Path) -> None:
        self.role, self.log = role, log

    def score(self, batch: Batch) -> TokenScores:
        sys.audit("batch")
        with self.log.open("a") as file:
            file.write(f"{self.role} {zlib.crc32(batch.input_ids.tobytes())}\n")
        values = (batch.target_ids * 31 + batch.target_index % 7 + len(self.role)) % 64 / 8
        value = values.astype(np.float32)
        return TokenScores(-value, value, value - 4, value > 4, -value)  # type: ignore[arg-type]

    def with_gates(self, gates: object) -> "Engine":
        return self


def main(moment: int, log: Path, task: str, *arguments: str) -> None:
    """Do the task, or die on the way."""
    seen = 0

    def count(event: str, _: object) -> None:
        nonlocal seen
        if event in EVENTS:
            seen += 1
            if seen == moment + 1:
                os.kill(os.getpid(), signal.SIGKILL)

    def open_engine(bundle: Bundle, role: str) -> Engine:
        return Engine(role, log)

    sys.addaudithook(count)
    if task == "merge":
        run, *shards = map(Path, arguments)
        merge(shards, run)
    else:
        bundle, dataset, output, *numbers = arguments
        shard = (int(numbers[0]), int(numbers[1])) if numbers else None
        options = EvaluateOptions(part_size=OPTIONS.part_size, token_budget=OPTIONS.token_budget, shard=shard)
        evaluate(Path(bundle), dataset, Path(output), options, engine=open_engine)  # type: ignore[arg-type]
    sys.stdout.write(str(seen))


def do(moment: int, log: Path, cache: Path, output: Path, *arguments: str) -> None:
    """The same in a process that was forked: with a cache, and a file for standard output."""
    os.environ["DPO_FAST_CACHE"] = str(cache)
    with output.open("w") as sys.stdout:
        main(moment, log, *arguments)


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]), *sys.argv[3:])
