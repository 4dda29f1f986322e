"""Parquet where it lies: the rows that `load_dataset` gives, and no more read than was asked for."""

import io
import os
import pickle
import random
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import chain, pairwise
from pathlib import Path
from typing import Any, ClassVar

import datasets
import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import load_dataset
from fsspec.implementations.memory import MemoryFile, MemoryFileSystem
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from loopback_hub import CUT, LoopbackHub, hub_of_this_process

import dpo_fast.remote
import dpo_fast.row_groups
from dpo_fast.errors import DatasetError, DpoFastError, MissingDependencyError, UsageError
from dpo_fast.preferences import PreferenceSet, load_preferences, of_row_groups
from dpo_fast.remote import ATTEMPTS, FIRST_WAIT
from dpo_fast.row_groups import BUFFER, RowGroups, read_index
from dpo_fast.types import PreferenceRow, SkippedRow

COLUMNS = ["prompt", "chosen", "rejected"]


@pytest.fixture(autouse=True)
def library_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("library"))
    datasets.disable_progress_bars()


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """What would have been waited before something is tried again, in seconds."""
    waited: list[float] = []
    monkeypatch.setattr(dpo_fast.remote.time, "sleep", waited.append)
    return waited


@pytest.fixture
def nothing_is_prepared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: pytest.fail("it was converted"))


def rows(start: int, stop: int) -> list[dict[str, Any]]:
    return [
        {"prompt": f"{number}?", "chosen": f" yes {number}", "rejected": f" no {number}", "kind": f"k{number % 3}"}
        for number in range(start, stop)
    ]


def parquet(records: list[dict[str, Any]] | pa.Table, **options: Any) -> bytes:
    table = records if isinstance(records, pa.Table) else pa.Table.from_pylist(records)
    sink = io.BytesIO()
    pq.write_table(table, sink, **options)
    return sink.getvalue()


def write(path: Path, content: bytes) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return str(path)


def prompts(data: PreferenceSet, start: int = 0, stop: int | None = None) -> list[Any]:
    return [row.prompt for row in data.rows(start=start, stop=stop) if isinstance(row, PreferenceRow)]


def one_line(error: pytest.ExceptionInfo[Any]) -> str:
    message = str(error.value)
    assert isinstance(error.value, DpoFastError)
    assert message.isprintable(), repr(message)
    assert len(message) < 1000
    return message


# The same rows as the library's.

TEXT = st.one_of(st.none(), st.text(alphabet="ab é\n\0", max_size=5))
TEXT_TYPES = st.sampled_from([pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string())])
MESSAGE_FIELDS = st.sampled_from([["role", "content"], ["content", "role"], ["role"], ["role", "content", "name"]])


@st.composite
def columns_of_a_file(draw: st.DrawFn, conversations: bool, count: int) -> pa.Table:
    """A file of some set: its columns in some order and of some types, some of them missing."""
    columns = {}
    for name in draw(st.permutations([*COLUMNS, "kind", "tools"])):
        if name == "kind":
            type_ = draw(st.sampled_from([pa.int64(), pa.int8(), pa.string(), pa.null()]))
            values: list[Any] = [None if pa.types.is_null(type_) else number for number in range(count)]
            columns[name] = pa.array(values if type_ != pa.string() else list(map(str, values)), type_)
        elif not conversations or name == "tools":
            columns[name] = pa.array(draw(st.lists(TEXT, min_size=count, max_size=count))).cast(draw(TEXT_TYPES))
        else:
            fields = draw(MESSAGE_FIELDS)
            message = st.one_of(st.none(), st.fixed_dictionaries(dict.fromkeys(fields, TEXT)))
            of_row = st.one_of(st.none(), st.lists(message, max_size=3))
            make = draw(st.sampled_from([pa.list_, pa.large_list]))
            type_ = make(pa.struct([(field, pa.string()) for field in fields]))
            columns[name] = pa.array(draw(st.lists(of_row, min_size=count, max_size=count)), type_)
    left_out = draw(st.sampled_from([*[()] * 5, ("tools",), ("chosen", "kind"), ("prompt", "chosen", "rejected")]))
    return pa.table({name: column for name, column in columns.items() if name not in left_out})


