"""Real keys, real signatures: what one byte, one file or one key more or less does to them."""

import base64
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.asymmetric.types import PrivateKeyTypes
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
)
from fake_engines import make_fake_bundle

from dpo_fast.bundle import ATTESTATION, SIGNATURE
from dpo_fast.errors import BundleError, InputError, MissingDependencyError, OutputExistsError, UsageError
from dpo_fast.files import sha256
from dpo_fast.verification.attestation import write_attestation
from dpo_fast.verification.signing import PASSWORD, check_signature, sign

from .attested_bundle import files_of, make_bundle, make_verification, with_another_byte

SECRET = "correct horse battery staple"


def write_keys(
    folder: Path,
    name: str = "key",
    *,
    private: PrivateKeyTypes | None = None,
    password: str | None = None,
    format: PrivateFormat = PrivateFormat.PKCS8,
) -> tuple[Path, Path]:
    """A pair of keys as PEM files: the private and the public one."""
    private = private or ec.generate_private_key(ec.SECP256R1())
    encryption = NoEncryption() if password is None else BestAvailableEncryption(password.encode())
    key, public = folder / f"{name}.pem", folder / f"{name}.pub"
    key.write_bytes(private.private_bytes(Encoding.PEM, format, encryption))
    public.write_bytes(private.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))
    return key, public


@pytest.fixture
def keys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    monkeypatch.delenv(PASSWORD, raising=False)
    return write_keys(tmp_path)


@pytest.fixture
def signed(tmp_path: Path, keys: tuple[Path, Path]) -> Path:
    """A bundle, attested and signed, with its signature in it."""
    folder = make_bundle(tmp_path / "bundle")
    write_attestation(folder, make_verification(folder))
    sign(folder, keys[0], folder / SIGNATURE)
    return folder


def refusal(action: Callable[[], object], kind: type[InputError] = BundleError) -> str:
    """The message of the error that an action raises: one line."""
    with pytest.raises(kind) as caught:
        action()
    assert type(caught.value) is kind
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_what_was_signed_is_accepted(signed: Path, keys: tuple[Path, Path], tmp_path: Path) -> None:
    check_signature(signed, keys[1], signed / SIGNATURE)
    sign(signed, keys[0], signed / SIGNATURE)  # again, in the place of the first
    check_signature(signed, keys[1], signed / SIGNATURE)
    elsewhere = tmp_path / "signatures" / "of the bundle.sig"
    sign(signed, keys[0], elsewhere)
    check_signature(signed, keys[1], elsewhere)
    moved = signed.rename(tmp_path / "under another name")
    check_signature(moved, keys[1], moved / SIGNATURE)
    check_signature(moved, keys[1], elsewhere)


def test_the_signature_states_every_file(signed: Path) -> None:
    envelope = json.loads((signed / SIGNATURE).read_text())["dsseEnvelope"]
    statement = json.loads(base64.b64decode(envelope["payload"]))
    assert {file["name"] for file in statement["predicate"]["resources"]} == set(files_of(signed)) - {SIGNATURE}


@pytest.mark.slow
def test_the_package_itself_accepts_it(signed: Path, keys: tuple[Path, Path]) -> None:
    """The signature is a standard one: whoever has only model-signing can check it, and sees what was altered."""
    command = [sys.executable, "-m", "model_signing", "verify", "key", str(signed), "--signature",
               str(signed / SIGNATURE), "--public_key", str(keys[1]), "--no-ignore-git-paths"]  # fmt: skip
    accepted = subprocess.run(command, check=False, capture_output=True, text=True)
    assert accepted.returncode == 0, accepted.stderr
    path = signed / "policy.onnx"
    path.write_bytes(with_another_byte(path.read_bytes(), 0))
    refused = subprocess.run(command, check=False, capture_output=True, text=True)
    assert refused.returncode != 0
    assert "Hash mismatch for 'policy.onnx'" in refused.stdout + refused.stderr


