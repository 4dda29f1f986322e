"""A beta that is too high: the loss is satisfied long before the policy prefers the chosen completion.

DPO's gradient on a pair is weighted by s(-beta r), r being the pair's margin in nats (arXiv:2305.18290, section 4): at
beta r = 2.2 a pair has a tenth of the weight, and hardly moves the policy any more. Where the reference finds the
rejected completion likelier by g nats, the policy only prefers the chosen one when r > g. So a beta is too high when,
of the satisfied pairs that the reference ranks the other way, fewer than `TURNED` have been turned around; this is
known as DPO's failure to learn rankings (arXiv:2405.19534). The sweep says what lower betas would have left to learn.

A plateau is only asked about where `SATISFIED_SHARE` of the pairs are satisfied. Without earlier runs that show that
the margin has stopped growing, the hint is "likely" at most; if it still grows, "possible".
"""

from math import log

import numpy as np

from dpo_fast.advice.evidence import Evidence
from dpo_fast.advice.hints import FEWEST_PAIRS, Hint, Sureness, mean_of, share_above, share_text, sureness_of
from dpo_fast.metrics.rewards import log_sigmoid
from dpo_fast.metrics.statistics import wilson_interval

SATISFIED = log(9.0)  # the margin, in units of the reward, at which s(-x) = 0.1
SATISFIED_SHARE = 1 / 3
TURNED = 0.1
GROWTH = 0.1  # of the margin since the last earlier run, above which it still grows
SWEEP = (1, 3, 10)  # beta is divided by these
# The losses whose gradient fades as the margin grows.
FADING = frozenset({"sigmoid", "hinge", "robust", "exo_pair", "nca_pair", "bco_pair", "discopop"})


def find_beta_too_high(evidence: Evidence) -> Hint | None:
    """The hint, if the evidence speaks for it."""
    run, beta = evidence.held_out, evidence.settings.beta
    if evidence.settings.reference_free is not None or not FADING.intersection(evidence.settings.loss_type):
        return None
    rewards = beta * run.margins
    satisfied = rewards >= SATISFIED
    wrongly_ranked = satisfied & (run.reference_gaps < 0)
    pairs = int(wrongly_ranked.sum())
    if satisfied.mean() < SATISFIED_SHARE or pairs < FEWEST_PAIRS:
        return None
    turned = int((run.margins + run.reference_gaps > 0)[wrongly_ranked].sum())
    p = share_above(pairs - turned, pairs, 1 - TURNED)
    at_most, growth_text, growth = _growth(evidence)
    sureness = sureness_of(p, at_most)
    if sureness is None:
        return None
    gap = float(np.median(-run.reference_gaps[wrongly_ranked]))
    enough = SATISFIED / gap
    sweep = [
        {
            "beta": beta / factor,
            "margin": float(rewards.mean()) / factor,
            "satisfied": float((rewards / factor >= SATISFIED).mean()),
            "loss": float(-log_sigmoid(rewards / factor).mean()),
        }
        for factor in SWEEP
    ]
    return Hint(
        "beta_too_high",
        sureness,
        f"At beta {beta:g} the loss is satisfied (gradient below a tenth) with {satisfied.mean():.0%} of the pairs. Of "
        f"the {pairs:,} among them that the reference ranks the other way, by {gap:.3g} nats in the median, the policy "
        f"ranks {share_text(turned, pairs)} right. At beta {sweep[-1]['beta']:g} the same log-ratios would satisfy "
        f"{sweep[-1]['satisfied']:.0%} of the pairs.{growth_text}",
        f"The policy is held close to its reference: train with a lower beta. At {enough:.2g} a pair is satisfied only "
        "when half of these rankings are turned.",
        {
            "beta": beta, "satisfied": float(satisfied.mean()), "wrongly_ranked": pairs, "turned": turned / pairs,
            "turned_interval": list(wilson_interval(turned, pairs)), "median_reference_gap": gap,
            "beta_that_turns_half": enough, "sweep": sweep, "p": p, **growth,
        },
    )  # fmt: skip


def _growth(evidence: Evidence) -> tuple[Sureness, str, dict[str, float | list[float]]]:
    """How sure one can be given the margin's growth since the last earlier run, and what to say of it."""
    if not evidence.earlier:
        return "likely", "", {}
    before, now = evidence.earlier[-1].pairs.margins, evidence.held_out.margins
    growth = mean_of(evidence.settings.beta * (now - before))
    limit = GROWTH * abs(evidence.settings.beta * float(before.mean()))
    text = f" Since {evidence.earlier[-1].name} the margin has grown by {growth.value:.3g}"
    numbers: dict[str, float | list[float]] = {"growth": growth.value, "growth_interval": growth.interval}
    if growth.interval[1] <= limit:
        return "sure", f"{text}, less than a tenth.", numbers
    return "possible", f"{text}: it may still be growing.", numbers
