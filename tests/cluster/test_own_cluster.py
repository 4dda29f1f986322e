"""A connection that is there, clusters that are started, object storage, a real engine, Ctrl-C, and wrong arguments."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_engines import ROWS, write_rows
from s3_server import S3Server
from signals import send

import dpo_fast.cli
from dpo_fast.cluster.options import ClusterOptions
from dpo_fast.errors import CheckFailedError, DatasetError, InputError, InterruptedRunError, UsageError
from dpo_fast.evaluate import EvaluateOptions, evaluate
from dpo_fast.plan import plan
from dpo_fast.run_folder import open_scores

from .compare import files, numbers
from .engines import BadPart, SlowEngines, dies, open_fake, open_policy_alone
from .nodes import Nodes

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("known_tokens")]
OPTIONS = EvaluateOptions(part_size=8, on_error="skip")
CLUSTER = replace(OPTIONS, cluster=ClusterOptions("local", workers=2))


@pytest.fixture(scope="module", autouse=True)
def session(nodes: Nodes, object_store: S3Server) -> Iterator[None]:
    """A connection that the process has already, as a notebook may; it is used, and left as it is."""
    import ray

    nodes.restore(3)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in object_store.environment.items():
            patch.setenv(name, value)
        ray.init(address=nodes.address, log_to_driver=False, configure_logging=False)
        yield
        assert ray.is_initialized()
        ray.shutdown()


def test_parts_in_an_object_store(
    object_store: S3Server, bundle: Path, dataset: str, local: Path, tmp_path: Path
) -> None:
    """A store that fails now and then, at a random tenth of all requests for parts, at three draws of these."""
    for seed in range(3):
        chance = random.Random(seed)
        run, url = tmp_path / f"run{seed}", f"{object_store.make_bucket()}/run"
        object_store.fault = lambda method, path, chance=chance: (
            503 if "part-" in path and chance.random() < 0.1 else None
        )
        try:
            evaluate(bundle, dataset, run, replace(CLUSTER, scores=url), engine=open_fake)
        finally:
            object_store.fault = lambda method, path: None

        assert numbers(run) == numbers(local)
        assert (run / "scores.url").read_text() == f"{url}\n"
        storage = open_scores(run).storage
        there = {name: storage.read(name) for name in storage.names()}
        assert there == {path.name: path.read_bytes() for path in (local / "scores").iterdir()}


def test_what_one_process_began_workers_finish(bundle: Path, dataset: str, local: Path, tmp_path: Path) -> None:
    parts = sorted((local / "scores").glob("part-*.parquet"))
    run = tmp_path / "run"
    with pytest.raises(InterruptedRunError):
        evaluate(bundle, dataset, run, OPTIONS, engine=lambda bundle, role: _Stops(role))
    begun = len(list((run / "scores").glob("part-*.parquet")))

    metrics = evaluate(bundle, dataset, run, CLUSTER, engine=open_fake)

    assert 0 < begun < len(parts)
    assert files(run) == files(local)
    assert numbers(run) == numbers(local)
    assert metrics["provenance"]["this_process"]["scored_pairs"] < 188 - (begun - 1) * 8


class _Stops:
    """An engine that is stopped as it scores the tenth batch."""

    def __init__(self, role: str) -> None:
        self.engine = open_fake(None, role)  # type: ignore[arg-type]
        self.name, self.precision = self.engine.name, self.engine.precision

    def score(self, batch: Any) -> Any:
        if len(self.engine.batches) == 10:
            send(signal.SIGINT)
        return self.engine.score(batch)


def test_ctrl_c_says_how_to_go_on(bundle: Path, dataset: str, local: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    (tmp_path / "orders").mkdir()

    with pytest.raises(InterruptedRunError, match=r"SIGINT: stopped with .* pairs scored.*run the same command again"):
        evaluate(
            bundle, dataset, run, CLUSTER, lambda line: send(signal.SIGINT), engine=SlowEngines(tmp_path / "orders")
        )

    assert not (run / "metrics.json").exists()
    evaluate(bundle, dataset, run, CLUSTER, engine=open_fake)
    assert files(run) == files(local)


def test_a_real_engine_through_the_command_line(
    tiny_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pairs = write_rows(tmp_path / "pairs.jsonl", ROWS)
    common = ["evaluate", str(tiny_bundle), "--dataset", pairs, "--part-size", "2", "--threads", "1"]
    assert dpo_fast.cli.run([*common, "--output", str(tmp_path / "one")]) == 0
    capsys.readouterr()

    cluster = ["--cluster", "local", "--workers", "2"]
    assert dpo_fast.cli.run([*common, "--output", str(tmp_path / "run"), *cluster]) == 0

    said = capsys.readouterr()
    assert "workers, " in said.out
    assert "3 parts for 2 workers (CPU 1 each) on 3 nodes; Ray's dashboard" in said.err
    assert files(tmp_path / "run") == files(tmp_path / "one")
    assert numbers(tmp_path / "run") == numbers(tmp_path / "one")
    assert dpo_fast.cli.run([*common, "--output", str(tmp_path / "planned"), *cluster, "--dry-run", "--json"]) == 0
    planned = json.loads(capsys.readouterr().out)
    assert (planned["rows"], planned["parts"], planned["parts_there"]) == (5, 3, 0)
    assert planned["workers"] == [2]
    assert planned["resources_per_worker"] == {"CPU": 1}
    assert planned["tokens_per_second"] > 0
    assert planned["memory_bytes"] > 2**20
    assert not (tmp_path / "planned").exists()
    assert dpo_fast.cli.run([*common, "--output", str(tmp_path / "one"), "--dry-run"]) == 0
    assert "3, 3 of them there already" in capsys.readouterr().out


def test_the_plan_counts_what_is_computed(bundle: Path, dataset: str, local: Path, tmp_path: Path) -> None:
    """Of rows that are all alike, the first part says exactly what all of them come to."""
    rows = [{"prompt": "What is it?", "chosen": f" It {i:03}.", "rejected": f" No {i:03}."} for i in range(64)]
    alike = write_rows(tmp_path / "alike.jsonl", rows)
    planned = plan(bundle, alike, tmp_path / "run", OPTIONS, engine=open_fake)
    metrics = evaluate(bundle, alike, tmp_path / "run", OPTIONS, engine=open_fake)

    provenance = metrics["provenance"]
    assert planned.tokens == provenance["computed_tokens"] - provenance["padding_tokens"]
    assert planned.token_budget == provenance["token_budget"]
    assert plan(bundle, alike, tmp_path / "run", OPTIONS, engine=open_fake).tokens == 0


def test_a_row_that_cannot_be_used_stops_the_run_as_in_one_process(bundle: Path, dataset: str, tmp_path: Path) -> None:
    said = []
    for number, options in enumerate((OPTIONS, CLUSTER)):
        with pytest.raises(InputError) as caught:
            evaluate(bundle, dataset, tmp_path / str(number), replace(options, on_error="stop"), engine=open_fake)
        said.append((str(caught.value), caught.value.exit_code))
        assert not (tmp_path / str(number) / "metrics.json").exists()
    assert said[0] == said[1]
    assert said[0][1] == 2


def test_a_set_without_a_usable_row_is_refused_as_in_one_process(bundle: Path, tmp_path: Path) -> None:
    empty = write_rows(tmp_path / "empty.jsonl", [{**row, "chosen": ""} for row in ROWS])
    said = []
    for number, options in enumerate((OPTIONS, CLUSTER)):
        with pytest.raises(DatasetError, match=r"none of 5 rows can be used; row 1: 'chosen' is empty") as caught:
            evaluate(bundle, empty, tmp_path / str(number), options, engine=open_fake)
        said.append(str(caught.value))
        assert not (tmp_path / str(number)).exists()
    assert said[0] == said[1]


@pytest.mark.parametrize("engines", ["together", "apart"])
def test_scores_that_are_known_need_no_engine(
    bundle: Path, dataset: str, local: Path, tmp_path: Path, engines: Any
) -> None:
    options = replace(CLUSTER, reference_scores=local, engines=engines)
    metrics = evaluate(bundle, dataset, tmp_path / "run", options, engine=open_policy_alone)

    assert files(tmp_path / "run") == files(local)
    assert metrics["provenance"]["this_process"]["pairs_with_known_reference_scores"] == 188
    planned = plan(bundle, dataset, tmp_path / "planned", options, engine=open_policy_alone)
    both = plan(bundle, dataset, tmp_path / "planned", OPTIONS, engine=open_fake)
    assert planned.tokens * 2 == pytest.approx(both.tokens, abs=1)  # of two halves, each rounded


def test_a_process_that_is_lost_as_it_is_measured(bundle: Path, dataset: str, tmp_path: Path) -> None:
    with pytest.raises(CheckFailedError, match=r"a process that the run cannot do without was lost .*is there "):
        plan(bundle, dataset, tmp_path / "run", CLUSTER, engine=dies)
    assert not (tmp_path / "run").exists()


def test_more_than_there_is_room_for(bundle: Path, dataset: str, local: Path, tmp_path: Path) -> None:
    """And it does not cost the run that would have been overwritten."""
    options = replace(OPTIONS, cluster=ClusterOptions("local", resources={"GPU": 1}))
    with pytest.raises(UsageError, match=r"no node has what a worker takes \(CPU 1, GPU 1\): there is "):
        evaluate(bundle, dataset, tmp_path / "run", options, engine=open_fake)
    assert not (tmp_path / "run").exists()
    shutil.copytree(local, tmp_path / "old")
    with pytest.raises(UsageError, match="no node has what a worker takes"):
        evaluate(bundle, dataset, tmp_path / "old", replace(options, overwrite=True), engine=open_fake)
    assert files(tmp_path / "old") == files(local)
    assert (tmp_path / "old" / "metrics.json").exists()


def test_a_finished_run_is_gone_through_again_and_nothing_is_computed(
    bundle: Path, dataset: str, local: Path, tmp_path: Path
) -> None:
    shutil.copytree(local, tmp_path / "run")
    # An engine that would fail at any token is never asked.
    metrics = evaluate(bundle, dataset, tmp_path / "run", CLUSTER, engine=BadPart(-1, dies=True))

    assert metrics["provenance"]["this_process"]["computed_tokens"] == 0
    assert files(tmp_path / "run") == files(local)
    assert numbers(tmp_path / "run") == numbers(local)


def test_a_cluster_that_is_started_for_a_run(tiny_bundle: Path, tmp_path: Path) -> None:
    """In a process of its own: nothing of Ray's is on the screen, and no process is left."""
    pairs = write_rows(tmp_path / "pairs.jsonl", ROWS)
    command = [sys.executable, "-m", "dpo_fast", "evaluate", str(tiny_bundle), "--dataset", pairs, "--output"]

    done = subprocess.run(
        [*command, str(tmp_path / "run"), "--cluster", "local", "--workers", "1", "--json"],
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip

    assert done.returncode == 0, done.stderr
    metrics = json.loads(done.stdout)
    assert np.isfinite(metrics["eval_loss"])
    [line] = done.stderr.splitlines()
    assert line.startswith("1 part for 1 worker (CPU ")


def test_ctrl_c_ends_the_connection(bundle: Path, dataset: str, local: Path, tmp_path: Path) -> None:
    """In a process of its own: nothing is left there that asks Ray as the connection ends, which ends the process.

    Nor does it connect to another cluster, or disturb the next run. In that, a worker dies, of which Ray would tell on
    standard output.
    """
    (tmp_path / "orders").mkdir()
    code = (
        "import os, ray, signal, sys, threading, time\n"
        "from pathlib import Path\n"
        "from cluster.engines import SlowEngines\n"
        "from dpo_fast.cluster.options import ClusterOptions\n"
        "from dpo_fast.errors import InterruptedRunError\n"
        "from dpo_fast.evaluate import EvaluateOptions, evaluate\n"
        "bundle, dataset, output, orders = sys.argv[1:]\n"
        "options = EvaluateOptions(part_size=8, on_error='skip', cluster=ClusterOptions('local', workers=1))\n"
        "stop = lambda line: os.kill(os.getpid(), signal.SIGINT)\n"
        "left = lambda: [thread.name for thread in threading.enumerate() if thread.name.startswith(('Str', 'coll'))]\n"
        "end = ray.shutdown\n"
        "ray.shutdown = lambda: (print(left()), end())\n"
        "try:\n"
        "    evaluate(Path(bundle), dataset, Path(output), options, stop, engine=SlowEngines(Path(orders)))\n"
        "except InterruptedRunError as error:\n"
        "    print(error)\n"
        "time.sleep(3)\n"  # a second is enough for those threads to look again
        "print(ray.is_initialized())\n"
        "(Path(orders) / 'die.json').write_text('{\"do\": \"die\"}')\n"
        "evaluate(Path(bundle), dataset, Path(output), options, engine=SlowEngines(Path(orders)))\n"
    )
    places = [bundle, dataset, tmp_path / "run", tmp_path / "orders"]

    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, places)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[1]), *sys.path])},
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip

    assert (done.returncode, done.stderr) == (0, "")
    left, said, is_connected, left_by_another = done.stdout.splitlines()
    assert (left, left_by_another) == ("[]", "[]")
    assert said.startswith("SIGINT: stopped with ")
    assert is_connected == "False"
    assert not (tmp_path / "orders" / "die.json").exists()
    assert files(tmp_path / "run") == files(local)


@pytest.mark.parametrize("address", ["127.0.0.1:1", "ray://127.0.0.1:1"])
def test_no_cluster_answers(tiny_bundle: Path, tmp_path: Path, address: str) -> None:
    """In a process of its own, which has no Ray yet."""
    pairs = write_rows(tmp_path / "pairs.jsonl", ROWS)
    command = [sys.executable, "-m", "dpo_fast", "evaluate", str(tiny_bundle), "--dataset", pairs, "--output"]

    done = subprocess.run(
        [*command, str(tmp_path / "run"), "--cluster", address],
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip

    assert done.returncode == 2
    [line] = done.stderr.splitlines()
    assert f"--cluster {address}: no Ray cluster answers ([Errno 111] Connection refused)" in line
    assert "ray start --head" in line
    assert not (tmp_path / "run").exists()
