"""Scores on disk, in parts of consecutive rows: what was computed once is not computed again.

A part is one Parquet file, written to a temporary name, synced and renamed, so it is whole or not there. Its metadata
holds what its numbers depend on, role by role: the token ids, the weights, the graph, the engine and the layout. A
part is taken again only if all of that is the same, and if its SHA-256 is the one that was noted when it was written::

    RUN/scores/part-00000.parquet
               SHA256SUMS          `sha256sum --check SHA256SUMS` reads it too
"""

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dpo_fast.ahead import one_ahead
from dpo_fast.bundle import ROLES
from dpo_fast.errors import OutputExistsError, StorageError
from dpo_fast.files import copy_file, make_folder, sha256, storage_errors, write_text
from dpo_fast.scores import ScoredPairs
from dpo_fast.token_table import TokenTable
from dpo_fast.types import CompletionScores, Int64Array, PairScores

if TYPE_CHECKING:
    import pyarrow as pa

PART_ROWS = 1024
METADATA_KEY = b"dpo_fast"
CHECKSUMS = "SHA256SUMS"
PAIRS = "pairs"  # beside the roles, among the fingerprints of a part
BRANCH_NAMES = ("chosen", "rejected")
SUMS = ("entropy", "mean_logit", "top1", "log_sum_sq_prob")

# What a part's pairs, or a role's scores of them, depend on, by name.
Fingerprint = dict[str, str]


@dataclass(frozen=True, slots=True)
class PartRecord:
    """What a part says of itself.

    Attributes:
        fingerprints: of the pairs, and by role.
        rows: the data set's rows that it covers, counted from 0: from the first up to the second.
        tokens: that engines computed for it, padding included.
        padding: of these, how many were padding.
        token_budget: of the batches, in tokens.
    """

    fingerprints: dict[str, Fingerprint]
    rows: tuple[int, int]
    tokens: int
    padding: int
    token_budget: int


def token_hash(table: TokenTable) -> str:
    """SHA-256 over the pairs' token ids and the lengths that part them."""
    digest = hashlib.sha256(table.lengths.tobytes())
    digest.update(table.tokens.tobytes())
    return digest.hexdigest()


def row_hash(table: TokenTable, rows: tuple[int, int]) -> str:
    """SHA-256 over what a part says of its pairs beside the tokens: row numbers, truncation, groups.

    Args:
        table: the part's pairs.
        rows: that the part covers, skipped ones too, counted from 0.
    """
    digest = hashlib.sha256(np.array(rows, np.int64).tobytes())
    digest.update(table.rows.tobytes())
    digest.update(table.truncated.tobytes())
    digest.update(json.dumps(table.groups).encode())
    return digest.hexdigest()


