"""Rows: read a preference data set and give it row by row, as TRL would see it.

Files are read with the `datasets` library, as TRL's users do, so that what Arrow does to a row (a message key that
only some rows have is None in the others; a CSV field that reads NA or None is missing) is done here too.

Parquet (a file, a folder, a Hub repository, a URL that fsspec knows) is read where it lies, row group by row group, and
may be larger than memory and disk; see `dpo_fast.row_groups`. Everything else the library first converts into its cache
on each machine (HF_DATASETS_CACHE), as it does in training.

Where a row has no `prompt`, the prompt is what `chosen` and `rejected` begin with (trl/data_utils.py 1.16,
`extract_prompt`). Kept, because the numbers depend on it:

- for text, the prompt ends at the first differing character, even within a word; one space before it goes to the
  completions;
- where one is the beginning of the other, the prompt is all but the last character or message of the shorter one, so
  that neither completion is empty.

Refused, because what TRL makes of it is not a preference: rows that begin differently (TRL looks at the element before
the first, which is the last, or goes on with an empty prompt), empty or missing fields, text beside messages. TRL
stops with a Python error at most of these.
"""

import errno
import gzip
import hashlib
import json
import logging
import re
import reprlib
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dpo_fast.errors import DatasetError, InputError, RowError, StorageError, UsageError
from dpo_fast.files import sha256
from dpo_fast.parquet_files import SUFFIX, URL, ParquetFiles, ParquetSplit, at_url, of_builder
from dpo_fast.row_groups import RowGroupIndex, RowGroups, read_index
from dpo_fast.text import without_secrets
from dpo_fast.types import Message, OnError, PreferenceRow, SkippedRow, Text

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict


# The suffixes that are read, and the loader of the `datasets` library for each.
LOADERS = {
    ".jsonl": "json",
    ".jsonl.gz": "json",
    ".json": "json",
    ".json.gz": "json",
    ".parquet": "parquet",
    ".csv": "csv",
    ".csv.gz": "csv",
}
# An owner is asked for: a bare name such as `json` would be one of the library's loaders, which reads whatever lies in
# the working folder.
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_COLUMNS = ("prompt", "chosen", "rejected", "tools", "chat_template_kwargs")
# What an assistant's message may have in place of content.
_INSTEAD_OF_CONTENT = ("tool_calls", "reasoning_content", "thinking")

# What a data set gives in the place of each of its rows.
Item = PreferenceRow | SkippedRow
ROWS_DECODED = 256  # at a time
FOLDER_HINT = f"it needs data files ({', '.join(LOADERS)}) or what datasets.save_to_disk writes"
URL_HINT = (
    "there are no Parquet files, which is all that is read from a URL, or they may not be read: check the address and "
    "the credentials"
)
HUB_HINT = (
    "there is no file or folder {!r} here, and the Hub did not give it: check the name and the network, log in with "
    "`hf auth login` if it is private, or give a local file or folder (`hf download --repo-type dataset`)"
)

_printable = reprlib.Repr()
_printable.maxstring = _printable.maxother = 200


