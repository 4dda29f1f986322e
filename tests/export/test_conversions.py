"""Parameters that Transformers makes from stored tensors as it loads: what it would load, bit for bit, by reference."""

import importlib
from collections import Counter
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from onnx.external_data_helper import ExternalDataInfo
from safetensors.torch import load_file, save_file
from tiny_models import make_config, make_model, save_model
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.core_model_loading import (
    Chunk,
    Concatenate,
    ConversionOps,
    Interleave,
    MergeModulelist,
    PermuteForRope,
    SplitModulelist,
    Transpose,
    WeightConverter,
)

from dpo_fast.errors import CheckpointError
from dpo_fast.export import conversions
from dpo_fast.export.bindings import Binding, Made, Stored, bind
from dpo_fast.export.conversions import Collected, Conversions, UnknownOperationError
from dpo_fast.export.head import OUTPUTS
from dpo_fast.export.weights import match_parameters

from .binding import bind_folder, bindings, opened, session
from .by_hand import lay_out, plain, tokens

Trace = Callable[..., ir.Model]

WEIGHTS = "model.safetensors"
TILE = 128
TOLERANCE = 5e-5  # as in test_graph.py: both sides compute in float32 from the same stored weights
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 24}
DEEPSEEK = {
    **EXPERTS,
    "num_key_value_heads": 4,
    "n_routed_experts": 4,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
}
# How each architecture's matrices of experts, or of attention, are stored; None where no parameter is made from others.
FAMILIES: dict[str, tuple[dict[str, Any], tuple[str, list[str]] | None]] = {
    "mixtral": (
        {"num_local_experts": 4, "num_experts_per_tok": 2},
        (
            "model.layers.1.mlp.experts.gate_up_proj",
            [f"model.layers.1.block_sparse_moe.experts.{i}.{w}.weight" for w in ("w1", "w3") for i in range(4)],
        ),
    ),
    "qwen3_moe": (
        {"num_experts": 12, **EXPERTS},  # more than ten: experts are in the order of their numbers
        (
            "model.layers.0.mlp.experts.down_proj",
            [f"model.layers.0.mlp.experts.{i}.down_proj.weight" for i in range(12)],
        ),
    ),
    "deepseek_v3": (
        DEEPSEEK,
        (
            "model.layers.1.mlp.experts.gate_up_proj",
            [f"model.layers.1.mlp.experts.{i}.{w}_proj.weight" for w in ("gate", "up") for i in range(4)],
        ),
    ),
    "olmoe": (
        {"num_experts": 4, "num_experts_per_tok": 2},
        (
            "model.layers.0.mlp.experts.gate_up_proj",
            [f"model.layers.0.mlp.experts.{i}.{w}_proj.weight" for w in ("gate", "up") for i in range(4)],
        ),
    ),
    "hrm_text": (
        {},
        ("model.L_module.layers.0.self_attn.q_proj.weight", ["model.L_module.layers.0.attn.gqkv_proj.weight"]),
    ),
    "gpt_neox": ({}, None),
}


def make_family(model_type: str, folder: Path, dtype: torch.dtype = torch.float32, shards: int = 1) -> Path:
    """A checkpoint as save_pretrained writes it: in the architecture's original format. Buffers are random too."""
    model = make_model(make_config(model_type, **FAMILIES[model_type][0]))
    parameters = dict(model.named_parameters())
    for name, tensor in model.state_dict().items():
        if name not in parameters and tensor.is_floating_point():
            tensor.normal_()
    return save_model(model.to(dtype), folder, shards=shards)


def outputs_of(parameters: dict[str, tuple[int, ...]]) -> ir.Model:
    """A graph whose outputs are its parameters, which have no values yet."""
    nodes = []
    for number, (name, shape) in enumerate(parameters.items()):
        kind = ir.TensorType(ir.DataType.FLOAT)
        node = ir.node("Identity", [ir.Value(name=name, shape=ir.Shape(shape), type=kind)])
        node.outputs[0].name, node.outputs[0].shape, node.outputs[0].type = f"output_{number}", ir.Shape(shape), kind
        nodes.append(node)
    initializers = [node.inputs[0] for node in nodes]
    outputs = [node.outputs[0] for node in nodes]
    graph = ir.Graph([], outputs, nodes=nodes, initializers=initializers, opset_imports={"": 20}, name="parameters")
    return ir.Model(graph, ir_version=10)


