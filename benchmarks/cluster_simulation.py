"""How a cluster run grows: to 10^8 pairs and 256 workers, and what limits it then. A simulation, not a measurement.

    python benchmarks/cluster_simulation.py --pairs 1e6,1e7,1e8 --workers 1,8,64,256 --tokens-per-pair 500 \
        --tokens-per-second 20000 --price-per-hour 2.0

A discrete-event simulation of `dpo-fast evaluate --cluster`::

    driver   start | hands out blocks, one after the other                   | merge: reads every part
    worker         | start | prepare | engine | write                        |
                           |         prepare  | engine | write               |
    store                  every read and write, of all workers

Every number that it works with is a field of `Parameters`, which says its unit, its meaning and where it was measured.
What `benchmarks/cluster.py` measured is taken from `benchmarks/results/cluster-calibration.json`::

    {"hardware": …, "parameters": {"seconds_per_block": {"value": 0.004, "unit": "s", "how": "…"}, …}}

The rest is what README's measurements say, or an assumption; `--parameters` lists each with its origin, and
`--set NAME=VALUE` changes one. There are no prices and no GPU's speed in here: these are for you to give. Where no
speed was measured, `--parameters-of-model` and `--peak-flops` give one by 2 operations for each weight and token, over
an assumed share of the peak (`--share-of-peak`).

What is assumed of the queues:

- The driver's loop is one server, first come first served, and never does two things at once: it takes
  `seconds_per_block`, and `seconds_per_block_and_worker` for each worker, to hand out a block and to hear of its end.
- A block is one part; where there are more than `most_blocks` parts, several consecutive ones. A worker has
  `blocks_in_flight` blocks at a time, each in a thread of its own that takes its parts in turn: prepare, engine,
  write. The engine takes one part at a time, first come first served, so that one part is prepared, or written, while
  another is on the engine. A worker tokenises one part at a time; where the tokens were made before, its threads do not
  slow each other down otherwise.
- The store is one server for all workers: a transfer takes it the time that its requests and its bytes are at the
  store's own limits, and takes the worker at least its latencies and its bytes at the worker's own bandwidth.
- Parts differ in their tokens by a gamma distribution of mean 1; nothing else varies. Workers die at exponentially
  distributed times; what the dead one had not written is begun again, first of all, by whoever is free, and it comes
  back after `seconds_until_restart` and its own start. Nobody doubles the work of a straggler.
- Progress goes to the ledger, an actor of its own: a message a part, and the most that a worker may send beside. No
  answer is waited for, but a run cannot end before the ledger has taken all of it.
- The merge is one thread that computes, while `merge_parts_ahead` parts are read; it begins when the last part is
  written. What it reads shares one machine's bandwidth, but not the latencies.
- Workers are paid from the driver's start to the end of the merge.
"""

import argparse
import heapq
import json
import math
import sys
from collections import deque
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from dataclasses import field as dataclass_field
from pathlib import Path
from typing import Any

import numpy as np
from readme import write_between

from dpo_fast.errors import UsageError

CALIBRATION = Path(__file__).parent / "results" / "cluster-calibration.json"
BEGIN, END = "<!-- simulation -->", "<!-- end of simulation -->"
ASSUMED = "assumed"
README = "README, What is measured"
NEGLIGIBLE = 0.1  # share of what is paid for; below it, nothing but the engines is the limit


def _parameter(default: Any, unit: str, meaning: str, origin: str = ASSUMED) -> Any:
    """A field of `Parameters`: `origin` says where its default comes from."""
    return dataclass_field(default=default, metadata={"unit": unit, "meaning": meaning, "origin": origin})


