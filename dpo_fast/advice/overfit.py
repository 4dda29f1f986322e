"""Overfitting: the policy gets its training pairs right, and others less often.

Two pieces of evidence: the accuracy on training pairs is more than `GAP` above that on held-out pairs; and the held-out
loss has risen by more than `RISE` since an earlier step. Either alone leaves other explanations open (held-out pairs of
another kind; a step size that is too large), so a gap alone is "likely" at most and a rise alone "possible".
"""

from typing import Any

import numpy as np

from dpo_fast.advice.evidence import EarlierRun, Evidence
from dpo_fast.advice.hints import (
    FEWEST_PAIRS,
    Estimate,
    Hint,
    difference_of_shares,
    interval_text,
    mean_of,
    sureness_of,
)
from dpo_fast.compare.run_pairs import RunPairs
from dpo_fast.metrics.rewards import log_sigmoid
from dpo_fast.types import Float64Array

GAP = 0.05  # of the accuracies
RISE = 0.02  # nats a pair, of DPO's loss
ADVICE = (
    "Stop earlier: evaluate earlier checkpoints on held-out pairs and keep the best. Or train fewer epochs, with a "
    "smaller learning rate, or on more pairs."
)


def find_overfit(evidence: Evidence) -> Hint | None:
    """The hint, if the evidence speaks for it."""
    held_out, beta = evidence.held_out, evidence.settings.beta
    pairs, right = len(held_out), int((held_out.margins > 0).sum())
    sentences: list[str] = []
    numbers: dict[str, Any] = {}
    gap_p = rise_p = 1.0
    training = evidence.training
    if training is not None and training.pairs >= FEWEST_PAIRS:
        gap = difference_of_shares(training.right, training.pairs, right, pairs)
        gap_p = gap.p_above(GAP)
        if sureness_of(gap_p):
            accuracy = training.right / training.pairs
            sentences.append(
                f"The accuracy is {accuracy:.3f} on {training.pairs:,} training pairs ({training.source}) and "
                f"{right / pairs:.3f} on {pairs:,} held-out pairs: a gap of {interval_text(gap.value, gap.interval)}."
            )
            numbers |= {
                "training_accuracy": accuracy, "training_pairs": training.pairs, "held_out_accuracy": right / pairs,
                "held_out_pairs": pairs, "gap": gap.value, "gap_interval": gap.interval, "gap_p": gap_p,
            }  # fmt: skip
    if evidence.earlier:
        best, rise = _rise(held_out, evidence.earlier, beta)
        rise_p = min(rise.p_above(RISE) * len(evidence.earlier), 1.0)  # Bonferroni: the best of them was picked
        if sureness_of(rise_p):
            sentences.append(
                f"DPO's loss on the held-out pairs has risen by {interval_text(rise.value, rise.interval)} since "
                f"{best.name}."
            )
            numbers |= {
                "since": best.name, "loss_rise": rise.value, "loss_rise_interval": rise.interval, "loss_rise_p": rise_p,
            }  # fmt: skip
    has_gap, has_rise = sureness_of(gap_p) is not None, sureness_of(rise_p) is not None
    sureness = sureness_of(min(gap_p, rise_p), "sure" if has_gap and has_rise else "likely" if has_gap else "possible")
    if sureness is None:
        return None
    return Hint("overfit", sureness, " ".join(sentences), ADVICE, numbers)


def _rise(held_out: RunPairs, earlier: tuple[EarlierRun, ...], beta: float) -> tuple[EarlierRun, Estimate]:
    """The earlier run of the lowest loss, and by how much that has risen since."""
    losses = [_losses(run.pairs, beta) for run in earlier]
    best = int(np.argmin([values.mean() for values in losses]))
    return earlier[best], mean_of(_losses(held_out, beta) - losses[best])


def _losses(run: RunPairs, beta: float) -> Float64Array:
    """(P,) DPO's loss, whatever the run's own: its unit is known."""
    return -log_sigmoid(beta * run.margins)
