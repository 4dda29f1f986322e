"""How many workers a cluster has room for, and what one of them takes."""

from collections.abc import Mapping, Sequence
from typing import Any

from dpo_fast.cluster.connection import Node
from dpo_fast.cluster.options import ClusterOptions
from dpo_fast.errors import UsageError
from dpo_fast.memory import runs_on_gpu


def worker_resources(options: ClusterOptions, engine: str, nodes: Sequence[Node]) -> dict[str, float]:
    """What one worker takes: as asked for; else a GPU where the engine runs on one, else its share of a node's cores.

    Args:
        options: what was asked for.
        engine: of the bundle's recipe.
        nodes: of the cluster.
    """
    if options.resources is not None:
        return {"CPU": 1.0, **options.resources} if "GPU" in options.resources else dict(options.resources)
    if runs_on_gpu(engine):
        return {"GPU": 1.0, "CPU": 1.0}
    computing = [node.resources["CPU"] for node in nodes if node.resources.get("CPU", 0) >= 1] or [1.0]
    if options.workers is None:
        return {"CPU": min(computing)}
    a_node = -(-options.workers // len(computing))
    return {"CPU": float(max(1, int(min(computing)) // a_node))}


def room_for(resources: Mapping[str, float], nodes: Sequence[Node]) -> int:
    """How many workers the nodes have room for; amounts of 0 need none."""
    needed = {name: amount for name, amount in resources.items() if amount > 0}
    if not needed:
        raise UsageError("--resources-per-worker: a worker that takes nothing has no end; give it a CPU or a GPU")
    return sum(min(int(node.resources.get(name, 0) / amount) for name, amount in needed.items()) for node in nodes)


def count_workers(options: ClusterOptions, resources: Mapping[str, float], nodes: Sequence[Node], parts: int) -> int:
    """How many workers a run has: no more than there are parts, or than there is room for.

    Raises:
        UsageError: there is room for none.
    """
    room = room_for(resources, nodes)
    if room == 0:
        wanted = ", ".join(f"{name} {amount:g}" for name, amount in resources.items())
        there = "; ".join(sorted({_in_words(node) for node in nodes}))
        raise UsageError(
            f"no node has what a worker takes ({wanted}): there is {there}; lower --resources-per-worker, or add nodes"
        )
    return max(1, min(options.workers or room, room, parts))


def engine_threads(resources: Mapping[str, float]) -> int:
    """Threads of a worker's engine: as many as it has cores; 0, its machine's, where it takes none, or has a GPU."""
    cores = resources.get("CPU", 0)
    return 0 if "GPU" in resources or not cores else max(1, int(cores))


def ray_options(resources: Mapping[str, float]) -> dict[str, Any]:
    """Amounts by Ray's names, as Ray's arguments."""
    named = {"CPU": "num_cpus", "GPU": "num_gpus", "memory": "memory"}
    custom = {name: amount for name, amount in resources.items() if name not in named}
    options: dict[str, Any] = {argument: resources[name] for name, argument in named.items() if resources.get(name)}
    return {"num_cpus": 0} | options | ({"resources": custom} if custom else {})


def _in_words(node: Node) -> str:
    """What a node has."""
    amounts = {name: amount for name, amount in node.resources.items() if ":" not in name and "memory" not in name}
    return ", ".join(f"{name} {amount:g}" for name, amount in sorted(amounts.items())) or "nothing"