class ScoreStore:
    """The parts of one run, in `RUN/scores`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._checksums = _read_checksums(folder / CHECKSUMS)

    def path(self, part: int) -> Path:
        """A part's file."""
        return self.folder / f"part-{part:05}.parquet"

    def parts(self) -> list[int]:
        """The numbers of the parts whose files are there."""
        return sorted(int(path.stem.removeprefix("part-")) for path in self.folder.glob("part-*.parquet"))

    def record(self, part: int) -> PartRecord | None:
        """What a part says of itself; None where it is not there, or is not what was written.

        A part that was cut short, or of which a bit has flipped, is as good as one that is not there: it is computed
        again.

        Raises:
            OutputExistsError: the file is somebody else's.
        """
        import pyarrow as pa
        import pyarrow.parquet as pq

        path = self.path(part)
        if not path.is_file():
            return None
        with storage_errors(path):
            checksum = sha256(path)
        noted = self._checksums.get(path.name)
        if noted is not None and checksum != noted:
            return None
        try:
            metadata = pq.read_schema(path).metadata or {}
        except (pa.ArrowException, OSError, UnicodeDecodeError):
            return None
        if METADATA_KEY not in metadata:
            if noted is None:
                raise OutputExistsError(f"{path}: was not written by dpo-fast; name another folder")
            return None
        try:
            value = json.loads(metadata[METADATA_KEY])
            return PartRecord(**value | {"rows": tuple(value["rows"])}) if noted else None
        except (ValueError, KeyError, TypeError):  # written by another version
            return None

    def check(self, part: int, record: PartRecord, fingerprints: Mapping[str, Fingerprint]) -> None:
        """Refuse a part that was computed from something else.

        Raises:
            OutputExistsError: it was; the message says in what they differ.
        """
        for name in sorted(fingerprints.keys() | record.fingerprints.keys()):
            wanted, found = fingerprints.get(name, {}), record.fingerprints.get(name, {})
            if differing := differences(wanted, found):
                what = name if name == PAIRS else f"{name} scores"
                raise OutputExistsError(
                    f"{self.folder.parent}: holds a run whose {what} differ in {', '.join(differing)} (part {part}); "
                    "name another folder, or say --overwrite"
                )

    def clear(self) -> None:
        """Remove all parts; nothing else in the folder is touched.

        Raises:
            StorageError: the disk refused.
        """
        with storage_errors(self.folder):
            for path in [*self.folder.glob("part-*.parquet"), self.folder / CHECKSUMS]:
                path.unlink(missing_ok=True)
        self._checksums = {}

    def write(self, part: int, table: TokenTable, scores: Mapping[str, ScoredPairs], record: PartRecord) -> None:
        """Write a part: one row a pair.

        Its checksum is noted before the part has its name, so a part that is there has one.

        Args:
            part: its number.
            table: P pairs.
            scores: of these pairs, by role.
            record: what it says of itself.

        Raises:
            StorageError: the disk refused.
        """
        import pyarrow as pa

        columns: dict[str, Any] = {
            "row": pa.array(table.rows),
            **{f"{name}_length": pa.array(table.lengths[:, i]) for i, name in enumerate(("prompt", *BRANCH_NAMES))},
            **_token_columns(table),
            "truncated": pa.array(table.truncated),
            "group": pa.array(table.groups, pa.string()),
        }
        for role in (role for role in ROLES if role in scores):  # in one order, whoever was scored first
            columns |= score_columns(role, scores[role])
        self._put(part, parquet_bytes(columns, {METADATA_KEY: json.dumps(asdict(record))}))

    def adopt(self, part: int, source: "ScoreStore") -> None:
        """Take over another run's part as it is.

        Raises:
            StorageError: the disk refused, or the part is not what was written.
        """
        path = source.path(part)
        with storage_errors(path):
            checksum = sha256(path)
        if checksum != source._checksums.get(path.name):
            raise StorageError(f"{path}: is not what was written (its SHA-256 differs); evaluate that shard again")
        make_folder(self.folder)
        copy_file(path, self.path(part), link=True)  # parts are replaced, never changed, so they may be shared
        self._checksums[path.name] = checksum
        self._write_checksums()

    def _put(self, part: int, content: bytes | memoryview) -> None:
        """Write a part's file: its content, then its checksum, then its name."""
        target = self.path(part)
        temporary = target.with_name(f".{target.name}.{os.getpid()}")
        with storage_errors(target):
            make_folder(self.folder)
            try:
                with temporary.open("wb") as file:
                    file.write(content)
                    file.flush()
                    os.fsync(file.fileno())
                self._checksums[target.name] = hashlib.sha256(content).hexdigest()
                self._write_checksums()
                temporary.replace(target)
            finally:
                temporary.unlink(missing_ok=True)

    def _write_checksums(self) -> None:
        lines = (f"{checksum}  {name}\n" for name, checksum in sorted(self._checksums.items()))
        write_text(self.folder / CHECKSUMS, "".join(lines))

    def read_part(self, part: int) -> PairScores:
        """A part's scores.

        Raises:
            StorageError: it is missing or damaged.
        """
        import pyarrow as pa
        import pyarrow.parquet as pq

        path = self.path(part)
        way_out = "evaluate again, and it is computed again"
        if not path.is_file():
            raise StorageError(f"{path}: is missing; {way_out}")
        with storage_errors(path):
            content = path.read_bytes()
        if hashlib.sha256(content).hexdigest() != self._checksums.get(path.name):
            raise StorageError(f"{path}: is not what was written (its SHA-256 differs); {way_out}")
        try:
            file = pq.ParquetFile(pa.BufferReader(content))
            names = [name for name in file.schema_arrow.names if not name.endswith("_ids")]
            table = file.read(columns=names)
            roles = [role for role in ROLES if f"{role}_chosen_log_probs" in names]
            scores = {
                f"{role}_{branch}": completion_scores(table, f"{role}_{branch}")
                for role in roles
                for branch in BRANCH_NAMES
            }
            groups = table["group"].to_pylist()
            return PairScores(
                rows=table["row"].to_numpy(),
                prompt_lengths=table["prompt_length"].to_numpy(),
                chosen_lengths=table["chosen_length"].to_numpy(),
                rejected_lengths=table["rejected_length"].to_numpy(),
                truncated=table["truncated"].to_numpy(),
                groups=None if all(group is None for group in groups) else groups,
                policy_chosen=scores["policy_chosen"],
                policy_rejected=scores["policy_rejected"],
                reference_chosen=scores.get("reference_chosen"),
                reference_rejected=scores.get("reference_rejected"),
            )
        except (pa.ArrowException, KeyError) as error:
            raise StorageError(f"{path}: was written by another version of dpo-fast; {way_out}") from error

    def read(self) -> Iterator[PairScores]:
        """The scores of all parts, one after another; the next is read while one is being used.

        Raises:
            StorageError: a part is missing or damaged.
        """
        return one_ahead(self.read_part, self.parts())


