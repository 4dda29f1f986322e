"""The files of the tokens' cache: chunks of pairs and skipped rows, as Arrow.

What a chunk's name says is where it is, how many rows it covers, how many of these were skipped, and the CRC-32 of its
bytes: `00000-1024-0-9f3a01c7.arrow`. Several processes, on several machines, may write into one folder: each file gets
its name when all of it is written, and what is read is checked.
"""

import json
import re
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np

from dpo_fast.token_table import TokenTable
from dpo_fast.types import SkippedRow

CHUNK_NAME = re.compile(r"(\d{5,})-(\d+)-(\d+)-([0-9a-f]{8})\.arrow")
SKIPPED_ROWS = b"skipped"


@dataclass(frozen=True, slots=True)
class Chunk:
    """A chunk on disk: a file, and what its name says."""

    path: Path
    rows: int
    skipped: int
    checksum: str


def find_chunks(folder: Path, number: int | None = None) -> dict[int, Chunk]:
    """The chunks in a folder, or the one of a number; of several with one number, the one that covers most rows."""
    found: dict[int, Chunk] = {}
    for path in sorted(folder.glob("*.arrow" if number is None else f"{number:05}-*.arrow")):
        if name := CHUNK_NAME.fullmatch(path.name):
            chunk = Chunk(path, int(name[2]), int(name[3]), name[4])
            if int(name[1]) not in found or found[int(name[1])].rows < chunk.rows:
                found[int(name[1])] = chunk
    return found


def write_chunk(folder: Path, number: int, rows: int, table: TokenTable, skipped: list[SkippedRow]) -> Chunk:
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
        # Not one of as many rows: two that remove each other's at once would leave none.
        if name is not None and int(name[2]) < rows:
            other.unlink(missing_ok=True)
    return Chunk(path, rows, len(skipped), checksum)


def read_chunk(chunk: Chunk) -> tuple[TokenTable, list[SkippedRow]] | None:
    """A chunk's content; None if it is not what was written.

    It is read, not mapped into memory: a mapped file that goes on another machine takes the process with it.
    """
    import pyarrow as pa

    try:
        content = chunk.path.read_bytes()
    except OSError:
        return None
    if f"{zlib.crc32(content):08x}" != chunk.checksum:
        return None
    reader = pa.ipc.open_file(pa.py_buffer(content))
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
