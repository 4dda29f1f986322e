"""What the Hub documents of a card's front matter, as far as that can be checked without asking it.

Sources: https://github.com/huggingface/hub-docs/blob/main/modelcard.md and huggingface_hub's `ModelCardData`. The Hub
has the last word, before any file is sent: these are warnings of what it would most likely refuse.
"""

import re
from collections.abc import Iterator, Mapping
from typing import Any

from dpo_fast.publish.values import as_list, as_mapping, is_model_id
from dpo_fast.text import one_line

TEXTS = ("license", "license_name", "license_link", "library_name", "pipeline_tag")
LISTS_OF_TEXT = ("tags", "datasets", "metrics", "language", "base_model")
# ISO 639-1, 639-2 or 639-3, perhaps with a region; or one of two words.
_LANGUAGE = re.compile(r"[a-z]{2,3}(-[a-z0-9]+)*|code|multilingual")
_LICENSE = re.compile(r"[a-z0-9][a-z0-9.+-]*")


def problems_of_card(card: str) -> list[str]:
    """What the Hub would most likely refuse in a card's front matter, a sentence each.

    Args:
        card: a card that huggingface_hub's classes take.
    """
    from huggingface_hub.repocard import RepoCard

    return list(_problems(RepoCard(card).data.to_dict()))  # type: ignore[no-untyped-call]


def _problems(data: Mapping[str, Any]) -> Iterator[str]:
    for field in TEXTS:
        if not isinstance(data.get(field, ""), str) and field != "license":  # several licences may be a list
            yield f"{field} is no text"
    for field in (*LISTS_OF_TEXT, "license"):
        values = as_list(data.get(field))
        if not all(isinstance(value, str) for value in values):
            yield f"{field} is neither a text nor a list of texts"
            continue
        for value in values:
            shown = one_line(repr(value))
            if field == "language" and not _LANGUAGE.fullmatch(value):
                yield f"language {shown} is no ISO 639 code"
            if field == "license" and not _LICENSE.fullmatch(value):
                yield f"license {shown} is no licence's identifier; see https://hf.co/docs/hub/repositories-licenses"
            if field in ("base_model", "datasets") and not is_model_id(value):
                yield f"{field} {shown} is no id on the Hub"
    if data.get("license") is None:
        yield "no licence is named: add `license:` to the front matter of the policy's README.md"
    yield from _problems_of_index(data.get("model-index"))


def _problems_of_index(index: Any) -> Iterator[str]:
    """The required fields of the specification's `model-index`."""
    for model in as_list(index):
        if not isinstance(as_mapping(model).get("name"), str):
            yield "model-index: a model has no name"
        for result in as_list(as_mapping(model).get("results")):
            required = {"task": ("type",), "dataset": ("type", "name")}
            for part, fields in required.items():
                for field in fields:
                    if not isinstance(as_mapping(as_mapping(result).get(part)).get(field), str):
                        yield f"model-index: a result has no {part}.{field}"
            for metric in as_list(as_mapping(result).get("metrics")):
                if not isinstance(as_mapping(metric).get("type"), str) or as_mapping(metric).get("value") is None:
                    yield "model-index: a metric has no type or no value"
            source = as_mapping(result).get("source")
            if source is not None and not as_mapping(source).get("url"):
                yield "model-index: a result has a source without a url"
