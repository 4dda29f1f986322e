"""A preference set's token ids, made once: in chunks of rows, kept as Arrow files.

Chunks are made in a thread that runs ahead of whoever reads them, straight to the disk, so memory stays bounded, and a
row that cannot be used is found long before its turn to be scored. A set that has been tokenised is not even opened
again. Several threads, processes and machines may make and read the chunks of one folder::

    CACHE/tokens/KEY/set.json
                     00000-1024-0-9f3a01c7.arrow        see `dpo_fast.token_chunks`
"""

import hashlib
import json
import platform
import zlib
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dpo_fast.cache_folder import cache_errors, cache_folder
from dpo_fast.errors import BundleError, DatasetError, RowError, StorageError
from dpo_fast.files import make_folder, write_json
from dpo_fast.preferences import (
    PreferenceSet,
    find_parquet,
    fingerprint_of,
    load_preferences,
    of_row_groups,
    open_parquet,
)
from dpo_fast.provenance import versions
from dpo_fast.row_groups import RowGroupIndex, RowGroups
from dpo_fast.token_chunks import Chunk, find_chunks, read_chunk, write_chunk
from dpo_fast.token_table import TokenTable, concatenate, make_table
from dpo_fast.tokens import load_tokenizer, tokenize
from dpo_fast.types import OnError, SkippedRow, TokenizedPair

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FORMAT = 1  # of the files here; another one is another key
ROWS_PER_CHUNK = 1024
TIMES_MADE = 3  # a chunk that is found damaged
SET = "set.json"
# Files of a model's folder that have no say in how it tokenises.
NOT_OF_THE_TOKENIZER = ("README.md", "generation_config.json", "adapter_config.json", "training_args.bin")


@dataclass(frozen=True, slots=True)
class DataSet:
    """What a run says of its data.

    Attributes:
        name: as it was given: the file, the folder, the URL or the Hub id.
        split: that was taken, or None where there are no splits.
        fingerprint: names the data; see `PreferenceSet`.
        rows: of the whole set, or, where a limit spared the look at its other files, of those that were looked at.
    """

    name: str
    split: str | None
    fingerprint: str
    rows: int


@dataclass(frozen=True)
class TokenSource:
    """All that says what a set's tokens are: a worker makes a `TokenCache` of it. It can be pickled.

    On another machine the data set must be found under the same name (what is on the Hub or at a URL is; a file's
    folder has to be shared, or copied), and the tokenizer's folder under the same path. Of Parquet files nothing is
    resolved or hashed again there: their sizes and row groups have to be the same. All else is hashed once more.

    Attributes:
        data: what the set is.
        key: of what tokens depend on; it names the folder in each machine's cache.
        tokenizer_folder: the policy's folder.
        max_length: of prompt and completion together, in tokens.
        vocabulary: token ids must be below it.
        limit: only the first rows.
        group_by: a column whose values are kept with the pairs.
        on_error: at a row that cannot be used: "stop" or "skip".
        trust_remote_code: whether the tokenizer's own Python code may be run.
        index: where the rows are, if they are in Parquet files and some have not been tokenised yet on the machine
            that made this.
        opened: the set, if it had to be opened to make this; it is not pickled.
    """

    data: DataSet
    key: str
    tokenizer_folder: Path
    max_length: int
    vocabulary: int
    limit: int | None = None
    group_by: str | None = None
    on_error: OnError = "stop"
    trust_remote_code: bool = False
    index: RowGroupIndex | None = None
    opened: PreferenceSet | None = field(default=None, compare=False, repr=False)

    def __getstate__(self) -> dict[str, Any]:
        """What is sent to another process."""
        return self.__dict__ | {"opened": None}

    @property
    def rows(self) -> int:
        """Rows that are wanted."""
        return self.data.rows if self.limit is None else min(self.limit, self.data.rows)

    @property
    def folder(self) -> Path:
        """Where the chunks lie on this machine."""
        return cache_folder() / "tokens" / self.key

    def span(self, number: int) -> tuple[int, int]:
        """A chunk's rows, as far as they are wanted."""
        return number * ROWS_PER_CHUNK, min((number + 1) * ROWS_PER_CHUNK, self.rows)

    def rows_made(self, start: int = 0, stop: int | None = None) -> int:
        """How many of the rows from `start` up to `stop` have been tokenised on this machine already."""
        stop, chunks, made = self.rows if stop is None else min(stop, self.rows), find_chunks(self.folder), 0
        for number in _chunk_numbers(start, stop):
            first, end = self.span(number)
            if number in chunks and chunks[number].rows >= end - first:
                made += min(stop, end) - max(start, first)
        return made

    def open_rows(self) -> PreferenceSet:
        """The data set, where something has to be tokenised.

        Raises:
            DatasetError: it cannot be opened, or is no longer the one that it was.
        """
        data, limit, group_by = self.data, self.limit, self.group_by
        if self.opened is not None:
            return self.opened
        if self.index is not None:
            return of_row_groups(data.name, data.split, self.index, data.fingerprint, limit=limit, group_by=group_by)
        rows = load_preferences(data.name, split=data.split, limit=limit, group_by=group_by)
        if rows.fingerprint != data.fingerprint or len(rows) != self.rows:
            raise DatasetError(
                f"{data.name!r} has changed since this run began: start again; if {platform.node()} is one machine of "
                "several, it may have another file there than the others: give it the same"
            )
        return rows

    def open_tokenizer(self) -> "PreTrainedTokenizerBase":
        """The tokenizer.

        Raises:
            CheckpointError: it cannot be loaded.
        """
        return load_tokenizer(self.tokenizer_folder, trust_remote_code=self.trust_remote_code)


