"""Samples side by side in a terminal."""

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from dpo_fast.generation.files import Sample
from dpo_fast.text import one_line

SHOWN = 600  # characters of a text


def print_samples(samples: Sequence[Sample], console: Console) -> None:
    """Print prompts and completions; … stands where the limit of tokens cut one off, or the table a long text.

    Args:
        samples: what was generated.
        console: where to.
    """
    with_reference = any(sample.reference is not None for sample in samples)
    table = Table(header_style="bold", show_lines=True)
    table.add_column("row", justify="right")
    for name in ("prompt", "policy", "reference")[: 3 if with_reference else 2]:
        table.add_column(name, ratio=1, overflow="fold")
    for sample in samples:
        # As `Text`, markup in the data is not obeyed; on one line, neither are control characters.
        cells = [_shown(sample.prompt, True), _shown(sample.policy, sample.policy_finished)]
        if sample.reference is not None:
            cells.append(_shown(sample.reference, bool(sample.reference_finished)))
        table.add_row(str(sample.row), *cells)
    console.print(table)


def _shown(text: str, finished: bool) -> Text:
    line = one_line(text, SHOWN)
    return Text(line if finished or line.endswith("…") else f"{line} …")
