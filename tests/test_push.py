"""`dpo-fast push` as a user runs it: a process of its own, a Hub on 127.0.0.1, and a bundle's policy between them."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from fake_engines import ROWS, FakeEngines, make_fake_bundle, write_rows
from huggingface_hub import ModelCard
from loopback_hub import LoopbackHub

from dpo_fast.evaluate import EvaluateOptions, evaluate
from dpo_fast.types import LossSettings

REPO_ID = "someone/policy-dpo"


@pytest.fixture
def hub() -> Iterator[LoopbackHub]:
    with LoopbackHub() as hub:
        yield hub


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    return make_fake_bundle(tmp_path / "bundle")


@pytest.fixture
def dataset(tmp_path: Path) -> str:
    return write_rows(tmp_path / "pairs.jsonl", ROWS)


def push(hub: LoopbackHub, bundle: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run `dpo-fast push`, and see that no token is printed whatever comes of it."""
    home = bundle.parent / "home"
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
    done = subprocess.run(
        [sys.executable, "-m", "dpo_fast", "push", str(bundle), "--repo-id", REPO_ID, *arguments],
        env={**environment, **hub.environment(home), **variables},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    token = variables.get("HF_TOKEN", hub.token)
    assert not token or token not in done.stdout + done.stderr
    return done


def assert_refused(done: subprocess.CompletedProcess[str], *says: str) -> None:
    assert done.returncode == 2, done.stderr
    assert done.stdout == ""
    [line] = done.stderr.splitlines()
    assert line.startswith("dpo-fast: ")
    for text in says:
        assert text in line


def test_the_policy_s_files_arrive_as_they_are(hub: LoopbackHub, bundle: Path, dataset: str, tmp_path: Path) -> None:
    evaluate(bundle, dataset, tmp_path / "run", engine=FakeEngines())

    done = push(hub, bundle)

    assert done.returncode == 0, done.stderr
    repository = hub.repositories[REPO_ID]
    assert done.stdout == f"{hub.url}/{REPO_ID}/commit/{repository.branches['main']}\n"
    sent = {name: blob.content for name, blob in repository.files().items() if name != ".gitattributes"}
    policy = bundle / "policy"
    assert sent == {path.relative_to(policy).as_posix(): path.read_bytes() for path in policy.rglob("*")}
    assert sent["model.safetensors"] == b"weightspolicy"
    assert not repository.private
    # Neither the reference nor a graph has left.
    uploaded = {request.path.rpartition("/")[2] for request in hub.requests if request.step == "lfs_upload"}
    assert len(uploaded) == 1


def test_private_branch_message_and_json(hub: LoopbackHub, bundle: Path) -> None:
    done = push(hub, bundle, "--private", "--revision", "beta-0.1", "--commit-message", "One more", "--json")

    assert done.returncode == 0, done.stderr
    repository = hub.repositories[REPO_ID]
    assert repository.private
    assert repository.messages[-1] == "One more"
    assert json.loads(done.stdout) == {"url": f"{hub.url}/{REPO_ID}/commit/{repository.branches['beta-0.1']}"}


def test_the_numbers_of_the_run_that_is_named_go_on_the_card(
    hub: LoopbackHub, bundle: Path, dataset: str, tmp_path: Path
) -> None:
    first = evaluate(bundle, dataset, tmp_path / "first", engine=FakeEngines())
    options = EvaluateOptions(limit=2, loss=LossSettings(beta=0.7))
    latest = evaluate(bundle, dataset, tmp_path / "latest", options, engine=FakeEngines())
    assert latest["eval_loss"] != first["eval_loss"]

    assert push(hub, bundle, "--run", str(tmp_path / "first")).returncode == 0

    card = ModelCard(hub.repositories[REPO_ID].files()["README.md"].content.decode())
    losses = [result.metric_value for result in card.data.eval_results if result.metric_type == "eval_loss"]
    assert losses == [first["eval_loss"]]
    assert REPO_ID in card.text  # the code that loads the model
    assert str(tmp_path) not in str(card)


def test_a_run_of_other_weights_is_refused_before_anything_is_sent(
    hub: LoopbackHub, bundle: Path, dataset: str, tmp_path: Path
) -> None:
    other = make_fake_bundle(tmp_path / "other", weights=b"others")
    evaluate(other, dataset, tmp_path / "run", engine=FakeEngines())

    assert_refused(push(hub, bundle, "--run", str(tmp_path / "run")), "other weights than this bundle's")
    assert_refused(push(hub, bundle, "--run", str(tmp_path)), "holds no readable metrics.json")
    assert hub.requests == []
    assert not (bundle / "policy" / "README.md").exists()


@pytest.mark.parametrize("name", ["policy/model.safetensors", "policy/config.json", "reference.onnx"])
def test_an_altered_bundle_is_refused_before_anything_is_sent(hub: LoopbackHub, bundle: Path, name: str) -> None:
    content = (bundle / name).read_bytes()
    (bundle / name).write_bytes(content[:-1] + b"X")

    assert_refused(push(hub, bundle), f"{name}: is not the file that was exported")
    (bundle / name).unlink()
    assert_refused(push(hub, bundle), f"{name}: is missing")
    assert hub.requests == []


def test_a_refusal_of_the_hub_is_one_line_without_the_token(hub: LoopbackHub, bundle: Path) -> None:
    assert_refused(push(hub, bundle, HF_TOKEN="hf_wrongToken0123456789"), "hf auth login")
    assert_refused(push(hub, bundle, HF_TOKEN=hub.read_token), "write")
    assert_refused(push(hub, bundle, HF_TOKEN=""), "no Hugging Face token")
    hub.faults["commit"] = 403  # whose message says the token back
    assert_refused(push(hub, bundle), "the token may not write")


def test_a_private_push_does_not_go_to_a_public_repository(hub: LoopbackHub, bundle: Path) -> None:
    assert push(hub, bundle).returncode == 0

    assert_refused(push(hub, bundle, "--private"), "is public")
