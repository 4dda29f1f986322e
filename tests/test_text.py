"""What other libraries say is shown on one line, without secrets."""

import pytest

from dpo_fast.errors import UsageError
from dpo_fast.text import SAID_CHARACTERS, named_line, one_line, reason_of, said_by, without_secrets


def test_one_line() -> None:
    assert one_line("a\n\x1b[31mb\t\u202ec\ud800") == "a [31mb c"
    assert one_line("x" * 130) == "x" * 119 + "…"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("GET https://me:hidden@host/a?Signature=hidden&b=1 'was' refused", "GET https://***@host/a?*** 'was' refused"),
        ("Authorization: Bearer hidden.token", "Authorization: Bearer ***"),
        ("token hf_hiddenhidden: 401", "token ***: 401"),
        ("s3://key@bucket/x", "s3://***@bucket/x"),
        ("is it so? yes", "is it so? yes"),
    ],
)
def test_secrets_are_taken_out(text: str, shown: str) -> None:
    assert without_secrets(text) == shown


def test_values_of_variables_that_are_named_like_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "a1b2c3d4e5")
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    assert without_secrets("a1b2c3d4e5 is false") == "*** is false"


def test_a_secret_is_taken_out_before_anything_is_cut_off() -> None:
    """Half a token is a secret too."""
    error = ValueError("x" * (SAID_CHARACTERS - 8) + " hf_hiddenhidden")
    assert "hid" not in said_by(error)
    assert "hid" not in named_line(error)
    assert named_line(ValueError("no")) == "ValueError: no"


def test_an_error_without_a_text_has_a_name() -> None:
    assert said_by(ConnectionResetError()) == "ConnectionResetError"


def test_the_reason_of_any_error() -> None:
    assert reason_of(UsageError("--limit 0")) == "--limit 0"
    assert reason_of(ValueError("no")) == "ValueError: no"
