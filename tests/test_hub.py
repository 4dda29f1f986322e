"""Pushing to a Hub: what arrives is what was sent, and every refusal is one line that says what to do."""

import hashlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard, constants
from huggingface_hub.repocard_data import model_index_to_eval_results
from loopback_hub import CUT, LoopbackHub, hub_of_this_process

from dpo_fast.errors import HubError, InputError, UsageError
from dpo_fast.publish.card import write_card
from dpo_fast.publish.hub import push as push_files
from dpo_fast.publish.model_folder import model_files

# huggingface_hub's own uploads call httpx2 in a way that it deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")

REPO_ID = "someone/policy"
METRICS = {"eval_loss": 0.5, "counts": {"pairs": 3}, "provenance": {"dataset": {"name": "someone/pairs"}}}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[LoopbackHub]:
    with hub_of_this_process(monkeypatch, tmp_path) as hub:
        yield hub


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with the files of a model, as far as a push looks at them."""
    folder = tmp_path / "policy"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "tokenizer.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(b"weights")
    write_card(folder, METRICS)
    return folder


def push(folder: Path, repo_id: str, **arguments: Any) -> str:
    """Push a model folder as it is."""
    return push_files(model_files(folder), repo_id, **arguments)


def refusal(hub: LoopbackHub, folder: Path, repo_id: str = REPO_ID, **arguments: Any) -> str:
    """The message of a push that must fail: exit code 2, one short line, no token."""
    with pytest.raises(InputError) as caught:
        push(folder, repo_id, **arguments)
    message = str(caught.value)
    assert caught.value.exit_code == 2
    assert message.isprintable(), message
    assert len(message) < 600
    assert not re.search(r"hf_[A-Za-z0-9]", message), message
    if isinstance(caught.value, HubError):
        # Nor is there a cause that a traceback would print, token and all.
        assert caught.value.__cause__ is None
        assert caught.value.__suppress_context__ or caught.value.__context__ is None
    return message


def test_push_sends_every_file_as_it_is(hub: LoopbackHub, folder: Path) -> None:
    url = push(folder, REPO_ID)

    repository = hub.repositories[REPO_ID]
    sent = {name: blob.content for name, blob in repository.files().items() if name != ".gitattributes"}
    assert sent == {path.name: path.read_bytes() for path in folder.iterdir()}
    assert url == f"{hub.url}/{REPO_ID}/commit/{repository.branches['main']}"
    assert not repository.private
    assert repository.messages[-1] == "Upload with dpo_fast"
    assert hub.steps().count("lfs_upload") == 1


def test_private_branch_and_message_arrive(hub: LoopbackHub, folder: Path) -> None:
    push(folder, REPO_ID, private=True, revision="beta-0.1", commit_message="one more")

    repository = hub.repositories[REPO_ID]
    assert repository.private
    assert hub.requests[0].json["visibility"] == "private"
    assert repository.messages[-1] == "one more"
    assert "config.json" in repository.files("beta-0.1")
    assert "config.json" not in repository.files("main")


def test_public_says_nothing_of_visibility_so_that_the_owner_s_default_holds(hub: LoopbackHub, folder: Path) -> None:
    push(folder, REPO_ID)

    assert "visibility" not in hub.requests[0].json


def test_private_push_to_a_public_repository_is_refused_before_anything_is_sent(hub: LoopbackHub, folder: Path) -> None:
    push(folder, REPO_ID)
    hub.requests.clear()

    assert "is public" in refusal(hub, folder, private=True)
    assert hub.steps() == ["create", "info"]


def test_explicit_token_goes_before_the_environment_s(
    hub: LoopbackHub, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")

    push(folder, REPO_ID, token=hub.token)

    assert {request.authorization for request in hub.requests if request.step == "commit"} == {f"Bearer {hub.token}"}


def test_second_push_sends_only_what_changed(hub: LoopbackHub, folder: Path) -> None:
    push(folder, REPO_ID)
    hub.requests.clear()
    (folder / "config.json").write_text('{"changed": true}')

    push(folder, REPO_ID)

    assert hub.repositories[REPO_ID].files()["config.json"].content == b'{"changed": true}'
    assert "lfs_upload" not in hub.steps()
    [commit] = [request for request in hub.requests if request.step == "commit"]
    lines = [json.loads(line) for line in commit.body.splitlines()]
    assert [line["value"]["path"] for line in lines if line["key"] != "header"] == ["config.json"]


def test_second_push_leaves_no_weights_of_the_first(hub: LoopbackHub, folder: Path) -> None:
    """`from_pretrained` would load model.safetensors of the first push rather than the shards of the second."""
    (folder / "notes.txt").write_text("mine")
    push(folder, REPO_ID)
    (folder / "model.safetensors").unlink()
    (folder / "notes.txt").unlink()
    (folder / "model-00001-of-00001.safetensors").write_bytes(b"shard")
    index = {"weight_map": {"weight": "model-00001-of-00001.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))

    push(folder, REPO_ID)

    files = hub.repositories[REPO_ID].files()
    assert "model.safetensors" not in files
    assert "model-00001-of-00001.safetensors" in files
    assert "notes.txt" in files


def test_pushing_the_same_again_makes_no_commit(hub: LoopbackHub, folder: Path) -> None:
    assert push(folder, REPO_ID) == push(folder, REPO_ID)
    assert hub.steps().count("commit") == 1


@pytest.mark.parametrize(
    "repo_id",
    ["policy", "a/b/c", "", "/policy", "someone/", "a b/c", "someone/pol--icy", "someone/x.git", "é/x", "\x1b/x"],
)
def test_bad_repository_names_are_refused_before_any_request(hub: LoopbackHub, folder: Path, repo_id: str) -> None:
    with pytest.raises(UsageError, match=r"--repo-id .*'user/name'") as caught:
        push(folder, repo_id)

    assert str(caught.value).isprintable()
    assert hub.requests == []


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
def test_a_folder_that_is_not_a_whole_model_is_refused(hub: LoopbackHub, folder: Path, name: str) -> None:
    (folder / name).unlink()

    assert name.split(".")[-2 if name != "model.safetensors" else -1] in refusal(hub, folder)
    assert hub.requests == []


def test_missing_folder_and_missing_shard_are_refused(hub: LoopbackHub, folder: Path, tmp_path: Path) -> None:
    assert "not a folder" in refusal(hub, tmp_path / "nowhere")
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "model.safetensors", "b": "model-2.safetensors"}}))
    assert "'model-2.safetensors'" in refusal(hub, folder)
    for broken in ("[]", "{", '{"weight_map": [1]}', "\udcff"):
        index.write_bytes(broken.encode("utf-8", "surrogateescape"))
        assert "not an index of shards" in refusal(hub, folder)
    assert hub.requests == []


@pytest.mark.parametrize(
    "name",
    ["training_args.bin", "optimizer.pt", "rng_state.PTH", "deep/er/data.pkl", ".env", ".cache/token", "a/.git/x"],
)
def test_what_is_not_meant_to_go_is_refused_by_name(hub: LoopbackHub, folder: Path, name: str) -> None:
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text("secret")

    assert Path(name).parts[0] in refusal(hub, folder)
    assert hub.requests == []


def test_links_out_of_the_folder_are_refused_and_links_within_it_are_not(
    hub: LoopbackHub, folder: Path, tmp_path: Path
) -> None:
    (folder / "LICENSE").symlink_to(folder / "config.json")
    push(folder, REPO_ID)
    hub.requests.clear()

    (tmp_path / "secret").write_text("secret")
    for target in ("../secret", str(tmp_path / "secret"), "..", "/etc"):
        (folder / "link").symlink_to(target)
        assert "'link'" in refusal(hub, folder)
        (folder / "link").unlink()
    (folder / "loop").symlink_to("loop")
    push(folder, REPO_ID)
    assert "loop" not in hub.repositories[REPO_ID].files()


def test_offline_mode_and_a_missing_or_unusable_token_are_refused_before_any_request(
    hub: LoopbackHub, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "copy it again" in refusal(hub, folder, token="hf_two words")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "unset HF_HUB_OFFLINE" in refusal(hub, folder)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.delenv("HF_TOKEN")
    assert "hf auth login" in refusal(hub, folder)
    assert hub.requests == []


def test_wrong_token_and_read_token(hub: LoopbackHub, folder: Path) -> None:
    assert "did not accept the token" in refusal(hub, folder, token="hf_wrongWrongWrong")
    assert "may not write" in refusal(hub, folder, token=hub.read_token)
    assert hub.repositories == {}


STEPS = ("create", "info", "validate", "preupload", "lfs_batch", "lfs_upload", "lfs_verify", "commit", "tree")
FAULTS: dict[int | str, str] = {
    401: "hf auth login",
    403: "write access",
    404: "check --repo-id",
    409: "wait for the other change",
    429: "wait some minutes",
    500: "push again later",
    503: "push again later",
    CUT: "broke off",
}


@pytest.mark.parametrize(
    ("step", "fault", "says"),
    [
        (step, fault, says)
        for step in STEPS
        for fault, says in FAULTS.items()
        if (step, fault) != ("create", 409)  # says that the repository exists already, which is fine
    ],
)
def test_every_failure_at_every_step_says_what_to_do(
    hub: LoopbackHub, folder: Path, step: str, fault: int | str, says: str
) -> None:
    hub.faults[step] = fault

    assert says in refusal(hub, folder)

    # Nothing half done: once the fault is gone, the same push succeeds.
    hub.faults.clear()
    push(folder, REPO_ID)
    assert hub.repositories[REPO_ID].files()["model.safetensors"].content == b"weights"


def test_unreachable_hub(hub: LoopbackHub, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "http://user:password@127.0.0.1:1")

    message = refusal(hub, folder)
    assert message.startswith("cannot reach 127.0.0.1:1 (")
    assert "password" not in message


def test_front_matter_that_the_hub_refuses_is_named(hub: LoopbackHub, folder: Path) -> None:
    (folder / "README.md").write_text("---\n- a list\n---\n")

    assert "Invalid metadata in README.md" in refusal(hub, folder)


def test_a_server_that_is_no_hub(hub: LoopbackHub, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("loopback_hub._Handler._create", lambda self, request: self._answer(200, b"<html>"))

    assert "did not answer as a Hub does" in refusal(hub, folder)


def test_a_failing_xet_upload_is_a_hub_error_too(
    hub: LoopbackHub, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With hf_xet installed huggingface_hub uploads through it, whose errors come from a library in Rust."""
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", False)
    pytest.importorskip("hf_xet")
    hub.faults["xet_token"] = 403

    message = refusal(hub, folder)
    assert "403" in message
    assert "HF_HUB_DISABLE_XET=1" in message
    assert "xet_token" in hub.steps()


