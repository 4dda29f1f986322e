"""How much memory there is to use, and how much loaded engines need."""

from collections.abc import Sequence
from pathlib import Path

from dpo_fast.bundle import Bundle

# Weights as float32, and once more while a session folds and packs them as it loads.
BYTES_PER_PARAMETER = 8
SHARE = 0.9  # of what is available; the rest is for batches, tokens and scores
CGROUP = Path("/sys/fs/cgroup")


def fit_together(bundle: Bundle, roles: Sequence[str]) -> bool:
    """Whether the engines of several roles can be in memory at the same time; roles that share a graph count once."""
    models = bundle.manifest.models
    parameters = {models[role].engine_graph: models[role].parameters for role in roles}
    return len(parameters) == 1 or sum(parameters.values()) * BYTES_PER_PARAMETER <= SHARE * available_memory()


def available_memory() -> int:
    """Bytes that this process may still take: of the machine, and of the container that it runs in."""
    import psutil

    available: int = psutil.virtual_memory().available
    try:
        limit = int((CGROUP / "memory.max").read_text())
        used = int((CGROUP / "memory.current").read_text())
        statistics = dict(line.split() for line in (CGROUP / "memory.stat").read_text().splitlines())
        # Files that were read lately count as used, and make room as soon as it is wanted.
        return min(available, limit - used + int(statistics["inactive_file"]))
    except (OSError, ValueError, KeyError):  # no limit, or no cgroup of version 2
        return available
