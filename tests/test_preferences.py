"""Reading preferences: the rows are what TRL would see, and whatever is wrong is said in one line."""

import gzip
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
from datasets import Dataset, DatasetDict
from hypothesis import given, settings
from hypothesis import strategies as st

import dpo_fast.preferences
from dpo_fast.errors import DatasetError, DpoFastError, RowError, StorageError, UsageError
from dpo_fast.preferences import PreferenceSet, load_preferences, shown
from dpo_fast.types import PreferenceRow, SkippedRow

PAIR = {"prompt": "Is it?", "chosen": " Yes.", "rejected": " No."}
REAL_DATA = Path(__file__).parents[2] / "shared/data/hh-harmless-base-test.jsonl.gz"


@pytest.fixture(autouse=True)
def library_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep what the library stores out of the user's cache, and the network out of the tests."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)


def user(content: str) -> dict[str, str]:
    return {"role": "user", "content": content}


def assistant(content: str) -> dict[str, str]:
    return {"role": "assistant", "content": content}


def in_memory(*records: dict[str, Any], group_by: str | None = None) -> PreferenceSet:
    return PreferenceSet("memory", None, Dataset.from_list(list(records)), "fingerprint", group_by)


def trl_extract_prompt(record: dict[str, Any]) -> dict[str, Any]:
    return pytest.importorskip("trl.data_utils").extract_prompt(record)


