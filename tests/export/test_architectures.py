"""Every family that people train with DPO: its graph, on ONNX Runtime, is PyTorch run plainly, one sequence a row.

What was measured is left in build/architectures/, a file a family: tests may run in several processes.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from tiny_models import make_config, make_model, save_model
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.masking_utils import (
    create_causal_mask,
    create_chunked_causal_mask,
    create_sliding_window_causal_mask,
)

from dpo_fast.batches import Layout
from dpo_fast.errors import CheckpointError
from dpo_fast.export.attention import grouped_attention
from dpo_fast.export.graph import _attention_mask, trace
from dpo_fast.export.head import OUTPUTS
from dpo_fast.export.mixers import gated_delta_rule, selective_scan
from dpo_fast.export.positions import longest_sequence, windows
from dpo_fast.export.self_check import self_check

from .architecture_table import RECORDS
from .binding import bind_folder, session
from .by_hand import Row, lay_out, plain, tokens

# float32 rounding of two orders of summation, in two layers: measured 6e-6 at most. What is wrong moves these models by
# 0.2 nats and more.
TOLERANCE = 1e-5
FAULT = 1e-2
SCALE = 0.15  # of the weights: log-probs are spread over 2 to 5 nats
TILE = 128  # does not divide the vocabulary of 500

slow = pytest.mark.slow


@dataclass(frozen=True)
class Family:
    """A family, what its tiny model is made with, and the layout that is right for it."""

    model_type: str
    layout: Layout = "shared"
    keys: tuple[tuple[str, Any], ...] = ()


def family(model_type: str, layout: Layout = "shared", **keys: Any) -> Family:
    return Family(model_type, layout, tuple(keys.items()))


GRANITE = {"residual_multiplier": 0.5, "embedding_multiplier": 3.0, "attention_multiplier": 0.3}
FAMILIES = {
    "llama": family("llama"),
    "llama, tied": family("llama", tie_word_embeddings=True),
    "apertus": family("apertus"),
    "arcee": family("arcee"),
    "bamba": family("bamba", "plain"),
    "bloom": family("bloom"),
    "codegen": family("codegen"),
    "cohere": family("cohere", logit_scale=0.25),
    "cohere2": family("cohere2", logit_scale=0.5),
    "deepseek_v2": family("deepseek_v2"),
    "deepseek_v3": family("deepseek_v3"),
    "exaone4": family("exaone4"),
    "falcon": family("falcon", new_decoder_architecture=True, num_kv_heads=2),
    "falcon, ALiBi": family("falcon", alibi=True, multi_query=False, parallel_attn=False, bias=True),
    "falcon_h1": family("falcon_h1", "plain", lm_head_multiplier=0.5),
    "falcon_mamba": family("falcon_mamba", "plain"),
    "gemma": family("gemma"),
    "gemma2": family("gemma2"),
    "gemma3_text": family("gemma3_text"),
    "glm4": family("glm4"),
    "gpt2": family("gpt2"),
    "gpt_bigcode": family("gpt_bigcode"),
    "gpt_neo": family("gpt_neo", "plain"),  # its windows are counted in columns
    "gpt_neox": family("gpt_neox"),
    "gpt_oss": family("gpt_oss"),
    "gptj": family("gptj"),
    "granite": family("granite", logits_scaling=2.0, **GRANITE),
    "granitemoe": family("granitemoe", logits_scaling=2.0),
    "lfm2": family("lfm2", "plain"),
    "mamba": family("mamba", "plain"),
    "mamba2": family("mamba2", "plain"),
    "ministral": family("ministral"),
    "mistral": family("mistral"),
    "mixtral": family("mixtral"),
    "mpt": family("mpt", "plain"),
    "nemotron": family("nemotron", head_dim=8),
    "olmo": family("olmo"),
    "olmo2": family("olmo2"),
    "olmo3": family("olmo3"),
    "olmoe": family("olmoe"),
    "opt": family("opt"),
    "phi": family("phi"),
    "phi3": family("phi3"),
    "qwen2": family("qwen2"),
    "qwen2_moe": family("qwen2_moe"),
    "qwen3": family("qwen3"),
    "qwen3_5_text": family("qwen3_5_text", "plain"),
    "qwen3_moe": family("qwen3_moe"),
    "qwen3_next": family("qwen3_next", "plain"),
    "seed_oss": family("seed_oss"),
    "smollm3": family("smollm3"),
    "stablelm": family("stablelm"),
    "starcoder2": family("starcoder2"),
}
QUICK = "llama"

# Prompts and completions longer and shorter than windows, chunks and each other; each row alone, then all together.
ROWS: list[Row] = [tokens(50, 3, 2, 4), tokens(60, 12, 9, 11), tokens(80, 7, 1), tokens(90, 41, 30, 25)]
BATCHES = [*([row] for row in ROWS), ROWS]


@dataclass(frozen=True)
class Exported:
    """One family's checkpoint and graph."""

    name: str
    family: Family
    folder: Path
    graph: Path
    model: PreTrainedModel
    session: onnxruntime.InferenceSession

    def error(self, layout: Layout) -> tuple[float, int]:
        """The largest error of any output (nats), and how many tokens were compared."""
        largest, compared = 0.0, 0
        for rows in BATCHES:
            laid_out = rows if layout == "shared" else [[row[0], completion] for row in rows for completion in row[1:]]
            found = dict(zip(OUTPUTS, self.session.run(list(OUTPUTS), lay_out(laid_out)), strict=True))
            expected = plain(self.model, rows)
            for name in OUTPUTS:
                assert found[name].shape == expected[name].shape
                assert np.isfinite(found[name]).all()
                largest = max(largest, float(np.abs(found[name] - expected[name]).max()))
            compared += len(expected["log_prob"])
        return largest, compared


