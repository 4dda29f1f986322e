"""A causal LM's log-prob graph, traced from its configuration alone: no weights are loaded.

The traced forward takes rows of ``[prompt | completion 1 | completion 2 ...]`` and puts out, for each scored token,
what `dpo_fast.types.TokenScores` holds::

    input_ids     p0 p1 p2 c0 c1 r0 r1 r2 --
    segment_ids    0  0  0  1  1  2  2  2 -1     0 the prompt, k >= 1 completion k, -1 padding
    position_ids   0  1  2  3  4  3  4  5  0     every completion continues the prompt's positions
    predicts            c0 c1     r1 r2          the state at p2 predicts both c0 and r0
                        r0

A state sees itself, what precedes it in its own segment, and the prompt.
"""

import inspect
from typing import Any

import onnx_ir as ir
import torch
import transformers
from accelerate import init_empty_weights
from onnxscript.optimizer import optimize_ir
from transformers import AttentionInterface, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.exporters import OnnxConfig, OnnxExporter

from dpo_fast.errors import CheckpointError
from dpo_fast.quiet import quiet

INPUTS = {
    "input_ids": ["B", "T"],
    "position_ids": ["B", "T"],
    "segment_ids": ["B", "T"],
    "target_index": ["N"],
    "target_ids": ["N"],
}
OUTPUTS = ("log_prob", "entropy", "mean_logit", "is_top1", "log_sum_sq_prob")

# Constants up to this many elements are folded into the graph; parameters never are, they have no value here.
FOLDING_LIMIT = 4096
ATTENTION = "dpo_fast_grouped"


