"""Reference scores are found for just what they depend on, exactly as they were, and in no other case."""

import errno
import os
import threading
from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
from fake_engines import FakeEngine, make_pair, pairs_alike
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dpo_fast.bundle import POLICY, REFERENCE
from dpo_fast.errors import StorageError, UsageError
from dpo_fast.reference_scores import ReferenceCache, ScoresOfRun
from dpo_fast.scores import ScoredPairs, score_pairs
from dpo_fast.store import CHECKSUMS, PAIRS, Fingerprint, PartRecord, ScoreStore
from dpo_fast.token_table import make_table
from dpo_fast.types import TokenizedPair

TOKEN_IDS = "the hash of some token ids"
MODEL: Fingerprint = {
    "weights and graph": "weights+graph", "engine": "fake 1.0", "precision": "fp32", "layout": "shared",
}  # fmt: skip
THREE = [
    make_pair([1, 2], [3], [4, 5, 6], row=2),
    make_pair([], [7, 8], [9], row=3),  # a completion without a scored token
    make_pair([1, 2], [3], [5], row=7),
]


def score(pairs: Sequence[TokenizedPair] = THREE, role: str = REFERENCE) -> ScoredPairs:
    return score_pairs(make_table(pairs), FakeEngine(role), layout="shared", token_budget=100)


def assert_same(found: ScoredPairs | None, wanted: ScoredPairs) -> None:
    """To the bit; but that they were computed elsewhere."""
    assert found is not None
    assert (found.tokens, found.padding) == (0, 0)
    for mine, theirs in ((found.chosen, wanted.chosen), (found.rejected, wanted.rejected)):
        for field in fields(theirs):
            one, other = getattr(mine, field.name), getattr(theirs, field.name)
            assert one.dtype == other.dtype, field.name
            np.testing.assert_array_equal(one, other)


# The cache.


@settings(max_examples=20)
@given(st.one_of(pairs_alike(), st.just([])))
def test_what_was_kept_is_found(tmp_path_factory: pytest.TempPathFactory, pairs: list[TokenizedPair]) -> None:
    folder = tmp_path_factory.mktemp("cache")
    ReferenceCache(folder).keep(TOKEN_IDS, MODEL, score(pairs))

    assert_same(ReferenceCache(folder).find(0, TOKEN_IDS, MODEL), score(pairs))


def test_whatever_part_it_is(tmp_path: Path) -> None:
    """Of runs that part the rows otherwise, or of shards, only the pairs are the same."""
    cache = ReferenceCache(tmp_path)
    cache.keep(TOKEN_IDS, MODEL, score())

    assert_same(cache.find(17, TOKEN_IDS, MODEL), score())


@pytest.mark.parametrize("name", MODEL)
def test_scores_of_another_model_are_not_found(tmp_path: Path, name: str) -> None:
    cache = ReferenceCache(tmp_path)
    cache.keep(TOKEN_IDS, MODEL, score())

    assert cache.find(0, TOKEN_IDS, {**MODEL, name: "other"}) is None
    assert cache.find(0, TOKEN_IDS, {**MODEL, "more": "than then"}) is None
    assert_same(cache.find(0, TOKEN_IDS, dict(reversed(MODEL.items()))), score())


def test_scores_of_other_tokens_are_not_found(tmp_path: Path) -> None:
    cache = ReferenceCache(tmp_path)
    cache.keep(TOKEN_IDS, MODEL, score())
    cache.keep("others", MODEL, score(THREE[:1]))

    assert cache.find(0, "neither", MODEL) is None
    assert_same(cache.find(0, "others", MODEL), score(THREE[:1]))
    assert_same(cache.find(0, TOKEN_IDS, MODEL), score())


def test_which_models_are_known(tmp_path: Path) -> None:
    cache = ReferenceCache(tmp_path)
    assert not cache.knows("weights+graph")
    cache.keep(TOKEN_IDS, MODEL, score())

    assert cache.knows("weights+graph")
    assert not cache.knows("weights")
    assert not cache.knows("")


def test_it_lies_in_the_cache_s_folder(own_cache: Path) -> None:
    ReferenceCache().keep(TOKEN_IDS, MODEL, score())

    [path] = own_cache.rglob("*.parquet")
    assert path.is_relative_to(own_cache / "reference_scores")
    assert_same(ReferenceCache().find(0, TOKEN_IDS, MODEL), score())


def only_file(folder: Path) -> Path:
    [path] = (path for path in folder.rglob("*") if path.is_file())
    return path


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-20])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def replace_by_a_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize("damage", [cut, empty, Path.unlink])
def test_what_is_damaged_is_not_found_until_it_is_kept_again(tmp_path: Path, damage: Callable[[Path], None]) -> None:
    cache = ReferenceCache(tmp_path)
    cache.keep(TOKEN_IDS, MODEL, score())
    damage(only_file(tmp_path))
    assert cache.find(0, TOKEN_IDS, MODEL) is None

    cache.keep(TOKEN_IDS, MODEL, score())

    assert_same(cache.find(0, TOKEN_IDS, MODEL), score())


def test_what_cannot_be_read_is_not_found(tmp_path: Path) -> None:
    cache = ReferenceCache(tmp_path)
    cache.keep(TOKEN_IDS, MODEL, score())
    replace_by_a_folder(only_file(tmp_path))

    assert cache.find(0, TOKEN_IDS, MODEL) is None


@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(position=st.integers(0, 10**6), bits=st.integers(1, 255))
def test_any_byte_that_changes_is_found(tmp_path: Path, position: int, bits: int) -> None:
    cache = ReferenceCache(tmp_path)
    cache.keep(TOKEN_IDS, MODEL, score())
    path = only_file(tmp_path)
    content = bytearray(path.read_bytes())
    content[position % len(content)] ^= bits
    path.write_bytes(content)

    assert cache.find(0, TOKEN_IDS, MODEL) is None


