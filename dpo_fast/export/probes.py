"""Pairs of random tokens, on which a graph is compared with its model."""

import numpy as np

from dpo_fast.types import TokenizedPair

# Tokens of (prompt, chosen, rejected): the shortest possible, prompts and completions longer and shorter than another.
PROBES = ((5, 3, 7), (1, 1, 1), (17, 12, 4), (2, 40, 40), (61, 20, 33))
SEED = 20_240_607
LONGEST_WINDOW = 1024  # tokens; a longer window takes too long to pass here


def make_probes(vocabulary: int, *, window: int | None = None, positions: int | None = None) -> list[TokenizedPair]:
    """Pairs of several shapes, and one past a sliding window, where it is short enough to run here.

    The last one has the first one's prompt and one of its completions, so that a row of three completions is among
    them where the prompt is shared.

    Args:
        vocabulary: token ids are below it.
        window: the model's sliding window in tokens, if it has one.
        positions: longest sequence in tokens that the model has positions for; longer probes are left out.
    """
    generator = np.random.default_rng(SEED)
    shapes = list(PROBES)
    if window and window <= LONGEST_WINDOW:
        shapes.append((window + 3, 9, 5))
    pairs = []
    for row, (prompt, chosen, rejected) in enumerate(shapes, start=1):
        if positions and prompt + max(chosen, rejected) > positions:
            continue
        ids = generator.integers(0, vocabulary, prompt + chosen + rejected).tolist()
        pairs.append(TokenizedPair(row, ids[:prompt], ids[prompt : prompt + chosen], ids[prompt + chosen :]))
    if pairs:
        first = pairs[0]
        room = 6 if positions is None else min(6, positions - len(first.prompt_ids))
        other = generator.integers(0, vocabulary, room).tolist()
        pairs.append(TokenizedPair(len(shapes) + 1, first.prompt_ids, other, first.rejected_ids))
    return pairs
