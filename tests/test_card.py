"""The model card: what the Hub reads of it, what a person reads of it, and what it must leave alone."""

import copy
import json
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard
from huggingface_hub.repocard_data import model_index_to_eval_results
from hypothesis import given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from dpo_fast.errors import CheckpointError, StorageError
from dpo_fast.publish.card import (
    END_MARKER,
    END_OF_USE,
    START_MARKER,
    START_OF_USE,
    render_card,
    render_card_use,
    write_card,
)
from dpo_fast.publish.graphs import PublishedGraph
from dpo_fast.publish.values import METRIC_LABELS

METRICS: dict[str, Any] = {
    "eval_loss": 0.6543210987,
    "eval_rewards/chosen": -0.12345678,
    "eval_rewards/rejected": -0.5,
    "eval_rewards/margins": 0.37654322,
    "eval_rewards/accuracies": 0.625,
    "eval_logps/chosen": -123.456789,
    "eval_logps/rejected": -234.56789,
    "eval_logits/chosen": 1.25,
    "eval_logits/rejected": 1.5,
    "eval_entropy": 2.75,
    "eval_mean_token_accuracy": 0.4375,
    "counts": {"pairs": 64, "ties": 5, "truncated": 6, "skipped": 7, "tokens": {"prompt": 10}},
    "intervals": {"eval_rewards/accuracies": [0.5031, 0.7335], "eval_loss": [0.61, 0.69]},
    "groups": {
        "harmless": {"pairs": 40, "ties": 2, "eval_rewards/accuracies": 0.75, "eval_rewards/margins": 0.25,
                     "intervals": {"eval_rewards/accuracies": [0.6, 0.85]}},
        "helpful": {"pairs": 24, "ties": 3, "eval_rewards/accuracies": 0.125, "eval_rewards/margins": -0.25},
    },
    "timing": {"total_seconds": 1.5},
    "provenance": {
        "engine": "onnxruntime",
        "precision": "float32",
        "aggregate": "exact",
        "limit": 71,
        "dataset": {"name": "Anthropic/hh-rlhf", "split": "test"},
        "settings": {"beta": 0.25, "loss_type": ["sigmoid", "sft"], "reference_free": None},
    },
}  # fmt: skip
HOSTILE = (
    "a|b\n| x | </table><script>alert(1)</script> `code` **b** _i_ [l](http://x) {{ 7*7 }} $x$ \x1b[31m"
    " <!-- dpo_fast: end -->"
)
SOURCE = """---
# the author's comment
license: apache-2.0
language:
- no
- en
tags:
- trl
- dpo
datasets: someone/preferences
custom_field:
  nested: [1, 2]
model-index:
- name: theirs
  unknown: kept
  results:
  - task:
      type: text-generation
    dataset:
      name: IFEval
      type: HuggingFaceH4/ifeval
    metrics:
    - type: acc
      value: 0.5
      verified: true
    source:
      name: Leaderboard
      url: https://example.org
- name: second
  results:
  - task:
      type: other
    dataset:
      name: x
      type: x
    metrics:
    - type: f1
      value: 1
---

# My model

Text of the author | with <b>HTML</b> and `code`.
"""


class Page(HTMLParser):
    """What a browser makes of the rendered Markdown: the tags, and the text of each table cell."""

    def __init__(self, card: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.rows: list[list[str]] = []
        self.text = ""
        self.in_cell = False
        self.feed(MarkdownIt("commonmark", {"html": True}).enable("table").render(ModelCard(card).text))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.in_cell = tag in ("td", "th") or (self.in_cell and tag == "code")
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag: str) -> None:
        self.in_cell = self.in_cell and tag not in ("td", "th")

    def handle_data(self, data: str) -> None:
        self.text += data
        if self.in_cell:
            self.rows[-1][-1] += data

    def cells(self, first: str) -> list[str]:
        [row] = [row for row in self.rows if row[0] == first]
        return row


