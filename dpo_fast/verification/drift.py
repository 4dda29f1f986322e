"""How far one scoring is from another: by token, by sequence, by pair, and where along the sequence.

An error is the other scoring's value less the original's. Shapes use P (pairs), K (completions of a pair: two of the
policy, two more with a reference), N (scored tokens of all completions together) and B (bins).

**What is said of the KL divergence.** An engine gives the target's log-prob, the entropy and the sum of squared
probabilities, not the distribution. No upper bound follows: all else may lie on other tokens, even where all three
agree. Two lower bounds on KL(original || other) do, token by token, and the larger is taken:

- Told only whether the next token is the target, the divergence cannot grow (the log-sum inequality; Cover and Thomas,
  Elements of Information Theory, 2006, theorem 2.7.1): KL >= p log(p / q) + (1 - p) log((1 - p) / (1 - q)).
- KL >= 2 TV^2 (Pinsker; the same, lemma 11.6.1). As d = p - q sums to 0, |d| is at most TV anywhere, so
  ||d||_2^2 <= TV ||d||_1 = 2 TV^2, and ||d||_2 >= | ||p||_2 - ||q||_2 |: KL >= (||p||_2 - ||q||_2)^2.

Entropies bound the total variation too (Fannes and Audenaert), but only divided by the log of the vocabulary's size:
that was left out as telling nothing more. The mean error of the targets' log-probs is no estimate of the divergence
either, for the targets were not drawn from the original.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from math import sqrt
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

from dpo_fast.metrics.rewards import reference_free_scores
from dpo_fast.metrics.statistics import CONFIDENCE
from dpo_fast.metrics.summary import group_members
from dpo_fast.metrics.sums import segment_sums
from dpo_fast.types import CompletionSums, Float64Array, Int64Array
from dpo_fast.verification.decisions import change_interval, count_changes
from dpo_fast.verification.types import Interval, Pairs, ScoredTokens, Scoring, Scorings

POSITION_BINS = 8  # of about as many tokens each
LENGTH_BINS = 5  # of about as many pairs each
# A probability just below 1 is no nearer to it than float32 can say.
LEAST_REMAINDER = 2.0**-24


@dataclass(frozen=True, slots=True)
class Errors:
    """Two scorings of the same P pairs, value by value: what all statistics are made of.

    Attributes:
        pairs: the pairs.
        original, other: the two scorings.
        completions: names of the K completions, in the order of everything below.
        token_errors: (N,) float64, nats: of the tokens' log-probs, all those of the first named completions first.
        token_pair: (N,) int64: whose token it is.
        position: (N,) int64: of the token in its sequence, prompt included, counted from 0.
        original_log_probs, log_probs: (P, K) float64, nats: of the completions.
        original_rewards, rewards: (P, 2) float64: of the chosen and the rejected completion.
    """

    pairs: Pairs
    original: Scoring
    other: Scoring
    completions: tuple[str, ...]
    token_errors: Float64Array
    token_pair: Int64Array
    position: Int64Array
    original_log_probs: Float64Array
    log_probs: Float64Array
    original_rewards: Float64Array
    rewards: Float64Array

    @property
    def original_margins(self) -> Float64Array:
        """(P,) float64: the chosen completion's reward less the rejected one's."""
        return self.original_rewards[:, 0] - self.original_rewards[:, 1]

    @property
    def margins(self) -> Float64Array:
        """(P,) float64: the same of the other scoring."""
        return self.rewards[:, 0] - self.rewards[:, 1]

    @property
    def reward_errors(self) -> Float64Array:
        """(P, 2) float64."""
        return self.rewards - self.original_rewards

    @property
    def margin_errors(self) -> Float64Array:
        """(P,) float64."""
        return self.margins - self.original_margins

    def completion_means(self) -> Float64Array:
        """(K, P) float64, nats: the mean absolute error of each completion's tokens; 0 for one without tokens."""
        lengths = np.concatenate([self.original.completions()[name].lengths for name in self.completions])
        means: Float64Array = segment_sums(np.abs(self.token_errors), lengths) / np.maximum(lengths, 1)
        return means.reshape(len(self.completions), -1)


@dataclass(frozen=True, slots=True)
class Place:
    """Where a token is: the data set's row (1-based), the completion, and the position there, counted from 0."""

    row: int
    completion: str
    position: int


