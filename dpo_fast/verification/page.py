"""A verification as one page that opens without a network."""

from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader

from dpo_fast.files import write_text
from dpo_fast.verification.summary import checks_of, chosen_limits, pairs_of, sizes_of, slices_of

SHOWN_FLIPS = 200  # the clearest ones; verify.json has all


def write_page(path: Path, result: dict[str, Any]) -> None:
    """Write the page.

    Args:
        path: the file to write.
        result: the content of verify.json.
    """
    # What comes from data (names of subsets, of data sets) is escaped.
    environment = Environment(loader=PackageLoader("dpo_fast", "verification"), autoescape=True, trim_blocks=True)
    flips = [] if result["decisions"] is None else result["decisions"]["flips"]
    page = environment.get_template("page.html.jinja").render(
        result=result,
        pairs=pairs_of(result),
        checks=checks_of(result),
        limits=chosen_limits(result["tolerance"], result["provenance"]["precision"]),
        sizes=sizes_of(result),
        slices=slices_of(result),
        positions=[] if result["drift"] is None else result["drift"]["by_position"],
        flips=flips[:SHOWN_FLIPS],
        more_flips=max(len(flips) - SHOWN_FLIPS, 0),
    )
    write_text(path, page)
