"""A finished run's pairs, as the figures and the table take them: one reward a completion."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dpo_fast.errors import UsageError
from dpo_fast.metrics.rewards import Branch, reduce_pairs
from dpo_fast.metrics.sums import concatenate, sum_tokens
from dpo_fast.rescore import open_run
from dpo_fast.run_folder import open_scores
from dpo_fast.types import Float64Array, LossSettings, PairSums


@dataclass(frozen=True, slots=True)
class RunPairs:
    """The P pairs of a run, in the data set's order.

    Attributes:
        metrics: the content of metrics.json.
        settings: the loss that the run was evaluated with.
        sums: the pairs' lengths, groups and sums of log-probs.
        chosen, rejected: the two completions, reduced as `settings` has it.
    """

    metrics: dict[str, Any]
    settings: LossSettings
    sums: PairSums
    chosen: Branch
    rejected: Branch

    @property
    def has_reference(self) -> bool:
        """Whether rewards are log-ratios, and not scores of the policy alone."""
        return self.sums.reference_chosen is not None and self.settings.reference_free is None

    @property
    def chosen_rewards(self) -> Float64Array:
        """(P,) float64: see `Branch.rewards`."""
        return self.chosen.rewards(self.settings.beta)

    @property
    def rejected_rewards(self) -> Float64Array:
        """(P,) float64: see `Branch.rewards`."""
        return self.rejected.rewards(self.settings.beta)

    @property
    def margins(self) -> Float64Array:
        """(P,) float64: the chosen completion's reward less the rejected one's."""
        return self.chosen_rewards - self.rejected_rewards


def read_pairs(run: Path) -> RunPairs:
    """Read a finished run; a part's tokens are kept no longer than it takes to add them up.

    Args:
        run: what `dpo-fast evaluate` wrote.

    Raises:
        UsageError: it is no finished run, or holds no pairs.
        StorageError: it is damaged.
        EngineOutputError: a score is NaN or infinite.
    """
    metrics, settings = open_run(run)
    sums = concatenate([sum_tokens(part) for part in open_scores(run).read()])
    if not len(sums.rows):
        raise UsageError(f"{run}: holds no pairs; evaluate again")
    chosen, rejected = reduce_pairs(sums, settings)
    return RunPairs(metrics, settings, sums, chosen, rejected)
