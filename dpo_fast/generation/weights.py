"""The saved weights that answer: one model in memory at a time, and an adapter's base only once.

Roles whose base is the same folder are one PEFT model, whose adapters are switched.
"""

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from dpo_fast.bundle import Bundle
from dpo_fast.engines.torch import load_model
from dpo_fast.errors import CheckpointError
from dpo_fast.export.checkpoint import ADAPTER_CONFIG
from dpo_fast.quiet import quiet
from dpo_fast.text import named_line

FIRST_ADAPTER = "default"  # as PEFT names the adapter that a model is loaded with
HALVES = {"BF16": torch.bfloat16, "F16": torch.float16}  # by safetensors' names


class SavedWeights:
    """A bundle's PyTorch weights, in the precision that they are stored in."""

    def __init__(self, bundle: Bundle, *, trust_remote_code: bool = False) -> None:
        """Nothing is loaded yet.

        Args:
            bundle: whose weights are loaded.
            trust_remote_code: whether the checkpoints' Python code may be run.
        """
        self._bundle, self._trust_remote_code = bundle, trust_remote_code
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._loaded: Path | None = None  # the folder beneath
        self._model: Any = None
        self._adapters: dict[str, str] = {}  # PEFT's names by role

    @contextmanager
    def of(self, role: str) -> Iterator[Any]:
        """A role's Transformers model, with the role's adapter on, if it has one, and no other.

        Raises:
            CheckpointError: Transformers or PEFT cannot load a folder.
            MissingDependencyError: a role is an adapter, and PEFT is not installed.
        """
        beneath, adapter = _folders(self._bundle, role)
        if beneath != self._loaded:
            self.close()
            self._load(beneath, role)
        if not self._adapters:
            yield self._model
        elif adapter is None:
            with self._model.disable_adapter():
                yield self._model.get_base_model()
        else:
            self._model.set_adapter(self._adapters[role])
            yield self._model.get_base_model()

    def close(self) -> None:
        """Let go of the weights."""
        if self._model is None:
            return
        self._loaded, self._model, self._adapters = None, None, {}
        gc.collect()

    def _load(self, beneath: Path, role: str) -> None:
        """Load a model, and every adapter of it."""
        folders = {other: _folders(self._bundle, other) for other in self._bundle.manifest.models}
        adapters = {other: adapter for other, (base, adapter) in folders.items() if base == beneath and adapter}
        stored = {dtype for other in (role, *adapters) for dtype in self._bundle.manifest.models[other].stored_dtypes}
        dtype = next((half for name, half in HALVES.items() if name in stored), torch.float32)
        for other, adapter in adapters.items():
            if self._model is None:
                self._model = load_model(adapter, beneath, dtype, trust_remote_code=self._trust_remote_code)
                self._adapters[other] = FIRST_ADAPTER
                continue
            try:
                with quiet():
                    self._model.load_adapter(adapter, adapter_name=other)
            except Exception as error:  # the folder's own files
                raise CheckpointError(f"{other}: PEFT cannot load this adapter ({named_line(error)})") from error
            self._adapters[other] = other
        if self._model is None:
            self._model = load_model(beneath, None, dtype, trust_remote_code=self._trust_remote_code)
        self._model = self._model.to(self.device).eval()
        self._loaded = beneath


def _folders(bundle: Bundle, role: str) -> tuple[Path, Path | None]:
    """Where a role's whole model lies, and its adapter, if it is one."""
    folder = bundle.model_folder(role)
    if (folder / ADAPTER_CONFIG).is_file():
        return bundle.folder / bundle.manifest.models[role].weights[0], folder
    return folder, None
