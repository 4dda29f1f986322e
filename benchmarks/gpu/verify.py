"""Recipes on tiny families: are the numbers right, before anyone asks how fast they come?"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from gpu.contenders import Contender
from gpu.processes import Surroundings, run_task


def verify(
    contender: Contender,
    families: Sequence[str],
    target: str | None,
    surroundings: Surroundings,
    report: Callable[[str], None],
) -> dict[str, Any]:
    """Verify a recipe on families, each family's result kept whatever becomes of the others.

    Args:
        contender: a recipe that runs here.
        families: names.
        target: the GPU as builders name it; None without one.
        surroundings: of its processes.
        report: called with a line at each step.

    Returns:
        The contender's `name`, `precision` and `families`: by name what `gpu.verify_families` says, or an `error`.
    """
    found: dict[str, dict[str, Any]] = {}
    log = f"verify-{Path(contender.name).stem}"
    while len(found) < len(families):
        remaining = [family for family in families if family not in found]
        report(f"{contender.name}: {', '.join(remaining)}")
        work = surroundings.work / "verify"
        arguments = {"recipe": contender.name, "families": remaining, "work": str(work), "target": target}
        ended = run_task("verify_families", arguments, f"{log}-{remaining[0]}", surroundings)
        found |= {said["family"]: said for said in ended.said}
        stopped_at = next((family for family in families if family not in found), None)
        if stopped_at is not None:  # what it died of is this one's; the others get a process of their own
            found[stopped_at] = {"error": ended.error or "it ended well, and said nothing", "passed": False}
    return {
        "name": contender.name,
        "precision": contender.precision,
        "families": {family: found[family] for family in families},
    }


def all_passed(contenders: Sequence[dict[str, Any]]) -> bool:
    """Whether nothing failed; where there is nothing to judge by (PyTorch has no such precision) is no failure."""
    return not any(found["passed"] is False for contender in contenders for found in contender["families"].values())