@pytest.fixture(scope="module", params=[pytest.param(n, marks=() if n == QUICK else slow) for n in FAMILIES])
def exported(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, traced: Callable[..., ir.Model]
) -> Exported:
    chosen = FAMILIES[request.param]
    made = make_model(make_config(chosen.model_type, **dict(chosen.keys)), scale=SCALE)
    with torch.no_grad():  # a router's correction is a buffer, and zero in a fresh model
        for name, buffer in made.named_buffers():
            if name in made.state_dict() and buffer.is_floating_point():
                buffer.normal_(0, SCALE)
    folder = save_model(made, tmp_path_factory.mktemp("architectures") / "policy")
    graph = bind_folder(folder, traced(AutoConfig.from_pretrained(folder), vocabulary_tile=TILE))
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return Exported(request.param, chosen, folder, graph, model, session(graph))


def test_the_graph_is_pytorch(exported: Exported) -> None:
    error, compared = exported.error(exported.family.layout)
    assert error <= TOLERANCE
    if exported.family.layout == "shared":  # one sequence a row is right for every family
        assert exported.error("plain")[0] <= TOLERANCE
    _record(exported, error, compared)


def test_a_prompt_that_cannot_be_shared_is_far_off(exported: Exported) -> None:
    """What the self-check sees when it turns a layout down is no rounding, and neither is any fault in these models."""
    if exported.family.layout == "plain":
        assert exported.error("shared")[0] > FAULT
    expected = plain(exported.model, ROWS)["log_prob"]
    assert np.ptp(expected) > 1.5  # nats


SELF_CHECKED = {name for name, of in FAMILIES.items() if of.layout == "plain"} | {"llama", "gemma2", "mixtral", "gpt2"}


@slow
@pytest.mark.parametrize("exported", sorted(SELF_CHECKED), indirect=True)
def test_the_self_check_chooses_the_layout(exported: Exported) -> None:
    result = self_check(exported.graph, exported.folder, layout=None)
    assert result.layout == exported.family.layout


def _record(exported: Exported, error: float, compared: int) -> None:
    """Keep what was measured, beside what other runs have measured."""
    record = {
        "family": exported.family.model_type,
        "layout": exported.family.layout,
        "largest_error": error,
        "graph_bytes": exported.graph.stat().st_size,
        "tokens": compared,
    }
    RECORDS.mkdir(parents=True, exist_ok=True)
    (RECORDS / f"{exported.name}.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.1] * 4,
    "long_factor": [4.0] * 4,
    "original_max_position_embeddings": 64,
}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}