@pytest.fixture
def pipeline(hub: LoopbackHub, monkeypatch: pytest.MonkeyPatch) -> None:
    """With hf_xet huggingface_hub uploads by another path; here every file is small enough for the commit itself."""
    pytest.importorskip("hf_xet")
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", False)
    monkeypatch.setattr("loopback_hub.LFS_SUFFIXES", ())


@pytest.mark.usefixtures("pipeline")
def test_the_pipeline_of_hf_xet_sends_the_same(hub: LoopbackHub, folder: Path) -> None:
    url = push(folder, REPO_ID)

    repository = hub.repositories[REPO_ID]
    sent = {name: blob.content for name, blob in repository.files().items() if name != ".gitattributes"}
    assert sent == {path.name: path.read_bytes() for path in folder.iterdir()}
    assert url == f"{hub.url}/{REPO_ID}/commit/{repository.branches['main']}"
    assert push(folder, REPO_ID) == url
    assert push(folder, REPO_ID, create_pr=True) == url  # nothing new, so no pull request
    (folder / "config.json").write_text('{"changed": true}')
    assert push(folder, REPO_ID, create_pr=True) == f"{hub.url}/{REPO_ID}/discussions/1"


@pytest.mark.usefixtures("pipeline")
@pytest.mark.parametrize(
    ("step", "fault", "says"),
    [(step, fault, says) for step in ("preupload", "commit") for fault, says in FAULTS.items()],
)
def test_the_pipeline_of_hf_xet_fails_as_clearly(
    hub: LoopbackHub, folder: Path, step: str, fault: int | str, says: str
) -> None:
    hub.faults[step] = fault
    assert says in refusal(hub, folder)
    hub.faults.clear()
    push(folder, REPO_ID)
    assert hub.repositories[REPO_ID].files()["model.safetensors"].content == b"weights"


