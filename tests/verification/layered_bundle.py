"""A bundle of a tiny model with several layers, without export's checks, whose graph may point at other weights."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path

import torch
from export.binding import bind_folder
from tiny_models import make_config, make_model, perturb, save_model
from traces import Traces
from transformers import AutoModelForCausalLM, PreTrainedModel

from dpo_fast.bundle import FORMAT, POLICY, REFERENCE, Bundle, Manifest, ModelEntry, hash_files
from dpo_fast.export.precision import make_engine_graph
from dpo_fast.export.probes import make_probes
from dpo_fast.recipes import Recipe
from dpo_fast.types import TokenizedPair

TILE = 128
TRACED = Traces()
PAIRS: Sequence[TokenizedPair] = make_probes(500, positions=256)
FP32 = Recipe("fp32", "exact", "onnxruntime", "fp32", TILE, 256)
INT8 = Recipe("int8", "8 bits", "onnxruntime", "int8", TILE, 256, "fp32", reduce_range=False)
INT4 = Recipe("int4", "4 bits", "onnxruntime", "int4", TILE, 256, "fp32", block_size=16, symmetric=True)
FP8 = Recipe("fp8", "float8", "tensorrt", "fp8", TILE, 256, "fp32", head_chunk=256, calibrator="largest")


def _config(model_type: str, layers: int):
    return make_config(model_type, **({"n_layer": layers} if model_type == "gpt2" else {"num_hidden_layers": layers}))


def make_bundle(
    folder: Path,
    recipe: Recipe = FP32,
    *,
    model_type: str = "llama",
    layers: int = 4,
    change: Callable[[PreTrainedModel], None] = lambda model: None,
    fault: Callable[[PreTrainedModel], None] | None = None,
    reference: bool = False,
) -> Bundle:
    """A bundle of a random model that `change` has changed; with a `fault`, the graph's weights are a damaged copy."""
    model = make_model(_config(model_type, layers), scale=0.15)
    with torch.no_grad():
        change(model)
        save_model(model, folder / POLICY)
        if reference:
            save_model(perturb(model, scale=0.01), folder / REFERENCE)
        if fault is not None:
            fault(model)
            save_model(model, folder / "faulty")
    graph = TRACED(_config(model_type, layers), vocabulary_tile=TILE)
    entries = {}
    for role in (POLICY, REFERENCE) if reference else (POLICY,):
        exact = bind_folder(folder / (role if fault is None else "faulty"), graph)
        engine_graph = make_engine_graph(folder, exact.stem, recipe, PAIRS)
        entries[role] = ModelEntry(
            source=role, revision=None, architecture="", model_type=model_type, stored_dtypes=["F32"], parameters=1,
            vocabulary=500, hidden=32, layers=layers, heads=4, max_positions=256, graph=exact.name,
            engine_graph=engine_graph, weights=[role], adapter_gates=None, layout="shared", self_check=None,
            engine_check=None,
        )  # fmt: skip
    return Bundle(folder, Manifest(FORMAT, {}, asdict(recipe), 256, {}, [], entries, hash_files(folder)))


def save_adapter(base: Path, folder: Path) -> None:
    """A LoRA adapter of a checkpoint, as if it had been trained."""
    from peft import LoraConfig, get_peft_model

    model = AutoModelForCausalLM.from_pretrained(base)
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "down_proj"]))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    adapted.save_pretrained(folder)


def spoil_scales(model: PreTrainedModel, layer: int) -> None:
    """Give a layer's last matrix large entries for an input that is always 0: they change nothing but int8's scales."""
    mlp = model.model.layers[layer].mlp
    mlp.up_proj.weight[0] = 0
    mlp.down_proj.weight[:, 0] = 20


def with_recipe(bundle: Bundle, recipe: Recipe) -> Bundle:
    """The same files, said to be made for another recipe."""
    return replace(bundle, manifest=replace(bundle.manifest, recipe=asdict(recipe)))
