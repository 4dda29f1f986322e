"""Token ids back to text: the pieces joined are the text, and every token has one."""

import pytest
import toy_tokenizers

from dpo_fast.report.texts import TokenTexts

TEXTS = [
    "The sky is blue, and so is the sea.",
    "  two spaces,\n\ttabs\n\nand lines \n",
    "naïve café 你好 мир 🙂👩‍👩‍👧 end",
    "🙂",
    "",
]


@pytest.mark.parametrize("text", TEXTS)
def test_pieces_joined_are_the_text(text: str) -> None:
    tokenizer = toy_tokenizers.byte_bpe()
    ids = tokenizer(text)["input_ids"]
    pieces = TokenTexts(tokenizer)(ids)

    assert "".join(pieces) == text
    assert len(pieces) == len(ids)


@pytest.mark.parametrize("name", ["wordpiece", "metaspace", "with_bos"])
def test_spaces_are_where_the_tokenizer_puts_them(name: str) -> None:
    """A first token of a decoded text loses its space; a completion's first token must not."""
    tokenizer = toy_tokenizers.TEXT_TOKENIZERS[name]()
    ids = tokenizer("the rain is blue", add_special_tokens=False)["input_ids"]
    pieces = TokenTexts(tokenizer)(ids)

    assert "".join(pieces).strip() == tokenizer.decode(ids).strip()
    assert "".join(TokenTexts(tokenizer)(ids[1:])) == "".join(pieces[1:])


def test_a_character_of_several_tokens_belongs_to_the_last_of_them() -> None:
    tokenizer = toy_tokenizers.byte_bpe()
    ids = tokenizer("a猫b")["input_ids"]  # not in the corpus: three bytes, three tokens
    assert len(ids) == 5

    assert TokenTexts(tokenizer)(ids) == ["a", "", "", "猫", "b"]


def test_a_text_that_was_cut_within_a_character_ends_with_what_is_left_of_it() -> None:
    tokenizer = toy_tokenizers.byte_bpe()
    ids = tokenizer("a猫")["input_ids"][:-1]

    assert TokenTexts(tokenizer)(ids) == ["a", "", "\N{REPLACEMENT CHARACTER}"]


def test_bytes_that_are_no_character_hold_up_nothing() -> None:
    tokenizer = toy_tokenizers.byte_bpe()
    broken = tokenizer("猫")["input_ids"][0]
    pieces = TokenTexts(tokenizer)([broken] * 20 + tokenizer("end")["input_ids"])

    assert "".join(pieces).endswith("end")


def test_special_tokens_are_shown() -> None:
    tokenizer = toy_tokenizers.byte_bpe()

    assert TokenTexts(tokenizer)([tokenizer.eos_token_id]) == [toy_tokenizers.EOS]