def grouped_attention(
    module: torch.nn.Module,
    query: torch.Tensor,  # (B, heads, T, D)
    key: torch.Tensor,  # (B, key heads, T, D)
    value: torch.Tensor,  # (B, key heads, T, D of values)
    attention_mask: torch.Tensor,  # (B, 1, T, T), added to the scores
    scaling: float | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Scaled dot-product attention in which the query heads of one key head are rows of one matrix product.

    Keys and values are not repeated for grouped queries, as Transformers' own functions do.
    """
    batch, heads, length, size = query.shape
    key_heads = key.shape[1]
    groups = heads // key_heads
    scaling = size**-0.5 if scaling is None else scaling
    query = (query * scaling).reshape(batch, key_heads, groups * length, size)
    scores = (query @ key.transpose(2, 3)).reshape(batch, key_heads, groups, length, length)
    probability = (scores + attention_mask[:, :, None]).softmax(-1)
    attended = probability.reshape(batch, key_heads, groups * length, length) @ value
    return attended.reshape(batch, heads, length, value.shape[-1]).transpose(1, 2).contiguous(), None


def trace(config: PretrainedConfig, *, vocabulary_tile: int, trust_remote_code: bool = False) -> ir.Model:
    """Trace the log-prob graph of a configuration's causal LM, in float32, with parameters that have no values yet.

    Args:
        config: the model's configuration.
        vocabulary_tile: how many columns of the vocabulary the head computes at a time.
        trust_remote_code: whether the configuration's own Python code may be run.

    Returns:
        The graph; its unbound initializers carry the parameters' names (`dpo_fast.export.weights` binds them).

    Raises:
        CheckpointError: the architecture cannot be exported.
    """
    AttentionInterface.register(ATTENTION, grouped_attention)
    with torch.device("meta"):
        model = _build(config, trust_remote_code)
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    _add_log_prob_forward(model, vocabulary_tile)
    meta = torch.device("meta")
    # Sizes that differ from each other, and from 1: equal ones would be taken for the same dimension.
    sample = {name: torch.zeros(2, 24, dtype=torch.long, device=meta) for name in INPUTS if name.endswith("ids")}
    sample |= {name: torch.zeros(16, dtype=torch.long, device=meta) for name in ("target_index", "target_ids")}
    # DYNAMIC, not AUTO: a size that tracing would fix to the sample's is an error.
    shapes = {name: dict.fromkeys(range(len(INPUTS[name])), torch.export.Dim.DYNAMIC) for name in sample}
    settings = OnnxConfig(dynamic=True, dynamic_shapes=shapes, optimize=False)
    # Computed buffers (rotary frequencies) are traced without values too: take them from a model whose parameters
    # alone are empty.
    with init_empty_weights(include_buffers=False):
        buffers = dict(_build(config, trust_remote_code).named_buffers())
    with quiet():
        try:
            graph: ir.Model = OnnxExporter().export(model, sample, config=settings).program
            for name, value in graph.graph.initializers.items():
                if name in parameters:
                    value.const_value = None
                elif name in buffers:
                    value.const_value = ir.tensor(buffers[name].numpy(), name=name)
            optimize_ir(graph, input_size_limit=FOLDING_LIMIT, output_size_limit=FOLDING_LIMIT)
        except Exception as error:  # exporters and optimisers fail in as many ways as there are architectures
            raise CheckpointError(
                f"{type(config).__name__}: this architecture cannot be exported ({_first_line(error)}); "
                f"transformers {transformers.__version__}, torch {torch.__version__}"
            ) from error
    _divide_by_roots(graph)
    _name_dimensions(graph)
    return graph


def _build(config: PretrainedConfig, trust_remote_code: bool) -> PreTrainedModel:
    """The configuration's causal LM in evaluation mode, with our attention where the model takes any."""
    try:
        cls = transformers.MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
        attention = ATTENTION if cls is None or getattr(cls, "_supports_sdpa", False) else "eager"
        model = AutoModelForCausalLM.from_config(
            config, dtype=torch.float32, attn_implementation=attention, trust_remote_code=trust_remote_code
        )
    except (ValueError, KeyError, ImportError) as error:
        raise CheckpointError(
            f"model type {config.model_type!r} is not a causal LM that can be built: {_first_line(error)}"
        ) from error
    takes = inspect.signature(model.base_model.forward).parameters
    if model.base_model is model or not {"position_ids", "attention_mask"} <= set(takes):
        raise CheckpointError(
            f"model type {config.model_type!r} takes no position_ids and attention_mask of its own, "
            "so its completions cannot share a prompt; it cannot be exported yet"
        )
    return model.eval()


def _add_log_prob_forward(model: PreTrainedModel, vocabulary_tile: int) -> None:
    """Give the model a forward that returns the graph contract's outputs.

    A subclass of the model's own class passes every check of the exporter that a foreign wrapper fails.
    """

    class LogProb(type(model)):  # type: ignore[misc]
        def forward(
            self,
            input_ids: torch.Tensor,
            position_ids: torch.Tensor,
            segment_ids: torch.Tensor,
            target_index: torch.Tensor,
            target_ids: torch.Tensor,
        ) -> dict[str, torch.Tensor]:
            hidden = self.base_model(
                input_ids=input_ids,
                position_ids=position_ids,
                attention_mask=_attention_mask(self.config, position_ids, segment_ids),
                use_cache=False,
            ).last_hidden_state  # (B, T, H)
            hidden = hidden.reshape(-1, hidden.shape[-1])[target_index]  # (N, H)
            return _score(self, hidden, target_ids, vocabulary_tile)

    model.__class__ = LogProb


def _attention_mask(
    config: PretrainedConfig, position_ids: torch.Tensor, segment_ids: torch.Tensor
) -> torch.Tensor | dict[str, torch.Tensor]:
    """The masks that the model's layers add to their scores: (B, 1, T, T) float32, 0 where a state may look.

    A model with sliding windows measures distance in positions, so that it is the same with the prompt shared. It
    takes one mask for each kind of layer; a plain mask would silently drop the window.
    """
    text_config = config.get_text_config()
    length = segment_ids.shape[1]
    column = torch.arange(length, device=segment_ids.device)
    earlier = column[None, :] <= column[:, None]  # (T, T)
    of, seen = segment_ids[:, :, None], segment_ids[:, None, :]
    allowed = earlier[None] & ((seen == 0) | (seen == of))  # (B, T, T)
    window = getattr(text_config, "sliding_window", None)
    kinds = set(getattr(text_config, "layer_types", None) or ())
    full = _additive(allowed)
    if window is None:
        return dict.fromkeys(kinds, full) if len(kinds) > 1 else full
    distance = position_ids[:, :, None] - position_ids[:, None, :]
    sliding = _additive(allowed & (distance < window))
    return {"full_attention": full, "sliding_attention": sliding} if kinds else sliding


def _additive(allowed: torch.Tensor) -> torch.Tensor:
    """0 where allowed, else the lowest float32, from (B, T, T) to (B, 1, T, T)."""
    return (~allowed[:, None]).to(torch.float32) * torch.finfo(torch.float32).min


def _score(
    model: PreTrainedModel, hidden: torch.Tensor, target_ids: torch.Tensor, vocabulary_tile: int
) -> dict[str, torch.Tensor]:
    """The graph contract's outputs, (N,) each, of states (N, H), with the vocabulary in tiles.

    For a tile t with logits z and softmax p: ``lse_t = max(z) - log(max(p))``, in which nothing overflows and the
    largest probability never underflows. Tiles combine by ``lse = logsumexp(lse_t)``.
    """
    config = model.config.get_text_config()
    head = model.get_output_embeddings()
    scale, softcap = logit_scale(config), getattr(config, "final_logit_softcapping", None)
    vocabulary = head.weight.shape[0]
    bias = getattr(head, "bias", None)
    target_logit = torch.zeros_like(hidden[:, 0])
    tops, firsts, lses, expected, squares, means = [], [], [], [], [], []
    for start in range(0, vocabulary, vocabulary_tile):
        stop = min(start + vocabulary_tile, vocabulary)
        logits = hidden @ head.weight[start:stop].t()  # (N, tile)
        if bias is not None:
            logits = logits + bias[start:stop]
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
        # The mean over the vocabulary of h·w is h·mean(w): one dot product instead of a pass over all logits.
        mean_logit = hidden @ head.weight.mean(0)
        mean_logit = (mean_logit if bias is None else mean_logit + bias.mean()) * scale
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


def _divide_by_roots(model: ir.Model) -> None:
    """Turn ``x * (1 / sqrt(y))`` into ``x / sqrt(y)``, the form that ONNX Runtime fuses into one normalisation."""
    for node in list(model.graph):
        if node.op_type != "Reciprocal":
            continue
        root = node.inputs[0]
        source = root.producer() if root is not None else None
        uses = list(node.outputs[0].uses())
        if source is None or source.op_type != "Sqrt" or len(uses) != 1:
            continue
        product = uses[0].node
        if product.op_type != "Mul":
            continue
        other = product.inputs[1 - uses[0].idx]
        quotient = ir.node("Div", [other, root])
        quotient.outputs[0].shape, quotient.outputs[0].type = product.outputs[0].shape, product.outputs[0].type
        quotient.outputs[0].name = product.outputs[0].name
        model.graph.insert_before(product, quotient)
        product.outputs[0].replace_all_uses_with(quotient.outputs[0])
        model.graph.remove([product, node], safe=True)


def _name_dimensions(model: ir.Model) -> None:
    """Give inputs and outputs the contract's names of dimensions: B rows, T columns, N targets."""
    for value in model.graph.inputs:
        value.shape = ir.Shape(INPUTS[str(value.name)])
    for value in model.graph.outputs:
        value.shape = ir.Shape(["N"])


def _first_line(error: BaseException) -> str:
    """An exception's first line, shortened: exporters append pages."""
    lines = str(error).strip().splitlines()
    return (lines[0] if lines else type(error).__name__)[:200]
