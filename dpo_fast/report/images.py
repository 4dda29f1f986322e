"""Figures as PNG files, for a model card: the same numbers as in the page, drawn by matplotlib."""

import io
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from dpo_fast.errors import MissingDependencyError, UsageError
from dpo_fast.files import write_bytes
from dpo_fast.report.charts import CHOSEN, NEUTRAL, REJECTED
from dpo_fast.report.figures import accuracy, accuracy_by_subset, histogram, largest, share_axis
from dpo_fast.report.pairs import read_pairs
from dpo_fast.text import one_line

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DOTS_PER_INCH = 150


def margin_histogram_png(run: Path, path: Path) -> None:
    """Draw the histogram of a run's margins.

    Args:
        run: what `dpo-fast evaluate` wrote.
        path: the file to write.

    Raises:
        MissingDependencyError: matplotlib is not installed.
        UsageError, StorageError: `run` is no finished run, or is damaged; the disk refused.
    """
    figure, axes = _figure(height=3.4)
    margins = read_pairs(run).margins
    counted = histogram(margins)
    colours = np.where(counted.edges[:-1] < 0, REJECTED, CHOSEN)
    axes.bar(counted.edges[:-1], counted.counts, np.diff(counted.edges), align="edge", color=colours.tolist())
    of_all, ties = accuracy("all", margins), int((margins == 0).sum())
    axes.bar(0, ties, np.diff(counted.edges)[0], align="edge", color=NEUTRAL)
    axes.axvline(0, color=NEUTRAL, linewidth=1)
    shown = f", {ties:,} ties, which count as wrong (grey)" if ties else ""
    axes.set_title(f"{of_all.pairs:,} pairs, {of_all.share:.1%} of them right{shown}", fontsize=10)
    axes.set_xlabel("reward margin, chosen − rejected")
    axes.set_ylabel("pairs")
    _write(figure, path)


def accuracy_by_subset_png(run: Path, path: Path) -> None:
    """Draw a run's accuracy by subset with 95 % intervals; of many subsets, the largest `SHOWN_SUBSETS`.

    Args:
        run: what `dpo-fast evaluate --group-by COLUMN` wrote.
        path: the file to write.

    Raises:
        MissingDependencyError: matplotlib is not installed.
        UsageError: `run` is no finished run, or has no subsets.
        StorageError: it is damaged, or the disk refused.
    """
    pairs = read_pairs(run)
    if pairs.sums.groups is None:
        raise UsageError(f"{run}: has no subsets; evaluate with --group-by COLUMN")
    subsets = largest(accuracy_by_subset(pairs.margins, pairs.sums.groups))
    figure, axes = _figure(height=1.2 + 0.28 * len(subsets))
    shares = np.array([each.share for each in subsets])
    ends = np.array([each.interval for each in subsets])  # (S, 2)
    places = np.arange(len(subsets))
    axes.errorbar(
        shares, places, xerr=np.abs(ends - shares[:, None]).T, fmt="o", color=CHOSEN, ecolor=NEUTRAL, markersize=5
    )
    # Names come from data: no mathematics in them.
    labels = [f"{one_line(each.name, 40)} ({each.pairs:,})" for each in subsets]
    axes.set_yticks(places, labels, fontsize=8, parse_math=False)
    axes.set_ylim(len(subsets) - 0.5, -0.5)
    axes.set_xlim(*share_axis(ends.min(), ends.max()))
    axes.grid(axis="x", color=NEUTRAL, alpha=0.25)
    axes.set_xlabel("accuracy, 95 % interval")
    _write(figure, path)


def _figure(*, height: float) -> "tuple[Figure, Axes]":
    """An empty figure of this height in inches."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingDependencyError("matplotlib", "report", "a plot") from error
    # Not by pyplot, which would choose a window system and keep the figure.
    figure = Figure(figsize=(7, height), layout="constrained")
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _write(figure: "Figure", path: Path) -> None:
    """Write the figure at once; the same figure gives the same bytes."""
    content = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from")  # of a name; the card has it as text
        figure.savefig(content, format="png", dpi=DOTS_PER_INCH, metadata={"Software": None})
    write_bytes(path, content.getvalue())