@dataclass(frozen=True, slots=True)
class Parameters:
    """Everything that the simulation works with; a calibration replaces the defaults of the same name.

    Rates that are infinite, and times that are 0, are no limit.
    """

    # The work.
    tokens_per_pair: float = _parameter(
        500.0, "tokens", "that engines compute for a pair, all models together, padding included: metrics.json, "
        "provenance.computed_tokens over counts.pairs"
    )  # fmt: skip
    tokens_per_second: float = _parameter(
        700.0, "tokens/s", "of one worker's engine", f"{README}: cpu-fp32, 135M, 2 cores of an AMD EPYC, rounded"
    )
    rows_per_part: int = _parameter(1024, "pairs", "of a part: --part-size", "dpo_fast.store.PART_ROWS")
    most_blocks: int = _parameter(10_000, "blocks", "that the driver hands out; more parts share a block", "the design")
    part_spread: float = _parameter(0.02, "", "standard deviation of a part's tokens over their mean")

    # The driver.
    driver_start_seconds: float = _parameter(15.0, "s", "connecting, and all that does not grow with the data")
    fingerprint_seconds_per_pair: float = _parameter(2e-7, "s", "footers and hashes of the data set, before any work")
    seconds_per_block: float = _parameter(0.01, "s", "of the driver's loop, to hand out a block and to hear of its end")
    seconds_per_block_and_worker: float = _parameter(2e-5, "s", "the same, for each worker that it chooses among")

    # A worker.
    worker_start_seconds: float = _parameter(30.0, "s", "of an actor: process, imports, bundle, engine")
    parallel_starts: int = _parameter(64, "workers", "that start at a time")
    blocks_in_flight: int = _parameter(2, "blocks", "that a worker has at a time, a thread for each", "the design")
    prepare_seconds_per_pair: float = _parameter(
        3.5e-4, "s", "of a worker's processor: reading rows, tokenising, fingerprints, batches",
        f"{README}: 2,500 to 3,400 pairs/s, alone",
    )  # fmt: skip
    prepare_seconds_per_cached_pair: float = _parameter(
        2e-5,
        "s",
        "the same, where the tokens are in the cache",
        f"{README}: half of 24,638 pairs/s, and the free engine",
    )
    engine_seconds_per_part: float = _parameter(0.01, "s", "that the engine takes beside its tokens")
    encode_seconds_per_pair: float = _parameter(
        1e-5, "s", "of a worker's processor, to make a part's bytes", f"{README}: the rest of 24,638 pairs/s"
    )

    # The store.
    read_bytes_per_pair: float = _parameter(1500.0, "bytes", "of rows, or of cached tokens, that a worker reads")
    part_bytes_per_pair: float = _parameter(
        2500.0, "bytes", "of a part", f"{README}: 10^6 pairs of 100-token completions"
    )
    requests_per_read: float = _parameter(3.0, "requests", "to prepare a part: is it there, and two for its rows")
    requests_per_write: float = _parameter(2.0, "requests", "to write a part: its checksum and itself")
    request_seconds: float = _parameter(0.03, "s", "latency of a request")
    worker_bytes_per_second: float = _parameter(1e8, "bytes/s", "between one machine and the store")
    store_requests_per_second: float = _parameter(3500.0, "requests/s", "that the store takes from all together")
    store_bytes_per_second: float = _parameter(1e10, "bytes/s", "between the store and all together")

    # The ledger.
    progress_per_second: float = _parameter(1.0, "messages/s", "of a worker, at most", "the design")
    ledger_seconds_per_message: float = _parameter(5e-4, "s", "of the ledger's actor")

    # The merge.
    merge_parts_ahead: int = _parameter(
        8, "parts", "that are read at a time, while one is summed", "dpo_fast.store.READ_AHEAD"
    )
    merge_requests_per_part: float = _parameter(1.0, "requests", "to read a part")
    merge_seconds_per_pair: float = _parameter(
        9.8e-6,
        "s",
        "of the driver's processor: sums, metrics, intervals",
        f"{README}: 9.8 s for 10^6 pairs, reading and all",
    )
    finish_requests_per_part: float = _parameter(2.0, "requests", "to gather a part's checksum, and to remove it")
    parallel_finish_requests: int = _parameter(16, "requests", "of these at a time")
    merge_bytes_per_pair: float = _parameter(40.0, "bytes", "of memory", "dpo_fast.metrics.tally")

    # Faults.
    deaths_per_worker_hour: float = _parameter(0.0, "1/h", "workers that die")
    seconds_until_restart: float = _parameter(10.0, "s", "until a death is noticed")
    straggler_share: float = _parameter(0.0, "", "of the workers are slow")
    straggler_factor: float = _parameter(10.0, "", "so many times slower, in all but transfers")


