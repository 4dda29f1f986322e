"""The safetensors file of a bundle's quantised weights, written tensor by tensor."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

# What quantised weights and their scales are stored as, by safetensors' names.
DTYPES = {
    "F32": ir.DataType.FLOAT,
    "F16": ir.DataType.FLOAT16,
    "I8": ir.DataType.INT8,
    "U8": ir.DataType.UINT8,
    "F8_E4M3": ir.DataType.FLOAT8E4M3FN,
}
Layout = tuple[str, tuple[int, ...]]  # a key of `DTYPES`, and the shape


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a tensor lies behind the header, in bytes."""

    dtype: str
    shape: tuple[int, ...]
    offset: int
    length: int


class WeightsFile:
    """A safetensors file whose tensors' shapes are known before their values.

    The tensors lie with the larger entries first, then by name, so that each is aligned, and equal content is equal
    bytes. Leaving the `with` block before all are written is a fault in the program.
    """

    def __init__(self, path: Path, layouts: Mapping[str, Layout]) -> None:
        """Lay out the file and write its header.

        Args:
            path: the file to write; its folder is made.
            layouts: dtype and shape of each tensor.
        """
        self.path = path
        self._places: dict[str, _Place] = {}
        end = 0
        for name, (dtype, shape) in sorted(layouts.items(), key=lambda item: (-DTYPES[item[1][0]].itemsize, item[0])):
            length = int(DTYPES[dtype].itemsize) * math.prod(shape)
            self._places[name] = _Place(dtype, shape, end, length)
            end += length
        header = {
            name: {"dtype": at.dtype, "shape": list(at.shape), "data_offsets": [at.offset, at.offset + at.length]}
            for name, at in self._places.items()
        }
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        self._first = 8 + len(text)
        self._missing = set(self._places)
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("wb")
        self._file.write(len(text).to_bytes(8, "little") + text)
        self._file.truncate(self._first + end)

    def write(self, name: str, values: NDArray[Any]) -> None:
        """Write a tensor's values, which must have the promised dtype and shape."""
        place = self._places[name]
        promised = (DTYPES[place.dtype].numpy(), place.shape)
        assert (values.dtype, values.shape) == promised, f"{name}: {values.dtype} {values.shape}, not {promised}"
        self._file.seek(self._first + place.offset)
        self._file.write(np.ascontiguousarray(values).tobytes())
        self._missing.discard(name)

    def reference(self, name: str, root: Path) -> ir.ExternalTensor:
        """A tensor of this file, for a graph that lies in the folder `root`."""
        place = self._places[name]
        return ir.ExternalTensor(
            self.path.relative_to(root).as_posix(),
            self._first + place.offset,
            place.length,
            DTYPES[place.dtype],
            shape=ir.Shape(place.shape),
            name=name,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._file.close()
        assert kind is not None or not self._missing, f"never written: {', '.join(sorted(self._missing))}"
