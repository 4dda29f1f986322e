"""A graph with adapters says what PEFT's own forward says, row by row, with each adapter on or off.

The adapters are made and saved by PEFT, with branches that are not zero. Expected values come from the PEFT model run
plainly, one sequence a row, in PyTorch.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from peft import IA3Config, LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file, save_file
from tiny_models import copy_checkpoint, make_config, make_model, make_pair, save_model, write_recipe
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from dpo_fast.bundle import POLICY, REFERENCE, Bundle, open_bundle
from dpo_fast.engines.onnxruntime import ADAPTER_GATES, OnnxRuntimeEngine
from dpo_fast.errors import CheckpointError, DpoFastError, MissingDependencyError, SelfCheckError, UsageError
from dpo_fast.export import adapters as adapters_module
from dpo_fast.export.adapter_roles import open_roles
from dpo_fast.export.adapters import AdaptedModules, LowRank, bind_adapter, match_modules, read_adapter
from dpo_fast.export.checkpoint import open_checkpoint
from dpo_fast.export.exporter import ExportOptions, export
from dpo_fast.export.head import OUTPUTS
from dpo_fast.export.probes import make_probes
from dpo_fast.export.self_check import check_mixed_rows, self_check
from dpo_fast.export.weights import bind, match_parameters
from dpo_fast.loading import Engines
from dpo_fast.types import TokenScores

from .binding import session
from .by_hand import Arrays, Row, lay_out, plain, tokens

Trace = Callable[..., ir.Model]

# float32 rounding of two orders of summation, at logits of some ten nats: as for graphs without adapters, measured
# 1.2e-5 at most. The adapters here move log-probs by nats.
TOLERANCE = 5e-5
TILE = 128  # the test recipe's
QUICK = {"target_modules": ["q_proj", "down_proj"]}
ROWS = [tokens(0, 11, 7, 9), tokens(10, 3, 5, 2), tokens(20, 4, 6), tokens(30, 1, 1, 1), tokens(40, 8, 12, 10)]

slow = pytest.mark.slow
TIED = {"tie_word_embeddings": True}
# The architecture, its keys, the adapter's.
CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "LoRA": ("llama", {}, QUICK),
    "rsLoRA, ranks and alphas by pattern": (
        "llama",
        {},
        {
            "target_modules": "all-linear",
            "use_rslora": True,
            "rank_pattern": {"q_proj": 8, r"layers\.1\.mlp\..*": 2},
            "alpha_pattern": {"^model.layers.0.self_attn.k_proj": 32, "down_proj": 3},
        },
    ),
    "DoRA of layers, embedding and head": (
        "llama",
        {},
        {"target_modules": ["q_proj", "up_proj", "embed_tokens", "lm_head"], "use_dora": True},
    ),
    "biases of the branches": (
        "phi",
        {"num_key_value_heads": 4, "partial_rotary_factor": 0.5},
        {"target_modules": ["q_proj", "fc1", "lm_head"], "lora_bias": True},
    ),
    "embedding, head and norms trained whole": (
        "llama",
        {},
        {**QUICK, "modules_to_save": ["lm_head", "embed_tokens", "norm"]},
    ),
    "a head with a bias trained whole": (
        "phi",
        {"num_key_value_heads": 4, "partial_rotary_factor": 0.5},
        {"target_modules": ["v_proj"], "modules_to_save": ["lm_head"]},
    ),
    "tied, embedding trained whole": ("llama", TIED, {**QUICK, "modules_to_save": ["embed_tokens"]}),
    "tied, head trained whole": ("llama", TIED, {**QUICK, "modules_to_save": ["lm_head"]}),
    "tied, LoRA of the embedding": ("llama", TIED, {"target_modules": ["v_proj", "embed_tokens"]}),
    "tied, and the adapters too": (
        "llama",
        TIED,
        {"target_modules": ["v_proj", "embed_tokens"], "ensure_weight_tying": True},
    ),
    "gpt2, DoRA of Conv1D": (
        "gpt2",
        {},
        {"target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True, "use_dora": True},
    ),
    "gemma2, soft caps": ("gemma2", {}, {"target_modules": ["o_proj", "lm_head"], "use_dora": True}),
    "gemma3, a scaled embedding": ("gemma3_text", {}, {"target_modules": ["v_proj", "embed_tokens"]}),
    "qwen2_moe, rows laid end to end": (
        "qwen2_moe",
        {"num_experts": 4, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 32},
        {"target_modules": r".*\.(shared_expert\.up_proj|q_proj)"},
    ),
}


def make_adapter(base: Path, folder: Path, *, seed: int = 7, **lora: Any) -> Path:
    """An adapter of a saved base, by PEFT, with values that leave nothing as it was."""
    torch.manual_seed(seed)
    keys = {"r": 4, "lora_alpha": 6, "init_lora_weights": False, "task_type": "CAUSAL_LM", **lora}
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), LoraConfig(**keys))
    shake(model)
    model.save_pretrained(folder)
    return folder


def shake(model: PeftModel, adapter: str = "default") -> None:
    """Move an adapter's tensors as training would."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if f".{adapter}." in f"{name}.":
                # PEFT draws embeddings' branches large: a tied head's logits would be hundreds, and so their rounding
                factor = 1 + 0.2 * torch.randn_like(parameter) if "magnitude" in name else 1.0
                factor = 0.3 if "lora_embedding" in name else factor
                parameter.copy_(parameter * factor + 0.1 * torch.randn_like(parameter))


