"""Parts on disk: what was written is read, whole or not at all, and only for what it was computed from."""

import errno
import hashlib
import json
import os
import pickle
import subprocess
import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from shutil import which
from uuid import uuid4

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fake_engines import FakeEngine, make_pair, pairs_alike
from hypothesis import given, settings
from hypothesis import strategies as st
from s3_server import S3Server, s3

from dpo_fast.bundle import POLICY, REFERENCE
from dpo_fast.errors import OutputExistsError, StorageError
from dpo_fast.scores import ScoredPairs, score_pairs
from dpo_fast.store import (
    CHECKSUMS,
    METADATA_KEY,
    PAIRS,
    Fingerprint,
    PartRecord,
    ScoreStore,
    note_name,
    part_name,
    row_hash,
    token_hash,
)
from dpo_fast.token_table import make_table
from dpo_fast.types import CompletionScores, TokenizedPair

__all__ = ["s3"]  # a fixture

FINGERPRINTS: dict[str, Fingerprint] = {
    PAIRS: {"token ids": "t", "row numbers, truncation or groups": "r"},
    **{
        role: {"weights and graph": role, "engine": "fake", "precision": "fp32", "layout": "shared"}
        for role in (POLICY, REFERENCE)
    },
}
RECORD = PartRecord(FINGERPRINTS, rows=(1, 8), tokens=40, padding=3, token_budget=100)
# Ragged, one without a prompt, whose rejected completion then has no scored token.
THREE = [
    make_pair([1, 2], [3], [4, 5, 6], row=2, group="a"),
    make_pair([], [7, 8], [9], row=3, group="b"),
    make_pair([1], [2, 3, 4], [5], row=7, group="a"),
]


def score(pairs: Sequence[TokenizedPair], *roles: str) -> dict[str, ScoredPairs]:
    table = make_table(pairs)
    return {role: score_pairs(table, FakeEngine(role), layout="shared", token_budget=100) for role in roles}


def write(
    store: ScoreStore, pairs: Sequence[TokenizedPair] = THREE, *, part: int = 0, record: PartRecord = RECORD
) -> None:
    store.write(part, make_table(pairs), score(pairs, POLICY), record)


