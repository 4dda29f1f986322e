"""Tokenisation: the very ids that TRL's own `DPOTrainer._prepare_dataset` and collator give."""

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from datasets import Dataset, load_dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from test_preferences import REAL_DATA, assistant, library_cache, one_line, user, write
from toy_tokenizers import CHAT_TEMPLATES, EOS, TEXT_TOKENIZERS, byte_bpe, chat
from transformers import PreTrainedTokenizer, PreTrainedTokenizerBase

from dpo_fast import tokens
from dpo_fast.errors import CheckpointError, RowError, UsageError
from dpo_fast.preferences import PreferenceSet, load_preferences
from dpo_fast.row_groups import RowGroups
from dpo_fast.tokens import load_tokenizer, tokenize, tokenize_pair
from dpo_fast.types import PreferenceRow, SkippedRow, TokenizedPair

__all__ = ["library_cache"]  # a fixture of all tests here

TEXT_ROWS = [
    {"prompt": "Human: how un", "chosen": "common it is", "rejected": "happy it is"},
    {"prompt": "The sky is ", "chosen": " blue.", "rejected": "the sea"},
    {"prompt": "The sky is", "chosen": f" blue{EOS}", "rejected": f" red{EOS} "},
    {"prompt": "def add(a, b):\n    ", "chosen": "    return a + b\n\n", "rejected": "return\n"},
    {"prompt": "你好 nai", "chosen": "̈ve 🙂", "rejected": "ve café[SEP]"},
    {"prompt": "a", "chosen": "a", "rejected": "a"},
    {"prompt": "\n", "chosen": "\n", "rejected": " "},
]
IMPLICIT_TEXT_ROWS = [
    {"chosen": row["prompt"] + row["chosen"], "rejected": row["prompt"] + row["rejected"]} for row in TEXT_ROWS
]
CHAT_ROWS = [
    {"prompt": [user("Is the sky blue?")], "chosen": [assistant("Yes.")], "rejected": [assistant("No, it is red.")]},
    {
        "prompt": [{"role": "system", "content": "Be brief."}, user("hi"), assistant("hello"), user("bye")],
        "chosen": [assistant("bye")],
        "rejected": [assistant("bye, bye"), user("?"), assistant("!")],
    },
    {"prompt": [user("q"), assistant("The sky")], "chosen": [assistant(" is")], "rejected": [assistant(" was")]},
]
IMPLICIT_CHAT_ROWS = [
    {"chosen": row["prompt"] + row["chosen"], "rejected": row["prompt"] + row["rejected"]} for row in CHAT_ROWS
]
WEATHER = {"type": "function", "function": {"name": "weather", "parameters": {"city": {"type": "string"}}}}
CLOCK = {"type": "function", "function": {"name": "clock", "parameters": {"zone": {"type": "string"}}}}
CALL = {
    "role": "assistant",
    "content": None,
    "tool_calls": [{"function": {"name": "weather", "arguments": {"city": "X"}}}],
}


def trl_pairs(dataset: Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int | None) -> list[TokenizedPair]:
    """What TRL evaluates: its preparation, then its collator's truncation, one pair a batch."""
    trl = pytest.importorskip("trl.trainer.dpo_trainer")
    numbered = dataset.add_column("number", list(range(1, len(dataset) + 1)))
    arguments = SimpleNamespace(max_length=max_length, truncation_mode="keep_start", dataset_num_proc=None)
    prepared = trl.DPOTrainer._prepare_dataset(
        SimpleNamespace(_tokenizer=tokenizer), numbered, tokenizer, arguments, "eval"
    )
    collator = trl.DataCollatorForPreference(pad_token_id=0, max_length=max_length)
    pairs = []
    for example in prepared:
        batch = collator([example])
        prompt, completions = None, []
        for ids, attention, completion in zip(
            batch["input_ids"], batch["attention_mask"], batch["completion_mask"], strict=True
        ):
            prompt = ids[(attention == 1) & (completion == 0)].tolist()
            completions.append(ids[completion == 1].tolist())
        uncut = [len(example["prompt_ids"]) + len(example[name]) for name in ("chosen_ids", "rejected_ids")]
        cut = [len(prompt) + len(ids) for ids in completions]
        pairs.append(TokenizedPair(example["number"], prompt, *completions, truncated=cut != uncut))
    return pairs


