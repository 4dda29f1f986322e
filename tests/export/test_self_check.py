"""The self-check passes what is right, and catches every fault that is planted: it is what makes an export believed."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import copy_checkpoint, make_config, make_model, save_model

from dpo_fast.batches import LAYOUTS, Batch, Layout
from dpo_fast.engines.onnxruntime import OnnxRuntimeEngine
from dpo_fast.errors import CheckFailedError, CheckpointError, SelfCheckError
from dpo_fast.export import graph as graph_module
from dpo_fast.export import head as head_module
from dpo_fast.export.self_check import CONTINUOUS, TOLERANCE, SelfCheck, self_check
from dpo_fast.export.weights import bind
from dpo_fast.types import TokenScores

from .binding import bind_folder, bindings

Trace = Callable[..., ir.Model]

TILE = 128
LAYERS = ("model.layers.0.self_attn.q_proj.weight", "model.layers.1.self_attn.q_proj.weight")


@pytest.fixture
def folder(tiny_pair: tuple[Path, Path], tmp_path: Path) -> Path:
    """A Llama checkpoint that may be changed."""
    return copy_checkpoint(tiny_pair[0], tmp_path / "policy")


@pytest.fixture
def exported(folder: Path, traced: Trace) -> Path:
    """Its graph, as it should be."""
    return bind_folder(folder, traced(make_config(), vocabulary_tile=TILE))


def refusal(graph: Path, folder: Path, layout: Layout | None = None) -> str:
    """The message of a failed check: one line, exit code 3."""
    with pytest.raises(SelfCheckError) as caught:
        self_check(graph, folder, layout=layout)
    assert caught.value.exit_code == 3
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith(f"{graph.name}: the graph does not say what PyTorch says: ")
    return message


def alter(monkeypatch: pytest.MonkeyPatch, change: Callable[[Batch, dict[str, np.ndarray]], object]) -> None:
    """Let a fault change what the engine returns."""
    score = OnnxRuntimeEngine.score

    def altered(self: OnnxRuntimeEngine, batch: Batch) -> TokenScores:
        values = {name: np.array(value) for name, value in dataclasses.asdict(score(self, batch)).items()}
        change(batch, values)
        return TokenScores(**values)

    monkeypatch.setattr(OnnxRuntimeEngine, "score", altered)


@pytest.mark.parametrize("layout", [None, *LAYOUTS])
def test_a_right_graph_passes(exported: Path, folder: Path, layout: Layout | None) -> None:
    result = self_check(exported, folder, layout=layout)
    assert result.passed
    assert result.layout == (layout or "shared")
    # (3 + 7 + 1 + 1 + 12 + 4 + 40 + 40 + 20 + 33) tokens of the first five probes, and 6 of the last, whose rejected
    # completion is the first one's; one pair at a time and in one batch
    assert result.tokens == 2 * 167
    assert result.errors.keys() == set(CONTINUOUS)
    assert all(0 < error < TOLERANCE / 2 for error in result.errors.values())
    assert json.loads(json.dumps(result.as_dict()))["passed"] is True


def test_two_tensors_swapped(folder: Path, traced: Trace) -> None:
    found = bindings(folder)
    one, other = LAYERS
    graph = folder.with_suffix(".onnx")
    swapped = {**found, one: found[other], other: found[one]}
    ir.save(bind(traced(make_config(), vocabulary_tile=TILE), swapped), graph)
    message = refusal(graph, folder)
    assert "shared layout, 334 tokens, largest errors: log_prob " in message
    assert "plain layout, 334 tokens, largest errors: log_prob " in message
    assert "(limit 0.0001)" in message


@pytest.mark.parametrize("shift", [-4, 4])
def test_one_offset_shifted_by_one_weight(folder: Path, traced: Trace, shift: int) -> None:
    found = bindings(folder)
    tensor = found[LAYERS[0]].tensor
    moved = dataclasses.replace(found[LAYERS[0]], tensor=dataclasses.replace(tensor, offset=tensor.offset + shift))
    graph = folder.with_suffix(".onnx")
    ir.save(bind(traced(make_config(), vocabulary_tile=TILE), {**found, LAYERS[0]: moved}), graph)
    refusal(graph, folder)


def test_weights_that_changed_after_the_export(exported: Path, folder: Path) -> None:
    """The graph reads the file that PyTorch reads, so another file is compared with itself; another folder is not."""
    other = copy_checkpoint(folder, folder.parent / "other")
    tensors = load_file(other / "model.safetensors")
    tensors[LAYERS[1]][0, 0] += 0.5
    save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    refusal(exported, other)


@pytest.mark.slow
def test_another_logit_scale(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head_module, "logit_scale", lambda config: 1.001)
    refusal(bind_folder(folder, graph_module.trace(make_config(), vocabulary_tile=TILE)), folder)


@pytest.mark.slow
def test_completions_that_see_each_other(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The rejected completion reads the chosen one: wrong with the prompt shared, right with a row each.

    The shared layout is refused with its figures where it was asked for, and plain is chosen where it was not.
    """
    mask = graph_module._attention_mask

    def one_segment(config: object, position_ids: torch.Tensor, segment_ids: torch.Tensor) -> object:
        return mask(config, position_ids, segment_ids.clamp(max=1))

    monkeypatch.setattr(graph_module, "_attention_mask", one_segment)
    graph = bind_folder(folder, graph_module.trace(make_config(), vocabulary_tile=TILE))
    assert "shared layout" in refusal(graph, folder, "shared")
    assert self_check(graph, folder, layout=None).layout == "plain"


