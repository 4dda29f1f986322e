"""Markdown tables of results, and their place in a README."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from readme import write_between

from gpu.results import VERIFY

BEGIN, END = "<!-- gpu results -->", "<!-- end of gpu results -->"
NOTHING = (
    "Nothing has been measured on a GPU yet. On a machine with one: `python -m benchmarks.gpu --verify`, then "
    "`python -m benchmarks.gpu`."
)
COLUMNS = (
    "contender", "scoring s", "pairs/s", "tokens/s", "× TRL", "× PyTorch", "share of the peak",
    "memory GB, device / PyTorch", "error, nats: mean / p99 / largest", "accuracy", "wall s",
)  # fmt: skip
PEERS = {"trl": "trl-bf16", "torch": "torch-bf16"}


def make_tables(results: Sequence[Mapping[str, Any]]) -> str:
    """All results' tables, one for each shape and one for each verification; a plain sentence where there are none."""
    sections = [
        line for result in results for line in ([_verification(result)] if _verifies(result) else _speeds(result))
    ]
    return "\n\n".join(sections) if sections else NOTHING


def write_tables(readme: Path, tables: str) -> None:
    """Put tables between the marks of a README.

    Raises:
        UsageError: it has no marks, or cannot be read.
    """
    write_between(readme, BEGIN, END, tables)


def _verifies(result: Mapping[str, Any]) -> bool:
    return bool(result["kind"] == VERIFY)


def _speeds(result: Mapping[str, Any]) -> list[str]:
    """A section for each shape."""
    return ["\n\n".join(_speed(result, shape)) for shape in result["shapes"]]


def _speed(result: Mapping[str, Any], shape: Mapping[str, Any]) -> list[str]:
    """A shape's heading, table, and what is to be known beside."""
    measured = [each for each in shape["contenders"] if "error" not in each]
    seconds = {each["name"]: each["score_seconds"] for each in measured}
    rows = [[*_row(each, seconds)] for each in measured]
    heading = (
        f"**{shape['shape']}**, {shape['pairs']:,} pairs, {shape['parameters'] / 1e6:,.0f} M parameters, both models; "
        f"{_device(result)}"
    )
    parts = [heading, _markdown(COLUMNS, rows)] if rows else [heading]
    failed = [(each["name"], each["error"]) for each in shape["contenders"] if "error" in each]
    if shape["exact_error"]:
        failed.append(("PyTorch in float32, so that there are no errors to see", shape["exact_error"]))
    parts += _left_out("Failed", failed) + _missing(result)
    if shape["random_weights"]:
        parts.append("Random weights: the speed is a real model's, errors and accuracy are not.")
    return parts


def _row(each: Mapping[str, Any], seconds: Mapping[str, float]) -> list[str]:
    """A contender's cells."""
    ratios = [
        f"{seconds[peer] / each['score_seconds']:.2f}" if peer in seconds and peer != each["name"] else ""
        for peer in PEERS.values()
    ]
    errors = each.get("errors")
    spread = [] if errors is None else [errors[f"{name}_nats"] for name in ("mean", "p99", "largest")]
    memory = [each.get("device_largest_bytes"), each.get("torch_largest_bytes")]
    share = each["share_of_peak"]
    return [
        f"`{each['name']}`",
        _significant(each["score_seconds"]),
        _significant(each["pairs_per_second"]),
        f"{each['tokens_per_second']:,.0f}",
        *ratios,
        "" if share is None else f"{share:.1%}",
        " / ".join("–" if used is None else f"{used / 1e9:.2f}" for used in memory) if any(memory) else "",
        " / ".join(f"{value:.2g}" for value in spread),
        f"{each['accuracy']:.3f}",
        f"{each['wall_seconds']:.1f}",
    ]


def _verification(result: Mapping[str, Any]) -> str:
    """Families by contenders: the largest error of a token's log-prob, and the mean."""
    contenders = result["contenders"]
    families = list(dict.fromkeys(family for each in contenders for family in each["families"]))
    rows = [[family, *(_cell(each["families"].get(family)) for each in contenders)] for family in families]
    heading = f"**Verification**, error of a token's log-prob in nats, largest (mean); {_device(result)}"
    parts = [heading]
    if rows:
        parts.append(_markdown(["family", *(f"`{each['name']}`" for each in contenders)], rows))
    failed = [
        (f"{each['name']}, {family}", found["error"])
        for each in contenders
        for family, found in each["families"].items()
        if "error" in found
    ]
    return "\n\n".join(parts + _left_out("Failed", failed) + _missing(result))


def _cell(found: Mapping[str, Any] | None) -> str:
    """A family's errors on a contender, and whether rounding explains them."""
    if found is None:
        return ""
    if "error" in found:
        return "failed"
    figures = f"{found['largest_nats']:.1e} ({found['mean_nats']:.1e})"
    return f"**wrong:** {figures}" if found["passed"] is False else figures


def _device(result: Mapping[str, Any]) -> str:
    """What it ran on, when, and of which commit."""
    device, commit = result["device"], result["commit"]
    driver = f", driver {device['driver']}" if "driver" in device else ""
    made_by = f", commit {commit['hash'][:7]}{' with changes' if commit['changed'] else ''}" if commit else ""
    return f"{device['name']}{driver}, {result['date'][:10]}{made_by}."


def _missing(result: Mapping[str, Any]) -> list[str]:
    return _left_out("Not run here", [(each["name"], each["reason"]) for each in result["missing"]])


def _left_out(title: str, reasons: Sequence[tuple[str, str]]) -> list[str]:
    """A list of names and reasons; nothing where there are none."""
    if not reasons:
        return []
    return [f"{title}:\n\n" + "\n".join(f"- {name}: {reason}" for name, reason in reasons)]


def _markdown(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', '/') for cell in line)} |" for line in lines)


def _significant(value: float) -> str:
    """Three digits, without powers of ten."""
    return f"{value:,.0f}" if value >= 100 else f"{value:#.3g}"
