"""From checkpoints to a bundle: what is right is exported whole, and what is wrong leaves nothing behind."""

import dataclasses
import errno
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from safetensors.torch import load_file
from tiny_models import copy_checkpoint, make_config, make_model, make_pair, save_model, write_recipe
from toy_tokenizers import EOS, byte_bpe
from transformers import AutoModelForCausalLM, AutoTokenizer

from dpo_fast.bundle import MANIFEST, POLICY, REFERENCE, open_bundle
from dpo_fast.engines import open_engine
from dpo_fast.engines.onnxruntime import OnnxRuntimeEngine
from dpo_fast.errors import (
    CheckpointError,
    DpoFastError,
    OutputExistsError,
    SelfCheckError,
    StorageError,
    UsageError,
)
from dpo_fast.export import exporter
from dpo_fast.export.exporter import ExportOptions, export
from dpo_fast.export.graph import INPUTS
from dpo_fast.export.head import OUTPUTS
from dpo_fast.export.self_check import SelfCheck
from dpo_fast.types import TokenScores

from .by_hand import lay_out, plain, tokens
from .test_weights import WEIGHTS, check_references, reconfigure, rewrite

Trace = Callable[..., ir.Model]
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


@pytest.fixture(autouse=True)
def trace_calls(monkeypatch: pytest.MonkeyPatch, traced: Trace) -> list[str]:
    """The model types that an export traced, of graphs that are remembered between tests."""
    calls: list[str] = []

    def trace(config: object, **keys: object) -> ir.Model:
        calls.append(config.model_type)
        return traced(config, **keys)

    monkeypatch.setattr(exporter, "trace", trace)
    return calls


@pytest.fixture
def pair(tiny_pair: tuple[Path, Path], tmp_path: Path) -> tuple[Path, Path]:
    """A policy and its reference that may be damaged."""
    policy, reference = (copy_checkpoint(folder, tmp_path / "in" / folder.name) for folder in tiny_pair)
    return policy, reference


@pytest.fixture
def output(tmp_path: Path) -> Path:
    (tmp_path / "out").mkdir()
    return tmp_path / "out" / "bundle"


def options(output: Path, **changes: object) -> ExportOptions:
    return dataclasses.replace(ExportOptions(recipe=str(write_recipe(output.parent.parent))), **changes)


def refusal(error: type[DpoFastError], policy: object, reference: object, output: Path, **changes: object) -> str:
    """The message of a refused export: one line; where it was to write, nothing is left."""
    before = sorted(output.parent.rglob("*"))
    with pytest.raises(error) as caught:
        export(str(policy), None if reference is None else str(reference), output, options(output, **changes))
    assert sorted(output.parent.rglob("*")) == before
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 1500
    return message


# -- what is right ----------------------------------------------------------------------------------------------------


def check_bundle(bundle_folder: Path, policy: Path, reference: Path) -> None:
    """A bundle is its sources, and two small graphs that point into them."""
    bundle = open_bundle(bundle_folder)
    bundle.verify()
    weight_files = set()
    for role, source in ((POLICY, policy), (REFERENCE, reference)):
        folder = bundle.model_folder(role)
        for path in source.glob("*.safetensors"):
            assert (folder / path.name).read_bytes() == path.read_bytes()
            weight_files.add(folder / path.name)
        config = AutoModelForCausalLM.from_pretrained(folder).config
        assert AutoTokenizer.from_pretrained(folder).get_vocab() == byte_bpe().get_vocab()
        tensors = {name: t for path in source.glob("*.safetensors") for name, t in load_file(path).items()}
        assert check_references(bundle.graph(role), folder, {name: name for name in tensors}) == len(tensors)
        entry = bundle.manifest.models[role]
        assert (entry.source, entry.revision, entry.model_type) == (source.name, None, config.model_type)
        assert (entry.architecture, entry.vocabulary, entry.max_positions) == ("LlamaForCausalLM", 500, 256)
        assert entry.parameters == sum(tensor.numel() for tensor in tensors.values())
        assert entry.self_check is not None
        assert entry.self_check["passed"] is True
        assert entry.self_check["layout"] == entry.layout
    heavy = {path for path in bundle_folder.rglob("*") if path.is_file() and path.suffix not in (".json", ".md")}
    assert heavy == weight_files | {bundle.graph(POLICY), bundle.graph(REFERENCE)}
    assert not any(path.is_symlink() for path in bundle_folder.rglob("*"))


