"""Parts on disk: what was written is read, whole or not at all, and only for what it was computed from."""

import errno
import json
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from fake_engines import FakeEngine, make_pair
from hypothesis import given, settings
from hypothesis import strategies as st

from dpo_fast.bundle import POLICY, REFERENCE
from dpo_fast.errors import OutputExistsError, StorageError
from dpo_fast.scores import ScoredPairs, score_pairs
from dpo_fast.store import METADATA_KEY, Fingerprint, ScoreStore, row_hash, token_hash
from dpo_fast.types import CompletionScores, TokenizedPair

FINGERPRINTS: dict[str, Fingerprint] = {
    role: {"token ids": "t", "weights and graph": role, "engine": "fake", "precision": "fp32", "layout": "shared"}
    for role in (POLICY, REFERENCE)
}
# Ragged, one without a prompt, one whose chosen completion then has no scored token.
PAIRS = [
    make_pair([1, 2], [3], [4, 5, 6], row=2, group="a"),
    make_pair([], [7, 8], [9], row=3, group="b"),
    make_pair([1], [2, 3, 4], [5], row=7, group="a"),
]


def score(pairs: Sequence[TokenizedPair], *roles: str) -> dict[str, ScoredPairs]:
    return {role: score_pairs(pairs, FakeEngine(role), layout="shared", token_budget=100) for role in roles}


def assert_equal(read: CompletionScores | None, written: CompletionScores) -> None:
    assert read is not None
    for name in ("log_probs", "lengths", "entropy", "mean_logit", "top1", "log_sum_sq_prob"):
        one, other = getattr(read, name), getattr(written, name)
        assert one.dtype == other.dtype, name
        np.testing.assert_array_equal(one, other)


def test_what_was_written_is_read(tmp_path: Path) -> None:
    store = ScoreStore(tmp_path / "scores")
    pairs = [replace(PAIRS[0], truncated=True), *PAIRS[1:]]
    scored = score(pairs, POLICY, REFERENCE)

    store.write(0, pairs, scored, FINGERPRINTS)
    read = store.read(1)

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


def test_a_part_says_which_tokens_were_scored(tmp_path: Path) -> None:
    store = ScoreStore(tmp_path / "scores")
    store.write(0, PAIRS, score(PAIRS, POLICY), FINGERPRINTS)

    table = pq.read_table(store.path(0))

    assert table["prompt_ids"].to_pylist() == [[1, 2], [], [1]]
    assert table["chosen_ids"].to_pylist() == [[3], [7, 8], [2, 3, 4]]
    assert table["rejected_ids"].to_pylist() == [[4, 5, 6], [9], [5]]


def test_without_reference_and_groups(tmp_path: Path) -> None:
    store = ScoreStore(tmp_path / "scores")
    pairs = [replace(pair, group=None) for pair in PAIRS]
    store.write(0, pairs, score(pairs, POLICY), FINGERPRINTS)

    read = store.read(1)

    assert read.groups is None
    assert read.reference_chosen is None
    assert read.reference_rejected is None


TOKENS = st.lists(st.integers(0, 2**31 - 1), min_size=1, max_size=4)
PAIR = st.builds(make_pair, TOKENS, TOKENS, TOKENS, st.integers(1, 9), st.text(max_size=3))


@settings(max_examples=20, deadline=None)
@given(
    st.lists(st.builds(make_pair, TOKENS, TOKENS, TOKENS, st.integers(1, 9), st.text(max_size=3)), min_size=1),
    st.data(),
)
def test_parts_are_read_one_after_another(
    tmp_path_factory: pytest.TempPathFactory, pairs: list[TokenizedPair], data: st.DataObject
) -> None:
    store = ScoreStore(tmp_path_factory.mktemp("run") / "scores")
    size = data.draw(st.integers(1, len(pairs)))
    chunks = [pairs[start : start + size] for start in range(0, len(pairs), size)]
    for part, chunk in enumerate(chunks):
        store.write(part, chunk, score(chunk, POLICY), FINGERPRINTS)

    read = store.read(len(chunks))

    assert read.rows.tolist() == [pair.row for pair in pairs]
    assert read.groups == [pair.group for pair in pairs]
    assert_equal(read.policy_rejected, score(pairs, POLICY)[POLICY].rejected)


