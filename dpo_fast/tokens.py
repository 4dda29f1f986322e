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
    """Tokenise preferences lazily, in order; the same ids as `tokenize_pair`, faster for text.

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
        texts = [row for row in chunk if isinstance(row, PreferenceRow) and isinstance(row.prompt, str)]
        encoded_texts = iter(_encode_text(texts, tokenizer))
        for row in chunk:
            if isinstance(row, SkippedRow):
                yield row
                continue
            try:
                if isinstance(row.prompt, str):
                    encoded = next(encoded_texts)
                    if isinstance(encoded, RowError):
                        raise encoded
                else:
                    encoded = _encode_conversation(row, tokenizer)
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
    try:
        # verbose=False: no warning of sequences beyond the model's length, which `max_length` is there to cut.
        if tokenizer.is_fast:
            ids = tokenizer(texts, verbose=False)["input_ids"]
        else:
            ids = [tokenizer(text, verbose=False)["input_ids"] for text in texts]
    except Exception as error:
        if len(rows) == 1:
            return [RowError(rows[0].row, f"the tokenizer refuses its text: {shown(str(error))}")]
        return [encoded for row in rows for encoded in _encode_text([row], tokenizer)]
    return list(zip(ids[0::3], ids[1::3], ids[2::3], strict=True))


def _encode_conversation(row: PreferenceRow, tokenizer: "PreTrainedTokenizerBase") -> Encoded:
    """Render a conversation with the chat template and tokenise it."""
    if tokenizer.chat_template is None and "chat_template" not in row.chat_template_kwargs:
        raise CheckpointError(
            "the data set has conversations, but the tokenizer has no chat template: put the one that the model was "
            "trained with into the policy's folder as chat_template.jinja, or give the preferences as text"
        )
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
        # A template reports what it does not take (roles that do not alternate, a tool) by raising.
        message = shown(str(error)) if str(error) else type(error).__name__
        raise RowError(row.row, f"the chat template refuses it: {message}") from error


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
