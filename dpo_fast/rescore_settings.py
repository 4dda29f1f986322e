"""What `dpo-fast rescore` computes: each loss at each beta, from lists as a command line has them."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from dpo_fast.errors import UsageError
from dpo_fast.types import F_DIVERGENCE_LOSSES, LOSS_TYPES, SORTING_LOSSES, LossSettings

ALL = "all"
EXO_PAIR_SMOOTHING = 1e-3  # recommended by EXO's paper (arXiv:2402.00856) for labels that carry no probability


def make_settings(
    own: LossSettings, betas: Sequence[str] = (), loss_types: Sequence[str] = (), **changes: Any
) -> tuple[list[LossSettings], list[str]]:
    """The settings that a command line asks for: each loss at each beta.

    Args:
        own: what the run was evaluated with; what is not said otherwise stays so.
        betas: numbers, also several in one text with commas between them; none takes the run's.
        loss_types: names likewise, or `all`; none takes the run's loss. With `all` the losses that do not go with the
            other settings are left out, and exo_pair, which needs label smoothing, gets 1e-3 if there is none.
        changes: other fields of `LossSettings`; None takes the run's, but for `reference_free`: that there shall be no
            reference is always said.

    Returns:
        The settings, and what a reader of the results must know of them, a line each.

    Raises:
        UsageError: a value or a combination cannot be used.
    """
    common = asdict(own) | {name: value for name, value in changes.items() if value is not None}
    common |= {"reference_free": changes.get("reference_free")}
    names = _split(loss_types, "--loss-type", "sigmoid,ipo")
    of_losses: list[dict[str, Any]] = [{"loss_type": (name,), "loss_weights": None} for name in names] or [{}]
    notes: list[str] = []
    if ALL in names:
        LossSettings(**common | {"loss_type": ("sigmoid",), "loss_weights": None})  # goes with whatever goes with any
        of_losses = _all_losses(common, notes)
    values = [_number(text) for text in _split(betas, "--beta", "0.1,0.5")] or [own.beta]
    settings = [
        LossSettings(**common | {"beta": beta} | of_loss) for beta in dict.fromkeys(values) for of_loss in of_losses
    ]
    return settings, notes


def _all_losses(common: dict[str, Any], notes: list[str]) -> list[dict[str, Any]]:
    """What sets each loss apart from the common settings; says in `notes` what is left out, and what is not common."""
    smoothing, divergence = common["label_smoothing"], common["f_divergence_type"]
    refused: dict[str, frozenset[str]] = {}
    if divergence != "reverse_kl":
        refused[f"--f-divergence-type {divergence}"] = frozenset(LOSS_TYPES) - F_DIVERGENCE_LOSSES
    if common["use_weighting"]:
        refused["--use-weighting"] = SORTING_LOSSES
    if smoothing >= 0.5:
        refused[f"--label-smoothing {smoothing:g}"] = frozenset({"robust"})
    for reason, refused_names in refused.items():
        in_order = ", ".join(name for name in LOSS_TYPES if name in refused_names)
        notes.append(f"left out, as TRL refuses them with {reason}: {in_order}")
    names = [name for name in LOSS_TYPES if not any(name in each for each in refused.values())]
    losses: list[dict[str, Any]] = [{"loss_type": (name,), "loss_weights": None} for name in names]
    if "exo_pair" in names and smoothing == 0:
        losses[names.index("exo_pair")]["label_smoothing"] = EXO_PAIR_SMOOTHING
        notes.append(f"exo_pair has a label smoothing of {EXO_PAIR_SMOOTHING:g}: it needs one, and its paper says so")
    return losses


def _split(texts: Sequence[str], option: str, example: str) -> list[str]:
    """The elements of lists with commas, each once."""
    elements = [element.strip() for text in texts for element in text.split(",")]
    if "" in elements:
        raise UsageError(f"{option} {','.join(texts)!r} has an empty element; write {option} {example}")
    return list(dict.fromkeys(elements))


def _number(text: str) -> float:
    """A beta; whether it can be one is for `LossSettings` to say."""
    try:
        return float(text)
    except ValueError as error:
        raise UsageError(f"--beta {text!r} is not a number; write --beta 0.1,0.5") from error