def render(metrics: dict[str, Any] | None = None, **arguments: Any) -> str:
    return render_card(**{"source_card": None, "metrics": metrics, "base_model": None, **arguments})


def results(card: str) -> list[Any]:
    index = ModelCard(card).data.to_dict().get("model-index")
    return [] if index is None else model_index_to_eval_results(index)[1]


def numbers(text: str) -> set[str]:
    return set(re.findall(r"(?<!\w)-?\d+(?:\.\d+)?", text))


def test_front_matter_holds_every_metric_unrounded() -> None:
    card = render(METRICS, base_model="someone/base", repo_id="someone/policy-dpo")

    data = ModelCard(card).data.to_dict()
    assert data["library_name"] == "transformers"
    assert data["pipeline_tag"] == "text-generation"
    assert data["tags"] == ["dpo", "dpo_fast"]
    assert data["base_model"] == "someone/base"
    assert "datasets" not in data  # which means: trained on
    name, found = model_index_to_eval_results(data["model-index"])
    assert name == "policy-dpo"
    assert {result.metric_type: result.metric_value for result in found} == {key: METRICS[key] for key in METRIC_LABELS}
    assert {(r.dataset_type, r.dataset_name, r.dataset_split) for r in found} == {
        ("Anthropic/hh-rlhf", "Anthropic/hh-rlhf", "test")
    }
    assert ModelCard(card).content == card


def test_tables_show_the_metrics_their_intervals_and_the_groups() -> None:
    """Five significant digits: 0.6543210987 -> 0.65432, -123.456789 -> -123.46."""
    page = Page(render(METRICS))

    assert page.cells("Loss") == ["Loss", "eval_loss", "0.65432", "0.61 to 0.69"]
    assert page.cells(METRIC_LABELS["eval_rewards/accuracies"])[2:] == ["0.625", "0.5031 to 0.7335"]
    assert page.cells(METRIC_LABELS["eval_logps/chosen"])[1:] == ["eval_logps/chosen", "-123.46", "–"]
    assert [row[1] for row in page.rows[1:12]] == list(METRIC_LABELS)
    assert page.cells("harmless") == ["harmless", "40", "2", "0.75", "0.6 to 0.85", "0.25", "–"]
    assert page.cells("helpful") == ["helpful", "24", "3", "0.125", "–", "-0.25", "–"]
    assert page.tags.count("table") == 2
    for line in (
        "Pairs: 64 (ties 5, truncated 6, skipped 7)",
        "First rows only: 71",
        "Loss type: sigmoid, sft",
        "Beta: 0.25",
        "Engine: onnxruntime",
        "Precision: float32",
        "Evaluated on Anthropic/hh-rlhf, split test.",
    ):
        assert line in page.text
    assert "Scored without a reference" not in page.text


def test_every_number_comes_from_the_metrics() -> None:
    """With all metrics changed, no number but those of the text itself (95 %, the paper's address) is the same."""
    changed = json.loads(re.sub(r"(?<=[\s\[])(-?)(\d+)(?=[.,\]}])", r"\g<1>9\2", json.dumps(METRICS)))

    assert len(numbers(Page(render(METRICS)).text)) >= 30
    shared = numbers(Page(render(METRICS)).text) & numbers(Page(render(changed)).text)
    assert shared <= numbers(Page(render(None)).text) | {"95"}


def test_before_any_evaluation_the_card_says_so() -> None:
    card = render(None, source_card=render(METRICS))

    page = Page(card)
    assert "No evaluation has been run on these weights yet." in page.text
    assert page.tags.count("table") == 0
    assert results(card) == []
    assert page.text.count("# DPO policy") == 0
    assert card == render(None)