def test_a_written_part_leaves_nothing_beside_it(tmp_path: Path) -> None:
    store = ScoreStore(tmp_path / "scores")

    store.write(0, PAIRS, score(PAIRS, POLICY), FINGERPRINTS)

    assert [path.name for path in store.folder.iterdir()] == ["part-00000.parquet"]


@pytest.mark.parametrize("failing", ["write", "sync", "rename"])
def test_a_write_that_fails_leaves_no_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str) -> None:
    def full(*arguments: object, **keywords: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "part")

    if failing == "write":
        monkeypatch.setattr(pq, "write_table", full)
    elif failing == "sync":
        monkeypatch.setattr(os, "fsync", full)
    else:
        monkeypatch.setattr(Path, "replace", full)
    store = ScoreStore(tmp_path / "scores")

    with pytest.raises(StorageError, match="No space left on device; free some space"):
        store.write(0, PAIRS, score(PAIRS, POLICY), FINGERPRINTS)

    assert list(store.folder.iterdir()) == []
    assert not store.has(0, FINGERPRINTS)


def test_a_failing_write_keeps_the_part_that_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = ScoreStore(tmp_path / "scores")
    store.write(0, PAIRS, score(PAIRS, POLICY), FINGERPRINTS)
    before = store.path(0).read_bytes()
    monkeypatch.setattr(os, "fsync", lambda handle: (_ for _ in ()).throw(OSError(errno.EDQUOT, "quota")))

    with pytest.raises(StorageError, match="quota"):
        store.write(0, PAIRS[:1], score(PAIRS[:1], POLICY), FINGERPRINTS)

    assert store.path(0).read_bytes() == before


def changed(role: str, key: str, value: str = "other") -> dict[str, Fingerprint]:
    return {**FINGERPRINTS, role: {**FINGERPRINTS[role], key: value}}


def test_the_same_fingerprints_take_the_part_again(tmp_path: Path) -> None:
    store = ScoreStore(tmp_path / "run" / "scores")
    assert not store.has(0, FINGERPRINTS)
    store.write(0, PAIRS, score(PAIRS, POLICY), FINGERPRINTS)

    assert store.has(0, FINGERPRINTS)
    assert not store.has(1, FINGERPRINTS)


@pytest.mark.parametrize("role", [POLICY, REFERENCE])
@pytest.mark.parametrize("key", ["token ids", "weights and graph", "engine", "precision", "layout"])
def test_another_fingerprint_is_refused_by_name(tmp_path: Path, role: str, key: str) -> None:
    store = ScoreStore(tmp_path / "run" / "scores")
    store.write(0, PAIRS, score(PAIRS, POLICY), FINGERPRINTS)

    with pytest.raises(OutputExistsError) as caught:
        store.has(0, changed(role, key))

    assert str(caught.value) == (
        f"{tmp_path / 'run'}: holds an unfinished run whose {role} scores differ in {key}; name another folder, "
        "or say --overwrite"
    )


def test_a_role_more_or_less_is_refused(tmp_path: Path) -> None:
    store = ScoreStore(tmp_path / "run" / "scores")
    policy_alone = {POLICY: FINGERPRINTS[POLICY]}
    store.write(0, PAIRS, score(PAIRS, POLICY), policy_alone)
    with pytest.raises(OutputExistsError, match="reference scores differ"):
        store.has(0, FINGERPRINTS)

    store.write(0, PAIRS, score(PAIRS, POLICY, REFERENCE), FINGERPRINTS)
    with pytest.raises(OutputExistsError, match="reference scores differ"):
        store.has(0, policy_alone)


