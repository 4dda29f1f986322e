"""The values that travel from one room to the next: rows -> tokens -> scores -> metrics.

Nothing here computes; shapes use P (pairs), C (scored completion tokens of one branch, all pairs together) and
N (scored tokens of one batch). Logs are natural: log-probs and entropies are in nats.
"""

from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from dpo_fast.errors import UsageError

Message = dict[str, Any]
Text = str | list[Message]
Int64Array = NDArray[np.int64]
Float32Array = NDArray[np.float32]
Float64Array = NDArray[np.float64]

LossType = Literal[
    "sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot", "aot_unpaired",
    "apo_zero", "apo_down", "discopop", "sft", "sigmoid_norm",
]  # fmt: skip
LOSS_TYPES: tuple[str, ...] = get_args(LossType)
FDivergence = Literal["reverse_kl", "forward_kl", "js_divergence", "alpha_divergence"]
F_DIVERGENCES: tuple[str, ...] = get_args(FDivergence)
ReferenceFree = Literal["sum", "average", "norm"]
REFERENCE_FREE: tuple[str, ...] = get_args(ReferenceFree)
Aggregate = Literal["exact", "trl"]
AGGREGATES: tuple[str, ...] = get_args(Aggregate)
OnError = Literal["stop", "skip"]

# The losses built on the difference of the two rewards, in which an f-divergence's partition term cancels; TRL
# (trl/trainer/dpo_trainer.py, `f_divergence_loss_types`) rejects the others with anything but reverse_kl.
F_DIVERGENCE_LOSSES = frozenset({"sigmoid", "sigmoid_norm", "hinge", "ipo", "exo_pair", "robust", "discopop", "sft"})
SORTING_LOSSES = frozenset({"aot", "aot_unpaired"})


@dataclass(frozen=True, slots=True)
class PreferenceRow:
    """One preference as its data set has it: a prompt, and two completions of it, text or messages.

    Attributes:
        row: 1-based number of the row in the data set.
        tools: tool schemas for the chat template, or None.
        chat_template_kwargs: further arguments of the chat template.
        group: the value of the `--group-by` column as text, or None.
    """

    row: int
    prompt: Text
    chosen: Text
    rejected: Text
    tools: list[Any] | None = None
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)
    group: str | None = None


@dataclass(frozen=True, slots=True)
class SkippedRow:
    """A row that could not be used, and why."""

    row: int
    reason: str


@dataclass(frozen=True, slots=True)
class TokenizedPair:
    """One preference as token ids, after truncation: what TRL's collator would put into a batch.

    Attributes:
        row: 1-based number of the row in the data set.
        prompt_ids: the tokens that both completions follow; may be empty where tokens merge across the boundary.
        chosen_ids: the chosen completion's tokens, end-of-sequence included.
        rejected_ids: the rejected completion's tokens, end-of-sequence included.
        truncated: whether `max_length` cut tokens off either completion.
        group: the value of the `--group-by` column as text, or None.
    """

    row: int
    prompt_ids: list[int]
    chosen_ids: list[int]
    rejected_ids: list[int]
    truncated: bool = False
    group: str | None = None


@dataclass(frozen=True, slots=True)
class TokenScores:
    """What an engine says of N scored tokens (the graph contract's outputs).

    Attributes:
        log_prob: (N,) float32, nats: log p(target | what precedes it).
        entropy: (N,) float32, nats, of the distribution that predicts the target.
        mean_logit: (N,) float32: mean of the logits over the vocabulary.
        is_top1: (N,) float32, 0 or 1: the target is the first of the largest logits.
        log_sum_sq_prob: (N,) float32, nats: log of the sum over the vocabulary of p^2.
    """

    log_prob: Float32Array
    entropy: Float32Array
    mean_logit: Float32Array
    is_top1: Float32Array
    log_sum_sq_prob: Float32Array