def jsonl(records: list[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records).encode()


def write(path: Path, records: list[dict[str, Any]]) -> str:
    """Write records in the format that the file's suffix says."""
    if path.name.lower().endswith((".jsonl", ".jsonl.gz")):
        content = jsonl(records)
    elif path.name.endswith((".json", ".json.gz")):
        content = json.dumps(records).encode()
    elif path.name.endswith(".parquet"):
        Dataset.from_list(records).to_parquet(str(path))
        return str(path)
    else:
        plain = path.with_name("plain.csv")
        Dataset.from_list(records).to_csv(str(plain))
        content = plain.read_bytes()
        plain.unlink()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return str(path)


def one_line(error: pytest.ExceptionInfo[DpoFastError]) -> str:
    """Give the message, after checking that it is one line that a terminal can be shown."""
    message = str(error.value)
    assert message.isprintable(), repr(message)
    assert len(message) < 1000, "nobody reads this"
    return message


# ---- reading


@pytest.mark.parametrize(
    "name", ["a.jsonl", "a.jsonl.gz", "a.json", "a.json.gz", "a.parquet", "a.csv", "a.csv.gz", "A.JSONL", "[a]*?.jsonl"]
)
def test_every_format_gives_the_same_rows(tmp_path: Path, name: str) -> None:
    records = [PAIR, {"prompt": 'Say "hi",\nplease', "chosen": "你好 🙂", "rejected": "\tno"}]
    path = write(tmp_path / name, records)
    preferences = load_preferences(path)
    assert len(preferences) == 2
    assert preferences.name == path
    assert preferences.split is None
    assert list(preferences.rows()) == [PreferenceRow(row=row, **record) for row, record in enumerate(records, 1)]


def test_limit_and_group(tmp_path: Path) -> None:
    records = [{**PAIR, "subset": subset, "other": 1} for subset in ("chat", "safety", "chat")]
    preferences = load_preferences(write(tmp_path / "a.jsonl", records), limit=2, group_by="subset")
    assert [row.group for row in preferences.rows()] == ["chat", "safety"]
    assert len(load_preferences(write(tmp_path / "a.jsonl", records), limit=9)) == 3


def test_splits_of_folders(tmp_path: Path) -> None:
    first, second = Dataset.from_list([PAIR]), Dataset.from_list([PAIR, PAIR])
    DatasetDict(train=first, test=second).save_to_disk(str(tmp_path / "two"))
    DatasetDict(validation=first).save_to_disk(str(tmp_path / "one"))
    DatasetDict(train=first, validation=second).save_to_disk(str(tmp_path / "unclear"))
    first.save_to_disk(str(tmp_path / "plain"))
    (tmp_path / "files").mkdir()
    write(tmp_path / "files" / "train.jsonl", [PAIR])
    write(tmp_path / "files" / "test.jsonl", [PAIR, PAIR])

    def found(folder: str, split: str | None = None) -> tuple[str | None, int]:
        preferences = load_preferences(str(tmp_path / folder), split=split)
        return preferences.split, len(list(preferences.rows()))

    assert found("two") == ("test", 2)
    assert found("two", "train") == ("train", 1)
    assert found("one") == ("validation", 1)
    assert found("plain") == (None, 1)
    assert found("files") == ("test", 2)
    with pytest.raises(DatasetError, match=r"'train', 'validation': choose one with --split") as error:
        found("unclear")
    one_line(error)
    with pytest.raises(DatasetError, match=r"no split 'tset'; it has 'train', 'test'") as error:
        found("two", "tset")
    one_line(error)
    with pytest.raises(UsageError, match=r"--split 'test'.*without splits"):
        found("plain", "test")
    with pytest.raises(UsageError, match=r"--split 'test'.*is one file"):
        load_preferences(str(tmp_path / "files" / "test.jsonl"), split="test")


def test_fingerprint_follows_the_bytes_and_no_stale_copy_is_read(tmp_path: Path) -> None:
    """A file that changes but keeps its size and time of change must be read anew."""
    path = tmp_path / "a.jsonl"
    fingerprints = set()
    for chosen in ("abc", "xyz"):
        write(path, [{**PAIR, "chosen": chosen}])
        os.utime(path, (1, 1))
        preferences = load_preferences(str(path))
        assert [row.chosen for row in preferences.rows()] == [chosen]
        fingerprints.add(preferences.fingerprint)
    assert len(fingerprints) == 2
    copy = tmp_path / "copy.jsonl"
    copy.write_bytes(path.read_bytes())
    assert load_preferences(str(copy)).fingerprint == preferences.fingerprint


def test_nothing_is_printed_for_a_local_file(tmp_path: Path) -> None:
    """In a process of its own, since progress bars keep the standard error they find first."""
    path = write(tmp_path / "a.jsonl", [PAIR])
    code = f"from dpo_fast.preferences import load_preferences as load; print(len(list(load({path!r}).rows())))"
    environment = {**os.environ, "HF_DATASETS_CACHE": str(tmp_path / "cache")}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    assert (done.stdout, done.stderr) == ("1\n", "")


def test_progress_bars_are_given_back(tmp_path: Path) -> None:
    before = datasets.are_progress_bars_disabled(), datasets.logging.get_verbosity()
    load_preferences(write(tmp_path / "a.jsonl", [PAIR]))
    (tmp_path / "bad.jsonl").write_text("{")
    with pytest.raises(DatasetError):
        load_preferences(str(tmp_path / "bad.jsonl"))
    assert (datasets.are_progress_bars_disabled(), datasets.logging.get_verbosity()) == before


def test_import_is_light() -> None:
    heavy = ["torch", "transformers", "datasets", "pyarrow", "trl"]
    code = f"import sys, dpo_fast.preferences, dpo_fast.tokens; print([m for m in {heavy} if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


@pytest.mark.real_data
@pytest.mark.skipif(not REAL_DATA.exists(), reason="the real preference pairs are not beside the project")
def test_real_prompts_are_trls() -> None:
    preferences = load_preferences(str(REAL_DATA))
    assert len(preferences) == 2312
    for row, record in zip(preferences.rows(), preferences.dataset, strict=True):
        assert isinstance(row, PreferenceRow)
        assert {"prompt": row.prompt, "chosen": row.chosen, "rejected": row.rejected} == trl_extract_prompt(record)


# ---- the implicit prompt


@pytest.mark.parametrize(
    ("chosen", "rejected", "prompt"),
    [
        ("Q A: yes", "Q A: no", "Q A:"),  # the space before the difference goes to the completions
        ("Q A:yes", "Q A:yesno", "Q A:ye"),  # one begins with the other: all but the shorter one's last character
        ("same", "same", "sam"),  # no difference
        ("cat", "car", "ca"),  # within a word
        ("a  b", "a  c", "a "),  # one space only
        ([user("q"), assistant("a")], [user("q"), assistant("b")], [user("q")]),
        ([user("q"), assistant("a")], [user("q"), assistant("a"), user("r")], [user("q")]),
        ([user("q"), assistant("a")], [user("q"), assistant("a")], [user("q")]),
    ],
)
def test_implicit_prompt(chosen: Any, rejected: Any, prompt: Any) -> None:
    [row] = in_memory({"chosen": chosen, "rejected": rejected}).rows()
    assert isinstance(row, PreferenceRow)
    assert row.prompt == prompt
    assert row.prompt + row.chosen == chosen
    assert row.prompt + row.rejected == rejected
    expected = trl_extract_prompt({"chosen": chosen, "rejected": rejected})
    assert (row.prompt, row.chosen, row.rejected) == (expected["prompt"], expected["chosen"], expected["rejected"])


# Few letters, so that beginnings in common are long and spaces meet them.
short_text = st.text(alphabet="ab \n", min_size=1, max_size=8)


@given(st.lists(st.tuples(st.text(alphabet="ab \n", max_size=6), short_text, short_text), min_size=1, max_size=20))
def test_implicit_prompts_are_trls(rows: list[tuple[str, str, str]]) -> None:
    """Equal to TRL's wherever the two begin alike; refused where TRL finds no prompt or looks behind the end."""
    records = [{"chosen": prompt + chosen, "rejected": prompt + rejected} for prompt, chosen, rejected in rows]
    for record, row in zip(records, in_memory(*records).rows(on_error="skip"), strict=True):
        expected = trl_extract_prompt(record)
        if isinstance(row, PreferenceRow):
            assert (row.prompt, row.chosen, row.rejected) == tuple(expected[key] for key in expected)
            assert row.prompt
            assert row.chosen
            assert row.rejected
        else:
            differ_at_once = record["chosen"][0] != record["rejected"][0]
            assert expected["prompt"] == "" or differ_at_once


# ---- what a row may hold


def test_tools_and_template_arguments(tmp_path: Path) -> None:
    tools = [{"name": "weather", "parameters": {"city": "string"}}]
    base = {"prompt": [user("q")], "chosen": [assistant("a")], "rejected": [assistant("b")]}
    records = [
        {**base, "tools": json.dumps(tools), "chat_template_kwargs": {"enable_thinking": False}},
        {**base, "tools": "[]"},
        {**base, "tools": None},
    ]
    rows = list(load_preferences(write(tmp_path / "a.jsonl", records)).rows())
    assert [row.tools for row in rows] == [tools, [], None]
    assert [row.chat_template_kwargs for row in rows] == [{"enable_thinking": False}, {}, {}]
    [row] = load_preferences(write(tmp_path / "b.jsonl", [{**base, "tools": tools}])).rows()
    assert row.tools == tools


def test_message_keys_are_filled_as_arrow_fills_them() -> None:
    """A key that only some messages have is None in the others, for TRL as here; templates are given neither."""
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f"}}]}
    [row] = in_memory({"prompt": [user("q")], "chosen": [call, assistant("a")], "rejected": [assistant("b")]}).rows()
    assert row.chosen == Dataset.from_list([{"chosen": [call, assistant("a")]}])[0]["chosen"]


BAD_ROWS: dict[str, tuple[dict[str, Any], str]] = {
    "empty prompt": ({**PAIR, "prompt": ""}, "'prompt' is empty"),
    "empty chosen": ({**PAIR, "chosen": ""}, "'chosen' is empty"),
    "no messages": ({**PAIR, "rejected": []}, "'rejected' is empty"),
    "null": ({**PAIR, "rejected": None}, "'rejected' is missing or null"),
    "no prompt": ({"chosen": "a", "rejected": "b"}, "'prompt' is missing or null"),
    "number": ({**PAIR, "chosen": 17}, "'chosen' must be text or a list of messages, not 17"),
    "object": ({**PAIR, "chosen": {"role": "x"}}, "'chosen' must be text or a list of messages"),
    "chosen messages": ({**PAIR, "chosen": [assistant("a")]}, "'chosen' is messages but 'rejected' is text"),
    "prompt alone is text": (
        {"prompt": "q", "chosen": [assistant("a")], "rejected": [assistant("b")]},
        "'prompt' is text but 'chosen' is messages: make them alike, or leave the column 'prompt' out",
    ),
    "no role": (
        {"prompt": [{"content": "q"}], "chosen": [assistant("a")], "rejected": [assistant("b")]},
        "message 1 of 'prompt' has no 'role': {'content': 'q'}",
    ),
    "no content": (
        {
            "prompt": [user("q")],
            "chosen": [assistant("a"), {"role": "user", "text": "t"}],
            "rejected": [assistant("b")],
        },
        "message 2 of 'chosen' has no text in 'content'",
    ),
    "message is text": (
        {"prompt": ["q"], "chosen": ["a"], "rejected": ["b"]},
        "message 1 of 'chosen' must be an object with 'role' and 'content', not 'a'",
    ),
    "tools not JSON": ({**PAIR, "tools": "[{"}, "'tools' is text but not JSON"),
    "tools empty text": ({**PAIR, "tools": ""}, "'tools' is text but not JSON"),
    "tools an object": ({**PAIR, "tools": '{"a": 1}'}, "'tools' must be a list of tool schemas"),
    "template arguments": (
        {**PAIR, "chat_template_kwargs": "enable_thinking"},
        "'chat_template_kwargs' must be an object, not 'enable_thinking'",
    ),
    "hostile": ({**PAIR, "chosen": {"\x1b[2J\n<script>": "\u202e" * 500}}, r"\\x1b[2J\\n"),
    "other kind": (
        {"prompt": [user("q")], "chosen": [assistant("a")], "rejected": [assistant("b")]},
        "messages, where the rows before are text",
    ),
}


@pytest.mark.parametrize("case", BAD_ROWS)
def test_bad_row(case: str, tmp_path: Path) -> None:
    """The bad row is the second of three: stop names it, skip leaves the two others."""
    bad, reason = BAD_ROWS[case]
    path = write(tmp_path / "a.jsonl", [PAIR, bad, PAIR])
    preferences = load_preferences(path)
    reason = reason.replace("\\\\", "\\")
    with pytest.raises(RowError) as error:
        list(preferences.rows())
    assert error.value.row == 2
    assert reason in error.value.reason
    assert "row 2: " in one_line(error)

    first, skipped, last = preferences.rows(on_error="skip")
    assert (first, last) == (PreferenceRow(row=1, **PAIR), PreferenceRow(row=3, **PAIR))
    assert skipped == SkippedRow(2, error.value.reason)


@pytest.mark.parametrize(
    ("chosen", "rejected"),
    [("yes", "no"), ("a", "a"), (" a", " b"), ("yes ", "no "), ([assistant("a")], [assistant("b")])],
)
def test_no_beginning_in_common(chosen: Any, rejected: Any) -> None:
    with pytest.raises(RowError, match="'chosen' and 'rejected' have no beginning in common") as error:
        list(in_memory({"chosen": chosen, "rejected": rejected}).rows())
    one_line(error)


def test_empty_completions_of_an_implicit_prompt() -> None:
    """TRL stops here with an UnboundLocalError."""
    with pytest.raises(RowError, match="row 1: 'chosen' is empty"):
        list(in_memory({"chosen": "", "rejected": "abc"}).rows())


# ---- files at fault


def test_missing_columns(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [{"question": "q", "chosen": "a"}])
    with pytest.raises(DatasetError, match=r"no column 'rejected'; it has 'question, chosen'") as error:
        load_preferences(path)
    one_line(error)
    with pytest.raises(DatasetError, match=r"has images"):
        load_preferences(write(tmp_path / "b.jsonl", [{**PAIR, "images": []}]))
    with pytest.raises(UsageError, match=r"--group-by 'subset'.*it has 'prompt, chosen, rejected'") as usage:
        load_preferences(write(tmp_path / "c.jsonl", [PAIR]), group_by="subset")
    one_line(usage)
    with pytest.raises(UsageError, match="--limit 0 must be at least 1"):
        load_preferences(path, limit=0)


GOOD = jsonl([PAIR])
BAD_FILES: dict[str, tuple[str, bytes, str]] = {
    "empty": ("a.jsonl", b"", "is empty"),
    "blank lines": ("a.jsonl", b"\n\n", "has no rows"),
    "empty list": ("a.json", b"[]", "has no rows"),
    "empty gzip": ("a.jsonl.gz", gzip.compress(b""), "a.jsonl.gz' "),
    "cut line": ("a.jsonl", GOOD + GOOD + b'{"prompt": "q", "cho', "line 3 is not JSON"),
    "middle line": ("a.jsonl", GOOD + b"\n" + b"{]\n" + GOOD, "line 3 is not JSON"),
    "not an object": ("a.jsonl", GOOD + b"17\n", "line 2 is not an object (17)"),
    "lines in .json": ("a.json", GOOD + b"{]\n", "line 2 is not JSON"),
    "document": ("a.json", b'[{"chosen": "a",\n "rejected" "b"}]', "line 2, column 13 is not JSON"),
    "latin-1": (
        "a.jsonl",
        GOOD + '{"prompt": "é", "chosen": "a", "rejected": "b"}\n'.encode("latin-1"),
        "line 2 is not UTF-8",
    ),
    "latin-1 document": ("a.json", '[{"prompt": "é", "chosen": "a", "rejected": "b"}]'.encode("latin-1"), "not UTF-8"),
    "cut gzip": ("a.jsonl.gz", gzip.compress(os.urandom(2000).hex().encode() + GOOD * 99)[:1500], "cut short"),
    "not gzip": ("a.jsonl.gz", GOOD, "damaged or cut short"),
    "cut csv.gz": ("a.csv.gz", gzip.compress(b"prompt,chosen,rejected\na,b,c\n" * 99)[:-20], "cut short"),
    "not parquet": ("a.parquet", GOOD, "not a parquet file"),
    "ragged csv": ("a.csv", b"chosen,rejected\na,b\nc,d,e\n", "line 3, saw 3"),
    "header only": ("a.csv", b"chosen,rejected\n", "a.csv' "),
    "suffix": ("a.txt", GOOD, "the suffix is not one of .jsonl, "),
    "long number": (
        "a.jsonl",
        GOOD + b'{"prompt": "q", "chosen": "a", "rejected": ' + b"1" * 5000 + b"}\n",
        "line 2 is not JSON",
    ),
    "nested": ("a.jsonl", b"[" * 100_000 + b"\n", "a.jsonl' cannot be read"),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_bad_file(case: str, tmp_path: Path) -> None:
    name, content, reason = BAD_FILES[case]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DatasetError) as error:
        list(load_preferences(str(tmp_path / name)).rows())
    message = one_line(error)
    assert name in message
    assert reason in message


@pytest.mark.parametrize("name", ["missing.jsonl", "owner/missing.parquet", "./missing", "missing", "json", "a b"])
def test_no_such_file(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`json` is a loader of the library, which would read all files of the working folder."""
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "other.jsonl", [PAIR])
    with pytest.raises(DatasetError, match="no such file or folder") as error:
        load_preferences(name)
    assert repr(name) in one_line(error)


def test_names_that_no_file_can_have() -> None:
    with pytest.raises(UsageError, match="--dataset is empty"):
        load_preferences("")
    with pytest.raises(DatasetError, match="File name too long") as error:
        load_preferences("x" * 5000)
    one_line(error)


def test_hub_that_cannot_be_reached() -> None:
    with pytest.raises(
        DatasetError, match=r"'nobody/nothing' cannot be read: there is no file.*hf auth login"
    ) as error:
        load_preferences("nobody/nothing")
    one_line(error)


def test_hub_splits_and_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    """The Hub is played by the library's functions; a token in its message must not be shown."""
    monkeypatch.setattr(datasets, "load_dataset_builder", lambda name: None)  # some other format than Parquet
    splits = DatasetDict(train=Dataset.from_list([PAIR]), test=Dataset.from_list([PAIR, PAIR]))
    monkeypatch.setattr(datasets, "load_dataset", lambda name: splits)
    preferences = load_preferences("owner/name")
    assert (preferences.split, len(preferences)) == ("test", 2)
    assert preferences.fingerprint == splits["test"]._fingerprint

    def refuse(name: str) -> DatasetDict:
        raise ConnectionError(f"401\nfor {name} with hf_{'aB3' * 10}")

    for function in ("load_dataset", "load_dataset_builder"):
        monkeypatch.setattr(datasets, function, refuse)
        with pytest.raises(DatasetError) as error:
            load_preferences("owner/name")
        assert "aB3" not in one_line(error)


def test_folders_at_fault(tmp_path: Path) -> None:
    cases: list[tuple[str, Callable[[Path], object], str]] = [
        ("empty", lambda folder: folder.mkdir(), "it needs data files"),
        ("folder.jsonl", lambda folder: folder.mkdir(), "is a folder, not a file"),
        ("broken", lambda folder: (folder.mkdir(), (folder / "state.json").write_text("{")), "cannot be read"),
    ]
    for name, make, reason in cases:
        make(tmp_path / name)
        with pytest.raises(DatasetError, match=reason) as error:
            load_preferences(str(tmp_path / name))
        assert name in one_line(error)


def test_cache_that_is_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: object, **options: object) -> Dataset:
        raise OSError(28, "No space left on device", "/cache/x.arrow")

    monkeypatch.setattr(datasets, "load_dataset", full)
    with pytest.raises(StorageError, match=r"No space left on device.*HF_DATASETS_CACHE") as error:
        load_preferences(write(tmp_path / "a.jsonl", [PAIR]))
    one_line(error)


def test_shown_is_short_and_printable() -> None:
    assert shown("a\x1b[2J\n\u202eb") == r"'a\x1b[2J\n\u202eb'"
    assert len(shown("x" * 10_000)) <= 202
    assert len(shown({"k" * 900: ["v" * 900] * 900})) <= 300


# ---- some of the rows

TEXT_ROW = st.builds(lambda prompt: {**PAIR, "prompt": prompt}, st.sampled_from(["a", "b c", ""]))
MESSAGES_ROW = st.builds(
    lambda content: {"prompt": [user("q")], "chosen": [assistant(content)], "rejected": [assistant("b")]},
    st.sampled_from(["a", "b c", None]),
)


def assert_slices(preferences: PreferenceSet) -> None:
    whole = list(preferences.rows(on_error="skip"))
    assert [item.row for item in whole] == list(range(1, len(preferences) + 1))
    for start in range(len(preferences) + 2):
        assert list(preferences.rows(on_error="skip", start=start)) == whole[start:]
        for stop in range(start, len(preferences) + 2):
            assert list(preferences.rows(on_error="skip", start=start, stop=stop)) == whole[start:stop]


@given(st.one_of(st.lists(TEXT_ROW, min_size=1, max_size=6), st.lists(MESSAGES_ROW, min_size=1, max_size=6)))
@settings(max_examples=30)
def test_some_rows_are_a_slice_of_all(records: list[dict[str, Any]]) -> None:
    """Of text and of conversations, some of which cannot be used: an empty prompt, a message without content."""
    assert_slices(in_memory(*records))


@pytest.mark.parametrize("first", ["text", "messages", "neither"])
def test_what_kind_the_rows_are_of_is_for_the_whole_set_to_say(tmp_path: Path, first: str) -> None:
    """Rows of the kind that the first usable row is not are refused, wherever the reading begins."""
    messages = {"prompt": [user("q")], "chosen": [assistant("a")], "rejected": [assistant("b")]}
    unusable = {**PAIR, "chosen": 17}
    records = {
        "text": [PAIR, messages, PAIR, messages],
        "messages": [messages, PAIR, PAIR, messages],
        "neither": [unusable, unusable, messages, PAIR, unusable, messages],
    }[first]
    preferences = load_preferences(write(tmp_path / "a.jsonl", records))

    assert_slices(preferences)
    refused = [
        row for row in preferences.rows(on_error="skip") if isinstance(row, SkippedRow) and "where" in row.reason
    ]
    assert len(refused) == {"text": 2, "messages": 2, "neither": 1}[first]


def test_some_rows_where_rows_are_decoded_in_several_turns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dpo_fast.preferences, "ROWS_DECODED", 3)
    records = [{**PAIR, "prompt": f"{number}", "subset": number % 2} for number in range(8)]

    assert_slices(load_preferences(write(tmp_path / "a.jsonl", records), group_by="subset"))
    assert_slices(load_preferences(write(tmp_path / "a.jsonl", records), limit=7))


