"""A saved checkpoint opened and bound to a traced graph: the steps that several tests start from."""

from pathlib import Path

import onnx_ir as ir
import onnxruntime
from transformers import AutoConfig

from dpo_fast.export.checkpoint import Checkpoint, read_tensors
from dpo_fast.export.weights import Binding, Stored, bind, match_parameters


def opened(folder: Path) -> Checkpoint:
    return Checkpoint(folder, folder.name, None, read_tensors(folder))


def bindings(folder: Path) -> dict[str, Binding]:
    return match_parameters(AutoConfig.from_pretrained(folder), opened(folder), folder.name)


def names(folder: Path) -> dict[str, str]:
    """Which stored tensor each parameter is, where it is one."""
    return {parameter: bound.name for parameter, bound in bindings(folder).items() if isinstance(bound, Stored)}


def bind_folder(folder: Path, graph: ir.Model) -> Path:
    """Bind a graph to a checkpoint's folder; the graph's file lies beside it."""
    path = folder.with_suffix(".onnx")
    ir.save(bind(graph, bindings(folder)), path)
    return path


def session(graph: Path) -> onnxruntime.InferenceSession:
    return onnxruntime.InferenceSession(graph, providers=["CPUExecutionProvider"])