@st.composite
def sets_of_files(draw: st.DrawFn) -> list[bytes]:
    conversations = draw(st.booleans())
    counts = draw(st.lists(st.integers(1, 7), min_size=1, max_size=3))  # the library stumbles over empty row groups
    return [
        parquet(
            draw(columns_of_a_file(conversations, count)),
            row_group_size=draw(st.integers(1, 8)),
            data_page_size=draw(st.sampled_from([1, 1 << 20])),
        )
        for count in counts
    ]


@pytest.mark.slow
@settings(max_examples=100, suppress_health_check=list(HealthCheck))
@given(files=sets_of_files(), decoded=st.integers(1, 5), data=st.data())
def test_rows_are_the_librarys(
    files: list[bytes], decoded: int, data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Whatever the columns' types and order, and whatever a file lacks; and what the library refuses is refused."""
    folder = tmp_path_factory.mktemp("set")
    places = [write(folder / f"{number}.parquet", content) for number, content in enumerate(files)]
    try:
        library = load_dataset(str(folder), split="train")
        expected: list[dict[str, Any]] | None = library.to_list()
        # As it was loaded, for the types that to_list does not show.
        features = library.features
    except Exception:
        expected = None
    columns: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dpo_fast.row_groups, "ROWS_DECODED", decoded)
        try:
            index = read_index(places)
            columns = [name for name in (*COLUMNS, "tools", "kind") if name in index.features]
            source = RowGroups(index, columns)
            found = [
                {name: column[offset] for name, column in values.items()}
                for _, values in source.batches(0, len(source))
                for offset in range(len(values[columns[0]]))
            ]
        except DatasetError:
            assert expected is None
            return
        assert expected is not None
        assert index.features == features
        assert found == [{name: record[name] for name in columns} for record in expected]
        if found:
            start = data.draw(st.integers(0, len(found) - 1))
            stop = data.draw(st.integers(start, len(found)))
            some = [values for _, values in source.batches(start, stop)]
            assert list(chain(*(values[columns[0]] for values in some))) == [
                row[columns[0]] for row in found[start:stop]
            ]


def test_a_folder_is_what_the_library_says_it_is(tmp_path: Path) -> None:
    """Splits by the names of files and folders, and hidden files left out."""
    for name, (start, stop) in {
        "data/train-00000-of-00002.parquet": (0, 5),
        "data/train-00001-of-00002.parquet": (5, 7),
        "data/test-00000-of-00001.parquet": (7, 9),
        "data/.hidden.parquet": (9, 10),
    }.items():
        write(tmp_path / name, parquet(rows(start, stop)))
    library = load_dataset(str(tmp_path))

    assert {split: prompts(load_preferences(str(tmp_path), split=split)) for split in library} == {
        split: library[split]["prompt"][:] for split in library
    }
    assert load_preferences(str(tmp_path)).split == "test"
    with pytest.raises(DatasetError, match=r"no split 'dev'; it has 'train', 'test'"):
        load_preferences(str(tmp_path), split="dev")


CARD = """---
configs:
- config_name: {name}
  data_files:
  - split: train
    path: a.parquet
  - split: test
    path: b/*.parquet
{rest}---
"""


def test_a_folder_s_card(tmp_path: Path, nothing_is_prepared: None) -> None:
    write(tmp_path / "a.parquet", parquet(rows(0, 5)))
    write(tmp_path / "b/c.parquet", parquet(rows(5, 7)))
    card = tmp_path / "README.md"
    card.write_text(CARD.format(name="default", rest=""))
    assert prompts(load_preferences(str(tmp_path))) == ["5?", "6?"]

    sizes = "dataset_info:\n  splits:\n  - name: train\n    num_examples: {}\n  - name: {}\n    num_examples: 2\n"
    card.write_text(CARD.format(name="default", rest=sizes.format(5, "test")))
    assert prompts(load_preferences(str(tmp_path), split="train"), 3) == ["3?", "4?"]
    card.write_text(CARD.format(name="default", rest=sizes.format(6, "test")))
    with pytest.raises(DatasetError, match="says that the split 'train' has 6 rows, its files have 5") as error:
        load_preferences(str(tmp_path), split="train")
    one_line(error)
    card.write_text(CARD.format(name="default", rest=sizes.format(5, "dev")))
    with pytest.raises(DatasetError, match=r"the splits are \['train', 'dev'\], its files are") as error:
        load_preferences(str(tmp_path))
    one_line(error)

    two = "- config_name: other\n  data_files: a.parquet\n"
    card.write_text(CARD.format(name="one", rest=two))
    with pytest.raises(DatasetError, match=r"Config name is missing.*'one', 'other'") as error:
        load_preferences(str(tmp_path))
    one_line(error)


