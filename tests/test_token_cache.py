"""Token ids on disk: those that `tokenize` gives, made once, and again if they are not what was written."""

import errno
import json
import os
import pickle
import random
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import datasets
import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset, DatasetDict
from fake_engines import ROWS, write_rows
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from toy_tokenizers import byte_bpe, chat

from dpo_fast import token_cache, token_chunks
from dpo_fast.cache_folder import cache_folder
from dpo_fast.errors import BundleError, CheckpointError, DatasetError, RowError, StorageError
from dpo_fast.preferences import PreferenceSet, load_preferences
from dpo_fast.token_cache import SET, DataSet, TokenCache, TokenSource, find_tokens, of_the_tokenizer
from dpo_fast.tokens import load_tokenizer, tokenize
from dpo_fast.types import SkippedRow, TokenizedPair

CHUNK = 4  # rows
COUNT = 11  # rows: chunks of 4, 4 and 3
HASHES = {"tokenizer.json": "1", "config.json": "2"}
EMPTY = {"prompt": "No words", "chosen": "", "rejected": " none", "kind": "sea"}
LONG = {"prompt": "The rain in Spain " * 20, "chosen": " a", "rejected": " b", "kind": "sky"}

# A set opened with some options; all are closed when the test ends.
Open = Callable[..., TokenCache]


@pytest.fixture(autouse=True)
def small_chunks(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(token_cache, "ROWS_PER_CHUNK", CHUNK)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("library"))


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    byte_bpe().save_pretrained(folder)
    return folder


@pytest.fixture
def open_set(tokenizer_folder: Path) -> Iterator[Open]:
    opened: list[TokenCache] = []

    def open_one(dataset: str, *, folder: Path = tokenizer_folder, **options: Any) -> TokenCache:
        hashes = options.pop("hashes", HASHES)
        options = {"max_length": 64, "vocabulary": 500, **options}
        opened.append(TokenCache(find_tokens(dataset, folder, hashes, **options)))
        return opened[-1]

    yield open_one
    for cache in opened:
        cache.close()


def records(*bad: tuple[int, dict[str, Any]]) -> list[dict[str, Any]]:
    """Eleven rows, some of them put in the place of those of a number."""
    rows = [dict(ROWS[index % len(ROWS)]) for index in range(COUNT)]
    for index, row in enumerate(rows):
        row["prompt"] = f"{index}: {row['prompt']}"
    for number, row in bad:
        rows[number - 1] = row
    return rows


@pytest.fixture
def dataset(tmp_path: Path) -> str:
    return write_rows(tmp_path / "rows.jsonl", records())


@pytest.fixture
def with_bad_rows(tmp_path: Path) -> str:
    """Rows 2 and 7 cannot be used: the one has no words, the other no room for any."""
    return write_rows(tmp_path / "bad.jsonl", records((2, EMPTY), (7, LONG)))


def told(dataset: str, folder: Path, *, max_length: int = 64, **options: Any) -> list[TokenizedPair | SkippedRow]:
    """What `tokenize` says of each row."""
    rows = load_preferences(dataset, **options).rows(on_error="skip")
    return list(tokenize(rows, load_tokenizer(folder), max_length=max_length, on_error="skip"))


def read(cache: TokenCache, start: int = 0, stop: int | None = None) -> list[TokenizedPair | SkippedRow]:
    """The same, from the cache."""
    table, skipped = cache.read(start, cache.rows if stop is None else stop)
    return sorted([*table.pairs(), *skipped], key=lambda item: item.row)


def chunks() -> dict[str, bytes]:
    """The files of all chunks by their names."""
    return {path.name: path.read_bytes() for path in sorted(cache_folder().glob("tokens/*/*.arrow"))}


def keys() -> set[str]:
    return {path.name for path in (cache_folder() / "tokens").iterdir()}


def nothing_is_opened(monkeypatch: pytest.MonkeyPatch) -> None:
    """From here on neither the data set nor the tokenizer can be."""

    def refuse(*arguments: object, **options: object) -> None:
        raise AssertionError("it was opened")

    for function in ("load_preferences", "open_parquet", "of_row_groups"):
        monkeypatch.setattr(token_cache, function, refuse)
    monkeypatch.setattr(token_cache, "load_tokenizer", refuse)


# What is read.


def test_any_rows_are_what_tokenize_says(open_set: Open, dataset: str, tokenizer_folder: Path) -> None:
    whole = told(dataset, tokenizer_folder)
    cache = open_set(dataset)

    assert len(whole) == cache.rows == COUNT
    for start in range(COUNT):
        for stop in range(start + 1, COUNT + 1):
            assert read(cache, start, stop) == whole[start:stop]


