"""The LM head, where it counts: from states to the graph contract's outputs, with the vocabulary in tiles."""

from dataclasses import dataclass
from functools import reduce
from typing import Any

import torch
from transformers import PretrainedConfig, PreTrainedModel

OUTPUTS = ("log_prob", "entropy", "mean_logit", "is_top1", "log_sum_sq_prob")


@dataclass(frozen=True)
class LogitTerm:
    """A summand of the logits of N states: states @ weightᵀ + bias_factor · bias, stretched by column.

    A plain head is one term; an adapter of the head adds its own (`dpo_fast.export.gated_layers`).

    Attributes:
        states: (N, K).
        weight: (V, K).
        bias: (V,), or None.
        bias_factor: of the bias in each row, (N, 1), or 1.
        stretches: the term's matrix product is multiplied by 1 + row · column for each (N, 1) and (V,) here.
    """

    states: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor | None
    bias_factor: torch.Tensor | float = 1.0
    stretches: tuple[tuple[torch.Tensor, torch.Tensor], ...] = ()

    def logits(self, start: int, stop: int) -> torch.Tensor:
        """The term's part of the logits of a tile of the vocabulary, (N, stop - start)."""
        logits = self.states @ self.weight[start:stop].t()
        for row, column in self.stretches:
            logits = logits * (1 + row * column[start:stop])
        return logits if self.bias is None else logits + self.bias[start:stop] * self.bias_factor

    def mean(self) -> torch.Tensor:
        """The mean over the vocabulary, (N, 1): that of h·w is h·mean(w), one dot product instead of all logits."""
        mean = self.states @ self.weight.mean(0)[:, None]
        for row, column in self.stretches:
            mean = mean + row * (self.states @ (column @ self.weight / len(self.weight))[:, None])
        return mean if self.bias is None else mean + self.bias.mean() * self.bias_factor


def logit_terms(head: Any, hidden: torch.Tensor, gates: torch.Tensor | None) -> list[LogitTerm]:
    """The terms of an LM head's logits, of states (N, H) whose rows have gates (N, adapters)."""
    terms = [LogitTerm(hidden, head.weight, getattr(head, "bias", None))]
    if gates is not None:
        for index, branch in getattr(head, "branches", ()):
            terms = branch.add_to_head(head, terms, hidden, gates[:, index, None])
    return terms


def score(
    model: PreTrainedModel,
    hidden: torch.Tensor,
    target_ids: torch.Tensor,
    vocabulary_tile: int,
    gates: torch.Tensor | None = None,
) -> dict[str, torch.Tensor]:
    """The graph contract's outputs, (N,) each, of states (N, H), with the vocabulary in tiles.

    For a tile t with logits z and softmax p: ``lse_t = max(z) - log(max(p))``, in which nothing overflows and the
    largest probability never underflows. Tiles combine by ``lse = logsumexp(lse_t)``.
    """
    config = model.config.get_text_config()
    head = model.get_output_embeddings()
    scale, softcap = logit_scale(config), getattr(config, "final_logit_softcapping", None)
    vocabulary = head.weight.shape[0]
    terms = logit_terms(head, hidden, gates)
    target_logit = torch.zeros_like(hidden[:, 0])
    tops, firsts, lses, expected, squares, means = [], [], [], [], [], []
    for start in range(0, vocabulary, vocabulary_tile):
        stop = min(start + vocabulary_tile, vocabulary)
        logits = reduce(torch.add, [term.logits(start, stop) for term in terms])  # (N, tile)
        logits = _transform(logits, scale, softcap)
        probability = logits.softmax(-1)
        top = logits.amax(-1)
        tops.append(top)
        firsts.append(logits.argmax(-1) + start)
        lses.append(top - probability.amax(-1).log())
        expected.append((probability * logits).sum(-1))
        squares.append((probability * probability).sum(-1))
        if softcap is not None:
            means.append(logits.sum(-1) / vocabulary)
        inside = (target_ids >= start) & (target_ids < stop)
        # The very number that the other logits are compared with: a dot product of its own would round differently.
        gathered = logits.gather(1, (target_ids - start).clamp(0, stop - start - 1)[:, None])[:, 0]
        target_logit = target_logit + torch.where(inside, gathered, 0.0)
    stacked = torch.stack(lses)  # (tiles, N)
    highest = stacked.amax(0)
    lse = highest + (stacked - highest).exp().sum(0).log()
    share = (stacked - lse).exp()  # (tiles, N): the probability that falls into each tile
    # The first of the largest logits, as argmax over the whole vocabulary would find it.
    best_tile = torch.stack(tops).argmax(0)  # (N,)
    first = torch.stack(firsts).gather(0, best_tile[None])[0]
    if softcap is None:
        mean_logit = reduce(torch.add, [term.mean() for term in terms])[:, 0] * scale
    else:
        mean_logit = torch.stack(means).sum(0)
    return {
        "log_prob": target_logit - lse,
        "entropy": lse - (share * torch.stack(expected)).sum(0),
        "mean_logit": mean_logit,
        "is_top1": (first == target_ids).to(torch.float32),
        "log_sum_sq_prob": (share * share * torch.stack(squares)).sum(0).log(),
    }


def _transform(logits: torch.Tensor, scale: float, softcap: float | None) -> torch.Tensor:
    """Scale, then soft cap: the order in which every architecture that has both applies them."""
    if scale != 1.0:
        logits = logits * scale
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def logit_scale(config: PretrainedConfig) -> float:
    """The factor that the architecture multiplies its logits by (trl/trainer/utils.py, `add_fused_lm_head`)."""
    for name in ("logit_scale", "output_multiplier", "lm_head_multiplier"):
        factor = getattr(config, name, None)
        if factor is not None:
            return float(factor)
    divisor = getattr(config, "logits_scaling", None)
    if divisor is None:
        return 1.0
    return float(divisor) if config.model_type == "hyperclovax" else 1.0 / float(divisor)
