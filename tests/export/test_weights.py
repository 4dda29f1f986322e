"""Weights by reference: every parameter of a graph is the checkpoint's own bytes, and no other."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from onnx.external_data_helper import ExternalDataInfo
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_models import copy_checkpoint, make_config, make_model, make_pair, save_model
from transformers import AutoModelForCausalLM

from dpo_fast.errors import CheckpointError
from dpo_fast.export.head import OUTPUTS

from .binding import bind_folder, names, session
from .by_hand import lay_out, plain, tokens

Trace = Callable[..., ir.Model]

WEIGHTS = "model.safetensors"
HEAD = "lm_head.weight"
EMBEDDING = "model.embed_tokens.weight"
TILE = 128
# ONNX's element types by safetensors' names.
ONNX_TYPES = {"F32": onnx.TensorProto.FLOAT, "F16": onnx.TensorProto.FLOAT16, "BF16": onnx.TensorProto.BFLOAT16}
TOLERANCE = 5e-5  # as in test_graph.py: both sides compute in float32 from the same stored weights


def refusal(folder: Path) -> str:
    """The message with which a checkpoint is refused: one line."""
    with pytest.raises(CheckpointError) as caught:
        names(folder)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def rewrite(folder: Path, **changes: torch.Tensor | None) -> Path:
    """Save a checkpoint's weights again with some tensors changed, or left out where None."""
    tensors = {**load_file(folder / WEIGHTS), **changes}
    save_file({n: t for n, t in tensors.items() if t is not None}, folder / WEIGHTS, metadata={"format": "pt"})
    return folder


def reconfigure(folder: Path, **changes: object) -> Path:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    return folder


@pytest.fixture
def policy(tiny_pair: tuple[Path, Path], tmp_path: Path) -> Path:
    """A Llama checkpoint that may be damaged."""
    return copy_checkpoint(tiny_pair[0], tmp_path / "policy")


def check_references(graph: Path, folder: Path, stored: dict[str, str]) -> int:
    """Hold each parameter of a graph against safetensors' own reader; how many there were."""
    assert graph.stat().st_size < 20e6
    tensors = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118 - no mapping
                tensors[name] = (path, file.get_tensor(name))
    model = onnx.load(graph, load_external_data=False)
    external = 0
    for value in model.graph.initializer:
        if value.data_location != onnx.TensorProto.EXTERNAL:
            assert value.ByteSize() <= 4096 + 100, f"{value.name} lies in the graph"
            continue
        external += 1
        place = ExternalDataInfo(value)
        path, tensor = tensors[stored[value.name]]
        assert (graph.parent / place.location) == path
        assert place.location.startswith(f"{folder.name}/")
        assert list(value.dims) == list(tensor.shape)
        content = path.read_bytes()[place.offset : place.offset + place.length]
        assert content == tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        with safe_open(path, "pt") as file:
            assert value.data_type == ONNX_TYPES[file.get_slice(stored[value.name]).get_dtype()]
    return external


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_parameters_are_the_checkpoints_bytes(tmp_path: Path, traced: Trace, dtype: torch.dtype, shards: int) -> None:
    """The graph points at them, whatever their precision, and says what PyTorch says of them."""
    policy, _ = make_pair(tmp_path, dtype=dtype, shards=shards)
    graph = bind_folder(policy, traced(make_config(), vocabulary_tile=TILE))
    model = AutoModelForCausalLM.from_pretrained(policy, dtype=torch.float32).eval()
    assert check_references(graph, policy, names(policy)) == len(dict(model.named_parameters()))
    rows = [tokens(7, 11, 8, 5), tokens(8, 4, 3)]
    found, expected = session(graph).run(list(OUTPUTS), lay_out(rows)), plain(model, rows)
    for name, values in zip(OUTPUTS, found, strict=True):
        np.testing.assert_allclose(values, expected[name], rtol=0, atol=TOLERANCE, err_msg=name)


def test_a_checkpoint_may_mix_precisions(policy: Path, traced: Trace) -> None:
    """Norms in float32 and matrices in bfloat16, as some trainers save them."""
    tensors = {n: t.to(torch.bfloat16) if t.dim() > 1 else t for n, t in load_file(policy / WEIGHTS).items()}
    rewrite(policy, **tensors)
    graph = bind_folder(policy, traced(make_config(), vocabulary_tile=TILE))
    assert check_references(graph, policy, names(policy)) == len(tensors)
    rows = [tokens(9, 9, 4, 4)]
    found = session(graph).run(["log_prob"], lay_out(rows))[0]
    model = AutoModelForCausalLM.from_pretrained(policy, dtype=torch.float32).eval()
    np.testing.assert_allclose(found, plain(model, rows)["log_prob"], rtol=0, atol=TOLERANCE)


