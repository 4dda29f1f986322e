"""The model card: a checkpoint's README.md, with what an evaluation found.

A card is front matter that the Hub reads (tags, base model, results) and text that people read. What a card already
says is its author's: its fields and its text stay, and ours stands between two markers, replaced when written again.
"""

import html
import json
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dpo_fast.errors import CheckpointError, StorageError
from dpo_fast.files import write_text
from dpo_fast.text import one_line

if TYPE_CHECKING:
    from huggingface_hub import EvalResult
    from huggingface_hub.repocard import RepoCard

START_MARKER = "<!-- dpo_fast: evaluation -->"
END_MARKER = "<!-- dpo_fast: end -->"
TAGS = ("dpo", "dpo_fast")
# Marks the results in `model-index` that are ours to replace; the Hub passes a metric's `config` through as it is.
METRIC_CONFIG = "dpo_fast"
TITLE = "# DPO policy"
UNKNOWN = "–"
SHOWN_GROUPS = 50

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

# The innermost pair of markers, so that a marker left alone by an editor never swallows the author's text.
_OUR_PART = re.compile(
    f"{re.escape(START_MARKER)}(?:(?!{re.escape(START_MARKER)}).)*?{re.escape(END_MARKER)}", re.DOTALL
)
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}", re.ASCII)
_FILE_SUFFIXES = (".jsonl", ".json", ".csv", ".parquet", ".arrow", ".gz", ".zst", ".txt", ".safetensors", ".onnx")


def render_card(
    *,
    source_card: str | None,
    metrics: dict[str, Any] | None,
    base_model: str | None,
    repo_id: str | None = None,
    library_name: str = "transformers",
) -> str:
    """Render a model card; the same arguments give the same text.

    Args:
        source_card: the README.md that the checkpoint brought, or an earlier card of ours; its front matter and text
            are kept, except for our own part between the markers and our own results.
        metrics: the content of a run's metrics.json, or None where no evaluation has been run. Keys may be missing.
        base_model: the Hub id of the model that the policy was trained from; anything else (a path) is left out.
        repo_id: the Hub id that the card is published under, for the code that loads the model and for the results.
        library_name: `transformers`, or `peft` for an adapter, where the source card names none.

    Returns:
        The card: YAML front matter and Markdown.

    Raises:
        CheckpointError: the source card's front matter is not what the Hub takes.
    """
    from huggingface_hub import ModelCardData

    card = _parse_card(source_card or TITLE + "\n")
    data = card.data
    base_model = base_model if _is_on_hub(base_model) else None
    results = _eval_results(metrics or {})
    own = ModelCardData(
        base_model=base_model,
        eval_results=results or None,
        library_name=library_name,
        # model-index asks for a name; "policy" is what the folder is called in every bundle.
        model_name=(repo_id or "policy").split("/")[-1] if results else None,
        pipeline_tag="text-generation",
    ).to_dict()  # type: ignore[no-untyped-call]
    own_index = own.pop("model-index", [])
    for field, value in own.items():
        if data.get(field) is None:
            data[field] = value
    tags = _as_list(data.get("tags"))
    data["tags"] = tags + [tag for tag in TAGS if tag not in tags]
    data["model-index"] = _merge_model_index(data.get("model-index") or [], own_index) or None
    # YAML 1.1 reads Norwegian's code as false, and would write it back so.
    if data.get("language") is not None:
        languages = ["no" if language is False else language for language in _as_list(data["language"])]
        data["language"] = languages if isinstance(data["language"], list) else languages[0]
    part = _render_part(metrics, data.get("base_model"), repo_id, data["library_name"])
    card.text = _replace_part(card.text, part)
    return str(card)


def write_card(
    folder: Path, metrics: dict[str, Any] | None, *, base_model: str | None = None, repo_id: str | None = None
) -> Path:
    """Write `folder/README.md`, keeping what an existing one says; atomic, by a temporary sibling and one rename.

    The rename also parts the card from the checkpoint's own README.md where the two are hard links to one file.

    Args:
        folder: a model folder.
        metrics: see `render_card`.
        base_model: see `render_card`; a PEFT adapter's own base model where None.
        repo_id: see `render_card`.

    Returns:
        The path of the card.

    Raises:
        CheckpointError: there is no such folder, or its README.md or adapter_config.json cannot be read.
        StorageError: the disk refused.
    """
    if not folder.is_dir():
        raise CheckpointError(f"{str(folder)!r} is not a folder; give the folder of a saved model")
    path = folder / "README.md"
    adapter = folder / "adapter_config.json"
    try:
        is_adapter = adapter.is_file()
        if is_adapter and base_model is None:
            base_model = _adapter_base_model(adapter)
        # newline="" and utf-8-sig: the author's line endings stay, a byte-order mark does not hide the front matter.
        source_card = None
        if path.exists():
            with path.open(encoding="utf-8-sig", newline="") as file:
                source_card = file.read()
        card = render_card(
            source_card=source_card,
            metrics=metrics,
            base_model=base_model,
            repo_id=repo_id,
            library_name="peft" if is_adapter else "transformers",
        )
        write_text(path, card)
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{str(path)!r} is not UTF-8 ({error.reason}); convert or remove it") from error
    except CheckpointError as error:
        raise CheckpointError(f"{str(path)!r}: {error}") from error
    except OSError as error:
        place = str(error.filename or path)
        raise StorageError(f"{place!r}: {error.strerror or error}; check the disk's space and permissions") from error
    return path


