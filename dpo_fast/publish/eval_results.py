"""The file `.eval_results/dpo_fast.yaml`: one number that the Hub shows on a benchmark data set's leaderboard.

The format is https://huggingface.co/docs/hub/eval-results: of a data set on the Hub, one value for each of its tasks.
Of preference pairs that is the reward accuracy; the card's `model-index` has the other metrics.
"""

from collections.abc import Mapping
from typing import Any

from dpo_fast.publish.values import (
    ACCURACY,
    METRIC_LABELS,
    as_interval,
    as_mapping,
    as_number,
    as_text,
    dataset_of,
    is_on_hub,
    loss_of,
)

PATH = ".eval_results/dpo_fast.yaml"
TASK = "default"  # what a benchmark with one task calls it


def render_eval_results(metrics: Mapping[str, Any], *, task: str = TASK) -> str | None:
    """Render the file, or None where the pairs are no data set of the Hub, or there is no accuracy.

    Args:
        metrics: the content of a run's metrics.json.
        task: the task's id in the data set's eval.yaml.
    """
    from huggingface_hub import EvalResultEntry, eval_result_entries_to_yaml
    from huggingface_hub.utils import yaml_dump  # type: ignore[attr-defined]

    dataset, split, revision = dataset_of(metrics)
    accuracy = as_number(metrics.get(ACCURACY))
    if dataset is None or not is_on_hub(dataset) or accuracy is None:
        return None
    interval, (loss, beta) = as_interval(metrics, ACCURACY), loss_of(metrics)
    pairs = as_text(as_mapping(metrics.get("counts")).get("pairs"))
    notes = [
        METRIC_LABELS[ACCURACY],
        interval and f"95 % interval {interval[0]:.5g} to {interval[1]:.5g}",
        pairs and f"{pairs} pairs",
        split and f"split {split}",
        loss and f"loss {loss}",
        beta and f"beta {beta}",
    ]
    entry = EvalResultEntry(
        dataset_id=dataset,
        task_id=task,
        value=accuracy,
        dataset_revision=revision,
        notes=", ".join(note for note in notes if note),
    )
    return yaml_dump(eval_result_entries_to_yaml([entry]), sort_keys=False)