@pytest.mark.slow
def test_a_third_completion_that_sees_the_second(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Right for every pair alone: only a row of three completions, of two pairs with one prompt, finds it."""
    mask = graph_module._attention_mask

    def two_segments(config: object, position_ids: torch.Tensor, segment_ids: torch.Tensor) -> object:
        return mask(config, position_ids, segment_ids.clamp(max=2))

    monkeypatch.setattr(graph_module, "_attention_mask", two_segments)
    graph = bind_folder(folder, graph_module.trace(make_config(), vocabulary_tile=TILE))
    assert "shared layout" in refusal(graph, folder, "shared")
    assert self_check(graph, folder, layout="shared", probes=5).passed


@pytest.mark.slow
@pytest.mark.parametrize("model_type", ["mistral", "gemma2"])
def test_a_sliding_window_that_is_dropped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model_type: str) -> None:
    """A window of 40, which only the probe made for it and the longest of the others cross."""
    folder = save_model(make_model(make_config(model_type, sliding_window=40)), tmp_path / "policy")
    config = make_config(model_type, sliding_window=40)
    graph = bind_folder(folder, graph_module.trace(config, vocabulary_tile=TILE))
    assert self_check(graph, folder, layout=None).layout == "shared"
    mask = graph_module._attention_mask

    def without_window(config: object, position_ids: torch.Tensor, segment_ids: torch.Tensor) -> object:
        return mask(config, torch.zeros_like(position_ids), segment_ids)

    monkeypatch.setattr(graph_module, "_attention_mask", without_window)
    refusal(bind_folder(folder, graph_module.trace(config, vocabulary_tile=TILE)), folder)


@pytest.mark.parametrize("output", CONTINUOUS)
def test_an_error_of_any_output_above_the_limit(
    exported: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, output: str
) -> None:
    """One token of each batch is off by a little more than the limit allows; half the limit is rounding."""

    def by(error: float) -> Callable[[Batch, dict[str, np.ndarray]], object]:
        def change(batch: Batch, values: dict[str, np.ndarray]) -> None:
            values[output][-1] -= error

        return change

    with monkeypatch.context() as patch:
        alter(patch, by(TOLERANCE / 2))
        assert self_check(exported, folder, layout="shared").errors[output] > TOLERANCE / 3
    alter(monkeypatch, by(1.2 * TOLERANCE))
    refusal(exported, folder, "shared")


def test_first_choices_that_differ(exported: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def change(batch: Batch, values: dict[str, np.ndarray]) -> None:
        values["is_top1"][0] = 1 - values["is_top1"][0]

    alter(monkeypatch, change)
    message = refusal(exported, folder)
    # a token of each of the six pairs alone, and one of the batch of all
    assert "(limit 0.0001); 7 top-1 disagreements" in message


@pytest.mark.parametrize(
    ("output", "value"),
    [("log_prob", np.nan), ("entropy", np.nan), ("is_top1", np.nan), ("log_prob", -np.inf), ("entropy", np.inf),
     ("log_prob", 0.5), ("is_top1", 0.5)],
)  # fmt: skip
def test_values_that_cannot_be(
    exported: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, output: str, value: float
) -> None:
    """NaN compares as neither larger nor smaller than a limit, and must not slip through; half a top-1 is none."""

    def change(batch: Batch, values: dict[str, np.ndarray]) -> None:
        values[output][-1] = value

    alter(monkeypatch, change)
    refusal(exported, folder, "shared")


def test_too_few_values(exported: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def change(batch: Batch, values: dict[str, np.ndarray]) -> None:
        values["entropy"] = values["entropy"][:-1]

    alter(monkeypatch, change)
    assert "the engine returned entropy of shape" in refusal(exported, folder)


def test_weights_of_nan_fail_though_both_sides_agree(exported: Path, folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"][3] = float("nan")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    assert "the engine returned log_prob nan" in refusal(exported, folder)


def test_pytorch_alone_of_nan_fails(exported: Path, folder: Path) -> None:
    """The largest error is NaN, and NaN is no pass."""
    other = copy_checkpoint(folder, folder.parent / "other")
    tensors = load_file(other / "model.safetensors")
    tensors["model.norm.weight"][3] = float("nan")
    save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    assert "log_prob nan, entropy nan" in refusal(exported, other)


def test_plain_is_chosen_where_sharing_the_prompt_changes_the_numbers(
    exported: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As with layers that mix tokens otherwise than by attention: 6e-4 nats, as measured for lfm2's convolutions."""

    def change(batch: Batch, values: dict[str, np.ndarray]) -> None:
        if (batch.segment_ids == 2).any():
            values["log_prob"] -= np.float32(6e-4)

    alter(monkeypatch, change)
    assert self_check(exported, folder, layout=None).layout == "plain"
    assert "shared layout" in refusal(exported, folder, "shared")


@pytest.mark.parametrize(
    ("changes", "passed"),
    [
        ({}, True),
        ({"errors": {"log_prob": TOLERANCE}}, True),
        ({"errors": {"log_prob": 1.01 * TOLERANCE}}, False),
        ({"errors": {"log_prob": float("nan")}}, False),
        ({"errors": {"log_prob": float("inf")}}, False),
        ({"top1_disagreements": 1}, False),
        ({"tokens": 0}, False),
    ],
)
def test_what_passes(changes: dict[str, object], passed: bool) -> None:
    """A comparison of no tokens proves nothing."""
    good = SelfCheck("shared", 10, {"log_prob": 1e-6}, 0, TOLERANCE)
    assert dataclasses.replace(good, **changes).passed is passed


def test_a_model_of_too_few_positions_to_compare_anything(tmp_path: Path, traced: Trace) -> None:
    policy = save_model(make_model(make_config(max_position_embeddings=1)), tmp_path / "policy")
    graph = bind_folder(policy, traced(make_config(), vocabulary_tile=TILE))
    assert "0 tokens" in refusal(graph, policy)


def test_a_folder_that_transformers_cannot_load(exported: Path, folder: Path) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "attn_implementation": "none"}))
    with pytest.raises(CheckpointError, match="policy: Transformers cannot load this checkpoint") as caught:
        self_check(exported, folder, layout=None)
    assert "\n" not in str(caught.value)


def test_failures_of_a_check_exit_with_3() -> None:
    assert issubclass(SelfCheckError, CheckFailedError)
    assert CheckFailedError.exit_code == 3