def test_rendering_is_deterministic_and_idempotent() -> None:
    for source in (None, SOURCE, SOURCE.replace("\n", "\r\n"), "Text without an end", "", "---\n---\n"):
        card = render(METRICS, source_card=source)
        assert card == render(copy.deepcopy(METRICS), source_card=source)
        assert card == render(METRICS, source_card=card)
        assert card == render(METRICS, source_card=render(None, source_card=card))
        assert card.count(START_MARKER) == card.count(END_MARKER) == 1
        assert card.count(START_OF_USE) == card.count(END_OF_USE) == 1


def test_an_authors_card_keeps_its_fields_and_text() -> None:
    card = render(METRICS, source_card=SOURCE, base_model="someone/base")

    data = ModelCard(card).data.to_dict()
    assert card.split("---\n", 2)[2].startswith(SOURCE.split("---\n", 2)[2])
    assert data["license"] == "apache-2.0"
    assert data["language"] == ["no", "en"]  # YAML 1.1 reads Norwegian's code as false
    assert data["datasets"] == "someone/preferences"
    assert data["custom_field"] == {"nested": [1, 2]}
    assert data["tags"] == ["trl", "dpo", "dpo_fast"]
    assert data["base_model"] == "someone/base"
    assert "unknown: kept" in card
    found = results(card)
    assert [r.metric_type for r in found if r.metric_config is None] == ["acc", "f1"]
    assert [(r.source_url, r.verified) for r in found if r.metric_type == "acc"] == [("https://example.org", True)]
    assert [r.metric_type for r in found if r.metric_config == "dpo_fast"] == list(METRIC_LABELS)


def test_fields_that_the_author_has_set_are_not_overwritten() -> None:
    source = "---\nbase_model: theirs/base\nlibrary_name: peft\npipeline_tag: chat\ntags: one\nlanguage: no\n---\n"

    data = ModelCard(render(METRICS, source_card=source, base_model="someone/base")).data.to_dict()
    assert (data["base_model"], data["library_name"], data["pipeline_tag"]) == ("theirs/base", "peft", "chat")
    assert data["tags"] == ["one", "dpo", "dpo_fast"]
    assert data["language"] == "no"


def test_our_part_is_replaced_where_it_stands() -> None:
    card = render(METRICS, source_card=SOURCE) + "\nAfterword.\n"

    changed = render({**METRICS, "eval_loss": 0.111}, source_card=card)
    assert changed.endswith(f"{END_OF_USE}\n\nAfterword.\n")
    assert changed.index(END_MARKER) < changed.index(START_OF_USE)
    assert "0.111" in Page(changed).text
    assert "0.65432" not in changed
    assert [result.metric_value for result in results(changed) if result.metric_type == "eval_loss"] == [0.111]


@pytest.mark.parametrize(
    "stray", [START_MARKER, END_MARKER, END_MARKER + START_MARKER, START_OF_USE, END_OF_USE, END_OF_USE + START_MARKER]
)
def test_a_stray_marker_never_swallows_the_authors_text(stray: str) -> None:
    source = f"Before.\n{stray}\nBetween.\n"
    card = render(METRICS, source_card=source)

    again = render(None, source_card=card + f"\nAfter.\n{stray}\nEnd.\n")
    for text in ("Before.", "Between.", "After.", "End."):
        assert text in again
    assert "0.65432" not in again


