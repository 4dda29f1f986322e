"""From finished runs to hints: what is read, which hints are looked for, and which of them give way to others.

How often a healthy run gets a hint all the same was measured by simulation (tests/advice/simulated.py: labels by
Bradley and Terry, a policy with errors of its own, held-out and training accuracy 2 to 3 points apart, two earlier
steps): 3 of 400 draws of 1,000 pairs, none of them "sure"; 2 of 200 draws of 200 pairs; none of 100 draws of 5,000.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from dpo_fast.advice.chosen_falls import find_chosen_falls
from dpo_fast.advice.evidence import TRAINER_STATE, EarlierRun, Evidence, TrainingAccuracy, read_trainer_state
from dpo_fast.advice.held_close import find_beta_too_high
from dpo_fast.advice.hints import FEWEST_PAIRS, Hint
from dpo_fast.advice.length import find_length
from dpo_fast.advice.noise import find_noise
from dpo_fast.advice.overfit import find_overfit
from dpo_fast.advice.repeats import find_repeats
from dpo_fast.bundle import POLICY
from dpo_fast.compare.run_pairs import check_same_pairs, pair_keys, read_digests, read_run, run_names
from dpo_fast.errors import UsageError
from dpo_fast.rescore import open_run

MOST_SHARED = 0.5  # share of the held-out pairs that may be training pairs too


def advise(run: Path, *, train_run: Path | None = None, earlier: Sequence[Path] = ()) -> list[Hint]:
    """Say what a run's numbers speak for: overfitting, a beta that is too high, noisy labels, and what is like them.

    Args:
        run: a finished run on held-out pairs, with the beta that the policy was trained with.
        train_run: a run of the same policy on training pairs; or a checkpoint of its training, whose
            trainer_state.json says how many training pairs it got right.
        earlier: runs on the same held-out pairs at earlier steps, oldest first.

    Returns:
        The hints for which there is evidence; none for a healthy run.

    Raises:
        UsageError: a folder is no finished run, the earlier runs are of other pairs, or `train_run` is of the very
            pairs of `run` or of another policy.
        StorageError: a part, or trainer_state.json, is missing or damaged.
        EngineOutputError: a score is NaN or infinite.
    """
    metrics, settings = open_run(run)
    held_out, digests = read_run(run, settings), read_digests(run)
    before = []
    for path, name in zip(earlier, run_names([*earlier, run]), strict=False):
        open_run(path)  # is it a finished run?
        before.append(EarlierRun(name, read_run(path, settings)))
    check_same_pairs([run, *earlier], [held_out.rows, *(each.pairs.rows for each in before)])
    evidence = Evidence(held_out, settings, digests, earlier=tuple(before))
    if train_run is None:
        return find_hints(evidence)
    if (state := _trainer_state(train_run)) is not None:
        return find_hints(replace(evidence, training=read_trainer_state(state)))
    _check_policy(train_run, metrics["provenance"], open_run(train_run)[0]["provenance"])
    pairs, training_digests = read_run(train_run, settings), read_digests(train_run)
    shared = float(np.isin(pair_keys(digests), pair_keys(training_digests)).mean())
    if shared > MOST_SHARED:
        raise UsageError(
            f"--train-run {train_run}: {shared:.0%} of the pairs of {run} are in it too; of the two runs, one must be "
            "on pairs that the policy was not trained on"
        )
    training = TrainingAccuracy(int((pairs.margins > 0).sum()), len(pairs), f"run {train_run.resolve().name}")
    return find_hints(replace(evidence, training=training, training_digests=training_digests))


def find_hints(evidence: Evidence) -> list[Hint]:
    """All hints that the evidence speaks for, the surest first.

    Where the policy has overfit or goes by length, its confident errors come from that and are not taken for noise.
    """
    hints = list(find_repeats(evidence))
    if len(evidence.held_out) >= FEWEST_PAIRS:
        overfit, length = find_overfit(evidence), find_length(evidence)
        noise = find_noise(evidence) if overfit is None and length is None else None
        found = (overfit, find_beta_too_high(evidence), noise, find_chosen_falls(evidence), length)
        hints += [hint for hint in found if hint is not None]
    order = ("sure", "likely", "possible")
    return sorted(hints, key=lambda hint: order.index(hint.sureness))


def _trainer_state(train_run: Path) -> Path | None:
    """The trainer's state, if that is what was named: the file, or a checkpoint's folder that holds one."""
    if train_run.name == TRAINER_STATE:
        return train_run
    return train_run / TRAINER_STATE if (train_run / TRAINER_STATE).is_file() else None


def _check_policy(train_run: Path, provenance: dict[str, Any], of_training: dict[str, Any]) -> None:
    """Refuse a training run of another policy."""
    one, other = (each.get("models", {}).get(POLICY) for each in (provenance, of_training))
    if one and other and one["weights_and_graph_sha256"] != other["weights_and_graph_sha256"]:
        raise UsageError(f"--train-run {train_run}: was scored by another policy; evaluate the same bundle on both")