def test_hashes_see_every_token_length_and_row() -> None:
    base = make_pair([1, 2], [3], [4], row=5, group="a")
    others = [
        make_pair([1, 9], [3], [4], row=5), make_pair([1, 2], [9], [4], row=5), make_pair([1, 2], [3], [9], row=5),
        make_pair([1], [2, 3], [4], row=5), make_pair([1, 2, 3], [], [4], row=5), make_pair([2, 1], [3], [4], row=5),
    ]  # fmt: skip
    assert len({token_hash([pair]) for pair in [base, *others]}) == 1 + len(others)
    assert token_hash([base, others[0]]) != token_hash([others[0], base])

    changes = ({"row": 6}, {"truncated": True}, {"group": "b"}, {"group": None})
    same_tokens = [replace(base, **change) for change in changes]
    assert {token_hash([pair]) for pair in same_tokens} == {token_hash([base])}
    assert len({row_hash([pair]) for pair in [base, *same_tokens]}) == 1 + len(same_tokens)


@pytest.mark.parametrize("content", [b"", b"no parquet", b"PAR1" * 10])
def test_a_part_that_is_none_is_refused_and_says_what_to_do(tmp_path: Path, content: bytes) -> None:
    store = ScoreStore(tmp_path / "scores")
    store.folder.mkdir()
    store.path(0).write_bytes(content)

    for read in (lambda: store.has(0, FINGERPRINTS), lambda: store.read(1)):
        with pytest.raises(StorageError) as caught:
            read()
        assert str(caught.value).startswith(f"{store.path(0)}: cannot be read")
        assert "remove it" in str(caught.value)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("metadata", [None, b"[1]", b"{", b"3", b"\xff"])
def test_a_parquet_file_of_others_is_refused(tmp_path: Path, metadata: bytes | None) -> None:
    import pyarrow as pa

    store = ScoreStore(tmp_path / "scores")
    store.folder.mkdir()
    table = pa.table({"row": [1]}).replace_schema_metadata(None if metadata is None else {METADATA_KEY: metadata})
    pq.write_table(table, store.path(0))

    with pytest.raises(StorageError, match="cannot be read; remove it"):
        store.has(0, FINGERPRINTS)


def test_a_missing_part_is_named(tmp_path: Path) -> None:
    store = ScoreStore(tmp_path / "scores")
    store.write(0, PAIRS, score(PAIRS, POLICY), FINGERPRINTS)

    with pytest.raises(StorageError, match=r"part-00001\.parquet: cannot be read"):
        store.read(2)


def test_a_flipped_byte_of_the_data_is_found(tmp_path: Path) -> None:
    """A flipped bit in a page changes no length, so only the pages' checksums can tell."""
    store = ScoreStore(tmp_path / "scores")
    store.write(0, PAIRS, score(PAIRS, POLICY), FINGERPRINTS)
    whole = store.path(0).read_bytes()
    chunk = pq.read_metadata(store.path(0)).row_group(0)
    log_probs = next(
        chunk.column(index)
        for index in range(chunk.num_columns)
        if chunk.column(index).path_in_schema.startswith("policy_chosen_log_probs")
    )
    last = log_probs.data_page_offset + log_probs.total_compressed_size - 1
    # The last byte: before the data stands the page's own header.
    store.path(0).write_bytes(whole[:last] + bytes([whole[last] ^ 0x10]) + whole[last + 1 :])

    with pytest.raises(StorageError, match=r"part-00000\.parquet: cannot be read"):
        store.read(1)


def test_clear_removes_parts_and_their_temporaries_only(tmp_path: Path) -> None:
    store = ScoreStore(tmp_path / "scores")
    store.write(0, PAIRS, score(PAIRS, POLICY), FINGERPRINTS)
    (store.folder / ".part-00001.parquet.4711").write_bytes(b"killed")
    (store.folder / "notes.txt").write_text("mine")

    store.clear()

    assert [path.name for path in store.folder.iterdir()] == ["notes.txt"]


def test_metadata_are_the_fingerprints(tmp_path: Path) -> None:
    store = ScoreStore(tmp_path / "scores")
    store.write(0, PAIRS, score(PAIRS, POLICY), FINGERPRINTS)

    assert json.loads(pq.read_schema(store.path(0)).metadata[METADATA_KEY]) == FINGERPRINTS
