"""A preference set's token ids, made once: in chunks of rows, kept as memory-mapped Arrow files.

Chunks are made in a thread that runs ahead of whoever reads them, straight to the disk, so memory stays bounded, and a
row that cannot be used is found long before its turn to be scored. A set that has been tokenised is not even opened
again. What a chunk's name says is where it is, how many rows it covers, how many of these were skipped, and the CRC-32
of its bytes::

    CACHE/tokens/KEY/set.json
                     00000-1024-0-9f3a01c7.arrow
"""

import hashlib
import json
import re
import zlib
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import numpy as np

from dpo_fast.cache_folder import cache_errors, cache_folder
from dpo_fast.errors import BundleError, RowError, StorageError
from dpo_fast.files import make_folder, write_json
from dpo_fast.preferences import PreferenceSet, fingerprint_of, load_preferences
from dpo_fast.provenance import versions
from dpo_fast.token_table import TokenTable, concatenate, make_table
from dpo_fast.tokens import load_tokenizer, tokenize
from dpo_fast.types import OnError, SkippedRow, TokenizedPair

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FORMAT = 1  # of the files here; another one is another key
ROWS_PER_CHUNK = 1024
SET = "set.json"
CHUNK_NAME = re.compile(r"(\d{5,})-(\d+)-(\d+)-([0-9a-f]{8})\.arrow")
SKIPPED_ROWS = b"skipped"
# Files of a model's folder that have no say in how it tokenises.
NOT_OF_THE_TOKENIZER = ("README.md", "generation_config.json", "adapter_config.json", "training_args.bin")


@dataclass(frozen=True, slots=True)
class DataSet:
    """What a run says of its data.

    Attributes:
        name: as it was given: the file, the folder or the Hub id.
        split: that was taken, or None where there are no splits.
        fingerprint: names the data; see `PreferenceSet`.
        rows: of the whole set.
    """

    name: str
    split: str | None
    fingerprint: str
    rows: int


@dataclass(frozen=True, slots=True)
class _Chunk:
    """A chunk on disk: a file, and what its name says."""

    path: Path
    rows: int
    skipped: int
    checksum: str


