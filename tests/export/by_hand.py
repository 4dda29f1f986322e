"""The graph contract by hand, and PyTorch run plainly: what the exported graphs are held against.

Nothing of the product is used here but the outputs' names.
"""

import numpy as np
import torch
from tiny_models import VOCABULARY
from transformers import PreTrainedModel

from dpo_fast.export.head import OUTPUTS

Arrays = dict[str, np.ndarray]
Row = list[list[int]]  # a prompt, then its completions


def lay_out(rows: list[Row]) -> Arrays:
    """The graph contract by hand: a row is a prompt and its completions; shorter rows are padded."""
    width = max(sum(map(len, row)) for row in rows)
    ids, positions, segments, index, targets = [], [], [], [], []
    for number, (prompt, *completions) in enumerate(rows):
        row_ids, row_positions, row_segments = list(prompt), list(range(len(prompt))), [0] * len(prompt)
        for segment, completion in enumerate(completions, start=1):
            for place, token in enumerate(completion):
                here = len(row_ids)
                predicts = here - 1 if place else len(prompt) - 1
                if predicts >= 0:
                    index.append(number * width + predicts)
                    targets.append(token)
                row_ids.append(token)
                row_positions.append(len(prompt) + place)
                row_segments.append(segment)
        padding = width - len(row_ids)
        ids.append(row_ids + [0] * padding)
        positions.append(row_positions + [0] * padding)
        segments.append(row_segments + [-1] * padding)
    values = {"input_ids": ids, "position_ids": positions, "segment_ids": segments}
    values |= {"target_index": index, "target_ids": targets}
    return {name: np.array(value, np.int64) for name, value in values.items()}


@torch.inference_mode()
def plain(model: PreTrainedModel, rows: list[Row]) -> Arrays:
    """Each completion behind its prompt in a row of its own, no mask, no padding; statistics in float64."""
    found: dict[str, list[torch.Tensor]] = {name: [] for name in OUTPUTS}
    for prompt, *completions in rows:
        for completion in completions:
            sequence = torch.tensor([prompt + completion])
            targets = sequence[0, max(len(prompt), 1) :]
            logits = model(sequence, use_cache=False).logits[0].double()
            logits = logits[len(logits) - len(targets) - 1 : -1]  # the state before each target predicts it
            log_p = logits.log_softmax(-1)
            found["log_prob"].append(log_p[range(len(targets)), targets])
            found["entropy"].append(-(log_p.exp() * log_p).sum(-1))
            found["mean_logit"].append(logits.mean(-1))
            found["is_top1"].append((logits.argmax(-1) == targets).double())
            found["log_sum_sq_prob"].append(log_p.exp().square().sum(-1).log())
    return {name: torch.cat(values).numpy() for name, values in found.items()}


@torch.inference_mode()
def greedy(model: PreTrainedModel, prompt: list[int], length: int) -> list[int]:
    """The model's own first choices."""
    ids = list(prompt)
    for _ in range(length):
        ids.append(int(model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
    return ids[len(prompt) :]


def tokens(seed: int, *lengths: int) -> Row:
    return [np.random.default_rng(seed + i).integers(0, VOCABULARY, n).tolist() for i, n in enumerate(lengths)]