def describe(name: str) -> Mapping[str, str]:
    """A parameter's unit, meaning and origin."""
    return next(field.metadata for field in fields(Parameters) if field.name == name)


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a simulated run took; times in seconds of wall time, which add up to `wall_seconds`.

    Attributes:
        pairs, workers, parts, blocks: of the run.
        start_seconds: from the driver's start until the mean worker's engine began.
        steady_seconds: from there until the mean worker's engine had ended.
        tail_seconds: from there until the last part was written, and its progress taken.
        merge_seconds: the rest.
        useful_seconds: of engines, for each part's tokens once at the full speed; all workers together.
        busy: shares of `steady_seconds`, at most 1, by resource: "engines" (the mean worker's), "threads" (that
            prepare, write, or have their part on the engine), "driver loop", "store requests", "store bytes", "ledger".
        deaths: of workers.
        times_written: of each part, shape (parts,).
        times_begun: of all parts; what is above `parts` was begun again.
        merge_bytes: of memory.
    """

    pairs: int
    workers: int
    parts: int
    blocks: int
    start_seconds: float
    steady_seconds: float
    tail_seconds: float
    merge_seconds: float
    useful_seconds: float
    busy: dict[str, float]
    deaths: int
    times_written: np.ndarray[tuple[int], np.dtype[np.int64]]
    times_begun: int
    merge_bytes: float

    @property
    def wall_seconds(self) -> float:
        """From the driver's start to its end."""
        return self.start_seconds + self.steady_seconds + self.tail_seconds + self.merge_seconds

    @property
    def efficiency(self) -> float:
        """The engines' useful seconds over all that are paid for."""
        return self.useful_seconds / (self.workers * self.wall_seconds)

    @property
    def losses(self) -> dict[str, float]:
        """Shares of what is paid for, by cause; with `efficiency` they add up to 1.

        "idle" is an engine's waiting while others work, "work" what engines did beside the useful: slowly, again, or
        between two parts.
        """
        working = self.busy["engines"] * self.steady_seconds
        lost = {
            "start": self.start_seconds,
            "idle": self.steady_seconds - working,
            "work": working - self.useful_seconds / self.workers,
            "tail": self.tail_seconds,
            "merge": self.merge_seconds,
        }
        return {cause: seconds / self.wall_seconds for cause, seconds in lost.items()}

    @property
    def limit(self) -> str:
        """What loses the most, if a tenth is lost at all; idle engines wait for the busiest of the other resources."""
        losses = self.losses
        if sum(losses.values()) < NEGLIGIBLE:
            return "engines"
        cause = max(losses, key=lambda name: losses[name])
        others = [name for name in self.busy if name != "engines"]
        return max(others, key=lambda name: self.busy[name]) if cause == "idle" else cause


# What would lift each limit; the page says it at more length.
REMEDIES = {
    "engines": "nothing else is; more workers, or faster ones",
    "threads": "preparing and writing: make the tokens before (they are cached), or give a worker more cores",
    "driver loop": "larger parts (--part-size), or more parts a block",
    "store requests": "larger parts (--part-size), or parts spread over several prefixes",
    "store bytes": "data and parts nearer to the workers, or a store with more bandwidth",
    "ledger": "progress less often",
    "start": "fewer workers for so little work, or workers that stay up",
    "tail": "smaller blocks or parts, or no stragglers",
    "work": "larger parts, no stragglers, fewer deaths",
    "merge": "read several parts ahead; beyond that, workers that sum their own parts: 40 bytes a pair to read",
}


# Events, in a worker's own life; a worker that died hears of none that were meant for it.
_UP, _FREE, _HANDED, _PREPARED, _SCORED, _WRITTEN, _DIED, _READ = range(8)


class _Block:
    """Parts that are handed out together.

    Attributes:
        next: the first part that is not yet written.
        end: the part after the last one.
    """

    __slots__ = ("end", "next")

    def __init__(self, first: int, end: int) -> None:
        self.next, self.end = first, end


class _Server:
    """One thing at a time, first come first served; times must not fall from call to call."""

    __slots__ = ("busy", "free")

    def __init__(self) -> None:
        self.free = 0.0
        self.busy = 0.0

    def serve(self, now: float, seconds: float) -> float:
        """When something that comes now is begun; it ends `seconds` later."""
        begun = max(now, self.free)
        self.free = begun + seconds
        self.busy += seconds
        return begun


