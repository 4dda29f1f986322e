"""The model card: a checkpoint's README.md, with what an evaluation found.

A card is front matter that the Hub reads (tags, base model, results) and text that people read. What a card already
says is its author's: its fields and its text stay, and ours stands in two parts between markers, replaced when written
again: what the model is and what an evaluation found; and what was verified and how the model is used, which a push
knows better than an evaluation.
"""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from dpo_fast.errors import CheckpointError, StorageError
from dpo_fast.files import write_text
from dpo_fast.publish.card_parts import render_evaluation, render_use
from dpo_fast.publish.graphs import PublishedGraph
from dpo_fast.publish.values import METRIC_LABELS, as_list, as_mapping, as_number, dataset_of, is_model_id, is_on_hub
from dpo_fast.publish.verified import Verified
from dpo_fast.text import one_line

if TYPE_CHECKING:
    from huggingface_hub import EvalResult
    from huggingface_hub.repocard import RepoCard

START_MARKER, END_MARKER = "<!-- dpo_fast: evaluation -->", "<!-- dpo_fast: end -->"
START_OF_USE, END_OF_USE = "<!-- dpo_fast: use -->", "<!-- dpo_fast: end of use -->"
TAGS = ("dpo", "dpo_fast")
GRAPH_TAG = "onnx"
# Marks the results in `model-index` that are ours to replace; the Hub passes a metric's `config` through as it is.
METRIC_CONFIG = "dpo_fast"
TITLE = "# DPO policy"
# model-index asks for a name; this is what the folder is called in every bundle.
UNNAMED = "policy"
NO_PLOTS: Mapping[str, str] = MappingProxyType({})


def render_card(
    *,
    source_card: str | None,
    metrics: dict[str, Any] | None,
    base_model: str | None,
    repo_id: str | None = None,
    library_name: str = "transformers",
    plots: Mapping[str, str] = NO_PLOTS,
) -> str:
    """Render a model card; the same arguments give the same text.

    Args:
        source_card: the README.md that the checkpoint brought, or an earlier card of ours; its front matter and text
            are kept, except for our own parts between the markers, our own results, and paths of the machine that it
            was trained on where the Hub takes ids alone.
        metrics: the content of a run's metrics.json, or None where no evaluation has been run. Keys may be missing.
        base_model: the Hub id of the model that the policy was trained from; anything else (a path) is left out.
        repo_id: the Hub id that the card is published under, for the code that loads the model and for the results.
        library_name: `transformers`, or `peft` for an adapter, where the source card names none.
        plots: path in the repository by what the plot shows.

    Returns:
        The card: YAML front matter and Markdown.

    Raises:
        CheckpointError: the source card's front matter is not what the Hub takes.
    """
    from huggingface_hub import ModelCardData

    card = _parse_card(source_card or TITLE + "\n")
    data = card.data
    _drop_paths(data)
    base_model = base_model if is_on_hub(base_model) else None
    results = _eval_results(metrics or {})
    own = ModelCardData(
        base_model=base_model,
        eval_results=results or None,
        library_name=library_name,
        model_name=(repo_id or UNNAMED).split("/")[-1] if results else None,
        pipeline_tag="text-generation",
    ).to_dict()  # type: ignore[no-untyped-call]
    own_index = own.pop("model-index", [])
    for field, value in own.items():
        if data.get(field) is None:
            data[field] = value
    _add_tags(data, TAGS)
    data["model-index"] = _merge_model_index(data.get("model-index") or [], own_index) or None
    # YAML 1.1 reads Norwegian's code as false, and would write it back so.
    if data.get("language") is not None:
        languages = ["no" if language is False else language for language in as_list(data["language"])]
        data["language"] = languages if isinstance(data["language"], list) else languages[0]
    part = render_evaluation(metrics, base_model=data.get("base_model"), library_name=data["library_name"], plots=plots)
    card.text = _replace_part(card.text, part, START_MARKER, END_MARKER)
    _put_use(card, repo_id, None, ())
    return str(card)


def render_card_use(
    card: str,
    *,
    repo_id: str | None,
    verified: Verified | None = None,
    graphs: Sequence[PublishedGraph] = (),
) -> str:
    """Say anew on a card what was verified, how the model is loaded and how its graphs are run; the rest stays.

    Args:
        card: of `render_card`.
        repo_id: see `render_card`.
        verified: what a verification found of these very files.
        graphs: that lie in the repository.

    Raises:
        CheckpointError: the card's front matter is not what the Hub takes.
    """
    parsed = _parse_card(card)
    _put_use(parsed, repo_id, verified, graphs)
    return str(parsed)


def read_card(folder: Path) -> str | None:
    """A model folder's README.md, or None where it has none.

    Raises:
        CheckpointError: it is not UTF-8.
        StorageError: the disk refused.
    """
    path = folder / "README.md"
    if not path.exists():
        return None
    try:
        # newline="" and utf-8-sig: the author's line endings stay, a byte-order mark does not hide the front matter.
        with path.open(encoding="utf-8-sig", newline="") as file:
            return file.read()
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{str(path)!r} is not UTF-8 ({error.reason}); convert or remove it") from error
    except OSError as error:
        raise StorageError(f"{str(path)!r}: {error.strerror or error}; check its permissions") from error