def test_a_card_that_filters_is_the_librarys_to_read(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", parquet(rows(0, 5)))
    rest = "  columns: [prompt, chosen, rejected]\n"
    (tmp_path / "README.md").write_text(
        "---\nconfigs:\n- config_name: default\n  data_files: a.parquet\n" + rest + "---\n"
    )
    data = load_preferences(str(tmp_path))

    assert not isinstance(data.dataset, RowGroups)
    assert prompts(data) == [row["prompt"] for row in rows(0, 5)]


@pytest.mark.parametrize("name", ["a b#%25?.parquet", "[x]*.parquet", "über\u202e.parquet", "a\nb\x1b[2J.parquet"])
def test_names_of_files(tmp_path: Path, name: str, nothing_is_prepared: None) -> None:
    place = write(tmp_path / "set" / name, parquet(rows(0, 3)))

    # The library does not find a file with a line break in its name in a folder, and says so.
    datasets_ = [place] if "\n" in name else [place, str(tmp_path / "set")]
    for dataset in datasets_:
        assert prompts(load_preferences(dataset)) == ["0?", "1?", "2?"]
    Path(place).write_bytes(b"PAR1 no")
    for dataset in datasets_:
        with pytest.raises(DatasetError, match="is damaged, or no Parquet file: get it again") as error:
            load_preferences(dataset)
        one_line(error)


# Any rows, in any order.


@pytest.fixture
def three_files(tmp_path: Path) -> list[str]:
    """Of 10, 0 and 13 rows, in groups of 4, 0 and 13."""
    contents = [parquet(rows(0, 10), row_group_size=4), parquet(pa.Table.from_pylist(rows(0, 1)).slice(0, 0)),
                parquet(rows(10, 23))]  # fmt: skip
    return [write(tmp_path / f"{number}.parquet", content) for number, content in enumerate(contents)]


def opened(places: list[str], **options: Any) -> PreferenceSet:
    return of_row_groups("set", None, read_index(places), "fingerprint", limit=None, group_by=None, **options)


@pytest.mark.parametrize("decoded", [1, 3, 256])
def test_any_rows_are_a_slice_of_all(three_files: list[str], decoded: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dpo_fast.row_groups, "ROWS_DECODED", decoded)
    data, expected = opened(three_files), [f"{number}?" for number in range(23)]
    spans = random.Random(0).sample([(start, stop) for start in range(24) for stop in range(start, 25)], 100)

    for start, stop in spans:
        assert prompts(data, start, stop) == expected[start:stop]
        assert [row.row for row in data.rows(start=start, stop=stop)] == list(range(start + 1, min(stop, 23) + 1))


def test_ranges_from_threads(three_files: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dpo_fast.row_groups, "ROWS_DECODED", 2)
    data, expected = opened(three_files), [f"{number}?" for number in range(23)]
    draw = random.Random(1)
    spans = [sorted((draw.randrange(24), draw.randrange(24))) for _ in range(100)]

    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda span: prompts(data, *span), spans))

    assert found == [expected[start:stop] for start, stop in spans]


def test_who_reads_on_decodes_a_group_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, nothing_is_prepared: None
) -> None:
    """Chunk after chunk of one group; then elsewhere, and back."""
    monkeypatch.setattr(dpo_fast.row_groups, "ROWS_DECODED", 8)
    place = write(tmp_path / "a.parquet", parquet(rows(0, 300), row_group_size=200))
    data = load_preferences(place)
    begun: list[int] = []
    read = pq.ParquetFile.iter_batches

    def counted(file: Any, *arguments: Any, **options: Any) -> Any:
        begun.extend(options["row_groups"])
        return read(file, *arguments, **options)

    monkeypatch.setattr(pq.ParquetFile, "iter_batches", counted)
    for start, stop in pairwise(range(1, 200, 20)):
        assert len(prompts(data, start, stop)) == 20
    assert begun == [0]
    assert prompts(data, 250, 251) == ["250?"]
    assert begun == [0, 1]
    assert prompts(data, 299, 300) == ["299?"]
    assert prompts(data, 0, 1) == ["0?"]
    assert begun == [0, 1, 0]
    assert prompts(data, 270, 271) == ["270?"]  # in a later group: none of this one's is decoded for it
    assert begun == [0, 1, 0, 1]


