"""Tracing costs seconds, so each architecture is traced once, and the export's tests share it."""

from collections.abc import Callable, Sequence
from pathlib import Path

import onnx_ir as ir
import pytest
from fake_engines import ROWS, write_rows
from transformers import PretrainedConfig

from dpo_fast.export import exporter, graph
from dpo_fast.export.adapters import AdaptedModules
from dpo_fast.export.roles import architecture

Trace = Callable[..., ir.Model]


@pytest.fixture(scope="session")
def traced() -> Trace:
    """`graph.trace`, remembering what it has traced; its graphs are copied before they are bound, never changed."""
    trace, remembered = graph.trace, {}

    def once(
        config: PretrainedConfig,
        *,
        vocabulary_tile: int,
        trust_remote_code: bool = False,
        adapters: Sequence[AdaptedModules] = (),
        dense_experts: bool = False,
    ) -> ir.Model:
        keys = {name: value for name, value in architecture(config).items() if name != "auto_map"}
        key = (repr(sorted(keys.items())), vocabulary_tile, repr([sorted(changes.items()) for changes in adapters]))
        key = (*key, dense_experts and any("expert" in name for name in keys))  # other graphs are the same
        if key not in remembered:
            remembered[key] = trace(
                config,
                vocabulary_tile=vocabulary_tile,
                trust_remote_code=trust_remote_code,
                adapters=adapters,
                dense_experts=dense_experts,
            )
        return remembered[key]

    return once


@pytest.fixture
def remembered_traces(monkeypatch: pytest.MonkeyPatch, traced: Trace) -> None:
    """Exports take their traces from `traced`."""
    monkeypatch.setattr(exporter, "trace", traced)


@pytest.fixture
def dataset(tmp_path: Path) -> str:
    """A few pairs in a file."""
    return write_rows(tmp_path / "pairs.jsonl", ROWS)
