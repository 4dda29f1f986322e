"""Weights & Biases, by WANDB_PROJECT, WANDB_MODE, WANDB_NAME, WANDB_DIR, WANDB_ENTITY, WANDB_API_KEY and so on."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import wandb

from dpo_fast.trackers.base import PROJECT, STEP, files_of


class WandbTracker:
    """A W&B run; the trainer's step is a metric, `train/global_step`, over which the others are drawn."""

    def __init__(self, run_name: str | None) -> None:
        """Open a run, or join the one that is open."""
        self._is_own = wandb.run is None
        if wandb.run is None:
            quiet = wandb.Settings(silent=True, console="off", x_disable_stats=True, disable_code=True)
            self._run = wandb.init(
                project=os.environ.get("WANDB_PROJECT") or PROJECT,
                name=os.environ.get("WANDB_NAME") or run_name,
                job_type="evaluation",
                settings=quiet,
            )
            self._run.define_metric("*", step_metric=STEP, step_sync=True)
        else:
            self._run = wandb.run
        offline = self._run.offline or self._run.url is None  # an offline run is not to be asked for its address
        self.place = str(Path(self._run.dir).parent) if offline else str(self._run.url)

    def log(self, metrics: Mapping[str, float], samples: Sequence[Mapping[str, Any]], step: int) -> None:
        """See `Tracker.log`."""
        values: dict[str, Any] = {**metrics, STEP: step}
        if samples:
            columns = list(samples[0])
            values["samples"] = wandb.Table(columns, [[sample[name] for name in columns] for sample in samples])
        self._run.log(values)

    def log_files(self, paths: Sequence[Path]) -> None:
        """See `Tracker.log_files`."""
        artifact = wandb.Artifact(f"evaluation-{self._run.id}", type="evaluation")
        for name, file in files_of(paths):
            artifact.add_file(str(file), name)
        if artifact.manifest.entries:
            self._run.log_artifact(artifact)

    def close(self, *, failed: bool) -> None:
        """See `Tracker.close`."""
        if self._is_own:
            self._run.finish(exit_code=int(failed))
