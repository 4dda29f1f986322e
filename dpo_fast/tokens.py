"""Tokens: a preference's text as the token ids that TRL trains and evaluates on.

The rule is TRL's (trl/trainer/dpo_trainer.py 1.16, `_prepare_dataset` and `DataCollatorForPreference`). Three texts
are tokenised: the prompt alone, and the prompt with each completion. Text gets the end-of-sequence token after each
completion that does not end with it; conversations go through the chat template, which ends them itself.

The prompt alone need not be the beginning of the other two: tokens merge across the boundary, and a template's
generation prompt may differ from the turn that it opens. The completions start where the three part::

    prompt alone         p1 p2 p3 g            g: the end of the prompt that reads differently
    prompt + chosen      p1 p2 p3 c1 c2 c3 c4     when a completion follows
    prompt + rejected    p1 p2 p3 r1 r2
                        |prompt_ids|chosen_ids, rejected_ids

Then each sequence keeps its first `max_length` tokens ("keep_start")::

    max_length = 5       p1 p2 p3 c1 c2|c3 c4   cut off: truncated = True
                         p1 p2 p3 r1 r2|

A prompt that fills `max_length` leaves no completion. TRL drops such pairs silently; here they are errors, or skipped
rows with their reason.
"""

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from dpo_fast.errors import CheckpointError, RowError, UsageError
from dpo_fast.preferences import shown
from dpo_fast.types import Message, OnError, PreferenceRow, SkippedRow, TokenizedPair

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# The prompt alone, the prompt with the chosen and with the rejected completion.
Encoded = tuple[list[int], list[int], list[int]]

# Rows whose texts go to a fast tokenizer in one call; it encodes them one by one, in parallel, so the number changes
# only the speed.
ROWS_PER_CALL = 256
TEXTS_CHECKED = 3
# Arguments of `apply_chat_template` that change more than the text, or that are ours to give.
TOKENIZING_ARGUMENTS = frozenset(
    {
        "conversation", "tools", "add_generation_prompt", "tokenize", "sanitize_control_tokens", "padding",
        "truncation", "max_length", "return_tensors", "return_dict", "return_assistant_tokens_mask",
        "tokenizer_kwargs",
    }
)  # fmt: skip


def load_tokenizer(folder: str | Path, *, trust_remote_code: bool = False) -> "PreTrainedTokenizerBase":
    """Load the tokenizer of a checkpoint folder, without the network.

    Args:
        folder: a Transformers folder.
        trust_remote_code: run Python code that the folder brings with it.

    Raises:
        CheckpointError: no such folder, or no tokenizer in it that can be loaded.
    """
    if not Path(folder).is_dir():
        raise CheckpointError(f"{str(folder)!r}: no such folder; a tokenizer is loaded from a checkpoint's folder")

    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(
            str(folder), local_files_only=True, trust_remote_code=trust_remote_code
        )
    except Exception as error:
        hint = "save one there with tokenizer.save_pretrained"
        if "trust_remote_code" in str(error):
            hint = "it needs its own Python code; read that, then allow it with --trust-remote-code"
        raise CheckpointError(f"{str(folder)!r} has no tokenizer that loads: {hint} ({shown(str(error))})") from error
    # Some classes load without a vocabulary where its file is missing, and would then turn any text into no tokens.
    if len(tokenizer) <= len(tokenizer.all_special_ids):
        raise CheckpointError(f"{str(folder)!r}: the tokenizer has no vocabulary; copy tokenizer.json into the folder")
    return tokenizer


def tokenize_pair(row: PreferenceRow, tokenizer: "PreTrainedTokenizerBase", max_length: int | None) -> TokenizedPair:
    """Tokenise one preference; see the module's docstring for the rule.

    Args:
        row: the preference.
        tokenizer: the policy's tokenizer.
        max_length: the most tokens that prompt and one completion may have together; None for no limit.

    Returns:
        The pair's token ids, cut to `max_length`.

    Raises:
        RowError: the chat template refuses the row, or no token of a completion can be scored.
        CheckpointError: the tokenizer lacks the end-of-sequence token (text) or the chat template (conversations).
        UsageError: `max_length` below 1.
    """
    _check_max_length(max_length)
    if isinstance(row.prompt, str):
        encoded = _encode_text([row], tokenizer)[0]
        if isinstance(encoded, RowError):
            raise encoded
    else:
        encoded = _encode_conversation(row, tokenizer)
    return _pair(row, encoded, max_length)


