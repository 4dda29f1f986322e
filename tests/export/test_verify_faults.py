"""Faults that people have shipped, seeded one by one: each is caught; and what is honest passes, whatever the seed."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import copy_checkpoint, make_config, make_model, perturb, save_model, write_recipe
from transformers import AutoConfig

from dpo_fast.batches import Batch
from dpo_fast.bundle import POLICY, REFERENCE, Bundle
from dpo_fast.engines.base import Engine
from dpo_fast.engines.onnxruntime import OnnxRuntimeEngine
from dpo_fast.errors import BundleError
from dpo_fast.export.exporter import ExportOptions, export
from dpo_fast.types import TokenScores
from dpo_fast.verify import VerifyOptions, verify

from .binding import bind_folder

Trace = Callable[..., ir.Model]
pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]
WORDS = ["what", "is", "it", "the sea", "blue", "rain", "in", "Spain", "stays", "plain", "def add", "hello", "never"]
TILE = 128


def write_pairs(path: Path, count: int, seed: int = 0) -> str:
    """Pairs of random words: prompts of 2 to 12, completions of 1 to 9."""
    generator = np.random.default_rng(seed)

    def text(low: int, high: int) -> str:
        return " " + " ".join(generator.choice(WORDS, generator.integers(low, high)))

    rows = [{"prompt": text(2, 13), "chosen": text(1, 10), "rejected": text(1, 10) + " end"} for _ in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def make_bundle(folder: Path, model_type: str = "llama", seed: int = 0, **keys: Any) -> Path:
    model = make_model(make_config(model_type, **keys), seed=seed)
    policy = save_model(model, folder / "policy")
    reference = save_model(perturb(model), folder / "reference")
    options = ExportOptions(recipe=str(write_recipe(folder)), self_check=False, max_length=128)
    return export(str(policy), str(reference), folder / "bundle", options)


def served(folder: Path, traced: Trace, config: Any = None) -> Callable[[Bundle, str], Engine]:
    """The policy's engine from another folder, or of another configuration; the reference's own."""
    graph = bind_folder(folder, traced(config or AutoConfig.from_pretrained(folder), vocabulary_tile=TILE))

    def open_one(bundle: Bundle, role: str) -> Engine:
        return OnnxRuntimeEngine(graph if role == POLICY else bundle.graph(role))

    return open_one


def change(folder: Path, target: Path, edit: Callable[[dict[str, torch.Tensor]], None]) -> Path:
    """A copy of a checkpoint with other tensors."""
    copy_checkpoint(folder, target)
    tensors = load_file(target / "model.safetensors")
    edit(tensors)
    save_file(
        {name: value.contiguous() for name, value in tensors.items()}, target / "model.safetensors", {"format": "pt"}
    )
    return target


def one_percent(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.layers.1.mlp.up_proj.weight"] *= 1.01


def swap_layers(tensors: dict[str, torch.Tensor]) -> None:
    for name in [name for name in tensors if ".layers.0." in name]:
        other = name.replace(".layers.0.", ".layers.1.")
        tensors[name], tensors[other] = tensors[other].clone(), tensors[name].clone()


def drop_head_bias(tensors: dict[str, torch.Tensor]) -> None:
    tensors["lm_head.bias"] *= 0


class Shifted:
    """An engine whose targets are those of the next token."""

    precision = "fp32"
    name = "shifted"

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def score(self, batch: Batch) -> TokenScores:
        return self._engine.score(replace(batch, target_ids=np.roll(batch.target_ids, -1)))

    def with_gates(self, gates: Any) -> "Shifted":
        return Shifted(self._engine.with_gates(gates))


def shifted_labels(folder: Path, traced: Trace) -> Callable[[Bundle, str], Engine]:
    return lambda bundle, role: Shifted(OnnxRuntimeEngine(bundle.graph(role)))


def another_checkpoint(folder: Path, traced: Trace) -> Callable[[Bundle, str], Engine]:
    return lambda bundle, role: OnnxRuntimeEngine(bundle.graph(REFERENCE))


def of_tensors(edit: Callable[[dict[str, torch.Tensor]], None]) -> Any:
    return lambda folder, traced: served(change(folder / "policy", folder / "served", edit), traced)


def wrong_theta(folder: Path, traced: Trace) -> Callable[[Bundle, str], Engine]:
    served_folder = copy_checkpoint(folder / "policy", folder / "served")
    config = AutoConfig.from_pretrained(served_folder)
    config.rope_parameters = {**config.rope_parameters, "rope_theta": 10500.0}  # of 10000
    return served(served_folder, traced, config)


def lost_window(folder: Path, traced: Trace) -> Callable[[Bundle, str], Engine]:
    served_folder = copy_checkpoint(folder / "policy", folder / "served")
    config = AutoConfig.from_pretrained(served_folder)
    config.sliding_window = None
    return served(served_folder, traced, config)


FAULTS: dict[str, tuple[str, Any]] = {
    "one weight tensor off by 1 %": ("llama", of_tensors(one_percent)),
    "two layers swapped": ("llama", of_tensors(swap_layers)),
    "a wrong rope theta": ("llama", wrong_theta),
    "a lost sliding window": ("mistral", lost_window),
    "an engine of another checkpoint": ("llama", another_checkpoint),
    "a head bias dropped": ("phi", of_tensors(drop_head_bias)),
    "labels shifted by one": ("llama", shifted_labels),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_caught(tmp_path: Path, traced: Trace, fault: str) -> None:
    model_type, seeded = FAULTS[fault]
    bundle = make_bundle(tmp_path, model_type)
    dataset = write_pairs(tmp_path / "pairs.jsonl", 40)
    result = verify(bundle, dataset, tmp_path / "out", engine=seeded(tmp_path, traced))
    assert result["verdict"] == "fail", [check["reason"] for check in result["checks"]]
    # The same pairs convict nobody who is innocent.
    honest = verify(bundle, dataset, tmp_path / "honest")
    assert all(check["outcome"] != "fail" for check in honest["checks"])


def test_an_adapter_left_out_is_caught(tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    base = save_model(make_model(make_config()), tmp_path / "base")
    torch.manual_seed(0)
    model = get_peft_model(
        make_model(make_config()), LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    )
    model.save_pretrained(tmp_path / "adapter")
    options = ExportOptions(recipe=str(write_recipe(tmp_path)), self_check=False, max_length=128, base=str(base))
    bundle = export(str(tmp_path / "adapter"), "base", tmp_path / "bundle", options)
    dataset = write_pairs(tmp_path / "pairs.jsonl", 40)

    def without(opened: Bundle, role: str) -> Engine:
        gates = opened.manifest.models[role].adapter_gates
        assert gates is not None
        return OnnxRuntimeEngine(opened.graph(role), gates=[0.0] * len(gates))

    assert verify(bundle, dataset, tmp_path / "out", engine=without)["verdict"] == "fail"
    honest = verify(bundle, dataset, tmp_path / "honest")
    assert all(check["outcome"] != "fail" for check in honest["checks"])


def test_a_tokenizer_with_one_merge_fewer_is_refused(tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path)
    path = bundle / POLICY / "tokenizer.json"
    tokenizer = json.loads(path.read_text(encoding="utf-8"))
    tokenizer["model"]["merges"].pop()
    path.write_text(json.dumps(tokenizer), encoding="utf-8")
    with pytest.raises(BundleError, match=r"tokenizer.json: is not the file that was exported"):
        verify(bundle, write_pairs(tmp_path / "pairs.jsonl", 4), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("seed", range(20))
def test_an_honest_engine_passes(tmp_path: Path, seed: int) -> None:
    """400 pairs settle a change of one point; each seed is another model and other pairs."""
    bundle = make_bundle(tmp_path, seed=seed)
    dataset = write_pairs(tmp_path / "pairs.jsonl", 400, seed)
    result = verify(bundle, dataset, tmp_path / "out", VerifyOptions(seed=seed))
    assert result["verdict"] == "pass", result["reasons"]