def evaluate(folder: Path, found: dict[str, Binding]) -> dict[str, np.ndarray]:
    """What an engine makes of bindings; `folder` is the checkpoint's."""
    path = folder.with_suffix(".onnx")
    ir.save(bind(outputs_of({name: binding.shape for name, binding in found.items()}), found), path)
    return dict(zip(found, session(path).run(None, {}), strict=True))


def loaded(folder: Path) -> dict[str, np.ndarray]:
    """What Transformers loads, tied parameters under each name."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return {name: tensor.numpy() for name, tensor in model.state_dict().items() if tensor.is_floating_point()}


def check_equal(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    """The same names, and the same bits."""
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        assert found[name].dtype == np.float32
        np.testing.assert_array_equal(found[name].view(np.uint32), values.view(np.uint32), err_msg=name)


@pytest.mark.parametrize(("dtype", "shards"), [(torch.float32, 1), (torch.bfloat16, 1), (torch.float16, 3)])
@pytest.mark.parametrize("model_type", FAMILIES)
def test_parameters_are_what_transformers_loads(
    model_type: str, dtype: torch.dtype, shards: int, tmp_path: Path
) -> None:
    folder = make_family(model_type, tmp_path / "policy", dtype, shards)
    found = bindings(folder)
    example = FAMILIES[model_type][1]
    if example is None:
        assert all(isinstance(binding, Stored) for binding in found.values())
    else:
        parameter, names = example
        assert isinstance(found[parameter], Made)
        assert [source.name for source in found[parameter].sources] == names
    check_equal(evaluate(folder, found), loaded(folder))


def test_a_checkpoint_may_mix_precisions(tmp_path: Path) -> None:
    """Some experts in bfloat16 and others in float32: each is widened before they are put together."""
    folder = make_family("mixtral", tmp_path / "policy")
    tensors = load_file(folder / WEIGHTS)
    save_file({n: t.bfloat16() if ".experts.2." in n else t for n, t in tensors.items()}, folder / WEIGHTS)
    check_equal(evaluate(folder, bindings(folder)), loaded(folder))


def test_a_checkpoint_saved_as_the_model_has_it(tmp_path: Path) -> None:
    """With save_original_format=False nothing is left to be made."""
    model = make_model(make_config("mixtral", **FAMILIES["mixtral"][0]))
    model.save_pretrained(tmp_path / "policy", save_original_format=False)
    found = bindings(tmp_path / "policy")
    assert {name: binding.name for name, binding in found.items()} == {name: name for name in model.state_dict()}
    check_equal(evaluate(tmp_path / "policy", found), loaded(tmp_path / "policy"))


def test_a_base_models_checkpoint_has_no_prefix(tmp_path: Path) -> None:
    folder = make_family("qwen3_moe", tmp_path / "policy")
    expected = loaded(folder)
    tensors = load_file(folder / WEIGHTS)
    save_file({name.removeprefix("model."): tensor for name, tensor in tensors.items()}, folder / WEIGHTS)
    check_equal(evaluate(folder, bindings(folder)), expected)


def test_names_that_transformers_changes(tmp_path: Path) -> None:
    """GPT-NeoX's head is stored as embed_out; a renamed tensor is bound as it lies."""
    found = bindings(make_family("gpt_neox", tmp_path / "policy"))
    head = found["lm_head.weight"]
    assert isinstance(head, Stored)
    assert head.name == "embed_out.weight"


def test_buffers_that_are_saved_are_bound(tmp_path: Path) -> None:
    """The routers' correction is trained: its value is the checkpoint's, not the one that a new model starts with."""
    folder = make_family("deepseek_v3", tmp_path / "policy")
    name = "model.layers.1.mlp.gate.e_score_correction_bias"
    np.testing.assert_array_equal(evaluate(folder, bindings(folder))[name], load_file(folder / WEIGHTS)[name])


