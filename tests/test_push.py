"""`dpo-fast push` to a Hub on 127.0.0.1: what goes, what is refused, what breaks off and goes on."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from fake_engines import ROWS, FakeEngines, make_fake_bundle, write_rows
from huggingface_hub import ModelCard, parse_eval_result_entries
from loopback_hub import CUT, Blob, LoopbackHub, hub_of_this_process
from publish.test_graphs import make_bundle
from verification.attested_bundle import make_verification
from yaml import safe_load

from dpo_fast import cli
from dpo_fast.bundle import hash_files, open_bundle, write_manifest
from dpo_fast.evaluate import EvaluateOptions, evaluate
from dpo_fast.files import write_json
from dpo_fast.types import LossSettings
from dpo_fast.verification.attestation import write_attestation

# huggingface_hub's own uploads call httpx2 in a way that it deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")

REPO_ID = "someone/policy-dpo"
PLACEHOLDER = '# The name of this repository, or the path of this folder.\nmodel_id = "user/name"'


@dataclass(frozen=True)
class Done:
    code: int
    stdout: str
    stderr: str

    @property
    def json(self) -> Any:
        return json.loads(self.stdout)

    def assert_refused(self, *says: str, code: int = 2) -> None:
        """One line, perhaps behind warnings, and nothing on standard output."""
        assert self.code == code, self.stderr
        assert self.stdout == ""
        *warnings, line = self.stderr.splitlines()
        assert all(warning.startswith("warning: ") for warning in warnings)
        assert line.startswith("dpo-fast: ")
        for text in says:
            assert text in line


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[LoopbackHub]:
    with hub_of_this_process(monkeypatch, tmp_path) as hub:
        yield hub


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    return make_fake_bundle(tmp_path / "bundle")


@pytest.fixture
def dataset(tmp_path: Path) -> str:
    return write_rows(tmp_path / "pairs.jsonl", ROWS)


@pytest.fixture
def push(hub: LoopbackHub, bundle: Path, capfd: pytest.CaptureFixture[str]) -> Callable[..., Done]:
    """Run `dpo-fast push`, and see that no token is printed whatever comes of it."""

    def run(*arguments: str) -> Done:
        token = os.environ["HF_TOKEN"]
        code = cli.run(["push", str(bundle), "--repo-id", REPO_ID, *arguments])
        done = Done(code, *capfd.readouterr())
        assert not token or token not in done.stdout + done.stderr
        assert "Traceback" not in done.stderr
        return done

    return run


def verification_of(bundle: Path, **changes: Any) -> dict[str, Any]:
    check = {"name": "token error", "value": 1.4, "interval": [1.2, 1.7], "limit": 10.0, "outcome": "pass"}
    return {**make_verification(bundle), "checks": [{**check, "reason": "as noisy as float32"}], **changes}


def attest(bundle: Path, **changes: Any) -> None:
    write_attestation(bundle, verification_of(bundle, **changes))


def test_the_policy_s_files_arrive_as_they_are(hub: LoopbackHub, bundle: Path, dataset: str, tmp_path: Path) -> None:
    """In a process of its own, which has the Hub's address and the token from its environment."""
    evaluate(bundle, dataset, tmp_path / "run", engine=FakeEngines())
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}

    done = subprocess.run(
        [sys.executable, "-m", "dpo_fast", "push", str(bundle), "--repo-id", REPO_ID],
        env={**environment, **hub.environment(tmp_path / "home")},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )

    assert done.returncode == 0, done.stderr
    assert hub.token not in done.stdout + done.stderr
    repository = hub.repositories[REPO_ID]
    assert done.stdout == f"{hub.url}/{REPO_ID}/commit/{repository.branches['main']}\n"
    sent = {name: blob.content for name, blob in repository.files().items() if name != ".gitattributes"}
    policy = bundle / "policy"
    card = sent.pop("README.md").decode()
    assert sent == {path.name: path.read_bytes() for path in policy.iterdir() if path.name != "README.md"}
    # The card is the bundle's own, but for the name that it is published under.
    own = (policy / "README.md").read_text()
    named = own.replace(PLACEHOLDER, f'model_id = "{REPO_ID}"').replace("- name: policy\n", "- name: policy-dpo\n")
    assert card == named != own
    assert sent["model.safetensors"] == b"weightspolicy"
    assert not repository.private
    # Neither the reference nor a graph has left.
    uploaded = {request.path.rpartition("/")[2] for request in hub.requests if request.step == "lfs_upload"}
    assert len(uploaded) == 1