@dataclass(frozen=True)
class PreferenceSet:
    """A preference data set, on disk until its rows are asked for.

    Attributes:
        name: what it was loaded from: the file, the folder, the URL or the Hub id.
        split: the split that was taken, or None where the data set has no splits.
        dataset: the row groups of Parquet files; of everything else the `datasets.Dataset`, memory-mapped.
        fingerprint: names the data: SHA-256 of the file's bytes, or of all files of a folder; of a URL, that of the
            files' names, sizes and checksums; for the Hub, of the commit and the names of the split's files, or, where
            these are not Parquet, the library's own. `limit` is no part of it.
        group_by: the column whose value becomes `PreferenceRow.group`, or None.
        rows_in_all: without the limit; None where no more files were looked at than the limit asks for.
    """

    name: str
    split: str | None
    dataset: "Dataset | RowGroups"
    fingerprint: str
    group_by: str | None = None
    rows_in_all: int | None = None

    def __len__(self) -> int:
        return len(self.dataset)

    def rows(self, *, on_error: OnError = "stop", start: int = 0, stop: int | None = None) -> Iterator[Item]:
        """Give the rows one by one, in the data set's order.

        The first usable row of the whole set decides whether it holds text or conversations; a row of the other kind
        is an error.

        Args:
            on_error: at a row that cannot be used, "stop" raises; "skip" gives a `SkippedRow` in its place.
            start: of the rows that are wanted, counted from 0.
            stop: where they end; None: with the set.

        Yields:
            One item a row of the data set; `row` counts them from 1.

        Raises:
            RowError: a row that cannot be used, with `on_error="stop"`.
            DatasetError: the file holds what is no text.
        """
        kind = self._kind if start else None
        for number, record in self._records(start, len(self) if stop is None else min(stop, len(self))):
            try:
                row = _parse(record, number, self.group_by)
                if kind is not None and type(row.chosen) is not kind:
                    raise RowError(
                        number, f"{_kind(row.chosen)}, where the rows before are {_kind(kind())}: split them"
                    )
            except RowError as error:
                if on_error == "stop":
                    raise
                yield SkippedRow(error.row, error.reason)
            else:
                kind = type(row.chosen)
                yield row

    @cached_property
    def _kind(self) -> type | None:
        """What the first usable row holds: str or list."""
        usable = (row for row in self.rows(on_error="skip") if isinstance(row, PreferenceRow))
        first = next(usable, None)
        return None if first is None else type(first.chosen)

    def _records(self, start: int, stop: int) -> Iterator[tuple[int, dict[str, Any]]]:
        """Rows as dictionaries, with their numbers, decoded some at a time."""
        if isinstance(self.dataset, RowGroups):
            batches = self.dataset.batches(start, stop)
        else:
            batches = self._batches(self.dataset, start, stop)
        for first, values in batches:
            for offset in range(min(map(len, values.values()))):
                yield first + offset + 1, {name: column[offset] for name, column in values.items()}

    def _batches(self, dataset: "Dataset", start: int, stop: int) -> Iterator[tuple[int, dict[str, list[Any]]]]:
        """The columns of some rows at a time, and the number of the first of them, counted from 0."""
        columns = _used_columns(_mapped_anew(dataset), self.group_by).with_format(None)
        for first in range(start, stop, ROWS_DECODED):
            end = min(first + ROWS_DECODED, stop)
            try:
                # The JSON loader lets bytes through that are not UTF-8, at which decoding some row would fail.
                if columns._indices is None:
                    columns.data.slice(first, end - first).validate(full=True)
                values = columns[first:end]
            except ValueError as error:
                path = Path(self.name)
                raise _unreadable(self.name, error, _fault_in(path) if path.is_file() else None) from error
            yield first, values


def fingerprint_of(dataset: str) -> str | None:
    """What names the data of a file or folder: SHA-256 of the bytes; None for what is not on this machine.

    Raises:
        DatasetError: it cannot be read.
    """
    path = Path(dataset)
    try:
        is_file, is_folder = path.is_file(), path.is_dir()
    except OSError as error:
        raise DatasetError(f"{shown(dataset)} cannot be read: {error.strerror}") from error
    if is_file:
        return _sha256(path)
    if not is_folder or not dataset:
        return None
    digest = hashlib.sha256()
    for file in sorted(file for file in path.rglob("*") if file.is_file()):
        digest.update(f"{file.relative_to(path).as_posix()}\0{_sha256(file)}\0".encode())
    return digest.hexdigest()


