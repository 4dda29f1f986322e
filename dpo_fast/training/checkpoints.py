"""A trainer's checkpoints as they come and go: which are there, and which are whole.

Transformers 5.23 (`Trainer._save_checkpoint`) writes into the folder `checkpoint-STEP` itself: weights, tokenizer,
optimizer, random states, and `trainer_state.json` last. So that file says that the others are there. A checkpoint that
is being copied from elsewhere may have it first, so its files must also have stayed the same since an earlier look.
"""

import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

NAME = re.compile(r"checkpoint-([0-9]{1,18})")  # and not `tmp-checkpoint-…`, which older versions renamed at the end
TRAINER_STATE = "trainer_state.json"

# Name, size in bytes and time of change of each file in a folder.
Files = frozenset[tuple[str, int, int]]


@dataclass(frozen=True, slots=True)
class TrainerState:
    """What a checkpoint says of the training.

    Attributes:
        step: optimizer steps that have been made.
        max_steps: that there will be.
        epoch: passes over the training data, fractions included; None where it is not said.
    """

    step: int
    max_steps: int
    epoch: float | None

    @property
    def is_last(self) -> bool:
        """Whether the training ends with this checkpoint."""
        return 0 < self.max_steps <= self.step


def find_checkpoints(folder: Path) -> list[tuple[int, Path]]:
    """The checkpoints that are in a folder, whole or not, with their steps, in the order of these."""
    try:
        paths = list(folder.iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return []
    named = ((NAME.fullmatch(path.name), path) for path in paths)
    return sorted((int(match[1]), path) for match, path in named if match and path.is_dir())


def list_files(checkpoint: Path) -> Files:
    """The files of a checkpoint, those in its folders included; what vanishes while it is looked at is left out."""

    def look() -> Iterator[tuple[str, int, int]]:
        for folder, _, names in os.walk(checkpoint):  # not rglob, which stumbles over a folder that vanishes
            for path in (Path(folder, name) for name in names):
                try:
                    status = path.stat()
                except OSError:  # gone; on a network's disk, "stale"
                    continue
                yield path.relative_to(checkpoint).as_posix(), status.st_size, status.st_mtime_ns

    return frozenset(look())


def read_trainer_state(checkpoint: Path) -> TrainerState | None:
    """What a checkpoint says of the training; None where that is not written yet, or not to its end."""
    try:
        state = json.loads((checkpoint / TRAINER_STATE).read_text(encoding="utf-8"))
        epoch = state.get("epoch")
        return TrainerState(int(state["global_step"]), int(state["max_steps"]), None if epoch is None else float(epoch))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