def test_private_branch_message_and_json(hub: LoopbackHub, push: Callable[..., Done]) -> None:
    done = push("--private", "--revision", "beta-0.1", "--commit-message", "One more", "--json")

    assert done.code == 0, done.stderr
    repository = hub.repositories[REPO_ID]
    assert repository.private
    assert repository.messages[-1] == "One more"
    files = repository.files("beta-0.1")
    assert done.json == {
        "url": f"{hub.url}/{REPO_ID}/commit/{repository.branches['beta-0.1']}",
        "files": {name: len(files[name].content) for name in sorted(files) if name != ".gitattributes"},
        "warnings": [line.removeprefix("warning: ") for line in done.stderr.splitlines()],
        "refusals": [],
    }


def test_a_pull_request_leaves_main_alone(hub: LoopbackHub, push: Callable[..., Done]) -> None:
    done = push("--create-pr")

    assert done.stdout == f"{hub.url}/{REPO_ID}/discussions/1\n"
    repository = hub.repositories[REPO_ID]
    assert "model.safetensors" in repository.files("refs/pr/1")
    assert "model.safetensors" not in repository.files("main")
    push("--create-pr", "--revision", "other").assert_refused("--create-pr goes to main", "--revision other")


def test_a_dry_run_lists_what_would_go_and_asks_nobody(
    hub: LoopbackHub, bundle: Path, push: Callable[..., Done]
) -> None:
    attest(bundle)
    dry = push("--dry-run", "--json").json
    listed = push("--dry-run")
    assert hub.requests == []

    assert dry["url"] is None
    assert dry["refusals"] == []
    assert listed.code == 0
    lines = [line.split() for line in listed.stdout.splitlines()]
    assert {name: int(size.replace(",", "")) for size, name in lines[:-1]} == dry["files"]
    assert int(lines[-1][0].replace(",", "")) == sum(dry["files"].values())
    # And that is what goes.
    assert push("--json").json["files"] == dry["files"]
    sent = hub.repositories[REPO_ID].files()
    assert dry["files"] == {name: len(blob.content) for name, blob in sent.items() if name != ".gitattributes"}