def test_one_byte_of_any_file_is_found(signed: Path, keys: tuple[Path, Path]) -> None:
    names = set(files_of(signed)) - {SIGNATURE}
    assert {"bundle.json", "attestation.json", "policy/README.md", ".gitattributes", "policy/.gitattributes",
            "policy/model.safetensors", "reference/model.safetensors", "base/model.safetensors", "policy.onnx",
            "policy.fake.onnx", "reference.onnx", "engines/fake/policy.body.plan",
            "engines/fake/policy.fake.safetensors"} < names  # fmt: skip
    for name in names:
        path = signed / name
        content = path.read_bytes()
        for position in {0, len(content) - 1}:
            path.write_bytes(with_another_byte(content, position))
            message = refusal(lambda: check_signature(signed, keys[1], signed / SIGNATURE))
            assert message == f"{path}: is not the file that was signed; get the bundle again"
        path.write_bytes(content)
    check_signature(signed, keys[1], signed / SIGNATURE)


def test_files_that_are_missing_or_new(signed: Path, keys: tuple[Path, Path]) -> None:
    def check() -> None:
        check_signature(signed, keys[1], signed / SIGNATURE)

    for name in ("bundle.json", "attestation.json", "policy/model.safetensors", ".gitattributes", "policy/README.md"):
        content = (signed / name).read_bytes()
        (signed / name).unlink()
        assert refusal(check) == f"{signed / name}: was signed, and is missing; get the bundle again"
        (signed / name).write_bytes(content)
    for name in ("policy/modeling_llama.py", ".gitignore", ".git/config", ".github/x", "other.sig", "policy/model.sig"):
        (signed / name).parent.mkdir(exist_ok=True)
        (signed / name).write_bytes(b"")
        assert refusal(check).startswith(f"{signed / name}: is not covered by {signed / SIGNATURE}")
        (signed / name).unlink()
    (signed / "policy" / "link").symlink_to(keys[0])
    assert "is a link or a special file" in refusal(check)
    (signed / "policy" / "link").unlink()
    check()


def test_a_folder_by_the_signatures_name_hides_nothing(signed: Path, keys: tuple[Path, Path], tmp_path: Path) -> None:
    """The package leaves out everything below a path that it leaves out."""
    outside = (signed / SIGNATURE).rename(tmp_path / "outside.sig")
    (signed / SIGNATURE).mkdir()
    (signed / SIGNATURE / "modeling_llama.py").write_text("")
    assert f"{SIGNATURE}/modeling_llama.py: is not covered" in refusal(
        lambda: check_signature(signed, keys[1], outside)
    )


def test_a_signature_that_leaves_out_the_weights(tmp_path: Path, keys: tuple[Path, Path]) -> None:
    """Signed with the right key by other means, and no word about the weights."""
    import model_signing

    folder = make_fake_bundle(tmp_path / "bundle")
    hashing = model_signing.hashing.Config().set_ignored_paths(paths=["policy/model.safetensors"])
    config = model_signing.signing.Config().use_elliptic_key_signer(private_key=keys[0])
    config.set_hashing_config(hashing).sign(folder, folder / SIGNATURE)
    assert "policy/model.safetensors: is not covered by" in refusal(
        lambda: check_signature(folder, keys[1], folder / SIGNATURE)
    )


