"""The data itself: pairs that are there twice, and pairs that are there the other way round as well.

Counted by the token ids, in the held-out pairs and, if there is a run on them, in the training pairs. Said where their
share is above `SHARE`.
"""

from collections.abc import Iterator

import numpy as np

from dpo_fast.advice.evidence import Evidence
from dpo_fast.advice.hints import Hint, share_above, share_text, sureness_of
from dpo_fast.compare.run_pairs import Digests, pair_keys
from dpo_fast.metrics.statistics import wilson_interval

SHARE = 0.01


def find_repeats(evidence: Evidence) -> Iterator[Hint]:
    """The hints for which the evidence speaks."""
    for name, digests in (("held-out", evidence.digests), ("training", evidence.training_digests)):
        if digests is None:
            continue
        pairs = len(digests)
        repeated, contradicted = count_repeats(digests)
        p = share_above(contradicted, pairs, SHARE)
        if sureness := sureness_of(p):
            yield Hint(
                "contradictions",
                sureness,
                f"{contradicted:,} of {pairs:,} {name} pairs, {share_text(contradicted, pairs)}, are there the other "
                "way round as well: the same prompt and completions, chosen and rejected swapped.",
                "No policy can get both right. Decide which is meant, and drop the others.",
                {"set": name, **_numbers(contradicted, pairs, p)},
            )
        p = share_above(repeated, pairs, SHARE)
        if sureness := sureness_of(p):
            yield Hint(
                "duplicates",
                sureness,
                f"{repeated:,} of {pairs:,} {name} pairs, {share_text(repeated, pairs)}, repeat one that came before, "
                "token by token.",
                "Drop the repeats: they make intervals narrower than they are, and training favours them.",
                {"set": name, **_numbers(repeated, pairs, p)},
            )


def count_repeats(digests: Digests) -> tuple[int, int]:
    """How many pairs repeat an earlier one, and how many are there the other way round as well.

    Args:
        digests: (P, 3) of prompt, chosen and rejected completion.

    Returns:
        Both counts; a pair whose completions are the same contradicts nothing.
    """
    pairs, swapped = pair_keys(digests), pair_keys(digests[:, [0, 2, 1]])
    differ = digests[:, 1] != digests[:, 2]
    return len(pairs) - len(np.unique(pairs)), int(np.isin(swapped, pairs)[differ].sum())


def _numbers(count: int, pairs: int, p: float) -> dict[str, float | int | list[float]]:
    interval = list(wilson_interval(count, pairs))
    return {"count": count, "pairs": pairs, "share": count / pairs, "share_interval": interval, "p": p}
