"""Rows of Parquet files, read where the files lie: of a set's row groups those that hold the rows asked for.

Footers say how many rows each group has; nothing else is read before rows are asked for. A group is never held whole:
each column comes through a buffer of a few MiB, and some rows are decoded at a time. Who reads on from where the last
reader stopped goes on with the same decoder, so a group of a million rows is decoded once, not once a chunk.

A row is what `datasets.load_dataset` would have made of it: the columns are those of the set's first file, and the
library's own cast makes the other files' fit them. Columns that are not used are not read, so a value in them that the
library would refuse is not noticed.
"""

import threading
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, Any

from dpo_fast.errors import DatasetError, MissingDependencyError, UsageError
from dpo_fast.remote import ATTEMPTS, may_pass, open_url, retrying
from dpo_fast.text import one_line, said_by

if TYPE_CHECKING:
    import pyarrow as pa
    from datasets import Dataset, Features

ROWS_DECODED = 256  # at a time
BUFFER = 1 << 21  # bytes, of each column
FOOTERS_AT_ONCE = 16


@dataclass(frozen=True, slots=True)
class ParquetFile:
    """A file's place (a path or a URL), its size in bytes, and the rows of each of its row groups."""

    place: str
    size: int
    groups: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class RowGroupIndex:
    """Where a set's rows are; it can be pickled, and says all that another machine needs to read them.

    Attributes:
        files: in the set's order.
        features: of the set: what columns there are, and what is made of them.
        is_whole: whether all of the set's files are here, or only those that the wanted rows are in.
    """

    files: tuple[ParquetFile, ...]
    features: "Features"
    is_whole: bool

    @property
    def rows(self) -> int:
        """Rows of these files."""
        return sum(sum(file.groups) for file in self.files)


def read_index(
    places: Sequence[str], *, features: "Features | None" = None, first: str | None = None, limit: int | None = None
) -> RowGroupIndex:
    """Read the footers of a set's files, several at a time.

    Args:
        places: paths or URLs, in the set's order.
        features: of the set, if its card says them; else they are those of its first file.
        first: the set's first file, if it is none of these (it belongs to another split).
        limit: footers are read until so many rows are found.

    Raises:
        DatasetError: a file cannot be read, or does not fit the first one.
    """
    from datasets import Features

    files: list[ParquetFile] = []
    schemas: dict[Any, str] = {}  # each, and a file that has it
    rows, at_once = 0, len(places) if limit is None else 1
    with ThreadPoolExecutor(FOOTERS_AT_ONCE, "footers") as pool:
        if features is None and first is not None and first != places[0]:
            features = _features(first, read_footer(first)[1])
        while len(files) < len(places) and (limit is None or rows < limit):
            for file, schema in pool.map(read_footer, places[len(files) : len(files) + at_once]):
                files.append(file)
                rows += sum(file.groups)
                schemas.setdefault(schema, file.place)
                features = features or _features(file.place, schema)
            at_once = min(2 * at_once, FOOTERS_AT_ONCE)
    features = Features() if features is None else features
    for schema, place in schemas.items():
        if more := [name for name in schema.names if name not in features]:
            raise DatasetError(f"{place!r} does not fit the set's first file, which has no column {one_line(more)}")
        try:
            _fit(schema.empty_table(), features)
        except Exception as error:
            raise DatasetError(f"{place!r} does not fit the set's first file: {said_by(error)}") from error
    return RowGroupIndex(tuple(files), features, len(files) == len(places))


def read_footer(place: str) -> "tuple[ParquetFile, pa.Schema]":
    """A file's row groups and its columns.

    Raises:
        DatasetError: it cannot be read.
    """
    try:
        parquet, size = _open_parquet(place)
        file = ParquetFile(place, size, _groups(parquet))
        return file, parquet.schema_arrow
    except Exception as error:
        raise _unreadable(place, error) from error


