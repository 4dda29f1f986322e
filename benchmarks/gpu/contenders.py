"""Who takes part: a peer's loop or a recipe by name, and why it cannot take part here, if it cannot."""

from dataclasses import dataclass
from importlib.util import find_spec
from typing import Literal, get_args

from dpo_fast.doctor import Facts, judge
from dpo_fast.errors import DpoFastError, UsageError
from dpo_fast.recipes import load_recipe

Device = Literal["cuda", "cpu"]
DEVICES: tuple[str, ...] = get_args(Device)
TRL, TORCH = "trl", "torch"
PEER_PRECISIONS = {TRL: ("fp32", "bf16"), TORCH: ("fp32", "fp16", "bf16")}
DEFAULTS: dict[str, tuple[str, ...]] = {
    "cuda": (
        "trl-bf16",
        "torch-bf16",
        "cuda-fp16",
        "cuda-bf16",
        "tensorrt-fp16",
        "tensorrt-bf16",
        "tensorrt-fp8",
        "tensorrt-rtx-fp16",
        "onnxruntime-tensorrt-fp16",
    ),
    "cpu": ("torch-fp32", "torch-bf16", "cpu-fp32", "openvino-bf16"),
}


@dataclass(frozen=True, slots=True)
class Contender:
    """Who takes part.

    Attributes:
        name: "trl-bf16", "torch-bf16", …, or a recipe's name or file.
        peer: "trl", "torch", or None for a recipe.
        precision: of the matrix products; None where the recipe cannot be read.
        engine: the recipe's; None for a peer.
        missing: why it cannot run on this machine, or None.
    """

    name: str
    peer: str | None
    precision: str | None
    engine: str | None
    missing: str | None


def find_contender(name: str, device: Device, facts: Facts) -> Contender:
    """A contender by name, and whether it can run on a machine.

    Args:
        name: as `Contender.name`.
        device: what the peers run on; a recipe runs on what it is for.
        facts: of the machine, its first GPU being the one that is used.

    Raises:
        UsageError: a peer in a precision that it does not have.
    """
    peer, _, precision = name.partition("-")
    if peer in PEER_PRECISIONS:
        if precision not in PEER_PRECISIONS[peer]:
            known = ", ".join(f"{peer}-{each}" for each in PEER_PRECISIONS[peer])
            raise UsageError(f"--contenders {name}: is not known; choose from {known}, or name a recipe")
        return Contender(name, peer, precision, None, _peer_lacks(peer, device, facts))
    try:
        recipe = load_recipe(name)
    except DpoFastError as error:
        return Contender(name, None, None, None, str(error))
    verdict = judge(recipe, facts)
    missing = None if verdict.can_export and verdict.can_run else "; ".join(verdict.remedies)
    return Contender(name, None, recipe.precision, recipe.engine, missing)


def _peer_lacks(peer: str, device: Device, facts: Facts) -> str | None:
    """What a peer's loop lacks here."""
    if peer == TRL and find_spec("trl") is None:
        return "pip install 'dpo-fast[trl]'"
    if device == "cuda" and not facts.gpus:
        return "needs an NVIDIA GPU"
    if device == "cuda" and not facts.torch_cuda:
        return "PyTorch computes on no GPU here: install a build of it for CUDA"
    return None