def load_preferences(
    dataset: str,
    *,
    split: str | None = None,
    limit: int | None = None,
    group_by: str | None = None,
    fingerprint: str | None = None,
) -> PreferenceSet:
    """Open a preference data set; its rows are read later, by `PreferenceSet.rows`.

    Args:
        dataset: a file (`LOADERS` has the suffixes), a folder that `datasets.save_to_disk` wrote, a folder of data
            files, a Hub id (`owner/name`), or the URL of a Parquet file or of a folder or pattern of such
            (`s3://bucket/prefs`). What exists on this machine goes before the Hub.
        split: the split to take; without it "test" if there is one, else the only one. A file has no splits.
        limit: take the first `limit` rows only.
        group_by: a column by which results are to be grouped.
        fingerprint: what `fingerprint_of` said, if it has been asked already.

    Returns:
        The set, with the columns that preferences need.

    Raises:
        DatasetError: no such file, a file that cannot be read, no such split, no preferences in it, or no rows.
        UsageError: no `dataset`, `limit` below 1, `split` for a file, `group_by` a column that is not there.
        MissingDependencyError: the URL's file system is not installed.
        StorageError: the library's cache cannot be written.
    """
    if limit is not None and limit < 1:
        raise UsageError(f"--limit {limit} must be at least 1")
    if not dataset:
        raise UsageError("--dataset is empty: give a file, a folder or a data set on the Hub (owner/name)")
    path = Path(dataset)
    fingerprint = fingerprint or fingerprint_of(dataset)
    if (files := find_parquet(dataset, split)) is not None:
        return open_parquet(dataset, files, limit=limit, group_by=group_by, fingerprint=fingerprint)
    loaded: Dataset
    if path.is_file():
        _refuse_split(dataset, split)
        loaded = _load_file(path, str(fingerprint))
    elif path.is_dir():
        loaded, split = _one_split(_load_folder(path), dataset, split)
    elif _is_hub_id(dataset):
        loaded, split = _one_split(_load_hub(dataset), dataset, split)
        fingerprint = loaded._fingerprint
    else:
        raise DatasetError(f"{dataset!r}: no such file or folder; a data set on the Hub is written owner/name")

    _check_columns(dataset, loaded.column_names, group_by)
    rows = len(loaded)
    if rows == 0:
        raise DatasetError(f"{dataset!r} has no rows" + (f" in its split {split!r}" if split else ""))
    if limit is not None:
        loaded = loaded.take(min(limit, rows))
    return PreferenceSet(dataset, split, loaded, str(fingerprint), group_by, rows)


def find_parquet(dataset: str, split: str | None) -> ParquetSplit | None:
    """Where the Parquet files of a set are; None for a set of another format.

    Raises:
        DatasetError: the folder, the Hub or the URL cannot be read, or there is no such split.
        UsageError, MissingDependencyError: the URL, or a split of it, cannot be used.
    """
    files = _find_parquet(dataset)
    if files is None:
        return None
    if None in files.splits:
        _refuse_split(dataset, split)
        chosen = None
    else:
        chosen = _choose_split([str(name) for name in files.splits], dataset, split)
    if files.rows is not None and set(files.rows) != set(files.splits):
        raise DatasetError(
            f"{dataset!r}: its card says that the splits are {shown(list(files.rows))}, its files are "
            f"{shown(list(files.splits))}; the datasets library refuses it: mend the card, or get the files again"
        )
    with _reading(dataset, URL_HINT):
        return files.take(chosen)


def _find_parquet(dataset: str) -> ParquetFiles | None:
    """The files of all splits."""
    path = Path(dataset)
    if URL.fullmatch(dataset):
        with _quiet(), _reading(dataset, URL_HINT):
            return at_url(dataset)
    if path.is_file():
        return ParquetFiles({None: (str(path),)}) if path.name.lower().endswith(SUFFIX) else None
    on_hub = not path.is_dir()
    if on_hub and not _is_hub_id(dataset):
        return None
    if not on_hub and (_is_saved(path) or path.name.lower().endswith(tuple(LOADERS))):
        return None

    from datasets import load_dataset_builder

    with _quiet(), _reading(dataset, HUB_HINT.format(dataset) if on_hub else FOLDER_HINT):
        return of_builder(load_dataset_builder(dataset if on_hub else str(path.absolute())))


def open_parquet(
    dataset: str, files: ParquetSplit, *, limit: int | None, group_by: str | None, fingerprint: str | None
) -> PreferenceSet:
    """Open a set whose Parquet files were found; arguments and errors as those of `load_preferences`."""
    index = read_index(files.places, features=files.features, first=files.first, limit=limit)
    _check_columns(dataset, list(index.features), group_by)
    if index.rows == 0:
        raise DatasetError(f"{dataset!r} has no rows" + (f" in its split {files.name!r}" if files.name else ""))
    if index.is_whole and files.rows is not None and files.rows != index.rows:
        raise DatasetError(
            f"{dataset!r}: its card says that the split {files.name!r} has {files.rows} rows, its files have "
            f"{index.rows}; the datasets library refuses it: mend the card, or get the files again"
        )
    fingerprint = str(fingerprint or files.fingerprint)
    return of_row_groups(dataset, files.name, index, fingerprint, limit=limit, group_by=group_by)


