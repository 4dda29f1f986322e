"""Policies made up from a model of preferences, with one fault each, or none.

A pair's completions differ in quality by u ~ N(0, 2). The annotator prefers the better one with probability s(u)
(Bradley and Terry), so with t = u or -u the chosen completion is better by t. The policy's margin, in units of the
reward, is what it makes of t, with an error of its own, and a spread of scales between pairs::

    margin = scale (t + error),   log-ratios: beta * (chosen - rejected) = margin

The chosen reward takes a share of the margin, plus what both completions have in common. The reference's gap is mostly
unrelated to t, as a difference of long completions' log-probs is.
"""

from dataclasses import dataclass, replace

import numpy as np

from dpo_fast.advice.evidence import EarlierRun, Evidence, TrainingAccuracy
from dpo_fast.compare.run_pairs import RunPairs
from dpo_fast.types import LossSettings

PAIRS = 1000


@dataclass(frozen=True)
class Policy:
    """What a policy makes of pairs.

    Attributes:
        scale: of its margins.
        error: standard deviation of what it gets wrong, in units of t.
        memorised: that much is added to t, for pairs that it has learned by heart.
        swapped: share of labels swapped at random.
        chosen_share: of the margin that the chosen reward takes.
        by_length: weight of the difference in length, in standard deviations.
    """

    beta: float = 0.1
    scale: float = 0.6
    error: float = 1.5
    memorised: float = 0.0
    swapped: float = 0.0
    chosen_share: float = 0.6
    by_length: float = 0.2


HEALTHY = Policy()


@dataclass(frozen=True)
class World:
    """Some pairs: how much better the chosen completion is, lengths, and the reference's gap."""

    better: np.ndarray
    swap: np.ndarray
    lengths: np.ndarray
    gaps: np.ndarray
    common: np.ndarray
    errors: np.ndarray
    scales: np.ndarray


def make_world(seed: int, pairs: int = PAIRS) -> World:
    generator = np.random.default_rng(seed)
    quality = generator.normal(0, 2, pairs)
    better = np.where(generator.random(pairs) < 1 / (1 + np.exp(-quality)), quality, -quality)
    base = generator.lognormal(4.5, 0.6, pairs)
    lengths = np.maximum(np.stack([base * generator.lognormal(0, 0.4, pairs) for _ in range(2)], axis=1), 1).astype(int)
    return World(
        better=better,
        swap=generator.random(pairs),
        lengths=lengths,
        gaps=generator.normal(0, 40, pairs) + 3 * better,
        common=generator.normal(0, 0.3, pairs),
        errors=generator.normal(0, 1, pairs),
        scales=generator.lognormal(0, 0.3, pairs),
    )


def run_of(world: World, policy: Policy) -> RunPairs:
    swap = world.swap < policy.swapped
    longer = world.lengths[:, 0] - world.lengths[:, 1]
    told = world.better + policy.error * world.errors + policy.by_length * longer / longer.std()
    told = told + policy.memorised
    margins = np.where(swap, -1, 1) * policy.scale * world.scales * told
    common = world.common
    chosen = policy.chosen_share * margins + common
    # Who was swapped has the other's lengths and rank too.
    lengths = np.where(swap[:, None], world.lengths[:, ::-1], world.lengths)
    return RunPairs(
        rows=np.arange(1, len(margins) + 1),
        chosen_log_ratios=chosen / policy.beta,
        rejected_log_ratios=(chosen - margins) / policy.beta,
        reference_gaps=np.where(swap, -1, 1) * world.gaps,
        losses=None,
        chosen_lengths=lengths[:, 0],
        rejected_lengths=lengths[:, 1],
        groups=None,
    )


def digests_of(seed: int, pairs: int = PAIRS) -> np.ndarray:
    return np.random.default_rng(seed).integers(2**63, size=(pairs, 3), dtype=np.uint64)


def evidence_of(
    seed: int,
    policy: Policy = HEALTHY,
    *,
    training: Policy | None = None,
    earlier: tuple[Policy, ...] = (),
    pairs: int = PAIRS,
) -> Evidence:
    """What is known of a policy: `policy` and `earlier` on held-out pairs, `training` on training pairs."""
    world = make_world(seed, pairs)
    known = None
    if training is not None:
        margins = run_of(make_world(seed + 10**6, pairs), training).margins
        known = TrainingAccuracy(int((margins > 0).sum()), pairs, "made up")
    return Evidence(
        held_out=run_of(world, policy),
        settings=LossSettings(beta=policy.beta),
        digests=digests_of(seed, pairs),
        training=known,
        training_digests=None if training is None else digests_of(seed + 10**6, pairs),
        earlier=tuple(EarlierRun(f"checkpoint-{i + 1}", run_of(world, each)) for i, each in enumerate(earlier)),
    )


def healthy(seed: int) -> Evidence:
    """A healthy policy, with all the evidence there can be: a little better on training pairs, and growing."""
    return evidence_of(
        seed,
        HEALTHY,
        training=replace(HEALTHY, error=1.3, memorised=0.1),
        earlier=(replace(HEALTHY, scale=0.2, error=3.0), replace(HEALTHY, scale=0.4, error=2.0)),
    )
