"""How far the original is from itself: the floor that an engine's drift is measured in.

There are two floors, and which one is meant depends on what the engine claims to be:

- `float32`: the original in another batch shape, which adds up the same numbers in another order. An engine that
  computes in float32 claims no more error than that.
- `checkpoint`: the original in its checkpoint's own precision. An engine of lower precision cannot be nearer to float32
  than that. It is no floor for a float32 engine: 1 % more on one weight tensor is less than bfloat16's rounding.

Several statistics are compared, for faults differ in what they move: the tokens' mean error; the worst completion,
which alone shows what touches few tokens; the margins, in which what is small by token but has one sign adds up; the
rewards; the tokens at the end of long sequences.
"""

from dataclasses import dataclass, fields
from typing import Literal, get_args

import numpy as np

from dpo_fast.metrics.statistics import CONFIDENCE, bootstrap_means
from dpo_fast.types import Float64Array, Int64Array
from dpo_fast.verification.drift import Errors, position_edges
from dpo_fast.verification.types import Interval, Scorings

Floor = Literal["float32", "checkpoint"]
FLOORS: tuple[str, ...] = get_args(Floor)
# The step between float32 numbers from 8 to 16, where logits and their log-sum-exp lie, whose difference a log-prob is:
# no scoring is exact to less, though two of the same library may agree to the last bit, as if there were no noise.
RESOLUTION = 2.0**-20  # nats a token


@dataclass(frozen=True, slots=True)
class NoiseFloor:
    """What the original's own scorings differ by; the largest of them, and `RESOLUTION` at least.

    Attributes:
        kind: "float32", or "checkpoint"; see the module.
        token: nats: mean absolute error of a token.
        worst_completion: nats: the largest mean absolute error of a completion's tokens.
        margin, reward: root-mean-square errors.
        positions: nats: `token` by bin of positions.
        at_resolution: names of those that are what float32 can resolve, for less was measured.
    """

    kind: Floor
    token: float
    worst_completion: float
    margin: float
    reward: float
    positions: tuple[float, ...]
    at_resolution: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Multiple:
    """A number in units of the noise floor; `interval`: 95 %, bootstrapped over pairs, or None."""

    value: float
    interval: Interval | None


@dataclass(frozen=True, slots=True)
class _Measures:
    """Distances from the original; (...,) stands for several scorings, and for several resamples of the pairs.

    Attributes:
        token: (...,) mean absolute error of a token, nats.
        positions: (..., B) the same by bin of positions.
        margin, reward: (...,) root-mean-square errors.
    """

    token: Float64Array
    positions: Float64Array
    margin: Float64Array
    reward: Float64Array


