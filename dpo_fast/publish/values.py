"""What a card says of files that may hold anything: a run's metrics, another author's front matter.

Each function takes any JSON or YAML value, and gives what can be shown of it, or nothing.
"""

import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dpo_fast.text import one_line

METRIC_LABELS = {
    "eval_loss": "Loss",
    "eval_rewards/chosen": "Reward of the chosen completions",
    "eval_rewards/rejected": "Reward of the rejected completions",
    "eval_rewards/margins": "Reward margin, chosen − rejected",
    "eval_rewards/accuracies": "Reward accuracy (share of pairs with chosen above rejected)",
    "eval_logps/chosen": "Log-prob of the chosen completions",
    "eval_logps/rejected": "Log-prob of the rejected completions",
    "eval_logits/chosen": "Mean logit, chosen completions",
    "eval_logits/rejected": "Mean logit, rejected completions",
    "eval_entropy": "Entropy a token",
    "eval_mean_token_accuracy": "Token accuracy, chosen completions",
}
ACCURACY = "eval_rewards/accuracies"
MARGIN = "eval_rewards/margins"

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}", re.ASCII)
_FILE_SUFFIXES = (".jsonl", ".json", ".csv", ".parquet", ".arrow", ".gz", ".zst", ".txt", ".safetensors", ".onnx")


def as_number(value: Any) -> float | None:
    """A finite number, or None for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= sys.float_info.max:
        return None
    return float(value)


def as_text(value: Any) -> str | None:
    """A name or a number as one line of text, None where there is none; of a mapping, its name."""
    if isinstance(value, Mapping):
        value = value.get("name")
    if value is None or isinstance(value, bool | list | tuple | Mapping):
        return None
    return one_line(value) or None


def as_mapping(value: Any) -> Mapping[str, Any]:
    """The value, or nothing where it is not a mapping."""
    return value if isinstance(value, Mapping) else {}


def as_list(value: Any) -> list[Any]:
    """The values of a field that holds one value, several, or none."""
    if value is None:
        return []
    return list(value) if isinstance(value, list | tuple) else [value]


def as_interval(metrics: Mapping[str, Any], key: str) -> tuple[float, float] | None:
    """The 95 % interval of a metric, or None where the file has none that is whole."""
    match [as_number(end) for end in as_list(as_mapping(metrics.get("intervals")).get(key))]:
        case [float(low), float(high)]:
            return low, high
    return None


def is_hub_id(name: Any) -> bool:
    """Whether this has the form of a Hub id, `user/name`."""
    return isinstance(name, str) and _HUB_ID.fullmatch(name) is not None


def is_on_hub(name: Any) -> bool:
    """Whether this names something on the Hub rather than a path, as far as one can tell without asking the Hub."""
    return is_hub_id(name) and not name.endswith(_FILE_SUFFIXES) and not Path(name).exists()


def is_model_id(name: Any) -> bool:
    """Whether this has the form of a model's id, `user/name` or, of the Hub's first models, `name`."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def dataset_of(metrics: Mapping[str, Any]) -> tuple[str | None, str | None, str | None]:
    """The data set's name, split and revision; of a path only its last part, as its folders are nobody's business."""
    provenance = as_mapping(metrics.get("provenance"))
    dataset = provenance.get("dataset")
    name = as_text(dataset)
    if name and not is_on_hub(name):
        name = re.split(r"[/\\]", name.rstrip("/\\"))[-1] or None
    return name, as_text(as_mapping(dataset).get("split")), as_text(as_mapping(dataset).get("revision"))


def loss_of(metrics: Mapping[str, Any]) -> tuple[str, str | None]:
    """The loss types, joined, and beta."""
    settings = as_mapping(as_mapping(metrics.get("provenance")).get("settings"))
    names = [text for name in as_list(settings.get("loss_type")) if (text := as_text(name))]
    return ", ".join(names), as_text(settings.get("beta"))
