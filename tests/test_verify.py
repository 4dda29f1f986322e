"""The command: what it writes, what it prints, how it ends, and what it does not believe."""

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fake_engines import ROWS, write_rows
from tiny_models import copy_checkpoint, make_config, make_model, perturb, save_model, write_recipe

import dpo_fast.verify
from dpo_fast.batches import Batch, arrange, make_batches
from dpo_fast.bundle import ATTESTATION, POLICY, REFERENCE, SIGNATURE, Bundle
from dpo_fast.cli import run
from dpo_fast.engines.base import Engine
from dpo_fast.engines.endpoint import ServedTokens
from dpo_fast.engines.onnxruntime import OnnxRuntimeEngine
from dpo_fast.engines.torch import TorchEngine
from dpo_fast.errors import BundleError, CheckpointError, EngineOutputError, UsageError
from dpo_fast.export.exporter import ExportOptions, export
from dpo_fast.export.probes import make_probes
from dpo_fast.token_table import make_table
from dpo_fast.types import TokenScores
from dpo_fast.verification.attestation import check_attestation
from dpo_fast.verification.scoring import score_tokens
from dpo_fast.verify import PAGE, RESULT, VerifyOptions, verify

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]
WIDE = VerifyOptions(max_accuracy_change=0.6)  # which five pairs can settle


@pytest.fixture
def dataset(tmp_path: Path) -> str:
    return write_rows(tmp_path / "pairs.jsonl", ROWS)


@pytest.fixture
def bundle(tiny_bundle: Path, tmp_path: Path) -> Path:
    return copy_checkpoint(tiny_bundle, tmp_path / "bundle")


def command(bundle: Path, dataset: str, output: Path, *more: str) -> int:
    return run(["verify", str(bundle), "--dataset", dataset, "--output", str(output), *more])


class Wrapped:
    """An engine whose scores are changed on their way."""

    name, precision = "wrapped 1.0", "fp32"

    def __init__(self, engine: Engine, edit: Callable[[TokenScores], TokenScores]) -> None:
        self._engine, self._edit = engine, edit

    def score(self, batch: Batch) -> TokenScores:
        return self._edit(self._engine.score(batch))

    def with_gates(self, gates: Any) -> "Wrapped":
        return Wrapped(self._engine.with_gates(gates), self._edit)


def wrapped(edit: Callable[[TokenScores], TokenScores]) -> Callable[[Bundle, str], Engine]:
    return lambda bundle, role: Wrapped(OnnxRuntimeEngine(bundle.graph(role)), edit)


def test_the_original_is_scored_as_the_self_check_scores_it(tiny_bundle: Path) -> None:
    """PyTorch one sequence a row, whatever the batch, is what the exact graph says."""
    table = make_table(make_probes(500, positions=256))
    original = TorchEngine(tiny_bundle / POLICY)
    graph = OnnxRuntimeEngine(tiny_bundle / "policy.onnx")
    limits = {"token_budget": 256, "row_limit": 256}
    exact = score_tokens(table, graph, layout="shared", **limits)
    for budget in (1, 256):
        found = score_tokens(table, original, layout="plain", token_budget=budget, row_limit=256)
        for branch in (0, 1):
            np.testing.assert_array_equal(found[branch].offsets, exact[branch].offsets)
            for name in ("log_probs", "entropy", "log_sum_sq_prob"):
                # float32 rounding of two orders of summation
                np.testing.assert_allclose(
                    getattr(found[branch], name), getattr(exact[branch], name), rtol=0, atol=5e-5, err_msg=name
                )
    assert "torch" in original.name


def test_the_original_takes_one_sequence_a_row(tiny_bundle: Path) -> None:
    table = make_table(make_probes(500, positions=256))
    batch = next(make_batches(arrange(table, "shared", 256), 256))
    with pytest.raises(EngineOutputError, match="one sequence a row"):
        TorchEngine(tiny_bundle / POLICY).score(batch)
    with pytest.raises(CheckpointError, match="Transformers cannot load this checkpoint"):
        TorchEngine(tiny_bundle)