def tokenize(
    rows: Iterable[PreferenceRow | SkippedRow],
    tokenizer: "PreTrainedTokenizerBase",
    *,
    max_length: int | None,
    on_error: OnError = "stop",
) -> Iterator[TokenizedPair | SkippedRow]:
    """Tokenise preferences lazily, in order; the same ids as `tokenize_pair`, faster.

    Args:
        rows: what `PreferenceSet.rows` gives; skipped rows are passed on.
        tokenizer: the policy's tokenizer.
        max_length: the most tokens that prompt and one completion may have together; None for no limit.
        on_error: at a row that cannot be used, "stop" raises; "skip" gives a `SkippedRow` in its place.

    Yields:
        One item for each of `rows`.

    Raises:
        RowError: as `tokenize_pair`, with `on_error="stop"`.
        CheckpointError, UsageError: as `tokenize_pair`, whatever `on_error` is.
    """
    _check_max_length(max_length)
    rows = iter(rows)
    while chunk := list(islice(rows, ROWS_PER_CALL)):
        usable = [row for row in chunk if isinstance(row, PreferenceRow)]
        texts = iter(_encode_text([row for row in usable if isinstance(row.prompt, str)], tokenizer))
        conversations = iter(
            _encode_conversations([row for row in usable if not isinstance(row.prompt, str)], tokenizer)
        )
        for row in chunk:
            if isinstance(row, SkippedRow):
                yield row
                continue
            try:
                encoded = next(texts if isinstance(row.prompt, str) else conversations)
                if isinstance(encoded, RowError):
                    raise encoded
                pair = _pair(row, encoded, max_length)
            except RowError as error:
                if on_error == "stop":
                    raise
                yield SkippedRow(error.row, error.reason)
            else:
                yield pair


def _check_max_length(max_length: int | None) -> None:
    if max_length is not None and max_length < 1:
        raise UsageError(f"--max-length {max_length} must be at least 1")


def _encode_text(rows: Sequence[PreferenceRow], tokenizer: "PreTrainedTokenizerBase") -> list[Encoded | RowError]:
    """Tokenise rows of text, all in one call; a row that the tokenizer refuses gives its error."""
    if not rows:
        return []
    eos = tokenizer.eos_token
    if eos is None:
        raise CheckpointError(
            "the tokenizer has no end-of-sequence token, which closes every completion of text: "
            "set eos_token in its tokenizer_config.json"
        )
    texts = []
    for row in rows:
        prompt = cast(str, row.prompt)
        texts.append(prompt)
        for completion in (cast(str, row.chosen), cast(str, row.rejected)):
            texts.append(prompt + (completion if completion.endswith(eos) else completion + eos))
    return _encode_rows(rows, texts, tokenizer, special_tokens=True)


def _encode_rows(
    rows: Sequence[PreferenceRow], texts: list[str], tokenizer: "PreTrainedTokenizerBase", *, special_tokens: bool
) -> list[Encoded | RowError]:
    """Tokenise three texts a row; a row that the tokenizer refuses gives its error."""
    try:
        ids = _encode_texts(texts, tokenizer, special_tokens=special_tokens)
    except Exception as error:
        if len(rows) == 1:
            return [RowError(rows[0].row, f"the tokenizer refuses its text: {shown(str(error))}")]
        return [
            encoded
            for index, row in enumerate(rows)
            for encoded in _encode_rows(
                [row], texts[3 * index : 3 * index + 3], tokenizer, special_tokens=special_tokens
            )
        ]
    return list(zip(ids[0::3], ids[1::3], ids[2::3], strict=True))


def _encode_texts(texts: list[str], tokenizer: "PreTrainedTokenizerBase", *, special_tokens: bool) -> list[list[int]]:
    """Token ids of many texts, as calling the tokenizer gives them.

    A fast tokenizer's own batch call leaves out what nobody reads here (offsets, attention masks), a fifth of the
    time. That it says what the tokenizer itself says is checked on the first texts of each call; which also turns
    truncation and padding off, should they be on.
    """
    arguments: dict[str, Any] = {"add_special_tokens": special_tokens, "verbose": False}  # no warning of long texts
    if not tokenizer.is_fast:
        return [tokenizer(text, **arguments)["input_ids"] for text in texts]
    first: list[list[int]] = tokenizer(texts[:TEXTS_CHECKED], **arguments)["input_ids"]
    if len(texts) <= TEXTS_CHECKED:
        return first
    backend: Any = tokenizer
    encoded = backend.backend_tokenizer.encode_batch_fast(texts, add_special_tokens=special_tokens)
    ids: list[list[int]] = [encoding.ids for encoding in encoded]
    if ids[:TEXTS_CHECKED] != first:
        return cast(list[list[int]], tokenizer(texts, **arguments)["input_ids"])
    return ids