def our_pairs(
    preferences: PreferenceSet, tokenizer: PreTrainedTokenizerBase, max_length: int | None
) -> list[TokenizedPair]:
    """Ours; rows that `max_length` leaves without a completion are dropped, as TRL drops them."""
    pairs = list(tokenize(preferences.rows(), tokenizer, max_length=max_length, on_error="skip"))
    assert [pair.row for pair in pairs] == list(range(1, len(preferences) + 1))
    return [pair for pair in pairs if isinstance(pair, TokenizedPair)]


def in_memory(rows: list[dict[str, Any]]) -> PreferenceSet:
    return PreferenceSet("memory", None, Dataset.from_list(rows), "fingerprint")


def assert_as_trl(
    preferences: PreferenceSet, tokenizer: PreTrainedTokenizerBase, max_length: int | None = None
) -> None:
    ours = our_pairs(preferences, tokenizer, max_length)
    dataset = preferences.dataset
    if isinstance(dataset, RowGroups):  # TRL's users have it from the library
        dataset = load_dataset("parquet", data_files=preferences.name, split="train")
    assert ours == trl_pairs(dataset, tokenizer, max_length)
    if max_length is None:
        assert len(ours) == len(preferences), "a row was left out of the comparison"


# ---- equality with TRL


@pytest.mark.parametrize("rows", [TEXT_ROWS, IMPLICIT_TEXT_ROWS], ids=["explicit", "implicit"])
@pytest.mark.parametrize("name", TEXT_TOKENIZERS)
def test_text(name: str, rows: list[dict[str, Any]]) -> None:
    assert_as_trl(in_memory(rows), TEXT_TOKENIZERS[name]())


@pytest.mark.parametrize("max_length", [2, 3, 5, 8, 13, 1024])
@pytest.mark.parametrize("name", TEXT_TOKENIZERS)
def test_truncation(name: str, max_length: int) -> None:
    assert_as_trl(in_memory(TEXT_ROWS), TEXT_TOKENIZERS[name](), max_length)


@pytest.mark.parametrize("max_length", [None, 12, 30])
@pytest.mark.parametrize("rows", [CHAT_ROWS, IMPLICIT_CHAT_ROWS], ids=["explicit", "implicit"])
@pytest.mark.parametrize("template", ["plain", "thought", "no boundary", "tools"])
def test_conversations(template: str, rows: list[dict[str, Any]], max_length: int | None) -> None:
    assert_as_trl(in_memory(rows), chat(template), max_length)


@pytest.mark.parametrize("tools", [[WEATHER], json.dumps([WEATHER]), [WEATHER, CLOCK], []])
@pytest.mark.parametrize("implicit", [False, True])
def test_tools_and_template_arguments(tools: Any, implicit: bool, tmp_path: Path) -> None:
    """Arrow's fillings included: `tool_calls` in some messages, `city` in some tools, `style` in some rows."""
    rows = [
        {"prompt": [user("rain?")], "chosen": [CALL, assistant("Yes.")], "rejected": [assistant("No.")]},
        {"prompt": [user("sun?")], "chosen": [assistant("Yes.")], "rejected": [assistant("No."), CALL]},
    ]
    if implicit:
        rows = [{key: row["prompt"] + row[key] for key in ("chosen", "rejected")} for row in rows]
    rows[0] |= {"tools": tools, "chat_template_kwargs": {"enable_thinking": False, "style": "dry"}}
    rows[1] |= {"tools": tools[:1] if isinstance(tools, list) else tools, "chat_template_kwargs": {"style": "wet"}}
    for name in ("a.jsonl", "a.parquet"):
        preferences = load_preferences(write(tmp_path / name, rows))
        tokenizer = chat("tools")
        assert_as_trl(preferences, tokenizer)
        if tools:
            [first, _] = our_pairs(preferences, tokenizer, None)
            rendered = tokenizer.decode(first.prompt_ids + first.chosen_ids)
            assert "weather" in rendered
            assert "dry" in rendered


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        (name, kind)
        for name in ("a.jsonl", "a.jsonl.gz", "a.json", "a.parquet", "a.csv")
        for kind in ("text", "implicit text", "chat", "implicit chat")
        if not (name == "a.csv" and "chat" in kind)  # CSV has no lists
    ],
)
def test_files(name: str, kind: str, tmp_path: Path) -> None:
    """TRL is given the data set that `load_dataset` makes of the same file."""
    rows = {
        "text": TEXT_ROWS[:5],
        "implicit text": IMPLICIT_TEXT_ROWS[:5],
        "chat": CHAT_ROWS,
        "implicit chat": IMPLICIT_CHAT_ROWS,
    }[kind]
    tokenizer = chat("thought") if "chat" in kind else byte_bpe()
    path = write(tmp_path / name, rows)
    loader = {"jsonl": "json", "json": "json", "gz": "json"}.get(name.split(".")[-1], name.split(".")[-1])
    expected = trl_pairs(load_dataset(loader, data_files=path, split="train"), tokenizer, 40)
    assert our_pairs(load_preferences(path), tokenizer, 40) == expected
    assert expected


