"""ONNX Runtime: on the CPU the embedded default, and on CUDA."""

import copy
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

import numpy as np

from dpo_fast.batches import Batch
from dpo_fast.errors import BundleError, EngineOutputError, MissingDependencyError
from dpo_fast.types import TokenScores

CPU, CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"
ADAPTER_GATES = "adapter_gates"


class OnnxRuntimeEngine:
    """A log-prob graph on one of ONNX Runtime's providers."""

    def __init__(
        self,
        graph: Path,
        *,
        precision: str = "fp32",
        gates: Sequence[float] | None = None,
        provider: str = CPU,
        threads: int = 0,
    ) -> None:
        """Load a graph and the weights it points to.

        Args:
            graph: the .onnx file; its weights must lie in its folder or below.
            precision: of the graph's matrix products, for the record.
            gates: one for each adapter in the graph: 1 turns it on, 0 off; None for a graph without adapters.
            provider: `CPU` or `CUDA`. No operator falls back from CUDA to the CPU.
            threads: for one operator; 0 lets ONNX Runtime take every physical core.

        Raises:
            MissingDependencyError: onnxruntime is not installed.
            BundleError: the graph or its weights cannot be loaded, or its inputs or outputs are not those of the graph
                contract.
        """
        extra, use = ("gpu", "running a graph on CUDA") if provider == CUDA else ("cpu", "running a graph on the CPU")
        try:
            import onnxruntime
        except ImportError as error:
            raise MissingDependencyError("onnxruntime", extra, use) from error
        if provider not in onnxruntime.get_available_providers():
            raise MissingDependencyError("onnxruntime-gpu", extra, use)
        onnxruntime.set_default_logger_severity(3)  # errors only: unused initializers are no news
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.enable_mem_pattern = False  # made anew for each shape, and hardly two batches have the same
        options.log_severity_level = 3
        if provider != CPU:
            options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
        try:
            self._session = onnxruntime.InferenceSession(graph, options, providers=[provider])
        except Exception as error:  # onnxruntime's own exceptions share no public base class
            reason = " ".join(str(error).split())[:300]
            raise BundleError(f"{graph}: ONNX Runtime cannot load it ({reason}); export the bundle again") from error
        self._outputs = [output.name for output in self._session.get_outputs()]
        contract = [field.name for field in fields(TokenScores)]
        if sorted(self._outputs) != sorted(contract):
            raise BundleError(
                f"{graph}: puts out {', '.join(self._outputs)}, not {', '.join(contract)}; export the bundle again"
            )
        if (ADAPTER_GATES in {value.name for value in self._session.get_inputs()}) != (gates is not None):
            raise BundleError(f"{graph}: has adapters, or has none, where bundle.json says otherwise; export it again")
        self._gates: Sequence[float] | Sequence[Sequence[float]] | None = gates
        self.precision = precision
        self.name = f"onnxruntime {onnxruntime.__version__} {provider}"

    def with_gates(self, gates: Sequence[float] | Sequence[Sequence[float]]) -> "OnnxRuntimeEngine":
        """The same session with other adapters turned on; several lists of gates are taken by the rows in turn."""
        other = copy.copy(self)
        other._gates = gates
        return other

    def score(self, batch: Batch) -> TokenScores:
        """Score a batch's N targets.

        Raises:
            EngineOutputError: ONNX Runtime failed, most likely for want of memory.
        """
        rows, width = batch.input_ids.shape
        inputs = batch.inputs
        if self._gates is not None:
            gates = np.array(self._gates, np.float32)
            inputs = {**inputs, ADAPTER_GATES: np.resize(gates, (rows, gates.shape[-1]))}
        try:
            values = self._session.run(self._outputs, inputs)
        except Exception as error:  # as above
            reason = " ".join(str(error).split())[:300]
            raise EngineOutputError(
                f"ONNX Runtime failed at a batch of {rows} x {width} tokens ({reason}); "
                "if memory is short, lower --token-budget or --max-length"
            ) from error
        return TokenScores(**dict(zip(self._outputs, values, strict=True)))