def of_row_groups(
    dataset: str, split: str | None, index: RowGroupIndex, fingerprint: str, *, limit: int | None, group_by: str | None
) -> PreferenceSet:
    """The set whose rows an index locates; nothing is opened yet."""
    columns = [name for name in index.features if name in (*_COLUMNS, group_by)]
    rows = RowGroups(index, columns, limit)
    return PreferenceSet(dataset, split, rows, fingerprint, group_by, index.rows if index.is_whole else None)


def shown(value: object) -> str:
    """Give what came from data as one short line of printable characters, fit for a terminal."""
    text = _printable.repr(value)
    return text if len(text) <= 300 else text[:297] + "..."


def _load_file(path: Path, fingerprint: str) -> "Dataset":
    """Read one file; its SHA-256 names the cached copy, so that a changed file is never served from the cache."""
    suffix = next((suffix for suffix in LOADERS if path.name.lower().endswith(suffix)), None)
    if suffix is None:
        raise DatasetError(f"{str(path)!r}: the suffix is not one of {', '.join(LOADERS)}; convert or rename the file")
    if path.stat().st_size == 0:
        raise DatasetError(f"{str(path)!r} is empty")

    from datasets import load_dataset

    try:
        with _quiet():
            return load_dataset(
                LOADERS[suffix],
                # The library takes a pattern, so a name such as `[a].jsonl` has to be written as one.
                data_files=re.sub(r"([*?[])", r"[\1]", str(path.absolute())),
                name=fingerprint[:32],
                split="train",
            )
    except Exception as error:
        raise _unreadable(str(path), error, _fault_in(path)) from error


def _load_folder(path: Path) -> "Dataset | DatasetDict":
    """Read a folder that `save_to_disk` wrote, or one of data files."""
    if path.name.lower().endswith(tuple(LOADERS)):
        raise DatasetError(f"{str(path)!r} is a folder, not a file; give the file in it, or rename the folder")

    from datasets import load_dataset, load_from_disk

    with _quiet(), _reading(str(path), FOLDER_HINT):
        return load_from_disk(str(path)) if _is_saved(path) else load_dataset(str(path.absolute()))


def _load_hub(name: str) -> "DatasetDict":
    """Download a data set from the Hub, or take it from the library's cache when offline."""
    from datasets import load_dataset

    with _reading(name, HUB_HINT.format(name)):
        return load_dataset(name)


def _is_hub_id(dataset: str) -> bool:
    return _HUB_ID.fullmatch(dataset) is not None and not dataset.lower().endswith(tuple(LOADERS))


def _is_saved(folder: Path) -> bool:
    """Whether a folder was written by `datasets.save_to_disk`."""
    return any((folder / name).is_file() for name in ("state.json", "dataset_dict.json"))


def _refuse_split(name: str, split: str | None) -> None:
    if split is not None:
        raise UsageError(f"--split {split!r}: {name!r} is one file and has no splits; leave --split out")


def _one_split(loaded: "Dataset | DatasetDict", name: str, split: str | None) -> tuple["Dataset", str | None]:
    """The split asked for, as `_choose_split` has it, and its name."""
    if not isinstance(loaded, dict):
        if split is not None:
            raise UsageError(f"--split {split!r}: {name!r} was saved without splits; leave --split out")
        return loaded, None
    split = _choose_split(list(loaded), name, split)
    return loaded[split], split


def _choose_split(names: list[str], name: str, split: str | None) -> str:
    """Take the split asked for; else "test", else the only one."""
    if split is None:
        if "test" not in names and len(names) != 1:
            raise DatasetError(f"{name!r} has the splits {', '.join(map(repr, names))}: choose one with --split")
        split = "test" if "test" in names else names[0]
    if split not in names:
        raise DatasetError(f"{name!r} has no split {split!r}; it has {', '.join(map(repr, names))}")
    return split


def _check_columns(name: str, columns: list[str], group_by: str | None) -> None:
    """Refuse a data set that cannot be preferences, or cannot be grouped as asked."""
    there = shown(", ".join(columns))
    missing = [column for column in ("chosen", "rejected") if column not in columns]
    if missing:
        raise DatasetError(
            f"{name!r} has no column {' and no column '.join(map(repr, missing))}; it has {there}: rename its columns"
        )
    if "image" in columns or "images" in columns:
        raise DatasetError(f"{name!r} has images; only preferences of text are evaluated")
    if group_by is not None and group_by not in columns:
        raise UsageError(f"--group-by {group_by!r}: {name!r} has no such column; it has {there}")


