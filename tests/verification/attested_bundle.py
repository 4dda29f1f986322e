"""A tiny bundle with a file of every kind that a bundle may hold, and a verification of it."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from fake_engines import make_fake_bundle

from dpo_fast.bundle import POLICY, hash_files, open_bundle, write_manifest


def make_bundle(folder: Path) -> Path:
    """Policy, reference and base, a converted graph, quantised weights, a plan, a model card and a hidden file."""
    make_fake_bundle(folder)
    for name in ("base/model.safetensors", "policy.fake.onnx", "engines/fake/policy.fake.safetensors",
                 "engines/fake/policy.json", "engines/fake/policy.body.plan", "policy/.gitattributes",
                 ".gitattributes"):  # fmt: skip
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(f"content of {name}".encode())
    manifest = open_bundle(folder).manifest
    policy = replace(
        manifest.models[POLICY],
        engine_graph="policy.fake.onnx",
        weights=["policy", "base", "engines/fake/policy.fake.safetensors"],
        plan="engines/fake/policy.json",
    )
    write_manifest(folder, replace(manifest, models={**manifest.models, POLICY: policy}, files=hash_files(folder)))
    (folder / POLICY / "README.md").write_text("# The model card\n")
    return folder


def make_verification(bundle: Path) -> dict[str, Any]:
    """What verify.json holds, made from the bundle's files as they are."""
    opened = open_bundle(bundle)
    return {
        "verdict": "pass",
        "reasons": ("a token's log-prob is 1.4 times the original's own float32 noise off",),
        "pairs_needed": None,
        "tolerance": {"floor": "float32", "max_multiple": 10.0, "max_accuracy_change": 0.01},
        "checks": ({"name": "token error", "value": 1.4, "interval": (1.2, 1e-7), "limit": 10.0, "outcome": "pass"},),
        "provenance": {
            "versions": {"python": "3.11", "onnxruntime": "1.31.1"},
            "hardware": {"processor": "Zen 4 – “a”", "cores": 2},
            "engine": "onnxruntime 1.31.1 CPUExecutionProvider",
            "precision": "fp32",
            "of_recipe": True,
            "dataset": {"name": "pairs.jsonl", "split": None, "fingerprint": "ab" * 32, "rows": 400},
            "models": {role: {"weights_and_graph_sha256": opened.role_hashes(role)} for role in opened.manifest.models},
        },
    }


def files_of(folder: Path) -> list[str]:
    """The paths of every file below a folder."""
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def with_another_byte(content: bytes, position: int) -> bytes:
    """Content of which one byte is another."""
    return content[:position] + bytes([content[position] ^ 1]) + content[position + 1 :]
