"""What a tracker does, and what several share."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

# Where no variable names a project: Transformers' own default, so that evaluations lie beside trainings.
PROJECT = "huggingface"
STEP = "train/global_step"  # the trainer's step as Transformers logs it, for clients that count their own


class Tracker(Protocol):
    """A run at a tracker; made with the name of a new run, or None.

    Attributes:
        place: where a person finds it: an address, or a folder.
    """

    place: str

    def log(self, metrics: Mapping[str, float], samples: Sequence[Mapping[str, Any]], step: int) -> None:
        """Log the metrics, if there are any, and the samples as a table, if there are any, at a trainer's step."""
        ...

    def log_files(self, paths: Sequence[Path]) -> None:
        """Keep files, and all files of folders, with the run."""
        ...

    def close(self, *, failed: bool) -> None:
        """Close the run, if it was opened here."""
        ...


def files_of(paths: Sequence[Path]) -> Iterator[tuple[str, Path]]:
    """Each file, and each file of each folder, with its name at the tracker: a folder's begin with the folder's."""
    for path in paths:
        inside = sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
        for file in inside:
            yield file.relative_to(path.parent).as_posix(), file
