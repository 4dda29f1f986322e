"""What a person is shown of a comparison, in the terminal and on the page: rows of text."""

from dataclasses import dataclass
from typing import Any

from dpo_fast.compare.compare import ACCURACY, MEANS
from dpo_fast.table import ROWS

LEVEL = 0.05  # of a corrected p-value, below which a difference is marked


@dataclass(frozen=True, slots=True)
class RunRow:
    """A run's own numbers."""

    name: str
    accuracy: str
    interval: str
    means: tuple[str, ...]  # in the order of `MEANS`


@dataclass(frozen=True, slots=True)
class DifferenceRow:
    """A difference of two runs in one metric."""

    metric: str
    difference: str
    interval: str
    p: str
    p_holm: str
    significant: bool


@dataclass(frozen=True, slots=True)
class SubsetRow:
    """A difference of two runs in one subset: of the accuracy and of the margin."""

    subset: str
    pairs: str
    accuracy: DifferenceRow
    margin: DifferenceRow


@dataclass(frozen=True, slots=True)
class Comparison:
    """All differences of two runs."""

    run: str
    against: str
    changed: str
    differences: list[DifferenceRow]
    subsets: list[SubsetRow]


def runs_of(result: dict[str, Any]) -> list[RunRow]:
    """Each run's own numbers over all pairs."""
    return [
        RunRow(
            run["name"],
            f"{run[ACCURACY]:.4f}",
            _interval(run["interval"], sign=""),
            tuple("" if run[metric] is None else f"{run[metric]:.4f}" for metric in MEANS),
        )
        for run in result["runs"]
    ]


def comparisons_of(result: dict[str, Any]) -> list[Comparison]:
    """All differences, comparison by comparison."""
    found = []
    for number, comparison in enumerate(result["comparisons"]):
        of_subsets = {
            name: (subset["pairs"], subset["comparisons"][number]) for name, subset in result.get("subsets", {}).items()
        }
        accuracy = comparison[ACCURACY]
        found.append(
            Comparison(
                comparison["run"],
                comparison["against"],
                f"{accuracy['gained']:,} pairs became right, {accuracy['lost']:,} wrong; a change of "
                f"{accuracy['detectable']:.4f} in accuracy would show with 80 % power",
                [_difference(comparison, metric) for metric in (ACCURACY, *MEANS) if metric in comparison],
                [
                    SubsetRow(name, f"{pairs:,}", _difference(each, ACCURACY), _difference(each, MEANS[0]))
                    for name, (pairs, each) in of_subsets.items()
                ],
            )
        )
    return found


def settings_of(result: dict[str, Any]) -> str:
    """The setting that all runs are compared at, in a few words."""
    settings = result["settings"]
    free = "" if settings["reference_free"] is None else f", reference-free {settings['reference_free']}"
    return f"{' + '.join(settings['loss_type'])}, beta {settings['beta']:g}{free}"


def tests_of(result: dict[str, Any]) -> str:
    """What was tested, and what it was corrected for."""
    provenance = result["provenance"]
    return (
        f"Accuracy: McNemar's exact test, Tango's interval. Means: paired bootstrap, {provenance['resamples']:,} "
        f"resamples, seed {provenance['bootstrap_seed']}. Holm's correction over each metric's comparisons, and apart "
        f"from them over each metric's comparisons in all subsets. Bold: p (Holm) below {LEVEL:g}."
    )


def _difference(comparison: dict[str, Any], metric: str) -> DifferenceRow:
    test = comparison[metric]
    p_holm = test["p_holm"]
    return DifferenceRow(
        metric=dict(ROWS)[metric],
        difference=f"{test['difference']:+.4f}",
        interval=_interval(test["interval"], sign="+"),
        p=_p_value(test["p"]),
        p_holm=_p_value(p_holm),
        significant=p_holm is not None and p_holm < LEVEL,
    )


def _interval(interval: list[float] | None, *, sign: str) -> str:
    return "too few pairs" if interval is None else f"{interval[0]:{sign}.4f} … {interval[1]:{sign}.4f}"


def _p_value(p: float | None) -> str:
    if p is None:
        return ""
    return f"{p:.3f}" if p >= 0.001 else f"{p:.2g}"