class _Run:
    """A simulated run's state: who has what, and until when each server is busy."""

    def __init__(self, parameters: Parameters, pairs: int, workers: int, *, cached: bool, seed: int) -> None:
        self.p, self.pairs, self.workers = parameters, pairs, workers
        random = np.random.default_rng(seed)
        self.random = random
        self.parts = math.ceil(pairs / parameters.rows_per_part)
        rows = np.full(self.parts, float(parameters.rows_per_part))
        rows[-1] = pairs - (self.parts - 1) * parameters.rows_per_part
        tokens = rows * parameters.tokens_per_pair
        if parameters.part_spread > 0:
            shape = parameters.part_spread**-2
            tokens *= random.gamma(shape, 1 / shape, self.parts)
        self._cost_of_parts(rows, tokens, cached=cached)
        slow = random.permutation(workers) < round(parameters.straggler_share * workers)
        self.slowness = np.where(slow, parameters.straggler_factor, 1.0).tolist()

        size = math.ceil(self.parts / parameters.most_blocks)
        self.pending = deque(_Block(i, min(i + size, self.parts)) for i in range(0, self.parts, size))
        self.blocks = len(self.pending)
        self.waiting: deque[tuple[int, int]] = deque()  # threads without a block: worker and its life
        self.holding: list[set[_Block]] = [set() for _ in range(workers)]
        self.life = [0] * workers
        self.driver, self.store_requests, self.store_bytes = _Server(), _Server(), _Server()
        self.engines = [_Server() for _ in range(workers)]
        self.tokenizers = [_Server() for _ in range(workers)]
        self.cached = cached
        self.seconds_per_block = parameters.seconds_per_block + workers * parameters.seconds_per_block_and_worker
        self.first_engine = [math.inf] * workers
        self.last_engine = [0.0] * workers
        self.threads_busy = 0.0
        self.deaths = self.times_begun = 0
        self.times_written = np.zeros(self.parts, np.int64)
        self.events: list[tuple[float, int, int, int, int, int, _Block | None]] = []
        self.sequence = 0

    def _cost_of_parts(self, rows: np.ndarray[Any, Any], tokens: np.ndarray[Any, Any], *, cached: bool) -> None:
        """Seconds of each part, by who spends them; lists, which are read faster one by one."""
        p = self.p
        prepare = p.prepare_seconds_per_cached_pair if cached else p.prepare_seconds_per_pair
        self.prepare: list[float] = (rows * prepare).tolist()
        self.engine: list[float] = (tokens / p.tokens_per_second + p.engine_seconds_per_part).tolist()
        self.useful_seconds = float(tokens.sum() / p.tokens_per_second)
        self.encode: list[float] = (rows * p.encode_seconds_per_pair).tolist()
        read, written = rows * p.read_bytes_per_pair, rows * p.part_bytes_per_pair
        self.read: list[float] = (p.requests_per_read * p.request_seconds + read / p.worker_bytes_per_second).tolist()
        self.read_of_store: list[float] = (read / p.store_bytes_per_second).tolist()
        self.write: list[float] = (
            p.requests_per_write * p.request_seconds + written / p.worker_bytes_per_second
        ).tolist()
        self.write_of_store: list[float] = (written / p.store_bytes_per_second).tolist()
        self.read_requests = p.requests_per_read / p.store_requests_per_second
        self.write_requests = p.requests_per_write / p.store_requests_per_second

    def at(self, time: float, kind: int, worker: int, block: _Block | None = None, rank: int = 0) -> None:
        """Have something happen to a worker, should it live till then; at one time, those of lower rank come first."""
        self.sequence += 1
        heapq.heappush(self.events, (time, rank, self.sequence, kind, worker, self.life[worker], block))

    def run(self) -> float:
        """Until every part is written: when that is.

        Raises:
            ValueError: workers die faster than they finish anything.
        """
        p = self.p
        start = p.driver_start_seconds + p.fingerprint_seconds_per_pair * self.pairs
        for worker in range(self.workers):
            self.at(start + (worker // p.parallel_starts + 1) * p.worker_start_seconds, _UP, worker)
        handlers = (
            self._up,
            self._ask,
            self._handed,
            self._prepared,
            self._scored,
            self._written,
            self._died,
            self._read,
        )
        left = self.parts
        most_deaths = 20 * (self.workers + self.parts)
        while True:
            now, _, _, kind, worker, life, block = heapq.heappop(self.events)
            if life != self.life[worker]:
                continue
            handlers[kind](now, worker, block)
            if kind == _WRITTEN:
                left -= 1
                if left == 0:
                    return now
            elif self.deaths > most_deaths:
                raise ValueError("workers die faster than they finish a part")

    def _up(self, now: float, worker: int, _: _Block | None) -> None:
        """A worker is there, and each of its threads asks for a block."""
        if self.p.deaths_per_worker_hour > 0:
            self.at(now + self.random.exponential(3600 / self.p.deaths_per_worker_hour), _DIED, worker)
        for thread in range(self.p.blocks_in_flight):
            # The driver gives to who has the fewest: of workers that come at once, each has one before one has two.
            self.at(now, _FREE, worker, rank=thread)

    def _ask(self, now: float, worker: int, _: _Block | None = None) -> None:
        """A thread asks the driver for a block, or waits until there is one again."""
        if not self.pending:
            self.waiting.append((worker, self.life[worker]))
            return
        block = self.pending.popleft()
        self.holding[worker].add(block)
        self.at(self.driver.serve(now, self.seconds_per_block) + self.seconds_per_block, _HANDED, worker, block)

    def _handed(self, now: float, worker: int, block: _Block | None) -> None:
        """A thread begins the next part of its block: it reads."""
        assert block is not None
        part = block.next
        self.times_begun += 1
        self.threads_busy += self.read[part]
        read = self._transfer(now, self.read[part], self.read_requests, self.read_of_store[part])
        self.at(read, _READ, worker, block)

    def _read(self, now: float, worker: int, block: _Block | None) -> None:
        """A part is prepared: at once if its tokens were there, else when the worker's tokenizer comes to it."""
        assert block is not None
        own = self.prepare[block.next] * self.slowness[worker]
        self.threads_busy += own
        begun = now if self.cached else self.tokenizers[worker].serve(now, own)
        self.at(begun + own, _PREPARED, worker, block)

    def _prepared(self, now: float, worker: int, block: _Block | None) -> None:
        """A part waits for the engine, and goes through it."""
        assert block is not None
        seconds = self.engine[block.next] * self.slowness[worker]
        begun = self.engines[worker].serve(now, seconds)
        self.threads_busy += seconds
        self.first_engine[worker] = min(self.first_engine[worker], begun)
        self.at(begun + seconds, _SCORED, worker, block)

    def _scored(self, now: float, worker: int, block: _Block | None) -> None:
        """A part is written; the thread's own work on it goes before the transfer."""
        assert block is not None
        part = block.next
        self.last_engine[worker] = now
        own = self.encode[part] * self.slowness[worker]
        self.threads_busy += own + self.write[part]
        # The store is asked at once, lest its order be another than that of the events; `own` is milliseconds.
        written = self._transfer(now, self.write[part], self.write_requests, self.write_of_store[part]) + own
        self.at(written, _WRITTEN, worker, block)

    def _written(self, now: float, worker: int, block: _Block | None) -> None:
        """The next part of the block, or the next block."""
        assert block is not None
        self.times_written[block.next] += 1
        block.next += 1
        if block.next < block.end:
            self._handed(now, worker, block)
        else:
            self.holding[worker].remove(block)
            self._ask(now, worker)

    def _died(self, now: float, worker: int, _: _Block | None) -> None:
        """What a worker had not written is pending again, before all else; it comes back."""
        self.deaths += 1
        self.life[worker] += 1
        lost = sorted(self.holding[worker], key=lambda block: block.next)
        self.holding[worker].clear()
        engine = self.engines[worker]
        self.last_engine[worker] = max(self.last_engine[worker], min(engine.free, now))
        engine.busy -= max(0.0, engine.free - now)
        engine.free = self.tokenizers[worker].free = now
        self.pending.extendleft(reversed(lost))
        self.at(now + self.p.seconds_until_restart + self.p.worker_start_seconds, _UP, worker)
        while self.pending and self.waiting:
            other, life = self.waiting.popleft()
            if life == self.life[other]:
                self._ask(now, other)

    def _transfer(self, now: float, own: float, requests: float, of_store: float) -> float:
        """When a transfer that is asked for now has ended.

        Args:
            now: seconds.
            own: of the worker, alone: latency and bandwidth.
            requests: seconds of the store for its requests.
            of_store: seconds of the store for its bytes.
        """
        begun = max(self.store_requests.serve(now, requests), self.store_bytes.serve(now, of_store))
        return begun + max(own, requests, of_store)


def simulate(parameters: Parameters, pairs: int, workers: int, *, cached: bool = False, seed: int = 0) -> Outcome:
    """One run of `pairs` pairs by `workers` workers; see the module for what is assumed.

    Args:
        parameters: all its numbers.
        pairs: at least 1.
        workers: at least 1.
        cached: whether the tokens had been made before.
        seed: of the parts' sizes, of which workers are slow, and of deaths; the same one gives the same run.

    Raises:
        ValueError: no pairs, no workers, or workers that die faster than they finish a part.
    """
    if pairs < 1 or workers < 1:
        raise ValueError(f"{pairs} pairs and {workers} workers: at least one of each is needed")
    run = _Run(parameters, pairs, workers, cached=cached, seed=seed)
    written = run.run()
    # Workers that never had anything to do were idle from the mean first start to the mean end.
    began = [time for time in run.first_engine if time < math.inf]
    start = sum(began) / len(began)
    worked = [last for first, last in zip(run.first_engine, run.last_engine, strict=True) if first < math.inf]
    steady = max(sum(worked) / len(worked) - start, 1e-12)

    messages = run.parts + workers * parameters.progress_per_second * steady
    ledger = messages * parameters.ledger_seconds_per_message
    scored = max(written, min(began) + ledger)
    seconds = {
        "threads": run.threads_busy / (workers * parameters.blocks_in_flight),
        "driver loop": run.driver.busy,
        "store requests": run.store_requests.busy,
        "store bytes": run.store_bytes.busy,
        "ledger": ledger,
    }
    engines = sum(engine.busy for engine in run.engines) / workers
    busy = {"engines": engines / steady} | {name: min(1.0, value / steady) for name, value in seconds.items()}
    return Outcome(
        pairs=pairs,
        workers=workers,
        parts=run.parts,
        blocks=run.blocks,
        start_seconds=start,
        steady_seconds=steady,
        tail_seconds=scored - start - steady,
        merge_seconds=merge_seconds(parameters, pairs),
        useful_seconds=run.useful_seconds,
        busy=busy,
        deaths=run.deaths,
        times_written=run.times_written,
        times_begun=run.times_begun,
        merge_bytes=pairs * parameters.merge_bytes_per_pair,
    )


def merge_seconds(parameters: Parameters, pairs: int) -> float:
    """The driver's merge: parts are read while the one before is summed; then their checksums are gathered."""
    p = parameters
    parts = math.ceil(pairs / p.rows_per_part)
    rows = pairs / parts
    transfer = rows * p.part_bytes_per_pair / min(p.worker_bytes_per_second, p.store_bytes_per_second)
    read = p.merge_requests_per_part * p.request_seconds + transfer
    compute = rows * p.merge_seconds_per_pair
    slowest = max(read / p.merge_parts_ahead, transfer, compute)
    requests = max(p.request_seconds / p.parallel_finish_requests, 1 / p.store_requests_per_second)
    return read + (parts - 1) * slowest + compute + parts * p.finish_requests_per_part * requests


def origins_of_defaults() -> dict[str, str]:
    """Where each default comes from, by name."""
    return {field.name: field.metadata["origin"] for field in fields(Parameters)}


def load_calibration(path: Path) -> tuple[Parameters, dict[str, str]]:
    """Parameters with what was measured in the place of the defaults, and the origin of each of them by name.

    Args:
        path: a JSON object, whose `parameters` has for each name an object of `value`, `unit` and `how`.

    Raises:
        ValueError: it is no such file, or names a parameter or a unit that is not there.
    """
    origins = origins_of_defaults()
    try:
        found = json.loads(path.read_text(encoding="utf-8"))["parameters"]
        values = {name: (float(entry["value"]), entry["unit"], entry["how"]) for name, entry in found.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: is no calibration ({error!r}); make it with benchmarks/cluster.py") from error
    for name, (_, unit, how) in values.items():
        if name not in origins:
            raise ValueError(f"{path}: parameter {name!r} is not known; --parameters lists those that are")
        if unit != describe(name)["unit"]:
            raise ValueError(f"{path}: {name} is in {unit!r}, and must be in {describe(name)['unit']!r}")
        origins[name] = f"measured: {how}"
    return change(Parameters(), {name: value for name, (value, _, _) in values.items()}), origins


def change(parameters: Parameters, values: Mapping[str, float]) -> Parameters:
    """The parameters with other values; counts stay whole numbers.

    Raises:
        ValueError: a name is not known, or a value makes no sense.
    """
    changed: dict[str, Any] = {}
    defaults = asdict(Parameters())
    for name, value in values.items():
        if name not in defaults:
            raise ValueError(f"parameter {name!r} is not known; --parameters lists those that are")
        is_count = isinstance(defaults[name], int)
        least = 1 if is_count else 0
        if not value >= least or (is_count and value != int(value)):
            raise ValueError(
                f"{name}={value:g}: must be {'a whole number of at least 1' if is_count else 'at least 0'}"
            )
        if value == 0 and name.endswith("per_second") and name != "progress_per_second":
            raise ValueError(f"{name}={value:g}: must be above 0")
        changed[name] = int(value) if is_count else value
    return replace(parameters, **changed)


def speed_of_model(weights: float, peak_flops: float, share_of_peak: float) -> float:
    """Tokens a second where none was measured: two operations for each weight and token; attention's own left out.

    Args:
        weights: of the model, all of which a token meets: of a mixture of experts, the active ones.
        peak_flops: operations a second of the device, in the precision used, by its vendor.
        share_of_peak: that is hoped for; a guess, unless `benchmarks/roofline.py` or `benchmarks.gpu` measured it.
    """
    return share_of_peak * peak_flops / (2 * weights)


def cost(outcome: Outcome, price_per_hour: float) -> float:
    """What the workers cost, in the price's currency, from the start to the end of the merge."""
    return outcome.workers * outcome.wall_seconds / 3600 * price_per_hour


def duration(seconds: float) -> str:
    """Seconds for a person: 12.3 s, 4.5 min, 6.7 h, 8.9 d."""
    for name, size in (("d", 86_400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {name}"
    return f"{seconds:.1f} s"


def describe_outcomes(outcomes: list[Outcome], parameters: Parameters, price: float | None) -> str:
    """A Markdown table, and what would lift each limit in it."""
    rows = []
    for outcome in outcomes:
        row = {
            "pairs": f"{outcome.pairs:,}",
            "workers": str(outcome.workers),
            "wall": duration(outcome.wall_seconds),
            "efficiency": f"{outcome.efficiency:.0%}",
            **{f"lost: {cause}": f"{round(share, 4) + 0.0:.1%}" for cause, share in outcome.losses.items()},
            "driver loop": f"{outcome.busy['driver loop']:.1%}",
            "merge, GB": f"{outcome.merge_bytes / 1e9:.2g}",
        }
        if parameters.deaths_per_worker_hour:
            row |= {"deaths": str(outcome.deaths), "begun again": str(outcome.times_begun - outcome.parts)}
        if price is not None:
            whole = cost(outcome, price)
            row |= {"cost": f"{whole:,.2f}", "a million pairs": f"{whole / outcome.pairs * 1e6:,.2f}"}
        rows.append(row | {"limit": outcome.limit})
    limits = dict.fromkeys(outcome.limit for outcome in outcomes)
    return "\n".join(
        [
            f"{parameters.tokens_per_pair:g} tokens a pair, {parameters.tokens_per_second:g} tokens/s a worker"
            + (f", {price:g} an hour a worker" if price is not None else "")
            + ":\n",
            *markdown_table(rows),
            "\nlost: shares of what is paid for, the engines' useful work being the rest.",
            "idle: engines that wait while others work. work: slow, done again, or between two parts.",
            "driver loop: how busy it is while engines work.\n",
            *(f"- limit {limit}: {REMEDIES[limit]}" for limit in limits),
        ]
    )


def markdown_table(rows: list[dict[str, str]]) -> list[str]:
    """Lines of a table of rows of the same names, whose columns stand below each other."""
    widths = {name: max(len(name), *(len(row[name]) for row in rows)) for name in rows[0]}
    lines = [{name: name for name in widths}, *rows]
    head, *below = ["| " + " | ".join(row[name].rjust(width) for name, width in widths.items()) + " |" for row in lines]
    return [head, "|" + "|".join("-" * (width + 1) + ":" for width in widths.values()) + "|", *below]


def show_parameters(parameters: Parameters, origins: Mapping[str, str]) -> None:
    """Each parameter's value, unit, origin and meaning."""
    for name, value in asdict(parameters).items():
        description = describe(name)
        print(f"{name} = {value:g} {description['unit']}".rstrip())
        print(f"    {description['meaning']} [{origins[name]}]")


def as_json(outcome: Outcome, price: float | None) -> dict[str, Any]:
    """An outcome with units in the names."""
    values = asdict(outcome) | {
        "wall_seconds": outcome.wall_seconds,
        "efficiency": outcome.efficiency,
        "losses": outcome.losses,
        "limit": outcome.limit,
        "times_written": int(outcome.times_written.sum()),
    }
    return values if price is None else values | {"cost": cost(outcome, price)}


def main() -> None:
    """Simulate each number of pairs with each number of workers, and print a table, or one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--pairs", default="1e6,1e7,1e8", help="Several, with commas.")
    add("--workers", default="1,8,64,256", help="Several, with commas.")
    add("--tokens-per-pair", type=float, help="That engines compute for a pair, all models together.")
    add("--tokens-per-second", type=float, help="Of one worker's engine, measured.")
    add(
        "--parameters-of-model", type=float, help="Weights, such as 8e9, where no speed was measured; all models alike."
    )
    add("--peak-flops", type=float, help="Of the device, with --parameters-of-model.")
    add("--share-of-peak", type=float, default=0.3, help="That the engine reaches: a guess (default 0.3).")
    add("--price-per-hour", type=float, help="Of one worker, in any currency.")
    add("--cached-tokens", action="store_true", help="The tokens had been made before.")
    add(
        "--calibration",
        type=Path,
        help=f"By default {CALIBRATION.relative_to(Path(__file__).parents[1])}, if it is there.",
    )
    add(
        "--set",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="Another value of a parameter; may be repeated.",
    )
    add("--seed", type=int, default=0)
    add("--parameters", action="store_true", help="List the parameters, and end.")
    add(
        "--write",
        type=Path,
        metavar="FILE",
        help=f"Put the table between {BEGIN} and {END}, such as of docs/cluster.md.",
    )
    add("--json", action="store_true", help="Print one JSON line instead of a table.")
    arguments = parser.parse_args()
    try:
        run(arguments)
    except (ValueError, UsageError) as error:
        sys.exit(f"cluster_simulation: {error}")


def run(arguments: argparse.Namespace) -> None:
    """What was asked for.

    Raises:
        ValueError: something asked for makes no sense.
    """
    path = arguments.calibration or (CALIBRATION if CALIBRATION.exists() else None)
    parameters, origins = load_calibration(path) if path else (Parameters(), origins_of_defaults())
    given = {}
    for setting in arguments.set:
        name, equals, value = setting.partition("=")
        if not equals:
            raise ValueError(f"--set {setting}: must be NAME=VALUE")
        given[name] = float(value)
    if arguments.parameters_of_model is not None:
        if arguments.peak_flops is None or arguments.tokens_per_second is not None:
            raise ValueError("--parameters-of-model goes with --peak-flops, and without --tokens-per-second")
        speed = speed_of_model(arguments.parameters_of_model, arguments.peak_flops, arguments.share_of_peak)
        given["tokens_per_second"] = speed
    for name in ("tokens_per_pair", "tokens_per_second"):
        if getattr(arguments, name) is not None:
            given[name] = getattr(arguments, name)
    parameters = change(parameters, given)
    origins |= dict.fromkeys(given, "given")
    if arguments.parameters_of_model is not None:
        origins["tokens_per_second"] = f"assumed: {arguments.share_of_peak:.0%} of {arguments.peak_flops:g} FLOP/s"
    if arguments.parameters:
        show_parameters(parameters, origins)
        return
    pairs, workers = ([_count(text) for text in each.split(",")] for each in (arguments.pairs, arguments.workers))
    outcomes = [
        simulate(parameters, size, number, cached=arguments.cached_tokens, seed=arguments.seed)
        for size in pairs
        for number in workers
    ]
    if arguments.json:
        results = [as_json(outcome, arguments.price_per_hour) for outcome in outcomes]
        print(json.dumps({"parameters": asdict(parameters), "origins": origins, "results": results}))
        return
    text = describe_outcomes(outcomes, parameters, arguments.price_per_hour)
    if path is None:
        text += "\n\nNothing is calibrated here: README's measurements and assumptions; `--parameters` lists which."
    if arguments.write is None:
        print(text)
    else:
        write_between(arguments.write, BEGIN, END, text)


def _count(text: str) -> int:
    """A number of pairs or workers: 1000000, or 1e6."""
    value = float(text)
    if value < 1 or value != int(value):
        raise ValueError(f"{text}: must be a whole number of at least 1")
    return int(value)


if __name__ == "__main__":
    main()