def test_line_endings_and_marks_of_the_author_stay(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_bytes(b"\xef\xbb\xbf---\r\nlicense: mit\r\n---\r\nText.\r\n")

    card = write_card(tmp_path, METRICS).read_bytes()
    assert ModelCard(card.decode()).data.license == "mit"
    assert b"---\r\nText.\r\n" in card
    assert card.count(b"\n") == card.count(b"\r\n")


def test_hostile_names_stay_text_everywhere() -> None:
    metrics = copy.deepcopy(METRICS)
    metrics["groups"] = {HOSTILE: METRICS["groups"]["harmless"]}
    metrics["provenance"] |= {"engine": HOSTILE, "precision": HOSTILE, "aggregate": HOSTILE}
    metrics["provenance"]["dataset"] = {"name": HOSTILE.replace("/", ""), "split": HOSTILE, "revision": HOSTILE}
    metrics["provenance"]["settings"] = {"beta": HOSTILE, "loss_type": HOSTILE, "reference_free": HOSTILE}

    card = render(metrics)
    clean = Page(render(METRICS))
    page = Page(card)
    assert set(page.tags) == set(clean.tags)
    assert page.tags.count("table") == 2
    [row] = [row for row in page.rows if row[0].startswith("a|b")]
    assert row[0].startswith("a|b | x | </table><script>alert(1)</script> `code` **b** _i_ [l](http://x) {{ 7*7 }} $x$")
    assert len(row) == len(clean.cells("harmless"))
    assert "\x1b" not in card
    assert card.count(END_MARKER, card.index(START_MARKER)) == 1
    one_line = HOSTILE.replace("\n", " ").replace("\x1b", "")
    assert {result.dataset_split for result in results(card)} == {one_line}
    assert render(metrics, source_card=card) == card


TEXT = st.text(st.sampled_from("a1 |\n\r`<>!*_[]()\\$#-:&'\"{}%é\x00\x1b\u2028\u202e\ud800"), max_size=20)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=8,
)
KEYS = st.sampled_from([*METRIC_LABELS, "counts", "intervals", "groups", "provenance", "timing"])


@settings(max_examples=100)
@given(st.dictionaries(KEYS, JSON), st.dictionaries(st.sampled_from(["dataset", "settings", "engine"]), JSON))
def test_whatever_the_metrics_hold_the_card_is_one(metrics: dict[str, Any], provenance: dict[str, Any]) -> None:
    """Missing keys, other types, NaN, any text: a valid card all the same, that never says None, and writes back."""
    card = render({"provenance": provenance, **metrics})

    assert "None" not in card
    assert ModelCard(card).content == card
    card.encode("utf-8")
    assert render(None, source_card=card) == render(None)


def test_missing_keys_are_left_out() -> None:
    for metrics in (
        {},
        {"counts": {}},
        {"eval_loss": None, "intervals": {"eval_loss": None}},
        {"eval_loss": float("nan")},
    ):
        page = Page(render(metrics))
        assert "The evaluation recorded no metrics." in page.text
        assert "None" not in page.text
        assert "nan" not in page.text
        assert "Pairs" not in page.text
    page = Page(render({"eval_loss": 1, "intervals": {"eval_loss": [0.5]}, "counts": {"pairs": 3}}))
    assert page.cells("Loss")[2:] == ["1", "–"]
    assert "Pairs: 3" in page.text
    assert "(" not in page.text[page.text.index("Pairs: 3") :].split("\n")[0]


def test_many_groups_are_cut_short_and_counted() -> None:
    page = Page(render({"groups": {f"group {number:03}": {"pairs": 1} for number in range(70)}}))

    assert page.cells("group 049")[1] == "1"
    assert "group 050" not in page.text
    assert "20 more groups are not shown." in page.text


@pytest.mark.parametrize(
    "path", ["/home/me/base", "./base", "../a/b", "base", "a/b/c", "C:\\models\\base", "", "a b/c", "~/base", "é/base"]
)
def test_a_local_path_is_never_named_as_the_base_model(path: str) -> None:
    card = render(METRICS, base_model=path)

    assert "base_model" not in card
    assert card == render(METRICS)


def test_a_path_that_looks_like_a_hub_id_is_a_path_where_it_exists(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "runs" / "base").mkdir(parents=True)
    assert ModelCard(render(base_model="runs/base")).data.base_model == "runs/base"
    monkeypatch.chdir(tmp_path)
    assert "base_model" not in render(base_model="runs/base")


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("Anthropic/hh-rlhf", "Anthropic/hh-rlhf"),
        ("/home/me/secret/pairs.jsonl", "pairs.jsonl"),
        ("data/pairs.jsonl.gz", "pairs.jsonl.gz"),
        ("C:\\Users\\me\\pairs.jsonl", "pairs.jsonl"),
    ],
)
def test_of_a_local_data_set_only_the_files_name_is_published(name: str, shown: str) -> None:
    card = render({"eval_loss": 1.0, "provenance": {"dataset": {"name": name}}})

    assert {result.dataset_name for result in results(card)} == {shown}
    assert f"Evaluated on {shown}." in Page(card).text
    assert "secret" not in card
    assert "Users" not in card