def test_the_bundle(tiny_bundle: Path, tiny_pair: tuple[Path, Path]) -> None:
    check_bundle(tiny_bundle, *tiny_pair)
    manifest = open_bundle(tiny_bundle).manifest
    assert manifest.inputs == INPUTS
    assert manifest.outputs == list(OUTPUTS)
    assert manifest.recipe["vocabulary_tile"] == 128
    assert manifest.max_length == 256, "TRL's default of 1024, within the model's positions"
    assert {"python", "torch", "transformers", "onnx", "onnxruntime", "dpo-fast"} <= manifest.versions.keys()
    assert (tiny_bundle / "policy" / "README.md").read_text(encoding="utf-8").startswith("---\n")


@pytest.mark.parametrize(("dtype", "shards"), [(torch.bfloat16, 3), (torch.float16, 1)], ids=["bf16, shards", "fp16"])
def test_half_precisions_and_shards(tmp_path: Path, output: Path, dtype: torch.dtype, shards: int) -> None:
    pair = make_pair(tmp_path / "in", dtype=dtype, shards=shards)
    export(str(pair[0]), str(pair[1]), output, options(output))
    check_bundle(output, *pair)
    assert open_bundle(output).manifest.models[POLICY].stored_dtypes == [{2: "BF16", 1: "F16"}[1 + (shards > 1)]]


def test_an_architecture_is_traced_once_for_both_roles(
    pair: tuple[Path, Path], output: Path, trace_calls: list[str]
) -> None:
    """The reference's configuration may name another origin; it is the same graph."""
    reconfigure(pair[1], _name_or_path="elsewhere", transformers_version="5.0.0", pad_token_id=3, dtype="bfloat16")
    steps: list[str] = []
    export(str(pair[0]), str(pair[1]), output, options(output, self_check=False), steps.append)
    assert trace_calls == ["llama"]
    assert steps == ["checking the checkpoints", "policy: copying policy", "reference: copying reference",
                     "policy: tracing llama", "hashing"]  # fmt: skip