class TokenCache:
    """The pairs of one preference set under one tokenizer, on demand; several threads may read at once."""

    def __init__(self, source: TokenSource) -> None:
        """Open nothing yet; `find_tokens` makes a source."""
        self.source = source
        self.data, self.rows = source.data, source.rows
        self._sources: tuple[PreferenceSet, PreTrainedTokenizerBase] | None = None
        self._maker = ThreadPoolExecutor(1, "tokenize")
        self._opening: Future[tuple[PreferenceSet, PreTrainedTokenizerBase]] | None = None
        self._making: dict[int, Future[Chunk]] = {}
        self._failure: Exception | None = None
        self._chunks = find_chunks(source.folder)

    def make_ahead(self, start: int, stop: int) -> None:
        """Begin to tokenise what is missing of the rows from `start` up to `stop`, in order, in the background.

        Raises:
            RowError: a row among them was found unusable before, and such rows are to stop the run.
        """
        for number in _chunk_numbers(start, stop):
            chunk = self._known(number)
            if chunk is None:
                self._begin_to_open()
                self._making[number] = self._maker.submit(self._make_ahead, number)
            elif self.source.on_error == "stop" and chunk.skipped:
                self._open(number)

    def open_ahead(self) -> None:
        """Begin to open data set and tokenizer in the background, if any rows have to be tokenised.

        What goes wrong is raised by whoever reads such rows first.
        """
        if any(self._known(number) is None for number in _chunk_numbers(0, self.rows)):
            self._begin_to_open()

    def wait_until_open(self) -> None:
        """Wait for data set and tokenizer, if anything has to be tokenised.

        Raises:
            DatasetError, CheckpointError, UsageError: one of them cannot be used.
        """
        if self._opening is not None:
            self._opening.result()

    def check(self) -> None:
        """Raise what the making of some chunk ahead has failed with, if any has."""
        if self._failure is not None:
            raise self._failure

    def read(self, start: int, stop: int) -> tuple[TokenTable, list[SkippedRow]]:
        """The pairs of the rows from `start` up to `stop` (counted from 0), and the rows that give none.

        Raises:
            RowError: a row cannot be used, and such rows are to stop the run.
            BundleError: a token id is beyond the model's vocabulary.
            DatasetError, CheckpointError, UsageError: the set or its tokenizer cannot be used.
            StorageError: the cache's disk refused.
        """
        tables, skipped = [], []
        for number in _chunk_numbers(start, stop):
            table, missing = self._open(number)
            first, end = np.searchsorted(table.rows, [start, stop], side="right").tolist()  # rows count from 1
            tables.append(table.slice(first, end))
            skipped += [row for row in missing if start < row.row <= stop]
        table = concatenate(tables)
        vocabulary = self.source.vocabulary
        if len(table.tokens) and (largest := int(table.tokens.max())) >= vocabulary:
            ends = np.cumsum(table.lengths.sum(axis=1))
            pair = int(np.searchsorted(ends, int(table.tokens.argmax()), side="right"))
            raise BundleError(
                f"row {table.rows[pair]}: the tokenizer gave the id {largest}, and the model's vocabulary ends at "
                f"{vocabulary - 1}; export the bundle with the model's own tokenizer"
            )
        return table, skipped

    def close(self) -> None:
        """Stop tokenising ahead; what was made is kept."""
        self._maker.shutdown(wait=True, cancel_futures=True)

    def _known(self, number: int) -> Chunk | None:
        """A chunk that was seen on the disk with all the rows that are wanted."""
        start, stop = self.source.span(number)
        chunk = self._chunks.get(number)
        return chunk if chunk is not None and chunk.rows >= stop - start else None

    def _open(self, number: int) -> tuple[TokenTable, list[SkippedRow]]:
        """A chunk's pairs and skipped rows, made if it is not there, and again if it is damaged."""
        for _ in range(TIMES_MADE):
            chunk = self._known(number)
            if chunk is None:
                making = self._making.get(number) or self._maker.submit(self._make, number)
                chunk = making.result()
            if (content := read_chunk(chunk)) is not None:
                table, skipped = content
                wanted = [row for row in skipped if row.row <= self.rows]
                if wanted and self.source.on_error == "stop":
                    raise RowError(wanted[0].row, wanted[0].reason)
                return table, wanted
            # Damaged on the disk; or another process has put a larger one in its place.
            with cache_errors(chunk.path):
                chunk.path.unlink(missing_ok=True)
            self._chunks.pop(number, None)
            self._making.pop(number, None)
            damaged = chunk.path
        raise StorageError(f"{damaged}: is not what was just written to it; is the disk sound?")

    def _begin_to_open(self) -> None:
        """`_open_sources` in the background, unless that has begun."""
        self._opening = self._opening or self._maker.submit(self._open_sources)

    def _open_sources(self) -> "tuple[PreferenceSet, PreTrainedTokenizerBase]":
        """The data set and the tokenizer, opened once."""
        if self._sources is None:
            self._sources = self.source.open_rows(), self.source.open_tokenizer()
        return self._sources

    def _make_ahead(self, number: int) -> Chunk:
        """`_make`, unless an earlier chunk has failed."""
        try:
            self.check()
            return self._make(number)
        except Exception as error:
            self._failure = self._failure or error
            raise

    def _make(self, number: int) -> Chunk:
        """Tokenise a chunk's rows and write them, unless another thread or process has."""
        folder = self.source.folder
        self._chunks.update(find_chunks(folder, number))
        if (chunk := self._known(number)) is not None:
            return chunk
        preferences, tokenizer = self._open_sources()
        start, stop = self.source.span(number)
        rows = preferences.rows(on_error="skip", start=start, stop=stop)
        items = list(tokenize(rows, tokenizer, max_length=self.source.max_length, on_error="skip"))
        skipped = [item for item in items if isinstance(item, SkippedRow)]
        if skipped and self.source.on_error == "stop":
            raise RowError(skipped[0].row, skipped[0].reason)
        table = make_table([item for item in items if isinstance(item, TokenizedPair)])
        with cache_errors(folder):
            make_folder(folder)
            chunk = write_chunk(folder, number, stop - start, table, skipped)
        self._chunks[number] = chunk
        return chunk


