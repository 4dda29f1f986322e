"""The model card's plots."""

import sys
from pathlib import Path

import numpy as np
import pytest
from fake_engines import make_fake_bundle
from PIL import Image

from dpo_fast.errors import MissingDependencyError, UsageError
from dpo_fast.report.images import accuracy_by_subset_png, margin_histogram_png

from .made_runs import make_run, make_table


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    table = make_table(400, np.arange(1, 400))
    # No mathematics, no new lines, characters that the font lacks.
    table.groups[:] = ["$\\frac{", "<b>", "name\n\x1b[31m" + "y" * 300, "数学"] * 100
    return make_run(folder / "run", make_fake_bundle(folder / "bundle"), table)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("draw", [margin_histogram_png, accuracy_by_subset_png])
def test_plots_are_png_files_and_the_same_each_time(run: Path, tmp_path: Path, draw: object) -> None:
    assert callable(draw)
    for name in ("one.png", "two.png"):
        draw(run, tmp_path / name)

    with Image.open(tmp_path / "one.png") as image:
        assert image.format == "PNG"
        assert image.width == 7 * 150
        assert len(image.convert("RGB").getcolors(1 << 20) or []) > 10  # something is drawn
    assert (tmp_path / "one.png").read_bytes() == (tmp_path / "two.png").read_bytes()


def test_a_run_without_subsets_has_no_plot_of_them(tmp_path: Path) -> None:
    table = make_table(20, np.arange(1, 400))
    table.groups[:] = [None] * 20
    run = make_run(tmp_path / "run", make_fake_bundle(tmp_path / "bundle"), table)

    with pytest.raises(UsageError, match="--group-by"):
        accuracy_by_subset_png(run, tmp_path / "plot.png")
    assert not (tmp_path / "plot.png").exists()


def test_matplotlib_missing_names_the_extra(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)

    with pytest.raises(MissingDependencyError, match=r"dpo-fast\[report\]"):
        margin_histogram_png(run, tmp_path / "plot.png")