def test_a_reference_of_another_shape_is_traced_for_itself(
    pair: tuple[Path, Path], tmp_path: Path, output: Path, traced: Trace, trace_calls: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """A key that decides the graph differs; what is traced is not looked at here."""
    reconfigure(pair[1], rms_norm_eps=1e-5)
    small = traced(make_config(), vocabulary_tile=128)

    def trace(config: object, **keys: object) -> ir.Model:
        trace_calls.append(config.rms_norm_eps)
        return small

    monkeypatch.setattr(exporter, "trace", trace)
    export(str(pair[0]), str(pair[1]), output, options(output, self_check=False))
    assert trace_calls == [1e-6, 1e-5]


def test_the_bundles_engine_says_what_pytorch_says(tiny_bundle: Path, tiny_pair: tuple[Path, Path]) -> None:
    """From the bundle on disk, for both roles, which differ."""
    rows = [tokens(11, 9, 6, 4)]
    found = {}
    for role, folder in zip((POLICY, REFERENCE), tiny_pair, strict=True):
        engine = open_engine(open_bundle(tiny_bundle), role)
        scores = dict(zip(OUTPUTS, engine._session.run(list(OUTPUTS), lay_out(rows)), strict=True))
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        np.testing.assert_allclose(scores["log_prob"], plain(model, rows)["log_prob"], rtol=0, atol=5e-5)
        found[role] = scores["log_prob"]
    assert np.abs(found[POLICY] - found[REFERENCE]).max() > 0.1


def test_without_a_reference_and_without_a_self_check(pair: tuple[Path, Path], output: Path) -> None:
    export(str(pair[0]), None, output, options(output, self_check=False, layout="plain", max_length=100))
    bundle = open_bundle(output)
    bundle.verify()
    assert not bundle.has_reference
    assert not (output / "reference").exists()
    entry = bundle.manifest.models[POLICY]
    assert (entry.self_check, entry.layout, bundle.manifest.max_length) == (None, "plain", 100)


def test_without_a_self_check_no_prompt_is_shared(pair: tuple[Path, Path], output: Path) -> None:
    """Nobody has looked whether sharing changes the numbers; one sequence a row is right for every family."""
    export(str(pair[0]), None, output, options(output, self_check=False))
    assert open_bundle(output).manifest.models[POLICY].layout == "plain"


def test_a_moved_bundle_still_loads(tiny_bundle: Path, tmp_path: Path) -> None:
    moved = copy_checkpoint(tiny_bundle, tmp_path / "moved")
    OnnxRuntimeEngine(moved / "policy.onnx")
    model = onnx.load(moved / "policy.onnx", load_external_data=False)
    assert not any("/tmp" in entry.value for value in model.graph.initializer for entry in value.external_data)


def test_what_belongs_to_training_stays_behind(pair: tuple[Path, Path], output: Path) -> None:
    for name in ("optimizer.pt", "training_args.bin", "trainer_state.json", "modeling_evil.py"):
        (pair[0] / name).write_text("{}")
    (pair[0] / "README.md").write_text("---\nlicense: mit\n---\n# Mine\n")
    export(str(pair[0]), None, output, options(output, self_check=False))
    names = {path.name for path in (output / "policy").iterdir()}
    assert names == {"README.md", "config.json", "generation_config.json", WEIGHTS, "tokenizer.json",
                     "tokenizer_config.json"}  # fmt: skip
    assert (pair[0] / "README.md").read_text() == "---\nlicense: mit\n---\n# Mine\n"


def test_plain_is_recorded_where_sharing_fails(
    pair: tuple[Path, Path], output: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def compare(engine: object, pairs: object, expected: object, layout: str) -> SelfCheck:
        error = 6e-4 if layout == "shared" else 1e-6
        return SelfCheck(layout, 10, {"log_prob": error}, 0, 1e-4)

    monkeypatch.setattr("dpo_fast.export.self_check.compare", compare)
    export(str(pair[0]), None, output, options(output))
    entry = open_bundle(output).manifest.models[POLICY]
    assert entry.layout == "plain"
    assert entry.self_check is not None
    assert entry.self_check["layout"] == "plain"


# -- the output -------------------------------------------------------------------------------------------------------


def test_a_failed_self_check_leaves_nothing(
    pair: tuple[Path, Path], output: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    score = OnnxRuntimeEngine.score

    def off(self: OnnxRuntimeEngine, batch: object) -> TokenScores:
        found = score(self, batch)
        return dataclasses.replace(found, log_prob=found.log_prob - np.float32(0.25))

    monkeypatch.setattr(OnnxRuntimeEngine, "score", off)
    message = refusal(SelfCheckError, pair[0], pair[1], output)
    assert message.startswith("policy.onnx: the graph does not say what PyTorch says: shared layout, 334 tokens")
    assert "log_prob 0.25" in message
    assert SelfCheckError.exit_code == 3


def test_an_output_that_exists(pair: tuple[Path, Path], output: Path) -> None:
    """--overwrite replaces a bundle, only a bundle, and only by a whole one."""
    output.mkdir()
    (output / "thesis.txt").write_text("mine")
    assert "exists already" in refusal(OutputExistsError, *pair, output)
    assert "holds no bundle.json, so --overwrite does not" in refusal(OutputExistsError, *pair, output, overwrite=True)
    (output / MANIFEST).write_text("{}")
    assert "exists already" in refusal(OutputExistsError, *pair, output)
    refusal(CheckpointError, "/no/such", None, output, overwrite=True)
    export(str(pair[0]), None, output, options(output, overwrite=True, self_check=False))
    assert not (output / "thesis.txt").exists()
    open_bundle(output).verify()
    assert [path.name for path in output.parent.iterdir()] == ["bundle"]


def test_an_output_that_exists_is_refused_before_anything_is_computed(output: Path) -> None:
    output.mkdir()
    assert "exists already" in refusal(OutputExistsError, "/no/such", None, output)


def test_a_full_disk(pair: tuple[Path, Path], output: Path) -> None:
    """A limit of 50 kB a file stands in for it; the weights have 200 kB. Nothing is left, and the file is named."""
    script = f"""
import resource, sys
sys.path.insert(0, {str(Path(__file__).parent.parent)!r})
from pathlib import Path
from dpo_fast.errors import StorageError
from dpo_fast.export.exporter import export
resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
try:
    export({str(pair[0])!r}, None, Path({str(output)!r}))
except StorageError as error:
    print(error)
"""
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert "policy/model.safetensors: File too large; " in run.stdout
    assert str(output.parent) in run.stdout, "the copy is named, not the source"
    assert list(output.parent.iterdir()) == []


@pytest.mark.parametrize("step", ["copy_folder", "save", "hash_files"])
def test_a_disk_that_fills_up_at_any_step(
    pair: tuple[Path, Path], output: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(exporter.ir if step == "save" else exporter, step, full)
    message = refusal(StorageError, pair[0], None, output, self_check=False)
    assert message == f"{output}: No space left on device; free some space, or name a folder on another disk"


def test_an_output_below_a_file(pair: tuple[Path, Path], output: Path) -> None:
    (output.parent / "file").write_text("")
    assert "a part of the path is a file" in refusal(StorageError, *pair, output.parent / "file" / "bundle")


# -- what is wrong with the arguments ---------------------------------------------------------------------------------


def test_arguments(pair: tuple[Path, Path], output: Path) -> None:
    assert "--recipe 'none' is neither" in refusal(UsageError, *pair, output, recipe="none")
    assert "--max-length 1 leaves no room" in refusal(UsageError, *pair, output, max_length=1)
    message = refusal(UsageError, *pair, output, max_length=257)
    assert message == "--max-length 257: the model has positions for 256 tokens"
    assert "--base x is what an adapter was trained on" in refusal(UsageError, *pair, output, base="x")
    for reference in (None, "base"):
        message = refusal(UsageError, pair[0], reference, output, reference_revision="main")
        assert message == f"--reference-revision main goes with a Hub id, and --reference is {reference or 'none'}"
    for positions in (0, 1):
        reconfigure(pair[1], max_position_embeddings=positions)
        assert f"has positions for {positions} tokens, which are too few" in refusal(CheckpointError, *pair, output)
    reconfigure(pair[1], max_position_embeddings=64)
    assert "--max-length 65: the model has positions for 64 tokens" in refusal(UsageError, *pair, output, max_length=65)


# -- what is wrong with the checkpoints -------------------------------------------------------------------------------


def test_names_that_lead_nowhere(pair: tuple[Path, Path], output: Path) -> None:
    assert "the Hub could not give it" in refusal(CheckpointError, "user/no-such-model", None, output)
    assert "the Hub could not give it" in refusal(CheckpointError, pair[0], "user/no-such-model", output)
    assert "is a file; name the folder" in refusal(CheckpointError, pair[0] / "config.json", None, output)
    assert "a revision belongs to a Hub id" in refusal(CheckpointError, *pair, output, policy_revision="main")


def damage(folder: Path, name: str, content: str | bytes | None) -> Path:
    """Replace a file of a checkpoint, or remove it."""
    path = folder / name
    if content is None:
        path.unlink()
    else:
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    return folder


def first(size: int) -> Callable[[Path], Path]:
    return lambda folder: damage(folder, WEIGHTS, (folder / WEIGHTS).read_bytes()[:size])


def with_value(value: float, dtype: torch.dtype) -> Callable[[Path], Path]:
    def change(folder: Path) -> Path:
        tensor = load_file(folder / WEIGHTS)[EMBEDDING].to(dtype)
        tensor[7, 5] = value
        return rewrite(folder, **{EMBEDDING: tensor})

    return change


CHECKPOINTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "no config.json": (lambda f: damage(f, "config.json", None), "holds no config.json"),
    "an empty config.json": (lambda f: damage(f, "config.json", ""), "config.json cannot be used"),
    "a config.json cut off": (lambda f: damage(f, "config.json", '{"model_type": '), "config.json cannot be used"),
    "a config.json of bytes": (lambda f: damage(f, "config.json", b"\xff\x00"), "config.json cannot be used"),
    "a config.json of a list": (lambda f: damage(f, "config.json", "[]"), "config.json cannot be used"),
    "a config.json too deep": (lambda f: damage(f, "config.json", "[" * 100_000), "config.json cannot be used"),
    "an unknown model type": (lambda f: reconfigure(f, model_type="none"), "has model type `none` but"),
    "a text for a number": (lambda f: reconfigure(f, hidden_size="x"), "config.json cannot be used: Validation error"),
    "no head": (lambda f: reconfigure(f, num_attention_heads=0), "config.json cannot be used"),
    "heads that do not divide": (lambda f: reconfigure(f, num_attention_heads=3), "config.json cannot be used"),
    "an encoder-decoder": (lambda f: reconfigure(f, model_type="t5"), "no causal LM can be built"),
    "quantised": (
        lambda f: reconfigure(f, quantization_config={"quant_method": "gptq", "bits": 4}),
        "is quantised already (quantization_config); export the original weights",
    ),
    "int8": (lambda f: rewrite(f, **{HEAD: torch.ones(500, 32, dtype=torch.int8)}), "is stored as I8"),
    "pickles": (lambda f: (f / WEIGHTS).rename(f / "pytorch_model.bin"), "a pickle, which can run code when"),
    "an adapter": (
        lambda f: damage(f, "adapter_config.json", "{}"),
        "adapter_config.json and no adapter_model.safetensors",
    ),
    "a missing tensor": (lambda f: rewrite(f, **{HEAD: None}), f"the tensor {HEAD!r} is missing"),
    "an extra tensor": (lambda f: rewrite(f, extra=torch.ones(2)), "the tensor 'extra' is no part of LlamaForCausalLM"),
    "a wrong shape": (lambda f: rewrite(f, **{HEAD: torch.ones(499, 32)}), "has shape [499, 32], and config.json says"),
    "cut in the header": (first(100), "is truncated or no safetensors file: 100 bytes"),
    "cut in the data": (first(100_000), "the file at 100000; copy it again"),
    "nan": (with_value(float("nan"), torch.float32), f"the tensor {EMBEDDING!r} is NaN or infinite at [7, 5]"),
    "inf in bf16": (with_value(float("inf"), torch.bfloat16), f"tensor {EMBEDDING!r} is NaN or infinite at [7, 5]"),
    "-inf in fp16": (with_value(-float("inf"), torch.float16), f"tensor {EMBEDDING!r} is NaN or infinite at [7, 5]"),
    "a model card of bytes": (lambda f: damage(f, "README.md", b"\xff\xfe"), "policy/README.md' is not UTF-8"),
    "a model card of broken YAML": (
        lambda f: damage(f, "README.md", "---\n{[\n---\n"),
        "in/policy/README.md': its front matter is not a model card's",
    ),
    "no tokenizer": (lambda f: damage(f, "tokenizer.json", None), "tokenizer"),
    "a file's name of control characters": (lambda f: damage(f, "a\n\x1b.json", "{}"), r"the file name 'a\n\x1b.json'"),
    "a file's name of bytes": (lambda f: damage(f, "caf\udce9.txt", ""), r"the file name 'caf\udce9.txt'"),
    "a tokenizer cut off": (lambda f: damage(f, "tokenizer.json", '{"version": '), "has no tokenizer that loads"),
}  # fmt: skip


# A reference is read with the policy's tokenizer, as TRL reads it, and its card is not written.
POLICY_ALONE = ("no tokenizer", "a model card of bytes", "a model card of broken YAML")
WRONG = [(case, POLICY) for case in CHECKPOINTS] + [(c, REFERENCE) for c in CHECKPOINTS if c not in POLICY_ALONE]


@pytest.mark.parametrize(("case", "role"), WRONG)
def test_checkpoints_that_cannot_be_exported(
    pair: tuple[Path, Path], output: Path, trace_calls: list[str], case: str, role: str
) -> None:
    """Refused with the place, whichever of the two it is, before anything is traced."""
    change, expected = CHECKPOINTS[case]
    folder = pair[role == REFERENCE]
    change(folder)
    message = refusal(CheckpointError, *pair, output)
    assert expected in message
    assert folder.name in message
    assert trace_calls == []


def test_a_reference_without_a_tokenizer_is_read_with_the_policys(pair: tuple[Path, Path], output: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (pair[1] / name).unlink()
    export(str(pair[0]), str(pair[1]), output, options(output, self_check=False))
    assert open_bundle(output).has_reference


def test_a_tokenizer_larger_than_the_model(tmp_path: Path, output: Path) -> None:
    policy = save_model(make_model(make_config(vocab_size=448)), tmp_path / "in" / "policy")
    message = refusal(CheckpointError, policy, None, output)
    assert message.startswith("policy: the tokenizer has the id 448, and the model's vocabulary ends at 447; is the")


def test_a_configuration_that_names_no_class(pair: tuple[Path, Path], output: Path) -> None:
    for architectures in ([], None, 3):
        reconfigure(pair[0], architectures=architectures)
        export(str(pair[0]), None, output, options(output, self_check=False, overwrite=True))
        assert open_bundle(output).manifest.models[POLICY].architecture == "LlamaConfig"


def test_different_vocabularies(pair: tuple[Path, Path], tmp_path: Path, output: Path) -> None:
    other = save_model(make_model(make_config(vocab_size=501)), tmp_path / "in" / "other")
    message = refusal(CheckpointError, pair[0], other, output)
    assert "policy and reference have different vocabularies: policy 500, other 501; the reference is" in message


def test_different_tokenizers(pair: tuple[Path, Path], output: Path) -> None:
    tokenizer = byte_bpe()
    tokenizer.add_tokens(["\x1b[31mevil\n"])
    tokenizer.save_pretrained(pair[1])
    message = refusal(CheckpointError, *pair, output)
    assert r"policy and reference have different tokenisers: 1 tokens differ, such as '\x1b[31mevil\n'" in message
    assert "(policy: id None, reference: id 449)" in message
    path = pair[1] / "tokenizer.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    content["added_tokens"] = [t for t in content["added_tokens"] if t["content"] == EOS]
    first_two = [token for token, i in content["model"]["vocab"].items() if i in (100, 101)]
    vocabulary = content["model"]["vocab"]
    vocabulary[first_two[0]], vocabulary[first_two[1]] = vocabulary[first_two[1]], vocabulary[first_two[0]]
    path.write_text(json.dumps(content), encoding="utf-8")
    assert "2 tokens differ" in refusal(CheckpointError, *pair, output)


# -- code that a checkpoint brings ------------------------------------------------------------------------------------

CODE = """
from pathlib import Path
Path({mark!r}).write_text("the checkpoint's code has run")
from transformers import LlamaConfig, LlamaForCausalLM
class OwnConfig(LlamaConfig):
    model_type = "own"
class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig
"""


@pytest.fixture
def with_code(pair: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    """A checkpoint of an architecture of its own, and the file that its code would make."""
    mark = tmp_path / "mark"
    damage(pair[0], "own.py", CODE.format(mark=str(mark)))
    auto_map = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnForCausalLM"}
    return reconfigure(pair[0], model_type="own", architectures=["OwnForCausalLM"], auto_map=auto_map), mark


def test_a_checkpoints_code_does_not_run_unasked(with_code: tuple[Path, Path], output: Path) -> None:
    policy, mark = with_code
    message = refusal(CheckpointError, policy, None, output)
    assert message.endswith("it brings its own Python code: read that, then say --trust-remote-code")
    assert not mark.exists()


@pytest.mark.parametrize("key", ["AutoConfig", "AutoModelForCausalLM"])
def test_a_known_architectures_code_does_not_run_either(
    pair: tuple[Path, Path], output: Path, tmp_path: Path, key: str
) -> None:
    """Transformers' own class is exported, and the checkpoint's code stays behind."""
    mark = tmp_path / "mark"
    damage(pair[0], "own.py", CODE.format(mark=str(mark)))
    reconfigure(pair[0], auto_map={key: "own.OwnConfig"})
    export(str(pair[0]), None, output, options(output))
    assert not mark.exists()
    assert not list(output.parent.rglob("*.py"))


def test_a_tokenizers_code_does_not_run_unasked(pair: tuple[Path, Path], output: Path, tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    damage(pair[0], "own.py", CODE.format(mark=str(mark)))
    path = pair[0] / "tokenizer_config.json"
    own = {"auto_map": {"AutoTokenizer": ["own.Own", "own.Own"]}, "tokenizer_class": "Own"}
    path.write_text(json.dumps({**json.loads(path.read_text()), **own}))
    assert "--trust-remote-code" in refusal(CheckpointError, pair[0], None, output)
    assert not mark.exists()


@pytest.mark.slow
def test_a_checkpoints_code_runs_when_asked(with_code: tuple[Path, Path], output: Path) -> None:
    """In a process of its own, for Transformers registers what it loads; the code travels with the bundle."""
    policy, mark = with_code
    script = f"""
from pathlib import Path
from dpo_fast.export.exporter import ExportOptions, export
export({str(policy)!r}, None, Path({str(output)!r}), ExportOptions(trust_remote_code=True))
"""
    environment = {**os.environ, "HF_MODULES_CACHE": str(output.parent.parent / "modules")}
    subprocess.run([sys.executable, "-c", script], check=True, env=environment, capture_output=True)
    assert mark.exists()
    assert (output / "policy" / "own.py").is_file()
    bundle = open_bundle(output)
    bundle.verify()
    assert bundle.manifest.models[POLICY].model_type == "own"


# -- Hub ids ----------------------------------------------------------------------------------------------------------


def test_a_hub_id_is_recorded_with_its_commit(
    pair: tuple[Path, Path], output: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A snapshot of the cache: a folder named for the commit, of links to blobs."""
    commit = "0123456789abcdef0123456789abcdef01234567"
    snapshot = output.parent.parent / "snapshots" / commit
    snapshot.mkdir(parents=True)
    for path in pair[0].iterdir():
        (snapshot / path.name).symlink_to(path)
    asked: list[object] = []

    def download(name: str, *, revision: str | None, allow_patterns: list[str]) -> str:
        asked.append((name, revision, {"*.safetensors", "*.bin", "*.py"}.intersection(allow_patterns)))
        return str(snapshot)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    before = (pair[0] / WEIGHTS).read_bytes()
    export("user/model", None, output, options(output, policy_revision="v2"))
    assert asked == [("user/model", "v2", {"*.safetensors"})]
    entry = open_bundle(output).manifest.models[POLICY]
    assert (entry.source, entry.revision) == ("user/model", commit)
    assert not (output / "policy" / WEIGHTS).is_symlink()
    assert (output / "policy" / WEIGHTS).samefile(pair[0] / WEIGHTS)
    assert (pair[0] / WEIGHTS).read_bytes() == before
