"""The same scores under other betas and losses: `rescore` for the losses, and the calibration by beta."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dpo_fast.report.figures import Calibration, calibration
from dpo_fast.report.pairs import RunPairs
from dpo_fast.rescore import loss_name, rescore
from dpo_fast.rescore_settings import ALL, make_settings

BETAS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)


@dataclass(frozen=True, slots=True)
class Sweep:
    """Every loss at every beta.

    Attributes:
        betas: ascending, the run's own among them.
        losses: names; the run's own first.
        values: by (loss, beta): the loss, and its 95 % interval or None; see `rescore`.
        by_beta: for each of `betas`: mean margin and accuracy with intervals, as `rescore` has them.
        calibrations: for each of `betas`; the margins grow with beta, their order does not.
        notes: what a reader must know of the losses.
    """

    betas: list[float]
    losses: list[str]
    values: dict[tuple[str, float], tuple[float, list[float] | None]]
    by_beta: list[dict[str, Any]]
    calibrations: list[Calibration]
    notes: list[str]


def sweep(run: Path, pairs: RunPairs) -> Sweep:
    """Compute all losses at `BETAS` and the run's own beta, with the run's other settings.

    Args:
        run: what `dpo-fast evaluate` wrote.
        pairs: its pairs.

    Raises:
        StorageError, UsageError: as `rescore`.
    """
    own, provenance = pairs.settings, pairs.metrics["provenance"]
    betas = sorted({*BETAS, own.beta})
    texts = [repr(beta) for beta in betas]
    own_settings, _ = make_settings(own, texts, reference_free=own.reference_free)
    all_settings, notes = make_settings(own, texts, [ALL], reference_free=own.reference_free)
    result = rescore(
        run,
        list(dict.fromkeys([*own_settings, *all_settings])),
        aggregate=provenance["aggregate"],
        batch_size=provenance["batch_size"] or 8,
        seed=provenance["bootstrap_seed"],
    )
    values: dict[tuple[str, float], tuple[float, list[float] | None]] = {}
    for each in result["results"]:  # the run's own first: its label smoothing is the one that is shown
        values.setdefault((each["loss_type"], each["beta"]), (each["eval_loss"], each["interval"]))
    return Sweep(
        betas=betas,
        losses=list(dict.fromkeys([loss_name(own), *result["loss_types"]])),
        values=values,
        by_beta=sorted(result["by_beta"], key=lambda each: float(each["beta"])),
        calibrations=[calibration(pairs.chosen.rewards(beta) - pairs.rejected.rewards(beta)) for beta in betas],
        notes=notes,
    )
