"""MLflow, by MLFLOW_TRACKING_URI, MLFLOW_EXPERIMENT_NAME, MLFLOW_RUN_ID, MLFLOW_RUN_NAME and so on."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import mlflow

from dpo_fast.trackers.base import files_of

TABLE = "samples.json"


class MlflowTracker:
    """An MLflow run; the samples of all steps are one table."""

    def __init__(self, run_name: str | None) -> None:
        """Open a run, or join the one that is open."""
        active = mlflow.active_run()
        self._is_own = active is None
        run = active or mlflow.start_run(run_name=os.environ.get("MLFLOW_RUN_NAME") or run_name)
        self._id = run.info.run_id
        self.place = f"run {self._id} at {mlflow.get_tracking_uri()}"

    def log(self, metrics: Mapping[str, float], samples: Sequence[Mapping[str, Any]], step: int) -> None:
        """See `Tracker.log`."""
        if metrics:
            mlflow.log_metrics(dict(metrics), step=step, run_id=self._id)
        if samples:
            rows = [{"step": step, **sample} for sample in samples]
            mlflow.log_table({name: [row[name] for row in rows] for name in rows[0]}, TABLE, run_id=self._id)

    def log_files(self, paths: Sequence[Path]) -> None:
        """See `Tracker.log_files`."""
        for name, file in files_of(paths):
            folder = PurePosixPath(name).parent.as_posix()
            mlflow.log_artifact(str(file), None if folder == "." else folder, run_id=self._id)

    def close(self, *, failed: bool) -> None:
        """See `Tracker.close`."""
        if self._is_own:
            mlflow.end_run("FAILED" if failed else "FINISHED")