class TokenCache:
    """The pairs of one preference set under one tokenizer, on demand."""

    def __init__(
        self,
        data: DataSet,
        folder: Path,
        open_rows: Callable[[], PreferenceSet],
        open_tokenizer: Callable[[], "PreTrainedTokenizerBase"],
        *,
        max_length: int,
        vocabulary: int,
        limit: int | None,
        on_error: OnError,
    ) -> None:
        """See `open_tokens`, which makes one.

        Args:
            data: what the set is.
            folder: where its chunks lie.
            open_rows: called once, if anything has to be tokenised.
            open_tokenizer: as `open_rows`.
            max_length: of prompt and completion together, in tokens.
            vocabulary: token ids must be below it.
            limit: only the first rows.
            on_error: at a row that cannot be used: "stop" or "skip".
        """
        self.data = data
        self.rows = data.rows if limit is None else min(limit, data.rows)
        self._folder, self._max_length, self._vocabulary, self._on_error = folder, max_length, vocabulary, on_error
        self._open_rows, self._open_tokenizer = open_rows, open_tokenizer
        self._sources: tuple[PreferenceSet, PreTrainedTokenizerBase] | None = None
        self._maker = ThreadPoolExecutor(1, "tokenize")
        self._opening: Future[tuple[PreferenceSet, PreTrainedTokenizerBase]] | None = None
        self._making: dict[int, Future[_Chunk]] = {}
        self._failure: Exception | None = None
        self._chunks: dict[int, _Chunk] = {}
        for path in folder.glob("*.arrow"):
            if name := CHUNK_NAME.fullmatch(path.name):
                number, rows, skipped = map(int, name.groups()[:3])
                if number not in self._chunks or self._chunks[number].rows < rows:
                    self._chunks[number] = _Chunk(path, rows, skipped, name[4])

    def make_ahead(self, start: int, stop: int) -> None:
        """Begin to tokenise what is missing of the rows from `start` up to `stop`, in order, in the background.

        Raises:
            RowError: a row among them was found unusable before, and such rows are to stop the run.
        """
        for number in range(start // ROWS_PER_CHUNK, -(-stop // ROWS_PER_CHUNK)):
            if not self._has(number):
                self._opening = self._opening or self._maker.submit(self._open_sources)
                self._making[number] = self._maker.submit(self._make, number)
            elif self._on_error == "stop" and self._chunks[number].skipped:
                self._open(number)

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
        for number in range(start // ROWS_PER_CHUNK, -(-stop // ROWS_PER_CHUNK)):
            table, missing = self._open(number)
            first, end = np.searchsorted(table.rows, [start, stop], side="right").tolist()  # rows count from 1
            tables.append(table.slice(first, end))
            skipped += [row for row in missing if start < row.row <= stop]
        table = concatenate(tables)
        if len(table.tokens) and (largest := int(table.tokens.max())) >= self._vocabulary:
            ends = np.cumsum(table.lengths.sum(axis=1))
            pair = int(np.searchsorted(ends, int(table.tokens.argmax()), side="right"))
            raise BundleError(
                f"row {table.rows[pair]}: the tokenizer gave the id {largest}, and the model's vocabulary ends at "
                f"{self._vocabulary - 1}; export the bundle with the model's own tokenizer"
            )
        return table, skipped

    def close(self) -> None:
        """Stop tokenising ahead; what was made is kept."""
        self._maker.shutdown(wait=True, cancel_futures=True)

    def _span(self, number: int) -> tuple[int, int]:
        """A chunk's rows, as far as they are wanted."""
        return number * ROWS_PER_CHUNK, min((number + 1) * ROWS_PER_CHUNK, self.rows)

    def _has(self, number: int) -> bool:
        """Whether a chunk is there, with all the rows that are wanted."""
        start, stop = self._span(number)
        return number in self._chunks and self._chunks[number].rows >= stop - start

    def _open(self, number: int) -> tuple[TokenTable, list[SkippedRow]]:
        """A chunk's pairs and skipped rows, made if it is not there, and again if it is damaged."""
        if not self._has(number):
            making = self._making.get(number) or self._maker.submit(self._make, number)
            making.result()
        content = _read(self._chunks[number])
        if content is None:  # damaged on the disk
            self._chunks[number].path.unlink(missing_ok=True)
            content = _read(self._maker.submit(self._make, number).result())
        if content is None:
            raise StorageError(f"{self._chunks[number].path}: is not what was just written to it; is the disk sound?")
        table, skipped = content
        wanted = [row for row in skipped if row.row <= self.rows]
        if wanted and self._on_error == "stop":
            raise RowError(wanted[0].row, wanted[0].reason)
        return table, wanted

    def _open_sources(self) -> "tuple[PreferenceSet, PreTrainedTokenizerBase]":
        """The data set and the tokenizer, opened once."""
        if self._sources is None:
            self._sources = self._open_rows(), self._open_tokenizer()
        return self._sources

    def _make(self, number: int) -> _Chunk:
        """Tokenise a chunk's rows and write them."""
        try:
            if self._failure is not None:
                raise self._failure
            preferences, tokenizer = self._open_sources()
            start, stop = self._span(number)
            rows = preferences.rows(on_error="skip", start=start, stop=stop)
            items = list(tokenize(rows, tokenizer, max_length=self._max_length, on_error="skip"))
            skipped = [item for item in items if isinstance(item, SkippedRow)]
            if skipped and self._on_error == "stop":
                raise RowError(skipped[0].row, skipped[0].reason)
            table = make_table([item for item in items if isinstance(item, TokenizedPair)])
            with cache_errors(self._folder):
                make_folder(self._folder)
                chunk = _write(self._folder, number, stop - start, table, skipped)
        except Exception as error:
            self._failure = self._failure or error
            raise
        self._chunks[number] = chunk
        return chunk


def open_tokens(
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
) -> TokenCache:
    """Open a preference set as token ids; rows that were tokenised before are read from the cache.

    Args:
        dataset: a file, a folder or a Hub id.
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
        DatasetError, UsageError: the set cannot be used.
        StorageError: the cache's disk refused.
    """
    fingerprint = fingerprint_of(dataset)

    @cache
    def open_rows() -> PreferenceSet:
        return load_preferences(dataset, split=split, group_by=group_by, fingerprint=fingerprint)

    if fingerprint is None:  # on the Hub: only the library knows which version it is
        fingerprint = open_rows().fingerprint
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
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
    folder = cache_folder() / "tokens" / digest[:32]
    data = _known_set(folder / SET, dataset)
    if data is None:
        opened = open_rows()
        data = DataSet(dataset, opened.split, fingerprint, len(opened))
        with cache_errors(folder):
            make_folder(folder)
            found = asdict(data) | {"name": Path(dataset).name}
            write_json(folder / SET, found | {"crc32": zlib.crc32(json.dumps(found).encode())})
    return TokenCache(
        data,
        folder,
        open_rows,
        lambda: load_tokenizer(tokenizer_folder, trust_remote_code=trust_remote_code),
        max_length=max_length,
        vocabulary=vocabulary,
        limit=limit,
        on_error=on_error,
    )


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


def _write(folder: Path, number: int, rows: int, table: TokenTable, skipped: list[SkippedRow]) -> _Chunk:
    """Write a chunk under a temporary name, then rename it; a smaller one of the same number goes."""
    import pyarrow as pa

    sizes = table.lengths.sum(axis=1)
    columns: dict[str, Any] = {
        "row": pa.array(table.rows),
        "tokens": pa.ListArray.from_arrays(pa.array(np.concatenate([[0], np.cumsum(sizes)]), pa.int32()), table.tokens),
        "prompt": pa.array(table.lengths[:, 0]),
        "chosen": pa.array(table.lengths[:, 1]),
        "rejected": pa.array(table.lengths[:, 2]),
        "truncated": pa.array(table.truncated.astype(np.uint8)),
        "group": pa.array(table.groups, pa.string()),
    }
    batch = pa.record_batch(columns)
    reasons = json.dumps([[row.row, row.reason] for row in skipped])
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, batch.schema.with_metadata({SKIPPED_ROWS: reasons})) as writer:
        writer.write_batch(batch)
    content = memoryview(sink.getvalue())
    checksum = f"{zlib.crc32(content):08x}"
    path = folder / f"{number:05}-{rows}-{len(skipped)}-{checksum}.arrow"
    temporary = folder / f".{path.name}.{uuid4().hex}"
    try:
        temporary.write_bytes(content)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    for other in folder.glob(f"{number:05}-*.arrow"):
        name = CHUNK_NAME.fullmatch(other.name)
        if other != path and name is not None and int(name[2]) <= rows:
            other.unlink(missing_ok=True)
    return _Chunk(path, rows, len(skipped), checksum)


def _read(chunk: _Chunk) -> tuple[TokenTable, list[SkippedRow]] | None:
    """A chunk's content, mapped into memory; None if it is not what was written."""
    import pyarrow as pa

    try:
        with pa.memory_map(str(chunk.path)) as source:
            content = source.read_buffer()
    except (OSError, pa.ArrowException):
        return None
    if f"{zlib.crc32(content):08x}" != chunk.checksum:
        return None
    reader = pa.ipc.open_file(content)
    batch = reader.get_batch(0)
    reasons = json.loads(reader.schema.metadata[SKIPPED_ROWS])
    table = TokenTable(
        rows=batch["row"].to_numpy(),
        lengths=np.column_stack([batch[name].to_numpy() for name in ("prompt", "chosen", "rejected")]),
        tokens=batch["tokens"].values.to_numpy(),
        truncated=batch["truncated"].to_numpy().astype(np.bool_),
        groups=batch["group"].to_pylist(),
    )
    return table, [SkippedRow(row, reason) for row, reason in reasons]