def start_card(copy: Path, source: Path) -> None:
    """Make the README.md of a copied model folder a model card, without numbers yet.

    Raises:
        CheckpointError: it cannot be read; named where the user has it, in `source`.
        StorageError: the disk refused.
    """
    try:
        write_card(copy, None)
    except CheckpointError as error:
        raise CheckpointError(str(error).replace(str(copy), str(source))) from error


class _Literal(str):
    """Text of a form that needs no escaping, for code and addresses, where a backslash would be printed."""


def _parse_card(source: str) -> "RepoCard":
    """Parse a card so that every field survives as it is, after making sure that the Hub's own class takes it."""
    import yaml  # type: ignore[import-untyped]
    from huggingface_hub import ModelCard
    from huggingface_hub.repocard import REGEX_YAML_BLOCK, RepoCard

    if not REGEX_YAML_BLOCK.search(source):
        # An empty block says that there is none, without the warning.
        source = f"---\n\n---\n{source}"
    try:
        ModelCard(source)
        # ModelCard would flatten a model-index of several models into one; the plain class keeps the field as it is.
        return RepoCard(source)
    except (yaml.YAMLError, ValueError, TypeError, AttributeError, RecursionError) as error:
        reason = one_line(error)
        raise CheckpointError(f"its front matter is not a model card's ({reason}); mend or remove it") from error


def _replace_part(text: str, part: str) -> str:
    """Put our part in the place of an earlier one, or after the text; the rest stays as it is."""
    newline = "\r\n" if "\r\n" in text else "\n"
    part = f"{START_MARKER}\n{part.strip()}\n{END_MARKER}".replace("\n", newline)
    if _OUR_PART.search(text):
        return _OUR_PART.sub(lambda match: part, text, count=1)
    separator = "" if not text else newline if text.endswith("\n") else newline * 2
    return f"{text}{separator}{part}{newline}"