@dataclass(frozen=True)
class Adapted:
    """A base and its adapters in one session, and the same in PEFT."""

    session: onnxruntime.InferenceSession
    base: Path
    adapters: list[Path]

    def run(self, rows: list[Row], gates: list[list[float]]) -> Arrays:
        inputs = lay_out(rows) | {ADAPTER_GATES: np.array(gates, np.float32)}
        return dict(zip(OUTPUTS, self.session.run(list(OUTPUTS), inputs), strict=True))

    def expected(self, rows: list[Row], gates: list[list[float]]) -> Arrays:
        """Each row by the adapter whose gate is 1, or by the base."""
        found = [plain(self.model(one_hot), [row]) for row, one_hot in zip(rows, gates, strict=True)]
        return {name: np.concatenate([values[name] for values in found]) for name in OUTPUTS}

    def model(self, gates: list[float]) -> PreTrainedModel | PeftModel:
        model = AutoModelForCausalLM.from_pretrained(self.base, dtype=torch.float32).eval()
        if 1 not in gates:
            return model
        return PeftModel.from_pretrained(model, self.adapters[gates.index(1)]).eval()


def changes(base: Path, adapter: Path) -> AdaptedModules:
    """What an adapter changes in its base."""
    found, config = open_checkpoint(str(base)), AutoConfig.from_pretrained(base)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    bindings = match_parameters(config, found, base.name)
    return match_modules(read_adapter(open_checkpoint(str(adapter))), model, found, bindings)


def make_graph(base: Path, adapters: list[Path], traced: Trace, changed: list[AdaptedModules] | None = None) -> Path:
    """The graph of a base and its adapters, beside their folders."""
    config = AutoConfig.from_pretrained(base)
    changed = changed or [changes(base, adapter) for adapter in adapters]
    bindings = match_parameters(config, open_checkpoint(str(base)), base.name)
    for index, (adapter, modules) in enumerate(zip(adapters, changed, strict=True)):
        bindings |= bind_adapter(modules, open_checkpoint(str(adapter)), adapter.name, index)
    graph = base.parent / f"{'-'.join(adapter.name for adapter in adapters)}.onnx"
    ir.save(bind(traced(config, vocabulary_tile=TILE, adapters=tuple(changed)), bindings), graph)
    return graph


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A base and a LoRA adapter of it. Read only."""
    folder = tmp_path_factory.mktemp("pair")
    base = save_model(make_model(make_config()), folder / "base")
    return base, make_adapter(base, folder / "policy", **QUICK)


@pytest.fixture(scope="module", params=[pytest.param(name, marks=() if name == "LoRA" else slow) for name in CASES])
def adapted(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, traced: Trace) -> Adapted:
    model_type, keys, lora = CASES[request.param]
    folder = tmp_path_factory.mktemp("adapted")
    base = save_model(make_model(make_config(model_type, **keys)), folder / "base")
    adapter = make_adapter(base, folder / "policy", **lora)
    return Adapted(session(make_graph(base, [adapter], traced)), base, [adapter])


@pytest.mark.parametrize("gates", [[1, 1, 1, 1, 1], [0, 0, 0, 0, 0], [1, 0, 0, 1, 1]], ids=["on", "off", "mixed"])
def test_outputs_are_those_of_peft(adapted: Adapted, gates: list[int]) -> None:
    columns = [[float(gate)] for gate in gates]
    found, expected = adapted.run(ROWS, columns), adapted.expected(ROWS, columns)
    for name in OUTPUTS:
        assert found[name].shape == expected[name].shape
        error = np.abs(found[name] - expected[name]).max()
        assert error <= TOLERANCE, f"{name}: {error}"


def test_the_adapter_matters(adapted: Adapted) -> None:
    """An adapter that hardly moves a log-prob would hide faults; each stored tensor is one of the graph's."""
    on, off = (adapted.run(ROWS, [[gate]] * len(ROWS)) for gate in (1.0, 0.0))
    assert np.abs(on["log_prob"] - off["log_prob"]).max() > 0.1
    used = {name for change in changes(adapted.base, adapted.adapters[0]).values() for name in change.tensors.values()}
    stored = {name for name in load_file(adapted.adapters[0] / "adapter_model.safetensors") if "base_layer" not in name}
    assert used == stored