class RowGroups:
    """The rows of a set of Parquet files, with the columns that are used; several threads may read at once."""

    def __init__(self, index: RowGroupIndex, columns: Sequence[str], limit: int | None = None) -> None:
        """Open nothing yet.

        Args:
            index: where the rows are.
            columns: that are wanted.
            limit: only the first rows.
        """
        from datasets import Features

        self.index = index
        self.features = Features({name: index.features[name] for name in columns})
        self._rows = index.rows if limit is None else min(limit, index.rows)
        self._starts = list(accumulate((sum(file.groups) for file in index.files), initial=0))
        self._reader: _Reader | None = None  # whose turn it is not
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return self._rows

    def batches(self, start: int, stop: int) -> Iterator[tuple[int, dict[str, list[Any]]]]:
        """The columns of the rows from `start` up to `stop`, counted from 0, some at a time.

        Yields:
            The number of the first of some rows, and their values by column.

        Raises:
            DatasetError: a file cannot be read, or is not the one that it was.
        """
        with self._lock:
            reader, self._reader = self._reader, None
        try:
            while start < stop:
                number = bisect_right(self._starts, start) - 1
                file, first = self.index.files[number], self._starts[number]
                try:
                    if reader is None or reader.file is not file:
                        reader = _Reader(file, self.features)
                    values, count = reader.read(start - first, stop - first)
                except Exception as error:
                    reader = None
                    raise _unreadable(file.place, error) from error
                yield start, values
                start += count
        finally:
            with self._lock:
                self._reader = reader


class _Reader:
    """An open file, and how far its rows are decoded. All rows are counted from the file's first."""

    def __init__(self, file: ParquetFile, features: "Features") -> None:
        self.file = file
        self._features = features
        self._parquet, size = _open_parquet(file.place)
        if (size, _groups(self._parquet)) != (file.size, file.groups):
            raise DatasetError(f"{file.place!r} has changed since this set was opened: start again")
        there = self._parquet.schema_arrow.names
        # Of a file that has none of them, one other says how many rows there are.
        self._columns = [name for name in features if name in there] or there[:1]
        self._starts = list(accumulate(file.groups, initial=0))
        self._batches: Iterator[pa.RecordBatch] = iter(())
        self._start = self._stop = 0  # the rows in `_rows`
        self._rows: Dataset | pa.RecordBatch | None = None

    def read(self, start: int, stop: int) -> tuple[dict[str, list[Any]], int]:
        """The next rows from `start` on: those that are decoded already, or else some more; their values and number."""
        from datasets import Dataset

        group = bisect_right(self._starts, start) - 1
        if not self._start <= start or self._stop < self._starts[group] or self._rows is None:
            self._start = self._stop = self._starts[group]
            self._batches = (
                batch
                for number in range(group, len(self.file.groups))  # one after the other: no batch is of two
                for batch in self._parquet.iter_batches(ROWS_DECODED, row_groups=[number], columns=self._columns)
            )
        while self._stop <= start:
            self._rows = next(self._batches, None)
            if self._rows is None:
                raise DatasetError(
                    f"{self.file.place!r} ends at row {self._stop}, before its footer's last: get it again"
                )
            self._start, self._stop = self._stop, self._stop + self._rows.num_rows
        if not isinstance(self._rows, Dataset):
            self._rows = self._decoded(self._rows)
        end = min(stop, self._stop)
        return self._rows[start - self._start : end - self._start], end - start

    def _decoded(self, rows: "pa.RecordBatch") -> "Dataset":
        """What the library makes of some rows."""
        import pyarrow as pa
        from datasets import Dataset, DatasetInfo
        from datasets.table import InMemoryTable

        where = f"{self.file.place!r}, rows {self._start + 1} to {self._stop}"
        table = pa.Table.from_batches([rows])
        try:
            table.validate(full=True)
        except ValueError as error:
            raise DatasetError(f"{where}: there is what is no text: mend it ({said_by(error)})") from error
        try:
            table = _fit(table.select([name for name in self._features if name in table.column_names]), self._features)
        except Exception as error:
            raise DatasetError(f"{where}: do not fit the set's first file ({said_by(error)})") from error
        return Dataset(InMemoryTable(table), info=DatasetInfo(features=self._features), fingerprint="rows")


