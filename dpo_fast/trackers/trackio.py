"""Trackio, by TRACKIO_DIR, TRACKIO_SPACE_ID, TRACKIO_SERVER_URL; TRACKIO_PROJECT is read here, for Trackio has none."""

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import trackio
from trackio import context_vars
from trackio.utils import TRACKIO_DIR

from dpo_fast.trackers.base import PROJECT, files_of


class TrackioTracker:
    """A Trackio run; one of the same name in the project goes on, as with Transformers."""

    def __init__(self, run_name: str | None) -> None:
        """Open a run, or join the one that is open."""
        running = context_vars.current_run.get()
        self._is_own = running is None
        project = os.environ.get("TRACKIO_PROJECT") or PROJECT
        self._run = running or trackio.init(
            project, run_name, resume="allow", embed=False, auto_log_gpu=False, auto_log_cpu=False
        )
        where = os.environ.get("TRACKIO_SPACE_ID") or os.environ.get("TRACKIO_SERVER_URL") or str(TRACKIO_DIR)
        self.place = f"run {self._run.name} of {self._run.project} in {where.partition('?')[0]}"  # after it, a token

    def log(self, metrics: Mapping[str, float], samples: Sequence[Mapping[str, Any]], step: int) -> None:
        """See `Tracker.log`."""
        table = {"samples": trackio.Table(data=[dict(sample) for sample in samples])} if samples else {}
        if metrics or table:
            self._run.log({**metrics, **table}, step=step)

    def log_files(self, paths: Sequence[Path]) -> None:
        """See `Tracker.log_files`."""
        found = dict(files_of(paths))
        if found:
            name = re.sub(r"[^A-Za-z0-9._-]", "_", str(self._run.name))  # all that an artifact's name may hold
            artifact = trackio.Artifact(f"evaluation-{name}", type="evaluation")
            for path, file in found.items():
                artifact.add_file(str(file), path)
            self._run.log_artifact(artifact)

    def close(self, *, failed: bool) -> None:
        """See `Tracker.close`."""
        if self._is_own:
            trackio.finish()
