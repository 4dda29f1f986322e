"""What two runs of the same must have in common, whoever scored."""

import json
from pathlib import Path

from dpo_fast.files import sha256
from dpo_fast.run_folder import read_metrics

OF_TIME_AND_PLACE = ("this_process", "cluster", "hardware", "engines")


def files(run: Path) -> dict[str, str]:
    """SHA-256 of a run's parts, checksums and skipped rows, by name."""
    return {
        path.relative_to(run).as_posix(): sha256(path) for path in [*(run / "scores").iterdir(), run / "skipped.jsonl"]
    }


def numbers(run: Path) -> str:
    """All of metrics.json that is no matter of time or place."""
    metrics = read_metrics(run)
    for name in OF_TIME_AND_PLACE:
        metrics["provenance"].pop(name, None)
    return json.dumps({name: value for name, value in metrics.items() if name != "timing"}, sort_keys=True)
