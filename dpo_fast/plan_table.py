"""A plan, and what workers did, as a person reads them in a terminal."""

from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from dpo_fast.plan import Plan
from dpo_fast.text import one_line

GIB = 2**30


def print_plan(plan: Plan, console: Console) -> None:
    """Print what an evaluation would take."""
    table = Table(title="plan; nothing was written", title_justify="left", show_header=False)
    table.add_column("what", style="dim")
    table.add_column("value")
    rest = f", {plan.parts_there:,} of them there already" if plan.parts_there else ""
    takes = ", ".join(f"{name} {amount:g}" for name, amount in plan.resources_per_worker.items())
    who = " for the reference, ".join(f"{size:,}" for size in plan.workers)
    who += " for the policy" if len(plan.workers) > 1 else ""
    nodes = ", ".join(sorted(set(plan.nodes)))
    lines = {
        "rows": f"{plan.rows:,}",
        "parts": f"{plan.parts:,}{rest}",
        "tokens to compute": f"about {plan.tokens:,}, in batches of {plan.token_budget:,}",
        "workers": f"{who}{f' ({takes} each)' if takes else ''} on {nodes}",
        "engine": f"{plan.engine}, {plan.precision}",
        "a worker's speed": f"{plan.tokens_per_second:,.0f} tokens/s, after {plan.load_seconds:.1f} s of loading",
        "a worker's memory": f"{plan.memory_bytes / GIB:.2f} GiB at most while it was measured",
        "expected time": _duration(plan.expected_seconds),
    }
    for name, value in lines.items():
        table.add_row(name, Text(one_line(value, 200)))
    console.print(table)


def print_workers(metrics: dict[str, Any], console: Console) -> None:
    """Print what each worker of a cluster did; nothing for a run of one process.

    Args:
        metrics: the content of metrics.json.
        console: where to.
    """
    cluster = metrics["provenance"].get("cluster")
    if not cluster:
        return
    seconds = metrics["timing"]["score_seconds"]
    table = Table(title=f"workers, {seconds:.1f} s", title_justify="left", header_style="bold")
    for name in ("host", "parts", "pairs", "tokens", "tokens/s on the engine", "engine busy"):
        table.add_column(name, justify="left" if name == "host" else "right")
    for worker in cluster["workers"]:
        busy = worker["engine_seconds"]
        table.add_row(
            Text(one_line(worker["host"], 40)),
            f"{worker['parts']:,}",
            f"{worker['scored_pairs']:,}",
            f"{worker['computed_tokens']:,}",
            f"{worker['computed_tokens'] / busy:,.0f}" if busy else "",
            f"{busy / seconds:.0%}" if seconds else "",
        )
    console.print(table)


def _duration(seconds: float) -> str:
    """Seconds as people say them."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = seconds / 60
    return f"{minutes:.0f} min" if minutes < 90 else f"{minutes / 60:.1f} h"
