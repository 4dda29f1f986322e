"""What was pushed, downloaded: models load with their own logits, graphs run from the root, the card's code runs.

A whole model with its graph; a PEFT adapter with graphs in float32 and int8, and the base's weights that they need.
"""

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from export.test_adapters import make_adapter
from huggingface_hub import snapshot_download
from loopback_hub import LoopbackHub, hub_of_this_process
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from dpo_fast.batches import arrange, make_batches
from dpo_fast.bundle import POLICY, Bundle, open_bundle
from dpo_fast.engines.onnxruntime import OnnxRuntimeEngine
from dpo_fast.export.exporter import ExportOptions, export
from dpo_fast.export.probes import make_probes
from dpo_fast.publish.publisher import Pushed, PushOptions, push_bundle
from dpo_fast.token_table import make_table
from dpo_fast.types import TokenScores

pytestmark = [
    pytest.mark.slow,
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning"),
]

INT8 = """\
description = "tiny models in int8"
engine = "onnxruntime"
precision = "int8"
head_precision = "fp32"
reduce_range = false
vocabulary_tile = 128
token_budget = 256
"""
WHOLE, ADAPTER = "someone/whole", "someone/adapter"
RUN_CARDS = """
import json, re, sys
from huggingface_hub import ModelCard
said = {}
for repo_id in sys.argv[1:]:
    names = {}
    for code in re.findall(r"```python\\n(.*?)```", ModelCard.load(repo_id).text, re.DOTALL):
        exec(code.replace('local_dir="model"', f"local_dir={repo_id!r}"), names)
    said[repo_id] = [
        names["model"](input_ids=__import__("torch").tensor([names["prompt"] + names["completion"]])).logits.tolist(),
        names["prompt"], names["completion"], names["log_prob"].tolist(),
    ]
print(json.dumps(said))
"""


@dataclass
class Published:
    bundle: Bundle
    pushed: Pushed
    folder: Path  # what was downloaded


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LoopbackHub]:
    with pytest.MonkeyPatch.context() as patch, hub_of_this_process(patch, tmp_path_factory.mktemp("home")) as hub:
        yield hub


def publish(hub: LoopbackHub, bundle: Path, repo_id: str, folder: Path) -> Published:
    """Push a bundle with its graphs, and download what arrived."""
    pushed = push_bundle(bundle, repo_id, PushOptions(include_graph=True, include_engines=True))
    downloaded = snapshot_download(repo_id, local_dir=folder / "downloaded", endpoint=hub.url, token=hub.token)
    return Published(open_bundle(bundle), pushed, Path(downloaded))


