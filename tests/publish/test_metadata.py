"""What the Hub would refuse of a card is said before it is asked; a card of ours is taken."""

from typing import Any

import pytest
import yaml
from test_card import HOSTILE, METRICS, SOURCE, render

from dpo_fast.publish.metadata import problems_of_card

LICENSED = "---\nlicense: apache-2.0\n---\n"


RESULT = {"task": {"type": "a"}, "dataset": {"type": "a", "name": "a"}}


def index(*results: Any) -> dict[str, Any]:
    return {"model-index": [{"name": "x", "results": list(results)}]}


def card(**fields: Any) -> str:
    return f"---\n{yaml.safe_dump({'license': 'mit', **fields})}---\n# Text\n"


def test_our_cards_are_taken() -> None:
    assert problems_of_card(render(METRICS, source_card=LICENSED, base_model="someone/base")) == []
    assert problems_of_card(render(METRICS, source_card=SOURCE)) == []
    hostile = {**METRICS, "groups": {HOSTILE: {"pairs": 1}}}
    hostile["provenance"] = {**METRICS["provenance"], "dataset": {"name": HOSTILE, "split": HOSTILE}}
    assert problems_of_card(render(hostile, source_card=LICENSED)) == []


def test_a_missing_licence_is_named() -> None:
    [problem] = problems_of_card(render(METRICS))
    assert "no licence is named" in problem


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"license": "My Licence!"}, "license 'My Licence!'"),
        ({"license": [1]}, "license is neither"),
        ({"language": "English"}, "language 'English' is no ISO 639 code"),
        ({"tags": [{"a": 1}]}, "tags is neither"),
        ({"base_model": "/home/me/base"}, "base_model '/home/me/base' is no id"),
        ({"base_model": ["a/b", "../c"]}, "base_model '../c'"),
        ({"datasets": ["a/b/c"]}, "datasets 'a/b/c'"),
        ({"pipeline_tag": ["text-generation"]}, "pipeline_tag is no text"),
        ({"model-index": [{"results": []}]}, "a model has no name"),
        (index({"task": {}, "dataset": {"type": "a", "name": "a"}}), "task.type"),
        (index({"task": {"type": "a"}, "dataset": {"type": "a"}}), "dataset.name"),
        (index({**RESULT, "metrics": [{"type": "acc"}]}), "a metric has no type or no value"),
        (index({**RESULT, "source": {"name": "x"}}), "a source without a url"),
    ],
)  # fmt: skip
def test_what_the_hub_refuses_is_named(fields: dict[str, Any], says: str) -> None:
    problems = problems_of_card(card(**fields))
    assert len(problems) == 1, problems
    assert says in problems[0]


@pytest.mark.parametrize(
    "fields",
    [
        {"license": ["mit", "apache-2.0"]}, {"language": ["en", "zh", "code", "pt-br"]}, {"base_model": "gpt2"},
        {"tags": "one", "datasets": "someone/pairs"}, {"license": "other", "license_name": "x"},
        index({**RESULT, "metrics": [{"type": "acc", "value": 0}]}),
    ],
)  # fmt: skip
def test_what_the_hub_takes_is_not(fields: dict[str, Any]) -> None:
    assert problems_of_card(card(**fields)) == []
