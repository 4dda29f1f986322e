"""The matrix peak: the most operations a second that one large product of PyTorch's reaches on the device."""

from collections.abc import Callable, Iterator
from typing import Any

import torch

from gpu.torch_device import DTYPES, synchronise
from gpu.turns import timed_turns

SIZES = {"cuda": 8192, "cpu": 1024}  # rows, columns and inner size: large enough to fill the device
PRODUCTS = {"cuda": 10, "cpu": 1}  # of a turn, so that starting one is hidden behind another
TURNS = 10


def run(*, device: str, precisions: list[str], started: float) -> Iterator[dict[str, Any]]:
    """Measure precisions one by one: `flop_per_second`, or the `error` where PyTorch has no such product here.

    Args:
        device: "cuda" or "cpu".
        precisions: of "fp32" (without TF32), "fp16", "bf16", and "fp8" (e4m3, to bfloat16).
        started: of no matter here.
    """
    torch.set_float32_matmul_precision("highest")
    for precision in precisions:
        try:
            measured: dict[str, Any] = {"flop_per_second": measure(SIZES[device], device, precision)}
        except (RuntimeError, KeyError) as error:
            measured = {"error": " ".join(f"{type(error).__name__}: {error}".split())[:200]}
        yield {"precision": precision, "size": SIZES[device], **measured}


def measure(size: int, device: str, precision: str) -> float:
    """The fastest of several turns, in operations a second: two for each term."""
    product, products = make_product(size, device, precision), PRODUCTS[device]

    def turn() -> None:
        for _ in range(products):
            product()
        synchronise(device)

    _, seconds = timed_turns(turn, TURNS)
    return 2.0 * size**3 * products / min(seconds[1:])


def make_product(size: int, device: str, precision: str) -> Callable[[], torch.Tensor]:
    """A product of two random square matrices."""
    generator = torch.Generator(device).manual_seed(0)
    left, right = (torch.randn(size, size, device=device, generator=generator) for _ in range(2))
    if precision == "fp8":
        scale = torch.ones((), device=device)
        small = left.to(torch.float8_e4m3fn), right.to(torch.float8_e4m3fn).t()  # it takes the right one by column
        return lambda: torch._scaled_mm(*small, scale_a=scale, scale_b=scale, out_dtype=torch.bfloat16)
    dtype = DTYPES[precision]
    first, second = left.to(dtype), right.to(dtype)
    return lambda: first @ second
