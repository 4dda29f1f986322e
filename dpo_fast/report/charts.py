"""The report's figures as Plotly draws them in the page; the page gives them its own colours of text and grid."""

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from dpo_fast.errors import MissingDependencyError
from dpo_fast.report.figures import (
    Accuracy,
    Calibration,
    Histogram,
    Scatter,
    counts_between,
    histogram,
    histogram_edges,
    share_axis,
)
from dpo_fast.report.pairs import RunPairs
from dpo_fast.report.sweeps import Sweep
from dpo_fast.types import Float64Array

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

# Told apart by those who see no red or no green, and readable on white and on black.
CHOSEN, REJECTED, NEUTRAL = "#3f87d2", "#dd7a26", "#8a8f98"
BAR_HEIGHT = 26  # pixels of one subset


def plotly_script() -> str:
    """Plotly's JavaScript, which stands beside the page.

    Raises:
        MissingDependencyError: Plotly is not installed.
    """
    try:
        from plotly.offline import get_plotlyjs
    except ImportError as error:
        raise MissingDependencyError("plotly", "report", "a report") from error
    return str(get_plotlyjs())


def margins_chart(margins: Float64Array) -> dict[str, Any]:
    """Histogram of the margins, right and wrong, and of ties, which count as wrong."""
    counted, ties = histogram(margins), int((margins == 0).sum())
    low = counted.edges[:-1]
    at_zero = np.where(low == 0, ties, 0)
    figure = _figure("margin", "pairs")
    figure.update_layout(barmode="stack", legend={"traceorder": "normal"})
    if ties:
        _add_bars(figure, "0: a tie, wrong", NEUTRAL, counted, at_zero)
    for name, colour, mask in (("below 0: wrong", REJECTED, low < 0), ("above 0: right", CHOSEN, low >= 0)):
        _add_bars(figure, name, colour, counted, np.where(mask, counted.counts - at_zero, 0))
    return _plain(figure)


def rewards_chart(pairs: RunPairs) -> dict[str, Any]:
    """Histograms of the chosen and the rejected completions' rewards, over the same bins."""
    chosen, rejected = pairs.chosen_rewards, pairs.rejected_rewards
    edges = histogram_edges(np.concatenate([chosen, rejected]))
    figure = _figure("reward", "completions")
    for name, colour, rewards in (("chosen", CHOSEN, chosen), ("rejected", REJECTED, rejected)):
        counts = counts_between(edges, rewards)
        _add_bars(figure, name, colour, Histogram(edges, counts), counts, opacity=0.6)
    return _plain(figure)


def subsets_chart(subsets: Sequence[Accuracy]) -> dict[str, Any]:
    """Accuracy by subset, one line each."""
    figure = _figure("accuracy", "", height=110 + BAR_HEIGHT * len(subsets))
    places = list(range(len(subsets)))
    figure.add_scatter(
        x=[each.share for each in subsets], y=places, mode="markers", error_x=_errors(subsets), showlegend=False,
        marker={"color": CHOSEN, "size": 9}, customdata=[each.pairs for each in subsets],
        text=[_label(each.name, 60) for each in subsets],
        cliponaxis=False,
        hovertemplate="%{text}<br>accuracy %{x:.3f}, %{customdata:,} pairs<extra></extra>",
    )  # fmt: skip
    low, high = _ends(subsets)
    figure.update_xaxes(range=[low, high])
    figure.update_yaxes(
        tickvals=places, ticktext=[_label(each.name, 24) for each in subsets], range=[len(subsets) - 0.5, -0.5]
    )
    figure.update_layout(margin={"l": 150})
    return _plain(figure)


def lengths_chart(bins: Sequence[Accuracy]) -> dict[str, Any]:
    """Accuracy by length difference."""
    figure = _figure("chosen less rejected, tokens", "accuracy")
    figure.add_scatter(
        x=[each.name for each in bins], y=[each.share for each in bins], mode="markers+lines",
        error_y=_errors(bins), marker={"color": CHOSEN, "size": 9}, line={"color": CHOSEN, "width": 1},
        customdata=[each.pairs for each in bins], showlegend=False, cliponaxis=False,
        hovertemplate="%{x} tokens<br>accuracy %{y:.3f}, %{customdata:,} pairs<extra></extra>",
    )  # fmt: skip
    figure.update_yaxes(range=_ends(bins))
    figure.update_xaxes(type="category")
    return _plain(figure)