@dataclass(frozen=True, slots=True)
class TokenDrift:
    """Errors of the tokens' log-probs, in nats.

    Attributes:
        tokens: N, of all models and branches.
        mean_absolute, median_absolute, p99_absolute, rms: of the errors' sizes.
        bias: their signed mean.
        largest: the error of largest size, with its sign; `largest_at`: where.
        top1_agreement: share of tokens of which both say that they are the model's first choice, or both that they are
            not; a token that neither would choose may still have two different rivals.
        top1_kept: of the tokens that are the original's first choice, the share that is the other's too.
        kl_bound_mean, kl_bound_largest: lower bounds on the KL divergence of the original from the other, in nats a
            token; see the module.
    """

    tokens: int
    mean_absolute: float
    median_absolute: float
    p99_absolute: float
    rms: float
    bias: float
    largest: float
    largest_at: Place
    top1_agreement: float | None
    top1_kept: float | None
    kl_bound_mean: float
    kl_bound_largest: float


@dataclass(frozen=True, slots=True)
class ErrorSummary:
    """Errors of one quantity, of which every pair has one or several; in the quantity's unit.

    Attributes:
        count: of values.
        mean_absolute, median_absolute, p99_absolute, rms: of the errors' sizes.
        bias: their signed mean.
        bias_interval: 95 %, normal, over pairs; None with a single pair.
        spread: standard deviation of the errors around the bias.
        largest: the error of largest size, with its sign; `largest_row`: of which row.
        correlation: Pearson's, of the two scorings' values; None where either is constant.
    """

    count: int
    mean_absolute: float
    median_absolute: float
    p99_absolute: float
    rms: float
    bias: float
    bias_interval: Interval | None
    spread: float
    largest: float
    largest_row: int
    correlation: float | None


@dataclass(frozen=True, slots=True)
class PositionBin:
    """Errors of the tokens between two positions of their sequences, both included, counted from 0; in nats."""

    first: int
    last: int
    tokens: int
    mean_absolute: float
    bias: float


@dataclass(frozen=True, slots=True)
class Growth:
    """The least-squares slope of a token's absolute error over the log of its position.

    Attributes:
        slope: nats for each time that the position (counted from 1) is multiplied by e.
        interval: 95 %, normal, with pairs as clusters, whose errors need not be independent (Liang and Zeger 1986,
            doi:10.1093/biomet/73.1.13); None with a single pair.
    """

    slope: float
    interval: Interval | None


@dataclass(frozen=True, slots=True)
class Slice:
    """Some of the pairs.

    Attributes:
        name: of the subset; of the lengths, "first-last" tokens of a pair's longer completion.
        pairs, tokens: how many.
        token_mean_absolute, token_bias: errors of the tokens' log-probs, in nats; None without tokens.
        margin_rms, margin_bias: errors of the margins.
        flips: preferences that changed.
        accuracy_change: a share of the pairs; `accuracy_interval`: 95 %, Tango's.
    """

    name: str
    pairs: int
    tokens: int
    token_mean_absolute: float | None
    token_bias: float | None
    margin_rms: float
    margin_bias: float
    flips: int
    accuracy_change: float
    accuracy_interval: Interval


@dataclass(frozen=True, slots=True)
class Drift:
    """All that is said of how far a scoring is from the original.

    Attributes:
        tokens: errors by token.
        policy_log_probs, reference_log_probs: errors of the completions' log-probs, in nats.
        rewards, margins: errors of both completions' rewards, and of their differences.
        by_position: bins of about as many tokens each; `growth`: whether errors grow along the sequence.
        by_subset: in alphabetical order; empty without subsets.
        by_length: bins of about as many pairs each, by the longer completion.
    """

    tokens: TokenDrift
    policy_log_probs: ErrorSummary
    reference_log_probs: ErrorSummary | None
    rewards: ErrorSummary
    margins: ErrorSummary
    by_position: tuple[PositionBin, ...]
    growth: Growth | None
    by_subset: tuple[Slice, ...]
    by_length: tuple[Slice, ...]


