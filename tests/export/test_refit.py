"""A new checkpoint in an exported bundle: what a fresh export would have made, without its trace."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import onnx_ir as ir
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import copy_checkpoint, make_config, make_model, make_pair, perturb, save_model, write_recipe

from dpo_fast.bundle import POLICY, REFERENCE, open_bundle
from dpo_fast.errors import BundleError, CheckpointError, DpoFastError, OutputExistsError, SelfCheckError
from dpo_fast.export import exporter
from dpo_fast.export import refit as refit_module
from dpo_fast.export.exporter import ExportOptions, export
from dpo_fast.export.refit import RefitOptions, refit

from .test_adapters import QUICK, make_adapter
from .test_weights import HEAD, WEIGHTS, rewrite

Trace = Callable[..., ir.Model]


@pytest.fixture(autouse=True)
def no_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    """A refit never traces: the exporter's own tests have their graphs from the session's."""

    def trace(*_: object, **__: object) -> ir.Model:
        raise AssertionError("traced")

    monkeypatch.setattr(exporter, "trace", trace)


@pytest.fixture
def bundle(tiny_bundle: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_bundle, tmp_path / "bundle"))


@pytest.fixture(scope="module")
def newer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The policy's next checkpoint."""
    return save_model(perturb(make_model(make_config()), seed=7), tmp_path_factory.mktemp("newer") / "checkpoint-2")


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def refusal(error: type[DpoFastError], bundle: Path, policy: object, **options: object) -> str:
    """The message of a refused refit: one line; the bundle is as it was, and nothing lies beside it."""
    before, beside = snapshot(bundle), sorted(bundle.parent.iterdir())
    with pytest.raises(error) as caught:
        refit(bundle, str(policy), options=RefitOptions(**options))
    assert snapshot(bundle) == before
    assert sorted(bundle.parent.iterdir()) == beside
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("in_place", [True, False])
def test_it_is_what_an_export_would_have_made(
    bundle: Path, newer: Path, tiny_pair: tuple[Path, Path], tmp_path: Path, traced: Trace, in_place: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """The same files, hash for hash; and the old bundle stays as it was unless it is the output."""
    monkeypatch.setattr(exporter, "trace", traced)
    fresh = tmp_path / "fresh"
    export(str(newer), str(tiny_pair[1]), fresh, ExportOptions(recipe=str(write_recipe(tmp_path))))
    before = snapshot(bundle)
    output = None if in_place else tmp_path / "refitted"
    refitted = refit(bundle, str(newer), output)
    assert refitted == (output or bundle)
    assert in_place or snapshot(bundle) == before
    opened, expected = open_bundle(refitted), open_bundle(fresh)
    opened.verify()
    assert opened.manifest.files == expected.manifest.files
    assert set(snapshot(refitted)) == set(snapshot(fresh))
    entry = opened.manifest.models[POLICY]
    assert entry.source == "checkpoint-2"
    assert entry.self_check["passed"]
    assert entry.self_check["tokens"] < expected.manifest.models[POLICY].self_check["tokens"], "one probe"
    assert opened.manifest.models[REFERENCE] == expected.manifest.models[REFERENCE]


def test_tensors_in_another_order_and_other_files(bundle: Path, newer: Path, tmp_path: Path) -> None:
    """A checkpoint saved in shards, or by another program: every tensor lies elsewhere."""
    tensors = load_file(newer / WEIGHTS)
    names = sorted(tensors, reverse=True)
    scattered = copy_checkpoint(newer, tmp_path / "scattered")
    (scattered / WEIGHTS).unlink()
    shards = {"b.safetensors": names[::2], "a.safetensors": names[1::2]}
    for file, part in shards.items():
        save_file({name: tensors[name] for name in part}, scattered / file, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": {name: file for file, part in shards.items() for name in part}}
    (scattered / f"{WEIGHTS}.index.json").write_text(json.dumps(index))
    refit(bundle, str(scattered))  # the self-check compares with PyTorch
    opened = open_bundle(bundle)
    opened.verify()
    assert not (bundle / POLICY / WEIGHTS).exists()
    assert {name for name in opened.manifest.files if name.startswith("policy/") and name.endswith("safetensors")} == {
        "policy/a.safetensors", "policy/b.safetensors"
    }  # fmt: skip


def test_a_wrong_offset_is_caught_by_its_one_probe(bundle: Path, newer: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As if the old tensors' places were kept: with another header size, every weight is read 8 bytes off."""
    moved = copy_checkpoint(newer, bundle.parent / "moved")
    save_file(load_file(newer / WEIGHTS), moved / WEIGHTS, metadata={"format": "pt", "padding": "x" * 8})
    monkeypatch.setattr(refit_module, "repoint", lambda graph, old, new, target: shutil.copyfile(graph, target))
    assert "does not say what PyTorch says" in refusal(SelfCheckError, bundle, moved)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"num_hidden_layers": 1}, "config.json has num_hidden_layers = 1, and the bundle was exported for 2"),
        ({"rms_norm_eps": 1e-5}, "config.json has rms_norm_eps = 1e-05, and the bundle was exported for 1e-06"),
    ],
)
def test_another_architecture(bundle: Path, tmp_path: Path, config: dict[str, object], expected: str) -> None:
    other = save_model(make_model(make_config(**config)), tmp_path / "other")
    message = refusal(CheckpointError, bundle, other)
    assert expected in message
    assert message.endswith("export it anew")


