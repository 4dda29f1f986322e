"""ONNX Runtime on the CPU: the embedded default."""

from dataclasses import fields
from pathlib import Path

from dpo_fast.batches import Batch
from dpo_fast.errors import BundleError, EngineOutputError, MissingDependencyError
from dpo_fast.types import TokenScores


class OnnxRuntimeEngine:
    """A log-prob graph on ONNX Runtime's CPU provider, in float32."""

    precision = "fp32"

    def __init__(self, graph: Path, *, threads: int = 0) -> None:
        """Load a graph and the weights it points to.

        Args:
            graph: the .onnx file; its weights must lie in its folder or below.
            threads: for one operator; 0 lets ONNX Runtime take every physical core.

        Raises:
            MissingDependencyError: onnxruntime is not installed.
            BundleError: the graph or its weights cannot be loaded, or its outputs are not those of the graph contract.
        """
        try:
            import onnxruntime
        except ImportError as error:
            raise MissingDependencyError("onnxruntime", "cpu", "running a graph on the CPU") from error
        onnxruntime.set_default_logger_severity(3)  # errors only: unused initializers are no news
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 3
        try:
            self._session = onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # onnxruntime's own exceptions share no public base class
            reason = " ".join(str(error).split())[:300]
            raise BundleError(f"{graph}: ONNX Runtime cannot load it ({reason}); export the bundle again") from error
        self._outputs = [output.name for output in self._session.get_outputs()]
        contract = [field.name for field in fields(TokenScores)]
        if sorted(self._outputs) != sorted(contract):
            raise BundleError(
                f"{graph}: puts out {', '.join(self._outputs)}, not {', '.join(contract)}; export the bundle again"
            )
        self.name = f"onnxruntime {onnxruntime.__version__} CPUExecutionProvider"

    def score(self, batch: Batch) -> TokenScores:
        """Score a batch's N targets.

        Raises:
            EngineOutputError: ONNX Runtime failed, most likely for want of memory.
        """
        try:
            values = self._session.run(self._outputs, batch.inputs)
        except Exception as error:  # as above
            rows, width = batch.input_ids.shape
            reason = " ".join(str(error).split())[:300]
            raise EngineOutputError(
                f"ONNX Runtime failed at a batch of {rows} x {width} tokens ({reason}); "
                "if memory is short, lower --token-budget or --max-length"
            ) from error
        return TokenScores(**dict(zip(self._outputs, values, strict=True)))