def test_too_few_pairs_cannot_tell_and_exit_with_3(
    bundle: Path, dataset: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command(bundle, dataset, tmp_path / "out") == 3
    said = capsys.readouterr()
    assert "verdict: cannot tell" in said.out
    assert "limit by choice" not in said.out
    assert "381 pairs like these would settle it" in said.out
    assert said.err.strip().splitlines()[-1].startswith("dpo-fast: verification: cannot tell")
    result = json.loads((tmp_path / "out" / RESULT).read_text(encoding="utf-8"))
    assert (result["verdict"], result["pairs"], result["pairs_needed"]) == ("cannot tell", 5, 381)
    assert check_attestation(bundle).verdict == "cannot tell"


def test_a_pass_exits_with_0_and_is_signed(
    bundle: Path, dataset: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    private = ec.generate_private_key(ec.SECP256R1())
    key, public = tmp_path / "key.pem", tmp_path / "key.pub"
    key.write_bytes(
        private.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
    )
    public.write_bytes(
        private.public_key().public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    )
    arguments = ["--max-accuracy-change", "0.6", "--sign", str(key), "--json", "--group-by", "kind"]
    assert command(bundle, dataset, tmp_path / "out", *arguments) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["verdict"] == "pass"
    assert result == json.loads((tmp_path / "out" / RESULT).read_text(encoding="utf-8"))
    assert {part["name"] for part in result["drift"]["by_subset"]} == {"sky", "sea"}
    assert (bundle / SIGNATURE).is_file()
    assert run(["check-signature", str(bundle), "--public-key", str(public)]) == 0
    said = capsys.readouterr().out
    assert "verified: pass, for onnxruntime" in said
    assert said.endswith("fp32, on pairs.jsonl (5 rows)\nlimit by choice: max-accuracy-change 0.6 (usually 0.01)\n")
    assert "Limit by choice: max-accuracy-change 0.6" in (tmp_path / "out" / PAGE).read_text(encoding="utf-8")
    card = bundle / ATTESTATION
    card.write_text(card.read_text(encoding="utf-8").replace('"pass"', '"pass "', 1), encoding="utf-8")
    assert run(["check-signature", str(bundle), "--public-key", str(public)]) == 2
    # The next verification writes another attestation, which the old signature is not about.
    assert command(bundle, dataset, tmp_path / "again") == 3
    assert run(["check-signature", str(bundle), "--public-key", str(public)]) == 2


@pytest.mark.parametrize("engine", ["onnxruntime", "openvino"])
def test_the_exact_graph_can_be_verified_too(
    bundle: Path, dataset: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], engine: str
) -> None:
    assert command(bundle, dataset, tmp_path / "out", "--engine", engine, "--max-accuracy-change", "0.6") == 0
    assert "limit by choice: max-accuracy-change 0.6 (usually 0.01)" in capsys.readouterr().out
    result = json.loads((tmp_path / "out" / RESULT).read_text(encoding="utf-8"))
    assert result["provenance"]["engine"].startswith(engine)
    assert result["provenance"]["precision"] == "fp32"
    assert not (bundle / ATTESTATION).exists()  # it is not what the bundle's engine runs


EDITS: dict[str, tuple[Callable[[TokenScores], TokenScores], str]] = {
    "NaN": (lambda scores: replace(scores, log_prob=scores.log_prob * np.float32(np.nan)), "returned log_prob nan"),
    "too few": (lambda scores: replace(scores, log_prob=scores.log_prob[:-1]), "of shape"),
    "impossible": (lambda scores: replace(scores, log_prob=-scores.log_prob), "returned log_prob"),
    "stale": (
        lambda scores: replace(scores, log_prob=np.full_like(scores.log_prob, -1.0)),
        "have the very scores of another one",
    ),
}


@pytest.mark.parametrize("edit", EDITS)
def test_it_fails_closed(tiny_bundle: Path, dataset: str, tmp_path: Path, edit: str) -> None:
    changed, message = EDITS[edit]
    result = verify(tiny_bundle, dataset, tmp_path / "out", WIDE, engine=wrapped(changed))
    assert result["verdict"] == "fail"
    assert message in " ".join(result["reasons"])
    # What the check at the engine's side finds is found before the original is asked.
    assert ("original" in result["timing"]["scoring_seconds"]) == (edit == "stale")
    page = (tmp_path / "out" / PAGE).read_text(encoding="utf-8")
    assert "fail" in page


def test_a_checkpoint_that_overflows_in_its_own_precision(dataset: str, tmp_path: Path) -> None:
    """It is not the engine, which computes in float32, that the message speaks of; and there is a way out."""
    model = make_model(make_config())
    model.model.layers[0].mlp.up_proj.weight.data *= 4e3  # the product with the gate goes beyond 65,504
    policy = save_model(model.half(), tmp_path / "policy")
    reference = save_model(perturb(model.float()).half(), tmp_path / "reference")
    bundle = export(str(policy), str(reference), tmp_path / "b", ExportOptions(recipe=str(write_recipe(tmp_path))))
    message = r"the original policy, computed in fp16: row \d+: .* nan .*; say --floor float32, .* --max-multiple"
    with pytest.raises(EngineOutputError, match=message):
        verify(bundle, dataset, tmp_path / "out", WIDE)
    assert not (tmp_path / "out").exists()
    result = verify(bundle, dataset, tmp_path / "out", replace(WIDE, floor="float32"))
    assert result["verdict"] == "pass", result["reasons"]
    assert result["noise_rounded"] is None


def test_a_bias_without_a_flip_fails(tiny_bundle: Path, dataset: str, tmp_path: Path) -> None:
    shifted = wrapped(lambda scores: replace(scores, log_prob=scores.log_prob - np.float32(1e-3)))
    result = verify(tiny_bundle, dataset, tmp_path / "out", WIDE, engine=shifted)
    assert result["verdict"] == "fail"
    assert not result["decisions"]["flips"]


def test_text_from_data_is_escaped_on_the_page(tiny_bundle: Path, tmp_path: Path) -> None:
    rows = [{**row, "kind": "<script>alert(1)</script>"} for row in ROWS]
    hostile = write_rows(tmp_path / "<b>pairs.jsonl", rows)
    verify(tiny_bundle, hostile, tmp_path / "out", replace(WIDE, group_by="kind"))
    page = (tmp_path / "out" / PAGE).read_text(encoding="utf-8")
    assert "<script>" not in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page
    assert "<b>pairs" not in page
    assert "://" not in page  # opens without a network


def test_without_a_reference(tiny_bundle: Path, dataset: str, tmp_path: Path) -> None:
    result = verify(tiny_bundle, dataset, tmp_path / "out", replace(WIDE, reference_free="average"))
    assert result["verdict"] == "pass"
    assert list(result["provenance"]["models"]) == [POLICY]
    assert result["drift"]["reference_log_probs"] is None


class Served:
    """A server's answers, from a folder's weights."""

    name = "tiny at 127.0.0.1:8000"

    def __init__(self, folder: Path) -> None:
        from transformers import AutoModelForCausalLM

        self._model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        self.scored = 0  # tokens

    def log_probs(self, sequences: Sequence[tuple[list[int], int]], *, progress: Any = None) -> list[ServedTokens]:
        said = []
        with torch.inference_mode():
            for ids, prompt in sequences:
                logits = self._model(torch.tensor([ids])).logits[0, prompt - 1 : -1]
                targets = torch.tensor(ids[prompt:])
                log_probs = logits.log_softmax(-1)[range(len(targets)), targets]
                said.append(ServedTokens(log_probs.numpy(), (logits.argmax(-1) == targets).float().numpy()))
                self.scored += len(targets)
                progress(len(targets))
        return said


@pytest.mark.parametrize(("role", "verdict"), [(POLICY, "pass"), (REFERENCE, "fail")])
def test_a_server_is_verified_by_its_log_probs(
    tiny_bundle: Path, dataset: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, role: str, verdict: str
) -> None:
    """One that serves the policy passes, one that serves the model that it was trained from does not."""
    server = Served(tiny_bundle / role)
    monkeypatch.setattr(dpo_fast.verify, "_endpoint", lambda options: server)
    options = replace(WIDE, endpoint="http://127.0.0.1:8000", model="tiny", precision="fp32")
    result = verify(tiny_bundle, dataset, tmp_path / "out", options)
    assert result["verdict"] == verdict, result["reasons"]
    assert result["provenance"]["engine"] == Served.name
    # Of the reference a server knows nothing: its scores, the original's own, dilute no error.
    drift = result["drift"]
    assert drift["reference_log_probs"] is None
    assert drift["tokens"]["tokens"] == server.scored


WRONG = {
    "--endpoint": ("http://127.0.0.1:1", "--endpoint URL and --model NAME go together"),
    "--api-key-variable": ("MY_KEY", "--api-key-variable MY_KEY is of a server: say --endpoint too"),
    "--endpoint http://127.0.0.1:1 --model tiny --endpoint-timeout": ("0", "timeout 0.0"),
    "--precision": ("fp12", "--precision 'fp12' is not known"),
    "--max-multiple": ("0", "max-multiple"),
    "--max-accuracy-change": ("1.5", "max-accuracy-change"),
    "--near-tie": ("nan", "near-tie"),
    "--signature": ("x.sig", "goes with --sign"),
    "--limit": ("0", "--limit 0"),
    "--max-length": ("257", "the policy has positions for 256 tokens"),
    "--endpoint http://127.0.0.1:1 --model tiny --bisect": ("", "a server with --endpoint says nothing"),
    "--engine openvino --sign": ("key.pem", "the bundle's own engine in its recipe's precision"),
    "--beta": ("1e308", "--beta 1e+308"),
    "--sign": ("no-such-key.pem", "no-such-key.pem: cannot be read"),
}


@pytest.mark.parametrize("option", WRONG)
def test_a_wrong_option_is_refused(
    tiny_bundle: Path, dataset: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], option: str
) -> None:
    value, message = WRONG[option]
    assert command(tiny_bundle, dataset, tmp_path / "out", *f"{option} {value}".split()) == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert message in said[-1]
    assert not (tmp_path / "out").exists()


