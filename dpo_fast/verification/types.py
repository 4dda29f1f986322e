"""What is compared, and the small results that several comparisons share.

Shapes use P (pairs) and C (scored tokens of one branch, all pairs together). Logs are natural, in nats. A number that
cannot be had (the correlation of constants, the share of no tokens) is None, so that every result can be JSON.
"""

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from dpo_fast.types import Float32Array, Int64Array

Outcome = Literal["pass", "fail", "cannot tell"]
Interval = tuple[float, float]  # 95 %: the lower and the upper end
COMPLETIONS = ("policy_chosen", "policy_rejected", "reference_chosen", "reference_rejected")
# Outputs of the graph contract that a served engine may not give.
OPTIONAL = ("is_top1", "entropy", "log_sum_sq_prob")


@dataclass(frozen=True, slots=True)
class ScoredTokens:
    """One model's scores of one branch of P pairs, token by token: the graph contract's outputs.

    Attributes:
        offsets: (P + 1,) int64: the tokens of pair p are those from `offsets[p]` up to `offsets[p + 1]`.
        log_probs: (C,) float32, nats.
        is_top1: (C,) 0 or 1: the token is the model's first choice; None where the engine does not say.
        entropy: (C,) float32, nats, of the distribution that predicts the token; or None.
        log_sum_sq_prob: (C,) float32, nats: log of the sum over the vocabulary of p^2; or None.

    Raises:
        ValueError: an array is not one-dimensional.
    """

    offsets: Int64Array
    log_probs: Float32Array
    is_top1: NDArray[Any] | None = None
    entropy: Float32Array | None = None
    log_sum_sq_prob: Float32Array | None = None

    def __post_init__(self) -> None:
        """Refuse what has another shape than a list; everything else is for the integrity check to say."""
        for name in ("offsets", "log_probs", *OPTIONAL):
            values = getattr(self, name)
            if values is not None and np.ndim(values) != 1:
                raise ValueError(f"{name} has shape {np.shape(values)}: one dimension is needed")

    @property
    def lengths(self) -> Int64Array:
        """(P,) scored tokens of each completion."""
        return np.diff(self.offsets)


@dataclass(frozen=True, slots=True)
class Scoring:
    """One scoring of P pairs, by the original or by an engine.

    Attributes:
        rows: (P,) int64, 1-based row numbers in the data set, as the scores came.
        policy_chosen, policy_rejected: the policy's scores.
        reference_chosen, reference_rejected: the reference's scores, both None without one.
    """

    rows: Int64Array
    policy_chosen: ScoredTokens
    policy_rejected: ScoredTokens
    reference_chosen: ScoredTokens | None = None
    reference_rejected: ScoredTokens | None = None

    def completions(self) -> dict[str, ScoredTokens]:
        """Those of the four that are there, by name."""
        named = {name: getattr(self, name) for name in COMPLETIONS}
        return {name: tokens for name, tokens in named.items() if tokens is not None}


@dataclass(frozen=True, slots=True)
class Pairs:
    """The P pairs that were to be scored, in the data set's order.

    Attributes:
        rows: (P,) int64, 1-based row numbers in the data set.
        prompt_lengths: (P,) int64 tokens.
        chosen_lengths, rejected_lengths: (P,) int64 tokens of the completions, scored or not: a completion's first
            token is not scored where the prompt is empty.
        subsets: one text a pair, or None.
    """

    rows: Int64Array
    prompt_lengths: Int64Array
    chosen_lengths: Int64Array
    rejected_lengths: Int64Array
    subsets: list[str] | None = None

    def scored_lengths(self, branch: str) -> Int64Array:
        """(P,) how many tokens of a branch, "chosen" or "rejected", have something before them."""
        lengths: Int64Array = getattr(self, f"{branch}_lengths")
        return np.where(self.prompt_lengths > 0, lengths, np.maximum(lengths - 1, 0))


@dataclass(frozen=True, slots=True)
class Scorings:
    """The same pairs scored by the original, several times, and by the engine.

    Attributes:
        pairs: what was to be scored.
        original: the PyTorch weights in float32, in one batch shape: what everything is compared with.
        reshaped: the same in another batch shape.
        rounded: the original in its checkpoint's own precision, bfloat16 or float16. Where the checkpoint is float32
            and the engine is not, score the original in bfloat16; None where nothing lower than float32 is meant.
        engine: what is verified.
        beta: strength of the reference, dimensionless.
        reference_free: "sum", "average" or "norm" (see `metrics.rewards.reference_free_scores`), or None to use the
            reference.
        policy_alone: whether the policy alone is compared, as of a server, which has no reference: all scorings but
            `original` then have none, and their rewards are taken against the original's.
    """

    pairs: Pairs
    original: Scoring
    reshaped: Scoring
    rounded: Scoring | None
    engine: Scoring
    beta: float = 0.1
    reference_free: str | None = None
    policy_alone: bool = False

    @property
    def compared(self) -> tuple[str, ...]:
        """Names of the completions that every scoring has."""
        names = tuple(self.original.completions())
        return tuple(name for name in names if name.startswith("policy")) if self.policy_alone else names
