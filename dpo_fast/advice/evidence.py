"""What is known of a trained policy: its margins on held-out pairs, on training pairs, at earlier steps; the tokens."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dpo_fast.compare.run_pairs import Digests, RunPairs
from dpo_fast.errors import StorageError
from dpo_fast.types import LossSettings

TRAINER_STATE = "trainer_state.json"
ACCURACY_LOGGED = "rewards/accuracies"  # TRL's key for the training batches


@dataclass(frozen=True, slots=True)
class TrainingAccuracy:
    """How many training pairs the policy gets right.

    Attributes:
        right, pairs: the accuracy is their quotient.
        source: what they were counted in, for a reader.
    """

    right: int
    pairs: int
    source: str


@dataclass(frozen=True, slots=True)
class EarlierRun:
    """The same held-out pairs at an earlier step."""

    name: str
    pairs: RunPairs


@dataclass(frozen=True, slots=True)
class Evidence:
    """All that hints are drawn from.

    Attributes:
        held_out: the run that is asked about.
        settings: its loss; beta is taken to be the one that the policy was trained with.
        digests: of the held-out pairs' tokens.
        training: the accuracy on training pairs, if it is known.
        training_digests: of the training pairs' tokens, if there is a run on them.
        earlier: runs of earlier steps, oldest first.
    """

    held_out: RunPairs
    settings: LossSettings
    digests: Digests
    training: TrainingAccuracy | None = None
    training_digests: Digests | None = None
    earlier: tuple[EarlierRun, ...] = ()


def read_trainer_state(path: Path) -> TrainingAccuracy | None:
    """The training accuracy that a trainer logged, from pairs that it had seen before.

    A batch is logged as it is trained on. In the first epoch that is before the policy has seen it, so its accuracy is
    a held-out one, and says nothing of overfitting: only what was logged after the first epoch counts, and of that the
    last epoch.

    Args:
        path: a checkpoint's trainer_state.json.

    Returns:
        None where the trainer was not beyond its first epoch, or logged no accuracies.

    Raises:
        StorageError: the file is damaged.
    """
    try:
        state: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        logs = [entry for entry in state["log_history"] if ACCURACY_LOGGED in entry]
        if not logs:
            return None
        to_epoch = float(logs[-1]["epoch"])
        from_epoch = max(1.0, to_epoch - 1)
        seen = [entry for entry in logs if float(entry["epoch"]) > from_epoch]
        before = [int(entry["step"]) for entry in logs if float(entry["epoch"]) <= from_epoch]
        if not seen:
            return None
        steps = int(seen[-1]["step"]) - max(before, default=0)
        # A step's batch may be larger (accumulation, several devices), which makes the estimate surer than said here.
        pairs = max(steps * int(state.get("train_batch_size") or 1), 1)
        accuracy = sum(float(entry[ACCURACY_LOGGED]) for entry in seen) / len(seen)
        right = round(accuracy * pairs)
        if not 0 <= right <= pairs:
            raise ValueError(f"an accuracy of {accuracy}")
    except OSError as error:
        raise StorageError(f"{path}: cannot be read ({error.strerror})") from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise StorageError(f"{path}: is no trainer's state, or damaged; name a checkpoint of the training") from error
    return TrainingAccuracy(right, pairs, f"the trainer's log, epochs {from_epoch:.1f} to {to_epoch:.1f}")