def compare(scorings: Scorings, other: Scoring) -> Errors:
    """Subtract the original's scores from another scoring's.

    Args:
        scorings: the pairs and the original; sound, as `check_integrity` says.
        other: scores of the same pairs.

    Raises:
        ValueError: there is no reference, and `scorings.reference_free` is None.
    """
    pairs, original, names = scorings.pairs, scorings.original, scorings.compared
    token_errors, token_pair, position = [], [], []
    for name in names:
        before, after = original.completions()[name], other.completions()[name]
        lengths, branch = before.lengths, name.partition("_")[2]
        skipped = getattr(pairs, f"{branch}_lengths") - lengths  # a first token that nothing precedes
        within = np.arange(len(before.log_probs)) - np.repeat(before.offsets[:-1], lengths)
        token_errors.append(after.log_probs.astype(np.float64) - before.log_probs)
        token_pair.append(np.repeat(np.arange(len(pairs.rows)), lengths))
        position.append(within + np.repeat(pairs.prompt_lengths + skipped, lengths))

    whole = other
    if scorings.policy_alone:
        whole = replace(
            other, reference_chosen=original.reference_chosen, reference_rejected=original.reference_rejected
        )

    def log_probs(scoring: Scoring) -> Float64Array:
        each = scoring.completions()
        return np.stack([segment_sums(each[name].log_probs, each[name].lengths) for name in names], axis=1)

    return Errors(
        pairs=pairs,
        original=original,
        other=other,
        completions=names,
        token_errors=np.concatenate(token_errors),
        token_pair=np.concatenate(token_pair),
        position=np.concatenate(position),
        original_log_probs=log_probs(original),
        log_probs=log_probs(other),
        original_rewards=rewards(original, scorings.beta, scorings.reference_free),
        rewards=rewards(whole, scorings.beta, scorings.reference_free),
    )


def rewards(scoring: Scoring, beta: float, reference_free: str | None) -> Float64Array:
    """(P, 2) float64: the rewards of the chosen and the rejected completions, as `metrics.rewards` has them.

    Raises:
        ValueError: there is no reference, and `reference_free` is None.
    """
    policy = scoring.policy_chosen, scoring.policy_rejected
    reference = scoring.reference_chosen, scoring.reference_rejected
    if reference_free is not None:
        return beta * np.stack([reference_free_scores(_sums(tokens), reference_free) for tokens in policy], axis=1)
    ratios = []
    for ours, theirs in zip(policy, reference, strict=True):
        if theirs is None:
            raise ValueError("no reference scores: score the pairs with a reference, or set reference_free")
        ratios.append(segment_sums(ours.log_probs, ours.lengths) - segment_sums(theirs.log_probs, theirs.lengths))
    return beta * np.stack(ratios, axis=1)


def summarise(errors: Errors) -> Drift:
    """All statistics of two scorings' errors; of P >= 1 pairs with N >= 1 tokens."""
    is_policy = np.array([name.startswith("policy") for name in errors.completions])
    rows = errors.pairs.rows

    def of_log_probs(columns: NDArray[np.bool_]) -> ErrorSummary:
        return summarise_errors(errors.original_log_probs[:, columns], errors.log_probs[:, columns], rows)

    longer = np.maximum(errors.pairs.chosen_lengths, errors.pairs.rejected_lengths)
    return Drift(
        tokens=_summarise_tokens(errors),
        policy_log_probs=of_log_probs(is_policy),
        reference_log_probs=None if is_policy.all() else of_log_probs(~is_policy),
        rewards=summarise_errors(errors.original_rewards, errors.rewards, rows),
        margins=summarise_errors(errors.original_margins[:, None], errors.margins[:, None], rows),
        by_position=_by_position(errors),
        growth=measure_growth(errors.token_errors, errors.position, errors.token_pair),
        by_subset=_slices(errors, group_members(errors.pairs.subsets or [])),
        by_length=_slices(
            errors,
            (
                (f"{longer[members].min()}-{longer[members].max()}", members)
                for members in _bins_of_equal_size(longer, LENGTH_BINS)
            ),
        ),
    )


