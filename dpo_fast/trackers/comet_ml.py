"""Comet, by COMET_PROJECT_NAME, COMET_START_ONLINE, COMET_OFFLINE_DIRECTORY, COMET_API_KEY and so on."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import comet_ml
import pandas as pd

from dpo_fast.trackers.base import files_of


class CometTracker:
    """A Comet experiment; each step's samples are a table of their own."""

    def __init__(self, run_name: str | None) -> None:
        """Open an experiment, or join the one that is open."""
        running = comet_ml.get_running_experiment()
        if running is not None and running.ended:  # which Comet still calls running
            running = None
        self._is_own = running is None
        # Nothing is collected but what is logged here.
        nothing_else = comet_ml.ExperimentConfig(
            name=os.environ.get("COMET_START_EXPERIMENT_NAME") or run_name,
            log_code=False,
            log_graph=False,
            parse_args=False,
            log_git_metadata=False,
            log_git_patch=False,
            log_env_details=False,
            auto_output_logging=False,
            auto_param_logging=False,
            auto_metric_logging=False,
            auto_log_co2=False,
            display_summary_level=0,
        )
        self._experiment = running or comet_ml.start(experiment_config=nothing_else)
        folder = getattr(self._experiment, "offline_directory", None)
        self.place = f"experiment {self._experiment.get_key()} in {folder}" if folder else str(self._experiment.url)

    def log(self, metrics: Mapping[str, float], samples: Sequence[Mapping[str, Any]], step: int) -> None:
        """See `Tracker.log`."""
        self._experiment.log_metrics(dict(metrics), step=step)
        if samples:
            table = pd.DataFrame(list(samples))
            self._experiment.log_table(f"samples-step-{step}.json", table, orient="records")

    def log_files(self, paths: Sequence[Path]) -> None:
        """See `Tracker.log_files`."""
        for name, file in files_of(paths):
            with file.open("rb") as content:  # which is copied; of a path, Comet would read the file at the end
                self._experiment.log_asset(content, file_name=name)

    def close(self, *, failed: bool) -> None:
        """See `Tracker.close`."""
        if self._is_own:
            self._experiment.end()
