"""Adapters inside a graph: branches beside the base model's own modules, each turned on or off by row.

One graph serves the base model, the policy and a reference adapter; the weights of the base are in it once::

    LoRA      y = W x + gate · scaling · B(A x)                                       (arXiv:2106.09685, eq. 3)
    DoRA      y = W x + gate · ((c - 1) · W x + c · scaling · B(A x)),
              c = magnitude / ‖W + scaling · B A‖, by output                          (arXiv:2402.09353, eq. 5)
    replaced  y = gate > 0 ? saved(x) : base(x)                                       (PEFT's modules_to_save)

A gate is 0 or 1. At most one adapter is on in a row. The modules keep their parameters and names; a branch's own are
named ``<module>.adapter_<index>.<name>``.
"""

import copy
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from dpo_fast.export.adapters import AdaptedModules, LowRank, features
from dpo_fast.export.head import LogitTerm


class Gates:
    """The gates of the rows that a forward is at, set before the base model runs."""

    columns: Sequence[torch.Tensor]

    def set(self, rows: torch.Tensor) -> None:
        """Take gates (B, adapters), float32; `columns` has each adapter's, (B, 1, 1)."""
        self.columns = rows[:, :, None, None].unbind(1)


class LowRankBranch(nn.Module):
    """One adapter's LoRA or DoRA of a linear layer or an embedding."""

    lora_A: torch.Tensor  # noqa: N815 - PEFT's names
    lora_B: torch.Tensor  # noqa: N815
    lora_bias: torch.Tensor | None
    magnitude: torch.Tensor | None

    def __init__(self, module: nn.Module, change: LowRank) -> None:
        """Parameters in the shapes that PEFT stores them in: A (rank, in), B (out, rank)."""
        super().__init__()
        self.scaling = change.scaling
        shapes = change.shapes(*features(module))
        for name in ("lora_A", "lora_B", "lora_bias", "magnitude"):
            self.register_parameter(name, nn.Parameter(torch.empty(shapes[name])) if name in shapes else None)

    def apply_to(self, module: Any, result: torch.Tensor, gate: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """The module's result (B, T, out), or (B * T, out), for inputs x, with the branch added where it is on."""
        if isinstance(module, nn.Embedding):
            low = F.embedding(x, self.lora_A.t())
            scale: Any = getattr(module, "embed_scale", None)
            if scale is not None:  # Gemma's: PEFT scales what is looked up as the embedding does
                low = low * scale
        else:
            low = x @ self.lora_A.t()
        low = times(low, gate)
        b = self.scaled_b()
        if self.magnitude is None:
            result = result + low @ b.t()
        else:
            stretch = self.stretch(module, self.magnitude)
            bias = getattr(module, "bias", None)
            unbiased = result if bias is None else result - bias
            result = result + times(unbiased * (stretch - 1), gate) + low @ (stretch[:, None] * b).t()
        if self.lora_bias is not None:
            result = result + times((self.lora_bias * self.scaling).expand(result.shape), gate)
        return result

    def add_to_head(
        self, head: Any, terms: list[LogitTerm], hidden: torch.Tensor, gate: torch.Tensor
    ) -> list[LogitTerm]:
        """The same for an LM head, as terms of its logits, of states (N, H) and their rows' gates (N, 1)."""
        low = hidden @ self.lora_A.t() * gate
        weight = self.scaled_b()
        if self.magnitude is not None:
            stretch = self.stretch(head, self.magnitude)
            terms = [replace(terms[0], stretches=(*terms[0].stretches, (gate, stretch - 1))), *terms[1:]]
            weight = stretch[:, None] * weight
        return [*terms, LogitTerm(low, weight, self.lora_bias, gate * self.scaling)]

    def scaled_b(self) -> torch.Tensor:
        """B times the branch's scaling, (out, rank): constant, so an engine computes it when it loads."""
        return self.lora_B * self.scaling

    def stretch(self, module: Any, magnitude: torch.Tensor) -> torch.Tensor:
        """DoRA's c = magnitude / ‖W + s B A‖ by output, (out,): constant, so an engine computes it when it loads.

        With b = s B by row: ‖w + bA‖² = ‖w‖² + b·(2 A w + A Aᵀ b): no matrix of W's size is made beside W.
        """
        stored_by_input = isinstance(module, (nn.Embedding, Conv1D))  # (in, out), where a linear layer has (out, in)
        weight, a, b = module.weight, self.lora_A, self.scaled_b()
        length = torch.linalg.vector_norm(weight, dim=0 if stored_by_input else 1)
        product = (a @ weight).t() if stored_by_input else weight @ a.t()  # (out, rank)
        square = length * length + (b * (2 * product + b @ (a @ a.t()))).sum(1)
        stretch: torch.Tensor = magnitude / square.sqrt()
        return stretch


class ReplacementBranch:
    """One adapter's own copy of a module."""

    def __init__(self, module: nn.Module) -> None:
        self.module = copy.deepcopy(module)

    def apply_to(
        self, module: Any, result: torch.Tensor, gate: torch.Tensor, *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        """The copy's result where it is on, else the module's."""
        on = times(torch.ones_like(result[..., :1]), gate) > 0
        return torch.where(on, self.module(*args, **kwargs), result)

    def add_to_head(
        self, head: Any, terms: list[LogitTerm], hidden: torch.Tensor, gate: torch.Tensor
    ) -> list[LogitTerm]:
        """Terms of the logits of states (N, H), their rows' gates being (N, 1).

        The states of a row go to one head or the other, and are 0 in the one not meant.
        """
        off = [
            replace(term, states=term.states * (1 - gate), bias_factor=term.bias_factor * (1 - gate)) for term in terms
        ]
        saved: Any = self.module
        return [*off, LogitTerm(hidden * gate, saved.weight, getattr(saved, "bias", None), gate)]


def install(model: PreTrainedModel, adapters: Sequence[AdaptedModules]) -> Gates:
    """Add the adapters' branches to a model's modules, in place, without values.

    Each adapted module becomes an instance of a subclass of its own class, so that its parameters keep their names.

    Args:
        model: the base model.
        adapters: which modules each adapter changes; an adapter's index here is its column of the gates.

    Returns:
        What the gates are set on before the model runs.
    """
    gates = Gates()
    # All branches first: a replacement is a copy of the module without branches.
    branches = [
        (index, model.get_submodule(path), change)
        for index, modules in enumerate(adapters)
        for path, change in modules.items()
    ]
    made = [
        (index, module, LowRankBranch(module, change) if isinstance(change, LowRank) else ReplacementBranch(module))
        for index, module, change in branches
    ]
    for index, module, branch in made:
        if "branches" not in vars(module):
            _gate(module, gates)
        module.branches.append((index, branch))
        own = branch if isinstance(branch, LowRankBranch) else branch.module
        module.add_module(f"adapter_{index}", own)
    return gates


def _gate(module: Any, gates: Gates) -> None:
    """Give a module a forward that applies its branches."""

    class Gated(type(module)):  # type: ignore[misc]
        def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
            result: torch.Tensor = super().forward(*args, **kwargs)
            for index, branch in self.branches:
                result = branch.apply_to(self, result, gates.columns[index], *args, **kwargs)
            return result

    module.__class__ = Gated
    module.branches = []


def times(value: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
    """Multiply each row of value, (B, ..., F) or flattened to (B * T, F), by its gate (B, 1, 1)."""
    if value.dim() == 2:
        return (value.reshape(gate.shape[0], -1, value.shape[-1]) * gate).reshape(value.shape)
    return value * (gate if value.dim() == 3 else gate.reshape(-1, *[1] * (value.dim() - 1)))
