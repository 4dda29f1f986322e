"""Can these scores be compared at all? Says what is missing, repeated, NaN or stale; nothing is believed."""

from collections import defaultdict
from collections.abc import Iterator

import numpy as np

from dpo_fast.types import Int64Array
from dpo_fast.verification.types import OPTIONAL, Pairs, ScoredTokens, Scoring, Scorings

# As in `dpo_fast.scores`: log-sum-exp in float32 may round a log-prob to a little more than 0.
ROUNDING = 1e-3  # nats
# Completions so long do not get the same log-probs to the last bit by chance.
STALE_TOKENS = 4
# Nats: what the same completion differs by between two float32 scorings is a thousandth of this.
STALE_DIFFERENCE = 1e-3


def check_integrity(scorings: Scorings) -> list[str]:
    """Everything that forbids a comparison, a sentence each; an empty list if nothing does.

    - There are pairs, and each scoring has their rows, each once and in their order.
    - Each scoring has the completions that are compared: no model is missing, and each completion has as many scores
      as it has tokens that something precedes.
    - Scores are finite; log-probs and `log_sum_sq_prob` at most 0, entropies at least 0 (but for rounding), `is_top1`
      0 or 1.
    - No stale scores: two completions to which the original gives different log-probs, and the engine the same ones to
      the last bit.

    Args:
        scorings: what is to be compared.

    Returns:
        Sentences that name the scoring, the row and the value.
    """
    pairs = scorings.pairs
    if not len(pairs.rows) or not sum(len(tokens.log_probs) for tokens in scorings.original.completions().values()):
        return ["there are no scored tokens, so nothing was verified"]
    reasons = list(_check_pairs(pairs))
    named = {"original": scorings.original, "reshaped original": scorings.reshaped, "engine": scorings.engine}
    if scorings.rounded is not None:
        named["rounded original"] = scorings.rounded
    for name, scoring in named.items():
        reasons += _check_rows(name, scoring.rows, pairs.rows)
    if reasons:
        return reasons  # whose scores are whose is not known
    for name, scoring in named.items():
        wanted = scorings.original.completions() if name == "original" else scorings.compared
        if set(scoring.completions()) != set(wanted):
            reasons.append(f"{name}: scored {', '.join(scoring.completions())}, and the original {', '.join(wanted)}")
        for completion, tokens in scoring.completions().items():
            reasons += _check_tokens(f"{name}, {completion}", tokens, pairs, completion.partition("_")[2])
    return reasons or list(_check_stale(scorings.original, scorings.engine, pairs.rows))


def _check_pairs(pairs: Pairs) -> Iterator[str]:
    """The pairs themselves: as many of everything, each row once."""
    counts = {name: len(getattr(pairs, name)) for name in ("prompt_lengths", "chosen_lengths", "rejected_lengths")}
    if pairs.subsets is not None:
        counts["subsets"] = len(pairs.subsets)
    for name, count in counts.items():
        if count != len(pairs.rows):
            yield f"{len(pairs.rows)} pairs and {count} {name}"
    values, times = np.unique(pairs.rows, return_counts=True)
    if (times > 1).any():
        yield f"row {values[times.argmax()]} is {times.max()} times among the pairs"


def _check_rows(name: str, found: Int64Array, wanted: Int64Array) -> Iterator[str]:
    """A scoring's rows are the pairs' rows."""
    if np.array_equal(found, wanted):
        return
    values, times = np.unique(found, return_counts=True)
    missing, foreign = np.setdiff1d(wanted, found), np.setdiff1d(found, wanted)
    if len(missing):
        yield f"{name}: {len(missing)} of {len(wanted)} pairs have no scores, the first is row {missing[0]}"
    if len(foreign):
        yield f"{name}: {len(foreign)} rows were scored that were not asked for, the first is row {foreign[0]}"
    if (times > 1).any():
        yield f"{name}: {int((times > 1).sum())} rows were scored repeatedly, the first is row {values[times > 1][0]}"
    if not (len(missing) or len(foreign) or (times > 1).any()):
        yield f"{name}: the pairs are in another order"


def _check_tokens(name: str, tokens: ScoredTokens, pairs: Pairs, branch: str) -> Iterator[str]:
    """One branch under one model: counts, then values."""
    wanted = pairs.scored_lengths(branch)
    if len(tokens.offsets) != len(wanted) + 1 or tokens.offsets[0] != 0 or (tokens.lengths < 0).any():
        yield f"{name}: {len(tokens.offsets)} offsets do not part the scores of {len(wanted)} pairs"
        return
    if (tokens.lengths != wanted).any():
        pair = int((tokens.lengths != wanted).argmax())
        yield f"{name}: row {pairs.rows[pair]} has {tokens.lengths[pair]} scores for {wanted[pair]} tokens"
        return
    columns = {column: getattr(tokens, column) for column in ("log_probs", *OPTIONAL)}
    for column, values in columns.items():
        if values is None:
            continue
        if len(values) != tokens.offsets[-1]:
            yield f"{name}: {len(values)} values of {column} for {tokens.offsets[-1]} tokens"
            continue
        wrong = ~np.isfinite(values)
        if column in ("log_probs", "log_sum_sq_prob"):
            wrong |= values > ROUNDING
        elif column == "entropy":
            wrong |= values < -ROUNDING
        else:
            wrong |= (values != 0) & (values != 1)
        if wrong.any():
            token = int(wrong.argmax())
            row = pairs.rows[np.searchsorted(tokens.offsets, token, side="right") - 1]
            count = int(wrong.sum())
            yield f"{name}: {count} values of {column} cannot be right, the first is {values[token]}, row {row}"


def _check_stale(original: Scoring, engine: Scoring, rows: Int64Array) -> Iterator[str]:
    """The engine's scores of one completion are not those of another."""
    same: dict[bytes, list[tuple[str, int]]] = defaultdict(list)
    for name, tokens in engine.completions().items():
        for pair in np.flatnonzero(tokens.lengths >= STALE_TOKENS).tolist():
            same[_slice(tokens, pair).tobytes()].append((name, pair))
    stale: list[tuple[tuple[str, int], tuple[str, int]]] = []
    for places in same.values():
        first, *others = (_slice(original.completions()[name], pair) for name, pair in places)
        for (name, pair), other in zip(places[1:], others, strict=True):
            if np.abs(other.astype(np.float64) - first).max() > STALE_DIFFERENCE:
                stale.append((places[0], (name, pair)))
    if stale:
        source, copy = (f"{name} of row {rows[pair]}" for name, pair in stale[0])
        yield (
            f"engine: {len(stale)} completions have the very scores of another one, which the original scores "
            f"differently, the first is {copy}, with those of {source}"
        )


def _slice(tokens: ScoredTokens, pair: int) -> np.ndarray[tuple[int], np.dtype[np.float32]]:
    """The log-probs of one completion."""
    return np.asarray(tokens.log_probs[tokens.offsets[pair] : tokens.offsets[pair + 1]], np.float32)