@pytest.mark.real_data
@pytest.mark.skipif(not REAL_DATA.exists(), reason="the real preference pairs are not beside the project")
@pytest.mark.parametrize("max_length", [None, 512])
def test_real_data(max_length: int | None) -> None:
    assert_as_trl(load_preferences(str(REAL_DATA), limit=200), byte_bpe(), max_length)


any_text = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=20)
wordlike = st.lists(
    st.sampled_from(["un", "common", " ", "  ", "\n", "The", " sky", EOS, "🙂", "é", "[SEP]", "</s>"]), min_size=1
)
some_text = st.one_of(any_text, wordlike.map("".join))


@pytest.mark.parametrize("name", TEXT_TOKENIZERS)
@given(rows=st.lists(st.tuples(some_text, some_text, some_text), min_size=1, max_size=8), length=st.integers(2, 40))
@settings(max_examples=25)
def test_random_text(name: str, rows: list[tuple[str, str, str]], length: int) -> None:
    records = [dict(zip(("prompt", "chosen", "rejected"), row, strict=True)) for row in rows]
    assert_as_trl(in_memory(records), TEXT_TOKENIZERS[name](), length)


@given(rows=st.lists(st.tuples(some_text, some_text, some_text), min_size=1, max_size=8))
@settings(max_examples=25)
def test_random_conversations(rows: list[tuple[str, str, str]]) -> None:
    records = [
        {"prompt": [user(prompt)], "chosen": [assistant(chosen)], "rejected": [assistant(rejected)]}
        for prompt, chosen, rejected in rows
    ]
    assert_as_trl(in_memory(records), chat("no boundary"))


# ---- what must hold whatever the tokenizer


@pytest.mark.parametrize("name", TEXT_TOKENIZERS)
@pytest.mark.parametrize("rows_per_call", [1, 3, 256])
def test_batches_never_change_a_pair(name: str, rows_per_call: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokens, "ROWS_PER_CALL", rows_per_call)
    tokenizer = TEXT_TOKENIZERS[name]()
    rows = list(in_memory(TEXT_ROWS).rows())
    assert list(tokenize(rows, tokenizer, max_length=None)) == [tokenize_pair(row, tokenizer, None) for row in rows]


def test_completion_starts_where_tokens_part() -> None:
    """The prompt's "un" and the completion's "common" are one token, which goes to the completion."""
    tokenizer = byte_bpe()
    pair = tokenize_pair(PreferenceRow(1, "Human: how un", "common", "happy"), tokenizer, None)
    assert tokenizer.decode(pair.prompt_ids) == "Human: how"
    assert tokenizer.decode(pair.chosen_ids) == " uncommon" + EOS
    assert tokenizer.decode(pair.rejected_ids) == " unhappy" + EOS


def test_empty_prompt_where_everything_merges() -> None:
    """The prompt "Huma" and the completion "n" are one token, so nothing is shared; allowed, as in TRL."""
    pair = tokenize_pair(PreferenceRow(1, "Huma", "n", "n"), byte_bpe(), None)
    assert pair.prompt_ids == []
    assert len(pair.chosen_ids) == 2  # "Human" and the end of sequence


def test_end_of_sequence_is_added_once() -> None:
    tokenizer = byte_bpe()
    pair = tokenize_pair(PreferenceRow(1, "a ", "b", f"b{EOS}", group="g"), tokenizer, None)
    assert pair.chosen_ids == pair.rejected_ids
    assert pair.chosen_ids.count(tokenizer.eos_token_id) == 1
    assert pair.group == "g"