@slow
def test_two_adapters_and_their_base_in_one_graph(pair: tuple[Path, Path], tmp_path: Path, traced: Trace) -> None:
    """The second adapter changes other modules than the first, one of them whole that the first adapts."""
    base, one = (copy_checkpoint(folder, tmp_path / folder.name) for folder in pair)
    lora = {"target_modules": ["v_proj", "q_proj"], "modules_to_save": ["lm_head", "layers.1.mlp.down_proj"]}
    other = make_adapter(base, tmp_path / "other", seed=8, **lora)
    adapted = Adapted(session(make_graph(base, [one, other], traced)), base, [one, other])
    gates = [[1.0, 0.0], [0.0, 1.0], [0.0, 0.0], [0.0, 1.0], [1.0, 0.0]]
    found, expected = adapted.run(ROWS, gates), adapted.expected(ROWS, gates)
    for name in OUTPUTS:
        np.testing.assert_allclose(found[name], expected[name], rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_base_of_half_precision_in_shards(tmp_path: Path, traced: Trace, dtype: torch.dtype) -> None:
    base = save_model(make_model(make_config()).to(dtype), tmp_path / "base", shards=2)
    adapter = make_adapter(base, tmp_path / "policy", **QUICK)
    adapted = Adapted(session(make_graph(base, [adapter], traced)), base, [adapter])
    for gate in ([1.0], [0.0]):
        found, expected = adapted.run(ROWS, [gate] * len(ROWS)), adapted.expected(ROWS, [gate] * len(ROWS))
        np.testing.assert_allclose(found["log_prob"], expected["log_prob"], rtol=0, atol=TOLERANCE)


def test_the_scaling(pair: tuple[Path, Path]) -> None:
    """alpha / rank, by hand: r 4, alpha 6."""
    change = changes(*pair)["model.layers.0.self_attn.q_proj"]
    assert isinstance(change, LowRank)
    assert (change.rank, change.scaling) == (4, 1.5)


# Faults


@pytest.fixture
def copies(pair: tuple[Path, Path], tmp_path: Path) -> tuple[Path, Path]:
    """A base and its adapter that may be damaged."""
    base, adapter = (copy_checkpoint(folder, tmp_path / "in" / folder.name) for folder in pair)
    settings(adapter, base_model_name_or_path=str(base))
    return base, adapter


def settings(adapter: Path, **keys: Any) -> None:
    """Change an adapter's settings."""
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **keys}))


def test_the_right_graph_passes_its_check(copies: tuple[Path, Path], traced: Trace) -> None:
    base, adapter = copies
    graph = make_graph(base, [adapter], traced)
    assert self_check(graph, adapter, base=base, gates=[1.0], layout=None).layout == "shared"
    assert self_check(graph, base, gates=[0.0], layout=None).layout == "shared"
    check_mixed_rows(graph, make_probes(500, positions=256), [[1.0], [0.0]], "shared")


