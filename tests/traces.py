"""Tracing an architecture costs seconds, so each is traced once in a run of the tests, whichever process asks first."""

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path

import onnx_ir as ir
from transformers import PretrainedConfig

from dpo_fast.export import graph
from dpo_fast.export.adapters import AdaptedModules
from dpo_fast.export.roles import architecture

UNBOUND = "unbound"  # in the place of a file's name, for parameters, which have no values yet


class Traces:
    """`graph.trace`, remembering what it has traced; its graphs are copied before they are bound, never changed."""

    def __init__(self) -> None:
        """Remember in the folder that conftest.py has made for all processes of this run."""
        self._folder = Path(os.environ["DPO_FAST_TEST_TRACES"])
        self._loaded: dict[str, ir.Model] = {}

    def __call__(
        self,
        config: PretrainedConfig,
        *,
        vocabulary_tile: int,
        trust_remote_code: bool = False,
        adapters: Sequence[AdaptedModules] = (),
        dense_experts: bool = False,
    ) -> ir.Model:
        """See `graph.trace`."""
        keys = {name: value for name, value in architecture(config).items() if name != "auto_map"}
        dense = dense_experts and any("expert" in name for name in keys)  # other graphs are the same
        changes = [sorted(adapter.items()) for adapter in adapters]
        key = hashlib.sha256(repr((sorted(keys.items()), vocabulary_tile, changes, dense)).encode()).hexdigest()
        path = self._folder / f"{key}.onnx"
        if key not in self._loaded:
            if not path.exists():
                traced = graph.trace(
                    config,
                    vocabulary_tile=vocabulary_tile,
                    trust_remote_code=trust_remote_code,
                    adapters=adapters,
                    dense_experts=dense_experts,
                )
                _save(traced, path)
            self._loaded[key] = _load(path)
        return self._loaded[key]


def _save(model: ir.Model, path: Path) -> None:
    """Write a traced graph, whole or not at all."""
    path.parent.mkdir(exist_ok=True)
    own = path.with_suffix(f".{os.getpid()}.part")
    for name, value in model.graph.initializers.items():
        if value.const_value is None:
            assert value.dtype is not None
            value.const_value = ir.ExternalTensor(UNBOUND, 0, 0, value.dtype, shape=value.shape, name=name)
    ir.save(model, own)
    own.rename(path)


def _load(path: Path) -> ir.Model:
    model = ir.load(path)
    for value in model.graph.initializers.values():
        if isinstance(value.const_value, ir.ExternalTensor):
            value.const_value = None
    return model