def test_no_weights_are_read(tmp_path: Path) -> None:
    """The headers are enough: it works when the files are gone."""
    folder = make_family("qwen3_moe", tmp_path / "policy")
    checkpoint, config = opened(folder), make_config("qwen3_moe", **FAMILIES["qwen3_moe"][0])
    (folder / WEIGHTS).unlink()
    assert match_parameters(config, checkpoint, "policy").keys() == empty(config).state_dict().keys()


def empty(config: Any) -> PreTrainedModel:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32)


@pytest.mark.parametrize("model_type", ["mixtral", "hrm_text"])
def test_each_initializer_is_one_whole_stored_tensor(model_type: str, tmp_path: Path) -> None:
    """Nothing is copied, and each stored tensor is pointed at once, also where several parameters are cut from it."""
    folder = make_family(model_type, tmp_path / "policy", torch.bfloat16)
    evaluate(folder, bindings(folder))
    model = onnx.load(folder.with_suffix(".onnx"), load_external_data=False)
    places = [ExternalDataInfo(value) for value in model.graph.initializer]
    stored = opened(folder).tensors.values()
    assert Counter((place.location, place.offset, place.length) for place in places) == Counter(
        (f"policy/{tensor.file}", tensor.offset, tensor.length) for tensor in stored
    )
    assert len({value.name for value in model.graph.initializer}) == len(places)


def constant_operations(graph: Path) -> list[str]:
    """The operations of a graph that depend on its initializers alone."""
    model = onnx.load(graph, load_external_data=False).graph
    constant = {value.name for value in model.initializer} | {""}
    return [node.op_type for node in model.node if node.input and constant.issuperset(node.input)]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model_type", "dtype"),
    [("mixtral", torch.float32), ("qwen3_moe", torch.bfloat16), ("deepseek_v3", torch.bfloat16)],
)
def test_a_mixture_of_experts_says_what_pytorch_says(
    model_type: str, dtype: torch.dtype, tmp_path: Path, traced: Trace
) -> None:
    """And when it is loaded, ONNX Runtime puts the experts together once: nothing of that is left to each run."""
    folder = make_family(model_type, tmp_path / "policy", dtype)
    path = bind_folder(folder, traced(make_config(model_type, **FAMILIES[model_type][0]), vocabulary_tile=TILE))
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    options.log_severity_level = 3  # that the saved model is this machine's is no news
    run = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"]).run
    rows = [tokens(7, 11, 8, 5), tokens(8, 4, 3)]
    found = run(list(OUTPUTS), lay_out(rows))
    expected = plain(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval(), rows)
    for name, values in zip(OUTPUTS, found, strict=True):
        np.testing.assert_allclose(values, expected[name], rtol=0, atol=TOLERANCE, err_msg=name)
    assert "Concat" in constant_operations(path)
    assert constant_operations(tmp_path / "optimized.onnx") == []


def damaged(folder: Path, changes: dict[str, torch.Tensor | None]) -> Path:
    tensors = {**load_file(folder / WEIGHTS), **changes}
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, folder / WEIGHTS)
    return folder