def test_loading_code_is_python_and_names_the_repository() -> None:
    for repo_id, shown in (("some_one/my_policy", "some_one/my_policy"), (None, "user/name"), ('x"\n/y', "user/name")):
        [code] = re.findall(r"```python\n(.*?)```", render(repo_id=repo_id), re.DOTALL)
        compile(code, "card", "exec")
        assert f'model_id = "{shown}"\n' in code


@pytest.mark.parametrize(
    "front_matter",
    ["- a list", "a: [", "1: x", "model-index: text", "model-index: [{name: x}]", "a: !!python/object:os.system {}",
     "model-index: [{name: x, results: [{task: {type: x}, dataset: {type: x, name: x}, source: x, metrics: []}]}]"],
)  # fmt: skip
def test_broken_front_matter_is_the_checkpoints_fault(tmp_path: Path, front_matter: str) -> None:
    (tmp_path / "README.md").write_text(f"---\n{front_matter}\n---\n")

    with pytest.raises(CheckpointError, match=r"README.md.*front matter.*mend or remove") as caught:
        write_card(tmp_path, METRICS)
    assert str(caught.value).isprintable()
    assert (tmp_path / "README.md").read_text() == f"---\n{front_matter}\n---\n"
    assert [path.name for path in tmp_path.iterdir()] == ["README.md"]


def test_write_is_atomic_and_leaves_the_checkpoints_own_card(tmp_path: Path) -> None:
    """A bundle's files are hard links to the checkpoint's: writing into one would change the other."""
    (tmp_path / "checkpoint").mkdir()
    (tmp_path / "policy").mkdir()
    original = tmp_path / "checkpoint" / "README.md"
    original.write_text(SOURCE)
    os.link(original, tmp_path / "policy" / "README.md")

    path = write_card(tmp_path / "policy", METRICS, base_model="someone/base", repo_id="someone/policy")
    assert path == tmp_path / "policy" / "README.md"
    assert original.read_text() == SOURCE
    assert path.read_text() == render(METRICS, source_card=SOURCE, base_model="someone/base", repo_id="someone/policy")
    assert ModelCard.load(path).data.license == "apache-2.0"
    assert [path.name for path in path.parent.iterdir()] == ["README.md"]


def test_a_failed_write_leaves_the_old_card(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "README.md").write_text("old")

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(StorageError, match="No space left on device"):
        write_card(tmp_path, METRICS)
    assert (tmp_path / "README.md").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["README.md"]


def test_what_cannot_be_read_is_refused_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is not a folder"):
        write_card(tmp_path / "nowhere", None)
    (tmp_path / "README.md").write_bytes(b"\xff\xfe")
    with pytest.raises(CheckpointError, match="is not UTF-8"):
        write_card(tmp_path, None)
    (tmp_path / "README.md").unlink()
    (tmp_path / "adapter_config.json").write_bytes(b"{\xff")
    with pytest.raises(CheckpointError, match=r"adapter_config\.json"):
        write_card(tmp_path, None)
    (tmp_path / "adapter_config.json").unlink()
    (tmp_path / "README.md").mkdir()
    with pytest.raises(StorageError, match=r"README\.md"):
        write_card(tmp_path, None)


def test_importing_publish_loads_nothing_heavy() -> None:
    script = "import sys, dpo_fast.publish.card, dpo_fast.publish.hub; print([*sys.modules])"
    modules = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    for heavy in ("torch", "transformers", "huggingface_hub", "jinja2", "yaml", "httpx2"):
        assert f"'{heavy}'" not in modules


