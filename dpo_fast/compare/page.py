"""A comparison as one page that opens without a network."""

from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader

from dpo_fast.compare.compare import MEANS
from dpo_fast.compare.summary import comparisons_of, runs_of, settings_of, tests_of
from dpo_fast.files import write_text
from dpo_fast.table import ROWS


def write_page(path: Path, result: dict[str, Any]) -> None:
    """Write the page.

    Args:
        path: the file to write.
        result: the content of compare.json.
    """
    names = dict(ROWS)
    # What comes from data (names of runs, of subsets, of data sets) is escaped.
    environment = Environment(loader=PackageLoader("dpo_fast", "compare"), autoescape=True, trim_blocks=True)
    page = environment.get_template("page.html.jinja").render(
        result=result,
        settings=settings_of(result),
        tests=tests_of(result),
        means=[names[metric] for metric in MEANS],
        runs=runs_of(result),
        comparisons=comparisons_of(result),
    )
    write_text(path, page)