def test_binding_leaves_the_traced_graph_as_it_was(policy: Path, traced: Trace) -> None:
    """One trace serves the policy and the reference."""
    graph = traced(make_config(), vocabulary_tile=TILE)
    before = {name: value.const_value for name, value in graph.graph.initializers.items()}
    nodes = len(graph.graph)
    bind_folder(rewrite(policy, **{HEAD: load_file(policy / WEIGHTS)[HEAD].half()}), graph)
    assert {name: value.const_value for name, value in graph.graph.initializers.items()} == before
    assert len(graph.graph) == nodes


def test_tied_weights_are_one_tensor_under_two_names(tmp_path: Path) -> None:
    policy = save_model(make_model(make_config(tie_word_embeddings=True)), tmp_path / "policy")
    assert HEAD not in load_file(policy / WEIGHTS)
    found = names(policy)
    assert found[HEAD] == found[EMBEDDING] == EMBEDDING


def test_tied_weights_may_be_stored_twice_but_not_differ(tmp_path: Path) -> None:
    """Transformers unties what is stored twice and differs; a graph with one tensor would be of another model."""
    policy = save_model(make_model(make_config(tie_word_embeddings=True)), tmp_path / "policy")
    head = load_file(policy / WEIGHTS)[EMBEDDING].clone()
    assert names(rewrite(policy, **{HEAD: head}))[HEAD] == EMBEDDING
    head[3, 4] += 1
    message = refusal(rewrite(policy, **{HEAD: head}))
    assert f"config.json ties the tensors {EMBEDDING!r} and {HEAD!r}, and their stored values differ" in message
    loaded = AutoModelForCausalLM.from_pretrained(policy)
    assert not torch.equal(loaded.lm_head.weight, loaded.model.embed_tokens.weight)


def test_a_base_models_checkpoint_has_no_prefix(tmp_path: Path) -> None:
    policy = save_model(make_model(make_config("gpt2")), tmp_path / "policy")
    tensors = load_file(policy / WEIGHTS)
    stripped = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    save_file(stripped, policy / WEIGHTS)
    found = names(policy)
    assert found["transformer.wte.weight"] == found[HEAD] == "wte.weight"
    assert found["transformer.h.0.attn.c_attn.weight"] == "h.0.attn.c_attn.weight"
    assert set(found.values()) == set(stripped)


def test_buffers_that_the_model_computes_may_be_stored(policy: Path) -> None:
    """Checkpoints of older versions hold the rotary frequencies, once for each layer."""
    extra = {f"model.layers.{layer}.self_attn.rotary_emb.inv_freq": torch.ones(4) for layer in (0, 1)}
    assert set(names(rewrite(policy, **extra)).values()).isdisjoint(extra)


NORM = "model.layers.1.input_layernorm.weight"


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({NORM: None}, f"the tensor {NORM!r} is missing; LlamaForCausalLM needs it (the checkpoint holds 20 tensors)"),
        ({HEAD: None}, f"the tensor {HEAD!r} is missing"),
        ({"model.layers.2.mlp.up_proj.weight": torch.ones(64, 32)}, "up_proj.weight' is no part of LlamaForCausalLM"),
        ({"lora_A": torch.ones(2)}, "the tensor 'lora_A' is no part of LlamaForCausalLM; is config.json the one of"),
        ({NORM: torch.ones(31)}, f"the tensor {NORM!r} has shape [31], and config.json says [32]"),
        ({NORM: torch.ones(1, 32)}, f"the tensor {NORM!r} has shape [1, 32], and config.json says [32]"),
        ({NORM: torch.ones(32, dtype=torch.int8)}, f"the tensor {NORM!r} is stored as I8; export a checkpoint in one"),
        ({NORM: torch.ones(32, dtype=torch.float64)}, "is stored as F64; export a checkpoint in one of F32, F16, BF16"),
        ({NORM: torch.ones(32, dtype=torch.float8_e4m3fn)}, "is stored as F8_E4M3; export a checkpoint in one of"),
    ],
)
def test_weights_that_are_not_the_models(policy: Path, changes: dict[str, torch.Tensor | None], expected: str) -> None:
    message = refusal(rewrite(policy, **changes))
    assert expected in message
    assert str(policy) in message


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"num_hidden_layers": 3}, "the tensor 'model.layers.2."),
        ({"num_hidden_layers": 1}, "is no part of LlamaForCausalLM"),
        ({"vocab_size": 501}, "has shape [500, 32], and config.json says [501, 32]"),
        ({"model_type": "t5"}, "no causal LM can be built from config.json, whose model type is 't5' (ValueError"),
        ({"hidden_size": -4}, "no causal LM can be built from config.json"),
        ({"hidden_act": "none"}, "no causal LM can be built from config.json"),
        ({"num_key_value_heads": 0}, "no causal LM can be built from config.json"),
        ({"rope_parameters": {"rope_type": "spiral"}}, "no causal LM can be built from config.json"),
    ],
)
def test_configurations_that_are_not_the_weights(policy: Path, changes: dict[str, object], expected: str) -> None:
    message = refusal(reconfigure(policy, **changes))
    assert expected in message
    assert str(policy) in message