def test_an_adapter_names_peft_and_its_base_model(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "someone/base"}')
    card = ModelCard.load(write_card(tmp_path, METRICS))
    assert (card.data.library_name, card.data.base_model) == ("peft", "someone/base")
    assert "PEFT adapter" in card.text

    (tmp_path / "README.md").unlink()
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "/home/me/base"}')
    assert ModelCard.load(write_card(tmp_path, METRICS)).data.base_model is None


def test_an_adapter_is_loaded_by_peft_and_a_model_by_transformers() -> None:
    for library_name, loader in (("peft", "AutoPeftModelForCausalLM"), ("transformers", "AutoModelForCausalLM")):
        [code] = re.findall(r"```python\n(.*?)```", render(library_name=library_name), re.DOTALL)
        compile(code, "card", "exec")
        assert f"from {library_name} import {loader}" in code
        assert f"model = {loader}.from_pretrained(model_id)" in code


@pytest.mark.parametrize(
    ("written", "kept"),
    [
        ("base_model: /home/me/base", None),
        ("base_model: ./base", None),
        ("base_model: [someone/base, /home/me/base]", ["someone/base"]),
        ("base_model: gpt2", "gpt2"),
    ],
)
def test_paths_that_peft_and_trl_write_as_the_base_model_are_dropped(written: str, kept: Any) -> None:
    """The Hub takes ids alone, and a path is nobody's business; PEFT writes it into a tag too."""
    tags = "[lora, base_model:adapter:/home/me/base, base_model:adapter:someone/base]"
    source = f"---\n{written}\ntags: {tags}\n---\n"

    data = ModelCard(render(source_card=source)).data.to_dict()
    assert data.get("base_model") == kept
    assert data["tags"] == ["lora", "base_model:adapter:someone/base", "dpo", "dpo_fast"]
    assert "/home" not in render(source_card=source)
    replaced = ModelCard(render(source_card="---\nbase_model: /home/me/base\n---\n", base_model="someone/base"))
    assert replaced.data.base_model == "someone/base"


def test_plots_stand_below_the_numbers() -> None:
    page = MarkdownIt().render(render(METRICS, plots={"Margins | of <b>pairs</b>": "plots/margins.png"}))
    assert '<img src="plots/margins.png" alt="Margins | of &lt;b&gt;pairs&lt;/b&gt;"' in page
    assert "plots/" not in render(METRICS, source_card=render(METRICS, plots={"Margins": "plots/margins.png"}))


def test_a_push_changes_its_own_part_and_names_alone() -> None:
    card = render(METRICS, source_card=SOURCE)
    graphs = [
        PublishedGraph("policy.onnx", "onnxruntime", "fp32", True, [1.0, 0.0]),
        PublishedGraph("policy.cpu-int8.onnx", "onnxruntime", "int8", False, [1.0, 0.0]),
    ]
    pushed = render_card_use(card, repo_id="someone/other", graphs=graphs)

    before, after = ModelCard(card), ModelCard(pushed)
    assert after.data.tags == [*before.data.tags, "onnx"]
    assert results(pushed) == results(card)
    assert after.text.partition(START_OF_USE)[0] == before.text.partition(START_OF_USE)[0]
    assert render_card_use(pushed, repo_id="someone/other", graphs=graphs) == pushed
    _, run = re.findall(r"```python\n(.*?)```", pushed, re.DOTALL)
    compile(run, "card", "exec")
    assert 'snapshot_download("someone/other"' in run
    assert "[[1.0, 0.0]]" in run
    assert "`policy.cpu-int8.onnx` is made for onnxruntime, in int8." in pushed
    # A bundle's card is named after its folder; a repository's, after itself. The author's own name stays.
    assert "\n- name: other\n" in render_card_use(render(METRICS), repo_id="someone/other")
    assert "\n- name: theirs\n" in pushed
