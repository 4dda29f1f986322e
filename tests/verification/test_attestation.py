"""An attestation is about exactly the files that were verified, and says which file is another."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from dpo_fast.bundle import ATTESTATION, MANIFEST, SIGNATURE, open_bundle
from dpo_fast.errors import BundleError, UsageError
from dpo_fast.files import write_json
from dpo_fast.verification.attestation import check_attestation, is_about, write_attestation
from dpo_fast.verification.verdict import default_tolerance, verify_scores

from .attested_bundle import files_of, make_bundle, make_verification, with_another_byte
from .build import draw_scorings

CARD = "policy/README.md"


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    folder = make_bundle(tmp_path / "bundle")
    write_attestation(folder, make_verification(folder))
    return folder


def refusal(action: Callable[[], object]) -> str:
    """The message of the BundleError that an action raises: one line."""
    with pytest.raises(BundleError) as caught:
        action()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_what_is_written_binds_every_file(bundle: Path, tmp_path: Path) -> None:
    verification = make_verification(bundle)
    written = json.loads((bundle / ATTESTATION).read_text())
    assert written["files"] == {
        kind: {name: digest(bundle / name) for name in names}
        for kind, names in {
            "weights": ["base/model.safetensors", "policy/model.safetensors", "reference/model.safetensors"],
            "graphs": ["policy.fake.onnx", "policy.onnx", "reference.onnx"],
            "engine": ["engines/fake/policy.body.plan", "engines/fake/policy.fake.safetensors",
                       "engines/fake/policy.json"],
            "other": [".gitattributes", "policy/.gitattributes", "policy/config.json", "policy/tokenizer.json",
                      "policy/tokenizer_config.json", "reference/config.json"],
        }.items()
    }  # fmt: skip
    assert written["manifest_sha256"] == digest(bundle / MANIFEST)
    write_json(tmp_path / "verify.json", verification)
    assert written["verification_sha256"] == digest(tmp_path / "verify.json")
    for name in ("verdict", "tolerance"):
        assert written[name] == verification[name]
    for name in ("dataset", "engine", "precision", "versions", "hardware"):
        assert written[name] == verification["provenance"][name]
    assert written["checks"][0]["interval"] == [1.2, 1e-7]
    assert written["roles"] == ["policy", "reference"]
    assert written["time"].endswith("+00:00")


def test_it_is_read_as_it_was_written(tmp_path: Path) -> None:
    folder = make_bundle(tmp_path / "bundle")
    assert not is_about(folder)
    assert "has no attestation.json; make one with `dpo-fast verify" in refusal(lambda: check_attestation(folder))
    listed = open_bundle(folder).manifest
    written = write_attestation(folder, make_verification(folder))
    assert check_attestation(folder) == written
    assert is_about(folder)
    assert open_bundle(folder).manifest == listed, "bundle.json stays as it was exported"


def test_a_real_verdict_is_attested(tmp_path: Path) -> None:
    folder = make_bundle(tmp_path / "bundle")
    verification = verify_scores(draw_scorings(0, 40, rounded_noise=0.02), default_tolerance("fp32"))
    write_attestation(folder, {**make_verification(folder), **verification.as_dict()})
    attestation = check_attestation(folder)
    assert attestation.verdict == verification.verdict
    assert [check["name"] for check in attestation.checks] == [check.name for check in verification.checks]
    assert [check["value"] for check in attestation.checks] == [check.value for check in verification.checks]


def test_one_byte_of_any_file_is_found(bundle: Path) -> None:
    """Of every file but the model card, which each evaluation writes again."""
    names = files_of(bundle)
    assert len(names) == 18, "15 listed files, the manifest, the attestation and the card"
    for name in set(names) - {CARD}:
        path = bundle / name
        content = path.read_bytes()
        for position in {0, len(content) // 2, len(content) - 1}:
            path.write_bytes(with_another_byte(content, position))
            assert refusal(lambda: check_attestation(bundle)).startswith(f"{path}: ")
            with pytest.raises(BundleError):
                is_about(bundle)
        path.write_bytes(content)
    (bundle / CARD).write_text("# Written again after an evaluation\n")
    check_attestation(bundle)


def test_bytes_all_over_the_attestation_count(bundle: Path) -> None:
    path = bundle / ATTESTATION
    content = path.read_bytes()
    for position in range(0, len(content), 7):
        path.write_bytes(with_another_byte(content, position))
        assert refusal(lambda: check_attestation(bundle)).startswith(f"{path}: ")
    for altered in (b"", content[:-1], content + b"\n", b"[]", b"null", b"[" * 100_000, content * 2):
        path.write_bytes(altered)
        assert refusal(lambda: check_attestation(bundle)).startswith(f"{path}: ")
    path.write_bytes(content)
    check_attestation(bundle)


def reseal(path: Path, **changes: object) -> None:
    """Change an attestation, with a hash that fits."""
    value = json.loads(path.read_text()) | changes
    del value["sha256"]
    seal = hashlib.sha256((json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()).hexdigest()
    path.write_text(json.dumps(value | {"sha256": seal}, indent=2, ensure_ascii=False) + "\n")


def test_another_verdict_format_or_list_of_files_is_refused(bundle: Path) -> None:
    path = bundle / ATTESTATION
    text = path.read_text()
    path.write_text(text.replace('"verdict": "pass"', '"verdict": "fail"'))
    assert refusal(lambda: check_attestation(bundle)).startswith(f"{path}: was altered since it was written")
    path.write_text(text)
    reseal(path)
    assert path.read_text() == text
    reseal(path, files={"weights": {"policy/model.safetensors": "00" * 32}})
    assert refusal(lambda: check_attestation(bundle)).startswith(f"{path}: lists other files than bundle.json")
    reseal(path, format=2, of_the_future=1)
    assert f"{path}: has format 2, and this version reads 1" in refusal(lambda: check_attestation(bundle))
    path.write_text(text)
    for wrong in ({"tolerance": []}, {"dataset": {"rows": 3}}, {"dataset": None}):
        reseal(path, **wrong)
        assert refusal(lambda: check_attestation(bundle)).startswith(f"{path}: is damaged (")
        path.write_text(text)


def test_files_that_are_missing_or_new(bundle: Path, tmp_path: Path) -> None:
    for name in set(files_of(bundle)) - {CARD, ATTESTATION}:
        content = (bundle / name).read_bytes()
        (bundle / name).unlink()
        assert str(bundle / name if name != MANIFEST else bundle) in refusal(lambda: check_attestation(bundle))
        (bundle / name).write_bytes(content)
    for name in ("policy/modeling_llama.py", "policy/.hidden", "new.onnx", "engines/fake/deep/x.plan", "model.sig/x"):
        (bundle / name).parent.mkdir(parents=True, exist_ok=True)
        (bundle / name).write_bytes(b"")
        assert refusal(lambda: check_attestation(bundle)).startswith(f"{bundle / name}: was added to the bundle")
        (bundle / name).unlink()
    (tmp_path / "elsewhere").mkdir()
    link = bundle / "policy" / "additional_chat_templates"
    link.symlink_to(tmp_path / "elsewhere")  # Transformers loads what is in there
    assert refusal(lambda: check_attestation(bundle)).startswith(f"{link}: was added to the bundle")
    link.unlink()
    (bundle / "model.sig").rmdir()
    (bundle / SIGNATURE).write_text("a signature")
    check_attestation(bundle)


def test_other_weights_with_a_manifest_of_their_own(bundle: Path) -> None:
    """Whoever writes other weights and their hash is found by the attestation, which has the old one."""
    attestation = (bundle / ATTESTATION).read_bytes()
    weights, manifest = bundle / "policy/model.safetensors", bundle / MANIFEST
    old = digest(weights)
    weights.write_bytes(with_another_byte(weights.read_bytes(), 3))
    manifest.write_text(manifest.read_text().replace(old, digest(weights)))
    open_bundle(bundle).verify()
    assert refusal(lambda: is_about(bundle)).startswith(f"{manifest}: is not the one that attestation.json is about")
    write_attestation(bundle, make_verification(bundle))
    assert is_about(bundle)
    (bundle / ATTESTATION).write_bytes(attestation)
    with pytest.raises(BundleError):
        is_about(bundle)


def test_a_bundle_that_changed_while_it_was_verified(tmp_path: Path) -> None:
    """The scores are of the old weights: the new ones are not attested with them."""
    folder = make_bundle(tmp_path / "bundle")
    verification = make_verification(folder)
    verification["provenance"]["models"]["reference"]["weights_and_graph_sha256"] = ["00" * 32]
    assert "the reference's graph or weights are not those that were verified" in refusal(
        lambda: write_attestation(folder, verification)
    )
    (folder / "policy.onnx").write_bytes(b"altered")
    assert "policy.onnx: is not the file that was exported" in refusal(
        lambda: write_attestation(folder, make_verification(folder))
    )
    assert not (folder / ATTESTATION).exists()


def test_a_verification_that_lacks_something(tmp_path: Path) -> None:
    folder = make_bundle(tmp_path / "bundle")
    for name in ("verdict", "reasons", "tolerance", "checks", "provenance"):
        verification = make_verification(folder)
        del verification[name]
        with pytest.raises(UsageError, match=rf"is not whole \(KeyError: '{name}'\)"):
            write_attestation(folder, verification)
    for name in ("versions", "hardware", "engine", "precision", "of_recipe", "dataset", "models"):
        verification = make_verification(folder)
        del verification["provenance"][name]
        with pytest.raises(UsageError, match=rf"is not whole \(KeyError: '{name}'\)"):
            write_attestation(folder, verification)
    for name in ("name", "fingerprint", "rows"):
        verification = make_verification(folder)
        del verification["provenance"]["dataset"][name]
        with pytest.raises(UsageError, match=rf"is not whole \(KeyError: '{name}'\)"):
            write_attestation(folder, verification)
    verification = make_verification(folder)
    del verification["provenance"]["models"]["policy"]
    with pytest.raises(UsageError, match=r"is not whole \(KeyError: 'policy'\)"):
        write_attestation(folder, verification)
    with pytest.raises(UsageError, match="'perhaps' is no verdict"):
        write_attestation(folder, {**make_verification(folder), "verdict": "perhaps"})
    assert not (folder / ATTESTATION).exists()


def test_the_exact_graph_does_not_stand_for_the_engine(tmp_path: Path) -> None:
    folder = make_bundle(tmp_path / "bundle")
    verification = make_verification(folder)
    verification["provenance"]["precision"] = "int8"
    with pytest.raises(UsageError, match="an engine in int8 was verified, and the bundle's own computes in fp32"):
        write_attestation(folder, verification)
    verification = make_verification(folder)
    verification["provenance"]["of_recipe"] = False
    with pytest.raises(UsageError, match="and not the bundle's own engine; verify that one"):
        write_attestation(folder, verification)


def test_scored_without_the_reference(tmp_path: Path) -> None:
    folder = make_bundle(tmp_path / "bundle")
    verification = make_verification(folder)
    del verification["provenance"]["models"]["reference"]
    assert write_attestation(folder, verification).roles == ["policy"]
    assert is_about(folder)