EXPERT = "model.layers.1.block_sparse_moe.experts.{}.{}.weight"
SHAPE = (64, 32)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({EXPERT.format(2, "w1"): None}, f"the tensor {EXPERT.format(2, 'w1')!r} is missing; MixtralForCausalLM needs"),
        ({EXPERT.format(3, "w2"): None}, f"the tensor {EXPERT.format(3, 'w2')!r} is missing"),
        (
            {EXPERT.format(3, w): None for w in ("w1", "w2", "w3")},
            f"the tensor {EXPERT.format(3, 'w1')!r} is missing",
        ),
        (
            {EXPERT.format(i, w): None for i in range(4) for w in ("w1", "w3")},
            f"the tensor {EXPERT.format(0, 'w1')!r} is missing",
        ),
        (
            {EXPERT.format(1, "w3"): torch.ones(63, 32)},
            f"the tensor {EXPERT.format(1, 'w3')!r} has shape [63, 32], and config.json says [64, 32]",
        ),
        (
            {EXPERT.format(i, "w2"): torch.ones(32, 60) for i in range(4)},
            f"the tensor {EXPERT.format(0, 'w2')!r} has shape [32, 60], and config.json says [32, 64]",
        ),
        (
            {EXPERT.format(4, w): torch.ones(SHAPE) for w in ("w1", "w3")},
            f"the tensor {EXPERT.format(4, 'w1')!r} is no part of MixtralForCausalLM; is config.json the one of",
        ),
        (
            {EXPERT.format(4, "w2"): torch.ones(32, 64)},
            f"the tensor {EXPERT.format(4, 'w2')!r} is no part of MixtralForCausalLM",
        ),
        (
            {EXPERT.replace("layers.1", "layers.2").format(0, "w1"): torch.ones(SHAPE)},
            "the tensor 'model.layers.2.block_sparse_moe.experts.0.w1.weight' is no part of MixtralForCausalLM",
        ),
        (
            {EXPERT.format(0, "w1"): torch.ones(SHAPE, dtype=torch.float8_e4m3fn)},
            f"the tensor {EXPERT.format(0, 'w1')!r} is stored as F8_E4M3; export a checkpoint in one of F32, F16, BF16",
        ),
        (
            {"model.layers.1.mlp.experts.down_proj": torch.ones(4, 32, 64)},
            "are both the parameter 'model.layers.1.mlp.experts.down_proj' of MixtralForCausalLM; leave out the one",
        ),
        (
            {"norm.weight": torch.ones(32)},
            "the tensors 'model.norm.weight' and 'norm.weight' are both the parameter 'model.norm.weight'",
        ),
    ],
)
def test_experts_that_are_not_the_models(
    changes: dict[str, torch.Tensor | None], expected: str, tmp_path: Path
) -> None:
    folder = make_family("mixtral", tmp_path / "policy")
    with pytest.raises(CheckpointError) as caught:
        bindings(damaged(folder, changes))
    message = str(caught.value)
    assert "\n" not in message
    assert expected in message
    assert str(folder) in message


def rule(operations: list[ConversionOps], sources: int = 1, targets: int = 1, pattern: str = "part") -> WeightConverter:
    """A conversion of so many tensors, or lists of tensors, to so many."""
    return WeightConverter([f"{pattern}{i}" for i in range(sources)], [f"whole{i}" for i in range(targets)], operations)


@pytest.mark.parametrize(
    ("converter", "shapes"),
    [
        (rule([MergeModulelist(dim=1)]), [[(2, 3), (2, 3)]]),
        (rule([MergeModulelist(dim=-1)]), [[(2, 3), (2, 3), (2, 3)]]),
        (rule([Concatenate(dim=-1)], sources=2), [[(2, 3)], [(2, 5)]]),
        (rule([MergeModulelist(dim=0), Concatenate(dim=1)], sources=2), [[(4, 3)] * 3, [(2, 3)] * 3]),
        (rule([Chunk(dim=1)], targets=3), [[(2, 7)]]),  # the last is shorter
        (rule([Transpose(0, 2)]), [[(2, 3, 4)]]),
        (rule([Transpose(-1, -2)]), [[(2, 3, 4)]]),
        (rule([Interleave(dim=0), Chunk(dim=0)], targets=2), [[(8, 3)]]),
        (rule([Interleave(dim=1, inverse=True)]), [[(2, 6)]]),
        (rule([PermuteForRope()]), [[(16, 3)]]),
        (rule([PermuteForRope(inverse=True)]), [[(16,)]]),
        (WeightConverter("part0", "whole.*", [SplitModulelist(dim=1)]), [[(2, 3)]]),
    ],
    ids=lambda value: " ".join(map(repr, value.operations)) if isinstance(value, WeightConverter) else "",
)
def test_transformers_operations(
    converter: WeightConverter, shapes: list[list[tuple[int, ...]]], tmp_path: Path
) -> None:
    """Each operation, and chains of them, traced and evaluated by an engine, against itself run by PyTorch."""
    torch.manual_seed(0)
    model = empty(make_config())
    tensors = {f"{i}.{j}": torch.randn(shape) for i, list_ in enumerate(shapes) for j, shape in enumerate(list_)}
    (tmp_path / "policy").mkdir()
    save_file(tensors, tmp_path / "policy" / WEIGHTS)
    stored = {n: Stored("policy", n, tensor) for n, tensor in opened(tmp_path / "policy").tensors.items()}
    by_hand, collected = deepcopy(converter), Collected(converter)
    for i, pattern in enumerate(converter.source_patterns):
        collected.sources[pattern] = [f"{i}.{j}" for j in range(len(shapes[i]))]
        by_hand.collected_tensors[pattern] = [tensors[name] for name in collected.sources[pattern]]
    expected = by_hand.convert("whole0", model=model, config=model.config)
    found = evaluate(tmp_path / "policy", Conversions(model).convert("whole0", collected, stored))
    check_equal(found, {name: tensor.contiguous().numpy() for name, tensor in expected.items()})