def test_remains_of_a_killed_run_are_not_found(tmp_path: Path) -> None:
    cache = ReferenceCache(tmp_path)
    cache.keep(TOKEN_IDS, MODEL, score())
    path = only_file(tmp_path)
    path.rename(path.with_name(f".{path.name}.4711"))

    assert cache.find(0, TOKEN_IDS, MODEL) is None


def test_two_that_keep_the_same_at_the_same_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In two threads of a process, or in two containers, in which process numbers are the same."""
    rename, first = Path.replace, threading.Lock()
    first.acquire()

    def wait_and_rename(path: Path, target: Path) -> Path:
        if first.locked():
            first.release()
            ReferenceCache(tmp_path).keep(TOKEN_IDS, MODEL, score())
        return rename(path, target)

    monkeypatch.setattr(Path, "replace", wait_and_rename)

    ReferenceCache(tmp_path).keep(TOKEN_IDS, MODEL, score())

    assert_same(ReferenceCache(tmp_path).find(0, TOKEN_IDS, MODEL), score())
    assert only_file(tmp_path).suffix == ".parquet"


@pytest.mark.parametrize("failing", ["write_bytes", "replace"])
def test_a_full_disk_names_the_way_to_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str) -> None:
    def full(*arguments: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "file")

    monkeypatch.setattr(Path, failing, full)

    with pytest.raises(StorageError, match=r"No space left.*free some space.* \(DPO_FAST_CACHE names the cache's"):
        ReferenceCache(tmp_path).keep(TOKEN_IDS, MODEL, score())

    assert not [path for path in tmp_path.rglob("*") if path.is_file()]
    assert ReferenceCache(tmp_path).find(0, TOKEN_IDS, MODEL) is None


# A run that is named.


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run of two parts."""
    store = ScoreStore(tmp_path / "first" / "scores")
    for part in (0, 1):
        fingerprints = {PAIRS: {"token ids": f"ids {part}"}, POLICY: MODEL, REFERENCE: MODEL}
        record = PartRecord(fingerprints, (2 * part, 2 * part + 2), tokens=10, padding=0, token_budget=100)
        pairs = THREE[part : part + 2]
        scores = {POLICY: score(pairs, POLICY), REFERENCE: score(pairs)}
        store.write(part, make_table(pairs), scores, record)
    store.finish()
    return tmp_path / "first"


def test_a_run_s_reference_scores(run: Path) -> None:
    known = ScoresOfRun(run)

    assert_same(known.find(0, "ids 0", MODEL), score(THREE[:2]))
    assert_same(known.find(1, "ids 1", MODEL), score(THREE[1:]))
    assert known.knows("whatever")


def refusal(run: Path, part: int = 0, token_ids: str = "ids 0", model: Fingerprint = MODEL) -> str:
    """The message, on one line, that names the run and the part."""
    with pytest.raises(UsageError) as caught:
        ScoresOfRun(run).find(part, token_ids, model)
    message = str(caught.value)
    assert message.startswith(f"--reference-scores {run}: ")
    assert f"part {part}" in message
    assert "\n" not in message
    return message


@pytest.mark.parametrize("name", MODEL)
def test_what_differs_is_named(run: Path, name: str) -> None:
    message = refusal(run, model={**MODEL, name: "other"})

    assert f"its reference scores differ in {name} (part 0); name a run of the same reference" in message


def test_other_token_ids_are_refused(run: Path) -> None:
    assert "differ in token ids (part 1)" in refusal(run, 1)
    assert "differ in engine, token ids (part 0)" in refusal(run, 0, "others", {**MODEL, "engine": "other"})


def test_a_part_that_the_run_has_not_is_refused(run: Path) -> None:
    assert "has no sound part 2: it was made from fewer rows, or is damaged" in refusal(run, 2)


@pytest.mark.parametrize("damage", [cut, empty, Path.unlink])
@pytest.mark.parametrize("name", ["part-00001.parquet", CHECKSUMS])
def test_a_damaged_part_of_the_run_is_refused(run: Path, damage: Callable[[Path], None], name: str) -> None:
    damage(run / "scores" / name)

    assert "has no sound part 1" in refusal(run, 1, "ids 1")


def test_a_run_without_a_reference_is_refused(tmp_path: Path) -> None:
    store = ScoreStore(tmp_path / "free" / "scores")
    record = PartRecord({PAIRS: {"token ids": "ids 0"}, POLICY: MODEL}, (0, 3), 10, 0, 100)
    store.write(0, make_table(THREE), {POLICY: score(role=POLICY)}, record)

    assert "its reference scores differ in" in refusal(tmp_path / "free")
    # Nor is its word taken for it.
    store.write(0, make_table(THREE), {POLICY: score(role=POLICY)}, replace(record, fingerprints={
        PAIRS: {"token ids": "ids 0"}, POLICY: MODEL, REFERENCE: MODEL}))  # fmt: skip
    assert "has no reference scores in part 0" in refusal(tmp_path / "free")


@pytest.mark.parametrize("name", ["nowhere", "empty"])
def test_a_folder_without_scores_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "empty" / "scores").mkdir(parents=True)

    with pytest.raises(UsageError, match=f"--reference-scores .*{name}: holds no scores; name a folder that"):
        ScoresOfRun(tmp_path / name)


def test_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")

    with pytest.raises(StorageError, match=r"file/scores: Not a directory; .* name another folder"):
        ScoresOfRun(tmp_path / "file")
