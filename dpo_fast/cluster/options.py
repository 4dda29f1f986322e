"""Where a cluster is, and what of it a run takes."""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

from dpo_fast.errors import UsageError

LOCAL, AUTO, ANY = "local", "auto", "any"
_ADDRESS = re.compile(r"(ray://)?(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9][\w.-]*):\d{1,5}")


@dataclass(frozen=True, slots=True)
class ClusterOptions:
    """A cluster, and what of it a run takes.

    Attributes:
        address: "local" starts one on this machine, for as long as the run takes; "auto" is the one that this machine
            belongs to, or that RAY_ADDRESS names; "any" is that one if there is one, else "local"; HOST:PORT a node of
            a cluster, for a driver that is a node of it; ray://HOST:PORT, Ray Client's, for one that is not.
        workers: how many at a time; None: as many as the cluster has room for.
        resources: of one worker, by Ray's names: CPU, GPU, memory (bytes), and custom ones; None: a GPU where the
            recipe's engine wants one, else the cores that a node has, shared by its workers.
        patience: seconds without a sign of life after which a worker is taken for dead; such a sign is each batch.
        attempts: how often a part is tried before it counts as failed.
    """

    address: str = ANY
    workers: int | None = None
    resources: Mapping[str, float] | None = None
    patience: float = 600.0
    attempts: int = 3


def parse_address(value: str) -> str:
    """What `--cluster` says, as `ClusterOptions.address`.

    Args:
        value: ray, local, auto, HOST:PORT or ray://HOST:PORT; ray://local and ray://auto are taken too.

    Raises:
        UsageError: it is none of them.
    """
    if value == "ray":
        return ANY
    name = value.removeprefix("ray://")
    if name in (LOCAL, AUTO):
        return name
    if _ADDRESS.fullmatch(value):
        return value
    raise UsageError(
        f"--cluster {value!r}: say ray, local (this machine), auto (the cluster that it belongs to), HOST:PORT, or "
        "ray://HOST:PORT"
    )


def parse_resources(value: str) -> dict[str, float]:
    """What `--resources-per-worker` says.

    Args:
        value: a JSON object of amounts by name, such as {"GPU": 1, "CPU": 4}.

    Raises:
        UsageError: it is something else.
    """
    try:
        found = json.loads(value)
        amounts = {str(name): float(amount) for name, amount in found.items()}
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise UsageError(
            f"--resources-per-worker {value!r}: is no JSON object of amounts, such as '{{\"GPU\": 1}}'"
        ) from error
    for name, amount in amounts.items():
        if isinstance(found[name], bool) or not 0 <= amount < math.inf or not name:
            raise UsageError(f"--resources-per-worker {value!r}: {name!r} must be an amount, at least 0")
    return amounts


def check_cluster_options(options: ClusterOptions) -> None:
    """Refuse amounts that no cluster could make sense of.

    Raises:
        UsageError: there is one.
    """
    if options.workers is not None and options.workers < 1:
        raise UsageError(f"--workers {options.workers} must be at least 1")
    if not 0 < options.patience < math.inf:
        raise UsageError(f"--worker-timeout {options.patience} must be some seconds, more than 0")
    if options.attempts < 1:
        raise UsageError(f"--attempts {options.attempts} must be at least 1")
