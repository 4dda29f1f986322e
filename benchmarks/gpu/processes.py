"""A contender's process: its lines of JSON, its one-line error, and the memory that it took."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bundles import PROJECT

INTERVAL = 0.1  # seconds between two looks at the GPU's memory
TOOL_SECONDS = 20.0  # that nvidia-smi may take, which is some where the driver is not loaded yet
ERROR_LENGTH = 300


@dataclass(slots=True)
class Memory:
    """Memory of a GPU that all processes use together, in bytes; None where nvidia-smi does not say.

    Attributes:
        before: when the process was started.
        largest: until it ended.
    """

    before: int | None = None
    largest: int | None = None


@dataclass(frozen=True, slots=True)
class Ended:
    """A process that has ended.

    Attributes:
        said: the lines of JSON on its standard output.
        error: why it failed, in one line, or None.
        seconds: from start to end.
        memory: of the GPU.
    """

    said: list[dict[str, Any]]
    error: str | None
    seconds: float
    memory: Memory


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What all processes of a benchmark have in common.

    Attributes:
        work: folder for logs and the cache.
        gpu: which one, as nvidia-smi counts; None for a benchmark on the processor.
        timeout: of a process, in seconds.
    """

    work: Path
    gpu: int | None
    timeout: float

    @property
    def environment(self) -> dict[str, str]:
        """Variables of the process: no downloads, a cache of our own, and one GPU."""
        paths = [str(PROJECT / "benchmarks"), str(PROJECT), os.environ.get("PYTHONPATH", "")]
        ours = {
            "HF_HUB_OFFLINE": "1",
            "PYTHONPATH": os.pathsep.join(path for path in paths if path),
            "DPO_FAST_CACHE": str(self.work / "cache"),
        }
        if self.gpu is not None:
            ours |= {"CUDA_DEVICE_ORDER": "PCI_BUS_ID", "CUDA_VISIBLE_DEVICES": str(self.gpu)}
        return ours


def run_task(task: str, arguments: Mapping[str, Any], log: str, surroundings: Surroundings) -> Ended:
    """Run a task of `gpu.work` in a process of its own.

    Args:
        task: its name.
        arguments: its keyword arguments, for JSON; `started` is added: the time in seconds since the epoch.
        log: name of the file that takes what the process says besides.
        surroundings: of the process.
    """
    job = {"task": task, "arguments": {**arguments, "started": time.time()}}
    return run_python(["-m", "gpu.work", json.dumps(job)], log, surroundings)


def run_python(arguments: Sequence[Any], log: str, surroundings: Surroundings) -> Ended:
    """Run Python, wait for its end, and watch the GPU's memory meanwhile.

    Args:
        arguments: of Python.
        log: as `run_task`.
        surroundings: of the process.
    """
    logs = surroundings.work / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    with (logs / f"{log}.txt").open("wb+") as errors, watch_memory(surroundings.gpu) as memory:
        started = time.perf_counter()
        process = subprocess.Popen(
            [sys.executable, *map(str, arguments)],
            stdout=subprocess.PIPE,
            stderr=errors,
            env=os.environ | surroundings.environment,
            start_new_session=True,  # a builder's own children end with it
        )
        timed_out = False
        try:
            output, _ = process.communicate(timeout=surroundings.timeout)
        except subprocess.TimeoutExpired:
            timed_out = True
            os.killpg(process.pid, signal.SIGKILL)
            output, _ = process.communicate()
        except BaseException:
            os.killpg(process.pid, signal.SIGKILL)
            raise
        seconds = time.perf_counter() - started
        errors.seek(0)
        log_text = errors.read().decode(errors="replace")
    said = [json.loads(line) for line in output.decode(errors="replace").splitlines() if line.startswith("{")]
    error = None
    if timed_out:
        error = f"did not end in {surroundings.timeout:g} s; allow more with --timeout"
    elif process.returncode:
        error = last_line(log_text, process.returncode)
    return Ended(said, error, seconds, memory)


def last_line(log: str, code: int) -> str:
    """Why a process failed: the last thing that it said, and the signal that ended it, if one did."""
    lines = [" ".join(line.split()) for line in log.splitlines() if line.strip()]
    last = lines[-1][:ERROR_LENGTH] if lines else "it said nothing"
    if code < 0:
        return f"ended by signal {-code}; its last words: {last}"
    return last.removeprefix("dpo-fast: ")


@contextmanager
def watch_memory(gpu: int | None, command: str = "nvidia-smi") -> Iterator[Memory]:
    """Ask NVIDIA's tool for a GPU's used memory, again and again, while the block runs.

    Args:
        gpu: as the tool counts; None watches nothing.
        command: the tool.

    Yields:
        What was found; complete when the block has ended.
    """
    before = None if gpu is None else used_memory(gpu, command)
    memory = Memory(before, before)
    if gpu is None or before is None:
        yield memory
        return
    ended = threading.Event()

    def look() -> None:
        while not ended.wait(INTERVAL):
            memory.largest = max(memory.largest or 0, used_memory(gpu, command) or 0)

    looking = threading.Thread(target=look)
    looking.start()
    try:
        yield memory
    finally:
        ended.set()
        looking.join()


def used_memory(gpu: int, command: str) -> int | None:
    """Bytes that all processes use of a GPU now; None where the tool does not say."""
    query = ["--query-gpu=memory.used", "--format=csv,noheader,nounits", f"--id={gpu}"]
    try:
        answer = subprocess.run([command, *query], capture_output=True, text=True, timeout=TOOL_SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    mebibytes = answer.stdout.strip()
    return int(mebibytes) << 20 if mebibytes.isdecimal() else None  # "[N/A]" where the processor's memory is shared
