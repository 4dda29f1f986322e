"""Text that comes from data or from other people's messages, before a person sees it."""

import os
import re

from dpo_fast.errors import DpoFastError

SHOWN_CHARACTERS = 120
SAID_CHARACTERS = 300  # of another library's message: enough for its reason

_SECRET_NAME = re.compile(r"KEY|TOKEN|SECRET|PASSWORD")
SECRET_CHARACTERS = 8  # shorter values of such variables are words like "true"
_TOKEN = re.compile(r"hf_[A-Za-z0-9]{4,}|(?<=Bearer )\S+")
_CREDENTIALS = re.compile(r"(?<=://)[^/@\s]+@")
_QUERY = re.compile(r"(://[^\s?'\"]*)\?[^\s'\"]*")


def one_line(value: object, limit: int = SHOWN_CHARACTERS) -> str:
    """Foreign text as one line, shortened to `limit` characters, fit for YAML, HTML and terminals.

    Control characters, line breaks, marks that turn the writing direction and lone surrogates become spaces.
    """
    text = " ".join("".join(character if character.isprintable() else " " for character in str(value)).split())
    return text if len(text) <= limit else text[: limit - 1] + "…"


def said_by(error: BaseException, limit: int = SAID_CHARACTERS) -> str:
    """What another library's error says, for a message of ours: on one line, without secrets; never nothing."""
    return one_line(without_secrets(str(error)), limit) or type(error).__name__


def named_line(error: BaseException) -> str:
    """The same with the error's class first, where what it says alone may say nothing."""
    return one_line(without_secrets(f"{type(error).__name__}: {error}"), SAID_CHARACTERS)


def reason_of(error: BaseException) -> str:
    """What any error says: ours are for people, of others the class may say more than the text."""
    return str(error) if isinstance(error, DpoFastError) else named_line(error)


def without_secrets(text: str) -> str:
    """Another library's message without what must not be shown; taken out whole, before anything is cut off.

    That is: tokens of the Hub and of `Authorization` headers, users, passwords and queries of URLs, and the values of
    environment variables that are named like secrets.
    """
    for name, value in os.environ.items():
        if len(value) >= SECRET_CHARACTERS and _SECRET_NAME.search(name.upper()):
            text = text.replace(value, "***")
    return _QUERY.sub(r"\1?***", _CREDENTIALS.sub("***@", _TOKEN.sub("***", text)))