@dataclass(frozen=True, slots=True)
class CompletionScores:
    """One model's scores of one branch (chosen or rejected) of P pairs.

    A completion's first token is scored only if something precedes it, so `lengths` counts one token fewer than the
    completion has where the prompt is empty.

    Attributes:
        log_probs: (C,) float32, nats; the completions' tokens one completion after another.
        lengths: (P,) int64, scored tokens of each completion; their sum is C.
        entropy: (P,) float64, nats, summed over the completion's scored tokens.
        mean_logit: (P,) float64, the tokens' mean logits, summed over the completion's scored tokens.
        top1: (P,) int64, how many scored tokens are the model's first choice.
        log_sum_sq_prob: (P,) float64, nats, summed over the completion's scored tokens.
    """

    log_probs: Float32Array
    lengths: Int64Array
    entropy: Float64Array
    mean_logit: Float64Array
    top1: Int64Array
    log_sum_sq_prob: Float64Array


@dataclass(frozen=True, slots=True)
class PairScores:
    """Everything that metrics are computed from, for P pairs in the data set's order.

    Attributes:
        rows: (P,) int64, 1-based row numbers in the data set.
        prompt_lengths: (P,) int64 tokens.
        chosen_lengths: (P,) int64 tokens of the chosen completion, scored or not.
        rejected_lengths: (P,) int64 tokens of the rejected completion, scored or not.
        truncated: (P,) bool.
        groups: one text a pair, or None without `--group-by`.
        policy_chosen, policy_rejected: the policy's scores.
        reference_chosen, reference_rejected: the reference's scores, both None when there is no reference.
    """

    rows: Int64Array
    prompt_lengths: Int64Array
    chosen_lengths: Int64Array
    rejected_lengths: Int64Array
    truncated: NDArray[np.bool_]
    groups: list[str] | None
    policy_chosen: CompletionScores
    policy_rejected: CompletionScores
    reference_chosen: CompletionScores | None
    reference_rejected: CompletionScores | None


@dataclass(frozen=True, slots=True)
class CompletionSums:
    """`CompletionScores` without its tokens: sums that every metric and every setting can be computed from.

    Sums over log-probs are parted where LD-DPO weighs tokens differently: column 0 is over the tokens up to the length
    of the pair's shorter completion, column 1 over those beyond it (of which one completion of a pair has none).

    Attributes:
        lengths: (P,) int64, scored tokens of each completion.
        log_probs: (P, 2) float64, nats: sums of the tokens' log-probs.
        squares: (P, 2) float64, nats squared: sums of the squared log-probs.
        entropy: (P,) float64, nats, summed over the completion's scored tokens.
        mean_logit: (P,) float64, the tokens' mean logits, summed over the completion's scored tokens.
        top1: (P,) int64, how many scored tokens are the model's first choice.
        log_sum_sq_prob: (P,) float64, nats, summed over the completion's scored tokens.
    """

    lengths: Int64Array
    log_probs: Float64Array
    squares: Float64Array
    entropy: Float64Array
    mean_logit: Float64Array
    top1: Int64Array
    log_sum_sq_prob: Float64Array


@dataclass(frozen=True, slots=True)
class PairSums:
    """`PairScores` without its tokens: some 320 bytes a pair, however long its completions are.

    Attributes:
        rows: (P,) int64, 1-based row numbers in the data set.
        prompt_lengths: (P,) int64 tokens.
        chosen_lengths: (P,) int64 tokens of the chosen completion, scored or not.
        rejected_lengths: (P,) int64 tokens of the rejected completion, scored or not.
        truncated: (P,) bool.
        groups: one text a pair, or None without `--group-by`.
        policy_chosen, policy_rejected: the policy's sums.
        reference_chosen, reference_rejected: the reference's sums, both None when there is no reference.
    """

    rows: Int64Array
    prompt_lengths: Int64Array
    chosen_lengths: Int64Array
    rejected_lengths: Int64Array
    truncated: NDArray[np.bool_]
    groups: list[str] | None
    policy_chosen: CompletionSums
    policy_rejected: CompletionSums
    reference_chosen: CompletionSums | None
    reference_rejected: CompletionSums | None