def test_the_other_roles_gates(copies: tuple[Path, Path], traced: Trace) -> None:
    base, adapter = copies
    graph = make_graph(base, [adapter], traced)
    with pytest.raises(SelfCheckError, match="does not say what PyTorch says"):
        self_check(graph, adapter, base=base, gates=[0.0], layout=None)
    with pytest.raises(SelfCheckError, match="does not say what PyTorch says"):
        self_check(graph, base, gates=[1.0], layout=None)


def test_a_wrong_scaling(copies: tuple[Path, Path], traced: Trace) -> None:
    """rsLoRA's: 6 / sqrt(4) instead of 6 / 4."""
    base, adapter = copies
    settings(adapter, use_rslora=True)
    graph = make_graph(base, [adapter], traced)
    settings(adapter, use_rslora=False)
    with pytest.raises(SelfCheckError):
        self_check(graph, adapter, base=base, gates=[1.0], layout=None)


@pytest.mark.parametrize("parameter", ["lora_A", "lora_B"])
def test_tensors_of_two_layers_swapped(copies: tuple[Path, Path], traced: Trace, parameter: str) -> None:
    base, adapter = copies
    changed = changes(base, adapter)
    one, other = ("model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj")
    names = changed[one].tensors[parameter], changed[other].tensors[parameter]
    swapped = {
        path: replace(change, tensors={**change.tensors, parameter: names[path == one]})
        if path in (one, other)
        else change
        for path, change in changed.items()
    }
    config = AutoConfig.from_pretrained(base)
    bindings = match_parameters(config, open_checkpoint(str(base)), base.name)
    bindings |= bind_adapter(swapped, open_checkpoint(str(adapter)), adapter.name, 0)
    graph = base.parent / "swapped.onnx"
    ir.save(bind(traced(config, vocabulary_tile=TILE, adapters=(changed,)), bindings), graph)
    with pytest.raises(SelfCheckError):
        self_check(graph, adapter, base=base, gates=[1.0], layout=None)