def _encode_conversations(
    rows: Sequence[PreferenceRow], tokenizer: "PreTrainedTokenizerBase"
) -> list[Encoded | RowError]:
    """Render conversations one by one, and tokenise what can be tokenised together in one call."""
    from transformers import PreTrainedTokenizerBase

    together = type(tokenizer).apply_chat_template is PreTrainedTokenizerBase.apply_chat_template
    encoded: list[Encoded | RowError | None] = []
    rendered: list[PreferenceRow] = []
    texts: list[str] = []
    for row in rows:
        try:
            if together and TOKENIZING_ARGUMENTS.isdisjoint(row.chat_template_kwargs):
                texts += _render_conversation(row, tokenizer)
                rendered.append(row)
                encoded.append(None)
            else:
                encoded.append(_encode_conversation(row, tokenizer))
        except RowError as error:
            encoded.append(error)
    # A template writes the special tokens itself.
    waiting = iter(_encode_rows(rendered, texts, tokenizer, special_tokens=False) if rendered else [])
    return [next(waiting) if item is None else item for item in encoded]


def _render_conversation(row: PreferenceRow, tokenizer: "PreTrainedTokenizerBase") -> list[str]:
    """The prompt, and the prompt with each completion, as the chat template writes them."""
    _check_template(row, tokenizer)
    prompt = cast(list[Message], row.prompt)
    conversations = (prompt, prompt + cast(list[Message], row.chosen), prompt + cast(list[Message], row.rejected))
    try:
        texts = [
            tokenizer.apply_chat_template(
                messages,
                tokenize=False,
                tools=row.tools,
                **({"add_generation_prompt": True} if messages is prompt else {}),
                **row.chat_template_kwargs,
            )
            for messages in conversations
        ]
    except Exception as error:
        raise _refused(row, error) from error
    return cast(list[str], texts)


def _encode_conversation(row: PreferenceRow, tokenizer: "PreTrainedTokenizerBase") -> Encoded:
    """Render a conversation with the chat template and tokenise it."""
    _check_template(row, tokenizer)
    arguments: dict[str, Any] = {"tools": row.tools, "tokenizer_kwargs": {"verbose": False}, **row.chat_template_kwargs}
    prompt = cast(list[Message], row.prompt)

    def encode(messages: list[Message], **arguments: Any) -> list[int]:
        output: Any = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True, **arguments)
        ids = output["input_ids"]
        if not isinstance(ids, list) or not all(type(token) is int for token in ids):
            raise TypeError("chat_template_kwargs changes what the tokenizer returns")
        return ids

    try:
        return (
            encode(prompt, add_generation_prompt=True, **arguments),
            encode(prompt + cast(list[Message], row.chosen), **arguments),
            encode(prompt + cast(list[Message], row.rejected), **arguments),
        )
    except Exception as error:
        raise _refused(row, error) from error


def _check_template(row: PreferenceRow, tokenizer: "PreTrainedTokenizerBase") -> None:
    """Refuse conversations for which there is no template."""
    if tokenizer.chat_template is None and "chat_template" not in row.chat_template_kwargs:
        raise CheckpointError(
            "the data set has conversations, but the tokenizer has no chat template: put the one that the model was "
            "trained with into the policy's folder as chat_template.jinja, or give the preferences as text"
        )


def _refused(row: PreferenceRow, error: Exception) -> RowError:
    """What a template does not take (roles that do not alternate, a tool) it reports by raising."""
    message = shown(str(error)) if str(error) else type(error).__name__
    return RowError(row.row, f"the chat template refuses it: {message}")


def _pair(row: PreferenceRow, encoded: Encoded, max_length: int | None) -> TokenizedPair:
    """Part the sequences where the completions start, and cut them to `max_length` tokens."""
    prompt, prompt_chosen, prompt_rejected = encoded
    start = min(_common_prefix_length(prompt, prompt_chosen), _common_prefix_length(prompt, prompt_rejected))
    if max_length is not None and start >= max_length:
        raise RowError(
            row.row,
            f"its prompt has {start} tokens, which leaves no room for a completion in --max-length {max_length}: "
            "raise --max-length, or leave such rows out with --on-error skip",
        )
    pair = TokenizedPair(
        row=row.row,
        prompt_ids=prompt[:start],
        chosen_ids=prompt_chosen[start:max_length],
        rejected_ids=prompt_rejected[start:max_length],
        truncated=max_length is not None and max(len(prompt_chosen), len(prompt_rejected)) > max_length,
        group=row.group,
    )
    for name, ids in (("chosen", pair.chosen_ids), ("rejected", pair.rejected_ids)):
        # The first token of all follows nothing, so it cannot be scored.
        if not ids or start + len(ids) < 2:
            raise RowError(
                row.row, f"{name!r} has no token that can be scored: leave such rows out with --on-error skip"
            )
    return pair


def _common_prefix_length(ids: list[int], other: list[int]) -> int:
    """How many leading tokens two sequences share (TRL's `common_prefix_length`)."""
    pairs = zip(ids, other, strict=False)
    return next((index for index, (a, b) in enumerate(pairs) if a != b), min(len(ids), len(other)))