def test_a_dry_run_names_everything_that_would_be_refused(
    hub: LoopbackHub, bundle: Path, push: Callable[..., Done], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HF_TOKEN", "")
    (bundle / "policy" / "optimizer.pt").write_text("state")
    (bundle / "policy" / ".env").write_text("secret")
    (bundle / "policy" / "config.json").write_text("{}")

    done = push("--dry-run", "--create-pr", "--revision", "x", "--run", str(tmp_path))
    assert done.code == 2
    refusals = [line for line in done.stderr.splitlines() if line.startswith("would be refused: ")]
    for part in ("no Hugging Face token", "--create-pr", "optimizer.pt", ".env", "config.json: is not", "--run"):
        assert sum(part in refusal for refusal in refusals) == 1, part
    assert len(refusals) == 6
    assert hub.requests == []


def test_the_numbers_of_the_run_that_is_named_go_on_the_card(
    hub: LoopbackHub, bundle: Path, dataset: str, tmp_path: Path, push: Callable[..., Done]
) -> None:
    first = evaluate(bundle, dataset, tmp_path / "first", engine=FakeEngines())
    options = EvaluateOptions(limit=2, loss=LossSettings(beta=0.7))
    latest = evaluate(bundle, dataset, tmp_path / "latest", options, engine=FakeEngines())
    assert latest["eval_loss"] != first["eval_loss"]
    own = (bundle / "policy" / "README.md").read_text()

    assert push("--run", str(tmp_path / "first")).code == 0

    card = ModelCard(hub.repositories[REPO_ID].files()["README.md"].content.decode())
    losses = [result.metric_value for result in card.data.eval_results if result.metric_type == "eval_loss"]
    assert losses == [first["eval_loss"]]
    assert REPO_ID in card.text  # the code that loads the model
    assert str(tmp_path) not in str(card)
    assert (bundle / "policy" / "README.md").read_text() == own  # the bundle's own stays as it is


def test_the_plots_of_the_run_go_along(
    hub: LoopbackHub, bundle: Path, dataset: str, tmp_path: Path, push: Callable[..., Done]
) -> None:
    pytest.importorskip("matplotlib")
    run = tmp_path / "run"
    evaluate(bundle, dataset, run, EvaluateOptions(group_by="kind"), engine=FakeEngines())

    assert push("--run", str(run)).code == 0
    files = hub.repositories[REPO_ID].files()
    for name in ("plots/margin_histogram.png", "plots/accuracy_by_subset.png"):
        assert files[name].content.startswith(b"\x89PNG\r\n")
        assert f"]({name})" in files["README.md"].content.decode()

    # Those of another run, or of other weights, would stay behind.
    assert push().code == 0
    assert not any(name.startswith("plots/") for name in hub.repositories[REPO_ID].files())
    assert "plots/" not in hub.repositories[REPO_ID].files()["README.md"].content.decode()


def test_without_matplotlib_the_card_goes_without_plots(
    bundle: Path, dataset: str, tmp_path: Path, push: Callable[..., Done], monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluate(bundle, dataset, tmp_path / "run", engine=FakeEngines())
    for name in [name for name in sys.modules if name.partition(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)  # as if it were not installed

    done = push("--run", str(tmp_path / "run"), "--dry-run", "--json")
    assert done.code == 0
    assert [warning for warning in done.json["warnings"] if "without plots" in warning and "pip install" in warning]
    assert not any(name.endswith(".png") for name in done.json["files"])


def test_a_benchmark_on_the_hub_gets_its_result(
    hub: LoopbackHub, bundle: Path, dataset: str, tmp_path: Path, push: Callable[..., Done]
) -> None:
    run = tmp_path / "run"
    evaluate(bundle, dataset, run, engine=FakeEngines())
    metrics = json.loads((run / "metrics.json").read_text())
    name = ".eval_results/dpo_fast.yaml"
    assert push("--run", str(run)).code == 0
    assert name not in hub.repositories[REPO_ID].files()  # a local file has no leaderboard

    metrics["provenance"]["dataset"]["name"] = "someone/preferences"
    write_json(run / "metrics.json", metrics)
    assert push("--run", str(run), "--eval-task", "pairs").code == 0
    [entry] = parse_eval_result_entries(safe_load(hub.repositories[REPO_ID].files()[name].content))
    assert (entry.dataset_id, entry.task_id) == ("someone/preferences", "pairs")
    assert entry.value == metrics["eval_rewards/accuracies"]

    assert push().code == 0
    assert name not in hub.repositories[REPO_ID].files()


def test_a_run_of_other_weights_is_refused_before_anything_is_sent(
    hub: LoopbackHub, dataset: str, tmp_path: Path, bundle: Path, push: Callable[..., Done]
) -> None:
    other = make_fake_bundle(tmp_path / "other", weights=b"others")
    evaluate(other, dataset, tmp_path / "run", engine=FakeEngines())

    push("--run", str(tmp_path / "run")).assert_refused("other weights than this bundle's")
    push("--run", str(tmp_path)).assert_refused("holds no readable metrics.json")
    assert hub.requests == []
    assert not (bundle / "policy" / "README.md").exists()


def test_a_run_against_another_reference_or_of_a_share_of_the_rows_is_refused(
    hub: LoopbackHub, dataset: str, tmp_path: Path, bundle: Path, push: Callable[..., Done]
) -> None:
    """Its rewards are not those of this bundle; its numbers are not those of the set that the card would name."""
    other = make_fake_bundle(tmp_path / "other")
    (other / "reference" / "model.safetensors").write_bytes(b"another reference")
    rewrite_manifest(other)
    evaluate(other, dataset, tmp_path / "run", engine=FakeEngines())
    options = EvaluateOptions(part_size=2, shard=(1, 2))
    evaluate(bundle, dataset, tmp_path / "shard", options, engine=FakeEngines())

    push("--run", str(tmp_path / "run")).assert_refused("another reference than this bundle's")
    push("--run", str(tmp_path / "shard")).assert_refused("a share of the rows", "dpo-fast merge")
    assert hub.requests == []
    assert not (bundle / "policy" / "README.md").exists()  # nor does it become the card's numbers by itself


@pytest.mark.parametrize("name", ["policy/model.safetensors", "policy/config.json", "reference.onnx"])
@pytest.mark.parametrize("is_attested", [True, False])
def test_an_altered_bundle_is_refused_before_anything_is_sent(
    hub: LoopbackHub, bundle: Path, push: Callable[..., Done], name: str, is_attested: bool
) -> None:
    if is_attested:
        attest(bundle)
    content = (bundle / name).read_bytes()
    (bundle / name).write_bytes(content[:-1] + b"X")

    push().assert_refused(f"{name}: is not the file that was exported")
    (bundle / name).unlink()
    push().assert_refused(f"{name}: is missing")
    assert hub.requests == []


def test_what_was_verified_is_on_the_card_and_what_was_not_is_a_warning(
    hub: LoopbackHub, bundle: Path, push: Callable[..., Done]
) -> None:
    done = push()
    assert done.code == 0
    assert "its engine has not been verified; `dpo-fast verify" in done.stderr
    assert "## Verification" not in hub.repositories[REPO_ID].files()["README.md"].content.decode()

    attest(bundle)
    done = push()
    assert done.code == 0
    assert "verif" not in done.stderr
    card = hub.repositories[REPO_ID].files()["README.md"].content.decode()
    assert "**Verdict: pass**, for onnxruntime 1.31.1 CPUExecutionProvider, fp32, on pairs.jsonl (400 rows)." in card
    assert "| token error | 1.4 | 1.2 … 1.7 | 10 | pass |" in card


def test_a_verification_of_other_hashes_is_refused(
    hub: LoopbackHub, bundle: Path, tmp_path: Path, push: Callable[..., Done]
) -> None:
    other = make_fake_bundle(tmp_path / "other", weights=b"others")
    attest(other)
    (bundle / "attestation.json").write_bytes((other / "attestation.json").read_bytes())
    push().assert_refused("is not the one that attestation.json is about")

    (bundle / "attestation.json").unlink()
    write_json(tmp_path / "other" / "verify.json", verification_of(other))
    push("--verification", str(tmp_path / "other")).assert_refused("is of other weights or graphs")
    push("--verification", str(tmp_path)).assert_refused("holds no readable verify.json")
    assert hub.requests == []


@pytest.mark.parametrize("verdict", ["fail", "cannot tell"])
@pytest.mark.parametrize("where", ["attestation", "folder"])
def test_a_verdict_that_is_not_pass_is_refused_unless_the_user_insists(
    hub: LoopbackHub, bundle: Path, tmp_path: Path, push: Callable[..., Done], verdict: str, where: str
) -> None:
    arguments = []
    if where == "attestation":
        attest(bundle, verdict=verdict)
    else:
        write_json(tmp_path / "verify.json", verification_of(bundle, verdict=verdict))
        arguments = ["--verification", str(tmp_path)]

    push(*arguments).assert_refused(f"is '{verdict}'", "--allow-failed-verification", code=3)
    assert push(*arguments, "--dry-run").code == 3
    assert hub.requests == []
    done = push(*arguments, "--allow-failed-verification")
    assert done.code == 0
    assert f"warning: {bundle}: the verdict of its verification is '{verdict}'" in done.stderr
    assert f"**Verdict: {verdict}**" in hub.repositories[REPO_ID].files()["README.md"].content.decode()


def test_limits_that_somebody_chose_are_told(hub: LoopbackHub, bundle: Path, push: Callable[..., Done]) -> None:
    attest(bundle, tolerance={"floor": "float32", "max_multiple": 100.0, "max_accuracy_change": 0.01})
    chosen = "max-multiple 100.0 (usually 10.0)"
    done = push()
    assert done.code == 0
    assert f"with limits by choice, and the card says so: {chosen}" in done.stderr
    card = hub.repositories[REPO_ID].files()["README.md"].content.decode()
    assert card.count("usually") == 1
    assert "100.0 (usually 10.0)" in card.replace("\\", "")


def test_a_graph_goes_on_request_and_does_not_outlive_its_weights(hub: LoopbackHub, tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path / "with_graphs").folder
    graphs = {"policy.onnx", "policy.fake.onnx", "base/model.safetensors", "engines/fake/policy.safetensors",
              "engines/fake/policy.json", "engines/fake/policy.body.plan"}  # fmt: skip

    assert cli.run(["push", str(bundle), "--repo-id", REPO_ID, "--include-graph", "--include-engines"]) == 0
    first = hub.repositories[REPO_ID].files()
    assert graphs <= set(first)
    assert ModelCard(first["README.md"].content.decode()).data.tags == ["dpo", "dpo_fast", "onnx"]

    assert cli.run(["push", str(bundle), "--repo-id", REPO_ID]) == 0
    second = hub.repositories[REPO_ID].files()
    assert set(first) - set(second) == graphs
    assert "How to run the graph" not in second["README.md"].content.decode()


def test_what_others_keep_in_the_repository_stays(hub: LoopbackHub, push: Callable[..., Done]) -> None:
    """Files whose names resemble ours, in folders of their own or without a graph of ours that would need them."""
    assert push().code == 0
    repository = hub.repositories[REPO_ID]
    theirs = {
        name: Blob(b"theirs", True)
        for name in (
            "models/old/model.safetensors", "model_fp16/weights.safetensors", "model-notes/x.safetensors",
            "model.fp16.safetensors", "adapter_models/a.safetensors", "policy.old/graph.onnx",
            "engines/mine/sub/policy.bin", "base/model.safetensors", "reference/model.safetensors",
        )
    }  # fmt: skip
    ours = {"model-00001-of-00002.safetensors": Blob(b"older", True), "plots/margin_histogram.png": Blob(b"old", True)}
    repository.commit("main", {**repository.files(), **theirs, **ours}, "theirs")

    assert push().code == 0
    assert {name: blob for name, blob in repository.files().items() if blob.content == b"theirs"} == theirs
    assert not ours.keys() & repository.files().keys()


def test_a_licence_that_the_card_lacks_is_a_warning(hub: LoopbackHub, bundle: Path, push: Callable[..., Done]) -> None:
    assert "no licence is named" in push("--dry-run").stderr
    (bundle / "policy" / "README.md").write_text("---\nlicense: apache-2.0\n---\n# Mine\n")
    assert "no licence is named" not in push().stderr
    card = ModelCard(hub.repositories[REPO_ID].files()["README.md"].content.decode())
    assert card.data.license == "apache-2.0"
    assert "# Mine" in card.text


def test_a_refusal_of_the_hub_is_one_line_without_the_token(
    hub: LoopbackHub, push: Callable[..., Done], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_wrongToken0123456789")
    push().assert_refused("hf auth login")
    monkeypatch.setenv("HF_TOKEN", hub.read_token)
    push().assert_refused("write")
    monkeypatch.setenv("HF_TOKEN", "")
    push().assert_refused("no Hugging Face token")
    monkeypatch.setenv("HF_TOKEN", hub.token)
    hub.faults["commit"] = 403  # whose message says the token back
    push().assert_refused("the token may not write")


def test_a_private_push_does_not_go_to_a_public_repository(hub: LoopbackHub, push: Callable[..., Done]) -> None:
    assert push().code == 0

    push("--private").assert_refused("is public")


FAILURES: dict[str, tuple[str, int | str, str]] = {
    "a server that fails": ("commit", 500, "push again later, what has arrived is not sent twice"),
    "a connection that is cut as the weights go": ("lfs_upload", CUT, "broke off"),
    "a connection that is cut at the commit": ("commit", CUT, "broke off"),
    "a token that expires in between": ("commit", 401, "hf auth login"),
    "another push at the same moment": ("commit", 409, "wait for the other change, then push again"),
}


@pytest.mark.parametrize("failure", FAILURES)
def test_a_push_that_fails_half_way_loses_nothing_and_succeeds_later(
    hub: LoopbackHub, bundle: Path, push: Callable[..., Done], failure: str
) -> None:
    step, fault, says = FAILURES[failure]
    assert push().code == 0
    before = hub.repositories[REPO_ID].files()
    renew_weights(bundle)
    hub.faults[step] = fault

    push("--commit-message", "again").assert_refused(says)
    assert hub.repositories[REPO_ID].files() == before  # what was there is there

    hub.faults.clear()
    assert push("--commit-message", "again").code == 0
    assert hub.repositories[REPO_ID].messages[-1] == "again"
    assert hub.repositories[REPO_ID].files()["model.safetensors"].content == b"newer weights"


def test_what_has_arrived_is_not_sent_twice(hub: LoopbackHub, bundle: Path, push: Callable[..., Done]) -> None:
    """Three shards, and a server that fails at the third."""
    policy = bundle / "policy"
    (policy / "model.safetensors").unlink()
    shards = {f"model-{number}.safetensors": f"shard {number}".encode() for number in range(3)}
    for name, content in shards.items():
        (policy / name).write_bytes(content)
    (policy / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {name: name for name in shards}}))
    rewrite_manifest(bundle)
    hub.fault_after["lfs_upload"], hub.faults["lfs_upload"] = 2, 400

    push().assert_refused("refused the push")
    assert len(hub.lfs_objects) == 2

    hub.faults.clear()
    hub.requests.clear()
    assert push().code == 0
    assert hub.steps().count("lfs_upload") == 1
    sent = hub.repositories[REPO_ID].files()
    assert {name: sent[name].content for name in shards} == shards


def test_a_commit_of_somebody_else_in_between_is_not_written_over(
    hub: LoopbackHub, bundle: Path, push: Callable[..., Done]
) -> None:
    assert push().code == 0
    repository = hub.repositories[REPO_ID]
    renew_weights(bundle)
    theirs = {**repository.files(), "model.safetensors": Blob(b"theirs", True), "notes.txt": Blob(b"theirs", False)}
    hub.before["commit"] = lambda: repository.commit("main", theirs, "theirs") and None

    push().assert_refused("changed at the same time", "push again")
    assert repository.files() == theirs

    assert push().code == 0
    assert repository.files()["model.safetensors"].content == b"newer weights"
    assert repository.files()["notes.txt"].content == b"theirs"


def renew_weights(bundle: Path) -> None:
    """Other weights in a bundle, as a refit would leave them."""
    (bundle / "policy" / "model.safetensors").write_bytes(b"newer weights")
    rewrite_manifest(bundle)


def rewrite_manifest(bundle: Path) -> None:
    """The hashes of a bundle whose files were changed."""
    write_manifest(bundle, replace(open_bundle(bundle).manifest, files=hash_files(bundle)))
