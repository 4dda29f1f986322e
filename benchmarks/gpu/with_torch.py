"""The tuned PyTorch loop: what a careful engineer would write, one sequence a row, its prompt not shared.

Length-sorted batches under a token budget, right-padded so that plain causal attention needs no mask and SDPA can take
its fastest kernel; the head on the completions' states alone; log-softmax in float32; sums stay on the device until the
end. For decoders whose logits are the head's product as it is (Llama's).
"""

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from dpo_fast.token_table import TokenTable
from dpo_fast.types import Float64Array, Int64Array
from gpu.pairs import read_pairs
from gpu.torch_device import DTYPES, largest_memory, release
from gpu.turns import score_both, timed_turns

HEAD_ROWS = 4096  # states whose logits are there at a time: 2 GB in float32 with a vocabulary of 128,256


def run(
    *,
    policy: str,
    reference: str,
    data: str,
    pairs: int,
    device: str,
    precision: str,
    token_budget: int,
    turns: int,
    log_probs: str,
    started: float,
) -> Iterator[dict[str, Any]]:
    """Score a preference set under both models.

    Args:
        policy: its folder.
        reference: its folder.
        data: the preference set.
        pairs: of which so many are scored.
        device: "cuda" or "cpu".
        precision: a key of `DTYPES`.
        token_budget: of a batch, padding included.
        turns: timed ones.
        log_probs: file to write, as `gpu.turns.score_both`.
        started: when the process was, in seconds since the epoch.
    """
    table = read_pairs(Path(policy), Path(data), pairs)
    folders = {"policy": policy, "reference": reference}

    def score_role(role: str) -> tuple[Float64Array, list[float]]:
        release(device)  # the other one's
        model = load(folders[role], device, precision)
        return timed_turns(partial(score, model, table, token_budget), turns)

    result = score_both(score_role, list(folders), Path(log_probs), started)
    yield {**result, "engine": f"torch {torch.__version__}", "torch_largest_bytes": largest_memory(device)}


def load(folder: str, device: str, precision: str) -> Any:
    """A model for inference."""
    torch.set_float32_matmul_precision("highest")  # no TF32: float32 is what the others are compared with
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=DTYPES[precision], attn_implementation="sdpa")
    return model.eval().to(device)


@torch.inference_mode()
def score(model: Any, table: TokenTable, token_budget: int) -> Float64Array:
    """The log-prob of each completion, (P, 2), in nats: chosen and rejected."""
    sequences = [
        (pair.prompt_ids + completion, max(len(pair.prompt_ids), 1))
        for pair in table.pairs()
        for completion in (pair.chosen_ids, pair.rejected_ids)
    ]
    device, head = model.device, model.get_output_embeddings()
    sums = torch.zeros(len(sequences), dtype=torch.float64, device=device)
    for chosen in make_batches([len(tokens) for tokens, _ in sequences], token_budget):
        ids, *moved = lay_out([sequences[index] for index in chosen])
        of_row = np.asarray(chosen, np.int64)
        index, targets, rows = (torch.from_numpy(array).to(device, non_blocking=True) for array in moved)
        owners = torch.from_numpy(of_row).to(device, non_blocking=True)[rows]
        states = model.base_model(
            input_ids=torch.from_numpy(ids).to(device, non_blocking=True), use_cache=False
        ).last_hidden_state.flatten(0, 1)[index]
        for start in range(0, len(index), HEAD_ROWS):
            part = slice(start, start + HEAD_ROWS)
            logits = head(states[part]).float()
            losses = torch.nn.functional.cross_entropy(logits, targets[part], reduction="none")
            sums.index_add_(0, owners[part], -losses.double())
    result: Float64Array = sums.reshape(-1, 2).cpu().numpy()
    return result


def make_batches(lengths: list[int], token_budget: int) -> Iterator[list[int]]:
    """Which sequences make a batch of at most so many tokens, padding included; the longest first."""
    order = sorted(range(len(lengths)), key=lambda index: -lengths[index])
    start = 0
    while start < len(order):
        count = max(token_budget // max(lengths[order[start]], 1), 1)
        yield order[start : start + count]
        start += count


def lay_out(sequences: list[tuple[list[int], int]]) -> tuple[Int64Array, Int64Array, Int64Array, Int64Array]:
    """Sequences side by side, padded on the right.

    Args:
        sequences: token ids, and how many of them are not scored.

    Returns:
        Token ids (B, T); and of N scored tokens: the state that predicts it, row * T + column; its id; its row.
    """
    width = max(len(tokens) for tokens, _ in sequences)
    ids = np.zeros((len(sequences), width), np.int64)
    index, targets, rows = [], [], []
    for row, (tokens, first) in enumerate(sequences):
        ids[row, : len(tokens)] = tokens
        index.append(row * width + np.arange(first - 1, len(tokens) - 1))
        targets.append(np.asarray(tokens[first:], np.int64))
        rows.append(np.full(len(tokens) - first, row))
    return ids, np.concatenate(index), np.concatenate(targets), np.concatenate(rows)