def differences(wanted: Fingerprint, found: Fingerprint) -> list[str]:
    """In what two fingerprints differ."""
    return sorted(key for key in wanted.keys() | found.keys() if wanted.get(key) != found.get(key))


def score_columns(role: str, scored: ScoredPairs) -> dict[str, Any]:
    """One role's scores as a table's columns."""
    import pyarrow as pa

    columns: dict[str, Any] = {}
    for branch, completions in zip(BRANCH_NAMES, (scored.chosen, scored.rejected), strict=True):
        name = f"{role}_{branch}"
        columns[f"{name}_log_probs"] = _lists(completions.log_probs, completions.lengths)
        for value in SUMS:
            columns[f"{name}_{value}"] = pa.array(getattr(completions, value))
    return columns


def completion_scores(table: "pa.Table", name: str) -> CompletionScores:
    """One role's scores of one branch, back from a table's columns."""
    import pyarrow.compute as pc

    values = {value: table[f"{name}_{value}"].to_numpy() for value in SUMS}
    log_probs = table[f"{name}_log_probs"].combine_chunks()
    return CompletionScores(
        log_probs=log_probs.flatten().to_numpy(),
        lengths=pc.list_value_length(log_probs).to_numpy().astype(np.int64),
        **values,
    )


def parquet_bytes(columns: Mapping[str, Any], metadata: Mapping[bytes, str]) -> memoryview:
    """A table as a Parquet file's content.

    Log-probs are noise to a compressor, so they are left as they are; the rest shrinks to a half and less.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pa.table(dict(columns)).replace_schema_metadata(dict(metadata))
    # Columns of lists are named by the path to their elements.
    paths = [f"{field.name}.list.element" if pa.types.is_list(field.type) else field.name for field in table.schema]
    codecs = {path: "none" if path.endswith("_log_probs.list.element") else "zstd" for path in paths}
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression=codecs, use_dictionary=["group"], write_statistics=False)
    return memoryview(sink.getvalue())


def _token_columns(table: TokenTable) -> dict[str, Any]:
    """The pairs' token ids, piece by piece."""
    piece = np.repeat(np.tile(np.arange(3), len(table)), table.lengths.ravel())
    return {
        f"{name}_ids": _lists(table.tokens[piece == number], table.lengths[:, number])
        for number, name in enumerate(("prompt", *BRANCH_NAMES))
    }


def _lists(values: Any, lengths: Int64Array) -> Any:
    """Flat values as a column of lists."""
    import pyarrow as pa

    return pa.ListArray.from_arrays(np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32), pa.array(values))


def _read_checksums(path: Path) -> dict[str, str]:
    """Each part's SHA-256 by its file's name; a line that is damaged says nothing, so its part is computed again."""
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise StorageError(f"{path}: cannot be read ({error.strerror}); mend that, or name another folder") from error
    pieces = [line.split("  ", 1) for line in lines]
    return {piece[1]: piece[0] for piece in pieces if len(piece) == 2}
