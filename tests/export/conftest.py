"""Tracing costs seconds, so each architecture is traced once, and the export's tests share it."""

from collections.abc import Callable

import onnx_ir as ir
import pytest
from transformers import PretrainedConfig

from dpo_fast.export import graph
from dpo_fast.export.exporter import _architecture

Trace = Callable[..., ir.Model]


@pytest.fixture(scope="session")
def traced() -> Trace:
    """`graph.trace`, remembering what it has traced; its graphs are copied before they are bound, never changed."""
    trace, remembered = graph.trace, {}

    def once(config: PretrainedConfig, *, vocabulary_tile: int, trust_remote_code: bool = False) -> ir.Model:
        architecture = {name: value for name, value in _architecture(config).items() if name != "auto_map"}
        key = (repr(sorted(architecture.items())), vocabulary_tile)
        if key not in remembered:
            remembered[key] = trace(config, vocabulary_tile=vocabulary_tile, trust_remote_code=trust_remote_code)
        return remembered[key]

    return once
