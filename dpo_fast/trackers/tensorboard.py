"""TensorBoard, by TENSORBOARD_LOGGING_DIR, as Transformers has it; without it, in runs/NAME of the working folder."""

import html
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.tensorboard import SummaryWriter

from dpo_fast.text import one_line
from dpo_fast.trackers.base import files_of

SHOWN = 4000  # characters of a cell
_MARKDOWN = re.compile(r"([\\`*_{}\[\]()#+\-.!|~])")


class TensorBoardTracker:
    """A folder of events. It keeps scalars, in float32, texts and images: of the files, those that are PNG."""

    def __init__(self, run_name: str | None) -> None:
        """Open the folder; what lies in one folder is one run."""
        folder = os.environ.get("TENSORBOARD_LOGGING_DIR") or str(Path("runs") / (run_name or "dpo-fast"))
        self.place = str(Path(folder).expanduser())
        self._writer = SummaryWriter(self.place)
        self._step = 0

    def log(self, metrics: Mapping[str, float], samples: Sequence[Mapping[str, Any]], step: int) -> None:
        """See `Tracker.log`."""
        self._step = step
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)
        if samples:
            lines = [list(samples[0]), ["---"] * len(samples[0]), *(map(_cell, sample.values()) for sample in samples)]
            self._writer.add_text("samples", "\n".join(f"| {' | '.join(line)} |" for line in lines), step)
        self._writer.flush()

    def log_files(self, paths: Sequence[Path]) -> None:
        """See `Tracker.log_files`; each image at the step that was logged last."""
        from PIL import Image

        for name, file in files_of(paths):
            if file.suffix == ".png":
                with Image.open(file) as image:
                    pixels = np.asarray(image.convert("RGB"))  # (H, W, 3)
                self._writer.add_image(name, pixels, self._step, dataformats="HWC")

    def close(self, *, failed: bool) -> None:
        """See `Tracker.close`."""
        self._writer.close()


def _cell(value: object) -> str:
    """A value as Markdown that shows it as it is: TensorBoard renders texts, and these are untrusted."""
    return _MARKDOWN.sub(r"\\\1", html.escape(one_line("" if value is None else value, SHOWN)))
