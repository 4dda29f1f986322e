"""From tokens to completions: the sums that every metric and every setting of a loss can be computed from.

Tokens arrive as flat ragged arrays, one completion after another. Each completion is summed by itself, in float64 and
in the order of its tokens, so its sums are the same to the last bit whatever part of a run it lies in.
Shapes use P (pairs), C (scored tokens of one branch, all pairs together) and S (segments).
"""

from collections.abc import Sequence
from dataclasses import fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dpo_fast.errors import EngineOutputError
from dpo_fast.types import CompletionScores, CompletionSums, Float64Array, Int64Array, PairScores, PairSums

COMPLETIONS = ("policy_chosen", "policy_rejected", "reference_chosen", "reference_rejected")


def sum_tokens(scores: PairScores) -> PairSums:
    """Sum each completion's tokens.

    Takes 16 bytes a token of one branch for as long as it runs.

    Args:
        scores: per-token scores of P pairs; usually one part of a run.

    Returns:
        The same pairs in the same order.

    Raises:
        EngineOutputError: a score is NaN or infinite, which would make every metric so; names the first such row.
    """
    shared_lengths = np.minimum(scores.policy_chosen.lengths, scores.policy_rejected.lengths)

    def of(name: str) -> CompletionSums | None:
        completions: CompletionScores | None = getattr(scores, name)
        if completions is None:
            return None
        sums = _sum_completions(completions, shared_lengths)
        _check(sums, completions, name, scores.rows)
        return sums

    return PairSums(
        rows=scores.rows,
        prompt_lengths=scores.prompt_lengths,
        chosen_lengths=scores.chosen_lengths,
        rejected_lengths=scores.rejected_lengths,
        truncated=scores.truncated,
        groups=scores.groups,
        **{name: of(name) for name in COMPLETIONS},  # type: ignore[arg-type]
    )


def concatenate(parts: Sequence[PairSums]) -> PairSums:
    """The pairs of all parts, one part after another.

    Args:
        parts: at least one; the reference and the groups are there in all of them or in none, but for parts without
            pairs, which add nothing.

    Returns:
        All pairs.

    Raises:
        ValueError: no parts, or the reference or the groups are there in some of them only.
    """
    if not parts:
        raise ValueError("no parts to concatenate")
    parts = [part for part in parts if len(part.rows)] or parts[:1]
    for name in ("reference_chosen", "reference_rejected", "groups"):
        if len({getattr(part, name) is None for part in parts}) > 1:
            raise ValueError(f"{name} is there in some parts and not in others")

    def join(name: str) -> NDArray[Any]:
        return np.concatenate([getattr(part, name) for part in parts])

    def join_completions(name: str) -> CompletionSums | None:
        completions = [getattr(part, name) for part in parts]
        if completions[0] is None:
            return None
        values = ([getattr(each, field.name) for each in completions] for field in fields(CompletionSums))
        return CompletionSums(*map(np.concatenate, values))

    return PairSums(
        rows=join("rows"),
        prompt_lengths=join("prompt_lengths"),
        chosen_lengths=join("chosen_lengths"),
        rejected_lengths=join("rejected_lengths"),
        truncated=join("truncated"),
        groups=None if parts[0].groups is None else [name for part in parts for name in part.groups or ()],
        **{name: join_completions(name) for name in COMPLETIONS},  # type: ignore[arg-type]
    )


def segment_sums(values: NDArray[Any], lengths: Int64Array) -> Float64Array:
    """Sum consecutive segments of a flat array; takes a float64 copy of it, if it is none, for as long as it runs.

    Args:
        values: (C,) numbers of any type.
        lengths: (S,) int64, elements of each segment, 0 allowed; their sum is C.

    Returns:
        (S,) float64, summed in float64; 0 for an empty segment.
    """
    sums = np.zeros(len(lengths), dtype=np.float64)
    # reduceat has no empty segments: it would return an element of the next one.
    filled = lengths > 0
    if filled.any():
        starts = np.cumsum(lengths) - lengths
        sums[filled] = np.add.reduceat(values, starts[filled], dtype=np.float64)
    return sums


def _sum_completions(completions: CompletionScores, shared_lengths: Int64Array) -> CompletionSums:
    """The sums of one branch under one model; `shared_lengths` (P,) are the pairs' shorter completions'."""
    pieces = np.stack([shared_lengths, completions.lengths - shared_lengths], axis=1)  # (P, 2)
    log_probs = completions.log_probs.astype(np.float64)

    def sum_pieces(values: Float64Array) -> Float64Array:
        return segment_sums(values, pieces.ravel()).reshape(pieces.shape)  # shared, beyond, shared, beyond …

    return CompletionSums(
        lengths=completions.lengths,
        log_probs=sum_pieces(log_probs),
        squares=sum_pieces(np.square(log_probs)),
        entropy=completions.entropy,
        mean_logit=completions.mean_logit,
        top1=completions.top1,
        log_sum_sq_prob=completions.log_sum_sq_prob,
    )


def _check(sums: CompletionSums, completions: CompletionScores, name: str, rows: Int64Array) -> None:
    """Refuse what is not finite; a sum is finite only if all its tokens are."""
    for field in ("log_probs", "entropy", "mean_logit", "log_sum_sq_prob"):
        of_pairs = getattr(sums, field)
        finite = np.isfinite(of_pairs.sum(axis=1) if field == "log_probs" else of_pairs)
        if finite.all():
            continue
        pair = int(finite.argmin())
        value = of_pairs[pair]
        if field == "log_probs":
            end = int(completions.lengths[: pair + 1].sum())
            tokens = completions.log_probs[end - int(completions.lengths[pair]) : end]
            value = tokens[~np.isfinite(tokens)][0]
        raise EngineOutputError(f"row {rows[pair]}: {field} of {name} is {value}; score it again in higher precision")
