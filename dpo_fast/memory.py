"""How much memory there is to use, and how much loaded engines need: the machine's, or a GPU's."""

import subprocess
from collections.abc import Sequence
from pathlib import Path

from dpo_fast.bundle import Bundle, ModelEntry, is_of_plan

# Weights as float32, and once more while a session folds and packs them as it loads.
BYTES_PER_PARAMETER = 8
# On a GPU: products in half precision, and the head in float32.
DEVICE_BYTES_PER_PARAMETER = 4
SHARE = 0.9  # of what is available; the rest is for batches, tokens and scores
CGROUP = Path("/sys/fs/cgroup")


def fit_together(bundle: Bundle, roles: Sequence[str]) -> bool:
    """Whether the engines of several roles can be in memory at the same time; roles that share a graph count once."""
    entries = {bundle.manifest.models[role].engine_graph: bundle.manifest.models[role] for role in roles}
    if len(entries) == 1:
        return True
    if runs_on_gpu(bundle.manifest.recipe["engine"]):
        available = available_device_memory()
        # Where the driver does not say, an engine that lacks the memory will.
        return available is None or sum(_device_bytes(bundle, each) for each in entries.values()) <= SHARE * available
    parameters = sum(entry.parameters for entry in entries.values())
    return parameters * BYTES_PER_PARAMETER <= SHARE * available_memory()


def runs_on_gpu(engine: str) -> bool:
    """Whether a recipe's engine has its weights on a GPU."""
    return any(name in engine for name in ("cuda", "tensorrt"))


def _device_bytes(bundle: Bundle, entry: ModelEntry) -> int:
    """What a role's weights take on a GPU: its plans hold them, or they are loaded from the checkpoint."""
    if entry.plan is None:
        return entry.parameters * DEVICE_BYTES_PER_PARAMETER
    return sum(int(file["bytes"]) for name, file in bundle.manifest.files.items() if is_of_plan(name, entry.plan))


def available_device_memory(command: str = "nvidia-smi") -> int | None:
    """Bytes that are free on the GPU that has the most; None where the driver does not say.

    Args:
        command: NVIDIA's, which comes with the driver.
    """
    query = [command, "--query-gpu=memory.free", "--format=csv,noheader,nounits"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True)  # noqa: S603
        return max(int(line) for line in answer.stdout.split()) * 2**20
    except (OSError, subprocess.SubprocessError, ValueError):
        return None


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
