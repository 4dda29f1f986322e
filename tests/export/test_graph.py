"""The graph's five outputs, on ONNX Runtime, are those of PyTorch run plainly, one sequence a row.

Nothing of the product but `trace` and `bind` is used here: inputs are laid out by hand, and the expected values come
from the model's own logits in float64.
"""

import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import VOCABULARY, make_config, make_model, save_model
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from dpo_fast.export.graph import INPUTS
from dpo_fast.export.head import OUTPUTS, logit_scale

from .binding import bind_folder, session
from .by_hand import Arrays, Row, greedy, lay_out, plain, tokens

# float32 rounding of two orders of summation, at logits of some ten nats, through two layers: measured 2e-5 at most.
# A fault in a mask or a position moves these models by 1e-2 and more.
TOLERANCE = 5e-5
TILE = 128

slow = pytest.mark.slow
# What the head and the layout meet; `test_architectures.py` has every family.
ARCHITECTURES = {
    "llama": ("llama", {}),
    "gemma2, soft caps, every other layer of window 8": ("gemma2", {}),
    "gpt2, no prefix, learned positions, Conv1D": ("gpt2", {}),
    "phi, bias of the head": ("phi", {}),
    "cohere, scaled logits, parallel layers": ("cohere", {"logit_scale": 0.25}),
}
QUICK = "llama"


@dataclass(frozen=True)
class Exported:
    """One architecture's graph in a session, and the same weights in PyTorch."""

    session: onnxruntime.InferenceSession
    model: PreTrainedModel

    def run(self, rows: list[Row]) -> Arrays:
        return dict(zip(OUTPUTS, self.session.run(list(OUTPUTS), lay_out(rows)), strict=True))


@pytest.fixture(scope="module", params=[pytest.param(n, marks=() if n == QUICK else slow) for n in ARCHITECTURES])
def exported(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, traced: Callable[..., ir.Model]
) -> Exported:
    model_type, keys = ARCHITECTURES[request.param]
    folder = tmp_path_factory.mktemp("graph")
    policy = save_model(make_model(make_config(model_type, **keys)), folder / "policy")
    if "no prefix" in request.param:  # as the first GPT-2 checkpoints of the Hub
        stored = load_file(policy / "model.safetensors")
        stripped = {name.removeprefix("transformer."): tensor for name, tensor in stored.items()}
        assert stripped.keys() != stored.keys()
        save_file(stripped, policy / "model.safetensors", metadata={"format": "pt"})
    graph = bind_folder(policy, traced(AutoConfig.from_pretrained(policy), vocabulary_tile=TILE))
    model = AutoModelForCausalLM.from_pretrained(policy, dtype=torch.float32, attn_implementation="eager").eval()
    return Exported(session(graph), model)


# Longer than the windows of 8, so that a window that is dropped, or counted in columns, is seen.
CASES: dict[str, list[Row]] = {
    "two completions share a prompt": [tokens(0, 11, 7, 9)],
    "three completions of one prompt": [tokens(10, 6, 5, 12, 3)],
    "one completion": [tokens(20, 13, 10)],
    "a prompt and a completion of one token": [tokens(30, 1, 1, 1)],
    "an empty prompt": [tokens(40, 0, 6, 12)],
    "lengths that differ, padded": [tokens(50, 3, 2, 4), tokens(60, 12, 9, 11), tokens(70, 0, 5, 2), tokens(80, 7, 1)],
    "longer than the vocabulary's tile": [tokens(90, 61, 70, 45)],
}


@pytest.mark.parametrize("case", CASES)
def test_outputs_are_those_of_pytorch(exported: Exported, case: str) -> None:
    rows = CASES[case]
    found, expected = exported.run(rows), plain(exported.model, rows)
    for name in OUTPUTS:
        assert found[name].dtype == np.float32
        assert found[name].shape == expected[name].shape
        assert np.isfinite(found[name]).all()
        error = np.abs(found[name] - expected[name]).max()
        assert error <= TOLERANCE, f"{name}: {error}"


def test_the_model_has_opinions(exported: Exported) -> None:
    """A model whose log-probs all lie near -log(500) = -6.2 would hide faults."""
    assert np.ptp(plain(exported.model, CASES["longer than the vocabulary's tile"])["log_prob"]) > 3


def test_first_choices_are_recognised(exported: Exported) -> None:
    """A greedy completion is all first choices; the same with one token changed is not."""
    prompt = tokens(1, 9)[0]
    best = greedy(exported.model, prompt, 6)
    changed = [*best[:3], (best[3] + 1) % VOCABULARY]
    found = exported.run([[prompt, best, changed]])["is_top1"]
    np.testing.assert_array_equal(found, [1, 1, 1, 1, 1, 1, 1, 1, 1, 0])


