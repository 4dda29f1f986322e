"""Whether a bundle may be published: what a verification says of exactly its files."""

import json
from collections.abc import Mapping
from dataclasses import asdict, astuple, dataclass
from pathlib import Path
from typing import Any, get_args

from dpo_fast.bundle import ATTESTATION, POLICY, Bundle
from dpo_fast.errors import BundleError, UsageError
from dpo_fast.text import one_line
from dpo_fast.verification.attestation import check_attestation
from dpo_fast.verification.summary import CheckRow, checks_of, chosen_limits
from dpo_fast.verification.types import Outcome

RESULT = "verify.json"


@dataclass(frozen=True, slots=True)
class Verified:
    """What a verification found, as it is shown.

    Attributes:
        verdict: "pass", "fail" or "cannot tell".
        reasons: a sentence each.
        checks: a row each.
        limits: those that somebody chose in place of the usual ones; see `chosen_limits`.
        engine: what was held against the original weights, with its version.
        precision: of its matrix products.
        dataset: the name of the pairs' data set.
        rows: that the data set has.
    """

    verdict: Outcome
    reasons: tuple[str, ...]
    checks: tuple[CheckRow, ...]
    limits: tuple[str, ...]
    engine: str
    precision: str
    dataset: str
    rows: int


def find_verification(bundle: Bundle, folder: Path | None) -> Verified | None:
    """Read what is known of a bundle's engine, after every file of the bundle has been hashed.

    Args:
        bundle: that is to be published.
        folder: what `dpo-fast verify --output` wrote; None takes the bundle's attestation.json.

    Returns:
        What was found, or None where these files have not been verified.

    Raises:
        BundleError: the bundle is damaged, or its attestation is about other files.
        UsageError: the folder holds no verification, or one of other files.
    """
    attested: Verified | None = None
    if (bundle.folder / ATTESTATION).exists():
        attestation = check_attestation(bundle.folder)
        attested = _read(asdict(attestation), attestation.dataset, bundle.folder / ATTESTATION)
    else:
        bundle.verify()
    if folder is None:
        return attested
    path = folder / RESULT
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
        made = result["provenance"]
        scored = {role: model["weights_and_graph_sha256"] for role, model in made["models"].items()}
        if POLICY not in scored:
            raise KeyError(POLICY)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UsageError(
            f"--verification {folder}: holds no readable {RESULT}; name a folder that `verify` wrote"
        ) from error
    if not is_of(bundle, scored):
        raise UsageError(
            f"--verification {folder}: is of other weights or graphs than this bundle's; verify this bundle"
        )
    if made.get("of_recipe") is not True:
        raise UsageError(
            f"--verification {folder}: is of {one_line(made.get('engine'))}, not of the bundle's own engine; verify "
            "that one, without --engine, --endpoint and --precision"
        )
    return _read({**made, **result}, made.get("dataset"), path)


def is_of(bundle: Bundle, scored: Mapping[str, Any]) -> bool:
    """Whether all models that were scored are the bundle's.

    Args:
        bundle: that is to be published.
        scored: the hashes of weights and graph, by role.
    """
    known = bundle.manifest.models
    return all(role in known and hashes == bundle.role_hashes(role) for role, hashes in scored.items())


def _read(value: Mapping[str, Any], dataset: Any, path: Path) -> Verified:
    """The parts that are shown.

    Raises:
        BundleError: one is missing, or of another kind.
    """
    try:
        if value["verdict"] not in get_args(Outcome):
            raise ValueError(f"verdict {value['verdict']!r}")
        return Verified(
            verdict=value["verdict"],
            reasons=tuple(one_line(reason, 500) for reason in value["reasons"]),
            checks=tuple(CheckRow(*map(one_line, astuple(check))) for check in checks_of(dict(value))),
            limits=chosen_limits(value["tolerance"], value["precision"]),
            engine=one_line(value["engine"]),
            precision=one_line(value["precision"]),
            dataset=one_line(dataset["name"]),
            rows=int(dataset["rows"]),
        )
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        raise BundleError(
            f"{path}: is damaged ({type(error).__name__}: {one_line(error)}); verify the bundle again"
        ) from error