@slow
@pytest.mark.parametrize(
    ("model_type", "keys"),
    [
        ("phi3", {"rope_parameters": LONGROPE, "original_max_position_embeddings": 64}),
        ("llama", {"rope_parameters": DYNAMIC, "max_position_embeddings": 64}),
    ],
    ids=["longrope", "dynamic"],
)
def test_frequencies_of_short_sequences_and_nothing_beyond(
    tmp_path: Path, traced: Callable[..., ir.Model], model_type: str, keys: dict[str, Any]
) -> None:
    """Up to 64 tokens a completion, in a row that is longer; a completion that goes beyond has no numbers at all."""
    folder = save_model(make_model(make_config(model_type, **keys), scale=SCALE), tmp_path / "policy")
    config = AutoConfig.from_pretrained(folder)
    assert longest_sequence(config) == 64
    graph = session(bind_folder(folder, traced(config, vocabulary_tile=TILE)))

    def plainly(rows: list[Row]) -> np.ndarray:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        return plain(model, rows)["log_prob"]

    within, beyond = [tokens(1, 40, 24, 20)], [tokens(1, 40, 25, 20)]
    found = graph.run(["log_prob"], lay_out(within))[0]
    np.testing.assert_allclose(found, plainly(within), rtol=0, atol=TOLERANCE)
    assert np.isnan(graph.run(["log_prob"], lay_out(beyond))[0]).all()
    assert self_check(folder.with_suffix(".onnx"), folder, layout=None).layout == "shared"


@slow
@pytest.mark.parametrize(
    ("model_type", "keys"),
    [("mamba2", {"chunk_size": 256}), ("bamba", {"mamba_chunk_size": 256, "max_position_embeddings": 2048})],
)
def test_rows_of_several_chunks(tmp_path: Path, model_type: str, keys: dict[str, Any]) -> None:
    """The chunks of real models, 256 tokens, are longer than any row of the other tests, and than the self-check's."""
    folder = save_model(make_model(make_config(model_type, **keys), scale=SCALE), tmp_path / "policy")
    graph = session(bind_folder(folder, trace(AutoConfig.from_pretrained(folder), vocabulary_tile=TILE)))
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    for row in (tokens(1, 3, 2), tokens(2, 250, 20), tokens(3, 400, 300)):
        found = graph.run(["log_prob"], lay_out([row]))[0]
        np.testing.assert_allclose(found, plain(model, [row])["log_prob"], rtol=0, atol=TOLERANCE)


def test_the_longest_sequence_of_a_kind_of_layer() -> None:
    """Gemma3 has rotary parameters for each kind of layer."""
    assert longest_sequence(make_config("gemma3_text")) is None
    assert longest_sequence(make_config("llama")) is None
    assert longest_sequence(make_config("gpt2")) is None
    parameters = {"full_attention": DYNAMIC, "sliding_attention": {"rope_type": "default", "rope_theta": 1e4}}
    config = make_config("gemma3_text", rope_parameters=parameters, max_position_embeddings=200)
    assert longest_sequence(config) == 200


@pytest.mark.parametrize(
    ("model_type", "expected"),
    [("llama", {}), ("mistral", {"sliding_window": 8}), ("gpt_neo", {"window_size": 8})],
)
def test_windows(model_type: str, expected: dict[str, int]) -> None:
    assert windows(make_config(model_type)) == expected


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (lambda: make_config("llama4_text", attn_temperature_tuning=True), "attn_temperature_tuning True scales"),
        (
            lambda: make_config("gpt_neo", window_size=1025),
            "window_size 1025 is applied by transformers.models.gpt_neo",
        ),
        (lambda: make_config("doge", keep_window_size=128), "something else unless 2 <= T <= 128"),
        (lambda: AutoConfig.for_model("vit"), "model type 'vit' is not a causal LM that can be built"),
    ],
    ids=["scaled by column", "a window that nothing checks", "keys that long rows leave out", "no language model"],
)
def test_what_could_be_wrong_unseen_is_refused(config: Callable[[], PretrainedConfig], message: str) -> None:
    with pytest.raises(CheckpointError, match=message) as caught:
        trace(config(), vocabulary_tile=TILE)
    assert "\n" not in str(caught.value)


