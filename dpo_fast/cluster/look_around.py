"""Before any work: does each node that will have workers see what they need?"""

import platform
from collections.abc import Sequence
from dataclasses import dataclass
from uuid import uuid4

from dpo_fast.cluster.connection import Node
from dpo_fast.cluster.job import Job
from dpo_fast.errors import DpoFastError, UsageError
from dpo_fast.memory import fit_together
from dpo_fast.provenance import hardware, versions

# What decides a part's tokens and bytes, beside the engine, which its own name tells.
SAME_EVERYWHERE = ("dpo-fast", "numpy", "pyarrow", "datasets", "tokenizers", "transformers")


@dataclass(frozen=True, slots=True)
class Sight:
    """What a node sees.

    Attributes:
        host: its name.
        fault: why no worker can run there, or None.
        fits: whether the engines of all roles have room in its memory together.
        hardware: of the node.
    """

    host: str
    fault: str | None
    fits: bool
    hardware: dict[str, str | int]


def look_around(job: Job, where: Sequence[Node]) -> list[Sight]:
    """Look around on each node.

    Args:
        job: whose bundle and store are looked for.
        where: the nodes.

    Raises:
        UsageError: a node lacks something; the message says what to do.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    look = ray.remote(num_cpus=0, max_retries=1)(_look)
    marker = f".look-{uuid4().hex}"
    storage = job.store.storage
    storage.write(marker, b"here")
    try:
        sights = ray.get(
            [
                look.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node.id, soft=False)).remote(
                    job, marker, versions(SAME_EVERYWHERE)
                )
                for node in where
            ]
        )
    finally:
        storage.remove([marker])
    for sight in sights:
        if sight.fault is not None:
            raise UsageError(f"node {sight.host}: {sight.fault}")
    return list(sights)


def _look(job: Job, marker: str, wanted: dict[str, str]) -> Sight:
    """Look around on this node."""
    fault, fits = None, True
    there = versions(SAME_EVERYWHERE)
    differing = [
        f"{name} {there.get(name, 'missing')} (not {version})"
        for name, version in wanted.items()
        if there.get(name) != version
    ]
    try:
        fits = fit_together(job.open_bundle(), job.computed)
        if differing:
            fault = f"has other versions than the driver's machine: {', '.join(differing)}; install the same"
        elif job.store.storage.read(marker) is None:
            fault = (
                f"does not see {job.store.name}; name an --output that all nodes share, or put the parts on an "
                "object store with --scores s3://…"
            )
    except DpoFastError as error:
        fault = str(error)
    return Sight(platform.node(), fault, fits, hardware())
