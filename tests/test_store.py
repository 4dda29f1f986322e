"""Parts on disk: what was written is read, whole or not at all, and only for what it was computed from."""

import errno
import hashlib
import json
import os
import subprocess
import threading
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from shutil import which

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fake_engines import FakeEngine, make_pair, pairs_alike
from hypothesis import given, settings
from hypothesis import strategies as st

from dpo_fast.bundle import POLICY, REFERENCE
from dpo_fast.errors import OutputExistsError, StorageError
from dpo_fast.scores import ScoredPairs, score_pairs
from dpo_fast.store import CHECKSUMS, METADATA_KEY, PAIRS, Fingerprint, PartRecord, ScoreStore, row_hash, token_hash
from dpo_fast.token_table import make_table
from dpo_fast.types import CompletionScores, TokenizedPair

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


@pytest.fixture
def store(tmp_path: Path) -> ScoreStore:
    return ScoreStore(tmp_path / "run" / "scores")


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

    table = pq.read_table(store.path(0))

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
    assert ScoreStore(store.folder).record(0) == RECORD  # as another process finds it
    assert json.loads(pq.read_schema(store.path(0)).metadata[METADATA_KEY])["fingerprints"] == FINGERPRINTS
    assert store.record(1) is None


TOKENS = st.lists(st.integers(0, 2**31 - 1), min_size=1, max_size=4)
ANY_PAIR = st.builds(make_pair, TOKENS, TOKENS, TOKENS, st.integers(1, 9), st.text(max_size=3))


@settings(max_examples=20, deadline=None)
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

    assert store.path(0).read_bytes() == other.path(0).read_bytes()


# Checksums.


def checksums(store: ScoreStore) -> dict[str, str]:
    lines = (store.folder / CHECKSUMS).read_text().splitlines()
    return {name: checksum for checksum, name in (line.split("  ") for line in lines)}


def test_a_written_part_leaves_its_checksum_and_nothing_else_beside_it(store: ScoreStore) -> None:
    write(store, part=1)
    write(store, THREE[:1])

    names = ["part-00000.parquet", "part-00001.parquet"]
    assert sorted(path.name for path in store.folder.iterdir()) == [CHECKSUMS, *names]
    assert checksums(store) == {name: hashlib.sha256((store.folder / name).read_bytes()).hexdigest() for name in names}


@pytest.mark.skipif(which("sha256sum") is None, reason="GNU's sha256sum is not there")
def test_sha256sum_checks_them(store: ScoreStore) -> None:
    write(store)
    command = ["sha256sum", "--check", "--strict", CHECKSUMS]
    assert subprocess.run(command, cwd=store.folder, capture_output=True, check=False).returncode == 0
    flip(store.path(0), 100)
    assert subprocess.run(command, cwd=store.folder, capture_output=True, check=False).returncode != 0


def test_a_part_that_is_written_again_has_a_new_checksum(store: ScoreStore) -> None:
    write(store)
    before = checksums(store)
    write(ScoreStore(store.folder), THREE[:1])

    found = ScoreStore(store.folder)
    assert found.record(0) == RECORD
    assert found.read_part(0).rows.tolist() == [2]
    assert checksums(store) != before


# Damage.


def flip(path: Path, position: int, bits: int = 1) -> None:
    content = bytearray(path.read_bytes())
    content[position % len(content)] ^= bits
    path.write_bytes(content)


