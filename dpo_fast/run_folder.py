"""A run's folder: what it holds, whose it is, and what may be written into it.

::

    RUN/metrics.json       the numbers; there only when the run is finished
        skipped.jsonl      rows that could not be used
        scores/            the parts (see `dpo_fast.store`)
"""

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dpo_fast.errors import OutputExistsError, StorageError
from dpo_fast.files import storage_errors, write_json, write_text
from dpo_fast.store import CHECKSUMS, ScoreStore
from dpo_fast.types import LossSettings, SkippedRow

METRICS = "metrics.json"
SKIPPED = "skipped.jsonl"
SCORES = "scores"


def check_output(output: Path, wanted: Mapping[str, Any], *, overwrite: bool) -> None:
    """Take a new or an empty folder, and a run that this one goes on with; refuse all else.

    Args:
        output: the run's folder.
        wanted: of the provenance of a finished run, what would have to be the same.
        overwrite: whether a run of something else may be replaced.

    Raises:
        OutputExistsError: the folder holds something else.
        StorageError: the disk refused.
    """
    with storage_errors(output):
        try:
            output.lstat()
        except FileNotFoundError:
            return
        is_empty = output.is_dir() and not any(output.iterdir())
        has_parts = output.is_dir() and any((output / SCORES).glob("part-*.parquet"))
        is_unfinished = (output / SCORES).is_dir() and not (output / METRICS).exists()
    if not (is_empty or is_unfinished or has_parts):
        raise OutputExistsError(f"{output}: exists and is no run of `dpo-fast evaluate`; name another folder")
    if is_empty or is_unfinished or overwrite:
        return
    found = read_metrics(output)["provenance"]
    # As JSON has them, in which tuples are lists.
    differing = [name for name, value in json.loads(json.dumps(wanted)).items() if found.get(name) != value]
    if differing:
        raise OutputExistsError(
            f"{output}: holds a finished run with other {', '.join(differing)}; name another folder, or say "
            f"--overwrite; for other losses and betas, `dpo-fast rescore {output}` needs no engine"
        )


def read_metrics(run: Path) -> dict[str, Any]:
    """The content of a finished run's metrics.json.

    Raises:
        StorageError: it is missing or damaged.
    """
    path = run / METRICS
    try:
        metrics: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(metrics["provenance"], dict):
            raise TypeError("provenance")
    except FileNotFoundError as error:
        raise StorageError(f"{path}: is missing, so the run is not finished; `dpo-fast evaluate` goes on") from error
    except OSError as error:
        raise StorageError(f"{path}: cannot be read ({error.strerror})") from error
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise StorageError(f"{path}: is damaged; remove it, and evaluate again: the scores are kept") from error
    return metrics


def read_settings(metrics: Mapping[str, Any]) -> LossSettings:
    """The loss that a run was evaluated with, from the content of its metrics.json.

    Raises:
        ValueError, KeyError, TypeError, UsageError: it is damaged, or of another version.
    """
    settings = dict(metrics["provenance"]["settings"])
    lists = {name: tuple(value) for name, value in settings.items() if isinstance(value, list)}  # JSON has no tuples
    return LossSettings(**settings | lists)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep a folder from being written by two processes; the lock goes with the process, however that ends.

    Raises:
        OutputExistsError: another process is writing it.
    """
    try:
        import fcntl
    except ImportError:  # not on Windows
        yield
        return
    with storage_errors(folder):
        handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise OutputExistsError(
                f"{folder}: another process is writing this run; wait for it, or name another folder"
            ) from error
        except OSError:
            pass  # a file system without locks
        yield
    finally:
        os.close(handle)


def remove_run(output: Path, store: ScoreStore) -> None:
    """Remove the files of a run; the metrics first, so that what is left of a run never looks finished."""
    with storage_errors(output):
        (output / METRICS).unlink(missing_ok=True)
        (output / SKIPPED).unlink(missing_ok=True)
        store.clear()


def remove_remains(output: Path) -> None:
    """Remove what a killed process left half written.

    Raises:
        StorageError: the disk refused.
    """
    names = (f".{METRICS}.*", f".{SKIPPED}.*", f"{SCORES}/.part-*.parquet.*", f"{SCORES}/.{CHECKSUMS}.*")
    with storage_errors(output):
        for path in [path for name in names for path in output.glob(name)]:
            path.unlink(missing_ok=True)


def remove_if_empty(*folders: Path) -> None:
    """Leave nothing behind of a run that failed before its first part; a part that was written stays for later."""
    for folder in folders:
        try:
            folder.rmdir()
        except OSError:
            return


def check_parts(store: ScoreStore, wanted: Iterable[int]) -> None:
    """Refuse parts of another run: what is not ours would be taken for ours.

    Raises:
        OutputExistsError: there is a part that this run has not.
    """
    others = set(store.parts()) - set(wanted)
    if others:
        raise OutputExistsError(
            f"{store.folder.parent}: holds an unfinished run of other rows ({store.path(min(others)).name} is none of "
            "this run's parts); name another folder, or say --overwrite"
        )


def write_results(output: Path, metrics: Mapping[str, Any], skipped: Iterable[SkippedRow]) -> None:
    """Write what a finished run says; the metrics last.

    Raises:
        StorageError: the disk refused.
    """
    with storage_errors(output):
        lines = (json.dumps({"row": row.row, "reason": row.reason}, ensure_ascii=False) for row in skipped)
        write_text(output / SKIPPED, "".join(f"{line}\n" for line in lines))
        write_json(output / METRICS, metrics)
