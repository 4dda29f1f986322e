"""Generated samples, as `dpo-fast generate` writes them: JSON Lines."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dpo_fast.errors import DatasetError, StorageError
from dpo_fast.generation.files import SAMPLES


@dataclass(frozen=True, slots=True)
class Sample:
    """What both models say to the same prompt.

    Attributes:
        row: of the data set, counted from 1.
        prompt: its text.
        policy: the policy's completion.
        reference: the reference's, or None without one.
    """

    row: int
    prompt: str
    policy: str
    reference: str | None


def read_samples(path: Path) -> list[Sample]:
    """Read samples.

    Args:
        path: the file, or the folder that it lies in.

    Raises:
        StorageError: it cannot be read.
        DatasetError: a line is no sample.
    """
    if path.is_dir():
        path = path / SAMPLES
    try:
        lines = path.read_text(encoding="utf-8").split("\n")  # within a text, JSON may hold other line ends as they are
    except FileNotFoundError as error:
        raise StorageError(f"{path}: no such file; name the one that `dpo-fast generate` wrote") from error
    except (OSError, UnicodeDecodeError) as error:
        raise StorageError(f"{path}: cannot be read; name the file that `dpo-fast generate` wrote") from error
    return [_sample(path, number, line) for number, line in enumerate(lines, start=1) if line.strip()]


def _sample(path: Path, number: int, line: str) -> Sample:
    try:
        value = json.loads(line)
        reference = value.get("reference")
        return Sample(
            int(value["row"]),
            _text(value["prompt"]),
            _text(value["policy"]),
            None if reference is None else _text(reference),
        )
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DatasetError(
            f"{path}: line {number} is no sample (an object with row, prompt, policy and reference); name the file "
            "that `dpo-fast generate` wrote"
        ) from error


def _text(value: Any) -> str:
    """A text as it is; messages as JSON."""
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, indent=1)
    return text.encode("utf-8", "replace").decode("utf-8")  # a page is UTF-8, which has no lone surrogates