def assert_damaged(folder: Path) -> None:
    """As good as not there for who goes on with the run, and refused to who reads it."""
    store = ScoreStore(folder)
    assert store.record(0) is None
    with pytest.raises(StorageError) as caught:
        store.read_part(0)
    message = str(caught.value)
    assert message.startswith(f"{store.path(0)}: ")
    assert "evaluate again, and it is computed again" in message
    assert "\n" not in message
    with pytest.raises(StorageError, match=r"part-00000\.parquet"):
        list(store.read())


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The files of a run of one part."""
    store = ScoreStore(tmp_path_factory.mktemp("written") / "scores")
    write(store)
    return {path.name: path.read_bytes() for path in store.folder.iterdir()}


@pytest.fixture
def damaged(tmp_path: Path, written: dict[str, bytes]) -> Callable[[str, bytes], Path]:
    """Put a content in the place of one file of a run."""

    def put(name: str, content: bytes) -> Path:
        for each, sound in written.items():
            (tmp_path / each).write_bytes(sound)
        (tmp_path / name).write_bytes(content)
        return tmp_path

    return put


PART = "part-00000.parquet"
each_byte = settings(max_examples=300, deadline=None)


@each_byte
@given(position=st.integers(0, 10**6), bits=st.integers(1, 255))
def test_any_byte_that_changes_is_found(
    tmp_path_factory: pytest.TempPathFactory, written: dict[str, bytes], position: int, bits: int
) -> None:
    """In the data, in the pages' headers, in the footer and its metadata, in the length and the marks at the ends."""
    folder = tmp_path_factory.mktemp("flipped")
    for name, content in written.items():
        (folder / name).write_bytes(content)
    flip(folder / PART, position, bits)

    assert_damaged(folder)


def test_a_part_that_was_replaced_is_none(damaged: Callable[[str, bytes], Path], tmp_path: Path) -> None:
    """The run's checksums name it, so it is the run's to write again, whatever is there now."""
    pq.write_table(pa.table({"row": [1]}), tmp_path / "other.parquet")

    assert_damaged(damaged(PART, (tmp_path / "other.parquet").read_bytes()))


@pytest.mark.parametrize("length", [0, 1, 4, 8, 100, -1000, -9, -8, -4, -1])
def test_a_part_that_was_cut_short_is_none(
    damaged: Callable[[str, bytes], Path], written: dict[str, bytes], length: int
) -> None:
    assert_damaged(damaged(PART, written[PART][:length]))


@pytest.mark.parametrize("content", [b"", b"no parquet", b"PAR1" * 10])
def test_a_part_that_is_no_parquet_is_none(damaged: Callable[[str, bytes], Path], content: bytes) -> None:
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
    damaged: Callable[[str, bytes], Path], written: dict[str, bytes], lines: str
) -> None:
    """Lost, cut short, of another part, of another content."""
    checksum = hashlib.sha256(written[PART]).hexdigest()
    text = lines.format(checksum=checksum, other=checksum[::-1])

    assert_damaged(damaged(CHECKSUMS, text.encode()))


@each_byte
@given(position=st.integers(0, 10**6), bits=st.integers(1, 255))
def test_any_byte_that_changes_of_a_part_s_line_is_found(
    tmp_path_factory: pytest.TempPathFactory, written: dict[str, bytes], position: int, bits: int
) -> None:
    folder = tmp_path_factory.mktemp("flipped")
    for name, content in written.items():
        (folder / name).write_bytes(content)
    length = len(written[CHECKSUMS]) - 1  # without the line's end, of which nothing depends
    flip(folder / CHECKSUMS, position % length, bits)

    assert_damaged(folder)


def test_without_checksums_no_part_is_taken(store: ScoreStore) -> None:
    write(store)
    (store.folder / CHECKSUMS).unlink()

    assert_damaged(store.folder)


def test_one_damaged_line_costs_one_part(store: ScoreStore) -> None:
    for part in (0, 1, 2):
        write(store, part=part)
    lines = (store.folder / CHECKSUMS).read_text().splitlines()
    lines[1] = "\xff" + lines[1][1:]
    (store.folder / CHECKSUMS).write_bytes("\n".join(lines).encode("latin-1"))

    found = ScoreStore(store.folder)
    assert [found.record(part) for part in (0, 1, 2)] == [RECORD, None, RECORD]