def calibration_chart(calibration: Calibration) -> dict[str, Any]:
    """The reliability diagram."""
    bins = calibration.bins
    accuracies = [each.accuracy for each in bins]
    figure = _figure("confidence, sigmoid(|margin|)", "accuracy")
    figure.add_scatter(
        x=[0.5, 1], y=[0.5, 1], mode="lines", line={"color": NEUTRAL, "dash": "dot", "width": 1}, hoverinfo="skip",
        name="calibrated",
    )  # fmt: skip
    figure.add_scatter(
        x=[each.confidence for each in bins], y=[each.share for each in accuracies], mode="markers+lines",
        error_y=_errors(accuracies), marker={"color": CHOSEN, "size": 9}, line={"color": CHOSEN, "width": 1},
        customdata=[each.pairs for each in accuracies], name="this run", cliponaxis=False,
        hovertemplate="confidence %{x:.3f}<br>accuracy %{y:.3f}, %{customdata:,} pairs<extra></extra>",
    )  # fmt: skip
    low, high = _ends(accuracies)
    figure.update_xaxes(range=[0.49, 1.01])
    figure.update_yaxes(range=[min(low, 0.45), max(high, 1.02)])
    return _plain(figure)


def models_chart(pairs: RunPairs, shown: Scatter) -> dict[str, Any]:
    """Each completion's log-prob under the policy against that under the reference."""
    figure = _figure("reference log-prob, nats", "policy log-prob, nats", height=420)
    rows = pairs.sums.rows[shown.pairs]
    for name, colour, branch in (("chosen", CHOSEN, pairs.chosen), ("rejected", REJECTED, pairs.rejected)):
        _add_points(figure, name, colour, branch.reference[shown.pairs], branch.policy[shown.pairs], rows)
    _add_diagonal(figure, "equal")
    return _plain(figure)


def ratios_chart(pairs: RunPairs, shown: Scatter) -> dict[str, Any]:
    """Each pair's log-ratios: that of the chosen completion against that of the rejected one."""
    figure = _figure("log-ratio of rejected, nats", "log-ratio of chosen, nats", height=420)
    rejected, chosen = pairs.rejected.log_ratios[shown.pairs], pairs.chosen.log_ratios[shown.pairs]
    rows, right = pairs.sums.rows[shown.pairs], chosen > rejected
    for name, colour, mask in (("right", CHOSEN, right), ("wrong", REJECTED, ~right)):
        _add_points(figure, name, colour, rejected[mask], chosen[mask], rows[mask])
    _add_diagonal(figure, "margin 0")
    return _plain(figure)


def losses_chart(sweep: Sweep) -> dict[str, Any]:
    """Each loss against beta; all but the run's own are shown when their name is clicked."""
    figure = _figure("beta", "loss", height=420)
    for number, loss in enumerate(sweep.losses):
        betas = [beta for beta in sweep.betas if (loss, beta) in sweep.values]
        of_betas = [sweep.values[loss, beta] for beta in betas]
        # Rounded, or an axis would tell rounding errors apart where all are the same.
        values = [round(value, 6) for value, _ in of_betas]
        intervals = [[round(end, 6) for end in ends] for _, ends in of_betas if ends is not None]
        known = len(intervals) == len(values)
        figure.add_scatter(
            x=betas, y=values, mode="markers+lines", name=loss, visible=True if number == 0 else "legendonly",
            hovertemplate=f"{loss}, beta %{{x:g}}: %{{y:.4f}}<extra></extra>",
            error_y={
                "type": "data", "symmetric": False, "thickness": 1,
                "array": [ends[1] - value for ends, value in zip(intervals, values, strict=True)],
                "arrayminus": [value - ends[0] for ends, value in zip(intervals, values, strict=True)],
            } if known else None,
        )  # fmt: skip
    figure.update_xaxes(type="log", tickvals=sweep.betas, ticktext=[f"{beta:g}" for beta in sweep.betas])
    figure.update_layout(legend={"orientation": "h", "y": -0.3, "yanchor": "top"}, showlegend=True)
    return _plain(figure)