def test_limit(three_files: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No footers are read but those of the files that the rows are in, and of the few read with them."""
    for number in range(3, 40):
        write(tmp_path / f"{number:02}.parquet", parquet(rows(0, 1)))
    read: list[str] = []
    footer = dpo_fast.row_groups.read_footer
    monkeypatch.setattr(dpo_fast.row_groups, "read_footer", lambda place: (read.append(place), footer(place))[1])

    data = load_preferences(str(tmp_path), limit=10)
    assert (len(data), data.rows_in_all) == (10, None)
    assert len(read) < 8
    assert len(prompts(data)) == 10
    whole = load_preferences(str(tmp_path))
    assert (len(whole), whole.rows_in_all) == (60, 60)
    assert whole.fingerprint == data.fingerprint
    assert len(load_preferences(str(tmp_path), limit=61)) == 60


def test_an_index_is_all_that_another_process_needs(three_files: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    index = pickle.loads(pickle.dumps(read_index(three_files)))
    assert index == read_index(three_files)
    assert [file.groups for file in index.files] == [(4, 4, 2), (0,), (13,)]
    monkeypatch.setattr(datasets, "load_dataset_builder", lambda *_, **__: pytest.fail("it was resolved"))

    data = of_row_groups("set", None, index, "fingerprint", limit=None, group_by=None)

    assert prompts(data, 8, 12) == ["8?", "9?", "10?", "11?"]


MEASURE = """
import resource, sys
from dpo_fast.preferences import load_preferences
data = load_preferences(sys.argv[1])
list(data.rows(stop=1))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
assert sum(1 for row in data.rows()) == int(sys.argv[2])
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.slow
@pytest.mark.parametrize("group", [60_000, 1_000])
def test_memory_does_not_grow_with_a_row_group(tmp_path: Path, group: int) -> None:
    """120 MB that do not compress, in one row group or in many: read with 48 MB above what a first row takes.

    6 MB of buffers, some rows as Python objects, and what allocators keep; 30 MB were measured.
    """
    draw = random.Random(0)
    pool = [draw.randbytes(1_000).hex() for _ in range(2_000)]
    table = pa.table({name: [f"{number} {pool[draw.randrange(2_000)][:660]}" for number in range(60_000)]
                      for name in COLUMNS})  # fmt: skip
    path = write(tmp_path / "a.parquet", parquet(table, row_group_size=group, compression="none"))
    assert Path(path).stat().st_size > 110e6

    command = [sys.executable, "-c", MEASURE, path, "60000"]
    environment = {**os.environ, "HF_DATASETS_CACHE": str(tmp_path / "cache")}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)

    assert int(done.stdout) < 48 * 1024
    assert not (tmp_path / "cache").exists()


# Files at fault.

SOUND = parquet(rows(0, 40), row_group_size=16, write_page_checksum=True, compression="none", use_dictionary=False)


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(position=st.integers(0, len(SOUND) - 1), bits=st.integers(1, 255), cut=st.booleans())
def test_a_damaged_file_is_named(tmp_path: Path, position: int, bits: int, cut: bool) -> None:
    """Whatever byte changes, and wherever the file ends: rows, or one line with its name."""
    content = bytearray(SOUND)
    content[position] ^= bits
    path = write(tmp_path / "a.parquet", bytes(content[:position] if cut else content))
    said = ""
    try:
        list(load_preferences(path).rows(on_error="skip"))
    except DpoFastError as error:
        said = str(error)
    assert not said or (said.isprintable() and "a.parquet" in said)


def test_a_damaged_page_is_found(tmp_path: Path) -> None:
    content = bytearray(SOUND)
    position = SOUND.index(b" yes 20")
    content[position + 1] ^= 1
    data = load_preferences(write(tmp_path / "a.parquet", bytes(content)))

    assert len(prompts(data, 0, 16)) == 16
    with pytest.raises(DatasetError, match=r"a\.parquet' is damaged, or no Parquet file: get it again") as error:
        prompts(data, 16, 40)
    one_line(error)
    assert len(prompts(data, 32, 40)) == 8  # other rows can be read still