def _used_columns(loaded: "Dataset", group_by: str | None) -> "Dataset":
    """The columns that rows are made of, so that no other is decoded."""
    return loaded.select_columns([name for name in loaded.column_names if name in (*_COLUMNS, group_by)])


def _mapped_anew(loaded: "Dataset") -> "Dataset":
    """The same data set, its files mapped into memory once more.

    What is read of a mapped file stays in memory as long as the mapping does, so a reader that goes through a large
    set maps it anew now and then.
    """
    from datasets import Dataset, concatenate_datasets

    if not loaded.cache_files or loaded._indices is not None:
        return loaded
    parts = [Dataset.from_file(file["filename"], info=loaded.info, split=loaded.split) for file in loaded.cache_files]
    anew = concatenate_datasets(parts)
    return anew if len(anew) == len(loaded) and anew.column_names == loaded.column_names else loaded


def _parse(record: dict[str, Any], number: int, group_by: str | None) -> PreferenceRow:
    """Make a row of a record, or raise RowError."""
    chosen = _field(record, "chosen", number)
    rejected = _field(record, "rejected", number)
    if type(chosen) is not type(rejected):
        raise RowError(number, f"'chosen' is {_kind(chosen)} but 'rejected' is {_kind(rejected)}: make them alike")
    if "prompt" in record:
        prompt = _field(record, "prompt", number)
        if type(prompt) is not type(chosen):
            raise RowError(
                number,
                f"'prompt' is {_kind(prompt)} but 'chosen' is {_kind(chosen)}: make them alike, or leave the column "
                "'prompt' out if 'chosen' and 'rejected' begin with the prompt",
            )
    else:
        start = _end_of_prompt(chosen, rejected, number)
        prompt, chosen, rejected = chosen[:start], chosen[start:], rejected[start:]
    return PreferenceRow(
        row=number,
        prompt=prompt,
        chosen=chosen,
        rejected=rejected,
        tools=_tools(record.get("tools"), number),
        chat_template_kwargs=_chat_template_kwargs(record.get("chat_template_kwargs"), number),
        group=None if group_by is None else str(record[group_by]),
    )


def _end_of_prompt(chosen: Text, rejected: Text, number: int) -> int:
    """Where the prompt ends that both begin with, as TRL's `extract_prompt` finds it; see the module's docstring."""
    end = next((index for index, (a, b) in enumerate(zip(chosen, rejected, strict=False)) if a != b), None)
    if end is None:
        end = min(len(chosen), len(rejected)) - 1
    elif end > 0 and chosen[end - 1] == " ":
        end -= 1
    if end == 0:
        raise RowError(
            number,
            f"'chosen' and 'rejected' have no beginning in common ({shown(chosen[0])}, {shown(rejected[0])}), so "
            "there is no prompt: give it in a column 'prompt'",
        )
    return end


def _field(record: dict[str, Any], column: str, number: int) -> Text:
    """A prompt or completion: text, or messages, and not empty."""
    value = record[column]
    if value is None:
        raise RowError(number, f"{column!r} is missing or null: fill it in, or leave the row out")
    if not isinstance(value, str | list):
        raise RowError(number, f"{column!r} must be text or a list of messages, not {shown(value)}")
    if not value:
        raise RowError(number, f"{column!r} is empty: fill it in, or leave the row out")
    if isinstance(value, list):
        for index, message in enumerate(value):
            _check_message(message, f"message {index + 1} of {column!r}", number)
    return value


def _check_message(message: object, place: str, number: int) -> None:
    """Refuse what a chat template would render as an empty turn, or not at all."""
    if not isinstance(message, dict):
        raise RowError(number, f"{place} must be an object with 'role' and 'content', not {shown(message)}")
    if not isinstance(message.get("role"), str):
        raise RowError(number, f"{place} has no 'role': {shown(_without_none(message))}")
    content = message.get("content")
    if content is None and any(message.get(key) for key in _INSTEAD_OF_CONTENT):
        return
    if not isinstance(content, str | list):
        raise RowError(number, f"{place} has no text in 'content': {shown(_without_none(message))}")


def _without_none(message: Message) -> Message:
    return {key: value for key, value in message.items() if value is not None}