def find_tokens(
    dataset: str,
    tokenizer_folder: Path,
    tokenizer_hashes: Mapping[str, str],
    *,
    max_length: int,
    vocabulary: int,
    split: str | None = None,
    limit: int | None = None,
    group_by: str | None = None,
    on_error: OnError = "stop",
    trust_remote_code: bool = False,
) -> TokenSource:
    """Find out what a preference set's token ids are, without making any; rows of earlier runs are in the cache.

    Args:
        dataset: a file, a folder, a URL or a Hub id.
        tokenizer_folder: the policy's folder.
        tokenizer_hashes: SHA-256 of the files there that decide how text becomes tokens, by name.
        max_length: the most tokens that prompt and one completion may have together.
        vocabulary: rows of the model's embedding.
        split: of a set that has several.
        limit: only the first rows.
        group_by: a column whose values are kept with the pairs.
        on_error: at a row that cannot be used, "stop" raises; "skip" goes on.
        trust_remote_code: whether the tokenizer's own Python code may be run.

    Raises:
        DatasetError, UsageError, MissingDependencyError: the set cannot be used.
        StorageError: the cache's disk refused.
    """
    fingerprint, files, opened = fingerprint_of(dataset), None, None
    if fingerprint is None:  # not on this machine
        files = find_parquet(dataset, split)
        if files is None:  # on the Hub: only the library knows which version it is
            opened = load_preferences(dataset, split=split, limit=limit, group_by=group_by)
            fingerprint = opened.fingerprint
        else:
            fingerprint = str(files.fingerprint)
    # The library's own version has a say in how files become rows, the others in how rows become tokens.
    key = {
        "format": FORMAT,
        "data": fingerprint,
        "split": split,
        "group_by": group_by,
        "max_length": max_length,
        "tokenizer": dict(sorted(tokenizer_hashes.items())),
        "trust_remote_code": trust_remote_code,
        "versions": versions(("datasets", "tokenizers", "transformers")),
    }
    source = TokenSource(
        data=DataSet(dataset, split, fingerprint, 0),
        key=hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:32],
        tokenizer_folder=tokenizer_folder,
        max_length=max_length,
        vocabulary=vocabulary,
        limit=limit,
        group_by=group_by,
        on_error=on_error,
        trust_remote_code=trust_remote_code,
    )
    data = _known_set(source.folder / SET, dataset)
    if data is not None:
        source = replace(source, data=data)
        if source.rows_made() == source.rows:
            return source
    if opened is None and (files := files or find_parquet(dataset, split)) is not None:
        opened = open_parquet(dataset, files, limit=limit, group_by=group_by, fingerprint=fingerprint)
    if data is None:
        if opened is None:
            opened = load_preferences(dataset, split=split, limit=limit, group_by=group_by, fingerprint=fingerprint)
        data = DataSet(dataset, opened.split, fingerprint, opened.rows_in_all or len(opened))
        if opened.rows_in_all is not None:
            with cache_errors(source.folder):
                make_folder(source.folder)
                found = asdict(data) | {"name": Path(dataset).name}
                write_json(source.folder / SET, found | {"crc32": zlib.crc32(json.dumps(found).encode())})
    index = opened.dataset.index if opened is not None and isinstance(opened.dataset, RowGroups) else None
    return replace(source, data=data, index=index, opened=opened)


def _chunk_numbers(start: int, stop: int) -> range:
    """The chunks that hold the rows from `start` up to `stop`."""
    return range(start // ROWS_PER_CHUNK, -(-stop // ROWS_PER_CHUNK))


def of_the_tokenizer(name: str) -> bool:
    """Whether a file of a model's folder may have a say in how it tokenises."""
    return not name.endswith((".safetensors", ".safetensors.index.json")) and name not in NOT_OF_THE_TOKENIZER


def _known_set(path: Path, name: str) -> DataSet | None:
    """What a former run found the set to be; None if none did."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if found.pop("crc32") != zlib.crc32(json.dumps(found).encode()):
            return None
        return DataSet(name, found["split"], found["fingerprint"], int(found["rows"]))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