def measure_multiples(
    engine: Errors, noise: list[Errors], scorings: Scorings, seed: int = 0
) -> tuple[NoiseFloor, dict[str, Multiple]]:
    """An engine's errors in units of the original's own.

    Args:
        engine: the engine's errors.
        noise: those of the original's own scorings: the reshaped one, and for the checkpoint's floor the rounded one.
        scorings: what they come from.
        seed: of the bootstrap, in which pairs are drawn, with the engine's errors and the noise together.

    Returns:
        The floor, and by the checks' names (see `verdict`) the multiples.
    """
    pairs = len(engine.pairs.rows)
    edges = position_edges(engine.position)
    bins = len(edges) - 1
    counts = _by_bin(engine, edges, np.ones(len(engine.token_errors)))
    scored = np.stack(
        [*(_totals(errors, edges) for errors in (engine, *noise)), _resolution(engine, counts, scorings)], axis=1
    )  # (P, scorings, B + 2): the engine first, what float32 resolves last
    signed = np.column_stack([engine.margin_errors, engine.reward_errors])  # (P, 3)
    quantities = np.concatenate([scored.reshape(pairs, -1), counts, signed], axis=1)
    worse_branch = int(np.abs(signed[:, 1:].mean(axis=0)).argmax())

    def measures(means: Float64Array) -> _Measures:
        sums = means[..., : -bins - 3].reshape(*means.shape[:-1], len(noise) + 2, bins + 2)
        tokens = _positive(means[..., None, -bins - 3 : -3])  # a resample may lack a bin's tokens
        return _Measures(
            token=sums[..., :bins].sum(axis=-1) / tokens.sum(axis=-1),
            positions=sums[..., :bins] / tokens,
            margin=np.sqrt(sums[..., -2]),
            reward=np.sqrt(sums[..., -1]),
        )

    def multiples(means: Float64Array) -> dict[str, Float64Array]:
        """(...,) each, of (..., M) means over pairs."""
        of = measures(means)
        token, margin, reward = (_positive(each[..., 1:].max(axis=-1)) for each in (of.token, of.margin, of.reward))
        by_position = of.positions[..., 0, :] / _positive(of.positions[..., 1:, :].max(axis=-2))
        return {
            "token error": of.token[..., 0] / token,
            "margin error": of.margin[..., 0] / margin,
            "margin bias": means[..., -3] / margin,
            "reward bias": means[..., worse_branch - 2] / reward,
            "growth": by_position[..., -1] / np.maximum(by_position[..., 0], 1.0),
        }

    point = quantities.mean(axis=0)
    draws = multiples(bootstrap_means(lambda block: quantities[block], pairs, seed))
    tail = (1 - CONFIDENCE) / 2
    found = {}
    for name, value in multiples(point).items():
        low, high = np.quantile(draws[name], [tail, 1 - tail]).tolist()
        # A single pair, drawn again, is always the same: it says nothing of others.
        found[name] = Multiple(float(value), (low, high) if pairs > 1 else None)
    worst = max(RESOLUTION, *(float(errors.completion_means().max()) for errors in noise))
    found["worst completion"] = Multiple(float(engine.completion_means().max()) / worst, None)
    of = measures(point)
    floors = {field.name: getattr(of, field.name)[1:] for field in fields(of)}
    floor = NoiseFloor(
        kind="checkpoint" if len(noise) > 1 else "float32",
        worst_completion=worst,
        positions=tuple(floors["positions"].max(axis=0).tolist()),
        **{name: float(floors[name].max()) for name in ("token", "margin", "reward")},
        at_resolution=tuple(name for name in ("token", "margin", "reward") if floors[name].argmax() == len(noise)),
    )
    return floor, found


def _totals(errors: Errors, edges: Int64Array) -> Float64Array:
    """(P, B + 2): sums of the tokens' absolute errors by bin of positions, squared errors of margin and rewards."""
    of_rewards = np.square(errors.reward_errors).mean(axis=1)
    return np.column_stack(
        [_by_bin(errors, edges, np.abs(errors.token_errors)), np.square(errors.margin_errors), of_rewards]
    )


def _resolution(errors: Errors, counts: Float64Array, scorings: Scorings) -> Float64Array:
    """The same of errors of `RESOLUTION` a token, independent of each other: what float32 cannot resolve.

    A reward that is the sum of n log-probs then has an error of sqrt(n) times as much, an average 1 / sqrt(n), a norm
    once.
    """
    kind = scorings.reference_free
    variances = np.zeros(len(counts))
    for name in errors.completions:
        tokens = errors.original.completions()[name]
        if kind is None or kind == "sum":
            of_reward = tokens.lengths.astype(np.float64)
        else:
            of_reward = (tokens.lengths > 0) / (np.maximum(tokens.lengths, 1) if kind == "average" else 1.0)
        if kind is None or name.startswith("policy"):
            variances += of_reward
    of_margins = (scorings.beta * RESOLUTION) ** 2 * variances
    return np.column_stack([RESOLUTION * counts, of_margins, of_margins / 2])


def _by_bin(errors: Errors, edges: Int64Array, values: Float64Array) -> Float64Array:
    """(P, B): the tokens' values summed by pair and bin of positions."""
    pairs, bins = len(errors.pairs.rows), len(edges) - 1
    places = errors.token_pair * bins + np.searchsorted(edges, errors.position, side="right") - 1
    return np.bincount(places, weights=values, minlength=pairs * bins).reshape(pairs, bins).astype(np.float64)


def _positive(values: Float64Array) -> Float64Array:
    """The same values, but no zeros to divide by; what is divided is 0 then too."""
    return np.maximum(values, np.finfo(np.float64).tiny)