@pytest.fixture(scope="module")
def whole(hub: LoopbackHub, tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Published:
    return publish(hub, tiny_bundle, WHOLE, tmp_path_factory.mktemp("whole"))


@pytest.fixture(scope="module")
def adapter(hub: LoopbackHub, tiny_pair: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Published:
    """With an engine's graph in int8 beside the exact one."""
    folder = tmp_path_factory.mktemp("adapter")
    trained = make_adapter(tiny_pair[0], folder / "trained", target_modules=["q_proj", "down_proj"])
    (folder / "int8.toml").write_text(INT8)
    options = ExportOptions(recipe=str(folder / "int8.toml"))
    return publish(hub, export(str(trained), "base", folder / "bundle", options), ADAPTER, folder)


@torch.inference_mode()
def logits(model: PreTrainedModel) -> torch.Tensor:
    found: torch.Tensor = model(input_ids=torch.arange(40)[None]).logits
    return found


def assert_same_scores(published: Published, graph: str) -> None:
    """The graph says from the repository's root what it says in the bundle: the same graph, the same bytes."""
    entry = published.bundle.manifest.models[POLICY]
    table = make_table(make_probes(entry.vocabulary, positions=entry.max_positions))
    batches = list(make_batches(arrange(table, entry.layout, token_budget=256), token_budget=256))
    ours = OnnxRuntimeEngine(published.bundle.folder / graph, gates=entry.adapter_gates, threads=1)
    theirs = OnnxRuntimeEngine(published.folder / graph, gates=entry.adapter_gates, threads=1)
    for batch in batches:
        one, other = ours.score(batch), theirs.score(batch)
        for name in TokenScores.__dataclass_fields__:
            np.testing.assert_array_equal(getattr(one, name), getattr(other, name))
    assert len(batches) > 0


def test_a_whole_model_is_the_original(whole: Published, tiny_pair: tuple[Path, Path]) -> None:
    loaded = AutoModelForCausalLM.from_pretrained(whole.folder)
    assert torch.equal(logits(loaded), logits(AutoModelForCausalLM.from_pretrained(tiny_pair[0])))
    text = "What is it? It is blue."
    assert AutoTokenizer.from_pretrained(whole.folder)(text) == AutoTokenizer.from_pretrained(tiny_pair[0])(text)
    assert (whole.folder / "generation_config.json").is_file()
    for path in tiny_pair[0].glob("*.safetensors"):
        assert (whole.folder / path.name).read_bytes() == path.read_bytes()


def test_an_adapter_goes_alone_and_is_the_original(adapter: Published, tiny_pair: tuple[Path, Path]) -> None:
    trained = adapter.bundle.folder.parent / "trained"

    def adapted(folder: Path) -> PeftModel:
        return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_pair[0]), folder).eval()

    base = AutoModelForCausalLM.from_pretrained(tiny_pair[0])
    assert torch.equal(logits(adapted(adapter.folder)), logits(adapted(trained)))
    assert not torch.equal(logits(adapted(adapter.folder)), logits(base))
    # Without a graph, nothing of the base goes along.
    plan = push_bundle(adapter.bundle.folder, ADAPTER, dry_run=True)
    assert [name for name in plan.files if name.endswith((".safetensors", ".onnx"))] == ["adapter_model.safetensors"]
    assert any("which others cannot load" in warning for warning in plan.warnings)  # its base is a local folder
    assert str(tiny_pair[0]) not in (adapter.folder / "README.md").read_text()


def test_graphs_run_from_the_root(whole: Published, adapter: Published) -> None:
    assert_same_scores(whole, "policy.onnx")
    assert_same_scores(adapter, "policy.onnx")
    assert_same_scores(adapter, "policy.int8.onnx")

    for published in (whole, adapter):
        assert not any(name.startswith("policy/") for name in published.pushed.files)
    assert "engines/int8/policy.safetensors" in adapter.pushed.files
    [warning] = [warning for warning in adapter.pushed.warnings if "weights beneath the policy's own" in warning]
    assert "reference/model.safetensors" in warning
    assert not any(name.startswith("reference") for name in whole.pushed.files)
    assert any("the recipe tiny runs the exact graph itself" in warning for warning in whole.pushed.warnings)


def test_the_cards_code_runs_as_it_stands(
    hub: LoopbackHub, whole: Published, adapter: Published, tmp_path: Path
) -> None:
    """In a fresh process that knows only the Hub: the models load, and the graphs agree with PyTorch's log-probs."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    done = subprocess.run(
        [sys.executable, "-c", RUN_CARDS, WHOLE, ADAPTER],
        env=inherited | hub.environment(tmp_path / "home"),
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert hub.token not in done.stdout + done.stderr
    said = json.loads(done.stdout.splitlines()[-1])  # behind what the cards' code prints
    for scores, prompt, completion, log_prob in said.values():
        assert len(completion) > 1
        log_probs = torch.tensor(scores, dtype=torch.float64)[0].log_softmax(-1)
        before = range(len(prompt) - 1, len(prompt) + len(completion) - 1)
        # float32 rounding of two orders of summation, as in the tests of the export: 1e-4 nats refuses a graph there.
        np.testing.assert_allclose(log_prob, log_probs[before, completion].numpy(), atol=1e-4)
    assert re.search(r'"adapter_gates": np.array\(\[\[1.0\]\]', (adapter.folder / "README.md").read_text())
