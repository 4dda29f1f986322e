"""A run that is killed, at whatever moment, goes on to the very same bytes, and does at most one part's work twice."""

import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import killed_run
import pytest
from fake_engines import make_fake_bundle, write_rows

SCRIPT = Path(__file__).with_name("killed_run.py")
# Six parts of four rows; every row of another length, so that parts are several batches.
ROWS = [
    {"prompt": f"What is {n}?", "chosen": " It is" + " so" * n, "rejected": " no" * (n % 5 + 1)} for n in range(1, 23)
]
# Each process is forked from one that has imported everything.
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["killed_run", "datasets", "pyarrow.parquet", "transformers"])
OF_ONE_PART = 8  # batches at most: of four rows under two models
MOMENTS = 50
pytestmark = pytest.mark.slow


@pytest.fixture
def data(tmp_path: Path) -> tuple[str, str]:
    return str(make_fake_bundle(tmp_path / "bundle")), write_rows(tmp_path / "rows.jsonl", ROWS)


def call(moment: int, log: Path, cache: Path, *arguments: object) -> tuple[int, str]:
    """The exit code and the output of a process that dies at a moment, or at none (-1)."""
    output = log.with_suffix(".output")
    process = PROCESSES.Process(target=killed_run.do, args=(moment, log, cache, output, *map(str, arguments)))
    process.start()
    process.join()
    assert process.exitcode in (0, -signal.SIGKILL)  # what it says of itself is on standard error
    return process.exitcode, output.read_text()


def result(run: Path) -> dict[str, Any]:
    """The parts' bytes, and the numbers; not how long they took, nor which process computed what."""
    metrics = json.loads((run / "metrics.json").read_text())
    del metrics["timing"]
    metrics["provenance"].pop("this_process", None)
    for shard in metrics["provenance"].get("shards", []):
        del shard["timing"], shard["this_process"]
    files = {path.name: path.read_bytes() for path in (run / "scores").iterdir()}
    return {"metrics": metrics, "files": files, "skipped": (run / "skipped.jsonl").read_bytes()}


def spread(moments: int, seed: int, share: int, shares: int) -> list[int]:
    """A share of all moments that are tried, spread over what there are."""
    chosen = sorted(random.Random(seed).sample(range(moments), min(MOMENTS, moments)))
    return chosen[share::shares]


@pytest.mark.parametrize("share", range(4))
def test_killed_while_evaluating(data: tuple[str, str], tmp_path: Path, share: int) -> None:
    log, cache = tmp_path / "log", tmp_path / "cache"
    call(-1, log, cache, "evaluate", *data, tmp_path / "first")  # tokenises, so that what follows starts quickly
    shutil.rmtree(cache / "reference_scores")
    log.unlink()
    _, counted = call(-1, log, cache, "evaluate", *data, tmp_path / "whole")
    undisturbed = Counter(log.read_text().splitlines())
    assert len(undisturbed) > 20
    expected = result(tmp_path / "whole")
    killed = 0

    for moment in spread(int(counted), 0, share, 4):
        shutil.rmtree(cache / "reference_scores", ignore_errors=True)
        log.write_text("")
        run = tmp_path / f"run{moment}"
        code, _ = call(moment, log, cache, "evaluate", *data, run)
        killed += code != 0
        before = Counter(log.read_text().splitlines())
        call(-1, log, cache, "evaluate", *data, run)

        assert result(run) == expected, f"killed at moment {moment}"
        twice = Counter(log.read_text().splitlines()) - undisturbed
        assert sum(twice.values()) <= OF_ONE_PART, f"killed at moment {moment}: {twice} of {sum(before.values())}"
        shutil.rmtree(run)
    assert killed > MOMENTS // 4 - 3


@pytest.mark.parametrize("share", range(2))
def test_killed_while_tokenising(data: tuple[str, str], tmp_path: Path, share: int) -> None:
    """The same, from an empty cache: a few moments, for such processes start slowly."""
    log, cache = tmp_path / "log", tmp_path / "cache"
    _, counted = call(-1, log, cache, "evaluate", *data, tmp_path / "whole")
    expected = result(tmp_path / "whole")

    for moment in spread(int(counted), 1, share, 10)[:3]:
        shutil.rmtree(cache)
        run = tmp_path / f"run{moment}"
        call(moment, log, cache, "evaluate", *data, run)
        call(-1, log, cache, "evaluate", *data, run)

        assert result(run) == expected, f"killed at moment {moment}"


def test_killed_while_merging(data: tuple[str, str], tmp_path: Path) -> None:
    log, cache = tmp_path / "log", tmp_path / "cache"
    shards = [tmp_path / f"shard{number}" for number in (1, 2, 3)]
    for number, shard in enumerate(shards, start=1):
        call(-1, log, cache, "evaluate", *data, shard, number, 3)
    _, counted = call(-1, log, cache, "merge", tmp_path / "whole", *shards)
    expected = result(tmp_path / "whole")
    killed = 0

    for moment in spread(int(counted), 2, 0, 3):
        run = tmp_path / f"run{moment}"
        code, _ = call(moment, log, cache, "merge", run, *shards)
        killed += code != 0
        if not run.exists():
            call(-1, log, cache, "merge", run, *shards)

        assert result(run) == expected, f"killed at moment {moment}"
    assert killed > 10


def test_terminated_from_outside(data: tuple[str, str], tmp_path: Path) -> None:
    """SIGKILL at any time, not only where a moment is counted."""
    log, cache = tmp_path / "log", tmp_path / "cache"
    call(-1, log, cache, "evaluate", *data, tmp_path / "whole")
    expected = result(tmp_path / "whole")
    environment = os.environ | {"DPO_FAST_CACHE": str(cache)}
    generator = random.Random(3)
    for number in range(8):
        shutil.rmtree(cache / "reference_scores", ignore_errors=True)
        run = tmp_path / f"run{number}"
        command = [sys.executable, str(SCRIPT), "-1", str(log), "evaluate", *data, str(run)]
        process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)
        try:
            process.wait(generator.uniform(0.3, 1.5))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        call(-1, log, cache, "evaluate", *data, run)
        assert result(run) == expected
