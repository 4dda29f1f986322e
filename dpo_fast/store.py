"""Scores on disk, in parts of consecutive rows: what was computed once is not computed again.

A part is one Parquet file, which is whole or not there (see `dpo_fast.storage`). Its metadata holds what its numbers
depend on, role by role: the token ids, the weights, the graph, the engine and the layout. A part is taken again only if
all of that is the same, and if its SHA-256 was noted when it was written: beside it at first, so that any number of
processes can write parts at once, and in one list when the run is finished::

    RUN/scores/part-00000.parquet
               part-00000.sha256   until the run is finished
               SHA256SUMS          from then on; `sha256sum --check` reads both

A finished run that goes on, for a part was damaged, has both: what was written again is noted beside it until the run
is finished again. Either note makes a part sound, for both were made of bytes that were written whole.
"""

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dpo_fast.ahead import several_ahead
from dpo_fast.bundle import ROLES
from dpo_fast.errors import OutputExistsError, StorageError
from dpo_fast.scores import ScoredPairs
from dpo_fast.storage import LocalFolder, Storage, open_storage
from dpo_fast.token_table import TokenTable
from dpo_fast.types import CompletionScores, Int64Array, PairScores

if TYPE_CHECKING:
    import pyarrow as pa

PART_ROWS = 1024
METADATA_KEY = b"dpo_fast"
CHECKSUMS = "SHA256SUMS"
READ_AHEAD = 8  # parts that are on their way at a time from an object store, which is far
READERS = 16  # of checksums at once, where each waits for a server
READINGS = 5  # of a part that is not the same twice
WAY_OUT = "evaluate again, and it is computed again"
PART_NAME = re.compile(r"part-([0-9]+)\.parquet")
NOTE_NAME = re.compile(r"part-[0-9]+\.sha256")
REMAINS = re.compile(rf"\.(part-[0-9]+\.(parquet|sha256)|{CHECKSUMS})\.[0-9a-f]{{32}}")  # see `Storage.leaves_remains`
CHECKSUM_LINE = re.compile(r"([0-9a-f]{64})  (part-[0-9]+\.parquet)")  # as sha256sum prints it
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


def fingerprint_hash(fingerprints: Mapping[str, Fingerprint]) -> str:
    """SHA-256 over all that a part depends on."""
    return hashlib.sha256(json.dumps(fingerprints, sort_keys=True).encode()).hexdigest()


def part_name(part: int) -> str:
    """A part's file, in whatever storage."""
    return f"part-{part:05}.parquet"


def note_name(part: int) -> str:
    """The file beside a part, of its checksum alone."""
    return f"part-{part:05}.sha256"


@dataclass(frozen=True, slots=True)
class _Found:
    """A part's file as it was read.

    Attributes:
        checksum: its SHA-256.
        sound: whether that was noted when the part was written.
    """

    content: bytes
    checksum: str
    sound: bool