def test_some_rows_of_a_folder_of_several_files_and_of_chosen_rows(tmp_path: Path) -> None:
    """The library parts a saved set into files; and a selection is a list of numbers into another set."""
    whole = Dataset.from_list([{**PAIR, "prompt": f"{number}"} for number in range(7)])
    whole.save_to_disk(str(tmp_path / "saved"), num_shards=3)
    assert_slices(load_preferences(str(tmp_path / "saved")))
    whole.select([5, 1, 6]).save_to_disk(str(tmp_path / "chosen"))
    chosen = load_preferences(str(tmp_path / "chosen"))
    assert_slices(chosen)
    assert [row.prompt for row in chosen.rows() if isinstance(row, PreferenceRow)] == ["5", "1", "6"]


def test_a_bad_row_stops_only_who_reads_it() -> None:
    preferences = in_memory(PAIR, {**PAIR, "chosen": ""}, PAIR)

    assert [row.row for row in preferences.rows(start=2)] == [3]
    assert [row.row for row in preferences.rows(stop=1)] == [1]
    with pytest.raises(RowError, match="row 2: 'chosen' is empty"):
        list(preferences.rows(start=1, stop=2))


def test_bytes_that_are_no_text_are_found_where_they_are_read(tmp_path: Path) -> None:
    """The JSON loader lets them through."""
    (tmp_path / "a.jsonl").write_bytes(GOOD * 2 + GOOD.replace(b"Yes", b"Y\xe9s") + GOOD)
    preferences = load_preferences(str(tmp_path / "a.jsonl"))

    assert len(list(preferences.rows(stop=2))) == 2
    with pytest.raises(DatasetError, match="line 3 is not UTF-8: mend or remove it"):
        list(preferences.rows(start=2, stop=3))