def test_a_token_of_any_form_is_kept_from_a_server_s_long_answer(
    hub: LoopbackHub, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The message is cut off in the middle of the token, which no pattern knows."""
    monkeypatch.setattr(LoopbackHub, "token", "T0k" + "e" * 200)
    hub.faults["commit"] = 400

    message = refusal(hub, folder, token=hub.token)
    assert "T0k" not in message
    assert "eee" not in message


PUSH = """
import sys
from pathlib import Path
from dpo_fast.publish.hub import push
from dpo_fast.publish.model_folder import model_files
for folder, repo_id in zip(sys.argv[1::2], sys.argv[2::2]):
    print(push(model_files(Path(folder)), repo_id, private=True))
"""
LOAD = """
import hashlib, json, sys, torch
from huggingface_hub import ModelCard
from transformers import AutoModelForCausalLM, AutoTokenizer
result = {}
for repo_id in sys.argv[1:]:
    model = AutoModelForCausalLM.from_pretrained(repo_id)
    tokenizer = AutoTokenizer.from_pretrained(repo_id)
    digests = {
        name: [str(tensor.dtype), list(tensor.shape), hashlib.sha256(tensor.view(torch.uint8).numpy()).hexdigest()]
        for name, tensor in model.state_dict().items()
    }
    result[repo_id] = {
        "tensors": digests, "ids": tokenizer("a good answer").input_ids, "card": ModelCard.load(repo_id).content
    }
print(json.dumps(result))
"""


def run_client(script: str, arguments: list[str], hub: LoopbackHub, home: Path) -> str:
    """Run a script in a fresh process whose Hub is the loopback one."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    completed = subprocess.run(
        [sys.executable, "-c", script, *arguments],
        env=inherited | hub.environment(home),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert completed.returncode == 0, completed.stderr
    assert hub.token not in completed.stdout + completed.stderr
    return completed.stdout


@pytest.mark.slow
def test_what_was_pushed_loads_in_a_fresh_process_bit_for_bit(tmp_path: Path) -> None:
    """A bfloat16 Llama in one file and another in two shards, private, through real processes and the environment."""
    import torch
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    words = Tokenizer(WordLevel({"<unk>": 0, "</s>": 1, "a": 2, "good": 3, "answer": 4}, unk_token="<unk>"))
    words.pre_tokenizer = Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", eos_token="</s>")
    arguments: list[str] = []
    expected: dict[str, Any] = {}
    for seed, (name, shard_size) in enumerate([("whole", "1GB"), ("sharded", "40KB")]):
        torch.manual_seed(seed)
        config = LlamaConfig(
            vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2
        )
        model = LlamaForCausalLM(config).to(torch.bfloat16)
        folder = tmp_path / name
        model.save_pretrained(folder, max_shard_size=shard_size)
        tokenizer.save_pretrained(folder)
        write_card(folder, METRICS, repo_id=f"someone/{name}")
        arguments += [str(folder), f"someone/{name}"]
        expected[f"someone/{name}"] = {
            key: [str(tensor.dtype), list(tensor.shape), hashlib.sha256(tensor.view(torch.uint8).numpy()).hexdigest()]
            for key, tensor in model.state_dict().items()
        }
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) == 2

    with LoopbackHub() as hub:
        urls = run_client(PUSH, arguments, hub, tmp_path / "home-push").split()
        assert [url.split("/commit/")[0] for url in urls] == [f"{hub.url}/someone/{n}" for n in ("whole", "sharded")]
        assert all(repository.private for repository in hub.repositories.values())
        loaded = json.loads(run_client(LOAD, list(expected), hub, tmp_path / "home-load"))

    for repo_id, tensors in expected.items():
        assert loaded[repo_id]["tensors"] == tensors
        assert loaded[repo_id]["ids"] == [2, 3, 4]
        card = ModelCard(loaded[repo_id]["card"])
        assert card.content == (tmp_path / repo_id.split("/")[1] / "README.md").read_text()
        name, results = model_index_to_eval_results(card.data.to_dict()["model-index"])
        assert name == repo_id.split("/")[1]
        assert [(result.metric_type, result.metric_value) for result in results] == [("eval_loss", 0.5)]
