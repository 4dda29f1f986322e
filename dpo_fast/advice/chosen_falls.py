"""Displacement: the margin grows because both completions become less likely, the rejected one faster.

Known as likelihood displacement (arXiv:2410.08847) and as the failure that DPO-Positive mends (arXiv:2402.13228). Some
of it is usual. It is said where the chosen reward has fallen by more than `SHARE` of what the margin has grown by. The
rewards are relative to the reference; whether that is where training began, the run does not know, so a fall
since the reference is "likely" at most, and one since an earlier run may be "sure".
"""

from dpo_fast.advice.evidence import Evidence
from dpo_fast.advice.hints import Hint, Sureness, interval_text, mean_of, sureness_of
from dpo_fast.types import Float64Array

SHARE = 0.5


def find_chosen_falls(evidence: Evidence) -> Hint | None:
    """The hint, if the evidence speaks for it."""
    run, settings = evidence.held_out, evidence.settings
    if settings.reference_free is not None:  # then a reward is a log-prob, and always falls below 0
        return None
    rewards = settings.beta * run.chosen_log_ratios, settings.beta * run.rejected_log_ratios
    if evidence.earlier:
        first = evidence.earlier[0]
        chosen = rewards[0] - settings.beta * first.pairs.chosen_log_ratios
        rejected = rewards[1] - settings.beta * first.pairs.rejected_log_ratios
        hint = _hint_of_changes(first.name, chosen, rejected, "sure")
        if hint is not None:
            return hint
    return _hint_of_changes("the reference", *rewards, "likely")


def _hint_of_changes(since: str, chosen: Float64Array, rejected: Float64Array, at_most: Sureness) -> Hint | None:
    """The hint, if the rewards' changes (P,) since some step speak for it: the larger p of its two claims counts."""
    margin, of_chosen, of_margin = chosen - rejected, mean_of(chosen), mean_of(chosen - rejected)
    p = max(of_margin.p_above(0.0), mean_of(-chosen - SHARE * margin).p_above(0.0))
    sureness = sureness_of(p, at_most)
    if sureness is None:
        return None
    return Hint(
        "chosen_falls",
        sureness,
        f"Since {since} the chosen reward has changed by {interval_text(of_chosen.value, of_chosen.interval)} while "
        f"the margin has grown by {interval_text(of_margin.value, of_margin.interval)}: the policy makes both "
        "completions less likely, the rejected one faster.",
        "Probability goes to completions that nobody chose: add the chosen completions' likelihood to the loss (sft "
        "beside the other), lower the learning rate, or leave out pairs whose completions are nearly the same.",
        {
            "since": since, "chosen": of_chosen.value, "chosen_interval": of_chosen.interval,
            "margin": of_margin.value, "margin_interval": of_margin.interval, "p": p,
        },
    )  # fmt: skip