def _tools(value: object, number: int) -> list[Any] | None:
    """The tools' schemas: a list, or a list written as JSON, as TRL takes them."""
    tools = value
    if isinstance(value, str):
        try:
            tools = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise RowError(number, f"'tools' is text but not JSON ({shown(str(error))}): {shown(value)}") from error
    if tools is not None and not isinstance(tools, list):
        raise RowError(number, f"'tools' must be a list of tool schemas, or one written as JSON, not {shown(tools)}")
    return tools


def _chat_template_kwargs(value: object, number: int) -> dict[str, Any]:
    """The chat template's further arguments; none where the row has none."""
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise RowError(number, f"'chat_template_kwargs' must be an object, not {shown(value)}")
    return value


def _kind(value: Text) -> str:
    return "text" if isinstance(value, str) else "messages"


def _sha256(path: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    try:
        return sha256(path)
    except OSError as error:
        raise DatasetError(f"{str(path)!r} cannot be read: {error.strerror}") from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the library's progress bars and messages off standard error while a local file is read."""
    import datasets

    level, bars = datasets.logging.get_verbosity(), datasets.are_progress_bars_disabled()
    datasets.logging.set_verbosity(logging.CRITICAL)
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        datasets.logging.set_verbosity(level)
        if not bars:
            datasets.enable_progress_bars()


@contextmanager
def _reading(name: str, hint: str | None) -> Iterator[None]:
    """Turn what libraries say of a set into our error.

    Raises:
        DatasetError: it cannot be read.
        StorageError: the library's cache cannot be written.
    """
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        raise _unreadable(name, error, hint) from error


def _unreadable(name: str, error: Exception, hint: str | None) -> DatasetError | StorageError:
    """Name what is wrong in one line: what we found ourselves, or else what the library says."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES):
            where = f" ({cause.filename!r})" if cause.filename else ""
            return StorageError(
                f"{name!r} could not be written to the cache of the datasets library: {cause.strerror}{where}; "
                "set HF_DATASETS_CACHE to a folder with room"
            )
        cause = cause.__cause__
    # `DatasetGenerationError` only says that something went wrong; what, its cause says.
    said = error.__cause__ if type(error).__name__ == "DatasetGenerationError" and error.__cause__ else error
    if "corresponds to no data" in str(said):  # a file of blank lines, in the library's words
        return DatasetError(f"{name!r} has no rows")
    message = shown(without_secrets(str(said))) if str(said) else type(said).__name__
    return DatasetError(f"{name!r} cannot be read: " + (hint or message) + (f" ({message})" if hint else ""))


def _fault_in(path: Path) -> str | None:
    """Say where a JSON or compressed file that could not be read is at fault, if that can be found."""
    name = path.name.lower()
    try:
        with gzip.open(path) if name.endswith(".gz") else path.open("rb") as file:
            if name.removesuffix(".gz").endswith(".json"):
                return _fault_in_document(file.read())
            for number, line in enumerate(file, start=1):
                if ".jsonl" in name and (fault := _fault_in_line(line)):
                    return f"line {number} {fault}: mend or remove it"
    except (OSError, EOFError, zlib.error) as error:
        return f"the compressed file is damaged or cut short; get it again ({shown(str(error))})"
    return None


def _fault_in_document(text: bytes) -> str | None:
    """Say where a .json file is at fault: one document, or else one object a line."""
    try:
        json.loads(text)
    except json.JSONDecodeError as error:
        if error.msg != "Extra data":
            return f"line {error.lineno}, column {error.colno} is not JSON ({error.msg}): mend it"
        for number, line in enumerate(text.splitlines(), start=1):
            if fault := _fault_in_line(line):
                return f"line {number} {fault}: mend or remove it"
    except UnicodeDecodeError as error:
        return f"byte {error.start + 1} is not UTF-8: convert the file"
    except ValueError as error:
        return f"it is not JSON ({shown(str(error))})"
    except RecursionError:
        return "it is nested too deeply"
    return None


def _fault_in_line(line: bytes) -> str | None:
    """Say why a line of JSON Lines is not an object, or None."""
    try:
        value = json.loads(line) if line.strip() else {}
    except UnicodeDecodeError:
        return "is not UTF-8"
    except ValueError as error:
        return f"is not JSON ({shown(str(error))})"
    except RecursionError:
        return "is nested too deeply"
    return None if isinstance(value, dict) else f"is not an object ({shown(value)})"
