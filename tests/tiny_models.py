"""Tiny random causal LMs as Transformers folders, with a toy tokenizer: a policy and its reference.

Weights are drawn so that the models have opinions: log-probs are spread over several nats, where a fresh model's all
lie near log(1 / vocabulary) and would hide faults.
"""

import shutil
from pathlib import Path
from typing import Any

import torch
from toy_tokenizers import byte_bpe
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

VOCABULARY = 500  # more than the toy tokenizer's 449 tokens, and no multiple of the recipe's tile
RECIPE = """\
description = "tiny models: a vocabulary of several tiles, the last one smaller"
engine = "onnxruntime"
precision = "fp32"
vocabulary_tile = 128
token_budget = 256
"""

# Two layers of four heads, two of them key heads: queries in groups.
_DECODER = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": None,
    "eos_token_id": 0,
    "pad_token_id": None,
}
_SIZES: dict[str, dict[str, Any]] = {
    "gemma2": {"head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 8},
    "gpt2": {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256},
    "opt": {**_DECODER, "word_embed_proj_dim": 32, "ffn_dim": 64},
    "qwen2": {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1},
    "mistral": {"sliding_window": 8},
}


def make_config(model_type: str = "llama", **config: Any) -> PretrainedConfig:
    """A tiny configuration of an architecture; `config` are its own keys."""
    sizes = _SIZES.get(model_type, {})
    return AutoConfig.for_model(model_type, **{**({} if "vocab_size" in sizes else _DECODER), **sizes, **config})


def make_model(config: PretrainedConfig, seed: int = 0, scale: float = 0.3) -> PreTrainedModel:
    """A float32 model of a configuration; matrices are normal with deviation `scale`, vectors too, around their start.

    The start is 1 for the weights of normalisations (0 in Gemma's, which add 1) and 0 for biases.
    """
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn_like(parameter) * scale
            parameter.copy_(noise if parameter.dim() > 1 else parameter + noise)
    return model


def perturb(model: PreTrainedModel, seed: int = 1, scale: float = 0.03) -> PreTrainedModel:
    """Move every weight a little, in place: what training does, seen from far away."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.add_((noise * scale).to(parameter.dtype))
    return model


def save_model(model: PreTrainedModel, folder: Path, *, shards: int = 1) -> Path:
    """Save a model and the toy tokenizer as a Transformers folder of (about) so many shards."""
    size = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    model.save_pretrained(folder, max_shard_size="5GB" if shards == 1 else size // shards + 1)
    byte_bpe().save_pretrained(folder)
    found = len(list(folder.glob("*.safetensors")))
    assert (found == 1) == (shards == 1), f"{found} shards"
    return folder


def make_pair(
    folder: Path, *, model_type: str = "llama", dtype: torch.dtype = torch.float32, shards: int = 1, **config: Any
) -> tuple[Path, Path]:
    """Make FOLDER/policy and FOLDER/reference, the reference being the policy with every weight moved a little."""
    model = make_model(make_config(model_type, **config)).to(dtype)
    policy = save_model(model, folder / "policy", shards=shards)
    reference = save_model(perturb(model), folder / "reference", shards=shards)
    return policy, reference


def write_recipe(folder: Path) -> Path:
    """A recipe whose tile does not divide the tiny vocabulary."""
    path = folder / "tiny.toml"
    path.write_text(RECIPE, encoding="utf-8")
    return path


def copy_checkpoint(folder: Path, target: Path) -> Path:
    """A checkpoint that a test may damage."""
    return Path(shutil.copytree(folder, target))
