"""What a watch has found so far: `watch.json`, one entry a checkpoint in the order of their steps.

::

    bundle, dataset, settings, aggregate, …   what all entries have in common; another value of these is another watch
    steps     step, max_steps, epoch, checkpoint; metrics (TRL's names); intervals; drift (see `training.drift`);
              counts; seconds of the refit and the evaluation
    left_out  step, checkpoint, reason
"""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from dpo_fast.errors import OutputExistsError, StorageError
from dpo_fast.files import write_json

WATCH = "watch.json"


@dataclass(frozen=True, slots=True)
class ScoredStep:
    """A checkpoint that was scored.

    Attributes:
        step: optimizer steps of the training by then.
        max_steps: of the whole training.
        epoch: passes over the training data; None where the checkpoint does not say.
        checkpoint: its folder's name.
        metrics: TRL's, by name.
        intervals: 95 %, by the metric's name.
        drift: from the reference, in nats a token; see `dpo_fast.training.drift`.
        counts: pairs, ties, truncated pairs, skipped rows, tokens.
        seconds: wall time of the refit and the evaluation.
    """

    step: int
    max_steps: int
    epoch: float | None
    checkpoint: str
    metrics: dict[str, float]
    intervals: dict[str, list[float]]
    drift: dict[str, float | None]
    counts: dict[str, Any]
    seconds: float


@dataclass(frozen=True, slots=True)
class LeftOut:
    """A checkpoint that was not scored, and why."""

    step: int
    checkpoint: str
    reason: str


@dataclass(slots=True)
class Steps:
    """All checkpoints that a watch is done with.

    Attributes:
        common: what they have in common, by name.
        scored, left_out: in the order of their steps.
    """

    common: dict[str, Any]
    scored: list[ScoredStep] = field(default_factory=list)
    left_out: list[LeftOut] = field(default_factory=list)

    def add(self, entry: ScoredStep | LeftOut) -> None:
        """Put a checkpoint in its place."""
        if isinstance(entry, ScoredStep):
            self.scored = sorted([*self.scored, entry], key=lambda each: each.step)
        else:
            self.left_out = sorted([*self.left_out, entry], key=lambda each: each.step)

    def is_done_with(self, checkpoint: str) -> bool:
        """Whether a checkpoint was scored or left out."""
        done = {each.checkpoint for each in self.scored} | {each.checkpoint for each in self.left_out}
        return checkpoint in done

    @property
    def training_has_ended(self) -> bool:
        """Whether the last checkpoint of the training has been scored; a training may be resumed with more steps."""
        return bool(self.scored) and 0 < self.scored[-1].max_steps <= self.scored[-1].step

    def as_dict(self) -> dict[str, Any]:
        """The content of watch.json."""
        return {
            **self.common,
            "steps": [asdict(each) for each in self.scored],
            "left_out": [asdict(each) for each in self.left_out],
        }

    def write(self, folder: Path) -> None:
        """Write watch.json.

        Raises:
            StorageError: the disk refused.
        """
        write_json(folder / WATCH, self.as_dict())


def read_steps(folder: Path, common: dict[str, Any]) -> Steps:
    """What an earlier process has scored; what it left out is looked at again, if it is still there.

    Args:
        folder: that holds watch.json, or does not.
        common: what must be the same.

    Raises:
        OutputExistsError: it is a watch of something else.
        StorageError: it is damaged.
    """
    path = folder / WATCH
    common = json.loads(json.dumps(common))  # as JSON has it, in which tuples are lists
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        steps = [ScoredStep(**each) for each in found.pop("steps")]
        del found["left_out"]
    except FileNotFoundError:
        return Steps(common)
    except OSError as error:
        raise StorageError(f"{path}: cannot be read ({error.strerror})") from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise StorageError(f"{path}: is damaged; name another folder, or say --overwrite") from error
    differing = sorted(name for name in common.keys() | found.keys() if common.get(name) != found.get(name))
    if differing:
        raise OutputExistsError(
            f"{folder}: holds a watch with other {', '.join(differing)}; name another folder, or say --overwrite"
        )
    return Steps(common, steps)
