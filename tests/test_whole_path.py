"""A user's whole path, each step by its command, from a training by TRL to what others load from the Hub."""

import json
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard, snapshot_download
from loopback_hub import hub_of_this_process
from training.trained import STEPS, make_trainer, write_pairs
from transformers import AutoModelForCausalLM

from dpo_fast.cli import run

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread", "remembered_traces")]

EARLY, LATE = 2, STEPS  # steps of the checkpoints that are compared
REPO = "someone/my-dpo-model"


def do(*arguments: object) -> None:
    """A command that must succeed."""
    assert run([str(argument) for argument in arguments]) == 0, arguments


def read(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


def test_from_training_to_what_others_load(
    tiny_pair: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    pairs, trained = write_pairs(tmp_path / "pairs.jsonl"), tmp_path / "my-dpo-model"
    policy, reference = tiny_pair
    trainer = make_trainer(
        policy, reference, trained, [], eval_dataset=None, save_strategy="steps", save_steps=2, beta=0.1
    )
    trainer.train()

    do("export", "--policy", trained / f"checkpoint-{EARLY}", "--reference", reference, "--output", "bundle-2",
       "--max-length", 128)  # fmt: skip
    do("watch", "bundle-2", "--checkpoints", trained, "--dataset", pairs, "--output", "watched", "--no-self-check")
    do("refit", "bundle-2", "--policy", trained / f"checkpoint-{LATE}", "--output", "bundle")
    do("evaluate", "bundle-2", "--dataset", pairs, "--output", "run-2")
    do("evaluate", "bundle", "--dataset", pairs, "--output", "run", "--earlier", "run-2", "--generate", 2)
    do("generate", "bundle", "--dataset", pairs, "--num-samples", 2, "--output", "samples", "--max-new-tokens", 4)
    do("compare", "run-2", "run", "--output", "comparison")
    # With 14 pairs, of which none changes, the interval of the change of accuracy reaches to 0.22.
    do("verify", "bundle", "--dataset", pairs, "--output", "verification", "--max-accuracy-change", 0.25)
    do("report", "run", "--bundle", "bundle", "--verification", "verification")

    # The same numbers, wherever they are said.
    watched = {each["step"]: each["metrics"] for each in read(Path("watched/watch.json"))["steps"]}
    assert sorted(watched) == [EARLY, 4, LATE]
    found = {step: read(Path(name) / "metrics.json") for step, name in ((EARLY, "run-2"), (LATE, "run"))}
    for step, metrics in found.items():
        for key, value in watched[step].items():
            assert metrics[key] == pytest.approx(value, rel=1e-5, abs=1e-5), f"step {step}, {key}"  # float32
    margins = [found[step]["eval_rewards/margins"] for step in (EARLY, LATE)]
    [compared] = read(Path("comparison/compare.json"))["comparisons"]
    assert compared["eval_rewards/margins"]["difference"] == pytest.approx(margins[1] - margins[0], rel=1e-5)
    verification = read(Path("verification/verify.json"))
    assert verification["verdict"] == "pass"
    assert Path("run/report.html").is_file()
    assert "verification" in Path("run/report.html").read_text(encoding="utf-8").lower()

    with hub_of_this_process(monkeypatch, tmp_path / "home") as hub:
        do("push", "bundle", "--repo-id", REPO, "--run", "run", "--include-graph")
        downloaded = Path(snapshot_download(REPO, local_dir=tmp_path / "downloaded", endpoint=hub.url, token=hub.token))
        do("export", "--policy", REPO, "--reference", reference, "--output", "bundle-of-the-hub", "--max-length", 128)
    card = ModelCard.load(downloaded / "README.md")
    [result] = [each for each in card.data.eval_results if each.metric_type == "eval_rewards/accuracies"]
    assert result.metric_value == pytest.approx(found[LATE]["eval_rewards/accuracies"])
    assert "pass" in card.text
    ids = torch.tensor([[1, 2, 3, 4, 5]])
    with torch.inference_mode():
        logits = AutoModelForCausalLM.from_pretrained(downloaded)(input_ids=ids).logits
        assert torch.equal(logits, trainer.model.eval()(input_ids=ids).logits)
    do("verify", "bundle-of-the-hub", "--dataset", pairs, "--output", "verification-2", "--max-accuracy-change", 0.25)
    weights = [read(Path(name) / "bundle.json")["files"]["policy/model.safetensors"]["sha256"]
               for name in ("bundle", "bundle-of-the-hub")]  # fmt: skip
    assert weights[0] == weights[1]
    assert hub.token not in "".join(capsys.readouterr())