def test_skipped_rows_groups_and_truncation_are_kept(
    open_set: Open, with_bad_rows: str, tokenizer_folder: Path
) -> None:
    whole = told(with_bad_rows, tokenizer_folder, max_length=15, group_by="kind")
    assert any(isinstance(item, TokenizedPair) and item.truncated for item in whole)
    assert [item.row for item in whole if isinstance(item, SkippedRow)] == [2, 7]

    for _ in ("made", "read"):
        cache = open_set(with_bad_rows, max_length=15, group_by="kind", on_error="skip")
        assert read(cache) == whole
        for start in range(COUNT):
            assert read(cache, start, start + 1) == whole[start : start + 1]


def test_a_chunk_of_which_no_row_can_be_used(open_set: Open, tmp_path: Path, tokenizer_folder: Path) -> None:
    dataset = write_rows(tmp_path / "bad.jsonl", records(*((row, EMPTY) for row in range(5, 9))))
    whole = told(dataset, tokenizer_folder)

    for _ in ("made", "read"):
        cache = open_set(dataset, on_error="skip")
        table, skipped = cache.read(4, 8)
        assert len(table) == 0
        assert [row.row for row in skipped] == [5, 6, 7, 8]
        assert read(cache, 3, 9) == whole[3:9]


def test_conversations(open_set: Open, tmp_path: Path) -> None:
    folder = tmp_path / "chat"
    chat().save_pretrained(folder)
    rows = [
        {
            "prompt": [{"role": "user", "content": f"{number} or {number + 1}?"}],
            "chosen": [{"role": "assistant", "content": f"{number}"}],
            "rejected": [{"role": "assistant", "content": f"not {number}"}],
        }
        for number in range(6)
    ]
    dataset = write_rows(tmp_path / "chat.jsonl", rows)

    cache = open_set(dataset, folder=folder)

    assert read(cache) == told(dataset, folder)
    assert read(cache, 3, 5) == told(dataset, folder)[3:5]


def test_a_row_of_another_kind_is_found_in_a_later_chunk(
    open_set: Open, tmp_path: Path, tokenizer_folder: Path
) -> None:
    """A chunk is made for itself, but what kind the rows are of is for the whole set to say."""
    message = [{"role": "user", "content": "hi"}]
    other = {"prompt": message, "chosen": message, "rejected": message, "kind": "sea"}
    dataset = write_rows(tmp_path / "mixed.jsonl", records((1, EMPTY), (9, other), (10, other)))

    found = read(open_set(dataset, on_error="skip"), 8, 11)

    assert found == told(dataset, tokenizer_folder)[8:]
    assert [isinstance(item, SkippedRow) for item in found] == [True, True, False]
    assert isinstance(found[0], SkippedRow)
    assert "messages, where the rows before are text" in found[0].reason


