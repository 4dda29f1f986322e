"""Exporting by Hub id, from a Hub on loopback: what arrives, by which commit, and what a missing one is told."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from loopback_hub import LoopbackHub

PUSH = """
import sys
from pathlib import Path
from dpo_fast.publish.hub import push
from dpo_fast.publish.model_folder import model_files
push(model_files(Path(sys.argv[1])), sys.argv[2])
"""


def run(hub: LoopbackHub, home: Path, *arguments: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, *arguments], env=hub.environment(home), capture_output=True, text=True, timeout=300
    )


@pytest.mark.slow
def test_a_hub_id_is_exported_at_its_commit(tiny_pair: tuple[Path, Path], tmp_path: Path) -> None:
    with LoopbackHub() as hub:
        for folder, name in zip(tiny_pair, ("policy", "reference"), strict=True):
            pushed = run(hub, tmp_path, "-c", PUSH, str(folder), f"someone/{name}")
            assert pushed.returncode == 0, pushed.stderr
        output = tmp_path / "bundle"
        roles = ("--policy", "someone/policy", "--reference", "someone/reference")
        exported = run(hub, tmp_path, "-m", "dpo_fast.export", *roles, "--output", str(output))
        assert exported.returncode == 0, exported.stderr

        models = json.loads((output / "bundle.json").read_text())["models"]
        for folder, name in zip(tiny_pair, ("policy", "reference"), strict=True):
            assert models[name]["source"] == f"someone/{name}"
            assert models[name]["revision"] == hub.repositories[f"someone/{name}"].branches["main"]
            weights = output / name / "model.safetensors"
            assert weights.read_bytes() == (folder / "model.safetensors").read_bytes()
            assert not weights.is_symlink()  # engines refuse links out of the bundle, which a snapshot is made of

        unknown = run(
            hub,
            tmp_path,
            "-m",
            "dpo_fast.export",
            "--policy",
            "someone/else",
            *roles[2:],
            "--output",
            str(output) + "2",
        )
        assert unknown.returncode == 2
        assert len(unknown.stderr.strip().splitlines()) == 2  # the step, then the error
        assert "someone/else" in unknown.stderr
        assert "Traceback" not in unknown.stderr
        assert not Path(str(output) + "2").exists()