def test_another_dtype(bundle: Path, newer: Path, tmp_path: Path) -> None:
    other = copy_checkpoint(newer, tmp_path / "other")
    rewrite(other, **{HEAD: load_file(other / WEIGHTS)[HEAD].bfloat16()})
    message = refusal(CheckpointError, bundle, other)
    assert f"the tensor {HEAD!r} has shape [500, 32] and dtype BF16, and the bundle's has [500, 32] and F32" in message


def test_weights_that_are_not_finite(bundle: Path, newer: Path, tmp_path: Path) -> None:
    other = copy_checkpoint(newer, tmp_path / "other")
    head = load_file(other / WEIGHTS)[HEAD]
    head[3, 4] = torch.nan
    assert "is NaN or infinite at [3, 4]" in refusal(CheckpointError, bundle, rewrite(other, **{HEAD: head}))


def test_another_tokenizer(bundle: Path, newer: Path, tmp_path: Path) -> None:
    other = copy_checkpoint(newer, tmp_path / "other")
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    one, another = list(vocabulary)[100:102]
    vocabulary[one], vocabulary[another] = vocabulary[another], vocabulary[one]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    message = refusal(CheckpointError, bundle, other)
    assert "the new policy and the bundle's have different tokenisers: 2 tokens differ" in message


def test_a_graph_that_points_elsewhere(bundle: Path, newer: Path) -> None:
    """A bundle whose weights were saved again: the graph's places are no tensors'."""
    save_file(load_file(bundle / POLICY / WEIGHTS), bundle / POLICY / WEIGHTS, metadata={"format": "pt", "p": "x" * 64})
    assert "where no tensor begins; export the bundle again" in refusal(BundleError, bundle, newer)


def test_an_output_that_exists(bundle: Path, newer: Path, tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    with pytest.raises(OutputExistsError, match="exists already"):
        refit(bundle, str(newer), tmp_path / "there")


def test_links_share_what_is_not_changed(bundle: Path, newer: Path, tmp_path: Path) -> None:
    """On request; and evaluations of one bundle never write into the other."""
    output = refit(bundle, str(newer), tmp_path / "linked", RefitOptions(link=True, self_check=False))
    assert (output / REFERENCE / WEIGHTS).samefile(bundle / REFERENCE / WEIGHTS)
    assert (output / POLICY / WEIGHTS).samefile(newer / WEIGHTS)
    copied = refit(bundle, str(newer), tmp_path / "copied", RefitOptions(self_check=False))
    assert not (copied / REFERENCE / WEIGHTS).samefile(bundle / REFERENCE / WEIGHTS)
    assert open_bundle(copied).manifest.models[POLICY].self_check is None


def test_half_precision_and_tied_weights(tmp_path: Path, traced: Trace, monkeypatch: pytest.MonkeyPatch) -> None:
    """Casts stay, and a tensor that two parameters are is repointed once for both."""
    monkeypatch.setattr(exporter, "trace", traced)
    pair = make_pair(tmp_path / "in", dtype=torch.bfloat16, tie_word_embeddings=True)
    bundle = export(str(pair[0]), None, tmp_path / "bundle", ExportOptions(recipe=str(write_recipe(tmp_path))))
    refit(bundle, str(pair[1]))
    open_bundle(bundle).verify()
    assert open_bundle(bundle).manifest.models[POLICY].self_check["passed"]


@pytest.mark.slow
def test_a_new_adapter_on_the_same_base(
    tiny_pair: tuple[Path, Path], tmp_path: Path, traced: Trace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a fresh export, hash for hash; the base is not touched, and another rank, scaling or kind is refused."""
    monkeypatch.setattr(exporter, "trace", traced)
    old, new, other_rank, other_alpha = (
        make_adapter(tiny_pair[1], tmp_path / name, seed=seed, **QUICK, r=rank, lora_alpha=alpha)
        for name, seed, rank, alpha in (("old", 1, 4, 8), ("new", 2, 4, 8), ("rank", 3, 2, 8), ("alpha", 4, 4, 16))
    )
    settings = ExportOptions(recipe=str(write_recipe(tmp_path)))
    bundle, fresh = (export(str(it), "base", tmp_path / f"of-{it.name}", settings) for it in (old, new))
    assert "is a whole model, and the bundle's policy is a PEFT adapter" in refusal(
        CheckpointError, bundle, tiny_pair[0]
    )
    assert "adapter_config.json has lora_alpha = 16, and the bundle was" in refusal(
        CheckpointError, bundle, other_alpha
    )
    assert "adapter_config.json has r = 2, and the bundle was" in refusal(CheckpointError, bundle, other_rank)
    refit(bundle, str(new))
    opened, expected = open_bundle(bundle), open_bundle(fresh)
    opened.verify()
    assert opened.manifest.files == expected.manifest.files
    assert opened.role_hashes(REFERENCE) == expected.role_hashes(REFERENCE)
    assert opened.role_hashes(POLICY) == expected.role_hashes(POLICY)
