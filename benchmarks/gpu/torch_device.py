"""What PyTorch's contenders share: dtypes by name, the device's memory, and its cache emptied."""

import gc

import torch

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def largest_memory(device: str) -> int | None:
    """The most bytes that PyTorch's tensors took on a GPU so far."""
    return int(torch.cuda.max_memory_allocated()) if device == "cuda" else None


def release(device: str) -> None:
    """Give back the memory of what nobody holds any more."""
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()


def synchronise(device: str) -> None:
    """Wait until all is computed."""
    if device == "cuda":
        torch.cuda.synchronize()