def test_generation_prompt_that_the_conversation_lacks() -> None:
    tokenizer = chat("thought")
    pair = tokenize_pair(PreferenceRow(1, [user("q")], [assistant("a")], [assistant("b")]), tokenizer, None)
    assert tokenizer.decode(pair.prompt_ids) == "<|user|>\nq<|end|>\n<|assistant|>\n"


def test_slow_tokenizer() -> None:
    """A tokenizer without a Rust backend is called text by text."""

    class Characters(PreTrainedTokenizer):
        vocab_size = 128

        def get_vocab(self) -> dict[str, int]:
            return {chr(code): code for code in range(128)} | self.added_tokens_encoder

        def _tokenize(self, text: str, **kwargs: object) -> list[str]:
            return list(text)

        def _convert_token_to_id(self, token: str) -> int:
            return ord(token)

        def _convert_id_to_token(self, index: int) -> str:
            return chr(index)

    tokenizer = Characters(eos_token=EOS)
    assert not tokenizer.is_fast
    assert_as_trl(in_memory([{"prompt": "ab ", "chosen": "cd", "rejected": "e"}] * 2), tokenizer)


def test_no_warning_of_long_sequences(caplog: pytest.LogCaptureFixture) -> None:
    """`max_length` cuts what is too long for the model; the tokenizer's warning would say otherwise."""
    logger = logging.getLogger("transformers")
    logger.addHandler(caplog.handler)
    try:
        for row in (
            PreferenceRow(1, "a " * 50, "b", "c"),
            PreferenceRow(1, [user("a " * 50)], [assistant("b")], [assistant("c")]),
        ):
            tokenizer = byte_bpe(model_max_length=8)
            tokenizer.chat_template = CHAT_TEMPLATES["plain"]
            tokenize_pair(row, tokenizer, None)
            assert caplog.records == []
            tokenizer("a " * 50)
            assert "Token indices sequence length" in caplog.text, "the warning is no longer what it was"
            caplog.clear()
    finally:
        logger.removeHandler(caplog.handler)


def test_lazy_and_in_order() -> None:
    """Only one call's rows are read ahead, and skipped rows keep their place."""
    taken = []

    def rows() -> Iterator[PreferenceRow | SkippedRow]:
        for number in range(1, 1001):
            taken.append(number)
            yield SkippedRow(number, "bad") if number % 2 else PreferenceRow(number, "a ", "b", "c")

    pairs = tokenize(rows(), byte_bpe(), max_length=None)
    assert next(pairs) == SkippedRow(1, "bad")
    assert len(taken) == tokens.ROWS_PER_CALL
    assert [pair.row for pair in pairs] == list(range(2, 1001))


# ---- what is refused


def refused(row: PreferenceRow, tokenizer: PreTrainedTokenizerBase, max_length: int | None = None) -> str:
    """The RowError's message, after checking that `tokenize` skips the row for the same reason and goes on."""
    with pytest.raises(RowError) as error:
        tokenize_pair(row, tokenizer, max_length)
    message = one_line(error)
    assert message.startswith(f"row {row.row}: ")
    with pytest.raises(RowError):
        list(tokenize([row], tokenizer, max_length=max_length))
    good = PreferenceRow(99, *(("a", "b", "c") if isinstance(row.prompt, str) else CHAT_ROWS[0].values()))
    first, second, third = tokenize([good, row, good], tokenizer, max_length=max_length, on_error="skip")
    assert second == SkippedRow(row.row, error.value.reason)
    assert first == third
    return message


def test_prompt_that_fills_max_length() -> None:
    row = PreferenceRow(7, "a a a a a", " b", " c")
    length = len(tokenize_pair(row, byte_bpe(), None).prompt_ids)
    message = refused(row, byte_bpe(), length)
    assert f"its prompt has {length} tokens" in message
    assert f"--max-length {length}: raise --max-length, or leave such rows out with --on-error skip" in message
    kept = tokenize_pair(row, byte_bpe(), length + 1)
    assert (len(kept.chosen_ids), len(kept.rejected_ids), kept.truncated) == (1, 1, True)