def test_rows_that_take_one_anothers_gates(
    copies: tuple[Path, Path], traced: Trace, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, adapter = copies
    graph = make_graph(base, [adapter], traced)
    with_gates = OnnxRuntimeEngine.with_gates
    monkeypatch.setattr(OnnxRuntimeEngine, "with_gates", lambda self, gates: with_gates(self, gates[::-1]))
    with pytest.raises(SelfCheckError, match="rows of one batch do not keep their adapters apart: log_prob differs by"):
        check_mixed_rows(graph, make_probes(500, positions=256), [[1.0], [0.0]], "shared")


def test_without_peft_the_check_names_the_extra(
    copies: tuple[Path, Path], traced: Trace, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, adapter = copies
    graph = make_graph(base, [adapter], traced)
    monkeypatch.setitem(__import__("sys").modules, "peft", None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'dpo-fast\[peft\]'"):
        self_check(graph, adapter, base=base, gates=[1.0], layout=None)


# What is not understood


def refusal(base: Path, adapter: Path) -> str:
    """The message with which an adapter is refused: one line."""
    with pytest.raises(CheckpointError) as caught:
        open_roles(str(adapter), "base", base=str(base))
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({"peft_type": "VERA"}, "peft_type is 'VERA', and only 'LORA' is known; merge it into its base first"),
        ({"peft_type": "ADALORA"}, "peft_type is 'ADALORA'"),
        ({"target_parameters": ["experts.gate_up_proj"]}, "target_parameters is ['experts.gate_up_proj'], which"),
        ({"trainable_token_indices": [1]}, "trainable_token_indices is [1], which changes the model"),
        ({"layer_replication": [[0, 2]]}, "layer_replication is [[0, 2]]"),
        ({"alora_invocation_tokens": [5]}, "alora_invocation_tokens is [5]"),
        ({"megatron_config": {"a": 1}}, "megatron_config is {'a': 1}"),
        ({"use_tomorrows_lora": True}, "use_tomorrows_lora is True, which changes the model in a way not known"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights is 'pissa', which changes the base model's weights"),
        ({"init_lora_weights": "olora"}, "init_lora_weights is 'olora'"),
        ({"init_lora_weights": 1}, "init_lora_weights is 1"),
        ({"bias": "lora_only"}, "bias is 'lora_only': its biases would change the reference too"),
        ({"use_dora": True}, "lora_A.weight, lora_B.weight, lora_magnitude_vector; save the adapter again"),
        ({"lora_bias": True}, "ask for lora_A.weight, lora_B.bias, lora_B.weight"),
        ({"r": 8}, "has shape [4, 64], and adapter_config.json and the base model ask for [8, 64]"),
        ({"r": 0}, "r of 'model.layers.0.mlp.down_proj' is 0.0, no rank"),
        ({"r": 2.5}, "is 2.5, no rank"),
        ({"r": None}, "r of 'model.layers.0.mlp.down_proj' is None, no number"),
        ({"lora_alpha": "6"}, "lora_alpha of 'model.layers.0.mlp.down_proj' is '6', no number"),
        ({"lora_alpha": float("inf")}, "is inf, no number"),
        ({"alpha_pattern": {"(": 3}}, "alpha_pattern holds no patterns (missing ), unterminated subpattern"),
        ({"rank_pattern": [3]}, "rank_pattern holds no patterns"),
    ],
)  # fmt: skip
def test_settings_that_are_refused(copies: tuple[Path, Path], keys: dict[str, Any], expected: str) -> None:
    base, adapter = copies
    settings(adapter, **keys)
    assert expected in refusal(base, adapter)


Tensors = dict[str, torch.Tensor]
QUERY = "base_model.model.model.layers.0.self_attn.q_proj"


def drop(name: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {key: value for key, value in tensors.items() if key != name}


def add(name: str, *shape: int, dtype: torch.dtype = torch.float32) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {**tensors, name: torch.ones(shape, dtype=dtype)}


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (drop(f"{QUERY}.lora_B.weight"), "has lora_A.weight of 'model.layers.0.self_attn.q_proj'"),
        (add(f"{QUERY}.lora_B.weight", 32, 5), "has shape [32, 5]"),
        (add(f"{QUERY}.lora_A.weight", 4, 32, dtype=torch.int8), "is stored as I8; save the adapter in one of F32"),
        (add(f"{QUERY}.lora_E", 4, 1), f"the tensor '{QUERY}.lora_E' is not understood; merge it"),
        (add("prompt_embeddings", 4, 32), "'prompt_embeddings' does not begin with 'base_model.model.'"),
        (add("base_model.model.../../etc/passwd", 1), "'base_model.model.../../etc/passwd' is not understood"),
        (add("base_model.model.model.nowhere.lora_A.weight", 4, 32), "'model.nowhere', and the base model has no such"),
        (add("base_model.model.model.norm.lora_A.weight", 4, 32), "has LlamaRMSNorm there: only linear layers"),
        (add("base_model.model.model.embed_tokens.lora_A.weight", 4, 32), "Embedding ask for lora_embedding_A"),
        (add(f"{QUERY}.lora_embedding_A", 4, 32), "has lora_A.weight, lora_B.weight, lora_embedding_A of"),
        (add("base_model.model.model.embed_tokens.weight", 510, 32), "is not the base model's 'model.embed_tokens"),
        (add("base_model.model.lm_head.base_layer.weight", 500, 32), "would change the reference too"),
        (lambda tensors: {name: t * float("nan") for name, t in tensors.items()}, "is NaN or infinite"),
        (lambda tensors: {"base_model.model.lm_head.weight": tensors.popitem()[1]}, "is not the base model's"),
    ],
)  # fmt: skip
def test_tensors_that_are_refused(
    copies: tuple[Path, Path], damage: Callable[[Tensors], Tensors], expected: str
) -> None:
    base, adapter = copies
    path = adapter / "adapter_model.safetensors"
    save_file(damage(load_file(path)), path)
    assert expected in refusal(base, adapter)


@pytest.mark.parametrize(
    ("names", "tensors", "expected"),
    [
        (["lm_head"], {"lm_head.weight": (500, 33)}, "has shape [500, 33]"),
        (["mlp"], {"model.layers.0.mlp.up_proj.weight": (64, 32)}, "missing ['down_proj.weight', 'gate_proj.weight']"),
        (["layers.0"], {"model.layers.0.mlp.up_proj.weight": (64, 32)}, "is replaced (modules_to_save), and"),
        ("lm_head", {"lm_head.weight": (500, 32)}, "modules_to_save is 'lm_head', no list of names"),
        ([""], {"lm_head.weight": (500, 32)}, "modules_to_save is [''], no list of names"),
        ([], {"lm_head.weight": (500, 32)}, "is not the base model's 'lm_head.weight', and modules_to_save"),
    ],
)
def test_replacements_that_are_refused(
    copies: tuple[Path, Path], names: Any, tensors: dict[str, tuple[int, int]], expected: str
) -> None:
    base, adapter = copies
    settings(adapter, modules_to_save=names)
    path = adapter / "adapter_model.safetensors"
    stored = {name: tensor for name, tensor in load_file(path).items() if "q_proj" in name}
    save_file(stored | {f"base_model.model.{name}": torch.ones(shape) for name, shape in tensors.items()}, path)
    if "layers.0" not in names:
        drop_layer = {name: tensor for name, tensor in load_file(path).items() if "layers.0.self_attn" not in name}
        save_file(drop_layer, path)
    assert expected in refusal(base, adapter)


@pytest.mark.parametrize(
    "config",
    [
        PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
        IA3Config(task_type="CAUSAL_LM", target_modules=["k_proj"], feedforward_modules=[]),
    ],
)
def test_other_kinds_of_adapters(pair: tuple[Path, Path], tmp_path: Path, config: Any) -> None:
    base = pair[0]
    get_peft_model(AutoModelForCausalLM.from_pretrained(base), config).save_pretrained(tmp_path / "policy")
    assert "and only 'LORA' is known" in refusal(base, tmp_path / "policy")


def test_pickles_are_refused(copies: tuple[Path, Path]) -> None:
    base, adapter = copies
    (adapter / "adapter_model.safetensors").rename(adapter / "adapter_model.bin")
    assert "only adapter_model.bin, a pickle, which can run code" in refusal(base, adapter)
    (adapter / "adapter_model.bin").unlink()
    assert "holds adapter_config.json and no adapter_model.safetensors" in refusal(base, adapter)


@pytest.mark.parametrize("text", ["[]", "{", "", '{"peft_type": "LORA", "base_model_name_or_path": 3}'])
def test_settings_that_are_no_settings(copies: tuple[Path, Path], text: str) -> None:
    base, adapter = copies
    (adapter / "adapter_config.json").write_text(text)
    assert "save the adapter again" in refusal(base, adapter)


def test_an_adapter_of_nothing(copies: tuple[Path, Path]) -> None:
    base, adapter = copies
    save_file({}, adapter / "adapter_model.safetensors")
    assert "adapts nothing" in refusal(base, adapter)


def test_a_base_that_cannot_be_found(copies: tuple[Path, Path]) -> None:
    base, adapter = copies
    settings(adapter, base_model_name_or_path="nobody/nothing")
    with pytest.raises(
        CheckpointError,
        match=r"adapter_config.json: base_model_name_or_path is 'nobody/nothing': .*name it with --base",
    ):
        open_roles(str(adapter), None)
    assert open_roles(str(adapter), None, base=str(base))[POLICY].base.folder == base
    settings(adapter, base_model_name_or_path=None)
    with pytest.raises(CheckpointError, match="base_model_name_or_path is None: name the base model with --base"):
        open_roles(str(adapter), None)
    with pytest.raises(CheckpointError, match="is an adapter itself, and the base of policy"):
        open_roles(str(adapter), None, base=str(adapter))


def test_a_whole_model_names_no_base(copies: tuple[Path, Path]) -> None:
    with pytest.raises(UsageError, match="is no adapter that names its base"):
        open_roles(str(copies[0]), "base")


def test_adapters_of_different_bases(copies: tuple[Path, Path], tmp_path: Path) -> None:
    base, adapter = copies
    other = copy_checkpoint(base, tmp_path / "elsewhere")
    reference = copy_checkpoint(adapter, tmp_path / "reference")
    settings(reference, base_model_name_or_path=str(other))
    with pytest.raises(CheckpointError, match=r"adapters of different base models \(base, elsewhere\)"):
        open_roles(str(adapter), str(reference))
    models = open_roles(str(adapter), str(reference), base=str(base))
    assert [model.gates for model in models.values()] == [(1.0, 0.0), (0.0, 1.0)]


# Bundles


@pytest.fixture
def bundles(tmp_path: Path) -> Callable[..., Bundle]:
    """Export with the tests' recipe."""

    def make(policy: Path, reference: Path | str | None, **changes: Any) -> Bundle:
        (tmp_path / "out").mkdir(exist_ok=True)
        options = ExportOptions(recipe=str(write_recipe(tmp_path)), **changes)
        output = tmp_path / "out" / f"bundle{len(list((tmp_path / 'out').iterdir()))}"
        return open_bundle(export(str(policy), None if reference is None else str(reference), output, options))

    return make


def names(bundle: Bundle) -> set[str]:
    """The files that matter for how a bundle is laid out."""
    return {name for name in bundle.manifest.files if name.endswith((".onnx", ".safetensors", "tokenizer.json"))}


def pointed_at(graph: Path) -> set[str]:
    """The files that a graph's weights lie in."""
    tensors = onnx.load(graph, load_external_data=False).graph.initializer
    return {entry.value for tensor in tensors for entry in tensor.external_data if entry.key == "location"}


def test_the_reference_is_the_base(copies: tuple[Path, Path], bundles: Callable[..., Bundle]) -> None:
    base, adapter = copies
    bundle = bundles(adapter, "base")
    bundle.verify()
    weights = {"reference/model.safetensors", "policy/adapter_model.safetensors"}
    tokenizers = {"policy/tokenizer.json", "reference/tokenizer.json"}  # the policy's is the base's: it had none
    assert names(bundle) == {"policy.onnx", *weights, *tokenizers}
    assert pointed_at(bundle.folder / "policy.onnx") == weights
    policy, reference = (bundle.manifest.models[role] for role in (POLICY, REFERENCE))
    assert (policy.graph, reference.graph) == ("policy.onnx", "policy.onnx")
    assert (policy.adapter_gates, reference.adapter_gates) == ([1.0], [0.0])
    assert (policy.weights, reference.weights) == (["reference", "policy/adapter_model.safetensors"], ["reference"])
    assert (policy.source, reference.source) == ("policy", "base")
    assert policy.self_check["passed"]
    assert reference.self_check["passed"]
    stored = load_file(base / "model.safetensors"), load_file(adapter / "adapter_model.safetensors")
    sizes = [sum(tensor.numel() for tensor in tensors.values()) for tensors in stored]
    assert (policy.parameters, reference.parameters) == (sum(sizes), sizes[0])
    # An ordinary PEFT folder on an ordinary model.
    model = AutoModelForCausalLM.from_pretrained(bundle.model_folder(REFERENCE))
    assert PeftModel.from_pretrained(model, bundle.model_folder(POLICY)).peft_config["default"].r == 4


def test_both_roles_share_one_session(
    copies: tuple[Path, Path], bundles: Callable[..., Bundle], monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = bundles(copies[1], "base", self_check=False)
    loaded: list[Path] = []
    open_session = onnxruntime.InferenceSession
    monkeypatch.setattr(
        onnxruntime, "InferenceSession", lambda graph, *a, **k: loaded.append(graph) or open_session(graph, *a, **k)
    )
    opened = Engines(bundle)
    engines = {role: opened.get(role) for role in (POLICY, REFERENCE)}
    assert loaded == [bundle.folder / "policy.onnx"]
    adapted = Adapted(session(bundle.folder / "policy.onnx"), copies[0], [copies[1]])
    inputs = lay_out(ROWS)

    class HandMade:
        input_ids = inputs["input_ids"]

    HandMade.inputs = inputs
    for role, gate in ((POLICY, 1.0), (REFERENCE, 0.0)):
        scores: TokenScores = engines[role].score(HandMade)
        expected = adapted.expected(ROWS, [[gate]] * len(ROWS))
        np.testing.assert_allclose(scores.log_prob, expected["log_prob"], rtol=0, atol=TOLERANCE)


@slow
def test_trls_reference_adapter(copies: tuple[Path, Path], bundles: Callable[..., Bundle], tmp_path: Path) -> None:
    """As DPOTrainer does with a PeftModel: "ref" is a copy of the adapter before it is trained on."""
    base, first = copies
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), first, is_trainable=True)
    model.add_adapter("ref", model.peft_config["default"])
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".default." in name:
                model.get_parameter(name.replace(".default.", ".ref.")).copy_(parameter)
    shake(model)
    model.save_pretrained(tmp_path / "in" / "trained")
    assert (tmp_path / "in" / "trained" / "ref" / "adapter_model.safetensors").is_file()
    bundle = bundles(tmp_path / "in" / "trained", "base")
    adapter = "adapter_model.safetensors"
    weights = {"base/model.safetensors", f"policy/{adapter}", f"reference/{adapter}"}
    assert {name for name in names(bundle) if "tokenizer" not in name} == {
        "policy.onnx", *weights, f"policy/ref/{adapter}",
    }  # fmt: skip
    assert pointed_at(bundle.folder / "policy.onnx") == weights
    policy, reference = (bundle.manifest.models[role] for role in (POLICY, REFERENCE))
    assert (policy.adapter_gates, reference.adapter_gates) == ([1.0, 0.0], [0.0, 1.0])
    assert (policy.weights, reference.weights) == (["base", f"policy/{adapter}"], ["base", f"reference/{adapter}"])
    # The copy is the first adapter, and the self-checks have compared each with PEFT.
    before, kept = load_file(first / adapter), load_file(bundle.model_folder(REFERENCE) / adapter)
    assert all(torch.equal(before[name], kept[name]) for name in before)
    assert policy.self_check["passed"]
    assert reference.self_check["passed"]
    # The base named is the base, whatever the policy was trained on top of.
    named = bundles(tmp_path / "in" / "trained", base)
    assert named.manifest.models[REFERENCE].adapter_gates == [0.0]