def test_padding_and_neighbours_change_nothing(exported: Exported) -> None:
    """A row alone, in a batch, and with its completions exchanged: the same numbers, to rounding."""
    prompt, one, other = tokens(2, 10, 6, 8)
    alone = exported.run([[prompt, one, other]])
    batched = exported.run([tokens(3, 20, 9, 9), [prompt, one, other], tokens(4, 2, 3)])
    exchanged = exported.run([[prompt, other, one]])
    for name in OUTPUTS:
        np.testing.assert_allclose(batched[name][18 : 18 + 14], alone[name], rtol=0, atol=TOLERANCE)
        np.testing.assert_allclose(np.roll(exchanged[name], 6), alone[name], rtol=0, atol=TOLERANCE)


def test_a_tie_with_an_earlier_token_does_not_count(tmp_path: Path, traced: Callable[..., ir.Model]) -> None:
    """Three rows of the head are made equal to the first choice's, so that four tokens tie, in one tile and in others.

    TRL's rule is `argmax(logits) == target`, and argmax finds the first: of the four, only the lowest id counts.
    """
    model = make_model(make_config())
    prompt = tokens(5, 12)[0]
    best = greedy(model, prompt, 1)[0]
    same_tile, last_tile = best ^ 1, VOCABULARY - 1 if best != VOCABULARY - 1 else VOCABULARY - 2
    tied = sorted({best, same_tile, (best + 2 * TILE) % VOCABULARY, last_tile})
    assert len({token // TILE for token in tied}) >= 2
    with torch.no_grad():
        model.lm_head.weight[tied] = model.lm_head.weight[best].clone()
    graph = bind_folder(save_model(model, tmp_path / "policy"), traced(model.config, vocabulary_tile=TILE))
    found = session(graph).run(["is_top1", "log_prob"], lay_out([[prompt, *([token] for token in tied)]]))
    np.testing.assert_array_equal(found[0], [1, 0, 0, 0])
    np.testing.assert_array_equal(found[1], found[1][0])  # they do tie


def test_sure_models_overflow_nothing(tmp_path: Path, traced: Callable[..., ir.Model]) -> None:
    """Logits of thousands: the largest probability is 1 in float32, and all others vanish."""
    model = make_model(make_config())
    with torch.no_grad():
        model.lm_head.weight.mul_(300)
    graph = bind_folder(save_model(model, tmp_path / "policy"), traced(model.config, vocabulary_tile=TILE))
    rows = [tokens(6, 9, 8, 8)]
    found = dict(zip(OUTPUTS, session(graph).run(list(OUTPUTS), lay_out(rows)), strict=True))
    expected = plain(model, rows)
    for name in OUTPUTS:
        assert np.isfinite(found[name]).all()
        # float32 holds a logit of 3000 to 2e-4, and it is the sum of 32 products
        np.testing.assert_allclose(found[name], expected[name], rtol=1e-5, atol=5e-3)
    assert found["log_prob"].min() < -1000
    assert found["entropy"].min() < 1e-3


def test_the_contract_is_written_into_the_graph(traced: Callable[..., ir.Model]) -> None:
    graph = traced(make_config(), vocabulary_tile=TILE).graph
    assert {value.name: [str(d) for d in value.shape] for value in graph.inputs} == INPUTS
    assert all(value.dtype == ir.DataType.INT64 for value in graph.inputs)
    assert [value.name for value in graph.outputs] == list(OUTPUTS)
    assert all(str(value.shape[0]) == "N" and value.dtype == ir.DataType.FLOAT for value in graph.outputs)


def test_large_values_of_the_graph_are_parameters_alone(traced: Callable[..., ir.Model]) -> None:
    """No parameter has a value of its own in a traced graph, and what has one is small."""
    names = {name for name, _ in make_model(make_config()).named_parameters(remove_duplicate=False)}
    initializers = traced(make_config(), vocabulary_tile=TILE).graph.initializers
    assert {name for name, value in initializers.items() if value.const_value is None} == names
    assert all(value.const_value.nbytes <= 4096 for value in initializers.values() if value.const_value is not None)


@pytest.mark.parametrize(
    ("model_type", "keys", "expected"),
    [
        ("llama", {}, 1.0),
        ("cohere", {"logit_scale": 0.0625}, 0.0625),
        ("granite", {"logits_scaling": 8.0}, 1 / 8),
        ("falcon_h1", {"lm_head_multiplier": 0.5}, 0.5),
    ],
)
def test_logit_scale(model_type: str, keys: dict[str, float], expected: float) -> None:
    assert logit_scale(AutoConfig.for_model(model_type, **keys)) == expected


@pytest.mark.slow
def test_tracing_loads_no_weights() -> None:
    """One layer of Llama-3.1-8B's shape has 5.1 GB of float32 weights; tracing it grows by less than 1.5 GB."""
    script = """
import math, resource
from transformers import LlamaConfig
from dpo_fast.export.graph import trace
import onnxruntime, torch._dynamo, torch.onnx
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
config = LlamaConfig(vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=1,
                     num_attention_heads=32, num_key_value_heads=8, rope_theta=500000.0)
graph = trace(config, vocabulary_tile=4096)
elements = sum(math.prod(map(int, value.shape)) for value in graph.graph.initializers.values())
print(elements, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)
"""
    output = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    elements, grown = map(int, output.split())
    assert elements * 4 > 5e9
    assert grown < 1.5e9