class Double(ConversionOps):
    """Computes, instead of moving elements."""

    def convert(self, input_dict: dict[str, Any], *, target_patterns: list[str], **_: Any) -> dict[str, torch.Tensor]:
        return {target_patterns[0]: 2 * next(iter(input_dict.values()))[0]}


class EveryOther(ConversionOps):
    def convert(self, input_dict: dict[str, Any], *, target_patterns: list[str], **_: Any) -> dict[str, torch.Tensor]:
        return {target_patterns[0]: next(iter(input_dict.values()))[0][::2]}


@pytest.mark.parametrize(("operation", "name"), [(Double(), "aten.mul.Tensor"), (EveryOther(), "a slice of step 2")])
def test_an_operation_that_computes_is_refused(
    operation: ConversionOps, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By name, with the parameter, and the way to save the checkpoint so that nothing is left to compute."""
    folder = save_model(make_model(make_config()), tmp_path / "policy")
    rules = [WeightConverter("mlp.up_proj.weight", "mlp.up_proj.weight", [operation])]
    monkeypatch.setattr(conversions, "get_model_conversion_mapping", lambda model: rules)
    with pytest.raises(CheckpointError) as caught:
        bindings(folder)
    message = str(caught.value)
    assert "\n" not in message
    assert (
        f"the parameter 'model.layers.0.mlp.up_proj.weight' of 'model.layers.0.mlp.up_proj.weight' by {name}" in message
    )
    assert "save_pretrained(..., save_original_format=False)" in message
    assert isinstance(caught.value.__cause__, UnknownOperationError)


class Broken(Double):
    def convert(self, *_: Any, **__: Any) -> dict[str, torch.Tensor]:
        raise ValueError("Undefined Operation\nencountered!")


class Halve(Double):
    def convert(self, input_dict: dict[str, Any], *, target_patterns: list[str], **_: Any) -> dict[str, torch.Tensor]:
        return {target_patterns[0]: next(iter(input_dict.values()))[0][:32]}


UP = "model.layers.0.mlp.up_proj.weight"


@pytest.mark.parametrize(
    ("operation", "kept", "expected"),
    [
        (Double(), False, f"the tensor {UP!r} is missing; LlamaForCausalLM needs it"),
        (
            Broken(),
            True,
            f"cannot make the parameter {UP!r} of the 1 tensors {UP!r} … (ValueError: Undefined Operation ",
        ),
        (
            Halve(),
            True,
            f"cannot make the parameter {UP!r} of the 1 tensors {UP!r} … (the result has not the shape [64",
        ),
    ],
)
def test_rules_without_an_inverse(
    operation: ConversionOps, kept: bool, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a checkpoint should hold cannot be said then; the message names the parameter."""
    folder = save_model(make_model(make_config()), tmp_path / "policy")
    if not kept:
        damaged(folder, {name: None for name in load_file(folder / WEIGHTS) if "up_proj" in name})
    rules = [WeightConverter("mlp.up_proj.weight", "mlp.up_proj.weight", [operation])]
    # Imported by name: as an attribute of the lazy package it is there or not by what was imported before.
    for module in (conversions, importlib.import_module("transformers.conversion_mapping")):
        monkeypatch.setattr(module, "get_model_conversion_mapping", lambda *_, **__: rules)
    with pytest.raises(CheckpointError) as caught:
        bindings(folder)
    assert "\n" not in str(caught.value)
    assert expected in str(caught.value)
