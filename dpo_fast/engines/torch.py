"""PyTorch: the original weights of a bundle, run plainly, as whoever trained them runs them."""

import copy
import gc
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dpo_fast.batches import Batch
from dpo_fast.errors import CheckpointError, EngineOutputError, MissingDependencyError
from dpo_fast.quiet import quiet
from dpo_fast.text import named_line, said_by
from dpo_fast.types import TokenScores

if TYPE_CHECKING:
    import torch


class TorchEngine:
    """A Transformers or PEFT folder by its own forward: no graph, no shared prompts, no attention of ours.

    Rows are one sequence each, a prompt and one completion, padded on the right.
    """

    def __init__(
        self,
        folder: Path,
        *,
        precision: str = "fp32",
        base: Path | None = None,
        trust_remote_code: bool = False,
        device: str | None = None,
    ) -> None:
        """Load a checkpoint.

        Args:
            folder: of the model, or of the adapter.
            precision: that it computes in: "fp32", "bf16" or "fp16".
            base: the folder of the base model, where `folder` is a PEFT folder.
            trust_remote_code: whether the folder's Python code may be run.
            device: PyTorch's name; None takes a GPU where there is one.

        Raises:
            CheckpointError: Transformers or PEFT cannot load the folder.
            MissingDependencyError: the folder is a PEFT folder, and PEFT is not installed.
        """
        import torch

        dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
        self._device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self._model = load_model(folder, base, dtype, trust_remote_code=trust_remote_code).to(self._device)
        self._adapters_on = base is not None
        self.precision = precision
        where = torch.cuda.get_device_name() if self._device.type == "cuda" else "CPU"
        self.name = f"torch {torch.__version__} {where}"

    def with_gates(self, gates: Sequence[float]) -> "TorchEngine":
        """The same weights with the adapter on (1), or without it (0)."""
        other = copy.copy(self)
        other._adapters_on = any(gates)
        return other

    def score(self, batch: Batch) -> TokenScores:
        """Score a batch's N targets; statistics over the vocabulary are taken in float32.

        Args:
            batch: in the plain layout.

        Raises:
            EngineOutputError: a row has several completions, or PyTorch failed, most likely for want of memory.
        """
        import torch

        rows, width = batch.input_ids.shape
        if (batch.segment_ids > 1).any():
            raise EngineOutputError("PyTorch scores one sequence a row; lay the pairs out plainly")
        try:
            with torch.inference_mode(), self._gated():
                logits = self._model(
                    input_ids=torch.from_numpy(batch.input_ids).to(self._device),
                    attention_mask=torch.from_numpy((batch.segment_ids >= 0).astype(np.int64)).to(self._device),
                    use_cache=False,
                ).logits  # (B, T, V)
                # the state at t predicts token t + 1: target_index says at which states the targets are predicted
                index = torch.from_numpy(batch.target_index).to(self._device)
                chosen = logits.reshape(rows * width, -1)[index].float()  # (N, V)
                return _statistics(chosen, torch.from_numpy(batch.target_ids).to(self._device))
        except RuntimeError as error:  # CUDA's and the CPU's lack of memory among them
            raise EngineOutputError(
                f"PyTorch failed at a batch of {rows} x {width} tokens ({said_by(error)}); "
                "if memory is short, lower --token-budget or --max-length"
            ) from error

    def _gated(self) -> Any:
        """The adapter on or off while the model runs."""
        from contextlib import nullcontext

        disable = getattr(self._model, "disable_adapter", None)
        return nullcontext() if self._adapters_on or disable is None else disable()

    def close(self) -> None:
        """Let go of the weights at once."""
        self._model = None
        gc.collect()


def _statistics(logits: "torch.Tensor", target_ids: "torch.Tensor") -> TokenScores:
    """The graph contract's outputs of logits (N, V) in float32."""
    log_probs = logits.log_softmax(-1)
    values = {
        "log_prob": log_probs.gather(1, target_ids[:, None])[:, 0],
        "entropy": -(log_probs.exp() * log_probs).sum(-1),
        "mean_logit": logits.mean(-1),
        "is_top1": (logits.argmax(-1) == target_ids).float(),
        "log_sum_sq_prob": (2 * log_probs).logsumexp(-1),
    }
    return TokenScores(**{name: value.cpu().numpy() for name, value in values.items()})


def load_model(folder: Path, base: Path | None, dtype: "torch.dtype", *, trust_remote_code: bool = False) -> Any:
    """The PyTorch model of a Transformers folder, or of a PEFT folder and its base, in evaluation mode.

    Args:
        folder: of the model, or of the adapter.
        base: the folder of the base model, where `folder` is a PEFT folder.
        dtype: that it is loaded in.
        trust_remote_code: whether the folder's Python code may be run.

    Raises:
        CheckpointError: Transformers or PEFT cannot load the folder.
        MissingDependencyError: the folder is a PEFT folder, and PEFT is not installed.
    """
    from transformers import AutoModelForCausalLM

    if base is not None:
        try:
            from peft import PeftModel
        except ImportError as error:
            raise MissingDependencyError("peft", "peft", "running an adapter in PyTorch") from error
    try:
        with quiet():
            model = AutoModelForCausalLM.from_pretrained(
                folder if base is None else base,
                dtype=dtype,
                local_files_only=True,
                trust_remote_code=trust_remote_code,
                use_safetensors=True,
            )
            return (model if base is None else PeftModel.from_pretrained(model, folder)).eval()
    except Exception as error:  # the folder's own files, read by as many loaders
        loader = "Transformers" if base is None else "PEFT"
        raise CheckpointError(f"{folder.name}: {loader} cannot load this checkpoint ({named_line(error)})") from error