def test_what_the_set_is(open_set: Open, dataset: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made = open_set(dataset).data
    nothing_is_opened(monkeypatch)

    assert made == DataSet(dataset, None, load_preferences(dataset).fingerprint, COUNT)
    assert open_set(dataset).data == made
    assert open_set(dataset, limit=3).data.rows == COUNT
    assert [open_set(dataset, limit=limit).rows for limit in (3, 99)] == [3, COUNT]


def test_what_was_read_outlives_its_file(open_set: Open, dataset: str, tokenizer_folder: Path) -> None:
    """Mapped into memory, it must not change or go when another process clears the cache."""
    table, _ = open_set(dataset).read(0, COUNT)
    shutil.rmtree(cache_folder())

    assert list(table.pairs()) == told(dataset, tokenizer_folder)


# What is made, and when.


def test_what_was_tokenised_is_not_even_opened(
    open_set: Open, dataset: str, tokenizer_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = told(dataset, tokenizer_folder)
    open_set(dataset).read(0, COUNT)
    before = chunks()
    nothing_is_opened(monkeypatch)

    for options in ({}, {"limit": 5}, {"on_error": "skip"}):
        cache = open_set(dataset, **options)
        cache.make_ahead(0, cache.rows)
        assert read(cache) == whole[: cache.rows]
        cache.check()
    assert chunks() == before


def test_only_what_is_wanted_is_made(open_set: Open, dataset: str) -> None:
    """A shard's rows; what another one reads is its own affair."""
    cache = open_set(dataset)
    cache.make_ahead(5, 7)
    read(cache, 5, 7)
    cache.close()

    assert [name.split("-")[:3] for name in chunks()] == [["00001", "4", "0"]]


def test_a_limit_then_none(open_set: Open, dataset: str, tokenizer_folder: Path) -> None:
    whole = told(dataset, tokenizer_folder)
    assert read(open_set(dataset, limit=6)) == whole[:6]
    first, cut = chunks()
    assert cut.startswith("00001-2-")
    made = {path: path.stat().st_mtime_ns for path in cache_folder().glob(f"tokens/*/{first}")}

    assert read(open_set(dataset)) == whole

    names = list(chunks())
    assert [name.split("-")[:2] for name in names] == [["00000", "4"], ["00001", "4"], ["00002", "3"]]
    assert {path: path.stat().st_mtime_ns for path in made} == made  # a whole chunk is not made again
    assert read(open_set(dataset, limit=6)) == whole[:6]
    assert read(open_set(dataset, limit=5)) == whole[:5]
    assert list(chunks()) == names


def test_chunks_are_made_in_order_ahead_of_who_reads_them(
    open_set: Open, dataset: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = open_set(dataset)
    cache.make_ahead(0, COUNT)
    wait_until(lambda: len(chunks()) == 3)
    nothing_is_opened(monkeypatch)

    assert len(read(cache)) == COUNT


def test_waiting_for_the_sources(open_set: Open, dataset: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where all is in the cache, there is nothing to wait for."""
    made = open_set(dataset)
    made.make_ahead(0, COUNT)
    made.wait_until_open()
    read(made)
    nothing_is_opened(monkeypatch)

    cached = open_set(dataset)
    cached.make_ahead(0, COUNT)
    cached.wait_until_open()


def test_a_tokenizer_that_does_not_load(open_set: Open, dataset: str, tmp_path: Path) -> None:
    cache = open_set(dataset, folder=tmp_path / "nowhere")
    cache.make_ahead(0, COUNT)

    for wanted in (cache.wait_until_open, lambda: cache.read(0, COUNT), cache.check):
        with pytest.raises(CheckpointError, match=r"nowhere'?: no such folder"):
            wanted()
    assert chunks() == {}


def wait_until(is_so: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while not is_so():
        assert time.monotonic() < end, "it never was"
        time.sleep(0.01)


@pytest.mark.parametrize(
    "options",
    [
        {"max_length": 63},
        {"group_by": "kind"},
        {"hashes": {**HASHES, "tokenizer.json": "other"}},
        {"hashes": {**HASHES, "added_tokens.json": "1"}},
        {"hashes": {"tokenizer.json": "1"}},
        {"trust_remote_code": True},  # another class may then tokenise
    ],
    ids=repr,
)
def test_what_tokens_depend_on_is_in_the_key(open_set: Open, dataset: str, options: dict[str, Any]) -> None:
    open_set(dataset).read(0, COUNT)
    before = keys()

    open_set(dataset, **options).read(0, COUNT)

    assert len(keys() - before) == 1


@pytest.mark.parametrize(
    "options", [{"limit": 3}, {"on_error": "skip"}, {"vocabulary": 499}, {"hashes": dict(reversed(HASHES.items()))}]
)
def test_what_tokens_do_not_depend_on_is_not(open_set: Open, dataset: str, options: dict[str, Any]) -> None:
    open_set(dataset).read(0, COUNT)

    open_set(dataset, **options).read(0, 3)

    assert len(keys()) == 1


def test_a_changed_file_is_another_set(open_set: Open, dataset: str, tokenizer_folder: Path) -> None:
    open_set(dataset).read(0, COUNT)
    state = Path(dataset).stat()
    write_rows(Path(dataset), records((3, {**ROWS[0], "prompt": "2: " + str(ROWS[2]["prompt"])[::-1]})))
    os.utime(dataset, ns=(state.st_atime_ns, state.st_mtime_ns))

    assert read(open_set(dataset)) == told(dataset, tokenizer_folder)
    assert len(keys()) == 2


def test_a_renamed_file_is_the_same_set(open_set: Open, dataset: str, monkeypatch: pytest.MonkeyPatch) -> None:
    open_set(dataset).read(0, COUNT)
    other = Path(dataset).with_name("renamed.jsonl")
    Path(dataset).rename(other)
    nothing_is_opened(monkeypatch)

    cache = open_set(str(other))

    assert len(read(cache)) == COUNT
    assert cache.data.name == str(other)


def test_the_file_s_place_is_not_written_down(open_set: Open, dataset: str) -> None:
    open_set(dataset).read(0, COUNT)

    [path] = cache_folder().glob(f"tokens/*/{SET}")
    assert json.loads(path.read_text())["name"] == "rows.jsonl"


def test_splits_of_a_folder(open_set: Open, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = str(tmp_path / "splits")
    DatasetDict(train=Dataset.from_list(records()[:5]), test=Dataset.from_list(records()[5:])).save_to_disk(folder)
    found = {split: read(open_set(folder, split=split)) for split in ("train", "test", None)}

    assert [len(items) for items in found.values()] == [5, 6, 6]
    assert found[None] == found["test"]
    nothing_is_opened(monkeypatch)
    assert {split: open_set(folder, split=split).data.split for split in found} == {
        "train": "train", "test": "test", None: "test",
    }  # fmt: skip
    assert {split: read(open_set(folder, split=split)) for split in found} == found


def test_a_set_on_the_hub(open_set: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the library knows which version it has, so the set is opened, and once; the tokenizer is not."""
    opened = []

    def load(name: str) -> DatasetDict:
        opened.append(name)
        return DatasetDict(train=Dataset.from_list(records()))

    monkeypatch.setattr(datasets, "load_dataset_builder", lambda name: None)  # some other format than Parquet
    monkeypatch.setattr(datasets, "load_dataset", load)
    first = open_set("owner/name")
    items = read(first)
    assert (first.data.name, first.data.split, opened) == ("owner/name", "train", ["owner/name"])
    monkeypatch.setattr(token_cache, "load_tokenizer", lambda *_, **__: pytest.fail("it was opened"))

    again = open_set("owner/name")

    assert read(again) == items
    assert again.data == first.data
    assert opened == ["owner/name"] * 2


# Rows that cannot be used.


def test_a_bad_row_stops_who_reads_it(open_set: Open, with_bad_rows: str) -> None:
    cache = open_set(with_bad_rows)

    with pytest.raises(RowError, match="row 2: 'chosen' is empty"):
        cache.read(0, COUNT)


def test_a_bad_row_of_a_later_chunk_is_reported_long_before_its_turn(
    open_set: Open, tmp_path: Path, tokenizer_folder: Path
) -> None:
    dataset = write_rows(tmp_path / "bad.jsonl", records((10, EMPTY)))
    cache = open_set(dataset)
    cache.check()
    cache.make_ahead(0, COUNT)

    def is_reported() -> bool:
        try:
            cache.check()
        except RowError as error:
            return error.row == 10
        return False

    wait_until(is_reported)
    assert read(cache, 0, 8) == told(dataset, tokenizer_folder)[:8]  # what was made can be read
    with pytest.raises(RowError, match="row 10"):
        cache.read(8, COUNT)
    with pytest.raises(RowError, match="row 10"):  # and again
        cache.check()


def test_after_a_failure_nothing_more_is_made(open_set: Open, tmp_path: Path) -> None:
    dataset = write_rows(tmp_path / "bad.jsonl", records((1, EMPTY)))
    cache = open_set(dataset)
    cache.make_ahead(0, COUNT)

    with pytest.raises(RowError, match="row 1"):
        cache.read(8, COUNT)

    assert chunks() == {}


@pytest.mark.parametrize("ahead", [True, False])
def test_a_bad_row_stops_from_the_cache_too(open_set: Open, with_bad_rows: str, ahead: bool) -> None:
    read(open_set(with_bad_rows, on_error="skip"))
    cache = open_set(with_bad_rows)

    with pytest.raises(RowError, match="row 2: 'chosen' is empty"):
        (cache.make_ahead if ahead else cache.read)(0, COUNT)


@pytest.mark.parametrize("from_cache", [True, False])
def test_a_bad_row_beyond_the_limit_stops_nobody(
    open_set: Open, with_bad_rows: str, tokenizer_folder: Path, from_cache: bool
) -> None:
    """Row 7 is in the chunk of rows 5 and 6; of row 2 it is the other way round."""
    good = write_rows(Path(with_bad_rows), records((7, LONG)))
    if from_cache:
        read(open_set(good, on_error="skip"))
    cache = open_set(good, limit=6)

    cache.make_ahead(0, 6)

    assert read(cache) == told(good, tokenizer_folder)[:6]
    cache.check()
    with pytest.raises(RowError, match=r"row 7: its prompt has \d+ tokens"):
        open_set(good, limit=7).read(4, 7)


def test_a_bad_row_of_another_shard_stops_nobody(open_set: Open, with_bad_rows: str, tokenizer_folder: Path) -> None:
    cache = open_set(with_bad_rows)
    cache.make_ahead(8, COUNT)

    assert read(cache, 8, COUNT) == told(with_bad_rows, tokenizer_folder)[8:]


def test_an_id_beyond_the_vocabulary_names_its_row(open_set: Open, dataset: str, tokenizer_folder: Path) -> None:
    pairs = [item for item in told(dataset, tokenizer_folder) if isinstance(item, TokenizedPair)]
    largest = {pair.row: max(pair.prompt_ids + pair.chosen_ids + pair.rejected_ids) for pair in pairs}

    for start, stop in [(0, COUNT), (4, 8), (5, 6), (9, COUNT)]:
        id_ = max(largest[row] for row in range(start + 1, stop + 1))
        row = next(row for row in range(start + 1, stop + 1) if largest[row] == id_)
        with pytest.raises(BundleError) as caught:
            open_set(dataset, vocabulary=id_).read(start, stop)
        assert str(caught.value).startswith(
            f"row {row}: the tokenizer gave the id {id_}, and the model's vocabulary ends at {id_ - 1}; "
        )
        open_set(dataset, vocabulary=id_ + 1).read(start, stop)


# Damage.


def only_chunk(number: int = 0) -> Path:
    [path] = cache_folder().glob(f"tokens/*/{number:05}-*.arrow")
    return path


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-20])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def change(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("damage", [cut, empty, change, Path.unlink])
@pytest.mark.parametrize("known", [True, False])
def test_a_damaged_chunk_is_made_again(
    open_set: Open, with_bad_rows: str, tokenizer_folder: Path, damage: Callable[[Path], None], known: bool
) -> None:
    """Whether it was damaged before the set was opened, or since."""
    whole = told(with_bad_rows, tokenizer_folder)
    cache = open_set(with_bad_rows, on_error="skip")
    read(cache)
    sound = chunks()
    damage(only_chunk(1))
    assert chunks() != sound

    assert read(cache if known else open_set(with_bad_rows, on_error="skip")) == whole

    assert chunks() == sound


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(position=st.integers(0, 10**6), bits=st.integers(1, 255))
def test_any_byte_that_changes_is_found(open_set: Open, dataset: str, position: int, bits: int) -> None:
    wanted = read(open_set(dataset), 0, 4)
    sound = chunks()
    path = only_chunk()
    content = bytearray(path.read_bytes())
    content[position % len(content)] ^= bits
    path.write_bytes(content)

    assert read(open_set(dataset), 0, 4) == wanted

    assert chunks() == sound


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(position=st.integers(0, 10**6), bits=st.integers(1, 255))
def test_any_byte_that_changes_of_what_the_set_is_is_found(
    open_set: Open, dataset: str, position: int, bits: int
) -> None:
    """With a digit of the number of rows changed, fewer would be evaluated, and nobody would know."""
    wanted = open_set(dataset).data
    [path] = cache_folder().glob(f"tokens/*/{SET}")
    sound = path.read_bytes()
    content = bytearray(sound)
    content[position % len(content)] ^= bits
    path.write_bytes(content)

    try:
        assert open_set(dataset).data == wanted
    finally:
        path.write_bytes(sound)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"{}", b'{"rows": null}', b"\xff"])
def test_what_the_set_is_is_asked_again_where_that_is_lost(open_set: Open, dataset: str, content: bytes) -> None:
    wanted = open_set(dataset).data
    [path] = cache_folder().glob(f"tokens/*/{SET}")
    sound = path.read_bytes()
    path.write_bytes(content)

    assert open_set(dataset).data == wanted
    assert path.read_bytes() == sound


def test_a_disk_that_does_not_keep_what_is_written(
    open_set: Open, dataset: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = Path.write_bytes
    monkeypatch.setattr(Path, "write_bytes", lambda path, content: write(path, bytes(content)[:-1] + b"?"))

    with pytest.raises(StorageError, match=r"00000-4-0-.*\.arrow: is not what was just written to it"):
        open_set(dataset).read(0, COUNT)


@pytest.mark.parametrize("failing", ["write", "rename", "set", "folder"])
def test_a_disk_that_refuses_names_the_way_to_another(
    open_set: Open, dataset: str, monkeypatch: pytest.MonkeyPatch, own_cache: Path, failing: str
) -> None:
    def full(*arguments: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "file")

    says = r"No space left on device; free some space.* \(DPO_FAST_CACHE names the cache's folder\)$"
    if failing in ("write", "rename"):
        cache = open_set(dataset)
        monkeypatch.setattr(Path, "write_bytes" if failing == "write" else "replace", full)
        cache.make_ahead(0, COUNT)
        with pytest.raises(StorageError, match=says):
            cache.read(0, COUNT)
        with pytest.raises(StorageError, match=says):
            cache.check()
        assert [path.name for path in own_cache.rglob("*") if path.is_file()] == [SET]
    elif failing == "set":
        monkeypatch.setattr(os, "fsync", full)
        with pytest.raises(StorageError, match=says):
            open_set(dataset)
    else:
        (own_cache / "file").write_text("")
        monkeypatch.setenv("DPO_FAST_CACHE", str(own_cache / "file" / "cache"))
        with pytest.raises(StorageError, match=r"file.*Not a directory; .* \(DPO_FAST_CACHE names"):
            open_set(dataset)


# Several at once, and stopping.


def test_two_on_one_folder(open_set: Open, dataset: str, tokenizer_folder: Path) -> None:
    one, other = open_set(dataset), open_set(dataset, limit=6)
    for cache in (one, other):
        cache.make_ahead(0, cache.rows)

    whole = told(dataset, tokenizer_folder)
    assert read(one) == whole
    assert read(other) == whole[:6]
    assert read(one) == read(open_set(dataset)) == whole
    assert not list(cache_folder().rglob(".*"))


@pytest.mark.parametrize("limit", [None, 3])
def test_two_that_write_one_chunk_at_the_same_time(
    open_set: Open, dataset: str, tokenizer_folder: Path, monkeypatch: pytest.MonkeyPatch, limit: int | None
) -> None:
    """In two threads of a process, or in two containers, in which process numbers are the same.

    While the one has written its bytes, but not yet renamed them, the other does it all.
    """
    one, other = open_set(dataset), open_set(dataset, limit=limit)
    rename, first = Path.replace, threading.Lock()
    first.acquire()

    def wait_and_rename(path: Path, target: Path) -> Path:
        if first.locked():
            first.release()
            read(other, 0, 3)
        return rename(path, target)

    monkeypatch.setattr(Path, "replace", wait_and_rename)

    assert read(one, 0, 4) == told(dataset, tokenizer_folder)[:4]
    assert not first.locked()
    assert read(other, 0, 3) == told(dataset, tokenizer_folder)[:3]


def test_close_while_chunks_are_made(
    open_set: Open, dataset: str, tokenizer_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The chunk in the making is finished and kept, and no other is begun."""
    begun, go_on = threading.Event(), threading.Event()

    def slow(*arguments: Any, **options: Any) -> Any:
        begun.set()
        assert go_on.wait(60)
        return tokenize(*arguments, **options)

    monkeypatch.setattr(token_cache, "tokenize", slow)
    cache = open_set(dataset)
    cache.make_ahead(0, COUNT)
    assert begun.wait(60)
    closing = threading.Thread(target=cache.close)
    closing.start()
    time.sleep(0.05)
    assert closing.is_alive()  # it waits
    go_on.set()
    closing.join(60)

    assert not closing.is_alive()
    assert [name.split("-")[0] for name in chunks()] == ["00000"]
    cache.close()  # twice is once
    assert read(open_set(dataset)) == told(dataset, tokenizer_folder)


def test_what_killed_runs_left_is_no_chunk(open_set: Open, dataset: str, tokenizer_folder: Path) -> None:
    read(open_set(dataset))
    path = only_chunk()
    path.rename(path.with_name(f".{path.name}.4711"))

    assert read(open_set(dataset)) == told(dataset, tokenizer_folder)


@pytest.mark.parametrize("name", ["notes.arrow", "a-b-c-d.arrow", "00000-notes.arrow", "00000-9-0-no.arrow", "00000"])
def test_what_others_put_there_is_let_alone(open_set: Open, dataset: str, tokenizer_folder: Path, name: str) -> None:
    open_set(dataset)
    [key] = cache_folder().glob("tokens/*")
    (key / name).write_text("mine")

    for _ in ("made", "read"):
        assert read(open_set(dataset)) == told(dataset, tokenizer_folder)

    assert (key / name).read_text() == "mine"


# Parquet, by row group.


@pytest.fixture
def parquet(tmp_path: Path) -> str:
    """The rows of `with_bad_rows` as two files, in row groups of three rows."""
    rows = records((2, EMPTY), (7, LONG))
    for number, some in enumerate((rows[:5], rows[5:])):
        path = tmp_path / "parquet" / f"{number}.parquet"
        path.parent.mkdir(exist_ok=True)
        pq.write_table(pa.Table.from_pylist(some), path, row_group_size=3)
    return str(tmp_path / "parquet")


def test_row_groups_give_the_ids_of_the_library(
    open_set: Open, parquet: str, with_bad_rows: str, tokenizer_folder: Path
) -> None:
    """Ids, truncation, groups, skipped rows and their reasons: those of the library's own set, and of JSON Lines."""
    library = PreferenceSet("", None, datasets.load_dataset(parquet, split="train"), "", "kind")
    wanted = list(
        tokenize(library.rows(on_error="skip"), load_tokenizer(tokenizer_folder), max_length=15, on_error="skip")
    )
    assert [item.row for item in wanted if isinstance(item, SkippedRow)] == [2, 7]

    for dataset in (parquet, with_bad_rows):
        cache = open_set(dataset, max_length=15, group_by="kind", on_error="skip")
        assert read(cache) == wanted
        assert (cache.source.index is None) is (dataset == with_bad_rows)
    assert open_set(parquet, max_length=15, group_by="kind", on_error="skip").source.index is None  # all is there


def test_a_limit_does_not_say_how_long_the_set_is(open_set: Open, parquet: str) -> None:
    """With a limit, the second file's footer is not read; and without one, later, all rows are there."""
    some = open_set(parquet, limit=1, on_error="skip")
    assert some.source.index is not None
    assert not some.source.index.is_whole
    assert len(read(some)) == 1
    assert not list(cache_folder().glob(f"tokens/*/{SET}"))

    assert len(read(open_set(parquet, on_error="skip"))) == COUNT
    assert len(keys()) == 1
    assert open_set(parquet, limit=1, on_error="skip").data.rows == COUNT


def test_a_url_is_tokenised_anew_when_it_changes(open_set: Open, parquet: str) -> None:
    system = fsspec.filesystem("memory")
    system.pipe("/token-cache/a.parquet", Path(parquet, "0.parquet").read_bytes())
    first = read(open_set("memory://token-cache", on_error="skip"))
    system.pipe("/token-cache/a.parquet", Path(parquet, "1.parquet").read_bytes())

    second = read(open_set("memory://token-cache", on_error="skip"))

    assert (len(first), len(second), len(keys())) == (5, 6, 2)
    system.store.clear()


# Workers.


@pytest.fixture
def find(tokenizer_folder: Path) -> Callable[..., TokenSource]:
    def find_one(dataset: str, **options: Any) -> TokenSource:
        options = {"max_length": 64, "vocabulary": 500, **options}
        return find_tokens(dataset, tokenizer_folder, HASHES, **options)

    return find_one


def sent(source: TokenSource) -> TokenSource:
    """The source as a worker gets it."""
    arrived = pickle.loads(pickle.dumps(source))
    assert arrived == source
    assert arrived.opened is None
    return arrived


@pytest.mark.parametrize("name", ["dataset", "parquet"])
def test_a_worker_makes_what_is_missing(
    find: Callable[..., TokenSource],
    request: pytest.FixtureRequest,
    name: str,
    tokenizer_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    """On a machine with a cache of its own; of Parquet nothing is hashed or resolved there."""
    dataset = request.getfixturevalue(name)
    source = find(dataset, on_error="skip")
    assert find(dataset, on_error="skip").key == source.key
    wanted = told(dataset, tokenizer_folder)
    monkeypatch.setenv("DPO_FAST_CACHE", str(tmp_path / "other machine"))
    if name == "parquet":
        monkeypatch.setattr("dpo_fast.preferences.sha256", lambda path: pytest.fail("it was hashed"))
        monkeypatch.setattr(datasets, "load_dataset_builder", lambda *_: pytest.fail("it was resolved"))

    cache = TokenCache(sent(source))

    assert read(cache, 5, 9) == wanted[5:9]
    assert [file.split("-")[0] for file in chunks()] == ["00001", "00002"]
    assert (source.rows_made(), source.rows_made(4, COUNT), source.rows_made(2, 6)) == (7, 7, 2)
    assert read(cache) == wanted
    assert source.rows_made() == source.rows == COUNT
    cache.close()


@pytest.mark.parametrize("change", ["a row less", "two rows change places"])
def test_a_set_that_has_changed_since_is_refused(find: Callable[..., TokenSource], tmp_path: Path, change: str) -> None:
    """Or a worker's machine has another file under that name: of as many rows, and of as many bytes."""
    rows = records()
    dataset = write_rows(tmp_path / "a.jsonl", rows)
    worker = TokenCache(sent(find(dataset)))
    write_rows(tmp_path / "a.jsonl", rows[:-1] if change == "a row less" else [rows[1], rows[0], *rows[2:]])
    with pytest.raises(DatasetError, match=r"has changed since this run began: start again"):
        worker.read(0, COUNT)
    worker.close()


def test_a_worker_opens_ahead_what_it_will_need_and_nothing_else(
    find: Callable[..., TokenSource], tmp_path: Path, tokenizer_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = write_rows(tmp_path / "a.jsonl", records())
    opened: list[str] = []
    load = token_cache.load_tokenizer
    monkeypatch.setattr(token_cache, "load_tokenizer", lambda *a, **k: (opened.append("one"), load(*a, **k))[1])
    worker = TokenCache(sent(find(dataset)))
    worker.open_ahead()
    worker.wait_until_open()
    assert opened == ["one"]
    assert read(worker) == told(dataset, tokenizer_folder)
    worker.close()
    assert opened == ["one"]

    again = TokenCache(sent(find(dataset)))
    again.open_ahead()
    assert len(read(again)) == len(told(dataset, tokenizer_folder))
    again.close()
    assert opened == ["one"]

    source = sent(find(dataset, max_length=63))
    write_rows(tmp_path / "a.jsonl", records()[:-1])
    changed = TokenCache(source)
    changed.open_ahead()
    with pytest.raises(DatasetError, match=r"has changed since this run began: start again"):
        changed.read(0, COUNT)
    changed.close()


def test_a_bad_row_stops_a_worker_as_it_stops_here(
    find: Callable[..., TokenSource], open_set: Open, parquet: str
) -> None:
    """The same row with the same reason; and a worker's other parts can be made still."""
    cache = open_set(parquet)
    with pytest.raises(RowError) as here:
        cache.read(0, COUNT)
    shutil.rmtree(cache_folder())
    worker = TokenCache(sent(find(parquet)))
    for _ in range(2):
        with pytest.raises(RowError) as there:
            worker.read(0, 4)
        assert (there.value.row, there.value.reason) == (here.value.row, here.value.reason) == (2, here.value.reason)
    assert len(read(worker, 8, COUNT)) == 3
    worker.close()


def test_what_fails_once_can_be_asked_for_again(
    find: Callable[..., TokenSource], dataset: str, tokenizer_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker's disk that is full for a while: the part is tried again, with the same worker."""
    worker, write = TokenCache(sent(find(dataset))), Path.write_bytes

    def full(*arguments: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "file")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(StorageError, match="No space left"):
        worker.read(0, COUNT)
    monkeypatch.setattr(Path, "write_bytes", write)

    assert read(worker) == told(dataset, tokenizer_folder)
    worker.close()


def test_ranges_in_any_order_from_threads(
    find: Callable[..., TokenSource], parquet: str, tokenizer_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each chunk is made once, whoever asks first."""
    made: list[str] = []
    write = token_cache.write_chunk
    monkeypatch.setattr(token_cache, "write_chunk", lambda *arguments: (made.append("one"), write(*arguments))[1])
    worker, whole = TokenCache(sent(find(parquet, on_error="skip"))), told(parquet, tokenizer_folder)
    draw = random.Random(2)
    spans = [sorted(draw.sample(range(COUNT + 1), 2)) for _ in range(200)]

    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda span: read(worker, *span), spans))

    assert found == [whole[start:stop] for start, stop in spans]
    assert len(made) == 3
    worker.close()


WORKER = """
import pickle, random, sys
from dpo_fast import token_cache, token_chunks
from dpo_fast.token_cache import TokenCache
token_cache.ROWS_PER_CHUNK = 4
source = pickle.load(open(sys.argv[1], "rb"))
cache = TokenCache(source)
starts = list(range(0, source.rows, 4))
random.Random(int(sys.argv[2])).shuffle(starts)
print("ready", flush=True)
sys.stdin.read(1)
for start in starts:
    cache.read(start, min(start + 4, source.rows))
cache.close()
"""


@pytest.mark.slow
@pytest.mark.parametrize("name", ["dataset", "parquet"])
def test_two_processes_make_one_cache(
    find: Callable[..., TokenSource],
    open_set: Open,
    request: pytest.FixtureRequest,
    name: str,
    tokenizer_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """At the same time, in different orders: what both leave is sound and whole."""
    dataset = request.getfixturevalue(name)
    wanted = told(dataset, tokenizer_folder)
    (tmp_path / "source").write_bytes(pickle.dumps(find(dataset, on_error="skip")))
    environment = {**os.environ, "HF_DATASETS_CACHE": str(tmp_path / "library")}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", WORKER, str(tmp_path / "source"), str(number)],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        for number in range(2)
    ]
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
    for process in processes:
        process.communicate(b"\n", timeout=120)
        assert process.returncode == 0

    assert [file.split("-")[:2] for file in chunks()] == [["00000", "4"], ["00001", "4"], ["00002", "3"]]
    assert not list(cache_folder().rglob(".*"))
    nothing_is_opened(monkeypatch)
    assert read(open_set(dataset, on_error="skip")) == wanted


def test_what_another_process_has_made_is_found(
    find: Callable[..., TokenSource], dataset: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Though it was not there when this one was opened."""
    source = find(dataset)
    late, early = TokenCache(sent(source)), TokenCache(sent(source))
    items = read(early)
    monkeypatch.setattr(TokenSource, "open_tokenizer", lambda source: pytest.fail("it was opened"))

    assert read(late) == items
    for cache in (late, early):
        cache.close()


def test_a_chunk_that_a_larger_one_replaces_while_it_is_read(
    find: Callable[..., TokenSource], dataset: str, tokenizer_folder: Path
) -> None:
    small = TokenCache(sent(find(dataset, limit=6)))
    assert len(read(small)) == 6
    large = TokenCache(sent(find(dataset)))
    read(large)
    assert [name.split("-")[1] for name in chunks()] == ["4", "4", "3"]

    assert read(small) == told(dataset, tokenizer_folder)[:6]
    for cache in (small, large):
        cache.close()


def test_other_bytes_of_as_many_rows_are_let_alone(
    find: Callable[..., TokenSource], dataset: str, tokenizer_folder: Path
) -> None:
    """Two machines whose PyArrow writes other bytes must not remove each other's chunks; an unsound one goes."""
    worker = TokenCache(sent(find(dataset)))
    table, _ = worker.read(0, CHUNK)
    path = only_chunk()
    twin = path.with_name(path.name[:-14] + "00000000.arrow")
    twin.write_bytes(b"another machine's")

    token_chunks.write_chunk(path.parent, 0, CHUNK, table, [])
    assert path.exists()
    assert twin.exists()

    again = TokenCache(worker.source)
    assert read(again) == told(dataset, tokenizer_folder)
    assert only_chunk() == path
    for cache in (worker, again):
        cache.close()


# The cache's folder, and the tokenizer's files.


def test_where_the_cache_lies(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("DPO_FAST_CACHE", str(tmp_path / "own"))
    assert cache_folder() == tmp_path / "own"
    monkeypatch.setenv("DPO_FAST_CACHE", "")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder() == tmp_path / "xdg" / "dpo_fast"
    monkeypatch.delenv("DPO_FAST_CACHE")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert cache_folder() == tmp_path / "home" / ".cache" / "dpo_fast"


def test_every_file_that_a_tokenizer_writes_is_its_own(tmp_path: Path) -> None:
    chat().save_pretrained(tmp_path)
    names = {path.name for path in tmp_path.iterdir()}

    assert {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"} <= names
    assert all(of_the_tokenizer(name) for name in names | {"config.json", "vocab.json", "merges.txt", "own_code.py"})
    assert not any(
        of_the_tokenizer(name)
        for name in ("model.safetensors", "model-00001-of-00002.safetensors", "model.safetensors.index.json",
                     "adapter_model.safetensors", "README.md", "generation_config.json")
    )  # fmt: skip