def test_a_file_that_changes_is_not_read_on(three_files: list[str]) -> None:
    data = opened(three_files)
    Path(three_files[2]).write_bytes(parquet(rows(0, 12)))
    assert len(prompts(data, 0, 10)) == 10

    with pytest.raises(DatasetError, match=r"2\.parquet' has changed since this set was opened: start again"):
        prompts(data)
    Path(three_files[2]).unlink()
    with pytest.raises(DatasetError, match=r"2\.parquet' is not there"):
        prompts(data, 11)


@pytest.mark.parametrize(
    ("first", "second", "says"),
    [
        ({"chosen": "a"}, {"chosen": [1]}, r"1\.parquet' does not fit the set's first file: Couldn't cast"),
        (
            {"chosen": "a"},
            {"chosen": "a", "more": 1},
            r"1\.parquet' does not fit the set's first file, which has no column \['more'\]",
        ),
        ({"chosen": "a", "kind": 1}, {"kind": "x"}, r"1\.parquet', rows 1 to 1: do not fit the set's first file"),
    ],
)
def test_files_that_do_not_fit(tmp_path: Path, first: dict[str, Any], second: dict[str, Any], says: str) -> None:
    for number, record in enumerate((first, second)):
        write(tmp_path / f"{number}.parquet", parquet([{**rows(0, 1)[0], "kind": 2, **record}]))

    with pytest.raises(DatasetError, match=says) as error:
        prompts(load_preferences(str(tmp_path), group_by="kind"))
    one_line(error)
    with pytest.raises(datasets.exceptions.DatasetGenerationError):
        load_dataset(str(tmp_path))


def test_bytes_that_are_no_text(tmp_path: Path) -> None:
    bad = pa.array([b"a", b"\xff", b"c"]).view(pa.binary()).cast(pa.binary())
    text = pa.Array.from_buffers(pa.string(), 3, bad.buffers())
    table = pa.table({"prompt": text, "chosen": ["a"] * 3, "rejected": ["b"] * 3})
    data = load_preferences(write(tmp_path / "a.parquet", parquet(table)))

    with pytest.raises(DatasetError, match=r"a\.parquet', rows 1 to 3: there is what is no text: mend it") as error:
        prompts(data)
    one_line(error)


# URLs.


@pytest.fixture
def memory() -> Iterator[MemoryFileSystem]:
    system = fsspec.filesystem("memory")
    system.store.clear()
    system.pseudo_dirs[:] = [""]
    yield system
    system.store.clear()


def test_files_at_urls(memory: MemoryFileSystem, nothing_is_prepared: None) -> None:
    for name, (start, stop) in {"train/a": (0, 5), "train/b": (5, 8), "test/a": (8, 10)}.items():
        memory.pipe(f"/bucket/prefs/{name}.parquet", parquet(rows(start, stop)))
    memory.pipe("/bucket/prefs/notes.txt", b"mine")

    for url in ("memory://bucket/prefs", "memory://bucket/prefs/"):
        assert prompts(load_preferences(url)) == ["8?", "9?"]
        train = load_preferences(url, split="train", group_by="kind")
        assert (train.name, train.split, prompts(train, 4, 6)) == (url, "train", ["4?", "5?"])
        assert next(train.rows()) == PreferenceRow(1, "0?", " yes 0", " no 0", group="k0")
    memory.pipe("/bucket/one/test/a.parquet", parquet(rows(8, 10)))
    assert load_preferences("memory://bucket/one").split == "test"  # though that is where all of its files are
    for url in ("memory://bucket/prefs/train/*.parquet", "memory://bucket/prefs/train/*"):
        assert prompts(load_preferences(url)) == [f"{number}?" for number in range(8)]
    assert prompts(load_preferences("memory://bucket/prefs/train/b.parquet")) == ["5?", "6?", "7?"]
    with pytest.raises(UsageError, match=r"--split 'test'.*is one file"):
        load_preferences("memory://bucket/prefs/train/b.parquet", split="test")


