"""What is said of a cluster, and how many workers it has room for."""

import sys
from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dpo_fast.cluster.connection import Node, connected
from dpo_fast.cluster.options import ClusterOptions, check_cluster_options, parse_address, parse_resources
from dpo_fast.cluster.room import count_workers, engine_threads, room_for, worker_resources
from dpo_fast.errors import MissingDependencyError, UsageError


@pytest.mark.parametrize(
    ("said", "address"),
    [
        ("ray", "any"), ("local", "local"), ("auto", "auto"), ("ray://local", "local"), ("ray://auto", "auto"),
        ("ray://head.example:10001", "ray://head.example:10001"), ("192.0.2.1:6379", "192.0.2.1:6379"),
        ("[::1]:6379", "[::1]:6379"),
    ],
)  # fmt: skip
def test_an_address(said: str, address: str) -> None:
    assert parse_address(said) == address


@pytest.mark.parametrize("said", ["", "slurm", "ray://", "ray://host", "http://host:1", "host:", "a b:1", "host:1/x"])
def test_no_address(said: str) -> None:
    with pytest.raises(UsageError, match="--cluster"):
        parse_address(said)


@given(st.text() | st.binary().map(lambda content: content.decode("latin-1")))
def test_any_resources(said: str) -> None:
    with suppress(UsageError):
        assert all(amount >= 0 for amount in parse_resources(said).values())


@pytest.mark.parametrize(
    "said", ['{"GPU": -1}', '{"GPU": NaN}', '{"GPU": true}', '{"": 1}', "[1]", "1", '{"GPU": "many"}', '{"CPU": 1e999}']
)
def test_no_resources(said: str) -> None:
    with pytest.raises(UsageError, match="--resources-per-worker"):
        parse_resources(said)


@pytest.mark.parametrize(
    ("options", "name"),
    [
        (ClusterOptions(workers=0), "--workers"),
        (ClusterOptions(patience=0), "--worker-timeout"),
        (ClusterOptions(attempts=0), "--attempts"),
    ],
)
def test_amounts_of_no_use(options: ClusterOptions, name: str) -> None:
    with pytest.raises(UsageError, match=name):
        check_cluster_options(options)


def test_ray_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(MissingDependencyError, match=r"dpo-fast\[ray\]"), connected("local"):
        pass


def cluster(*nodes: dict[str, float]) -> list[Node]:
    return [Node(str(number), f"host{number}", amounts) for number, amounts in enumerate(nodes)]


CPUS = cluster({}, {"CPU": 8}, {"CPU": 16})
GPUS = cluster({"CPU": 8, "GPU": 8}, {"CPU": 8, "GPU": 4})


@pytest.mark.parametrize(
    ("options", "engine", "nodes", "resources", "workers"),
    [
        (ClusterOptions(), "onnxruntime", CPUS, {"CPU": 8}, 3),  # a worker has the cores that the smallest node has
        (ClusterOptions(workers=4), "onnxruntime", CPUS, {"CPU": 4}, 4),
        (ClusterOptions(workers=100), "onnxruntime", CPUS, {"CPU": 1}, 24),  # no more than there is room for
        (ClusterOptions(), "tensorrt", GPUS, {"GPU": 1, "CPU": 1}, 12),
        (ClusterOptions(workers=2), "onnxruntime-cuda", GPUS, {"GPU": 1, "CPU": 1}, 2),
        (ClusterOptions(resources={"GPU": 2}), "onnxruntime-cuda", GPUS, {"GPU": 2, "CPU": 1}, 6),
        (ClusterOptions(resources={"GPU": 0.5, "CPU": 2}), "onnxruntime-cuda", GPUS, {"GPU": 0.5, "CPU": 2}, 8),
    ],
)
def test_room(
    options: ClusterOptions, engine: str, nodes: list[Node], resources: dict[str, float], workers: int
) -> None:
    found = worker_resources(options, engine, nodes)
    assert found == resources
    assert count_workers(options, found, nodes, parts=1000) == workers
    assert count_workers(options, found, nodes, parts=1) == 1


@pytest.mark.parametrize(
    ("resources", "threads"),
    [({"CPU": 8}, 8), ({"CPU": 0.5}, 1), ({"CPU": 1.5}, 1), ({"GPU": 1, "CPU": 4}, 0), ({"memory": 2**30}, 0)],
)
def test_a_worker_s_engine_takes_the_cores_of_the_worker(resources: dict[str, float], threads: int) -> None:
    assert engine_threads(resources) == threads


def test_no_room() -> None:
    with pytest.raises(UsageError, match=r"no node has what a worker takes \(GPU 1, CPU 1\): there is CPU 16; CPU 8"):
        count_workers(ClusterOptions(), {"GPU": 1, "CPU": 1}, CPUS[1:], parts=3)
    with pytest.raises(UsageError, match="takes nothing"):
        room_for({"CPU": 0}, CPUS)
