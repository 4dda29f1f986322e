"""A verification as a person reads it in a terminal."""

from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from dpo_fast.text import one_line
from dpo_fast.verification.bisect import describe_layer
from dpo_fast.verification.summary import checks_of, chosen_limits, pairs_of, sizes_of, slices_of

STYLES = {"pass": "green", "fail": "bold red", "cannot tell": "yellow"}


def print_verification(result: dict[str, Any], console: Console) -> None:
    """Print the checks, the sizes of the errors beside the original's own, drift by subset and length, and the verdict.

    Args:
        result: the content of verify.json.
        console: where to.
    """
    provenance = result["provenance"]
    # Names come from the user's data: as `Text`, their markup is not obeyed.
    title = Text(
        f"{provenance['engine']}, {provenance['precision']}, against {provenance['original']}: "
        f"{pairs_of(result)} of {one_line(provenance['dataset']['name'], 60)}"
    )
    console.print(title, soft_wrap=True)
    for limit in chosen_limits(result["tolerance"], provenance["precision"]):
        console.print(Text(f"limit by choice: {limit}"), soft_wrap=True)
    table = Table(header_style="bold")
    for column in ("check", "value", "95 % interval", "limit", "outcome"):
        table.add_column(column, justify="left" if column in ("check", "outcome") else "right")
    for row in checks_of(result):
        style = STYLES[row.outcome.lower()]
        table.add_row(row.name, row.value, row.interval, row.limit, Text(row.outcome, style))
    console.print(table)
    sizes = sizes_of(result)
    if sizes:
        table = Table(title="how far from the original in float32", title_justify="left", header_style="bold")
        table.add_column("error of a")
        for column in ("engine", "original, one row a batch", "original, own precision"):
            table.add_column(column, justify="right")
        for size in sizes:
            table.add_row(size.name, size.engine, size.reshaped, size.rounded)
        console.print(table)
        table = Table(title="by subset and length", title_justify="left", header_style="bold")
        for column in ("", "pairs", "token error", "margin error", "flips", "accuracy change", "95 % interval"):
            table.add_column(column, justify="right" if column else "left")
        for part in slices_of(result):
            name = Text(one_line(f"{part.name} tokens" if part.kind == "length" else part.name, 60))
            table.add_row(
                name,
                f"{part.pairs:,}",
                part.token_error,
                part.margin_error,
                str(part.flips),
                part.accuracy_change,
                part.interval,
            )
        console.print(table)
    if "bisect" in result:
        _print_bisection(result["bisect"], console)
    console.print(Text(f"verdict: {result['verdict']}", STYLES[result["verdict"]]))
    for reason in result["reasons"]:
        console.print(Text(f"  {one_line(reason, 500)}"), soft_wrap=True)
    if result["pairs_needed"] is not None:
        console.print(f"  {result['pairs_needed']:,} pairs like these would settle it")


def _print_bisection(found: dict[str, Any], console: Console) -> None:
    """Print the layers that add most of the drift, and what keeping layers exact would give."""
    for role, culprits in found["culprits"].items():
        graphs = dict.fromkeys((drift["graph"], drift["precision"]) for drift in found["layers"][role])
        for graph, precision in graphs:
            named = [
                f"{describe_layer(drift)} (adds {drift['added']:.2g}, to {drift['error']:.2g})"
                for drift in culprits
                if (drift["graph"], drift["precision"]) == (graph, precision)
            ]
            said = ", ".join(named[:5]) if named else "no layer adds to it: look at the head, the last norm, the tokens"
            console.print(f"{role}, {graph}, {precision}: relative error of the hidden states: {said}", soft_wrap=True)
    if found["trades"]:
        table = Table(title="layers kept exact", title_justify="left", header_style="bold")
        for column in ("exact layers", "token error", "flips", "microseconds a token"):
            table.add_column(column, justify="left" if column == "exact layers" else "right")
        for trade in found["trades"]:
            layers = ", ".join(map(str, trade["exact_layers"])) or "none"
            seconds = trade["seconds_per_token"]
            table.add_row(
                one_line(layers, 60),
                f"{trade['mean_error']:.2g}",
                f"{trade['flips']} of {trade['pairs']}",
                "" if seconds is None else f"{1e6 * seconds:,.0f}",
            )
        console.print(table)
    for problem in found["problems"]:
        console.print(Text(f"not looked at: {one_line(problem, 300)}"), soft_wrap=True)
