"""ONNX Runtime on the CPU, the embedded default, and what its engine on GPUs shares with it."""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from dpo_fast.batches import Batch
from dpo_fast.errors import BundleError, EngineOutputError, MissingDependencyError
from dpo_fast.text import said_by
from dpo_fast.types import TokenScores

if TYPE_CHECKING:
    import onnxruntime

CPU = "CPUExecutionProvider"
ADAPTER_GATES = "adapter_gates"
# One for each adapter, or several such lists, which the rows of a batch take in turn.
Gates = Sequence[float] | Sequence[Sequence[float]]


class OnnxRuntimeEngine:
    """A log-prob graph on ONNX Runtime's CPU provider."""

    def __init__(
        self, graph: Path, *, precision: str = "fp32", gates: Sequence[float] | None = None, threads: int = 0
    ) -> None:
        """Load a graph and the weights it points to.

        Args:
            graph: the .onnx file; its weights must lie in its folder or below.
            precision: of the graph's matrix products, for the record.
            gates: one for each adapter in the graph: 1 turns it on, 0 off; None for a graph without adapters.
            threads: for one operator; 0 lets ONNX Runtime take every physical core.

        Raises:
            MissingDependencyError: onnxruntime is not installed.
            BundleError: the graph or its weights cannot be loaded, or its inputs or outputs are not those of the graph
                contract.
        """
        try:
            import onnxruntime
        except ImportError as error:
            raise MissingDependencyError("onnxruntime", "cpu", "running a graph on the CPU") from error
        self._session = open_session(graph, session_options(threads), {CPU: {}})
        self._outputs = check_contract(graph, self._session, gates)
        self._gates: Gates | None = gates
        self.precision = precision
        self.name = f"onnxruntime {onnxruntime.__version__} {CPU}"

    def with_gates(self, gates: Gates) -> "OnnxRuntimeEngine":
        """The same session with other adapters turned on; several lists of gates are taken by the rows in turn."""
        other = copy.copy(self)
        other._gates = gates
        return other

    def score(self, batch: Batch) -> TokenScores:
        """Score a batch's N targets.

        Raises:
            EngineOutputError: ONNX Runtime failed, most likely for want of memory.
        """
        try:
            values = self._session.run(self._outputs, gated_inputs(batch, self._gates))
        except Exception as error:  # onnxruntime's own exceptions share no public base class
            raise failed(batch, error) from error
        return TokenScores(**dict(zip(self._outputs, values, strict=True)))


def session_options(threads: int) -> "onnxruntime.SessionOptions":
    """What a session of any provider is opened with; `threads` as the engines have it."""
    import onnxruntime

    onnxruntime.set_default_logger_severity(3)  # errors only: unused initializers are no news
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.enable_mem_pattern = False  # made anew for each shape, and hardly two batches have the same
    options.log_severity_level = 3
    return options


def open_session(
    graph: Path, options: "onnxruntime.SessionOptions", providers: Mapping[str, Mapping[str, str]]
) -> "onnxruntime.InferenceSession":
    """Load a graph on providers, each with its options, the most wanted first.

    Raises:
        BundleError: the graph or its weights cannot be loaded.
    """
    import onnxruntime

    wanted = [(name, dict(settings)) for name, settings in providers.items()]
    try:
        # Without a fallback, what a provider says of a graph is an error instead of a printed line.
        return onnxruntime.InferenceSession(graph, options, providers=wanted, enable_fallback=0)
    except Exception as error:  # as above
        raise BundleError(
            f"{graph}: ONNX Runtime cannot load it ({said_by(error)}); export the bundle again"
        ) from error


def check_contract(graph: Path, session: "onnxruntime.InferenceSession", gates: Sequence[float] | None) -> list[str]:
    """The names of a session's outputs, in its order.

    Raises:
        BundleError: its inputs or outputs are not those of the graph contract.
    """
    outputs = [output.name for output in session.get_outputs()]
    contract = [field.name for field in fields(TokenScores)]
    if sorted(outputs) != sorted(contract):
        raise BundleError(f"{graph}: puts out {', '.join(outputs)}, not {', '.join(contract)}; export the bundle again")
    if (ADAPTER_GATES in {value.name for value in session.get_inputs()}) != (gates is not None):
        raise BundleError(f"{graph}: has adapters, or has none, where bundle.json says otherwise; export it again")
    return outputs


def gated_inputs(batch: Batch, gates: Gates | None) -> dict[str, NDArray[Any]]:
    """A batch's inputs by the graph's names, with the gates of each row, (B, adapters), where a graph has adapters."""
    if gates is None:
        return dict(batch.inputs)
    given = np.array(gates, np.float32)
    return {**batch.inputs, ADAPTER_GATES: np.resize(given, (len(batch.input_ids), given.shape[-1]))}


def failed(batch: Batch, error: Exception) -> EngineOutputError:
    """What is raised when ONNX Runtime fails at a batch."""
    rows, width = batch.input_ids.shape
    return EngineOutputError(
        f"ONNX Runtime failed at a batch of {rows} x {width} tokens ({said_by(error)}); "
        "if memory is short, lower --token-budget or --max-length"
    )