def _merge_model_index(index: list[dict[str, Any]], own: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Drop our earlier results from a parsed `model-index`, add the new ones to its first model, keep the others'."""
    merged = []
    for model in index:
        results = []
        for result in model["results"]:
            others = [metric for metric in result["metrics"] if metric.get("config") != METRIC_CONFIG]
            if others or not result["metrics"]:
                results.append({**result, "metrics": others})
        if results:
            merged.append({**model, "results": results})
    if not merged:
        return own
    for model in own:
        merged[0]["results"].extend(model["results"])
    return merged


def _eval_results(metrics: dict[str, Any]) -> "list[EvalResult]":
    """The finite metrics as the Hub's results: unrounded, without intervals, which it has no field for."""
    from huggingface_hub import EvalResult

    dataset, split, revision = _dataset(metrics)
    return [
        EvalResult(
            task_type="text-generation",
            task_name="Preference evaluation",
            dataset_type=dataset or "unknown",
            dataset_name=dataset or "unknown",
            dataset_split=split,
            dataset_revision=revision,
            metric_type=key,
            metric_name=label,
            metric_value=value,
            metric_config=METRIC_CONFIG,
        )
        for key, label in METRIC_LABELS.items()
        if (value := _number(metrics.get(key))) is not None
    ]


def _render_part(metrics: dict[str, Any] | None, base_model: Any, repo_id: str | None, library_name: Any) -> str:
    """Fill the template; every value that it prints is escaped, so that only the template itself is Markdown."""
    from importlib.resources import files

    from jinja2 import Environment, StrictUndefined

    # Not autoescape, which knows HTML but not Markdown: `finalize` passes every printed value through ours.
    environment = Environment(  # noqa: S701
        finalize=_escape, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    template = environment.from_string(files("dpo_fast.publish").joinpath("card.md.jinja").read_text(encoding="utf-8"))
    evaluation = metrics or {}
    dataset, split, revision = _dataset(evaluation)
    groups = _mapping(evaluation.get("groups"))
    rows = [{"key": _Literal(key), "label": label, **_cell(evaluation, key)} for key, label in METRIC_LABELS.items()]
    base_model = base_model if _is_on_hub(base_model) else None
    return template.render(
        base_model=base_model,
        base_model_url=_Literal(f"https://huggingface.co/{base_model}"),
        library_name=library_name,
        evaluated=metrics is not None,
        dataset=dataset,
        split=split,
        revision=revision,
        rows=[row for row in rows if row["value"] != UNKNOWN],
        aggregate=_mapping(evaluation.get("provenance")).get("aggregate"),
        facts=_facts(evaluation),
        groups=[_group_row(name, groups[name]) for name in sorted(groups, key=str)[:SHOWN_GROUPS]],
        more_groups=max(0, len(groups) - SHOWN_GROUPS),
        model_id=_Literal(repo_id if _is_hub_id(repo_id) else "user/name"),
        model_id_is_placeholder=not _is_hub_id(repo_id),
    )


def _facts(metrics: dict[str, Any]) -> list[dict[str, str]]:
    """What the numbers were computed from and how, as far as the metrics say."""
    counts, provenance = _mapping(metrics.get("counts")), _mapping(metrics.get("provenance"))
    settings = _mapping(provenance.get("settings"))
    pairs = _text(counts.get("pairs"))
    details = [f"{name} {text}" for name in ("ties", "truncated", "skipped") if (text := _text(counts.get(name)))]
    loss_types = [text for name in _as_list(settings.get("loss_type")) if (text := _text(name))]
    values = {
        "Pairs": pairs and pairs + (f" ({', '.join(details)})" if details else ""),
        "First rows only": _text(provenance.get("limit")),
        "Loss type": ", ".join(loss_types),
        "Beta": _text(settings.get("beta")),
        "Scored without a reference": _text(settings.get("reference_free")),
        "Engine": _text(provenance.get("engine")),
        "Precision": _text(provenance.get("precision")),
    }
    return [{"label": label, "value": value} for label, value in values.items() if value]


def _group_row(name: Any, group: Any) -> dict[str, Any]:
    """One row of the table of groups."""
    group = _mapping(group)
    return {
        "name": _text(name) or UNKNOWN,
        "pairs": _text(group.get("pairs")) or UNKNOWN,
        "ties": _text(group.get("ties")) or UNKNOWN,
        "accuracy": _cell(group, "eval_rewards/accuracies"),
        "margin": _cell(group, "eval_rewards/margins"),
    }


def _cell(metrics: Mapping[str, Any], key: str) -> dict[str, str]:
    """A metric and its interval, five significant digits each."""
    value = _number(metrics.get(key))
    ends = [_number(end) for end in _as_list(_mapping(metrics.get("intervals")).get(key))]
    known = [end for end in ends if end is not None]
    return {
        "value": UNKNOWN if value is None else f"{value:.5g}",
        "interval": f"{known[0]:.5g} to {known[1]:.5g}" if len(ends) == len(known) == 2 else UNKNOWN,
    }


def _dataset(metrics: dict[str, Any]) -> tuple[str | None, str | None, str | None]:
    """The data set's name, split and revision; of a path only its last part, as its folders are nobody's business."""
    provenance = _mapping(metrics.get("provenance"))
    dataset = provenance.get("dataset")
    name = _text(dataset)
    if name and not _is_on_hub(name):
        name = re.split(r"[/\\]", name.rstrip("/\\"))[-1] or None
    return name, _text(_mapping(dataset).get("split")), _text(_mapping(dataset).get("revision"))


def _is_hub_id(name: Any) -> bool:
    """Whether this has the form of a Hub id, `user/name`."""
    return isinstance(name, str) and _HUB_ID.fullmatch(name) is not None


def _is_on_hub(name: Any) -> bool:
    """Whether this names something on the Hub rather than a path, as far as one can tell without asking the Hub."""
    return _is_hub_id(name) and not name.endswith(_FILE_SUFFIXES) and not Path(name).exists()


def _adapter_base_model(adapter: Path) -> str | None:
    """The base model that a PEFT adapter names."""
    try:
        name = _mapping(json.loads(adapter.read_text(encoding="utf-8"))).get("base_model_name_or_path")
    except (ValueError, RecursionError) as error:
        raise CheckpointError("adapter_config.json beside it is not JSON; save the adapter again") from error
    return name if isinstance(name, str) else None


def _number(value: Any) -> float | None:
    """A finite number, or None for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= sys.float_info.max:
        return None
    return float(value)


def _text(value: Any) -> str | None:
    """A name or a number as one line of text, None where there is none; of a mapping, its name."""
    if isinstance(value, Mapping):
        value = value.get("name")
    if value is None or isinstance(value, bool | list | tuple | Mapping):
        return None
    return one_line(value) or None


def _escape(value: Any) -> str:
    """Make text mean itself in Markdown and in HTML: in a sentence, a table cell, a link's text."""
    if isinstance(value, _Literal):
        return str(value)
    return html.escape(re.sub(r"([\\`*_\[\]|~$])", r"\\\1", str(value)), quote=False)


def _mapping(value: Any) -> Mapping[str, Any]:
    """The value, or nothing where it is not a mapping."""
    return value if isinstance(value, Mapping) else {}


def _as_list(value: Any) -> list[Any]:
    """The values of a field that holds one value, several, or none."""
    if value is None:
        return []
    return list(value) if isinstance(value, list | tuple) else [value]
