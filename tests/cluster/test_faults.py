"""Whatever is killed, lost, silent or slow at whatever moment: nothing is missing in the end, nothing is there twice.

What was computed is compared with the run of one process, byte for byte.
"""

import json
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from threading import Thread
from typing import Any

import pytest

from dpo_fast.cluster.options import ClusterOptions
from dpo_fast.errors import CheckFailedError, PartsFailedError
from dpo_fast.evaluate import EvaluateOptions, evaluate

from .compare import files, numbers
from .conftest import RARE
from .engines import BadPart, NotOnThatNode, SlowEngines
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

    def when(self, parts: int, seconds: float, do: Callable[[], None]) -> Thread:
        """Do something some seconds after so many parts are there."""

        def wait() -> None:
            while len(list(self.output.glob("scores/part-*.parquet"))) < parts:
                time.sleep(0.02)
            time.sleep(seconds)
            do()

        thread = Thread(target=wait, daemon=True)
        thread.start()
        return thread


def assert_first_parts(run: Run, local: Path, parts: int) -> None:
    """So many parts are those of the run of one process."""
    for part in range(parts):
        name = f"scores/part-{part:05}.parquet"
        assert (run.output / name).read_bytes() == (local / name).read_bytes()


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
    "faults",
    [
        (kill_a_worker, lose_a_node, kill_a_worker),
        (lose_a_node, kill_a_worker, slow_down),
        (hang, stop_a_worker, kill_a_worker),
        (stop_a_worker, lose_a_node, hang),
        (slow_down, kill_a_worker, lose_a_node),
    ],
    ids=lambda faults: " and ".join(fault.__name__ for fault in faults),
)
def test_at_random_moments(run: Run, local: Path, faults: Sequence[Callable[[Run, random.Random], None]]) -> None:
    """Several faults in one run, the next maybe while the last is being mended."""
    chance = random.Random(" ".join(fault.__name__ for fault in faults))
    if not {stop_a_worker, hang}.isdisjoint(faults):
        run.options = replace(run.options, cluster=replace(run.options.cluster, patience=LITTLE_PATIENCE))
    happen = [
        run.when(parts, chance.uniform(0, 0.3), partial(fault, run, chance))
        for parts, fault in zip(sorted(chance.sample(range(1, 16), len(faults))), faults, strict=True)
    ]

    run.evaluate()

    for fault in happen:
        fault.join()
    assert not list(run.orders.glob("*.json"))  # a worker has taken each
    assert files(run.output) == files(local)
    assert numbers(run.output) == numbers(local)


@pytest.mark.usefixtures("known_tokens")
def test_one_worker_cannot_load_its_engine(run: Run, local: Path) -> None:
    """Failing at once, it would be given most of the parts."""
    evaluate(run.bundle, run.dataset, run.output, run.options, run.said.append, engine=NotOnThatNode(run.orders))

    assert [line.partition(" on ")[0] for line in run.said[1:]] == ["a worker holds back"]
    assert run.said[1].endswith(": cannot load its engine: RuntimeError: out of memory")
    assert files(run.output) == files(local)
    assert numbers(run.output) == numbers(local)


@pytest.mark.usefixtures("known_tokens")
@pytest.mark.parametrize("failures", [None, 3], ids=["it goes on", "its process ends, and starts again"])
def test_one_worker_fails_at_all_it_is_given(run: Run, local: Path, failures: int | None) -> None:
    """Failing at once, it would be given most of the parts; and some of them in each of the passes that follow.

    Where it starts again, two parts wait for it: holding back, it would keep the pass from ending.
    """
    engines = NotOnThatNode(run.orders, opens=True, failures=failures)
    evaluate(run.bundle, run.dataset, run.output, run.options, run.said.append, engine=engines)

    assert any("fails at one part after another" in line and line.endswith(": device lost") for line in run.said)
    [again] = [int(line.rpartition(" ")[2]) for line in run.said if "handed out again" in line]
    assert again <= 12  # of 24
    assert files(run.output) == files(local)
    assert numbers(run.output) == numbers(local)


@pytest.mark.usefixtures("known_tokens")
def test_one_worker_dies_at_all_it_is_given(run: Run, local: Path) -> None:
    """Ray gives it the same parts again, until it seems to be their fault, though sound workers could do them."""
    run.options = replace(run.options, limit=64)
    engines = NotOnThatNode(run.orders, opens=True, failures=0, seconds=0.3)

    evaluate(run.bundle, run.dataset, run.output, run.options, run.said.append, engine=engines)

    assert_first_parts(run, local, 8)


def test_a_part_may_take_as_long_as_it_takes(run: Run, local: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray Data ends what has moved no part for half an hour; where parts take longer, each start would end so."""
    import ray.data

    monkeypatch.setattr(ray.data.DataContext.get_current(), "execution_no_progress_timeout_s", 0.5)
    run.options = replace(run.options, limit=24)

    evaluate(
        run.bundle, run.dataset, run.output, run.options, run.said.append, engine=SlowEngines(run.orders, seconds=1.0)
    )

    assert_first_parts(run, local, 3)


def test_the_driver_is_killed_twice(run: Run, local: Path) -> None:
    """Another start goes on with the parts that are there."""
    chance = random.Random(0)
    code = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "from pathlib import Path\n"
        "from cluster.engines import SlowEngines\n"
        "from dpo_fast.cluster.options import ClusterOptions\n"
        "from dpo_fast.evaluate import EvaluateOptions, evaluate\n"
        "bundle, dataset, output, orders, address = sys.argv[2:]\n"
        "cluster = ClusterOptions(address, workers=3, resources={'CPU': 1})\n"
        "options = EvaluateOptions(part_size=8, on_error='skip', cluster=cluster)\n"
        "evaluate(Path(bundle), dataset, Path(output), options, engine=SlowEngines(Path(orders), 0.1))\n"
    )
    places = [run.bundle, run.dataset, run.output, run.orders, run.nodes.address]
    there = 0
    for _ in range(2):
        driver = subprocess.Popen([sys.executable, "-c", code, str(Path(__file__).parents[1]), *map(str, places)])
        run.when(there + 1, chance.uniform(0, 0.2), driver.kill).join()
        assert driver.wait() == -signal.SIGKILL
        while run.nodes.scoring():  # they end by and by, and may write another part
            time.sleep(0.1)
        before, there = there, len(list(run.output.glob("scores/part-*.parquet")))
        assert before < there < 24
    assert not (run.output / "metrics.json").exists()

    metrics = run.evaluate()

    assert files(run.output) == files(local)
    assert numbers(run.output) == numbers(local)
    assert metrics["provenance"]["this_process"]["scored_pairs"] <= 188 - (there - 1) * 8


@pytest.mark.usefixtures("known_tokens")
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


@pytest.mark.usefixtures("known_tokens")
def test_nothing_works(run: Run, bundle: Path) -> None:
    with pytest.raises(CheckFailedError, match=r"the first \d+ parts all failed: "):
        evaluate(run.bundle, run.dataset, run.output, run.options, engine=BadPart(token_of(bundle, "?"), dies=False))


def token_of(bundle: Path, text: str) -> int:
    """The last token of a text."""
    from transformers import AutoTokenizer

    tokens: list[int] = AutoTokenizer.from_pretrained(bundle / "policy")(text, add_special_tokens=False)["input_ids"]
    return tokens[-1]
