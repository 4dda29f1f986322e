"""Tiny random models of several families, with sizes that a GPU's own kernels take."""

import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from dpo_fast.files import new_folder

# Heads of 32, and a vocabulary that no tile divides.
HIDDEN, VOCABULARY, POSITIONS, WINDOW = 128, 1000, 256, 16
END = "<|endoftext|>"
_DECODER: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": POSITIONS,
}
# By family: how its configuration differs, and what it is here for.
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": _DECODER,
    "qwen2": _DECODER,  # biases of queries, keys and values
    "mistral": {**_DECODER, "sliding_window": WINDOW},
    "gemma2": {  # soft caps, the attention's so low that it shows; head and embedding tied
        **_DECODER,
        "head_dim": 32,
        "query_pre_attn_scalar": 32,
        "sliding_window": WINDOW,
        "attn_logit_softcapping": 1.0,
    },
    "gpt2": {"vocab_size": VOCABULARY, "n_embd": HIDDEN, "n_layer": 2, "n_head": 4, "n_positions": POSITIONS},
    "phi3": _DECODER,  # queries, keys and values in one product
    "mixtral": {**_DECODER, "num_local_experts": 4, "num_experts_per_tok": 2},
}
# Deviation of a weight, so that states keep their size, and logits are spread over several units.
DEVIATION = 1.5 / HIDDEN**0.5
CALIBRATION = [
    {"prompt": f"Human: tell me about {thing}.\n\nAssistant:", "chosen": f" Gladly: {thing}.", "rejected": " No."}
    for thing in ("the sea", "a pen", "seven colours", "Zürich", "def add(a, b): return a + b", "rain")
]


def make_family(name: str, work: Path) -> Path:
    """The folder of a family's float32 model and its tokenizer, made if it is not there.

    Args:
        name: a key of `FAMILIES`.
        work: where it is made.
    """
    folder = work / name
    if folder.exists():
        return folder
    special = {"bos_token_id": None, "eos_token_id": 0, "pad_token_id": None}
    config = AutoConfig.for_model(name, **{**FAMILIES[name], **special})
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn_like(parameter) * DEVIATION
            # Vectors around where they start: biases 0, normalisations' weights 1.
            parameter.copy_(noise if parameter.dim() > 1 else parameter + noise)
    with new_folder(folder, overwrite=False, marker="config.json") as working:
        model.save_pretrained(working)
        byte_tokenizer().save_pretrained(working)
    return folder


def byte_tokenizer() -> Any:
    """One token a byte."""
    letters = [END, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE({letter: index for index, letter in enumerate(letters)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END)


def write_calibration(work: Path) -> Path:
    """A few pairs as JSONL, for recipes that choose the scales of activations from some."""
    path = work / "calibration.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in CALIBRATION), encoding="utf-8")
    return path
