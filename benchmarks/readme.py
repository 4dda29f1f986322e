"""Tables between the marks of a README."""

from pathlib import Path

from dpo_fast.errors import UsageError
from dpo_fast.files import write_text


def write_between(readme: Path, begin: str, end: str, tables: str) -> None:
    """Put tables between two marks, in the place of what is there.

    Raises:
        UsageError: the README has no such marks, or cannot be read.
    """
    try:
        text = readme.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{readme}: cannot be read ({error}); name a README") from error
    before, found_begin, rest = text.partition(begin)
    _, found_end, behind = rest.partition(end)
    if not found_begin or not found_end:
        raise UsageError(f"{readme}: has no {begin} … {end}; put these two lines where the tables are to be")
    write_text(readme, f"{before}{begin}\n\n{tables}\n\n{end}{behind}")
