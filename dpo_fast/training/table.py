"""A watch as a person reads it in a terminal; its page has the same rows."""

from typing import Any

from rich.table import Table
from rich.text import Text

from dpo_fast.text import one_line

COLUMNS = (
    "step", "reward margin", "95 % interval", "accuracy", "95 % interval", "loss", "log-ratio, chosen",
    "log-ratio, rejected", "k3, chosen",
)  # fmt: skip


def rows_of(result: dict[str, Any]) -> list[list[str]]:
    """The scored checkpoints' values under `COLUMNS`, as they are shown.

    Args:
        result: the content of watch.json.
    """
    return [
        [
            f"{each['step']:,}",
            _shown(each["metrics"]["eval_rewards/margins"]),
            _interval(each, "eval_rewards/margins"),
            _shown(each["metrics"]["eval_rewards/accuracies"]),
            _interval(each, "eval_rewards/accuracies"),
            _shown(each["metrics"]["eval_loss"]),
            _shown(each["drift"]["log_ratio/chosen"]),
            _shown(each["drift"]["log_ratio/rejected"]),
            _shown(each["drift"]["k3/chosen"]),
        ]
        for each in result["steps"]
    ]


def title_of(result: dict[str, Any]) -> str:
    """What the checkpoints are evaluated on, and with what, in one line."""
    settings = result["settings"]
    loss = " + ".join(settings["loss_type"])
    return f"{one_line(result['dataset'], 60)}, {loss}, beta {settings['beta']:g}"


def watch_table(result: dict[str, Any], status: str = "") -> Table:
    """The checkpoints so far.

    Args:
        result: the content of watch.json.
        status: what is being waited for.
    """
    # Names come from the user's data: as `Text`, their markup is not obeyed.
    table = Table(
        title=Text(title_of(result)),
        title_justify="left",
        header_style="bold",
        caption=Text(one_line(status)) if status else None,
        caption_justify="left",
    )
    for column in COLUMNS:
        table.add_column(column, justify="right", no_wrap="interval" in column)
    for row in rows_of(result):
        table.add_row(*row)
    return table


def _shown(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def _interval(step: dict[str, Any], metric: str) -> str:
    interval = step["intervals"].get(metric)
    return f"{interval[0]:.4f} … {interval[1]:.4f}" if interval else ""