def card_of_folder(
    folder: Path,
    metrics: dict[str, Any] | None,
    *,
    base_model: str | None = None,
    repo_id: str | None = None,
    plots: Mapping[str, str] = NO_PLOTS,
) -> str:
    """Render the card of a model folder, from the one that it holds.

    Args:
        folder: a Transformers or PEFT folder.
        metrics: see `render_card`.
        base_model: see `render_card`; a PEFT adapter's own base model where None.
        repo_id: see `render_card`.
        plots: see `render_card`.

    Raises:
        CheckpointError: its README.md or adapter_config.json cannot be read.
        StorageError: the disk refused.
    """
    adapter = folder / "adapter_config.json"
    source_card = read_card(folder)
    try:
        is_adapter = adapter.is_file()
        if is_adapter and base_model is None:
            base_model = adapter_base_model(folder)
        return render_card(
            source_card=source_card,
            metrics=metrics,
            base_model=base_model,
            repo_id=repo_id,
            library_name="peft" if is_adapter else "transformers",
            plots=plots,
        )
    except CheckpointError as error:
        raise CheckpointError(f"{str(folder / 'README.md')!r}: {error}") from error


def write_card(
    folder: Path, metrics: dict[str, Any] | None, *, base_model: str | None = None, repo_id: str | None = None
) -> Path:
    """Write `folder/README.md`, keeping what an existing one says; atomic, by a temporary sibling and one rename.

    The rename also parts the card from the checkpoint's own README.md where the two are hard links to one file.

    Args:
        folder: a model folder.
        metrics: see `render_card`.
        base_model: see `card_of_folder`.
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
    try:
        write_text(path, card_of_folder(folder, metrics, base_model=base_model, repo_id=repo_id))
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


def adapter_base_model(folder: Path) -> str | None:
    """The base model that a PEFT folder's adapter names: a Hub id or a path; None where it names none.

    Raises:
        CheckpointError: its adapter_config.json is not JSON.
    """
    path = folder / "adapter_config.json"
    try:
        name = as_mapping(json.loads(path.read_text(encoding="utf-8"))).get("base_model_name_or_path")
    except (ValueError, RecursionError) as error:
        raise CheckpointError("adapter_config.json beside it is not JSON; save the adapter again") from error
    return name if isinstance(name, str) else None


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


def _put_use(
    card: "RepoCard", repo_id: str | None, verified: Verified | None, graphs: Sequence[PublishedGraph]
) -> None:
    """Put the second part on a parsed card, and what a push knows into its front matter."""
    data = card.data
    if graphs:
        _add_tags(data, (GRAPH_TAG,))
    for model in as_list(data.get("model-index")):
        if repo_id is not None and model["name"] == UNNAMED:
            model["name"] = repo_id.split("/")[-1]
    part = render_use(repo_id=repo_id, library_name=data.get("library_name"), verified=verified, graphs=graphs)
    card.text = _replace_part(card.text, part, START_OF_USE, END_OF_USE)


def _replace_part(text: str, part: str, start: str, end: str) -> str:
    """Put a part of ours in the place of an earlier one, or after the text; the rest stays as it is."""
    newline = "\r\n" if "\r\n" in text else "\n"
    part = f"{start}\n{part.strip()}\n{end}".replace("\n", newline)
    # The innermost pair of markers, so that a marker left alone by an editor never swallows the author's text.
    earlier = re.compile(f"{re.escape(start)}(?:(?!{re.escape(start)}).)*?{re.escape(end)}", re.DOTALL)
    if earlier.search(text):
        return earlier.sub(lambda match: part, text, count=1)
    separator = "" if not text else newline if text.endswith("\n") else newline * 2
    return f"{text}{separator}{part}{newline}"


def _add_tags(data: Any, tags: Sequence[str]) -> None:
    """Add tags to front matter that lacks them."""
    known = as_list(data.get("tags"))
    data["tags"] = known + [tag for tag in tags if tag not in known]


def _drop_paths(data: Any) -> None:
    """Drop base models that are paths, which PEFT and TRL write and the Hub refuses, and the tags that say the same."""
    known = as_list(data.get("base_model"))
    on_hub = [name for name in known if is_model_id(name)]
    if len(on_hub) < len(known):
        data["base_model"] = on_hub or None
    tags = as_list(data.get("tags"))
    kept = [tag for tag in tags if not str(tag).startswith("base_model:") or is_model_id(str(tag).split(":")[-1])]
    if len(kept) < len(tags):
        data["tags"] = kept


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

    dataset, split, revision = dataset_of(metrics)
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
        if (value := as_number(metrics.get(key))) is not None
    ]
