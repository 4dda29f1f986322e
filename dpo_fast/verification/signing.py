"""A bundle's signature: who vouches for it, and that no file was altered, added or removed since.

Made and checked by OpenSSF's model-signing package with a pair of elliptic-curve keys (P-256, P-384 or P-521), as PEM.
It is a Sigstore bundle, which `model_signing verify key` checks as well. It covers every file but itself: hidden ones,
bundle.json, attestation.json and the model card too, so whatever writes into the bundle comes before it.
"""

import base64
import io
import json
import os
import tempfile
from contextlib import redirect_stdout
from pathlib import Path
from types import ModuleType
from typing import Any

from dpo_fast.bundle import SIGNATURE, open_bundle
from dpo_fast.errors import BundleError, MissingDependencyError, OutputExistsError, UsageError
from dpo_fast.files import make_folder, sha256, write_text
from dpo_fast.verification.attestation import is_about

PASSWORD = "DPO_FAST_KEY_PASSWORD"  # noqa: S105  the variable's name
# How model-signing's ValueError begins where the signature is the key's, and the files are not those that were signed.
MISMATCH = "Signature mismatch"


def sign(bundle: Path, key: Path, signature: Path) -> None:
    """Sign every file of a bundle.

    Args:
        bundle: whose files are checked first, and its attestation if it has one.
        key: the private key. If it is encrypted, the environment variable DPO_FAST_KEY_PASSWORD holds its password.
        signature: the file to write: BUNDLE/model.sig, or one outside of the bundle; it replaces another signature.

    Raises:
        BundleError: the bundle, or its attestation, is damaged or altered.
        UsageError: the key cannot be used or lies in the bundle, or the signature would become a file of the bundle.
        OutputExistsError: `signature` is there, and is no signature.
        MissingDependencyError: model-signing is not installed.
        StorageError: the disk refused.
    """
    signer = load_signer(bundle, key, signature)
    package = _import_package("signing a bundle")
    if not is_about(bundle):
        open_bundle(bundle).verify()
    _present_files(bundle)  # refuses links
    make_folder(signature.parent)
    with tempfile.TemporaryDirectory() as working:
        made = Path(working) / SIGNATURE
        signer.set_hashing_config(_covered(package)).sign(bundle, made)
        write_text(signature, made.read_text(encoding="utf-8"))


def load_signer(bundle: Path, key: Path, signature: Path) -> Any:
    """What signs with a key; to be had before the long work that a signature is to be made of.

    Raises:
        UsageError, OutputExistsError, MissingDependencyError: as `sign`.
    """
    package = _import_package("signing a bundle")
    if _is_within(key, bundle):
        raise UsageError(f"{key}: is a private key within the bundle, which others get to see; move it elsewhere")
    if _is_within(signature, bundle) and signature.resolve() != (bundle / SIGNATURE).resolve():
        raise UsageError(f"{signature}: lies within the bundle; name {bundle / SIGNATURE}, or a file outside of it")
    if os.path.lexists(signature) and not _is_signature(signature):
        raise OutputExistsError(f"{signature}: exists already, and is no signature; name another file")
    return _load_private_key(package, key)


def check_signature(bundle: Path, public_key: Path, signature: Path) -> None:
    """Check that a key's owner has signed exactly these files.

    Args:
        bundle: every file of which is hashed.
        public_key: of the one who is said to have signed.
        signature: what `sign` wrote.

    Raises:
        BundleError: there is no signature, it is damaged or of another key, or a file is altered, missing or new.
        UsageError: the public key cannot be used.
        MissingDependencyError: model-signing is not installed.
    """
    package = _import_package("checking a signature")
    if not bundle.is_dir():
        raise BundleError(f"{bundle}: no such bundle; name the folder that was signed")
    if not signature.is_file():
        raise BundleError(f"{signature}: no such signature; make one with `dpo-fast verify {bundle} --sign KEY`")
    verifier = _load_public_key(package, public_key)
    present = _present_files(bundle)
    # Nothing but model-signing runs in here, and it lets through what JSON, base64, pydantic and cryptography raise.
    try:
        with redirect_stdout(io.StringIO()):  # it prints its warnings
            verifier.set_hashing_config(_covered(package)).verify(bundle, signature)
        signed = _signed_files(signature)
    except OSError as error:
        raise BundleError(f"{error.filename or signature}: cannot be read ({error.strerror}); get it again") from error
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        if str(error).startswith(MISMATCH):
            raise BundleError(_first_difference(bundle, signature, present) or f"{bundle}: {reason}") from error
        raise BundleError(
            f"{signature}: is no signature by the owner of {public_key} ({reason}); get both files again"
        ) from error
    # The signature itself says which paths it leaves out, so what the package takes may cover less than everything.
    if present - signed.keys():
        raise BundleError(_not_covered(bundle / min(present - signed.keys()), signature))


