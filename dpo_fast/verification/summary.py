"""What a person is shown of a verification, in the terminal and on the page: rows of text."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from dpo_fast.text import one_line
from dpo_fast.verification.verdict import default_tolerance

SIGNS = {"pass": "pass", "fail": "FAIL", "cannot tell": "cannot tell"}


@dataclass(frozen=True, slots=True)
class CheckRow:
    """A check: its name, number, interval, limit and outcome."""

    name: str
    value: str
    interval: str
    limit: str
    outcome: str
    reason: str


@dataclass(frozen=True, slots=True)
class SizeRow:
    """The size of an error: of the engine, of the original in another batch shape, and in its own precision."""

    name: str
    engine: str
    reshaped: str
    rounded: str


@dataclass(frozen=True, slots=True)
class SliceRow:
    """Drift and decisions of some of the pairs."""

    kind: str
    name: str
    pairs: int
    token_error: str
    margin_error: str
    flips: int
    accuracy_change: str
    interval: str


def chosen_limits(tolerance: Mapping[str, Any], precision: str) -> tuple[str, ...]:
    """The limits that somebody chose, as "max-multiple 100 (usually 3)": a verdict is worth no more than its limits.

    Args:
        tolerance: `verdict.Tolerance`, as verify.json and attestation.json have it.
        precision: what the engine claims to compute in, which decides the usual ones.
    """
    usual = asdict(default_tolerance(precision))
    return tuple(
        one_line(f"{name.replace('_', '-')} {value} (usually {usual.get(name)})")
        for name, value in tolerance.items()
        if value != usual.get(name)
    )


def pairs_of(result: dict[str, Any]) -> str:
    """How many pairs were compared, and what else the data set had."""
    left_out = [f"{result[name]:,} rows {name}" for name in ("skipped", "repeated") if result.get(name)]
    return f"{result['pairs']:,} pairs" + (f" ({', '.join(left_out)}, left out)" if left_out else "")


def checks_of(result: dict[str, Any]) -> list[CheckRow]:
    """The checks of verify.json."""
    rows = []
    for check in result["checks"]:
        interval = check["interval"]
        rows.append(
            CheckRow(
                name=check["name"],
                value="" if check["value"] is None else f"{check['value']:.3g}",
                interval="" if interval is None else f"{interval[0]:.3g} … {interval[1]:.3g}",
                limit=f"{check['limit']:.3g}" if check["value"] is not None else "",
                outcome=SIGNS[check["outcome"]],
                reason=check["reason"],
            )
        )
    return rows


def sizes_of(result: dict[str, Any]) -> list[SizeRow]:
    """Sizes of errors beside the original's own; none where the scores could not be compared."""
    drift = result["drift"]
    if drift is None:
        return []
    columns = [drift, result["noise_reshaped"], result["noise_rounded"]]

    def row(name: str, *keys: str, form: str = "{:.2g}") -> SizeRow:
        cells = []
        for column in columns:
            value: Any = column
            for key in keys:
                value = None if value is None else value[key]
            cells.append("" if value is None else form.format(value))
        return SizeRow(name, *cells)

    rows = [
        row("token's log-prob, mean (nats)", "tokens", "mean_absolute"),
        row("… median", "tokens", "median_absolute"),
        row("… 99th percentile", "tokens", "p99_absolute"),
        row("… largest", "tokens", "largest"),
        row("… signed mean", "tokens", "bias"),
        row("same first choice", "tokens", "top1_agreement", form="{:.2%}"),
        row("sequence's log-prob, mean (nats)", "policy_log_probs", "mean_absolute"),
        row("reward, root mean square", "rewards", "rms"),
        row("margin, root mean square", "margins", "rms"),
        row("… bias", "margins", "bias"),
        row("… spread", "margins", "spread"),
        row("… correlation", "margins", "correlation", form="{:.6f}"),
    ]
    decisions = [result["decisions"], result["decisions_reshaped"], result["decisions_rounded"]]
    cells = ["" if each is None else f"{len(each['flips'])} ({each['clear_flips']} clear)" for each in decisions]
    rows.append(SizeRow("preferences flipped", *cells))
    cells = ["" if each is None else f"{each['accuracy']:.4f}" for each in decisions]
    rows.append(SizeRow(f"accuracy (original: {result['decisions']['original_accuracy']:.4f})", *cells))
    cells = ["" if each is None else f"{each['mcnemar_p']:.3g}" for each in decisions]
    rows.append(SizeRow("McNemar's exact p", *cells))
    return rows


def slices_of(result: dict[str, Any]) -> list[SliceRow]:
    """Drift by subset and by length."""
    drift = result["drift"]
    if drift is None:
        return []
    rows = []
    for kind, key in (("subset", "by_subset"), ("length", "by_length")):
        for each in drift[key]:
            low, high = each["accuracy_interval"]
            error = each["token_mean_absolute"]
            rows.append(
                SliceRow(
                    kind=kind,
                    name=each["name"],
                    pairs=each["pairs"],
                    token_error="" if error is None else f"{error:.2g}",
                    margin_error=f"{each['margin_rms']:.2g}",
                    flips=each["flips"],
                    accuracy_change=f"{100 * each['accuracy_change']:+.2f}",
                    interval=f"{100 * low:+.2f} … {100 * high:+.2f}",
                )
            )
    return rows