def never(bundle: Bundle, role: str) -> Engine:
    raise AssertionError("nothing is scored before the bundle's files are known to be its own")


def test_a_file_that_was_added_is_refused_before_anything_is_scored(
    bundle: Path, dataset: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dpo_fast.verify.Original, "score", never)
    (bundle / POLICY / "modeling_llama.py").write_text("", encoding="utf-8")
    with pytest.raises(BundleError, match=r"modeling_llama.py: was added to the bundle"):
        verify(bundle, dataset, tmp_path / "out", WIDE, engine=never)
    assert not (tmp_path / "out").exists()


def test_an_output_within_the_bundle_is_refused(bundle: Path, dataset: str, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(bundle)
    for output in (bundle / "verification", tmp_path / "link" / POLICY / "out"):
        with pytest.raises(UsageError, match="lies within the bundle"):
            verify(bundle, dataset, output, WIDE, engine=never)
    verify(bundle, dataset, tmp_path / "out", WIDE)


def test_pairs_that_are_there_again_and_again_are_no_evidence(
    tiny_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """400 rows would do, if they were 400 pairs."""
    many = write_rows(tmp_path / "many.jsonl", ROWS * 80)
    assert command(tiny_bundle, many, tmp_path / "out", "--engine", "onnxruntime") == 3
    assert "5 pairs (395 rows repeated, left out) of many.jsonl" in capsys.readouterr().out
    result = json.loads((tmp_path / "out" / RESULT).read_text(encoding="utf-8"))
    assert (result["verdict"], result["pairs"], result["repeated"]) == ("cannot tell", 5, 395)
    assert result["pairs_needed"] == 381


def test_an_output_is_not_written_over(tiny_bundle: Path, dataset: str, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine", encoding="utf-8")
    assert command(tiny_bundle, dataset, tmp_path / "out", "--overwrite") == 2
    assert (tmp_path / "out" / "mine.txt").read_text(encoding="utf-8") == "mine"


def test_a_bundle_without_a_reference_says_so(tiny_bundle: Path, dataset: str, tmp_path: Path) -> None:
    bundle = copy_checkpoint(tiny_bundle, tmp_path / "alone")
    manifest = json.loads((bundle / "bundle.json").read_text(encoding="utf-8"))
    del manifest["models"][REFERENCE]
    (bundle / "bundle.json").write_text(json.dumps(manifest), encoding="utf-8")
    with pytest.raises(UsageError, match="has no reference; say --reference-free"):
        verify(bundle, dataset, tmp_path / "out")
