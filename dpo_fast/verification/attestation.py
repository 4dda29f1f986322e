"""What a verification was about: its verdict, bound by SHA-256 to the bundle's files that it was reached with.

attestation.json binds bundle.json, and with it whatever decides a score: recipe, layout, gates, and every file that
bundle.json lists. bundle.json itself stays as it was exported, so that neither file has to hold the other's hash.

Anybody can write another attestation, with another verdict. Who wrote this one is for a signature to say (`signing`).
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path, PurePosixPath
from typing import Any, get_args

from dpo_fast.bundle import ATTESTATION, MANIFEST, POLICY, UNTRACKED, Bundle, open_bundle
from dpo_fast.errors import BundleError, UsageError
from dpo_fast.files import sha256, write_text
from dpo_fast.verification.summary import chosen_limits
from dpo_fast.verification.types import Outcome

FORMAT = 1
KINDS = {".safetensors": "weights", ".onnx": "graphs"}


@dataclass(frozen=True, slots=True)
class Attestation:
    """The content of attestation.json.

    Attributes:
        format: of this file.
        time: when it was written, UTC, as ISO 8601 has it.
        roles: whose models were verified: "policy", and "reference" unless the pairs were scored without one.
        verdict, reasons, tolerance, checks: as `verdict.Verification` has them.
        verification_sha256: of verify.json.
        dataset: of the pairs: name, split, fingerprint, rows.
        engine: what was verified, with its version.
        precision: of the engine's matrix products.
        versions: of the packages, by name.
        hardware: that the verification ran on.
        manifest_sha256: of bundle.json.
        files: SHA-256 by path, for each of "weights" (policy, reference and base as they were trained), "graphs",
            "engine" (plans, quantised weights) and "other" (tokenizers, configurations).
    """

    format: int
    time: str
    roles: list[str]
    verdict: Outcome
    reasons: list[str]
    tolerance: dict[str, Any]
    checks: list[dict[str, Any]]
    verification_sha256: str
    dataset: dict[str, Any]
    engine: str
    precision: str
    versions: dict[str, str]
    hardware: dict[str, Any]
    manifest_sha256: str
    files: dict[str, dict[str, str]]


def write_attestation(bundle: Path, verification: Mapping[str, Any]) -> Attestation:
    """Put attestation.json into a bundle, in the place of an earlier one.

    Args:
        bundle: that was verified; every file of it is hashed again.
        verification: what `write_json` writes into verify.json: `verdict.Verification.as_dict`, and under
            "provenance" what `evaluate` has there: "versions", "hardware", "engine", "precision", "dataset" (with
            "name", "fingerprint" and "rows"), "of_recipe" (see `verify.VerifyOptions`), and "models" by role, each with
            "weights_and_graph_sha256", which are `Bundle.role_hashes` from when the engine was loaded.

    Returns:
        What was written.

    Raises:
        BundleError: the bundle is damaged, holds files that it does not list, or changed since the engine was loaded.
        UsageError: the verification lacks a key, has no such verdict, or is of another engine than the recipe's.
        StorageError: the disk refused.
    """
    text = _text(verification)
    value = json.loads(text)  # as a reader of verify.json has it: lists for tuples
    opened = open_bundle(bundle)
    check_files(opened)
    try:
        made = value["provenance"]
        scored = {role: model["weights_and_graph_sha256"] for role, model in made["models"].items()}
        _ = scored[POLICY], made["of_recipe"], [made["dataset"][key] for key in ("name", "fingerprint", "rows")]
        attestation = Attestation(
            format=FORMAT,
            time=datetime.now(UTC).isoformat(timespec="seconds"),
            roles=sorted(scored),
            **{name: value[name] for name in ("verdict", "reasons", "tolerance", "checks")},
            verification_sha256=hashlib.sha256(text.encode()).hexdigest(),
            **{name: made[name] for name in ("dataset", "engine", "precision", "versions", "hardware")},
            manifest_sha256=sha256(bundle / MANIFEST),
            files=_files_by_kind(opened),
        )
    except (KeyError, TypeError, AttributeError) as error:
        raise UsageError(
            f"{bundle}: no attestation, for the verification is not whole ({type(error).__name__}: {error}); verify "
            "the bundle again"
        ) from error
    if attestation.verdict not in get_args(Outcome):
        raise UsageError(
            f"{bundle}: no attestation, for {attestation.verdict!r} is no verdict; verify the bundle again"
        )
    if made["of_recipe"] is not True:
        raise UsageError(
            f"{bundle}: no attestation, for {attestation.engine} in {attestation.precision} was verified, and not the "
            "bundle's own engine; verify that one, without --engine, --endpoint and --precision"
        )
    if attestation.precision != opened.manifest.recipe["precision"]:
        raise UsageError(
            f"{bundle}: no attestation, for an engine in {attestation.precision} was verified, and the bundle's own "
            f"computes in {opened.manifest.recipe['precision']}; verify that one"
        )
    for role, hashes in scored.items():
        if role not in opened.manifest.models or hashes != opened.role_hashes(role):
            raise BundleError(
                f"{bundle}: the {role}'s graph or weights are not those that were verified; verify the bundle again"
            )
    write_text(bundle / ATTESTATION, _sealed(asdict(attestation)))
    return attestation


def check_attestation(bundle: Path) -> Attestation:
    """Read a bundle's attestation, and hash every file that it is about.

    Raises:
        BundleError: there is none, or it was altered; or a file of the bundle is altered, missing or new, with the
            first such file.
    """
    path = bundle / ATTESTATION
    if not path.is_file():
        raise BundleError(f"{bundle}: has no {ATTESTATION}; make one with `dpo-fast verify {bundle}`")
    attestation = _read(path)
    again = f"verify the bundle again with `dpo-fast verify {bundle}`"
    manifest = bundle / MANIFEST
    if manifest.is_file() and sha256(manifest) != attestation.manifest_sha256:
        raise BundleError(f"{manifest}: is not the one that {ATTESTATION} is about; {again}")
    opened = open_bundle(bundle)
    if attestation.files != _files_by_kind(opened):
        raise BundleError(f"{path}: lists other files than {MANIFEST}; {again}")
    check_files(opened)
    return attestation


def is_about(bundle: Path) -> bool:
    """Whether a verification of exactly these files was attested; False where none was attested at all.

    Raises:
        BundleError: as `check_attestation`, where there is an attestation.
    """
    if not (bundle / ATTESTATION).exists():
        return False
    check_attestation(bundle)
    return True


def check_files(bundle: Bundle) -> None:
    """Refuse a bundle whose files are not exactly those that it lists.

    A file that is not listed may still be loaded: Transformers looks for many, Python code among them. So may whatever
    a link to a folder leads to.

    Raises:
        BundleError: with the first file that is missing, altered or new.
    """
    bundle.verify()
    paths = (path for path in bundle.folder.rglob("*") if path.is_symlink() or not path.is_dir())
    present = {path.relative_to(bundle.folder).as_posix() for path in paths}
    added = present - set(bundle.manifest.files) - UNTRACKED
    if added:
        raise BundleError(
            f"{bundle.folder / min(added)}: was added to the bundle, and {MANIFEST} does not list it; move it"
        )


def _files_by_kind(bundle: Bundle) -> dict[str, dict[str, str]]:
    """The SHA-256 of every listed file, by its kind and path."""
    found: dict[str, dict[str, str]] = {kind: {} for kind in (*KINDS.values(), "engine", "other")}
    for name, recorded in sorted(bundle.manifest.files.items()):
        path = PurePosixPath(name)
        kind = "engine" if path.parts[0] == "engines" else KINDS.get(path.suffix, "other")
        found[kind][name] = recorded["sha256"]
    return found


def _read(path: Path) -> Attestation:
    """Read an attestation that is as it was written, to the byte.

    Raises:
        BundleError: it is not.
    """
    try:
        text = path.read_text(encoding="utf-8")
        value = json.loads(text)
        del value["sha256"]
        if text != _sealed(value):
            raise BundleError(f"{path}: was altered since it was written; verify the bundle again")
        if value["format"] != FORMAT:
            raise BundleError(
                f"{path}: has format {value['format']!r}, and this version reads {FORMAT}; verify the bundle again"
            )
        attestation = Attestation(**value)
        # What is told of it.
        _ = attestation.dataset["name"], attestation.dataset["rows"]
        chosen_limits(attestation.tolerance, attestation.precision)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise BundleError(f"{path}: is damaged ({type(error).__name__}: {error}); verify the bundle again") from error
    return attestation


def _sealed(value: dict[str, Any]) -> str:
    """The text of an attestation, with a hash of all the rest of it at the end."""
    return _text(value | {"sha256": hashlib.sha256(_text(value).encode()).hexdigest()})


def _text(value: Mapping[str, Any]) -> str:
    """JSON as `dpo_fast.files.write_json` writes it."""
    return json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