def test_attention_with_a_term_that_is_not_known_is_refused() -> None:
    """A bias that a layer hands over, and that attention would silently leave out."""
    size = torch.zeros(1, 2, 3, 4)
    with pytest.raises(NotImplementedError, match="attention with position_bias is unknown here"):
        grouped_attention(torch.nn.Module(), size, size, size, size[:, :1, :, :3], position_bias=size)


def test_attention_is_that_of_transformers() -> None:
    """Groups of heads, a soft cap, sinks, and a mask of each head, against the textbook's loop over heads."""
    generator = torch.Generator().manual_seed(0)
    query, key = torch.randn(2, 4, 5, 8, generator=generator), torch.randn(2, 2, 5, 8, generator=generator)
    value, sinks = torch.randn(2, 2, 5, 6, generator=generator), torch.randn(4, generator=generator)
    mask = torch.randn(2, 4, 5, 5, generator=generator)
    found, _ = grouped_attention(torch.nn.Module(), query, key, value, mask, scaling=0.3, softcap=2.0, s_aux=sinks)
    for head in range(4):
        scores = 2.0 * torch.tanh(0.3 * query[:, head] @ key[:, head // 2].mT / 2.0) + mask[:, head]
        weights = scores.exp() / (scores.exp().sum(-1, keepdim=True) + sinks[head].exp())
        torch.testing.assert_close(found[:, :, head], weights @ value[:, head // 2], rtol=0, atol=1e-6)


def test_scans_are_the_loops_that_they_replace() -> None:
    from transformers.models.mamba.modeling_mamba import mamba_selective_scan
    from transformers.models.qwen3_next.modeling_qwen3_next import torch_recurrent_gated_delta_rule

    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    x, dt, z = random(2, 3, 7), random(2, 3, 7), random(2, 3, 7)
    names = {"A": -random(3, 4).exp(), "B": random(2, 4, 7), "C": random(2, 4, 7), "D": random(3), "z": z}
    options = {**names, "delta_bias": random(3), "delta_softplus": True}
    torch.testing.assert_close(
        selective_scan(x, dt, **options), mamba_selective_scan(x, dt, **options), rtol=0, atol=1e-6
    )
    query, key, value = random(2, 7, 2, 4), random(2, 7, 2, 4), random(2, 7, 4, 5)
    decay, beta = -random(2, 7, 4).exp(), random(2, 7, 4).sigmoid()
    ours, theirs = (
        rule(query, key, value, g=decay, beta=beta, use_qk_l2norm_in_kernel=True)[0]
        for rule in (gated_delta_rule, torch_recurrent_gated_delta_rule)
    )
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("rule", "key", "seen"),
    [
        (create_causal_mask, "sliding_window", ["x", "xx", "xxx", "xxxx", "xxxxx", "xxx  x", "x     x"]),
        (create_sliding_window_causal_mask, "sliding_window", ["x", "xx", " xx", "  xx", "  xxx", "  x  x", "x     x"]),
        (create_chunked_causal_mask, "attention_chunk_size", ["x", "xx", "  x", "  xx", "  xxx", "  x  x", "x     x"]),
    ],
    ids=["causal", "sliding", "chunked"],
)
def test_masks_of_any_length_are_those_of_transformers(
    rule: Callable[..., torch.Tensor], key: str, seen: list[str]
) -> None:
    """Longer than any probe could pass in a reasonable time: the rule that Transformers asks for, of positions."""
    config = make_config("llama", attn_implementation="sdpa", **{key: 100_000})
    positions = torch.tensor([[0, 1, 100_000, 100_001, 100_002, 100_002, 0]])
    segments = torch.tensor([[0, 0, 0, 1, 1, 2, -1]])
    with _attention_mask(config, positions, segments):
        mask = rule(config, torch.zeros(1, 7, 4), None, None, positions)
    assert mask.dtype == torch.float32
    assert ["".join("x" if value == 0 else " " for value in row).rstrip() for row in mask[0, 0]] == seen


def test_a_tied_parameter_is_in_the_graph_once(traced: Callable[..., ir.Model]) -> None:
    """Twice, an engine would hold the largest matrix of a small model twice."""
    config = make_config("llama", tie_word_embeddings=True)
    initializers = traced(config, vocabulary_tile=TILE).graph.initializers.values()
    assert [value.shape for value in initializers if value.const_value is None].count(ir.Shape([500, 32])) == 1