@pytest.fixture(params=["folder", "memory", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> ScoreStore:
    """Whatever the storage, the same holds."""
    if request.param == "s3":
        server: S3Server = request.getfixturevalue("s3")
        return ScoreStore(f"{server.make_bucket()}/run/scores")
    return ScoreStore(tmp_path / "run" / "scores" if request.param == "folder" else f"memory://{uuid4().hex}/scores")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "run" / "scores"


PART, NOTE = "part-00000.parquet", "part-00000.sha256"


def again(store: ScoreStore) -> ScoreStore:
    """As another process finds it."""
    return pickle.loads(pickle.dumps(store))


def get(store: ScoreStore, name: str = PART) -> bytes:
    content = store.storage.read(name)
    assert content is not None
    return content


def files(store: ScoreStore) -> dict[str, bytes]:
    return {name: get(store, name) for name in store.storage.names()}


def assert_equal(read: CompletionScores | None, written: CompletionScores) -> None:
    assert read is not None
    for name in ("log_probs", "lengths", "entropy", "mean_logit", "top1", "log_sum_sq_prob"):
        one, other = getattr(read, name), getattr(written, name)
        assert one.dtype == other.dtype, name
        np.testing.assert_array_equal(one, other)


# What is written.


def test_what_was_written_is_read(store: ScoreStore) -> None:
    pairs = [replace(THREE[0], truncated=True), *THREE[1:]]
    scored = score(pairs, POLICY, REFERENCE)

    store.write(0, make_table(pairs), scored, RECORD)
    read = store.read_part(0)

    assert read.rows.tolist() == [2, 3, 7]
    assert read.prompt_lengths.tolist() == [2, 0, 1]
    assert read.chosen_lengths.tolist() == [1, 2, 3]
    assert read.rejected_lengths.tolist() == [3, 1, 1]
    assert read.truncated.tolist() == [True, False, False]
    assert read.groups == ["a", "b", "a"]
    assert_equal(read.policy_chosen, scored[POLICY].chosen)
    assert_equal(read.policy_rejected, scored[POLICY].rejected)
    assert_equal(read.reference_chosen, scored[REFERENCE].chosen)
    assert_equal(read.reference_rejected, scored[REFERENCE].rejected)
    assert read.policy_rejected.lengths.tolist() == [3, 0, 1]  # the second has neither prompt nor second token


def test_a_part_says_which_tokens_were_scored(store: ScoreStore) -> None:
    write(store)

    table = store.read_columns(0, ["rejected_ids", "prompt_ids", "chosen_ids"])

    assert table.column_names == ["rejected_ids", "prompt_ids", "chosen_ids"]
    assert table["prompt_ids"].to_pylist() == [[1, 2], [], [1]]
    assert table["chosen_ids"].to_pylist() == [[3], [7, 8], [2, 3, 4]]
    assert table["rejected_ids"].to_pylist() == [[4, 5, 6], [9], [5]]


def test_without_reference_and_groups(store: ScoreStore) -> None:
    write(store, [replace(pair, group=None) for pair in THREE])

    read = store.read_part(0)

    assert read.groups is None
    assert read.reference_chosen is None
    assert read.reference_rejected is None


def test_a_part_of_which_no_row_can_be_used(store: ScoreStore) -> None:
    store.write(0, make_table([]), score([], POLICY, REFERENCE), RECORD)

    read = store.read_part(0)

    assert store.record(0) == RECORD
    for array in (read.rows, read.truncated, read.policy_chosen.log_probs, read.policy_rejected.lengths):
        assert array.shape == (0,)
    assert_equal(read.reference_rejected, score([], REFERENCE)[REFERENCE].rejected)


def test_a_part_says_what_it_was_computed_from(store: ScoreStore) -> None:
    write(store)

    assert store.record(0) == RECORD
    assert again(store).record(0) == RECORD
    assert (
        json.loads(pq.read_schema(pa.BufferReader(get(store))).metadata[METADATA_KEY])["fingerprints"] == FINGERPRINTS
    )
    assert store.record(1) is None


TOKENS = st.lists(st.integers(0, 2**31 - 1), min_size=1, max_size=4)
ANY_PAIR = st.builds(make_pair, TOKENS, TOKENS, TOKENS, st.integers(1, 9), st.text(max_size=3))


@settings(max_examples=20)
@given(st.one_of(st.lists(ANY_PAIR, min_size=1), pairs_alike()), st.data())
def test_parts_are_read_one_after_another(
    tmp_path_factory: pytest.TempPathFactory, pairs: list[TokenizedPair], data: st.DataObject
) -> None:
    store = ScoreStore(tmp_path_factory.mktemp("run") / "scores")
    size = data.draw(st.integers(1, len(pairs)))
    chunks = [pairs[start : start + size] for start in range(0, len(pairs), size)]
    for part, chunk in enumerate(chunks):
        write(store, chunk, part=part)

    read = list(store.read())

    assert store.parts() == list(range(len(chunks)))
    assert [part.rows.tolist() for part in read] == [[pair.row for pair in chunk] for chunk in chunks]
    for part, chunk in zip(read, chunks, strict=True):
        groups = [pair.group for pair in chunk]
        assert part.groups == (groups if any(group is not None for group in groups) else None)
        assert_equal(part.policy_rejected, score(chunk, POLICY)[POLICY].rejected)


def test_parts_are_in_the_order_of_their_numbers(store: ScoreStore) -> None:
    """Five digits are written; a hundred thousand parts would have six."""
    for part in (100_000, 2, 99_999):
        write(store, [replace(THREE[0], row=part)], part=part)

    assert store.parts() == [2, 99_999, 100_000]
    assert [scores.rows.tolist() for scores in store.read()] == [[2], [99_999], [100_000]]


def test_the_same_scores_are_the_same_bytes(store: ScoreStore, tmp_path: Path) -> None:
    write(store)
    other = ScoreStore(tmp_path / "other")
    write(other)

    assert files(store) == files(other)


# Checksums.


def checksums(store: ScoreStore, name: str = CHECKSUMS) -> dict[str, str]:
    lines = get(store, name).decode().splitlines()
    return {name: checksum for checksum, name in (line.split("  ") for line in lines)}


def test_a_written_part_leaves_its_checksum_and_nothing_else_beside_it(store: ScoreStore) -> None:
    write(store, part=1)
    write(store, THREE[:1])

    parts = {part_name(part): get(store, part_name(part)) for part in (0, 1)}
    hashes = {name: hashlib.sha256(content).hexdigest() for name, content in parts.items()}
    assert files(store) == parts | {
        note_name(part): f"{hashes[part_name(part)]}  {part_name(part)}\n".encode() for part in (0, 1)
    }

    store.finish()

    text = "".join(f"{checksum}  {name}\n" for name, checksum in hashes.items())
    assert files(store) == parts | {CHECKSUMS: text.encode()}
    assert [again(store).record(part) for part in (0, 1)] == [RECORD, RECORD]


@pytest.mark.skipif(which("sha256sum") is None, reason="GNU's sha256sum is not there")
@pytest.mark.parametrize("finished", [False, True])
def test_sha256sum_checks_them(folder: Path, finished: bool) -> None:
    store = ScoreStore(folder)
    write(store)
    if finished:
        store.finish()
    command = ["sha256sum", "--check", "--strict", CHECKSUMS if finished else NOTE]
    assert subprocess.run(command, cwd=folder, capture_output=True, check=False).returncode == 0
    flip(store, 100)
    assert subprocess.run(command, cwd=folder, capture_output=True, check=False).returncode != 0


@pytest.mark.parametrize("finished", [False, True])
def test_a_part_that_is_written_again_has_a_new_checksum(store: ScoreStore, finished: bool) -> None:
    """Of a finished run, whose list has the old one until it is finished again."""
    write(store)
    if finished:
        store.finish()
    reader = again(store)
    assert reader.record(0) == RECORD  # it has seen the old checksum
    write(again(store), THREE[:1])

    for found in (reader, again(store)):
        assert found.record(0) == RECORD
        assert found.read_part(0).rows.tolist() == [2]
    again(store).finish()
    for found in (reader, again(store)):
        assert found.record(0) == RECORD
    assert store.storage.names() == [CHECKSUMS, PART]
    assert checksums(store) == {PART: hashlib.sha256(get(store)).hexdigest()}


def test_a_part_that_was_to_be_replaced_stays_what_it_was(store: ScoreStore) -> None:
    """Killed between the new checksum and the new part, of a finished run: the old part is whole, and is kept."""
    write(store)
    store.finish()
    before = files(store)
    store.storage.write(NOTE, f"{'0' * 64}  {PART}\n".encode())

    assert again(store).record(0) == RECORD
    again(store).finish()

    assert files(store) == before


def test_a_finished_run_is_not_written_again(store: ScoreStore, monkeypatch: pytest.MonkeyPatch) -> None:
    for part in range(3):
        write(store, part=part)
    store.finish()
    before = files(store)

    def refuse(*arguments: object) -> None:
        raise AssertionError("nothing is to be written")

    monkeypatch.setattr(type(store.storage), "write", refuse)
    again(store).finish()

    assert files(store) == before


def test_a_checksum_without_a_part_is_harmless(store: ScoreStore) -> None:
    write(store)
    store.storage.write(note_name(1), f"{'0' * 64}  {part_name(1)}\n".encode())

    assert store.parts() == [0]
    assert store.record(1) is None
    store.finish()
    assert store.storage.names() == [CHECKSUMS, PART]


def test_nothing_is_finished_of_nothing(store: ScoreStore) -> None:
    store.finish()
    assert store.storage.names() == []


# Damage.


def flip(store: ScoreStore, position: int, bits: int = 1, name: str = PART) -> None:
    content = bytearray(get(store, name))
    content[position % len(content)] ^= bits
    store.storage.write(name, bytes(content))


def assert_damaged(damaged: ScoreStore) -> None:
    """As good as not there for who goes on with the run, and refused to who reads it."""
    store = again(damaged)
    assert store.record(0) is None
    with pytest.raises(StorageError) as caught:
        store.read_part(0)
    message = str(caught.value)
    assert message.startswith(f"{store.place(0)}: ")
    assert "evaluate again, and it is computed again" in message
    assert "\n" not in message
    with pytest.raises(StorageError, match=r"part-00000\.parquet"):
        list(store.read())


@pytest.fixture(scope="module", params=[NOTE, CHECKSUMS])
def written(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The files of a run of one part, unfinished and finished: its part, and its checksum."""
    store = ScoreStore(tmp_path_factory.mktemp("written") / "scores")
    write(store)
    if request.param == CHECKSUMS:
        store.finish()
    assert store.storage.names() == sorted([PART, request.param])
    return files(store)


def line_of(written: dict[str, bytes]) -> str:
    """The file of the part's checksum."""
    return next(name for name in written if name != PART)


@pytest.fixture
def damaged(tmp_path: Path, written: dict[str, bytes]) -> Callable[[str, bytes], ScoreStore]:
    """Put a content in the place of one file of a run."""

    def put(name: str, content: bytes) -> ScoreStore:
        for each, sound in written.items():
            (tmp_path / each).write_bytes(sound)
        (tmp_path / name).write_bytes(content)
        return ScoreStore(tmp_path)

    return put


each_byte = settings(max_examples=300)


@each_byte
@given(position=st.integers(0, 10**6), bits=st.integers(1, 255))
def test_any_byte_that_changes_is_found(written: dict[str, bytes], position: int, bits: int) -> None:
    """In the data, in the pages' headers, in the footer and its metadata, in the length and the marks at the ends."""
    store = ScoreStore(Files(dict(written)))
    flip(store, position, bits)

    assert_damaged(store)


def test_a_part_that_was_replaced_is_none(damaged: Callable[[str, bytes], ScoreStore], tmp_path: Path) -> None:
    """The run's checksums name it, so it is the run's to write again, whatever is there now."""
    pq.write_table(pa.table({"row": [1]}), tmp_path / "other.parquet")

    assert_damaged(damaged(PART, (tmp_path / "other.parquet").read_bytes()))


@pytest.mark.parametrize("length", [0, 1, 4, 8, 100, -1000, -9, -8, -4, -1])
def test_a_part_that_was_cut_short_is_none(
    damaged: Callable[[str, bytes], ScoreStore], written: dict[str, bytes], length: int
) -> None:
    assert_damaged(damaged(PART, written[PART][:length]))


@pytest.mark.parametrize("content", [b"", b"no parquet", b"PAR1" * 10])
def test_a_part_that_is_no_parquet_is_none(damaged: Callable[[str, bytes], ScoreStore], content: bytes) -> None:
    assert_damaged(damaged(PART, content))


@pytest.mark.parametrize(
    "lines",
    [
        "",
        "\n\n",
        "{checksum} part-00000.parquet\n",
        "{checksum}  part-00001.parquet\n",
        "{checksum}\n",
        "{other}  part-00000.parquet\n",
        "{checksum}0  part-00000.parquet\n",
        "\x00\n",
        "{checksum}  part-00000.parque",
    ],
)
def test_without_its_line_a_part_is_none(
    damaged: Callable[[str, bytes], ScoreStore], written: dict[str, bytes], lines: str
) -> None:
    """Lost, cut short, of another part, of another content."""
    checksum = hashlib.sha256(written[PART]).hexdigest()
    text = lines.format(checksum=checksum, other=checksum[::-1])

    assert_damaged(damaged(line_of(written), text.encode()))


@each_byte
@given(position=st.integers(0, 10**6), bits=st.integers(1, 255))
def test_any_byte_that_changes_of_a_part_s_line_is_found(written: dict[str, bytes], position: int, bits: int) -> None:
    store = ScoreStore(Files(dict(written)))
    length = len(written[line_of(written)]) - 1  # without the line's end, of which nothing depends
    flip(store, position % length, bits, line_of(written))

    assert_damaged(store)


@pytest.mark.parametrize("finished", [False, True])
def test_without_checksums_no_part_is_taken(store: ScoreStore, finished: bool) -> None:
    write(store)
    if finished:
        store.finish()
    store.storage.remove([CHECKSUMS, NOTE])

    assert_damaged(store)
    store.finish()
    assert_damaged(store)  # nor is a checksum made of what nobody noted


def test_one_damaged_line_costs_one_part(store: ScoreStore) -> None:
    for part in (0, 1, 2):
        write(store, part=part)
    store.finish()
    lines = get(store, CHECKSUMS).decode().splitlines()
    lines[1] = "\xff" + lines[1][1:]
    store.storage.write(CHECKSUMS, "\n".join(lines).encode("latin-1"))

    found = again(store)
    assert [found.record(part) for part in (0, 1, 2)] == [RECORD, None, RECORD]
    write(found, part=1)
    found.finish()
    assert [again(store).record(part) for part in (0, 1, 2)] == [RECORD, RECORD, RECORD]
    assert store.storage.names() == [CHECKSUMS, *map(part_name, range(3))]


@pytest.mark.parametrize("finished", [False, True])
def test_a_damaged_part_can_be_written_again(store: ScoreStore, finished: bool) -> None:
    write(store)
    if finished:
        store.finish()
    sound = get(store)
    flip(store, -30)
    found = again(store)
    assert found.record(0) is None

    write(found)

    assert found.record(0) == RECORD
    assert again(store).read_part(0).rows.tolist() == [2, 3, 7]
    found.finish()
    assert files(store) == {PART: sound, CHECKSUMS: f"{hashlib.sha256(sound).hexdigest()}  {PART}\n".encode()}


def test_parts_that_changed_places_are_none(store: ScoreStore) -> None:
    """Each is whole, but the numbers of the other's rows."""
    write(store)
    write(store, THREE[:1], part=1)
    one, other = get(store, part_name(0)), get(store, part_name(1))
    store.storage.write(part_name(0), other)
    store.storage.write(part_name(1), one)

    assert_damaged(store)


def test_a_missing_part_is_named(store: ScoreStore) -> None:
    write(store)

    with pytest.raises(StorageError, match=r"part-00001\.parquet: is missing; evaluate again"):
        store.read_part(1)


@pytest.mark.parametrize("name", [CHECKSUMS, NOTE])
def test_checksums_that_cannot_be_read_are_named(folder: Path, name: str) -> None:
    store = ScoreStore(folder)
    write(store)
    (folder / NOTE).unlink()
    (folder / name).mkdir()

    with pytest.raises(StorageError, match=rf"{name}: cannot be read \(Is a directory\); mend that"):
        store.record(0)


def other_versions(value: dict[str, object]) -> list[bytes]:
    """What another version may have written: more, less, or other values."""
    less = {key: each for key, each in value.items() if key != "rows"}
    return [json.dumps(each).encode() for each in ({}, [1], 3, {**value, "more": 1}, less, {**value, "rows": 1})] + [
        b"{", b"", b"\xff"
    ]  # fmt: skip


@pytest.mark.parametrize("metadata", other_versions(asdict(RECORD)))
def test_a_sound_part_of_another_version_is_computed_again(store: ScoreStore, metadata: bytes) -> None:
    write(store)
    table = pq.read_table(pa.BufferReader(get(store))).replace_schema_metadata({METADATA_KEY: metadata})
    put_sound(store, table)

    assert again(store).record(0) is None


def put_sound(store: ScoreStore, table: pa.Table) -> None:
    """Another content of part 0, with its checksum."""
    put_parquet(store, table)
    store.storage.write(NOTE, f"{hashlib.sha256(get(store)).hexdigest()}  {PART}\n".encode())


def put_parquet(store: ScoreStore, table: pa.Table) -> None:
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink)
    store.storage.write(PART, sink.getvalue().to_pybytes())


def test_a_sound_part_of_other_columns_is_refused(store: ScoreStore) -> None:
    write(store)
    table = pq.read_table(pa.BufferReader(get(store)))
    put_sound(store, table.drop_columns(["policy_chosen_entropy", "prompt_ids"]))

    with pytest.raises(StorageError, match=r"part-00000\.parquet: was written by another version of dpo-fast"):
        again(store).read_part(0)
    with pytest.raises(StorageError, match=r"part-00000\.parquet: was written by another version of dpo-fast"):
        again(store).read_columns(0, ["prompt_ids"])


@pytest.mark.parametrize("metadata", [None, {b"pandas": b"{}"}])
def test_a_parquet_file_of_others_is_refused(store: ScoreStore, metadata: dict[bytes, bytes] | None) -> None:
    """It is not damaged, and nobody asked for it to be replaced."""
    put_parquet(store, pa.table({"row": [1]}).replace_schema_metadata(metadata))
    before = files(store)

    with pytest.raises(OutputExistsError, match=r"part-00000\.parquet: was not written by dpo-fast; name another"):
        again(store).record(0)

    assert files(store) == before


# Disks that refuse.


def full(*arguments: object, **keywords: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "part")


@pytest.mark.parametrize("failing", ["write", "sync", "rename"])
def test_a_write_that_fails_leaves_no_part(folder: Path, monkeypatch: pytest.MonkeyPatch, failing: str) -> None:
    store = ScoreStore(folder)
    if failing == "write":
        opened = Path.open
        monkeypatch.setattr(Path, "open", lambda path, mode="r", **rest: full() if "w" in mode else opened(path, mode))
    elif failing == "sync":
        monkeypatch.setattr(os, "fsync", full)
    else:
        monkeypatch.setattr(Path, "replace", full)

    with pytest.raises(StorageError, match="No space left on device; free some space"):
        write(store)

    assert list(folder.iterdir()) == []
    assert store.record(0) is None
    assert again(store).record(0) is None


@pytest.mark.parametrize("finished", [False, True])
def test_a_failing_write_keeps_the_part_that_was_there(
    folder: Path, monkeypatch: pytest.MonkeyPatch, finished: bool
) -> None:
    store = ScoreStore(folder)
    write(store)
    if finished:
        store.finish()
    before = files(store)
    monkeypatch.setattr(os, "fsync", lambda handle: (_ for _ in ()).throw(OSError(errno.EDQUOT, "quota")))

    with pytest.raises(StorageError, match="quota"):
        write(store, THREE[:1])

    assert files(store) == before
    assert store.record(0) == RECORD
    assert store.read_part(0).rows.tolist() == [2, 3, 7]


@pytest.mark.parametrize("failing", [1, 2])
def test_a_part_whose_checksum_was_not_written_is_not_taken(
    folder: Path, monkeypatch: pytest.MonkeyPatch, failing: int
) -> None:
    """Killed, or out of room, between the part's checksum and the part: the first rename is the checksum's.

    What was there before may have to be computed again, but is never taken for what it is not.
    """
    store = ScoreStore(folder)
    write(store)
    renames = iter(range(1, 3))
    rename = Path.replace
    monkeypatch.setattr(Path, "replace", lambda a, b: full() if next(renames) == failing else rename(a, b))

    with pytest.raises(StorageError):
        write(store, THREE[:1], record=replace(RECORD, tokens=10))

    monkeypatch.undo()
    for found in (store, again(store)):
        record = found.record(0)
        assert record in (None, RECORD)
        if record is not None:
            assert found.read_part(0).rows.tolist() == [2, 3, 7]
    assert not [path for path in folder.iterdir() if path.name.startswith(".")]


def test_a_folder_that_cannot_be_made_is_named(folder: Path) -> None:
    folder.parent.write_text("a file of the run's name")

    with pytest.raises(StorageError, match=r"run/scores.*: Not a directory; a part of the path is a file"):
        write(ScoreStore(folder))


# Storage that is killed, or fails now and then.


class Killed(BaseException):
    pass


@dataclass
class Files:
    """Files in a dictionary: the storage, as simple as can be, that dies at a change, or reads a half at a reading."""

    content: dict[str, bytes] = field(default_factory=dict)
    changes_left: int = 10**6
    halves: frozenset[int] = frozenset()
    readings: int = 0
    name: str = "files"
    leaves_remains: bool = False

    def place(self, name: str) -> str:
        return f"{self.name}/{name}"

    def make(self) -> None:
        pass

    def read(self, name: str) -> bytes | None:
        self.readings += 1
        content = self.content.get(name)
        return content[: len(content) // 2] if content and self.readings in self.halves else content

    def write(self, name: str, content: bytes | memoryview) -> None:
        self.change()
        self.content[name] = bytes(content)

    def names(self) -> list[str]:
        return sorted(self.content)

    def remove(self, names: Iterable[str]) -> None:
        for name in names:
            self.change()
            self.content.pop(name, None)

    def change(self) -> None:
        self.changes_left -= 1
        if self.changes_left < 0:
            raise Killed


VARIANTS = (RECORD, replace(RECORD, tokens=41))
# Some of three parts are written, in one of two versions, and the run is finished, in any order, any number of times.
STEPS = st.lists(
    st.one_of(st.none(), st.tuples(st.integers(0, 2), st.integers(0, 1))), min_size=1, max_size=8
)  # fmt: skip


@pytest.fixture(scope="module")
def versions() -> dict[int, bytes]:
    """A part's bytes, by version."""
    made = {}
    for version, record in enumerate(VARIANTS):
        store = ScoreStore(Files())
        write(store, THREE[version : version + 1], record=record)
        made[version] = get(store)
    return made


def do(store: ScoreStore, step: tuple[int, int] | None, versions: dict[int, bytes]) -> None:
    if step is None:
        store.finish()
        return
    part, version = step  # as `write` does it, without making the table again
    store._note(part, hashlib.sha256(versions[version]).hexdigest())
    store.storage.write(part_name(part), versions[version])


@settings(max_examples=250)
@given(st.lists(st.tuples(STEPS, st.integers(0, 30)), max_size=4), STEPS)
def test_killed_at_any_moment_any_number_of_times(
    versions: dict[int, bytes],
    lives: list[tuple[list[tuple[int, int] | None], int]],
    last: list[tuple[int, int] | None],
) -> None:
    """Whatever happened before, what is taken is whole; what a life has written is taken; and the end is one list."""
    kept = Files()
    for steps, changes in [*lives, (last, 10**6)]:
        kept.changes_left = changes
        store = ScoreStore(kept)
        done: dict[int, int] = {}
        try:
            for step in steps:
                if step is not None:
                    done.pop(step[0], None)  # it may have been replaced, or not
                do(store, step, versions)
                if step is not None:
                    done[step[0]] = step[1]
        except Killed:
            kept.changes_left = 10**6
        for found in (store, ScoreStore(kept)):
            for part in found.parts():
                record = found.record(part)
                assert record is None or kept.content[part_name(part)] == versions[VARIANTS.index(record)]
            assert {part: found.record(part) for part in done} == {
                part: VARIANTS[version] for part, version in done.items()
            }
    for part in range(3):
        if store.record(part) is None:
            do(store, (part, 0), versions)
    store.finish()
    assert sorted(kept.content) == [CHECKSUMS, *map(part_name, range(3))]
    assert checksums(store) == {
        part_name(part): hashlib.sha256(kept.content[part_name(part)]).hexdigest() for part in range(3)
    }


@settings(max_examples=200)
@given(st.frozensets(st.integers(1, 40), max_size=10), st.booleans())
def test_half_a_file_that_is_read_now_and_then_costs_nothing(
    versions: dict[int, bytes], halves: frozenset[int], finished: bool
) -> None:
    """Never two halves of one file in a row, which nobody could tell from a file that was cut."""
    halves = frozenset(number for number in halves if not halves & {number - 1, number - 2, number - 3, number - 4})
    kept = Files(halves=halves)
    store = ScoreStore(kept)
    for part in range(3):
        do(store, (part, 0), versions)
    if finished:
        store.finish()
        do(store, (1, 1), versions)
    sound = [RECORD, VARIANTS[1] if finished else RECORD, RECORD]

    assert [ScoreStore(kept).record(part) for part in range(3)] == sound
    store.finish()
    assert [len(ScoreStore(kept).read_part(part).rows) for part in range(3)] == [1, 1, 1]
    kept.halves = frozenset()
    assert [ScoreStore(kept).record(part) for part in range(3)] == sound
    assert sorted(kept.content) == [CHECKSUMS, *map(part_name, range(3))]


# Whose part it is.


def changed(name: str, key: str, value: str = "other") -> dict[str, Fingerprint]:
    return {**FINGERPRINTS, name: {**FINGERPRINTS[name], key: value}}


def test_the_same_fingerprints_are_taken(store: ScoreStore) -> None:
    store.check(0, RECORD, FINGERPRINTS)


@pytest.mark.parametrize(("name", "key"), [(name, key) for name, keys in FINGERPRINTS.items() for key in keys])
def test_another_fingerprint_is_refused_by_name(store: ScoreStore, name: str, key: str) -> None:
    with pytest.raises(OutputExistsError) as caught:
        store.check(4, RECORD, changed(name, key))

    what = "pairs" if name == PAIRS else f"{name} scores"
    assert str(caught.value) == (
        f"{store.name}: holds a run whose {what} differ in {key} (part 4); name another folder, or say --overwrite"
    )


def test_all_that_differs_is_named(store: ScoreStore) -> None:
    other = {**FINGERPRINTS, POLICY: {**FINGERPRINTS[POLICY], "engine": "another", "layout": "plain"}}

    with pytest.raises(OutputExistsError, match="policy scores differ in engine, layout "):
        store.check(0, RECORD, other)


def test_a_role_more_or_less_is_refused(store: ScoreStore) -> None:
    without = {name: value for name, value in FINGERPRINTS.items() if name != REFERENCE}

    with pytest.raises(OutputExistsError, match="reference scores differ"):
        store.check(0, replace(RECORD, fingerprints=without), FINGERPRINTS)
    with pytest.raises(OutputExistsError, match="reference scores differ"):
        store.check(0, RECORD, without)


def test_hashes_see_every_token_length_and_row() -> None:
    base = make_pair([1, 2], [3], [4], row=5, group="a")
    others = [
        make_pair([1, 9], [3], [4], row=5), make_pair([1, 2], [9], [4], row=5), make_pair([1, 2], [3], [9], row=5),
        make_pair([1], [2, 3], [4], row=5), make_pair([1, 2, 3], [], [4], row=5), make_pair([2, 1], [3], [4], row=5),
    ]  # fmt: skip
    assert len({token_hash(make_table([pair])) for pair in [base, *others]}) == 1 + len(others)
    assert token_hash(make_table([base, others[0]])) != token_hash(make_table([others[0], base]))

    changes = ({"row": 6}, {"truncated": True}, {"group": "b"}, {"group": None})
    same_tokens = [replace(base, **change) for change in changes]
    assert {token_hash(make_table([pair])) for pair in same_tokens} == {token_hash(make_table([base]))}
    hashes = {row_hash(make_table([pair]), (0, 9)) for pair in [base, *same_tokens]}
    assert len(hashes) == 1 + len(same_tokens)
    # Rows that were skipped are the part's too.
    assert len({row_hash(make_table([base]), rows) for rows in [(0, 9), (0, 10), (1, 9)]}) == 3


@given(st.lists(ANY_PAIR, max_size=5), st.data())
def test_hashes_are_those_of_the_pairs_wherever_they_lie(pairs: list[TokenizedPair], data: st.DataObject) -> None:
    """A slice of a larger table has the hash of a table of its own."""
    before = data.draw(st.lists(ANY_PAIR, max_size=3))
    part = make_table([*before, *pairs]).slice(len(before), len(before) + len(pairs))

    assert token_hash(part) == token_hash(make_table(pairs))
    assert row_hash(part, (0, 5)) == row_hash(make_table(pairs), (0, 5))


# Several runs, several readers.


def test_a_part_is_adopted_as_it_is(store: ScoreStore, tmp_path: Path) -> None:
    write(store, part=3)
    other = ScoreStore(tmp_path / "other" / "scores")

    other.adopt(3, store)

    assert files(other) == files(store)
    assert again(other).record(3) == RECORD


def test_a_part_is_adopted_from_a_folder_to_anywhere(store: ScoreStore, tmp_path: Path) -> None:
    other = ScoreStore(tmp_path / "other" / "scores")
    write(other, part=3)
    other.finish()

    store.adopt(3, other)
    store.finish()

    assert files(store) == files(other)


@pytest.mark.parametrize("damage", ["flip", "cut", "no checksum"])
def test_a_damaged_part_is_not_adopted(store: ScoreStore, tmp_path: Path, damage: str) -> None:
    write(store)
    if damage == "flip":
        flip(store, 50)
    elif damage == "cut":
        store.storage.write(PART, get(store)[:-1])
    else:
        store.storage.remove([NOTE])
    other = ScoreStore(tmp_path / "other" / "scores")

    with pytest.raises(StorageError, match=r"scores/part-00000\.parquet: is not what was written .* again"):
        other.adopt(0, again(store))

    assert not (tmp_path / "other").exists()


def test_parts_may_be_written_in_one_thread_and_looked_for_in_another(store: ScoreStore) -> None:
    """As `dpo_fast.scoring` does: while one is being written, the next is looked for."""
    write(store)
    failures: list[object] = []

    def look() -> None:
        failures.extend(found for _ in range(50) if (found := store.record(0)) != RECORD)

    reader = threading.Thread(target=look)
    reader.start()
    for part in range(1, 6):
        write(store, part=part)
    reader.join()

    assert failures == []
    assert store.parts() == list(range(6))
    store.finish()
    assert len(checksums(store)) == 6


def test_many_write_at_once(store: ScoreStore) -> None:
    """In threads of one process that share a store, and elsewhere; now and then the same part, of the same bytes."""
    others = [again(store) for _ in range(3)]

    def write_and_look(number: int) -> bool:
        mine = (store, *others)[number % 4]
        write(mine, part=number % 20)
        return mine.record(number % 20) == RECORD

    with ThreadPoolExecutor(8) as writers:
        assert all(writers.map(write_and_look, range(30)))

    store.finish()
    assert store.parts() == list(range(20))
    assert len(set(checksums(store).values())) == 1
    assert store.storage.names() == [CHECKSUMS, *map(part_name, range(20))]
    assert [other.record(19) for other in others] == [RECORD] * 3


def test_who_comes_late_does_no_harm(store: ScoreStore) -> None:
    """A worker that seemed dead writes a part once more, when the run is finished."""
    write(store)
    late = again(store)
    assert late.record(0) == RECORD
    store.finish()
    before = files(store)

    write(late)

    assert late.record(0) == store.record(0) == RECORD
    store.finish()
    assert files(store) == before


def test_clear_removes_parts_and_their_checksums_only(store: ScoreStore) -> None:
    write(store)
    store.finish()
    write(store, part=2)
    for name in ("notes.txt", "part-x.parquet", "part-1.parquet", "parts.sha256"):
        store.storage.write(name, b"mine")

    store.clear()

    assert store.storage.names() == ["notes.txt", "part-1.parquet", "part-x.parquet", "parts.sha256"]
    assert store.record(0) is None
    assert store.parts() == []
    write(store, part=1)
    store.finish()
    assert list(checksums(store)) == ["part-00001.parquet"]  # nothing of what is gone


def test_what_a_killed_run_left_half_written_is_no_part(folder: Path) -> None:
    store = ScoreStore(folder)
    write(store)
    remains = [f".{name}.{uuid4().hex}" for name in (part_name(1), note_name(1), CHECKSUMS)]
    for name in (*remains, ".mine"):
        (folder / name).write_bytes(b"killed")

    assert store.parts() == [0]
    assert len(list(store.read())) == 1
    store.remove_remains()
    assert store.storage.names() == [".mine", PART, NOTE]


def test_a_finished_run_has_nothing_of_workers_that_were_killed(folder: Path) -> None:
    store = ScoreStore(folder)
    write(store)
    for name in (part_name(0), note_name(1), CHECKSUMS):
        (folder / f".{name}.{uuid4().hex}").write_bytes(b"killed")

    store.finish()

    assert store.storage.names() == [CHECKSUMS, PART]
