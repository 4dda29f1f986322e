"""A comparison as a person reads it in a terminal."""

from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from dpo_fast.compare.compare import MEANS
from dpo_fast.compare.summary import DifferenceRow, comparisons_of, runs_of, settings_of, tests_of
from dpo_fast.table import ROWS
from dpo_fast.text import one_line


def print_comparison(result: dict[str, Any], console: Console) -> None:
    """Print each run's numbers, the differences with their tests, those by subset, and what is to be known of them.

    Args:
        result: what `compare` returned.
        console: where to.
    """
    names = dict(ROWS)
    dataset = one_line(result["provenance"]["dataset"]["name"], 60)
    headers = ("reward accuracy", "95 % interval", *(names[metric] for metric in MEANS))
    table = _table(f"{dataset}, {result['pairs']:,} pairs, {settings_of(result)}", "run", *headers)
    for run in runs_of(result):
        table.add_row(_name(run.name), run.accuracy, run.interval, *run.means)
    console.print(table)
    for comparison in comparisons_of(result):
        title = f"{one_line(comparison.run, 50)} against {one_line(comparison.against, 50)}"
        table = _table(title, "metric", "difference", "95 % interval", "p", "p (Holm)")
        for row in comparison.differences:
            table.add_row(row.metric, _marked(row), row.interval, row.p, row.p_holm)
        console.print(table)
        console.print(comparison.changed, highlight=False, soft_wrap=True)
        if comparison.subsets:
            headers = ("pairs", "accuracy", "95 % interval", "p (Holm)", "margin", "95 % interval", "p (Holm)")
            table = _table(f"{title}, by subset", "subset", *headers)
            for subset in comparison.subsets:
                cells = [
                    cell
                    for part in (subset.accuracy, subset.margin)
                    for cell in (_marked(part), part.interval, part.p_holm)
                ]
                table.add_row(_name(subset.subset), subset.pairs, *cells)
            console.print(table)
    for note in result["notes"]:
        console.print(Text(f"note: {one_line(note, 500)}"), soft_wrap=True)
    console.print(tests_of(result), highlight=False, soft_wrap=True)


def _table(title: str, first: str, *others: str) -> Table:
    # Names come from the user's data: as `Text`, their markup is not obeyed.
    table = Table(title=Text(title), title_justify="left", header_style="bold")
    table.add_column(first)
    for header in others:
        table.add_column(header, justify="right")
    return table


def _marked(row: DifferenceRow) -> Text:
    return Text(row.difference, "bold" if row.significant else "")


def _name(text: str) -> Text:
    return Text(one_line(text, 40))
