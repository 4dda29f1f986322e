"""A bundle's manifest: what is altered, missing or malformed is found and named."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dpo_fast.bundle import FORMAT, MANIFEST, POLICY, REFERENCE, UNTRACKED, Bundle, hash_files, open_bundle
from dpo_fast.errors import BundleError

Manifest = dict[str, Any]


@pytest.fixture
def bundle(tiny_bundle: Path, tmp_path: Path) -> Bundle:
    """A copy that may be damaged."""
    return open_bundle(Path(shutil.copytree(tiny_bundle, tmp_path / "bundle")))


def refusal(action: Callable[[], object]) -> str:
    """The message of the BundleError that an action raises: one line."""
    with pytest.raises(BundleError) as caught:
        action()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_the_manifest_lists_every_file_but_the_untracked(bundle: Bundle) -> None:
    present = {path.relative_to(bundle.folder).as_posix() for path in bundle.folder.rglob("*") if path.is_file()}
    assert set(bundle.manifest.files) == present - {MANIFEST, "policy/README.md"}
    assert {MANIFEST, "attestation.json", "model.sig", "policy/README.md"} == UNTRACKED
    assert bundle.manifest.files == hash_files(bundle.folder)
    assert {"policy.onnx", "reference.onnx", "policy/model.safetensors", "reference/model.safetensors",
            "policy/config.json", "policy/tokenizer.json"} <= present  # fmt: skip
    bundle.verify()


def test_a_flipped_bit_in_any_file_is_found(bundle: Bundle) -> None:
    for name in bundle.manifest.files:
        path = bundle.folder / name
        content = path.read_bytes()
        position = len(content) // 2
        path.write_bytes(content[:position] + bytes([content[position] ^ 1]) + content[position + 1 :])
        assert f"{path}: is not the file that was exported" in refusal(bundle.verify)
        path.write_bytes(content)
    bundle.verify()


def test_a_file_that_is_missing_longer_or_shorter_is_found(bundle: Bundle) -> None:
    for name in bundle.manifest.files:
        path = bundle.folder / name
        content = path.read_bytes()
        path.unlink()
        assert f"{path}: is missing, and bundle.json lists it" in refusal(bundle.verify)
        for altered in (content + b"\n", content[:-1], b""):
            path.write_bytes(altered)
            assert f"({len(altered)} bytes, {len(content)} recorded" in refusal(bundle.verify)
        path.write_bytes(content)
    bundle.verify()


def test_the_model_card_may_change(bundle: Bundle) -> None:
    (bundle.folder / "policy" / "README.md").write_text("# Rewritten after an evaluation\n")
    bundle.verify()


def test_where_things_are(bundle: Bundle) -> None:
    assert bundle.has_reference
    for role in (POLICY, REFERENCE):
        assert bundle.graph(role) == bundle.folder / f"{role}.onnx"
        assert bundle.graph(role).is_file()
        assert (bundle.model_folder(role) / "config.json").is_file()
    files = bundle.manifest.files
    assert bundle.role_hashes(POLICY) == [files[n]["sha256"] for n in ("policy.onnx", "policy/model.safetensors")]
    assert bundle.role_hashes(POLICY) != bundle.role_hashes(REFERENCE)


def change(bundle: Bundle, edit: Callable[[Manifest], object]) -> str:
    """The refusal of a bundle whose manifest was edited."""
    path = bundle.folder / MANIFEST
    manifest = json.loads(path.read_text())
    edit(manifest)
    path.write_text(json.dumps(manifest))
    message = refusal(lambda: open_bundle(bundle.folder).verify())
    assert str(path) in message
    return message


@pytest.mark.parametrize(
    "name", ["../evil", "policy/../../evil", "/etc/passwd", "", ".", "..", "policy\\..\\..\\evil", "//host/x"]
)
@pytest.mark.parametrize("where", ["files", "graph", "weights", "recipe"])
def test_names_outside_the_bundle(bundle: Bundle, name: str, where: str) -> None:
    """A recipe's name is a folder's too: a refit writes what it quantises into engines/NAME."""

    def edit(manifest: Manifest) -> None:
        if where in ("files", "graph"):
            manifest["files"][name] = manifest["files"]["policy.onnx"]
        if where == "graph":
            manifest["models"]["policy"]["graph"] = name
        if where == "weights":
            manifest["models"]["policy"]["weights"] = [name, "policy"]  # an adapter's base is loaded from there
        if where == "recipe":
            manifest["recipe"]["name"] = name

    assert f"names {name!r}, which lies outside the bundle; do not trust this bundle" in change(bundle, edit)


EDITS: dict[str, tuple[Callable[[Manifest], object], str]] = {
    "another format": (lambda m: m.update(format=FORMAT + 1), "has format 4, and this version reads 3; export the"),
    "no format": (lambda m: m.pop("format"), "is damaged (KeyError: 'format')"),
    "an unknown key": (lambda m: m.update(extra=1), "is damaged (TypeError"),
    "no files": (lambda m: m.pop("files"), "is damaged (TypeError"),
    "files as a list": (lambda m: m.update(files=list(m["files"])), "is damaged (AttributeError"),
    "a file of a number": (lambda m: m["files"].update({"policy.onnx": 3}), "is damaged (TypeError"),
    "a file without a hash": (lambda m: m["files"]["policy.onnx"].pop("sha256"), "is damaged (KeyError: 'sha256')"),
    "a hash of a number": (lambda m: m["files"]["policy.onnx"].update(sha256=3), "3 instead of a text"),
    "bytes of a text": (lambda m: m["files"]["policy.onnx"].update(bytes="3"), "'3' instead of a whole number"),
    "a graph without a hash": (lambda m: m["files"].pop("policy.onnx"), "has no hash of 'policy.onnx'"),
    "a graph of nothing": (lambda m: m["models"]["policy"].update(graph=None), "None instead of a text"),
    "models as a list": (lambda m: m.update(models=[]), "is damaged (AttributeError"),
    "no policy": (lambda m: m["models"].pop("policy"), "is damaged (models ['reference']"),
    "another role": (lambda m: m["models"].update(judge=m["models"]["policy"]), "is damaged (models ['judge'"),
    "a model's missing key": (lambda m: m["models"]["policy"].pop("layout"), "is damaged (TypeError"),
    "an unknown layout": (lambda m: m["models"]["policy"].update(layout="spiral"), "layouts ['shared', 'spiral']"),
    "a layout of a list": (lambda m: m["models"]["policy"].update(layout=["shared"]), "is damaged (TypeError"),
    "a layout of nothing": (lambda m: m["models"]["policy"].update(layout=None), "None instead of a text"),
    "a vocabulary of text": (lambda m: m["models"]["policy"].update(vocabulary="5"), "'5' instead of a whole"),
    "positions of text": (lambda m: m["models"]["policy"].update(max_positions="5"), "'5' instead of a whole"),
    "a length of text": (lambda m: m.update(max_length="1024"), "'1024' instead of a whole number"),
    "a recipe of another version": (lambda m: m["recipe"].update(new=1), "is damaged (TypeError: Recipe"),
    "a recipe of text": (lambda m: m.update(recipe="cpu"), "is damaged (TypeError"),
    "a recipe without an engine": (lambda m: m["recipe"].pop("engine"), "is damaged (KeyError: 'engine')"),
    "a budget of text": (lambda m: m["recipe"].update(token_budget="5"), "'5' instead of a whole number"),
}


@pytest.mark.parametrize("edit", EDITS)
def test_manifests_that_are_damaged(bundle: Bundle, edit: str) -> None:
    action, expected = EDITS[edit]
    assert expected in change(bundle, action)


@pytest.mark.parametrize("content", ["", "{", "[]", "3", "null", '"text"', "NaN", "[" * 100_000, "\xff\xfe"])
def test_manifests_that_are_no_manifest(bundle: Bundle, content: str) -> None:
    (bundle.folder / MANIFEST).write_bytes(content.encode("latin-1"))
    assert "bundle.json: is damaged" in refusal(lambda: open_bundle(bundle.folder))


def test_a_manifest_cut_anywhere_is_damaged(bundle: Bundle) -> None:
    content = (bundle.folder / MANIFEST).read_bytes()
    for size in range(0, len(content) - 2, 97):
        (bundle.folder / MANIFEST).write_bytes(content[:size])
        assert "bundle.json: is damaged" in refusal(lambda: open_bundle(bundle.folder))


def test_folders_that_are_no_bundle(tmp_path: Path) -> None:
    assert "holds no bundle.json, so it is no bundle" in refusal(lambda: open_bundle(tmp_path))
    assert "no such bundle; make one with `dpo-fast export" in refusal(lambda: open_bundle(tmp_path / "none"))
