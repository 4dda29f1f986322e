"""What the page shows of a verification."""

import json
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

from dpo_fast.bundle import POLICY
from dpo_fast.errors import StorageError
from dpo_fast.text import one_line
from dpo_fast.verification.summary import CheckRow, checks_of, chosen_limits, sizes_of

RESULT = "verify.json"


@dataclass(frozen=True, slots=True)
class ShownVerification:
    """A verification in words.

    Attributes:
        verdict: "pass", "fail" or "cannot tell".
        reasons: of the verdict.
        foreign: whether it is of another policy than the run's.
        subject: what was compared with what, on which pairs.
        checks, limits: see `dpo_fast.verification.summary`.
        sizes: lines of a table of errors; none where the scores could not be compared.
    """

    verdict: str
    reasons: list[str]
    foreign: bool
    subject: str
    checks: list[CheckRow]
    limits: tuple[str, ...]
    sizes: list[tuple[str, ...]]


def read_verification(folder: Path, metrics: dict[str, Any]) -> ShownVerification:
    """Read what `dpo-fast verify` wrote.

    Args:
        folder: its folder.
        metrics: the content of the run's metrics.json.

    Raises:
        StorageError: it is missing, damaged, or of another version.
    """
    path = folder / RESULT
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
        made = result["provenance"]
        return ShownVerification(
            verdict=result["verdict"],
            reasons=list(result["reasons"]),
            foreign=_policy(made) != _policy(metrics["provenance"]),
            subject=(
                f"{made['engine']}, {made['precision']}, against {made['original']} in float32: {result['pairs']:,} "
                f"pairs of {one_line(made['dataset']['name'])}."
            ),
            checks=checks_of(result),
            limits=chosen_limits(result["tolerance"], made["precision"]),
            sizes=[astuple(row) for row in sizes_of(result)],
        )
    except OSError as error:
        raise StorageError(f"{path}: cannot be read; name the folder that `dpo-fast verify` wrote") from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise StorageError(f"{path}: is damaged, or of another version; verify again") from error


def _policy(provenance: dict[str, Any]) -> Any:
    """The hashes of the policy's weights and graph."""
    return provenance["models"][POLICY]["weights_and_graph_sha256"]