def test_nothing_to_score() -> None:
    """The only token left is the first of all, which nothing precedes."""
    row = PreferenceRow(3, "Huma", "n", "n")
    with pytest.raises(RowError, match="row 3: 'chosen' has no token that can be scored"):
        tokenize_pair(row, byte_bpe(), 1)
    silent = PreferenceRow(4, [user("q")], [assistant("a")], [assistant("")])
    with pytest.raises(RowError, match="row 4: 'rejected' has no token that can be scored"):
        tokenize_pair(silent, chat("no boundary"), None)
    deaf = PreferenceRow(4, [user("q")], [assistant("a")], [assistant("b")])
    with pytest.raises(RowError, match="row 4: 'chosen' has no token that can be scored"):
        tokenize_pair(deaf, chat("deaf"), None)


def test_template_that_raises() -> None:
    row = PreferenceRow(5, [user("q"), user("r")], [assistant("a")], [assistant("b")])
    message = refused(row, chat("alternating"))
    assert "the chat template refuses it: 'Roles must alternate user/assistant" in message


@pytest.mark.parametrize(
    "arguments",
    [{"add_generation_prompt": False}, {"tokenize": False}, {"return_tensors": "np"}, {"chat_template": "{{ x.y.z }}"}],
)
def test_template_arguments_that_break_it(arguments: dict[str, Any]) -> None:
    row = PreferenceRow(6, [user("q")], [assistant("a")], [assistant("b")], chat_template_kwargs=arguments)
    assert "the chat template refuses it" in refused(row, chat())


def test_text_that_the_tokenizer_refuses() -> None:
    """Half a surrogate pair is no text; one such row must not take its batch with it."""
    assert "the tokenizer refuses its text" in refused(PreferenceRow(8, "a", "\ud800", "b"), byte_bpe())


def test_tokenizer_without_what_the_data_needs() -> None:
    text = PreferenceRow(1, "a", "b", "c")
    messages = PreferenceRow(1, [user("q")], [assistant("a")], [assistant("b")])
    for row, tokenizer, reason in (
        (text, byte_bpe(eos_token=None), "no end-of-sequence token"),
        (messages, byte_bpe(), "no chat template"),
    ):
        with pytest.raises(CheckpointError, match=reason) as error:
            tokenize_pair(row, tokenizer, None)
        one_line(error)
        with pytest.raises(CheckpointError, match=reason):
            list(tokenize([row], tokenizer, max_length=None, on_error="skip"))
    own = PreferenceRow(1, *CHAT_ROWS[0].values(), chat_template_kwargs={"chat_template": CHAT_TEMPLATES["plain"]})
    assert tokenize_pair(own, byte_bpe(), None) == tokenize_pair(PreferenceRow(1, *CHAT_ROWS[0].values()), chat(), None)


def test_max_length_below_one() -> None:
    with pytest.raises(UsageError, match="--max-length 0 must be at least 1"):
        tokenize_pair(PreferenceRow(1, "a", "b", "c"), byte_bpe(), 0)
    with pytest.raises(UsageError, match="--max-length -1 must be at least 1"):
        list(tokenize([], byte_bpe(), max_length=-1))


# ---- loading


def test_load_tokenizer(tmp_path: Path) -> None:
    saved = chat("thought")
    saved.save_pretrained(tmp_path)
    loaded = load_tokenizer(tmp_path)
    row = PreferenceRow(1, *CHAT_ROWS[1].values())
    assert tokenize_pair(row, loaded, None) == tokenize_pair(row, saved, None)
    assert loaded.eos_token == EOS


def test_tokenizer_folders_at_fault(tmp_path: Path) -> None:
    def folder(name: str, **files: str) -> Path:
        (tmp_path / name).mkdir()
        for file, content in files.items():
            (tmp_path / name / f"{file}.json").write_text(content)
        return tmp_path / name

    remote = folder("remote", tokenizer_config=json.dumps({"auto_map": {"AutoTokenizer": ["code.Mine", None]}}))
    (remote / "code.py").write_text("raise SystemExit('the code of the folder ran')")
    cases = [
        (tmp_path / "missing", "no such folder"),
        (folder("empty"), "has no tokenizer that loads"),
        (folder("broken", tokenizer='{"a":', config="{}"), "has no tokenizer that loads"),
        (folder("bare", config='{"model_type": "gpt2"}'), "the tokenizer has no vocabulary"),
        (remote, "allow it with --trust-remote-code"),
    ]
    for path, reason in cases:
        with pytest.raises(CheckpointError, match=reason) as error:
            load_tokenizer(path)
        assert path.name in one_line(error)
