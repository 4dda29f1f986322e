"""A policy and its reference of a large model's shape: random bfloat16 weights, with one shard in memory at a time."""

import json
import shutil
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from export_large import SHAPE
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM

from dpo_fast.files import new_folder
from dpo_fast.token_cache import of_the_tokenizer

LLAMA_8B: dict[str, Any] = {"model_type": "llama", **SHAPE}
SHARD_BYTES = 2 << 30
DEVIATION = 0.02  # of a weight, as Llama's are initialised
STEP = 0.02  # between policy and reference, in deviations of a weight; as the smaller random models have it
MARKER = "policy"


def make_large_pair(folder: Path, shape: dict[str, Any], tokenizer: Path, *, shard_bytes: int = SHARD_BYTES) -> None:
    """Write FOLDER/policy and FOLDER/reference, whole or not at all.

    Args:
        folder: to make.
        shape: a configuration's keys, `model_type` among them; the embedding and the head are not tied.
        tokenizer: a folder whose tokenizer's files are copied.
        shard_bytes: of weights in a file; a larger tensor is a file of its own.

    Raises:
        StorageError: the disk refused.
    """
    keys = {name: value for name, value in shape.items() if name != "model_type"}
    config = AutoConfig.for_model(
        shape["model_type"], **keys, eos_token_id=0, pad_token_id=1, bos_token_id=None, dtype="bfloat16"
    )
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    config.architectures = [type(model).__name__]
    shapes = {name: tuple(tensor.shape) for name, tensor in model.named_parameters()}
    with new_folder(folder, overwrite=False, marker=MARKER) as working:
        for role in ("reference", "policy"):
            made = working / role
            made.mkdir()
            config.save_pretrained(made)
            for file in tokenizer.iterdir():
                if of_the_tokenizer(file.name) and file.name != "config.json":
                    shutil.copy(file, made)
            write_shards(made, shapes, shard_bytes, moved=role == "policy")


def write_shards(folder: Path, shapes: dict[str, tuple[int, ...]], shard_bytes: int, *, moved: bool) -> None:
    """Write a model's random weights, shard by shard, and their index."""
    shards = list(share_out(shapes, shard_bytes))
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards, start=1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        save_file({name: draw(name, shapes[name], moved=moved) for name in names}, folder / file, {"format": "pt"})
        weight_map |= dict.fromkeys(names, file)
    total = sum(map(byte_size, shapes.values()))
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2), encoding="utf-8")


def share_out(shapes: dict[str, tuple[int, ...]], shard_bytes: int) -> Iterator[list[str]]:
    """The names of each shard's tensors, in order."""
    names: list[str] = []
    filled = 0
    for name, shape in shapes.items():
        if names and filled + byte_size(shape) > shard_bytes:
            yield names
            names, filled = [], 0
        names.append(name)
        filled += byte_size(shape)
    yield names


def byte_size(shape: tuple[int, ...]) -> int:
    """Of a bfloat16 tensor."""
    return 2 * torch.Size(shape).numel()


def draw(name: str, shape: tuple[int, ...], *, moved: bool) -> torch.Tensor:
    """A tensor that depends on its name alone: normal matrices, and ones for the weights of normalisations.

    Args:
        name: of the tensor.
        shape: of the tensor.
        moved: whether it is the policy's, a little away from the reference's.
    """
    if len(shape) == 1:
        return torch.ones(shape, dtype=torch.bfloat16)
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    weight = torch.randn(shape, generator=generator, dtype=torch.bfloat16).mul_(DEVIATION)
    if moved:
        weight.add_(torch.randn(shape, generator=generator, dtype=torch.bfloat16), alpha=STEP * DEVIATION)
    return weight