def test_a_damaged_part_can_be_written_again(store: ScoreStore) -> None:
    write(store)
    flip(store.path(0), -30)
    again = ScoreStore(store.folder)
    assert again.record(0) is None

    write(again)

    assert again.record(0) == RECORD
    assert ScoreStore(store.folder).read_part(0).rows.tolist() == [2, 3, 7]


def test_parts_that_changed_places_are_none(store: ScoreStore) -> None:
    """Each is whole, but the numbers of the other's rows."""
    write(store)
    write(store, THREE[:1], part=1)
    one, other = store.path(0), store.path(1)
    content = one.read_bytes()
    one.write_bytes(other.read_bytes())
    other.write_bytes(content)

    assert_damaged(store.folder)


def test_a_missing_part_is_named(store: ScoreStore) -> None:
    write(store)

    with pytest.raises(StorageError, match=r"part-00001\.parquet: is missing; evaluate again"):
        store.read_part(1)


def test_checksums_that_cannot_be_read_are_named(store: ScoreStore) -> None:
    (store.folder / CHECKSUMS).mkdir(parents=True)

    with pytest.raises(StorageError, match=rf"{CHECKSUMS}: cannot be read"):
        ScoreStore(store.folder)


def other_versions(value: dict[str, object]) -> list[bytes]:
    """What another version may have written: more, less, or other values."""
    less = {key: each for key, each in value.items() if key != "rows"}
    return [json.dumps(each).encode() for each in ({}, [1], 3, {**value, "more": 1}, less, {**value, "rows": 1})] + [
        b"{", b"", b"\xff"
    ]  # fmt: skip


@pytest.mark.parametrize("metadata", other_versions(asdict(RECORD)))
def test_a_sound_part_of_another_version_is_computed_again(store: ScoreStore, metadata: bytes) -> None:
    write(store)
    table = pq.read_table(store.path(0)).replace_schema_metadata({METADATA_KEY: metadata})
    put_sound(store, table)

    assert ScoreStore(store.folder).record(0) is None


def put_sound(store: ScoreStore, table: pa.Table) -> None:
    """Another content of part 0, with its checksum."""
    store.folder.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, store.path(0))
    checksum = hashlib.sha256(store.path(0).read_bytes()).hexdigest()
    (store.folder / CHECKSUMS).write_text(f"{checksum}  {PART}\n")


def test_a_sound_part_of_other_columns_is_refused(store: ScoreStore) -> None:
    write(store)
    put_sound(store, pq.read_table(store.path(0)).drop_columns(["policy_chosen_entropy"]))

    with pytest.raises(StorageError, match=r"part-00000\.parquet: was written by another version of dpo-fast"):
        ScoreStore(store.folder).read_part(0)


@pytest.mark.parametrize("metadata", [None, {b"pandas": b"{}"}])
def test_a_parquet_file_of_others_is_refused(store: ScoreStore, metadata: dict[bytes, bytes] | None) -> None:
    """It is not damaged, and nobody asked for it to be replaced."""
    store.folder.mkdir(parents=True)
    pq.write_table(pa.table({"row": [1]}).replace_schema_metadata(metadata), store.path(0))
    before = store.path(0).read_bytes()

    with pytest.raises(OutputExistsError, match=r"part-00000\.parquet: was not written by dpo-fast; name another"):
        ScoreStore(store.folder).record(0)

    assert store.path(0).read_bytes() == before


# Disks that refuse.


def full(*arguments: object, **keywords: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "part")


@pytest.mark.parametrize("failing", ["write", "sync", "rename"])
def test_a_write_that_fails_leaves_no_part(store: ScoreStore, monkeypatch: pytest.MonkeyPatch, failing: str) -> None:
    if failing == "write":
        opened = Path.open
        monkeypatch.setattr(Path, "open", lambda path, mode="r", **rest: full() if "w" in mode else opened(path, mode))
    elif failing == "sync":
        monkeypatch.setattr(os, "fsync", full)
    else:
        monkeypatch.setattr(Path, "replace", full)

    with pytest.raises(StorageError, match="No space left on device; free some space"):
        write(store)

    assert list(store.folder.iterdir()) == []
    assert store.record(0) is None
    assert ScoreStore(store.folder).record(0) is None


