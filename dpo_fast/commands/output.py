"""What commands print: results on standard output, everything else on standard error."""

import json
import sys
from typing import TYPE_CHECKING, Any

import typer

from dpo_fast.text import one_line

if TYPE_CHECKING:
    from rich.console import Console

LONGEST_LINE = 2000  # characters on standard error, whatever an error quotes


def say(line: str) -> None:
    """A line on standard error, without line breaks and control characters that data might have smuggled in."""
    typer.echo(one_line(line, LONGEST_LINE), err=True)


def print_json(value: Any) -> None:
    """JSON on standard output, in ASCII, so that no terminal obeys what data say; NaN is a bug, not a value."""
    typer.echo(json.dumps(value, indent=2, allow_nan=False))


def console() -> "Console":
    """Where tables go."""
    from rich.console import Console

    # In a pipe there is no width to fit into: keep every column.
    return Console(width=None if sys.stdout.isatty() else 120)