def betas_chart(sweep: Sweep) -> dict[str, Any]:
    """Calibration against beta."""
    figure = _figure("beta", "Brier score, ECE")
    for name, colour, values in (
        ("Brier score", CHOSEN, [each.brier for each in sweep.calibrations]),
        ("ECE", REJECTED, [each.ece for each in sweep.calibrations]),
    ):
        figure.add_scatter(
            x=sweep.betas, y=values, mode="markers+lines", name=name, marker={"color": colour},
            line={"color": colour}, hovertemplate=f"{name} at beta %{{x:g}}: %{{y:.4f}}<extra></extra>",
        )  # fmt: skip
    figure.update_xaxes(type="log", tickvals=sweep.betas, ticktext=[f"{beta:g}" for beta in sweep.betas])
    figure.update_yaxes(rangemode="tozero")
    return _plain(figure)


def _figure(x: str, y: str, *, height: int = 320) -> "Figure":
    """An empty figure with named axes."""
    try:
        from plotly.graph_objects import Figure
    except ImportError as error:
        raise MissingDependencyError("plotly", "report", "a report") from error
    figure = Figure()
    figure.update_layout(
        template="none",
        height=height,
        margin={"l": 60, "r": 15, "t": 30, "b": 50},
        bargap=0,
        barmode="overlay",
        dragmode=False,  # a finger that scrolls the page shall not zoom the figure
        hovermode="closest",
        legend={"orientation": "h", "y": 1, "yanchor": "bottom", "x": 0},
        xaxis={"title": {"text": x}, "automargin": True, "zeroline": False},
        yaxis={"title": {"text": y}, "automargin": True, "zeroline": False},
    )
    return figure


def _add_bars(figure: "Figure", name: str, colour: str, counted: Histogram, counts: Any, opacity: float = 1.0) -> None:
    """A histogram's bars; their edges are told when one is pointed at."""
    low, high = counted.edges[:-1], counted.edges[1:]
    figure.add_bar(
        x=(low + high) / 2, y=counts, width=high - low, name=name, marker={"color": colour, "line": {"width": 0}},
        opacity=opacity, customdata=np.stack([low, high], axis=1),
        hovertemplate="%{customdata[0]:.4g} to %{customdata[1]:.4g}: %{y:,}<extra></extra>",
    )  # fmt: skip


def _add_points(figure: "Figure", name: str, colour: str, x: Any, y: Any, rows: Any) -> None:
    figure.add_scatter(
        x=np.round(x, 3), y=np.round(y, 3), mode="markers", name=name, customdata=rows,
        marker={"color": colour, "size": 5, "opacity": 0.55},
        hovertemplate="row %{customdata}: %{x:.2f}, %{y:.2f}<extra></extra>",
    )  # fmt: skip


def _add_diagonal(figure: "Figure", name: str) -> None:
    """The line on which both coordinates are equal, as long as the points reach."""
    values = np.concatenate([np.asarray(axis, np.float64) for trace in figure.data for axis in (trace.x, trace.y)])
    ends = [float(values.min()), float(values.max())]
    figure.add_scatter(
        x=ends, y=ends, mode="lines", name=name, line={"color": NEUTRAL, "dash": "dot", "width": 1}, hoverinfo="skip"
    )


def _errors(accuracies: Sequence[Accuracy]) -> dict[str, Any]:
    """Wilson's intervals as Plotly's error bars."""
    return {
        "type": "data",
        "symmetric": False,
        "thickness": 1.2,
        "array": [each.interval[1] - each.share for each in accuracies],
        "arrayminus": [each.share - each.interval[0] for each in accuracies],
    }


def _ends(accuracies: Sequence[Accuracy]) -> tuple[float, float]:
    """An axis that the intervals fit into."""
    return share_axis(min(each.interval[0] for each in accuracies), max(each.interval[1] for each in accuracies))


def _label(name: str, limit: int) -> str:
    """A name from data as a label: Plotly obeys some tags of HTML, and knows these entities."""
    shown = name if len(name) <= limit else f"{name[: limit - 1]}…"
    return shown.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def _plain(figure: "Figure") -> dict[str, Any]:
    """The figure as values for JSON."""
    plain: dict[str, Any] = json.loads(figure.to_json())
    plain["layout"].pop("template", None)
    return plain
