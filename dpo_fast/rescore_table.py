"""A rescore as a person reads it in a terminal: losses down, betas across, each with what it is uncertain by."""

from dataclasses import asdict
from math import floor, log10
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from dpo_fast.table import ROWS, groups_table
from dpo_fast.text import one_line
from dpo_fast.types import LossSettings

LARGE = 1e6  # from here on numbers are written with an exponent
MOST_DECIMALS = 6

# A row of a table: its name and, for each beta, its value and interval, if it has one.
Row = tuple[str, list[tuple[float, list[float] | None]]]


def print_rescore(result: dict[str, Any], console: Console) -> None:
    """Print the losses and the rewards by beta, what depends on neither, and what is to be known of it all.

    Args:
        result: what `rescore` returned, with `notes`.
        console: where to; a table that is too wide is printed with fewer digits, without intervals, or in pieces.
    """
    names = dict(ROWS)
    provenance, counts, timing = result["provenance"], result["counts"], result["timing"]
    betas = result["betas"]
    losses = [
        (name, [(each["eval_loss"], each["interval"]) for each in result["results"] if each["loss_type"] == name])
        for name in result["loss_types"]
    ]
    rewards = [
        (name, [(each[key], each["intervals"][key]) for each in result["by_beta"]])
        for key, name in ROWS
        if "rewards" in key
    ]
    title = f"{one_line(provenance['dataset']['name'], 60)}, {result['pairs']:,} pairs: loss"
    _print_by_beta(title, losses, betas, console)
    _print_by_beta("rewards", rewards, betas, console)

    of_all = result["of_all"]
    table = _table("whatever the loss and beta")
    table.add_column("metric")
    table.add_column("key", style="dim")
    table.add_column("value", justify="right")
    table.add_column("95 % interval", justify="right")
    for key in (key for key, _ in ROWS if key in of_all):
        interval = of_all["intervals"].get(key)
        shown = f"{interval[0]:.4f} … {interval[1]:.4f}" if interval else ""
        table.add_row(names[key], key, f"{of_all[key]:.4f}", shown)
    console.print(table)
    if "groups" in result:
        groups = {name: {"pairs": group["pairs"], **group["by_beta"][0]} for name, group in result["groups"].items()}
        console.print(groups_table(groups, f"by group, at beta {betas[0]:g}; --json has their losses and other betas"))
    for note in result["notes"]:
        console.print(f"note: {note}", highlight=False, markup=False)
    defaults = asdict(LossSettings())
    settings = [f"{name} {value}" for name, value in provenance["settings"].items() if value != defaults[name]]
    facts = [
        f"{result['by_beta'][0]['ties']:,} ties",
        f"{counts['truncated']:,} pairs truncated",
        f"{counts['skipped']:,} rows skipped",
        f"aggregate {provenance['aggregate']}",
    ]
    console.print(", ".join([*facts, *settings]), highlight=False)
    console.print(
        f"{timing['total_seconds']:.1f} s: reading and summing {timing['read_seconds']:.1f}, losses and rewards "
        f"{timing['loss_seconds']:.1f}, intervals {timing['interval_seconds']:.1f}, groups "
        f"{timing['group_seconds']:.1f}",
        highlight=False,
    )


def _table(title: str) -> Table:
    # Names come from the user's data: as `Text`, their markup is not obeyed.
    style: dict[str, Any] = {"title_justify": "left", "header_style": "bold", "box": box.SIMPLE_HEAD}
    return Table(title=Text(title), padding=(0, 1, 0, 0), **style)


def _print_by_beta(title: str, rows: list[Row], betas: list[float], console: Console) -> None:
    """Print what fits: two digits of uncertainty, or one, or none; else the first half of the betas, then the other."""
    unlimited = console.options.update(max_width=10_000)
    for digits in (2, 1, 0):
        table = _table(f"{title}, {'± half the 95 % interval' if digits else '95 % intervals with --json'}")
        columns = [[name for name, _ in rows]]
        table.add_column("beta", no_wrap=True)
        for number, beta in enumerate(betas):
            header, *texts = _aligned([(f"{beta:g}", ""), *(_shown(*cells[number], digits) for _, cells in rows)])
            table.add_column(header, no_wrap=True)
            columns.append(texts)
        for row in zip(*columns, strict=True):
            table.add_row(*row)
        if console.measure(table, options=unlimited).maximum <= console.width or (digits == 0 and len(betas) == 1):
            console.print(table)
            return
    middle = (len(betas) + 1) // 2
    for half in (slice(0, middle), slice(middle, None)):
        _print_by_beta(title, [(name, cells[half]) for name, cells in rows], betas[half], console)


def _aligned(cells: list[tuple[str, str]]) -> list[str]:
    """Numbers and their uncertainties as one text each, all of one width."""
    number_width, spread_width = (max(map(len, texts)) for texts in zip(*cells, strict=True))
    if not spread_width:
        return [f"{number:>{number_width}}" for number, _ in cells]
    return [f"{number:>{number_width}} {spread:<{spread_width}}" for number, spread in cells]


def _shown(value: float, interval: list[float] | None, digits: int) -> tuple[str, str]:
    """A number, and half its interval to so many digits, if there are to be any; they say how exact the number is."""
    half = (interval[1] - interval[0]) / 2 if interval else 0.0
    if abs(value) >= LARGE:
        number, spread = f"{value:.4g}", f"±{half:.{max(digits, 1)}g}"
    else:
        decimals = 4 if abs(value) < 100 else 1
        if digits and half > 0:
            decimals = min(max(digits - 1 - floor(log10(half)), 0), MOST_DECIMALS)
        number, spread = f"{value:.{decimals}f}", f"±{max(half, 10**-decimals):.{decimals}f}"
    return number, spread if interval and digits else ""
