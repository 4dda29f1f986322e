"""A run's folder: what it holds, whose it is, and what may be written into it.

::

    RUN/metrics.json       the numbers; there only when the run is finished
        skipped.jsonl      rows that could not be used
        failed.jsonl       in their place, parts that a cluster's workers failed at
        scores/            the parts (see `dpo_fast.store`)
        scores.url         in its place, where the parts lie elsewhere (`--scores URL`): one line, without secrets
"""

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from dpo_fast.errors import MissingDependencyError, OutputExistsError, StorageError, UsageError
from dpo_fast.files import make_folder, storage_errors, write_json, write_text
from dpo_fast.storage import LocalFolder, Storage, open_storage
from dpo_fast.store import ScoreStore, part_name
from dpo_fast.types import LossSettings, SkippedRow

METRICS = "metrics.json"
SKIPPED = "skipped.jsonl"
FAILED = "failed.jsonl"
SCORES = "scores"
SCORES_URL = "scores.url"


def open_scores(run: Path) -> ScoreStore:
    """A run's parts, wherever they lie.

    Raises:
        StorageError: the run's scores.url is damaged.
        MissingDependencyError: an extra is not installed.
    """
    return ScoreStore(_elsewhere(run) or LocalFolder(run / SCORES))


def make_scores(run: Path, url: str | None) -> ScoreStore:
    """The parts of a run that begins or goes on; a place that refuses is found now.

    Args:
        run: its folder, which only this process writes (see `locked`).
        url: where the parts shall lie: a URL, or a folder that all who write can reach; None takes what the run began
            with, or its own folder.

    Raises:
        OutputExistsError: the run was begun with another place.
        StorageError: the place, or the run's folder, refused.
        UsageError: the URL cannot be used.
        MissingDependencyError: an extra is not installed.
    """
    own = LocalFolder(run / SCORES)
    elsewhere = _elsewhere(run)
    begun = elsewhere or (own if ScoreStore(own).parts() else None)
    wanted = begun or own
    if url is not None:
        wanted = open_storage(url)
        if isinstance(wanted, LocalFolder):
            # Not resolve(), which would give the name of what a link leads to on this machine.
            folder = Path(os.path.abspath(wanted.folder))  # noqa: PTH100
            wanted = own if folder == Path(os.path.abspath(own.folder)) else LocalFolder(folder)  # noqa: PTH100
    if begun is not None and begun.name != wanted.name:
        raise OutputExistsError(
            f"{run}: was begun with its parts in {begun.name}, and --scores is {wanted.name}; leave --scores out to go "
            "on with it, or name another --output"
        )
    wanted.make()
    if wanted is not own and elsewhere is None:
        make_folder(run)
        write_text(run / SCORES_URL, f"{wanted.name}\n")
    return ScoreStore(wanted)


def _elsewhere(run: Path) -> Storage | None:
    """Where a run's parts lie, if not in its folder.

    Raises:
        StorageError: its scores.url is damaged.
        MissingDependencyError: an extra is not installed.
    """
    path = run / SCORES_URL
    try:
        url = path.read_text(encoding="utf-8").strip()
        return open_storage(url) if url else None
    except (FileNotFoundError, NotADirectoryError):
        return None
    except MissingDependencyError:
        raise
    except OSError as error:
        raise StorageError(f"{path}: cannot be read ({error.strerror}); mend that, or name another folder") from error
    except (UnicodeDecodeError, UsageError) as error:
        raise StorageError(f"{path}: is damaged ({error}); write the parts' place into it, in one line") from error


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
        has_parts = (output / SCORES_URL).is_file() or any((output / SCORES).glob("part-*.parquet"))
        is_run = (output / SCORES_URL).is_file() or (output / SCORES).is_dir()
        is_unfinished = is_run and not (output / METRICS).exists()
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
        for name in (METRICS, SKIPPED, FAILED):
            (output / name).unlink(missing_ok=True)
        store.clear()


def remove_remains(output: Path, store: ScoreStore) -> None:
    """Remove what a killed process left half written.

    Raises:
        StorageError: the disk refused.
    """
    names = (f".{METRICS}.*", f".{SKIPPED}.*", f".{SCORES_URL}.*")
    with storage_errors(output):
        for path in [path for name in names for path in output.glob(name)]:
            path.unlink(missing_ok=True)
    store.remove_remains()


def folders_to_make(output: Path, scores: str | None) -> list[Path]:
    """The folder of a run, and those that are not there yet of the others that it needs; the innermost first.

    Args:
        output: the run's folder.
        scores: where its parts shall lie: a URL or a folder; None: in the run's folder.

    Raises:
        UsageError: the URL cannot be used.
        MissingDependencyError: an extra is not installed.
    """
    elsewhere = None if scores is None else open_storage(scores)
    places = [output, elsewhere.folder] if isinstance(elsewhere, LocalFolder) else [output]
    missing = {folder for place in places for folder in (place, *place.parents) if not folder.exists()}
    return sorted(missing | {output}, key=lambda folder: len(folder.absolute().parts), reverse=True)


@contextmanager
def removed_if_empty(output: Path, made: Iterable[Path], *, is_plan: bool = False) -> Iterator[None]:
    """Leave nothing behind of a run that fails before its first part; a part that was written stays for later.

    Args:
        output: the run's folder.
        made: folders that go if they are empty, in this order: see `folders_to_make`.
        is_plan: whether nothing is meant to be written, so that all is well without a part.
    """
    try:
        yield
    except BaseException:
        _remove_if_empty(output, made)
        raise
    if is_plan:
        _remove_if_empty(output, made)


def _remove_if_empty(output: Path, made: Iterable[Path]) -> None:
    """Remove what there is of a run that has neither parts nor metrics, nor a list of those that failed."""
    with suppress(OSError, StorageError, MissingDependencyError):  # what failed first is what is told
        store = open_scores(output)
        if store.parts() or (output / METRICS).exists() or (output / FAILED).exists():
            return
        store.clear()
        (output / SCORES_URL).unlink(missing_ok=True)
        if (output / SCORES).is_dir():
            (output / SCORES).rmdir()
    for folder in made:
        with suppress(OSError):
            folder.rmdir()


def check_parts(store: ScoreStore, wanted: Iterable[int]) -> None:
    """Refuse parts of another run: what is not ours would be taken for ours.

    Raises:
        OutputExistsError: there is a part that this run has not.
    """
    others = set(store.parts()) - set(wanted)
    if others:
        raise OutputExistsError(
            f"{store.name}: holds an unfinished run of other rows ({part_name(min(others))} is none of "
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
