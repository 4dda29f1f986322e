"""The file of a result: where it lies, and how it is read."""

import json
import re
from pathlib import Path
from typing import Any

from bundles import PROJECT

from dpo_fast.errors import UsageError
from dpo_fast.files import make_folder, write_json

FOLDER = PROJECT / "benchmarks" / "results"
FORMAT = 1
SPEED, VERIFY = "speed", "verify"


def choose_path(date: str, device: str, kind: str) -> Path:
    """A file that is not there yet: DATE-DEVICE.json, with a number where there is one already.

    Args:
        date: ISO's, of which the day is taken.
        device: its name.
        kind: "speed" or "verify".
    """
    name = re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-") or "device"
    stem = f"{date[:10]}-{name}" + ("-verify" if kind == VERIFY else "")
    numbered = (FOLDER / f"{stem}{'' if number == 1 else f'-{number}'}.json" for number in range(1, 1000))
    return next(path for path in numbered if not path.exists())


def write_result(path: Path, result: dict[str, Any]) -> None:
    """Write a result's file, whole."""
    make_folder(path.parent)
    write_json(path, result)


def read_result(path: Path) -> dict[str, Any]:
    """A result's content.

    Raises:
        UsageError: the file is not there, or is none of ours.
    """
    try:
        result: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"{path}: cannot be read ({error.strerror}); name files of benchmarks/results") from error
    except ValueError as error:
        raise UsageError(f"{path}: is no JSON ({error}); name files of benchmarks/results") from error
    if not isinstance(result, dict) or result.get("format") != FORMAT or result.get("kind") not in (SPEED, VERIFY):
        raise UsageError(f"{path}: is no result of this benchmark, format {FORMAT}; name files of benchmarks/results")
    return result