def test_a_failing_write_keeps_the_part_that_was_there(store: ScoreStore, monkeypatch: pytest.MonkeyPatch) -> None:
    write(store)
    before = {path.name: path.read_bytes() for path in store.folder.iterdir()}
    monkeypatch.setattr(os, "fsync", lambda handle: (_ for _ in ()).throw(OSError(errno.EDQUOT, "quota")))

    with pytest.raises(StorageError, match="quota"):
        write(store, THREE[:1])

    assert {path.name: path.read_bytes() for path in store.folder.iterdir()} == before
    assert store.record(0) == RECORD
    assert store.read_part(0).rows.tolist() == [2, 3, 7]


@pytest.mark.parametrize("failing", [1, 2])
def test_a_part_whose_checksum_was_not_written_is_not_taken(
    store: ScoreStore, monkeypatch: pytest.MonkeyPatch, failing: int
) -> None:
    """Killed, or out of room, between the part's bytes, its checksum and its name: the first rename is the checksum's.

    What was there before may have to be computed again, but is never taken for what it is not.
    """
    write(store)
    renames = iter(range(1, 3))
    rename = Path.replace
    monkeypatch.setattr(Path, "replace", lambda a, b: full() if next(renames) == failing else rename(a, b))

    with pytest.raises(StorageError):
        write(store, THREE[:1], record=replace(RECORD, tokens=10))

    monkeypatch.undo()
    for found in (store, ScoreStore(store.folder)):
        record = found.record(0)
        assert record in (None, RECORD)
        if record is not None:
            assert found.read_part(0).rows.tolist() == [2, 3, 7]
    assert not [path for path in store.folder.iterdir() if path.name.startswith(".")]


def test_a_folder_that_cannot_be_made_is_named(store: ScoreStore) -> None:
    store.folder.parent.write_text("a file of the run's name")

    with pytest.raises(StorageError, match=r"run/scores.*: Not a directory; a part of the path is a file"):
        write(store)


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
        f"{store.folder.parent}: holds a run whose {what} differ in {key} (part 4); name another folder, or say "
        "--overwrite"
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

    assert other.path(3).read_bytes() == store.path(3).read_bytes()
    assert checksums(other) == checksums(store)
    assert ScoreStore(other.folder).record(3) == RECORD


@pytest.mark.parametrize("damage", ["flip", "cut", "no checksum"])
def test_a_damaged_part_is_not_adopted(store: ScoreStore, tmp_path: Path, damage: str) -> None:
    write(store)
    if damage == "flip":
        flip(store.path(0), 50)
    elif damage == "cut":
        store.path(0).write_bytes(store.path(0).read_bytes()[:-1])
    else:
        (store.folder / CHECKSUMS).unlink()
    other = ScoreStore(tmp_path / "other" / "scores")

    with pytest.raises(StorageError, match=r"run/scores/part-00000\.parquet: is not what was written .* again"):
        other.adopt(0, ScoreStore(store.folder))

    assert not other.folder.exists()


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
    assert len(checksums(store)) == 6


def test_clear_removes_parts_and_their_checksums_only(store: ScoreStore) -> None:
    write(store)
    (store.folder / "notes.txt").write_text("mine")

    store.clear()

    assert [path.name for path in store.folder.iterdir()] == ["notes.txt"]
    assert store.record(0) is None
    assert store.parts() == []
    write(store, part=1)
    assert list(checksums(store)) == ["part-00001.parquet"]  # nothing of what is gone


def test_what_a_killed_run_left_half_written_is_no_part(store: ScoreStore) -> None:
    write(store)
    (store.folder / ".part-00001.parquet.4711").write_bytes(b"killed")

    assert store.parts() == [0]
    assert len(list(store.read())) == 1