def summarise_errors(original: Float64Array, other: Float64Array, rows: Int64Array) -> ErrorSummary:
    """The errors of one quantity.

    Args:
        original: (P, M) float64: M values of each of P >= 1 pairs.
        other: (P, M) float64: the other scoring's.
        rows: (P,) int64 row numbers.
    """
    errors = other - original
    sizes = np.abs(errors)
    bias = float(errors.mean())
    of_pairs = errors.mean(axis=1)
    largest = int(sizes.argmax())
    median, p99 = np.quantile(sizes, [0.5, 0.99])
    return ErrorSummary(
        count=errors.size,
        mean_absolute=float(sizes.mean()),
        median_absolute=float(median),
        p99_absolute=float(p99),
        rms=float(np.sqrt(np.square(errors).mean())),
        bias=bias,
        bias_interval=_normal(bias, float(of_pairs.std(ddof=1)) / sqrt(len(of_pairs))) if len(of_pairs) > 1 else None,
        spread=float(errors.std()),
        largest=float(errors.flat[largest]),
        largest_row=int(rows[largest // errors.shape[1]]),
        correlation=_correlation(original.ravel(), other.ravel()),
    )


def position_edges(position: Int64Array, bins: int = POSITION_BINS) -> Int64Array:
    """(B + 1,) int64: bin b holds positions from edge b up to, but without, edge b + 1.

    Args:
        position: (N,) int64; N >= 1.
        bins: at most so many, of about as many tokens each; fewer where positions are few.
    """
    inner = np.quantile(position, np.arange(1, bins) / bins, method="nearest")
    return np.unique([position.min(), *inner, position.max() + 1])


def measure_growth(errors: Float64Array, position: Int64Array, pair: Int64Array) -> Growth | None:
    """Does the size of a token's error grow with its position? None where all positions are the same.

    Args:
        errors: (N,) float64, nats.
        position: (N,) int64, counted from 0.
        pair: (N,) int64: whose token it is.
    """
    sizes, log_position = np.abs(errors), np.log1p(position)
    centred = log_position - log_position.mean()
    total = float(centred @ centred)
    if np.ptp(position) == 0:
        return None
    slope = float(centred @ sizes) / total
    scores = np.bincount(pair, weights=centred * (sizes - sizes.mean() - slope * centred))
    clusters = len(np.unique(pair))
    if clusters < 2:
        return Growth(slope, None)
    error = sqrt(clusters / (clusters - 1) * float(scores @ scores)) / total
    return Growth(slope, _normal(slope, error))


def kl_lower_bounds(original: ScoredTokens, other: ScoredTokens) -> Float64Array:
    """(C,) float64, nats: what the KL divergence of the original from the other is at least; see the module."""
    log_p, log_q = (np.minimum(tokens.log_probs.astype(np.float64), 0.0) for tokens in (original, other))
    rest_p, rest_q = (np.maximum(-np.expm1(values), LEAST_REMAINDER) for values in (log_p, log_q))
    bounds: Float64Array = np.exp(log_p) * (log_p - log_q) + rest_p * np.log(rest_p / rest_q)
    log_squares = original.log_sum_sq_prob, other.log_sum_sq_prob
    if log_squares[0] is not None and log_squares[1] is not None:
        norms = [np.exp(values.astype(np.float64) / 2) for values in log_squares if values is not None]
        bounds = np.maximum(bounds, np.square(norms[0] - norms[1]))
    return np.maximum(bounds, 0.0)


def _summarise_tokens(errors: Errors) -> TokenDrift:
    """Statistics over all tokens."""
    sizes = np.abs(errors.token_errors)
    largest = int(sizes.argmax())
    before, after = errors.original.completions(), errors.other.completions()
    counts = np.cumsum([len(before[name].log_probs) for name in errors.completions])
    name = errors.completions[int(np.searchsorted(counts, largest, side="right"))]
    pair = int(errors.token_pair[largest])
    within = int(errors.position[largest] - errors.pairs.prompt_lengths[pair])
    bounds = np.concatenate([kl_lower_bounds(before[name], after[name]) for name in errors.completions])
    flags = [(before[name].is_top1, after[name].is_top1) for name in errors.completions]
    known = [(ours, theirs) for ours, theirs in flags if ours is not None and theirs is not None]
    agreement = kept = None
    if known:
        ours, theirs = (np.concatenate(each).astype(bool) for each in zip(*known, strict=True))
        agreement = float((ours == theirs).mean())
        kept = float(theirs[ours].mean()) if ours.any() else None
    median, p99 = np.quantile(sizes, [0.5, 0.99])
    return TokenDrift(
        tokens=len(sizes),
        mean_absolute=float(sizes.mean()),
        median_absolute=float(median),
        p99_absolute=float(p99),
        rms=float(np.sqrt(np.square(sizes).mean())),
        bias=float(errors.token_errors.mean()),
        largest=float(errors.token_errors[largest]),
        largest_at=Place(int(errors.pairs.rows[pair]), name, within),
        top1_agreement=agreement,
        top1_kept=kept,
        kl_bound_mean=float(bounds.mean()),
        kl_bound_largest=float(bounds.max()),
    )


def _by_position(errors: Errors) -> tuple[PositionBin, ...]:
    """Errors by bins of positions."""
    edges = position_edges(errors.position)
    of_token = np.searchsorted(edges, errors.position, side="right") - 1
    counts = np.bincount(of_token, minlength=len(edges) - 1)
    sizes = np.bincount(of_token, weights=np.abs(errors.token_errors), minlength=len(edges) - 1)
    signed = np.bincount(of_token, weights=errors.token_errors, minlength=len(edges) - 1)
    return tuple(
        PositionBin(int(first), int(end) - 1, int(count), float(size / count), float(sign / count))
        for first, end, count, size, sign in zip(edges[:-1], edges[1:], counts, sizes, signed, strict=True)
        if count
    )


def _slices(errors: Errors, parts: Iterable[tuple[str, Int64Array]]) -> tuple[Slice, ...]:
    """Errors and decisions of parts of the pairs, by name; the tokens are gone through once, however many parts."""
    pairs = len(errors.pairs.rows)
    counts, sizes, sums = (
        np.bincount(errors.token_pair, weights=weights, minlength=pairs)
        for weights in (None, np.abs(errors.token_errors), errors.token_errors)
    )
    all_original, all_margins = errors.original_margins, errors.margins

    def of(name: str, members: Int64Array) -> Slice:
        tokens = int(counts[members].sum())
        original, margins = all_original[members], all_margins[members]
        gained, lost = count_changes(original, margins)
        return Slice(
            name=name,
            pairs=len(members),
            tokens=tokens,
            token_mean_absolute=float(sizes[members].sum() / tokens) if tokens else None,
            token_bias=float(sums[members].sum() / tokens) if tokens else None,
            margin_rms=float(np.sqrt(np.square(margins - original).mean())),
            margin_bias=float((margins - original).mean()),
            flips=int((np.sign(original) != np.sign(margins)).sum()),
            accuracy_change=(gained - lost) / len(members),
            accuracy_interval=change_interval(gained, lost, len(members)),
        )

    return tuple(of(*part) for part in parts)


def _bins_of_equal_size(values: Int64Array, bins: int) -> list[Int64Array]:
    """Positions of the values between two quantiles, for each bin that has any."""
    edges = position_edges(values, bins)
    of_value = np.searchsorted(edges, values, side="right") - 1
    return [members for number in range(len(edges) - 1) if len(members := np.flatnonzero(of_value == number))]


def _sums(tokens: ScoredTokens) -> CompletionSums:
    """The completions' sums as reference-free scores take them, all tokens in the first of the two columns."""
    log_probs = tokens.log_probs.astype(np.float64)
    sums, squares = (segment_sums(values, tokens.lengths) for values in (log_probs, np.square(log_probs)))
    nothing = np.zeros_like(sums)
    return CompletionSums(
        lengths=tokens.lengths,
        log_probs=np.stack([sums, nothing], axis=1),
        squares=np.stack([squares, nothing], axis=1),
        entropy=nothing,
        mean_logit=nothing,
        top1=np.zeros(len(sums), np.int64),
        log_sum_sq_prob=nothing,
    )


def _normal(value: float, error: float) -> Interval:
    """A normal 95 % interval from a standard error."""
    reach = NormalDist().inv_cdf(0.5 + CONFIDENCE / 2) * error
    return value - reach, value + reach


def _correlation(left: Float64Array, right: Float64Array) -> float | None:
    """Pearson's; None where either side is constant."""
    if np.ptp(left) == 0 or np.ptp(right) == 0:
        return None
    return float(np.corrcoef(left, right)[0, 1])
