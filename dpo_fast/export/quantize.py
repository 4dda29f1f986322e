"""Weight matrices in few bits, in NumPy. Each column has scales of its own: it makes one output of the product."""

import math
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from dpo_fast.types import Float32Array

INT8_LIMIT = 127  # symmetric: -128 is not used
REDUCED_LIMIT = 63  # 7 bits
FLOAT8_LIMIT = 448.0  # float8e4m3fn's largest number
SMALLEST_NORMAL_FLOAT16 = 2.0**-14


def quantize_int8(weight: Float32Array, limit: int = INT8_LIMIT) -> tuple[NDArray[np.int8], Float32Array]:
    """A matrix as integers and one scale for each column: ``weight ~ integers * scale``.

    Args:
        weight: (K, N) float32.
        limit: what the largest magnitude of each column becomes.

    Returns:
        (K, N) int8, and (N,) float32.
    """
    scale = _positive(np.abs(weight).max(0) / np.float32(limit))
    return np.rint(weight / scale).clip(-limit, limit).astype(np.int8), scale


def quantize_float8(weight: Float32Array) -> tuple[NDArray[Any], NDArray[np.float16]]:
    """A matrix as float8e4m3fn and one float16 scale for each column: ``weight ~ numbers * scale``.

    Args:
        weight: (K, N) float32.

    Returns:
        (K, N) float8e4m3fn, and (N,) float16.
    """
    scale = float8_scale(np.abs(weight).max(0))
    numbers = (weight / scale.astype(np.float32)).clip(-FLOAT8_LIMIT, FLOAT8_LIMIT)
    return numbers.astype(ml_dtypes.float8_e4m3fn), scale


def float8_scale(largest: Float32Array) -> NDArray[np.float16]:
    """The float16 scale at which a magnitude becomes float8e4m3fn's largest; float16's subnormals are avoided."""
    scale: NDArray[np.float16] = np.maximum(largest / FLOAT8_LIMIT, SMALLEST_NORMAL_FLOAT16).astype(np.float16)
    return scale


def quantize_int4(
    weight: Float32Array, block_size: int, *, symmetric: bool
) -> tuple[NDArray[np.uint8], Float32Array, NDArray[np.uint8] | None]:
    """A matrix as 4-bit levels in blocks of each column, in the layout of ONNX Runtime's `MatMulNBits`.

    ``weight ~ (level - zero_point) * scale``. Symmetric: the zero point is 8, and a block's entry of largest magnitude
    becomes level 0, whatever its sign, so that all 16 levels are of use. Otherwise a block's smallest and largest
    entries (or 0, if that is outside) become the levels 0 and 15.

    Args:
        weight: (K, N) float32.
        block_size: entries of a block; even. A last block that is not full is filled with zeros.
        symmetric: whether every zero point is 8.

    Returns:
        Levels (N, blocks, block_size / 2), two in a byte, the earlier one in the lower half; scales (N, blocks); zero
        points (N, ceil(blocks / 2)), packed alike, or None where all are 8.
    """
    inner, columns = weight.shape
    blocks = math.ceil(inner / block_size)
    padded = np.zeros((columns, blocks * block_size), np.float32)
    padded[:, :inner] = weight.T
    entries = padded.reshape(columns, blocks, block_size)
    lowest, highest = entries.min(-1), entries.max(-1)
    if symmetric:
        scale = np.where(-lowest >= highest, lowest, highest) / np.float32(-8)
        scale[scale == 0] = 1
        zero_point = np.full((columns, blocks), 8, np.float32)
    else:
        lowest, highest = np.minimum(lowest, 0), np.maximum(highest, 0)
        scale = _positive((highest - lowest) / np.float32(15))
        zero_point = np.rint(-lowest / scale)
    levels = (np.rint(entries / scale[..., None]) + zero_point[..., None]).clip(0, 15)
    packed_zero_points = None if symmetric else _pack_nibbles(zero_point.astype(np.uint8))
    return _pack_nibbles(levels.astype(np.uint8)), scale, packed_zero_points


def _pack_nibbles(levels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Two 4-bit levels of the last axis in a byte, the earlier in the lower half; an odd end is filled with 0."""
    if levels.shape[-1] % 2:
        levels = np.concatenate([levels, np.zeros_like(levels[..., :1])], -1)
    packed: NDArray[np.uint8] = levels[..., 0::2] | (levels[..., 1::2] << np.uint8(4))
    return packed


def _positive(scale: Float32Array) -> Float32Array:
    """A scale that can be divided by: 1 where all entries are zero."""
    return np.where(scale > 0, scale, np.float32(1))
