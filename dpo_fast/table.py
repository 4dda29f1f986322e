"""A run's metrics as a person reads them in a terminal."""

from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from dpo_fast.text import one_line

# What is shown, in this order, and how it is called beside TRL's key.
ROWS = (
    ("eval_loss", "loss"),
    ("eval_rewards/accuracies", "reward accuracy"),
    ("eval_rewards/margins", "reward margin"),
    ("eval_rewards/chosen", "reward, chosen"),
    ("eval_rewards/rejected", "reward, rejected"),
    ("eval_logps/chosen", "log-prob, chosen (nats)"),
    ("eval_logps/rejected", "log-prob, rejected (nats)"),
    ("eval_logits/chosen", "mean logit, chosen"),
    ("eval_logits/rejected", "mean logit, rejected"),
    ("eval_entropy", "entropy (nats a token)"),
    ("eval_mean_token_accuracy", "token accuracy, chosen"),
)


def print_metrics(metrics: dict[str, Any], console: Console) -> None:
    """Print the metrics with their intervals, the counts, and what the time went to.

    Args:
        metrics: the content of metrics.json.
        console: where to.
    """
    provenance = metrics["provenance"]
    settings = provenance["settings"]
    loss = " + ".join(settings["loss_type"])
    name = one_line(provenance["dataset"]["name"], 60)
    # Names come from the user's data: as `Text`, their markup is not obeyed.
    title = Text(f"{name}, {metrics['counts']['pairs']:,} pairs, {loss}, beta {settings['beta']:g}")
    table = Table(title=title, title_justify="left", header_style="bold")
    table.add_column("metric")
    table.add_column("key", style="dim")
    table.add_column("value", justify="right")
    table.add_column("95 % interval", justify="right")
    for key, name in ROWS:
        interval = metrics["intervals"].get(key)
        shown = f"{interval[0]:.4f} … {interval[1]:.4f}" if interval else ""
        table.add_row(name, key, f"{metrics[key]:.4f}", shown)
    console.print(table)
    if "groups" in metrics:
        console.print(groups_table(metrics["groups"], "by group"))
    counts, timing = metrics["counts"], metrics["timing"]
    console.print(
        f"{counts['ties']:,} ties, {counts['truncated']:,} pairs truncated, {counts['skipped']:,} rows skipped; "
        f"aggregate {provenance['aggregate']}"
    )
    console.print(f"{_time(timing, provenance)}; {provenance['engine']}, {provenance['precision']}", highlight=False)


def _time(timing: dict[str, float], provenance: dict[str, Any]) -> str:
    """What the time went to; of a merged run, what its shards' time went to."""
    scoring = f"scoring {timing['score_seconds']:.1f}"
    process = provenance.get("this_process")
    if process is not None:
        seconds = max(timing["score_seconds"], 1e-9)
        pairs, tokens = process["scored_pairs"] / seconds, process["computed_tokens"] / seconds
        workers = len(provenance.get("cluster", {}).get("workers", ())) or 1
        busy = min(process["engine_seconds"] / seconds / workers, 1)
        scoring += f" ({pairs:,.1f} pairs/s, {tokens:,.0f} tokens/s; engines busy {busy:.0%} of it)"
        if known := process["pairs_with_known_reference_scores"]:
            scoring += f", the reference's scores of {known:,} pairs being known"
    return (
        f"{timing['total_seconds']:.1f} s: loading {timing['load_seconds']:.1f}, waiting for tokens "
        f"{timing['tokenize_seconds']:.1f}, {scoring}, metrics {timing['metrics_seconds']:.1f}"
    )


def groups_table(groups: dict[str, dict[str, Any]], title: str) -> Table:
    """One line a group: its `pairs`, and of its rewards the accuracy with its interval, and the margin."""
    table = Table(title=title, title_justify="left", header_style="bold")
    for column in ("group", "pairs", "reward accuracy", "95 % interval", "reward margin"):
        table.add_column(column, justify="left" if column == "group" else "right")
    for name, group in groups.items():
        low, high = group["intervals"]["eval_rewards/accuracies"]
        table.add_row(
            Text(one_line(name, 60)),
            f"{group['pairs']:,}",
            f"{group['eval_rewards/accuracies']:.4f}",
            f"{low:.4f} … {high:.4f}",
            f"{group['eval_rewards/margins']:.4f}",
        )
    return table
