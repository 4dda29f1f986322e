"""A saved checkpoint opened and bound to a traced graph: the steps that several tests start from."""

from pathlib import Path

import onnx_ir as ir
import onnxruntime
from transformers import AutoConfig

from dpo_fast.export.checkpoint import Checkpoint, read_tensors
from dpo_fast.export.weights import bind, match_names


def opened(folder: Path) -> Checkpoint:
    return Checkpoint(folder, folder.name, None, read_tensors(folder))


def names(folder: Path) -> dict[str, str]:
    return match_names(AutoConfig.from_pretrained(folder), opened(folder))


def bind_folder(folder: Path, graph: ir.Model) -> Path:
    """Bind a graph to a checkpoint's folder; the graph's file lies beside it."""
    path = folder.with_suffix(".onnx")
    ir.save(bind(graph, opened(folder), names(folder), folder.name), path)
    return path


def session(graph: Path) -> onnxruntime.InferenceSession:
    return onnxruntime.InferenceSession(graph, providers=["CPUExecutionProvider"])
