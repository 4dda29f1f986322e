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
# One expert layer of four experts, two for each token, under the names that most families use.
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
_LOCAL_EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
_ROUTED_EXPERTS = {
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "first_k_dense_replace": 1,
    "n_group": 2,
    "topk_group": 1,
}
# A sliding layer, then a full one.
_WINDOWED = {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}
_LATENT = {  # MLA: keys and values from one small vector, heads of values of another size
    "q_lora_rank": 16,
    "kv_lora_rank": 8,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 8,
    "v_head_dim": 6,
    "num_key_value_heads": 4,
}
_DELTA_RULE = {
    "head_dim": 8,
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "layer_types": ["linear_attention", "full_attention"],
}
# Chunks shorter than the sequences, and no divisor of their lengths.
_STATE_SPACE = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_chunk_size": 16}
_SPECIAL_TOKENS = {"bos_token_id": None, "eos_token_id": 0, "pad_token_id": None}
_GPT = {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256, **_SPECIAL_TOKENS}
_MAMBA = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, **_SPECIAL_TOKENS}
# What a family needs beside _DECODER; all that it takes, where it has names of its own (there is a vocab_size).
_SIZES: dict[str, dict[str, Any]] = {
    "bamba": {**_STATE_SPACE, "attn_layer_indices": [1]},
    "bloom": {"vocab_size": VOCABULARY, "hidden_size": 32, "n_layer": 2, "n_head": 4, **_SPECIAL_TOKENS},
    "codegen": {**_GPT, "rotary_dim": 4},
    "cohere2": _WINDOWED,
    "deepseek_v2": {**_ROUTED_EXPERTS, **_LATENT, "topk_method": "group_limited_greedy", "n_shared_experts": 1},
    "deepseek_v3": {**_ROUTED_EXPERTS, **_LATENT, "n_shared_experts": 1},
    "exaone4": _WINDOWED,
    "falcon_h1": {**_STATE_SPACE, "mamba_d_ssm": 32, "mamba_d_head": 8, "head_dim": 8},
    "falcon_mamba": {**_MAMBA, "state_size": 4},
    "gemma": {"head_dim": 8},
    "gemma2": {"head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 8},
    "gemma3_text": {"head_dim": 8, "query_pre_attn_scalar": 8, **_WINDOWED},
    "glm": {"head_dim": 8, "partial_rotary_factor": 0.5},
    "glm4": {"head_dim": 8, "partial_rotary_factor": 0.5},
    "gpt2": _GPT,
    "gpt_bigcode": _GPT,
    "gpt_neo": {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "num_layers": 2,
        "num_heads": 4,
        "attention_types": [[["global", "local"], 1]],
        "window_size": 8,
        "max_position_embeddings": 256,
        **_SPECIAL_TOKENS,
    },
    "gpt_oss": {**_LOCAL_EXPERTS, **_WINDOWED, "head_dim": 8},
    "gptj": {**_GPT, "rotary_dim": 4},
    "granitemoe": _LOCAL_EXPERTS,
    "jamba": {
        **_LOCAL_EXPERTS,
        "num_experts": 4,
        "expert_layer_period": 2,
        "expert_layer_offset": 1,
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "mamba_d_state": 4,
        "mamba_dt_rank": 4,
        "use_mamba_kernels": False,
    },
    "lfm2": {"layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False},
    "llama4_text": {
        **_LOCAL_EXPERTS,
        "num_experts_per_tok": 1,
        "head_dim": 8,
        "intermediate_size_mlp": 64,
        "interleave_moe_layer_step": 2,
        "attention_chunk_size": 8,
        "layer_types": ["chunked_attention", "full_attention"],
        "no_rope_layers": [1, 0],
    },
    "mamba": {**_MAMBA, "state_size": 4},
    "mamba2": {**_MAMBA, "state_size": 8, "num_heads": 8, "head_dim": 8, "n_groups": 2, "chunk_size": 16},
    "ministral": {**_WINDOWED, "head_dim": 8},
    "mistral": {"sliding_window": 8},
    "mixtral": _LOCAL_EXPERTS,
    "mpt": {
        "vocab_size": VOCABULARY,
        "d_model": 32,
        "n_heads": 4,
        "n_layers": 2,
        "max_seq_len": 256,
        "expansion_ratio": 2,
        **_SPECIAL_TOKENS,
    },
    "olmo3": _WINDOWED,
    "olmoe": {"num_experts": 4, "num_experts_per_tok": 2},
    "opt": {**_DECODER, "word_embed_proj_dim": 32, "ffn_dim": 64},
    "phi": {"num_key_value_heads": 4, "partial_rotary_factor": 0.5},
    "qwen2": {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1},
    "qwen2_moe": {**_EXPERTS, "shared_expert_intermediate_size": 16},
    "qwen3": {"head_dim": 8},
    "qwen3_5_text": _DELTA_RULE,
    "qwen3_moe": {**_EXPERTS, "head_dim": 8, "norm_topk_prob": True},
    "qwen3_next": {**_EXPERTS, **_DELTA_RULE, "shared_expert_intermediate_size": 16},
    "seed_oss": {"head_dim": 8},
    "smollm3": {"no_rope_layer_interval": 2},
    "stablelm": {"partial_rotary_factor": 0.5},
    "starcoder2": {"sliding_window": 8},
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
