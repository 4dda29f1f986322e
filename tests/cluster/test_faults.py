"""Whatever is killed, lost, silent or slow at whatever moment: nothing is missing in the end, nothing is there twice.

What was computed is compared with the run of one process, byte for byte.
"""

import json
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from threading import Thread
from typing import Any

import pytest

from dpo_fast.cluster.options import ClusterOptions
from dpo_fast.errors import CheckFailedError, PartsFailedError
from dpo_fast.evaluate import EvaluateOptions, evaluate

from .compare import files, numbers
from .conftest import RARE
from .engines import BadPart, SlowEngines
from .nodes import Nodes

pytestmark = pytest.mark.slow
PATIENCE, LITTLE_PATIENCE = 120.0, 30.0  # seconds; a batch takes 0.02, but a busy machine takes many to load


class Run:
    """A run on the cluster, to which something happens at a random moment."""

    def __init__(self, nodes: Nodes, bundle: Path, dataset: str, folder: Path) -> None:
        self.nodes, self.bundle, self.dataset, self.folder = nodes, bundle, dataset, folder
        self.orders = folder / "orders"
        self.orders.mkdir()
        self.output = folder / "run"
        self.said: list[str] = []
        cluster = ClusterOptions(nodes.address, workers=3, resources={"CPU": 1}, patience=PATIENCE)
        self.options = EvaluateOptions(part_size=8, on_error="skip", cluster=cluster)

    def order(self, what: str) -> None:
        """Let the next worker that scores a batch do something."""
        path = self.orders / f"{what}.json"
        path.with_suffix(".new").write_text(json.dumps({"do": what}))
        path.with_suffix(".new").rename(path)

    def evaluate(self) -> dict[str, Any]:
        return evaluate(
            self.bundle, self.dataset, self.output, self.options, self.said.append, engine=SlowEngines(self.orders)
        )

    def when_it_works(self, seconds: float, do: Callable[[], None]) -> Thread:
        """Do something some seconds after the first part is there."""

        def wait() -> None:
            while not list(self.output.glob("scores/part-*.parquet")):
                time.sleep(0.02)
            time.sleep(seconds)
            do()

        thread = Thread(target=wait, daemon=True)
        thread.start()
        return thread


@pytest.fixture
def run(nodes: Nodes, bundle: Path, dataset: str, tmp_path: Path) -> Iterator[Run]:
    nodes.restore(3)
    yield Run(nodes, bundle, dataset, tmp_path)
    nodes.restore(3)


def kill_a_worker(run: Run, chance: random.Random) -> None:
    for process in chance.sample(run.nodes.scoring(), 1):
        process.kill()


def stop_a_worker(run: Run, chance: random.Random) -> None:
    """All of its threads stand still, as in a driver's call that never returns."""
    for process in chance.sample(run.nodes.scoring(), 1):
        process.send_signal(signal.SIGSTOP)


def hang(run: Run, chance: random.Random) -> None:
    run.order("hang")


def slow_down(run: Run, chance: random.Random) -> None:
    run.order("slow")


def lose_a_node(run: Run, chance: random.Random) -> None:
    run.nodes.lose(chance.randrange(3))


@pytest.mark.parametrize(
    ("fault", "seed"),
    [(kill_a_worker, seed) for seed in range(4)]
    + [(stop_a_worker, seed) for seed in range(2)]
    + [(hang, seed) for seed in range(2)]
    + [(slow_down, seed) for seed in range(2)]
    + [(lose_a_node, seed) for seed in range(4)],
)
def test_at_a_random_moment(run: Run, local: Path, fault: Callable[[Run, random.Random], None], seed: int) -> None:
    chance = random.Random(f"{fault.__name__} {seed}")
    if fault in (stop_a_worker, hang):
        run.options = replace(run.options, cluster=replace(run.options.cluster, patience=LITTLE_PATIENCE))
    happens = run.when_it_works(chance.uniform(0, 0.8), lambda: fault(run, chance))

    run.evaluate()

    happens.join()
    assert files(run.output) == files(local)
    assert numbers(run.output) == numbers(local)


@pytest.mark.parametrize("seed", range(3))
def test_the_driver_is_killed(run: Run, local: Path, seed: int) -> None:
    """Another start goes on with the parts that are there."""
    chance = random.Random(seed)
    code = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "from pathlib import Path\n"
        "from cluster.engines import SlowEngines\n"
        "from dpo_fast.cluster.options import ClusterOptions\n"
        "from dpo_fast.evaluate import EvaluateOptions, evaluate\n"
        "bundle, dataset, output, orders, address = sys.argv[2:]\n"
        "cluster = ClusterOptions(address, workers=3, resources={'CPU': 1})\n"
        "options = EvaluateOptions(part_size=8, on_error='skip', cluster=cluster)\n"
        "evaluate(Path(bundle), dataset, Path(output), options, engine=SlowEngines(Path(orders)))\n"
    )
    places = [run.bundle, run.dataset, run.output, run.orders, run.nodes.address]
    driver = subprocess.Popen([sys.executable, "-c", code, str(Path(__file__).parents[1]), *map(str, places)])
    run.when_it_works(chance.uniform(0, 0.5), driver.kill).join()
    assert driver.wait() == -signal.SIGKILL
    there = len(list(run.output.glob("scores/part-*.parquet")))
    assert not (run.output / "metrics.json").exists()

    metrics = run.evaluate()

    assert files(run.output) == files(local)
    assert numbers(run.output) == numbers(local)
    assert 0 < there < 24
    # Workers of the killed driver may have written some more before they were gone.
    assert metrics["provenance"]["this_process"]["scored_pairs"] <= 188 - (there - 1) * 8


@pytest.mark.parametrize("dies", [False, True], ids=["NaN", "its process ends"])
def test_a_part_that_always_fails(run: Run, bundle: Path, local: Path, dies: bool) -> None:
    """All other parts are done; when the cause is mended, the same command does the rest."""
    token = token_of(bundle, RARE)
    run.options = replace(run.options, cluster=replace(run.options.cluster, attempts=2))

    with pytest.raises(PartsFailedError, match=r"1 of 24 parts failed each time \(part 23, rows 185 to 190: "):
        evaluate(run.bundle, run.dataset, run.output, run.options, run.said.append, engine=BadPart(token, dies=dies))

    assert len(list(run.output.glob("scores/part-*.parquet"))) == 23
    [failed] = [json.loads(line) for line in (run.output / "failed.jsonl").read_text().splitlines()]
    assert (failed["part"], failed["rows"]) == (23, [185, 190])
    assert failed["reason"].startswith(
        "its worker died or hung 2 times" if dies else "row 189: the engine returned log_p"
    )
    assert not (run.output / "metrics.json").exists()
    run.evaluate()
    assert files(run.output) == files(local)
    assert not (run.output / "failed.jsonl").exists()


def test_nothing_works(run: Run, bundle: Path) -> None:
    with pytest.raises(CheckFailedError, match=r"the first \d+ parts all failed: "):
        evaluate(run.bundle, run.dataset, run.output, run.options, engine=BadPart(token_of(bundle, "?"), dies=False))


def token_of(bundle: Path, text: str) -> int:
    """The last token of a text."""
    from transformers import AutoTokenizer

    tokens: list[int] = AutoTokenizer.from_pretrained(bundle / "policy")(text, add_special_tokens=False)["input_ids"]
    return tokens[-1]