@dataclass(frozen=True, slots=True)
class LossSettings:
    """The loss and its parameters, with TRL's names and defaults (`trl.DPOConfig`).

    Attributes:
        beta: strength of the reference, dimensionless; tau for ipo.
        loss_type: one loss or several, summed with `loss_weights` (MPO, arXiv:2411.10442).
        loss_weights: one weight a loss; all 1 when None.
        label_smoothing: probability that a label is flipped (robust), epsilon (exo_pair), smoothing (aot).
        ld_alpha: weight of the tokens beyond the shorter completion's length (LD-DPO, arXiv:2409.06411), or None.
        f_divergence_type: f-DPO's regulariser (arXiv:2309.16240).
        f_alpha_divergence_coef: alpha of the alpha-divergence.
        use_weighting: weight each pair by the policy's length-normalised probabilities (WPO, arXiv:2406.11827).
        discopop_tau: temperature of discopop's blend.
        reference_free: score without a reference, by the sum or average of log-probs (or RewardBench's norm);
            None uses the reference.

    Raises:
        UsageError: a value or a combination that TRL refuses too, or that has no meaning.
    """

    beta: float = 0.1
    loss_type: tuple[str, ...] = ("sigmoid",)
    loss_weights: tuple[float, ...] | None = None
    label_smoothing: float = 0.0
    ld_alpha: float | None = None
    f_divergence_type: str = "reverse_kl"
    f_alpha_divergence_coef: float = 0.5
    use_weighting: bool = False
    discopop_tau: float = 0.05
    reference_free: str | None = None

    def __post_init__(self) -> None:
        """Refuse what cannot be computed; see the class."""
        for name in self.loss_type:
            if name not in LOSS_TYPES:
                raise UsageError(f"--loss-type {name!r} is not known; choose from {', '.join(LOSS_TYPES)}")
        if not self.loss_type:
            raise UsageError(f"no loss type given; choose from {', '.join(LOSS_TYPES)}")
        if not (np.isfinite(self.beta) and self.beta > 0):
            raise UsageError(f"--beta {self.beta} must be a positive number")
        if not all(np.isfinite(weight) for weight in self.loss_weights or ()):
            raise UsageError(f"--loss-weight {self.loss_weights} must be finite numbers")
        if not np.isfinite(self.f_alpha_divergence_coef):
            raise UsageError(f"--f-alpha-divergence-coef {self.f_alpha_divergence_coef} must be a finite number")
        if self.loss_weights is not None and len(self.loss_weights) != len(self.loss_type):
            raise UsageError(
                f"{len(self.loss_weights)} --loss-weight for {len(self.loss_type)} --loss-type; give one for each"
            )
        if not 0 <= self.label_smoothing < 1:
            raise UsageError(f"--label-smoothing {self.label_smoothing} must be in [0, 1)")
        if "robust" in self.loss_type and not self.label_smoothing < 0.5:
            raise UsageError(f"--label-smoothing {self.label_smoothing} must be below 0.5 for the robust loss")
        if "exo_pair" in self.loss_type and self.label_smoothing == 0:
            raise UsageError("the exo_pair loss needs --label-smoothing above 0; its paper recommends 1e-3")
        if self.ld_alpha is not None and not 0 <= self.ld_alpha <= 1:
            raise UsageError(f"--ld-alpha {self.ld_alpha} must be in [0, 1]")
        if self.f_divergence_type not in F_DIVERGENCES:
            raise UsageError(
                f"--f-divergence-type {self.f_divergence_type!r} is not known; choose from {', '.join(F_DIVERGENCES)}"
            )
        unsupported = [name for name in self.loss_type if name not in F_DIVERGENCE_LOSSES]
        if self.f_divergence_type != "reverse_kl" and unsupported:
            raise UsageError(
                f"--f-divergence-type {self.f_divergence_type} has no meaning for {', '.join(unsupported)}; "
                f"it goes with {', '.join(sorted(F_DIVERGENCE_LOSSES))}"
            )
        if self.use_weighting and SORTING_LOSSES.intersection(self.loss_type):
            raise UsageError("--use-weighting weighs pairs, which aot and aot_unpaired take apart by sorting")
        if not (np.isfinite(self.discopop_tau) and self.discopop_tau > 0):
            raise UsageError(f"--discopop-tau {self.discopop_tau} must be a positive number")
        if self.reference_free is not None and self.reference_free not in REFERENCE_FREE:
            raise UsageError(
                f"--reference-free {self.reference_free!r} is not known; choose from {', '.join(REFERENCE_FREE)}"
            )
