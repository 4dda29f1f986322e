"""Samples on disk.

::

    FOLDER/samples.jsonl   one object a row: see `Sample`
           samples.json    what they were made from: settings, seed, versions, hashes; there when the samples are whole
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dpo_fast.errors import StorageError
from dpo_fast.files import storage_errors, write_json, write_text

SAMPLES, PROVENANCE = "samples.jsonl", "samples.json"


@dataclass(frozen=True, slots=True)
class Sample:
    """A prompt, and what policy and reference answer; the reference's are None where there is none.

    Attributes:
        row: 1-based number of the row in the data set.
        prompt: its text, as the tokenizer's chat template writes it, without special tokens. Untrusted.
        policy, reference: the completions, without special tokens. Untrusted.
        policy_tokens, reference_tokens: generated tokens, a closing one included.
        policy_finished, reference_finished: whether the model ended it, and not the limit of tokens.
    """

    row: int
    prompt: str
    policy: str
    reference: str | None
    policy_tokens: int
    reference_tokens: int | None
    policy_finished: bool
    reference_finished: bool | None


def write_samples(folder: Path, samples: Iterable[Sample], provenance: Mapping[str, Any]) -> None:
    """Write both files into a folder that exists, in place of older ones; in ASCII, which no terminal obeys.

    Raises:
        StorageError: the disk refused.
    """
    remove_samples(folder)
    write_text(folder / SAMPLES, "".join(f"{json.dumps(asdict(sample))}\n" for sample in samples))
    write_json(folder / PROVENANCE, provenance)


def read_samples(folder: Path) -> list[dict[str, Any]]:
    """The objects of a folder's samples.jsonl; none where there is no such file.

    Raises:
        StorageError: it cannot be read.
    """
    path = folder / SAMPLES
    try:
        return [dict(json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines()]
    except FileNotFoundError:
        return []
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise StorageError(f"{path}: is damaged; remove it, and run `dpo-fast generate` again") from error


def remove_samples(folder: Path) -> None:
    """Remove a folder's samples, which are another run's.

    Raises:
        StorageError: the disk refused.
    """
    with storage_errors(folder):
        for name in (PROVENANCE, SAMPLES):
            (folder / name).unlink(missing_ok=True)