def test_a_folder_at_a_url_is_listed_once(memory: MemoryFileSystem, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many names of splits are tried: a bucket of ten thousand files takes seconds to list."""
    for number in range(30):
        memory.pipe(f"/bucket/prefs/data/train-{number:05}-of-00030.parquet", parquet(rows(number, number + 1)))
    listed: list[str] = []
    ls = MemoryFileSystem.ls

    def counted(system: Any, path: str, *arguments: Any, **options: Any) -> Any:
        listed.append(path)
        return ls(system, path, *arguments, **options)

    monkeypatch.setattr(MemoryFileSystem, "ls", counted)

    assert prompts(load_preferences("memory://bucket/prefs")) == [f"{number}?" for number in range(30)]
    assert len([path for path in listed if "bucket" in path]) <= 3
    assert not [path for path in memory.store if not path.startswith("/bucket")]


@pytest.mark.parametrize(
    "url", ["memory://bucket/prefs", "memory://bucket/prefs/*.parquet", "memory://bucket/prefs/a.parquet"]
)
def test_a_url_s_fingerprint_follows_the_content(memory: MemoryFileSystem, url: str) -> None:
    memory.pipe("/bucket/prefs/a.parquet", parquet(rows(0, 5)))
    first = load_preferences(url).fingerprint
    assert load_preferences(url, limit=2).fingerprint == first

    memory.pipe("/bucket/prefs/a.parquet", parquet(rows(1, 6)))

    assert load_preferences(url).fingerprint != first
    assert prompts(load_preferences(url))[0] == "1?"


def test_urls_at_fault(memory: MemoryFileSystem, monkeypatch: pytest.MonkeyPatch) -> None:
    memory.pipe("/bucket/prefs/a.jsonl", b"{}")
    for url in ("memory://bucket/prefs", "memory://bucket/none", "memory://bucket/prefs/*.parquet",
                "memory://bucket/prefs/a.jsonl", "memory://bucket/b.parquet"):  # fmt: skip
        with pytest.raises(DatasetError, match=r"cannot be read: there are no Parquet files|is not there") as error:
            load_preferences(url)
        assert url in one_line(error)
    for url in ("s3://me:Secret1@host/prefs", "s3://me:Sec/ret/Secret1@host/prefs", "https://Secret1@host/a.parquet",
                "https://host/a.parquet?signature=Secret1"):  # fmt: skip
        with pytest.raises(UsageError, match="--dataset: a URL with a user") as usage:
            load_preferences(url)
        assert "Secret1" not in one_line(usage)
    with pytest.raises(UsageError, match="is a chain of URLs"):
        load_preferences("memory://bucket/prefs::file:///etc")
    with pytest.raises(UsageError, match="nosuch://bucket/prefs: is no URL that fsspec knows") as usage:
        load_preferences("nosuch://bucket/prefs")
    one_line(usage)
    with pytest.raises(UsageError, match="is written owner/name"):
        load_preferences("hf://datasets/owner/name")

    def missing(url: str, **options: Any) -> None:
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr(fsspec.core, "url_to_fs", missing)
    with pytest.raises(MissingDependencyError, match=r"s3://bucket/prefs needs the package 's3fs'.*dpo-fast\[s3\]"):
        load_preferences("s3://bucket/prefs")
    with pytest.raises(UsageError, match="gs://bucket/prefs: needs a package that is not there"):
        load_preferences("gs://bucket/prefs")


class Flaky(MemoryFileSystem):
    """Files whose reads go wrong as `faults` says: a call a read, for what it does to the content."""

    protocol = "flaky"
    faults: ClassVar[list[Callable[[bytes], bytes]]] = []

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return super()._strip_protocol(path.replace("flaky://", "memory://"))

    def _open(self, path: str, *arguments: Any, **options: Any) -> Any:
        if self.faults and self.faults[0] is opening:
            self.faults.pop(0)(b"")
        return _FlakyFile(self, path, super()._open(path, *arguments, **options).getvalue())


class _FlakyFile(MemoryFile):
    def read(self, size: int = -1) -> bytes:
        content = super().read(size)
        return Flaky.faults.pop(0)(content) if Flaky.faults and Flaky.faults[0] is not opening else content


def opening(content: bytes) -> bytes:
    raise ConnectionResetError("while it was opened")


def broken(content: bytes) -> bytes:
    raise ConnectionResetError("peer hf_" + "aB3" * 9)


def busy(content: bytes) -> bytes:
    raise OSError(16, "Please reduce your request rate")


def short(content: bytes) -> bytes:
    return content[: len(content) // 2]


def well(content: bytes) -> bytes:
    return content


def denied(content: bytes) -> bytes:
    raise PermissionError("Access Denied")


@pytest.fixture
def flaky(memory: MemoryFileSystem) -> Iterator[str]:
    """A set of 40 rows behind a network that fails as `Flaky.faults` says."""
    fsspec.register_implementation("flaky", Flaky, clobber=True)
    memory.pipe("/set/a.parquet", parquet(rows(0, 40), row_group_size=10))
    yield "flaky://set/a.parquet"
    Flaky.faults = []


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(faults=st.lists(st.sampled_from([opening, broken, busy, short, well, well, well]), max_size=30))
def test_reads_that_fail_are_tried_again(flaky: str, faults: list[Callable[[bytes], bytes]]) -> None:
    """All rows, or one line: whether it fails for good is whether it fails five times on end."""
    Flaky.faults = [*faults]
    said = ""
    try:
        found = prompts(load_preferences(flaky))
    except DatasetError as error:
        said = str(error)
    if said:
        assert f"tried {ATTEMPTS} times" in said
        assert "aB3" not in said
        assert "x" * ATTEMPTS in "".join("." if fault is well else "x" for fault in faults)
    else:
        assert found == [f"{number}?" for number in range(40)]


def test_a_read_that_always_fails_is_named(flaky: str, no_waiting: list[float]) -> None:
    data = load_preferences(flaky)
    Flaky.faults = [broken] * 99
    with pytest.raises(DatasetError, match=r"'flaky://set/a\.parquet' cannot be read now, tried 5 times") as error:
        prompts(data)
    assert "run the same command again later" in one_line(error)
    expected = [FIRST_WAIT * 2**number for number in range(ATTEMPTS - 1)]
    assert all(0.5 * wait <= waited <= 1.5 * wait for wait, waited in zip(expected, no_waiting, strict=True))
    Flaky.faults = []
    assert len(prompts(data)) == 40  # and when it passes, all is well


def test_what_does_not_pass_is_not_tried_again(flaky: str, no_waiting: list[float]) -> None:
    data = load_preferences(flaky)
    Flaky.faults = [denied] * 99

    with pytest.raises(DatasetError, match=r"may not be read \(Access Denied\)") as error:
        prompts(data)
    one_line(error)
    assert no_waiting == []


# The Hub.


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[LoopbackHub]:
    with hub_of_this_process(monkeypatch, tmp_path) as served:
        monkeypatch.setattr(datasets.config, "HF_ENDPOINT", served.url)
        monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
        yield served


def big(count: int, prefix: str = "") -> bytes:
    """Rows of 3 columns of 1 kB that do not compress, in one row group."""
    draw = random.Random(0)
    return parquet(
        pa.table(
            {name: [f"{prefix}{number} {draw.randbytes(500).hex()}" for number in range(count)] for name in COLUMNS}
        ),
        compression="none",
        use_dictionary=False,
    )


def sent(hub: LoopbackHub, name: str = "") -> int:
    """Bytes of Parquet files that the Hub has sent, each within a range that was asked for."""
    requests = [request for request in hub.requests if name in request.path and request.path.endswith(".parquet")]
    assert all(request.range is not None for request in requests)
    return sum(request.sent for request in requests)


def test_the_hub_sends_what_is_asked_for(hub: LoopbackHub, nothing_is_prepared: None) -> None:
    """Of a file of 15 MB with one row group: its footer and a buffer of each column; of the second file, nothing."""
    file = big(5_000)
    assert len(file) > 15e6
    hub.add_dataset("me/prefs", {"data/train-0.parquet": file, "data/train-1.parquet": big(10), "README.md": b"hello"})

    data = load_preferences("me/prefs", limit=20)
    assert sent(hub) <= 1 << 16
    assert [str(prompt).split()[0] for prompt in prompts(data)] == [str(number) for number in range(20)]

    assert sent(hub, "train-0") <= 2 * (1 << 16) + len(COLUMNS) * BUFFER < len(file) / 2
    assert sent(hub, "train-1") == 0
    hub.requests.clear()
    whole = load_preferences("me/prefs")
    assert (len(whole), whole.split, whole.fingerprint) == (5010, "train", data.fingerprint)
    assert len(prompts(whole)) == 5010  # a buffer at a time, and nothing twice but footers
    assert sent(hub, "train-0") < len(file) + 2 * (1 << 16)


def test_a_set_on_the_hub_is_pinned_to_a_commit(hub: LoopbackHub, nothing_is_prepared: None) -> None:
    first = hub.add_dataset("me/prefs", {"data/train-0.parquet": parquet(rows(0, 5))})
    data = load_preferences("me/prefs")
    hub.add_dataset("me/prefs", {"data/train-0.parquet": parquet(rows(5, 10))}, "other files")

    assert prompts(data) == [f"{number}?" for number in range(5)]
    assert isinstance(data.dataset, RowGroups)
    assert data.dataset.index.files[0].place == f"hf://datasets/me/prefs@{first}/data/train-0.parquet"
    later = load_preferences("me/prefs")
    assert prompts(later) == [f"{number}?" for number in range(5, 10)]
    assert later.fingerprint != data.fingerprint


@pytest.mark.parametrize("fault", [500, CUT])
def test_a_hub_that_fails_half_way(hub: LoopbackHub, fault: int | str) -> None:
    """Once it is asked again; if it goes on, it is named; and when it is back, so are the rows."""
    hub.add_dataset("me/prefs", {"data/train-0.parquet": big(2_500)})
    data = load_preferences("me/prefs")
    assert len(prompts(data, 0, 1_000)) == 1_000

    hub.faults, hub.fault_times = {"dataset_resolve": fault}, {"dataset_resolve": 4}
    assert len(prompts(data, 1_000, 2_400)) == 1_400
    assert hub.fault_times["dataset_resolve"] < 0

    hub.fault_times = {}
    with pytest.raises(DatasetError, match=r"hf://datasets/me/prefs@.*train-0\.parquet' cannot be read now") as error:
        prompts(data, 0, 100)
    assert hub.token not in one_line(error)
    hub.faults = {}
    assert len(prompts(data)) == 2_500


def test_a_hub_that_fails_at_the_door(hub: LoopbackHub) -> None:
    hub.add_dataset("me/prefs", {"data/train-0.parquet": parquet(rows(0, 5))})
    hub.faults = {"dataset_info": 500}
    with pytest.raises(DatasetError, match=r"'me/prefs' cannot be read: .*the Hub did not give it") as error:
        load_preferences("me/prefs")
    assert hub.token not in one_line(error)
    hub.faults = {}
    with pytest.raises(DatasetError, match=r"'me/nothing' cannot be read: .*check the name"):
        load_preferences("me/nothing")


def test_what_is_not_parquet_on_the_hub_is_the_librarys_to_read(hub: LoopbackHub) -> None:
    hub.add_dataset("me/lines", {"train.jsonl": b'{"prompt": "q", "chosen": "a", "rejected": "b"}\n' * 3})
    data = load_preferences("me/lines")

    assert not isinstance(data.dataset, RowGroups)
    assert len(list(data.rows())) == 3


def test_skipped_rows_are_those_of_the_library(tmp_path: Path) -> None:
    """The same rows, reasons included, as from the library's own memory-mapped set."""
    records = rows(0, 9)
    records[2]["chosen"] = ""
    records[5]["rejected"] = None
    place = write(tmp_path / "a.parquet", parquet(records, row_group_size=2))
    library = PreferenceSet(place, None, load_dataset("parquet", data_files=place, split="train"), "", "kind")

    found = list(load_preferences(place, group_by="kind").rows(on_error="skip"))

    assert found == list(library.rows(on_error="skip"))
    assert [row.row for row in found if isinstance(row, SkippedRow)] == [3, 6]


def test_readers_that_wait_for_each_other_do_not_exist(three_files: list[str]) -> None:
    """Two generators of one set, drawn from in turn, and one of them left half-way."""
    data = opened(three_files)
    one, other = data.rows(), data.rows(start=5)
    found = [(next(one).row, next(other).row) for _ in range(6)]
    assert found == [(number, number + 5) for number in range(1, 7)]
    one.close()
    assert [row.row for row in other] == list(range(12, 24))
    threads = [threading.Thread(target=lambda: list(data.rows())) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