def _fit(table: "pa.Table", features: "Features") -> "pa.Table":
    """A table as the set's columns have it, by the library's own rules."""
    from datasets.table import table_cast

    return table_cast(table, features.arrow_schema)


def _features(place: str, schema: "pa.Schema") -> "Features":
    """What the library makes of a file's columns."""
    from datasets import Features

    try:
        return Features.from_arrow_schema(schema)
    except Exception as error:
        raise DatasetError(
            f"{place!r} has columns that the datasets library does not know: {said_by(error)}"
        ) from error


def _groups(parquet: Any) -> tuple[int, ...]:
    """The rows of each row group, as the footer has them."""
    metadata = parquet.metadata
    groups = tuple(metadata.row_group(number).num_rows for number in range(metadata.num_row_groups))
    if min(groups, default=0) < 0:
        raise ValueError(f"a row group of {min(groups)} rows")
    return groups


def _open_parquet(place: str) -> tuple[Any, int]:
    """A file's decoder, and its size in bytes."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    file = pa.PythonFile(_FileElsewhere(place), "r") if "://" in place else pa.OSFile(place)
    # Without a buffer, or with pre_buffer, a group's columns would be in memory whole.
    parquet = pq.ParquetFile(file, buffer_size=BUFFER, pre_buffer=False, page_checksum_verification=True)
    return parquet, file.size()


class _FileElsewhere:
    """A file of an fsspec file system, for PyArrow: what is read is what was asked for, and reads are tried again."""

    closed = False

    def __init__(self, url: str) -> None:
        # No cache: each column is read through a buffer of its own, and going from one to another would only empty it.
        filesystem, path = open_url(url)
        self._file = retrying(lambda: filesystem.open(path, "rb", cache_type="none"))
        if self._file.size is None:
            raise DatasetError(f"{url!r}: its server does not say how long it is; download it, and give the file")
        self._position = 0

    def read(self, size: int = -1) -> bytes:
        size = max(0, min(self._file.size - self._position, size if size >= 0 else self._file.size))
        content = retrying(lambda: self._read(self._position, size))
        self._position += size
        return content

    def _read(self, position: int, size: int) -> bytes:
        self._file.seek(position)
        content = bytes(self._file.read(size))
        if len(content) != size:
            raise ConnectionError(f"{len(content)} of {size} bytes came")
        return content

    def seek(self, position: int, whence: int = 0) -> int:
        self._position = position + (0, self._position, self._file.size)[whence]
        return self._position

    def tell(self) -> int:
        return self._position

    def flush(self) -> None:
        """Nothing is ever written."""

    def close(self) -> None:
        self.closed = True
        self._file.close()


def _unreadable(place: str, error: Exception) -> Exception:
    """Our error for one of another library: the file, what is wrong with it, and the way out."""
    if isinstance(error, DatasetError | UsageError | MissingDependencyError):
        return error
    if isinstance(error, FileNotFoundError):
        return DatasetError(f"{place!r} is not there: name another file, or bring it back")
    if isinstance(error, PermissionError):
        return DatasetError(f"{place!r} may not be read ({said_by(error)}): give yourself the right, or log in")
    if may_pass(error):
        tries = f", tried {ATTEMPTS} times" if "://" in place else ""
        return DatasetError(f"{place!r} cannot be read now{tries} ({said_by(error)}): run the same command again later")
    if isinstance(error, OSError) and error.errno:
        return DatasetError(f"{place!r} cannot be read: {said_by(error)}")
    return DatasetError(f"{place!r} is damaged, or no Parquet file: get it again ({said_by(error)})")
