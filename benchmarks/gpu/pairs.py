"""The pairs as token ids, and what no evaluation of them can do without."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import safe_open

from dpo_fast.batches import arrange, make_batches
from dpo_fast.preferences import load_preferences
from dpo_fast.token_table import PROMPT, TokenTable, make_table
from dpo_fast.tokens import load_tokenizer, tokenize
from dpo_fast.types import TokenizedPair

MAX_LENGTH = 1024  # tokens; TRL's default, and an export's
HEAD = "lm_head.weight"


@dataclass(frozen=True, slots=True)
class Need:
    """What P pairs need under one model.

    Attributes:
        parameters: of the model.
        sequence_tokens: of all sequences, the prompt with each of its completions; the same for every contender.
        shared_tokens: with each prompt once.
        targets: scored tokens, each completion of a prompt once.
        body_flop: operations of the weights before the head, prompts shared; attention's own products not counted.
        head_flop: of the head, for the targets alone.
    """

    parameters: int
    sequence_tokens: int
    shared_tokens: int
    targets: int
    body_flop: float
    head_flop: float


def read_pairs(folder: Path, data: Path, limit: int) -> TokenTable:
    """The first usable pairs of a data set as a model's token ids.

    Args:
        folder: the model's, with its tokenizer.
        data: a preference set.
        limit: rows that are read.
    """
    tokenizer = load_tokenizer(folder)
    rows = load_preferences(str(data), limit=limit).rows()
    tokenized = tokenize(rows, tokenizer, max_length=MAX_LENGTH)
    return make_table([pair for pair in tokenized if isinstance(pair, TokenizedPair)])


def what_is_needed(folder: Path, table: TokenTable) -> Need:
    """Count tokens and operations as benchmarks/roofline.py does: two for each weight and token.

    Args:
        folder: of a model whose embedding and head are matrices of (vocabulary, hidden size), tied or not.
        table: the pairs.
    """
    config: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    sizes = count_parameters(folder)
    head = config["vocab_size"] * config["hidden_size"]
    body = sum(sizes.values()) - head * (2 if HEAD in sizes else 1)  # the embedding looks up, and multiplies nothing
    everything = max(int(table.tokens.size), 1)  # as one batch: every prompt once
    batches = list(make_batches(arrange(table, "shared", everything), everything))
    tokens = sum(batch.input_ids.size - batch.padding for batch in batches)
    targets = sum(batch.target_ids.size for batch in batches)
    return Need(
        parameters=sum(sizes.values()),
        sequence_tokens=int(table.lengths.sum() + table.lengths[:, PROMPT].sum()),
        shared_tokens=tokens,
        targets=targets,
        body_flop=2.0 * body * tokens,
        head_flop=2.0 * head * targets,
    )


def count_parameters(folder: Path) -> dict[str, int]:
    """The entries of each tensor in a folder's safetensors files; nothing is loaded."""
    sizes = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="numpy") as file:
            for name in file.keys():  # noqa: SIM118 - it is no mapping
                size = 1
                for length in file.get_slice(name).get_shape():
                    size *= length
                sizes[name] = size
    return sizes
