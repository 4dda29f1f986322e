"""The README's examples, run as they stand, each in a folder that has what its names say."""

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from loopback_hub import hub_of_this_process
from training.trained import ROWS, make_trainer, write_pairs

from dpo_fast.cli import run

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]

README = Path(__file__).parents[1] / "README.md"
SECTIONS = (
    "Comparing runs, and what to do next", "The report", "Samples and trackers", "During training", "Publishing"
)  # fmt: skip


def examples() -> list[str]:
    """The commands of those sections."""
    found = []
    for section in re.split(r"(?m)^### ", README.read_text(encoding="utf-8")):
        title, _, text = section.partition("\n")
        if title in SECTIONS:
            blocks = re.findall(r"(?s)```console\n(.*?)```", text)
            assert blocks, title
            found += [line[2:] for block in blocks for line in block.splitlines() if line.startswith("$ ")]
    return found


@pytest.fixture(scope="module")
def workspace(tiny_pair: tuple[Path, Path], tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle, pairs, two runs and one on training pairs, samples, a verification, and a finished training."""
    folder = tmp_path_factory.mktemp("readme")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("DPO_FAST_CACHE", str(folder / "cache"))
        shutil.copytree(tiny_bundle, "bundle")
        write_pairs(Path("pairs.jsonl"))
        write_pairs(Path("train.jsonl"), [{**row, "prompt": f"{row['prompt']} Please."} for row in ROWS])
        make_trainer(
            *tiny_pair, Path("my-dpo-model"), [], eval_dataset=None, save_strategy="steps", save_steps=5
        ).train()
        for data, name in (("pairs.jsonl", "run-200"), ("pairs.jsonl", "run"), ("train.jsonl", "train-run")):
            assert run(["evaluate", "bundle", "--dataset", data, "--output", name]) == 0
        assert run(["generate", "bundle", "--dataset", "pairs.jsonl", "--num-samples", "1", "--output", "samples"]) == 0
        settled = ["--max-accuracy-change", "0.25"]  # which 14 pairs can tell
        assert run(["verify", "bundle", "--dataset", "pairs.jsonl", "--output", "verification", *settled]) == 0
    return folder


@pytest.mark.parametrize("example", examples())
def test_it_runs(example: str, workspace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "work"
    shutil.copytree(workspace, folder)
    monkeypatch.chdir(folder)
    for name, value in {
        "WANDB_MODE": "offline", "WANDB_DIR": folder, "WANDB_ERROR_REPORTING": "false", "WANDB_DATA_DIR": folder,
        "WANDB_CACHE_DIR": folder, "WANDB_CONFIG_DIR": folder, "TENSORBOARD_LOGGING_DIR": folder / "tensorboard",
    }.items():  # fmt: skip
        monkeypatch.setenv(name, str(value))
    program, *arguments = shlex.split(example, comments=True)
    assert program == "dpo-fast"
    if "--output" in arguments:
        shutil.rmtree(arguments[arguments.index("--output") + 1], ignore_errors=True)
    if "--report-to" in arguments:  # trackers keep to what they saw first in a process
        subprocess.run([sys.executable, "-m", "dpo_fast", *arguments], check=True)
        return
    with hub_of_this_process(monkeypatch, tmp_path / "home") as hub:
        if "--revision" in arguments:  # a branch that is there
            assert run(["push", "bundle", "--repo-id", "user/my-dpo-model"]) == 0
        assert run(arguments) == 0
    pushed = arguments[0] == "push" and "--dry-run" not in arguments
    assert bool(hub.repositories) == pushed
