"""A watch as one page that opens without a network: margin, accuracy and drift over the training's steps."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, PackageLoader
from markupsafe import Markup

from dpo_fast.errors import MissingDependencyError
from dpo_fast.files import write_text
from dpo_fast.report.charts import CHOSEN, NEUTRAL, REJECTED, plotly_script
from dpo_fast.training.table import COLUMNS, rows_of, title_of

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

PAGE = "watch.html"
BAND = "rgba(63, 135, 210, 0.2)"  # CHOSEN, of intervals


def write_page(path: Path, result: dict[str, Any]) -> None:
    """Write the page.

    Args:
        path: the file to write.
        result: the content of watch.json.

    Raises:
        MissingDependencyError: Plotly is not installed.
        StorageError: the disk refused.
    """
    figures = (
        ("Reward margin", metric_figure(result, "eval_rewards/margins")),
        ("Reward accuracy", metric_figure(result, "eval_rewards/accuracies")),
        ("Drift from the reference on the data's completions, nats a token", drift_figure(result)),
    )
    # What comes from data (names of data sets, reasons) is escaped; Plotly's own markup holds numbers and our words.
    environment = Environment(loader=PackageLoader("dpo_fast", "training"), autoescape=True, trim_blocks=True)
    page = environment.get_template("watch.html.jinja").render(
        result=result,
        title=title_of(result),
        columns=COLUMNS,
        rows=rows_of(result),
        figures=[(name, Markup(_markup(figure))) for name, figure in figures] if result["steps"] else [],  # noqa: S704
        plotly=Markup(plotly_script()),  # noqa: S704
    )
    write_text(path, page)


def metric_figure(result: dict[str, Any], metric: str) -> "Figure":
    """A metric over the steps, with its 95 % intervals as a band.

    Args:
        result: the content of watch.json.
        metric: one that has intervals.
    """
    figure = _figure()
    known = [each for each in result["steps"] if metric in each["intervals"]]
    steps = [each["step"] for each in known]
    lows, highs = ([each["intervals"][metric][end] for each in known] for end in (0, 1))
    figure.add_scatter(
        x=[*steps, *reversed(steps)], y=[*highs, *reversed(lows)], fill="toself", fillcolor=BAND, mode="none",
        name="95 % interval", hoverinfo="skip",
    )  # fmt: skip
    _add_line(figure, result, "value", CHOSEN, [each["metrics"][metric] for each in result["steps"]])
    return figure


def drift_figure(result: dict[str, Any]) -> "Figure":
    """The mean log-ratios and k3 over the steps.

    Args:
        result: the content of watch.json.
    """
    figure = _figure()
    for branch, colour in (("chosen", CHOSEN), ("rejected", REJECTED)):
        for key, name, dash in (("log_ratio", "log-ratio", "solid"), ("k3", "k3", "dot")):
            values = [each["drift"][f"{key}/{branch}"] for each in result["steps"]]
            _add_line(figure, result, f"{name}, {branch}", colour, values, dash)
    return figure


def _add_line(
    figure: "Figure", result: dict[str, Any], name: str, colour: str, values: list[float | None], dash: str = "solid"
) -> None:
    """One value a step."""
    figure.add_scatter(
        x=[each["step"] for each in result["steps"]], y=values, name=name, mode="lines+markers",
        line={"color": colour, "dash": dash}, hovertemplate="step %{x:,}: %{y:.4f}<extra>" + name + "</extra>",
    )  # fmt: skip


def _figure() -> "Figure":
    """An empty figure over steps, whose colours go with a light and a dark page."""
    try:
        from plotly.graph_objects import Figure
    except ImportError as error:
        raise MissingDependencyError("plotly", "report", "the page of a watch") from error
    figure = Figure()
    figure.update_layout(
        template="none",
        height=320,
        margin={"l": 60, "r": 15, "t": 30, "b": 50},
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        font={"color": NEUTRAL},
        legend={"orientation": "h", "y": 1, "yanchor": "bottom", "x": 0},
        dragmode=False,  # a finger that scrolls the page shall not zoom the figure
        xaxis={"title": {"text": "step"}, "gridcolor": "#8884", "zeroline": False, "tickformat": ",d"},
        yaxis={"gridcolor": "#8884", "zerolinecolor": "#8888", "automargin": True},
    )
    return figure


def _markup(figure: "Figure") -> str:
    """The figure as HTML, for a page that has Plotly's script."""
    return str(
        figure.to_html(full_html=False, include_plotlyjs=False, config={"displaylogo": False, "responsive": True})
    )