class ScoreStore:
    """The parts of one run, in `RUN/scores` or elsewhere (see `dpo_fast.run_folder.open_scores`).

    Any number of threads, processes and machines may write at once. It may be pickled.
    """

    def __init__(self, place: Path | str | Storage) -> None:
        """Open the parts; nothing is read yet.

        Args:
            place: a folder, a URL, or what they open.

        Raises:
            UsageError: the URL cannot be used.
            MissingDependencyError: an extra is not installed.
        """
        self.storage = open_storage(place) if isinstance(place, Path | str) else place
        self._list: dict[str, str] | None = None  # of SHA256SUMS; it is replaced, never changed

    def __reduce__(self) -> tuple[type["ScoreStore"], tuple[Storage]]:
        return ScoreStore, (self.storage,)

    @property
    def name(self) -> str:
        """Where the parts lie, for messages."""
        return self.storage.name

    def place(self, part: int) -> str:
        """Where a part lies, for messages."""
        return self.storage.place(part_name(part))

    def parts(self) -> list[int]:
        """The numbers of the parts whose files are there.

        Raises:
            StorageError: they cannot be listed.
        """
        return _numbers(self.storage.names())

    def record(self, part: int) -> PartRecord | None:
        """What a part says of itself; None where it is not there, or is not what was written.

        A part that was cut short, or of which a bit has flipped, is as good as one that is not there: it is computed
        again.

        Raises:
            OutputExistsError: the file is somebody else's.
            StorageError: it cannot be read.
        """
        import pyarrow as pa
        import pyarrow.parquet as pq

        found = self._find(part)
        if found is None:
            return None
        noted = found.sound or self._is_noted(part)
        if noted and not found.sound:
            return None
        try:
            metadata = pq.read_schema(pa.BufferReader(found.content)).metadata or {}
        except (pa.ArrowException, OSError, UnicodeDecodeError):
            return None
        if METADATA_KEY not in metadata:
            if not noted:
                raise OutputExistsError(f"{self.place(part)}: was not written by dpo-fast; name another folder")
            return None
        try:
            value = json.loads(metadata[METADATA_KEY])
            return PartRecord(**value | {"rows": tuple(value["rows"])}) if found.sound else None
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
                    f"{self.name}: holds a run whose {what} differ in {', '.join(differing)} (part {part}); "
                    "name another folder, or say --overwrite"
                )

    def clear(self) -> None:
        """Remove all parts and their checksums; nothing else that lies there is touched.

        Raises:
            StorageError: the disk refused.
        """
        names = self.storage.names()
        self.storage.remove(map(part_name, _numbers(names)))
        self.storage.remove([name for name in names if name == CHECKSUMS or NOTE_NAME.fullmatch(name)])
        self._list = None

    def remove_remains(self) -> None:
        """Remove what a killed process left half written.

        Raises:
            StorageError: the disk refused.
        """
        if not self.storage.leaves_remains:
            return
        self.storage.remove(filter(REMAINS.fullmatch, self.storage.names()))

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
        content = parquet_bytes(columns, {METADATA_KEY: json.dumps(asdict(record))})
        self._note(part, hashlib.sha256(content).hexdigest())
        self.storage.write(part_name(part), content)

    def adopt(self, part: int, source: "ScoreStore") -> None:
        """Take over another run's part as it is.

        Raises:
            StorageError: the disk refused, or the part is not what was written.
        """
        found = source._find(part)
        if found is None or not found.sound:
            raise StorageError(
                f"{source.place(part)}: is not what was written (its SHA-256 differs); evaluate that shard again"
            )
        self._note(part, found.checksum)
        if isinstance(self.storage, LocalFolder) and isinstance(source.storage, LocalFolder):
            self.storage.link(part_name(part), Path(source.place(part)))
        else:
            self.storage.write(part_name(part), found.content)

    def finish(self) -> None:
        """Gather the parts' checksums into one list; for when all parts are written, and nobody writes any more.

        What killed workers left half written goes too.

        Killed at whatever moment, it leaves every part with a note, and is done again. Of a finished run, nothing is
        written.

        Raises:
            StorageError: the disk refused.
        """
        names = self.storage.names()
        parts = _numbers(names)
        notes = {name for name in names if NOTE_NAME.fullmatch(name)}
        beside = [part for part in parts if note_name(part) in notes]
        listed = self._listed(afresh=True)
        with ThreadPoolExecutor(READERS) as readers:
            noted = dict(zip(beside, readers.map(self._note_of, beside), strict=True))
        checksums: dict[str, str] = {}
        for part in parts:
            name = part_name(part)
            said = {noted[part]} if part in noted else set()
            said |= {listed[name]} if name in listed else set()
            checksum = said.pop() if len(said) == 1 else None
            # Of two notes, only the part can tell which was overtaken: it may be the new one, or, killed before it was
            # replaced, the old one. None at all, or one that cannot be read, may be a fault in reading.
            if checksum is None:
                found = self._find(part)
                checksum = found.checksum if found is not None and found.sound else listed.get(name)
            if checksum is not None:
                checksums[name] = checksum
        text = "".join(f"{checksum}  {name}\n" for name, checksum in sorted(checksums.items())).encode()
        if text and text != self.storage.read(CHECKSUMS):
            self.storage.write(CHECKSUMS, text)
        self._list = checksums
        self.storage.remove([*notes, *filter(REMAINS.fullmatch, names)])

    def read_part(self, part: int, fingerprint: str | None = None) -> PairScores:
        """A part's scores.

        Args:
            part: its number.
            fingerprint: from `fingerprint_hash`, if it is known.

        Raises:
            StorageError: it is missing or damaged, or has another fingerprint.
        """
        import pyarrow as pa
        import pyarrow.parquet as pq

        content = self._read_sound(part)
        try:
            file = pq.ParquetFile(pa.BufferReader(content))
            if fingerprint is not None:
                record = json.loads(file.schema_arrow.metadata[METADATA_KEY])
                if fingerprint_hash(record["fingerprints"]) != fingerprint:
                    raise StorageError(
                        f"{self.place(part)}: another run has written it since; let one at a time write there, and "
                        "evaluate again with --overwrite"
                    )
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
            raise StorageError(f"{self.place(part)}: was written by another version of dpo-fast; {WAY_OUT}") from error

    def read_columns(self, part: int, columns: Sequence[str]) -> "pa.Table":
        """Some of a part's columns as they are in the file.

        Raises:
            StorageError: it is missing or damaged.
        """
        import pyarrow as pa
        import pyarrow.parquet as pq

        content = self._read_sound(part)
        try:
            return pq.ParquetFile(pa.BufferReader(content)).read(columns=list(columns)).select(list(columns))
        except (pa.ArrowException, KeyError) as error:
            raise StorageError(f"{self.place(part)}: was written by another version of dpo-fast; {WAY_OUT}") from error

    def read(self, parts: Mapping[int, str] | None = None) -> Iterator[PairScores]:
        """The scores of all parts, one after another; the next is read while one is being used.

        Args:
            parts: whose scores they have to be: fingerprints by number; None takes what is there.

        Raises:
            StorageError: a part is missing or damaged, or has another fingerprint.
        """
        count = 1 if isinstance(self.storage, LocalFolder) else READ_AHEAD
        if parts is None:
            return several_ahead(self.read_part, self.parts(), count)
        return several_ahead(lambda part: self.read_part(part, parts[part]), sorted(parts), count)

    def _read_sound(self, part: int) -> bytes:
        """A part's file.

        Raises:
            StorageError: it is missing or damaged.
        """
        found = self._find(part)
        if found is None:
            raise StorageError(f"{self.place(part)}: is missing; {WAY_OUT}")
        if not found.sound:
            raise StorageError(f"{self.place(part)}: is not what was written (its SHA-256 differs); {WAY_OUT}")
        return found.content

    def _find(self, part: int) -> _Found | None:
        """A part's file, or None.

        What is not what was written is read again, until the same comes twice: storage that fails now and then may
        hand out half a file, and another process may be replacing it.
        """
        name = part_name(part)
        last = None
        for _ in range(READINGS):
            content = self.storage.read(name)
            if content is None:
                return None
            checksum = hashlib.sha256(content).hexdigest()
            found = _Found(content, checksum, self._is_sound(part, checksum))
            if found.sound or checksum == last:
                return found
            last = checksum
        return found

    def _is_sound(self, part: int, checksum: str) -> bool:
        """Whether a checksum was noted for a part: in the list, beside it, or in the list since that was read last."""
        return (
            checksum == self._listed().get(part_name(part))
            or checksum == self._note_of(part)
            or checksum == self._listed(afresh=True).get(part_name(part))
        )

    def _is_noted(self, part: int) -> bool:
        """Whether a part is ours: it has a checksum, whatever that is."""
        return part_name(part) in self._listed() or self._note_of(part) is not None

    def _note(self, part: int, checksum: str) -> None:
        """Write a part's checksum beside it."""
        self.storage.write(note_name(part), f"{checksum}  {part_name(part)}\n".encode())

    def _note_of(self, part: int) -> str | None:
        """The checksum beside a part; None if there is none, or it is damaged."""
        return _checksums(self.storage.read(note_name(part))).get(part_name(part))

    def _listed(self, *, afresh: bool = False) -> dict[str, str]:
        """The checksums of SHA256SUMS, by part."""
        listed = self._list
        if listed is None or afresh:
            self._list = listed = _checksums(self.storage.read(CHECKSUMS))
        return listed


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


def _numbers(names: Sequence[str]) -> list[int]:
    """The parts among files, in order."""
    matches = (PART_NAME.fullmatch(name) for name in names)
    return sorted(int(match[1]) for match in matches if match and match[0] == part_name(int(match[1])))


def _checksums(content: bytes | None) -> dict[str, str]:
    """Each part's SHA-256 by its file's name; a line that is damaged says nothing, so its part is computed again."""
    lines = (content or b"").decode(errors="replace").splitlines()
    return {match[2]: match[1] for match in map(CHECKSUM_LINE.fullmatch, lines) if match}
