"""Text that comes from data or from other people's messages, before a person sees it."""

SHOWN_CHARACTERS = 120


def one_line(value: object, limit: int = SHOWN_CHARACTERS) -> str:
    """Foreign text as one line, shortened to `limit` characters, fit for YAML, HTML and terminals.

    Control characters, line breaks, marks that turn the writing direction and lone surrogates become spaces.
    """
    text = " ".join("".join(character if character.isprintable() else " " for character in str(value)).split())
    return text if len(text) <= limit else text[: limit - 1] + "…"