def _first_difference(bundle: Path, signature: Path, present: set[str]) -> str | None:
    """The first file that is altered, missing or new, with what is wrong with it."""
    signed = _signed_files(signature)
    for name in sorted(signed.keys() & present):
        if sha256(bundle / name) != signed[name]:
            return f"{bundle / name}: is not the file that was signed; get the bundle again"
    for name in sorted(signed.keys() - present):
        return f"{bundle / name}: was signed, and is missing; get the bundle again"
    for name in sorted(present - signed.keys()):
        return _not_covered(bundle / name, signature)
    return None


def _not_covered(path: Path, signature: Path) -> str:
    """What is wrong with a file that nobody signed."""
    return f"{path}: is not covered by {signature}; do not trust this file"


def _import_package(purpose: str) -> ModuleType:
    """Import model-signing.

    Raises:
        MissingDependencyError: it, or a package that it imports, is not installed.
    """
    try:
        import model_signing
    except ImportError as error:
        raise MissingDependencyError("model-signing", "sign", purpose) from error
    return model_signing


def _covered(package: ModuleType) -> Any:
    """Which files are hashed: all but the signature. By default the package leaves out git's as well."""
    return package.hashing.Config().set_ignored_paths(paths=[SIGNATURE], ignore_git_paths=False)


def _load_private_key(package: ModuleType, key: Path) -> Any:
    """A signing configuration with a private key; no message holds anything of the key or its password.

    Raises:
        UsageError: the file cannot be read, is no such key, or its password is missing or wrong.
    """
    content = _read_key(key)
    password = None
    if b"ENCRYPTED" in content:  # in the first line of PKCS #8, in the third of OpenSSL's own format
        password = os.environ.get(PASSWORD)
        if password is None:
            raise UsageError(f"{key}: is encrypted; put its password into the environment variable {PASSWORD}")
    try:
        # model-signing hands the password on to `load_pem_private_key`, which wants bytes.
        return package.signing.Config().use_elliptic_key_signer(
            private_key=key, password=None if password is None else password.encode()
        )
    except Exception:  # as many as there are formats; `from None`, as they are about the key's content
        reason = "is no private key on P-256, P-384 or P-521 in PEM"
        if password is not None:
            reason += f", or {PASSWORD} is not its password"
        raise UsageError(f"{key}: {reason}; name another key") from None


def _load_public_key(package: ModuleType, public_key: Path) -> Any:
    """A verifying configuration with a public key.

    Raises:
        UsageError: the file cannot be read, or is no such key.
    """
    _read_key(public_key)
    try:
        return package.verifying.Config().use_elliptic_key_verifier(public_key=public_key)
    except Exception:  # the file may be the private key: nothing of it is shown
        raise UsageError(
            f"{public_key}: is no public key on P-256, P-384 or P-521 in PEM; name the one that belongs to the signer"
        ) from None


def _read_key(path: Path) -> bytes:
    """A key's file.

    Raises:
        UsageError: it cannot be read.
    """
    try:
        return path.read_bytes()
    except OSError as error:
        raise UsageError(f"{path}: cannot be read ({error.strerror}); name the file of a key") from error


def _present_files(bundle: Path) -> set[str]:
    """The paths of a bundle's files, but for its signature.

    Raises:
        BundleError: something in the bundle is neither a file nor a folder, and no signature covers it.
    """
    present = set()
    for path in bundle.rglob("*"):
        if path.is_symlink() or not (path.is_file() or path.is_dir()):
            raise BundleError(f"{path}: is a link or a special file, which cannot be signed; put a copy in its place")
        if path.is_file():
            present.add(path.relative_to(bundle).as_posix())
    return present - {SIGNATURE}


def _signed_files(signature: Path) -> dict[str, str]:
    """The SHA-256 that a signature states, by path; to be believed only after the signature was checked."""
    envelope = json.loads(signature.read_text(encoding="utf-8"))["dsseEnvelope"]
    statement = json.loads(base64.b64decode(envelope["payload"]))
    return {file["name"]: file["digest"] for file in statement["predicate"]["resources"]}


def _is_signature(path: Path) -> bool:
    """Whether a file can be read as a signature."""
    try:
        return bool(_signed_files(path))
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return False


def _is_within(path: Path, folder: Path) -> bool:
    """Whether a path, links followed, lies in a folder."""
    return path.resolve().is_relative_to(folder.resolve())
