"""What must be known of a machine to read its figures later."""

import os
import subprocess
from dataclasses import asdict, replace
from typing import Any

from bundles import PROJECT

from dpo_fast.doctor import Facts, gather
from dpo_fast.errors import UsageError
from dpo_fast.provenance import versions
from gpu.contenders import Device

PACKAGES = (
    "dpo-fast", "numpy", "torch", "transformers", "trl", "tokenizers", "onnx", "onnxruntime", "onnxruntime-gpu",
    "openvino", "tensorrt", "tensorrt-cu13", "tensorrt-cu12", "tensorrt_rtx", "cuda-python", "cuda-bindings",
)  # fmt: skip


def default_gpu() -> int:
    """The first GPU that CUDA_VISIBLE_DEVICES leaves to this user, as nvidia-smi counts; 0 where it says nothing.

    Raises:
        UsageError: it names the GPU in another way.
    """
    first = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")[0].strip()
    if first and not first.isdecimal():
        raise UsageError(f"CUDA_VISIBLE_DEVICES={first}: say which one it is with --gpu, as nvidia-smi counts")
    return int(first or 0)


def gather_facts(gpu: int) -> Facts:
    """This machine's facts, its one GPU being the one that is used, if it has any.

    Args:
        gpu: as nvidia-smi counts.

    Raises:
        UsageError: there are GPUs, but not so many.
    """
    facts = gather()
    if facts.gpus and not 0 <= gpu < len(facts.gpus):
        raise UsageError(f"--gpu {gpu}: nvidia-smi lists {len(facts.gpus)}, counted from 0")
    return replace(facts, gpus=facts.gpus[gpu : gpu + 1])


def describe(facts: Facts, device: Device) -> dict[str, Any]:
    """The device, the driver, the processor, the packages and the commit, for a result's file.

    Args:
        facts: of the machine.
        device: what is measured.
    """
    if device == "cuda" and facts.gpus:
        named: dict[str, Any] = {**asdict(facts.gpus[0]), "cuda": facts.cuda}
    else:
        named = {"name": facts.hardware["processor"]}
    return {
        "device": {"kind": device, **named},
        "hardware": facts.hardware,
        "versions": versions(PACKAGES),
        "commit": commit(),
    }


def commit() -> dict[str, Any] | None:
    """The project's commit, and whether files differ from it; None without git."""
    try:
        said = [
            subprocess.run(
                ["git", "-C", PROJECT, *arguments],  # noqa: S607
                capture_output=True,
                text=True,
                check=True,
            ).stdout.strip()
            for arguments in (["rev-parse", "HEAD"], ["status", "--porcelain"])
        ]
    except (OSError, subprocess.CalledProcessError):
        return None
    return {"hash": said[0], "changed": bool(said[1])}