def test_no_reference(copies: tuple[Path, Path], bundles: Callable[..., Bundle]) -> None:
    bundle = bundles(copies[1], None)
    assert set(bundle.manifest.models) == {POLICY}
    assert pointed_at(bundle.folder / "policy.onnx") == {
        "base/model.safetensors", "policy/adapter_model.safetensors",
    }  # fmt: skip
    assert bundle.manifest.models[POLICY].adapter_gates == [1.0]


def test_a_whole_reference_that_is_not_the_base(
    copies: tuple[Path, Path], bundles: Callable[..., Bundle], tmp_path: Path
) -> None:
    other, _ = make_pair(tmp_path / "in" / "other")
    bundle = bundles(copies[1], other)
    assert pointed_at(bundle.folder / "reference.onnx") == {"reference/model.safetensors"}
    assert pointed_at(bundle.folder / "policy.onnx") == {
        "base/model.safetensors", "policy/adapter_model.safetensors",
    }  # fmt: skip
    gates = [bundle.manifest.models[role].adapter_gates for role in (POLICY, REFERENCE)]
    assert gates == [[1.0], None]


def test_a_reference_that_is_an_adapter_of_a_whole_policy(
    copies: tuple[Path, Path], bundles: Callable[..., Bundle], tmp_path: Path
) -> None:
    policy, _ = make_pair(tmp_path / "in" / "other")
    bundle = bundles(policy, copies[1])
    entries = bundle.manifest.models
    assert (entries[POLICY].graph, entries[REFERENCE].graph) == ("policy.onnx", "reference.onnx")
    assert (entries[POLICY].adapter_gates, entries[REFERENCE].adapter_gates) == (None, [1.0])
    assert entries[REFERENCE].weights == ["base", "reference/adapter_model.safetensors"]


def test_a_failed_check_leaves_nothing(
    copies: tuple[Path, Path], bundles: Callable[..., Bundle], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A scaling that is misread is caught before the bundle appears."""
    number = adapters_module._number
    monkeypatch.setattr(
        adapters_module, "_number", lambda adapter, key, *a: number(adapter, key, *a) * (1 + (key == "lora_alpha"))
    )
    with pytest.raises(DpoFastError) as caught:
        bundles(copies[1], "base")
    assert isinstance(caught.value, SelfCheckError)
    assert list((tmp_path / "out").iterdir()) == []