def test_what_the_package_refuses_is_refused(
    signed: Path, keys: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Even where no difference is found any more: a file that was altered while the package read it."""
    import model_signing

    def refuse(*_: object) -> None:
        raise ValueError("Signature mismatch: ['of a file']")

    monkeypatch.setattr(model_signing.verifying.Config, "verify", refuse)
    assert "Signature mismatch: ['of a file']" in refusal(lambda: check_signature(signed, keys[1], signed / SIGNATURE))


def test_another_key(signed: Path, keys: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, other = write_keys(tmp_path, "other")
    signature = signed / SIGNATURE
    assert f"{signature}: is no signature by the owner of {other}" in refusal(
        lambda: check_signature(signed, other, signature)
    )
    # Without the hint by which the package knows the key, it is the arithmetic that says so.
    value = json.loads(signature.read_text())
    del value["verificationMaterial"]["publicKey"]["hint"]
    signature.write_text(json.dumps(value))
    assert "is no signature by the owner of" in refusal(lambda: check_signature(signed, other, signature))
    check_signature(signed, keys[1], signature)
    assert capsys.readouterr().out == "", "standard output belongs to results"


def test_a_signature_of_another_bundle(signed: Path, keys: tuple[Path, Path], tmp_path: Path) -> None:
    other = make_fake_bundle(tmp_path / "other", weights=b"trained for longer ")
    sign(other, keys[0], other / SIGNATURE)
    check_signature(other, keys[1], other / SIGNATURE)
    assert refusal(lambda: check_signature(other, keys[1], signed / SIGNATURE)).startswith(f"{other}/")
    assert refusal(lambda: check_signature(signed, keys[1], other / SIGNATURE)).startswith(f"{signed}/")


def test_a_signature_with_another_statement(signed: Path, keys: tuple[Path, Path]) -> None:
    """Other weights, and their hash written into the signature's statement."""
    path, signature = signed / "policy/model.safetensors", signed / SIGNATURE
    old = sha256(path)
    path.write_bytes(with_another_byte(path.read_bytes(), 0))
    value = json.loads(signature.read_text())
    payload = base64.b64decode(value["dsseEnvelope"]["payload"]).replace(old.encode(), sha256(path).encode())
    value["dsseEnvelope"]["payload"] = base64.b64encode(payload).decode()
    signature.write_text(json.dumps(value))
    assert "is no signature by the owner of" in refusal(lambda: check_signature(signed, keys[1], signature))


def test_a_signature_that_is_cut_off_or_missing(signed: Path, keys: tuple[Path, Path]) -> None:
    signature = signed / SIGNATURE
    content = signature.read_bytes()

    def check() -> None:
        check_signature(signed, keys[1], signature)

    for length in (0, 1, 100, len(content) // 2, len(content) - 1):
        signature.write_bytes(content[:length])
        assert refusal(check).startswith(f"{signature}: is no signature by the owner of {keys[1]}")
    for other in (b"[]", b"{}", b"null", b"\xff\xfe", b"[" * 100_000, b'{"verificationMaterial": {}}'):
        signature.write_bytes(other)
        assert refusal(check).startswith(f"{signature}: is no signature by the owner of {keys[1]}")
    for name in ("payload", "signatures"):
        value = json.loads(content)
        value["dsseEnvelope"][name] = "" if name == "payload" else []
        signature.write_text(json.dumps(value))
        assert refusal(check).startswith(f"{signature}: is no signature by the owner of {keys[1]}")
    signature.unlink()
    assert refusal(check).startswith(f"{signature}: no such signature; make one with `dpo-fast verify")
    assert "no such bundle" in refusal(lambda: check_signature(signed / "nothing", keys[1], signature))


@pytest.mark.parametrize("curve", [ec.SECP384R1(), ec.SECP521R1()], ids=lambda curve: curve.name)
def test_longer_keys(tmp_path: Path, curve: ec.EllipticCurve) -> None:
    folder = make_fake_bundle(tmp_path / "bundle")
    key, public = write_keys(tmp_path, private=ec.generate_private_key(curve))
    sign(folder, key, folder / SIGNATURE)
    check_signature(folder, public, folder / SIGNATURE)


@pytest.mark.parametrize(
    "format", [PrivateFormat.PKCS8, PrivateFormat.TraditionalOpenSSL], ids=["PKCS 8", "OpenSSL's own"]
)
def test_an_encrypted_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, format: PrivateFormat) -> None:
    folder, signature = make_fake_bundle(tmp_path / "bundle"), tmp_path / "bundle.sig"
    key, public = write_keys(tmp_path, password=SECRET, format=format)
    monkeypatch.delenv(PASSWORD, raising=False)
    message = refusal(lambda: sign(folder, key, signature), UsageError)
    assert message == f"{key}: is encrypted; put its password into the environment variable DPO_FAST_KEY_PASSWORD"
    for wrong in ("hunter2", "", "\udcff"):
        monkeypatch.setenv(PASSWORD, wrong)
        message = refusal(lambda: sign(folder, key, signature), UsageError)
        assert "or DPO_FAST_KEY_PASSWORD is not its password" in message
        assert not wrong or wrong not in message
    assert not signature.exists()
    monkeypatch.setenv(PASSWORD, SECRET)
    sign(folder, key, signature)
    check_signature(folder, public, signature)
    assert SECRET not in signature.read_text()


def test_a_password_that_is_not_needed(
    tmp_path: Path, keys: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_fake_bundle(tmp_path / "bundle")
    monkeypatch.setenv(PASSWORD, SECRET)
    sign(folder, keys[0], folder / SIGNATURE)
    check_signature(folder, keys[1], folder / SIGNATURE)


def test_keys_that_cannot_be_used_show_nothing_of_themselves(tmp_path: Path, keys: tuple[Path, Path]) -> None:
    folder, signature = make_fake_bundle(tmp_path / "bundle"), tmp_path / "bundle.sig"
    sign(folder, keys[0], signature)
    wrong = {
        "rsa": write_keys(tmp_path, "rsa", private=rsa.generate_private_key(65537, 2048)),
        "ed25519": write_keys(tmp_path, "ed25519", private=ed25519.Ed25519PrivateKey.generate()),
        "another curve": write_keys(tmp_path, "curve", private=ec.generate_private_key(ec.SECP256K1())),
        "swapped": (keys[1], keys[0]),
    }
    for name in ("cut", "noise", "empty"):
        pair = write_keys(tmp_path, name)
        for path in pair:
            text = path.read_text()
            path.write_text({"cut": text[: len(text) // 2], "noise": text.replace("M", "?"), "empty": ""}[name])
        wrong[name] = pair
    for key, public in wrong.values():
        lines = [line for path in (key, public) for line in path.read_text().splitlines() if "-----" not in line]
        for message in (
            refusal(lambda key=key: sign(folder, key, tmp_path / "new.sig"), UsageError),
            refusal(lambda public=public: check_signature(folder, public, signature), UsageError),
        ):
            assert not any(line in message for line in lines if line)
            assert "in PEM; name" in message
    for path in (tmp_path / "no such key", tmp_path):
        for message in (
            refusal(lambda path=path: sign(folder, path, tmp_path / "new.sig"), UsageError),
            refusal(lambda path=path: check_signature(folder, path, signature), UsageError),
        ):
            assert f"{path}: cannot be read" in message
    assert not (tmp_path / "new.sig").exists()


def test_only_a_whole_bundle_is_signed(tmp_path: Path, keys: tuple[Path, Path]) -> None:
    folder = make_bundle(tmp_path / "bundle")
    signature = folder / SIGNATURE
    write_attestation(folder, make_verification(folder))
    path = folder / "policy" / "model.safetensors"
    content = path.read_bytes()
    path.write_bytes(with_another_byte(content, 0))
    assert f"{path}: is not the file that was exported" in refusal(lambda: sign(folder, keys[0], signature))
    (folder / ATTESTATION).unlink()
    assert f"{path}: is not the file that was exported" in refusal(lambda: sign(folder, keys[0], signature))
    path.write_bytes(content)
    (folder / "policy" / "link").symlink_to("config.json")
    assert "is a link" in refusal(lambda: sign(folder, keys[0], signature))
    assert "no such bundle" in refusal(lambda: sign(tmp_path / "nothing", keys[0], signature))
    assert not signature.exists()


def test_a_signature_takes_no_other_files_place(tmp_path: Path, keys: tuple[Path, Path]) -> None:
    folder = make_fake_bundle(tmp_path / "bundle")
    before = {name: (folder / name).read_bytes() for name in files_of(folder)}
    for name in ("policy.onnx", "policy/model.sig", "bundle.json", "new"):
        assert "lies within the bundle; name" in refusal(
            lambda name=name: sign(folder, keys[0], folder / name),
            UsageError,
        )
    private = keys[0].read_bytes()
    (tmp_path / "notes").write_text("mine")
    for path in (keys[0], tmp_path / "notes", tmp_path):
        assert "exists already, and is no signature" in refusal(
            lambda path=path: sign(folder, keys[0], path),
            OutputExistsError,
        )
    assert keys[0].read_bytes() == private
    (folder / "policy" / "key.pem").write_bytes(private)
    message = refusal(lambda: sign(folder, folder / "policy" / "key.pem", folder / SIGNATURE), UsageError)
    assert "is a private key within the bundle, which others get to see" in message
    (folder / "policy" / "key.pem").unlink()
    assert {name: (folder / name).read_bytes() for name in files_of(folder)} == before


def test_without_the_package(tmp_path: Path, keys: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_fake_bundle(tmp_path / "bundle")
    monkeypatch.setitem(sys.modules, "model_signing", None)
    for action in (lambda: sign(folder, *keys), lambda: check_signature(folder, keys[1], folder / SIGNATURE)):
        message = refusal(action, MissingDependencyError)
        assert "needs the package 'model-signing': pip install 'dpo-fast[sign]'" in message


def test_a_signature_may_be_read_by_everyone(signed: Path) -> None:
    mask = os.umask(0)
    os.umask(mask)
    assert (signed / SIGNATURE).stat().st_mode & 0o777 == 0o666 & ~mask
