"""What a running `trl.DPOTrainer` trains, as files that can be exported: its policy, its reference, its loss."""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from transformers import Trainer

from dpo_fast.errors import UsageError
from dpo_fast.export.sizes import read_sizes
from dpo_fast.quiet import quiet
from dpo_fast.types import LossSettings


def find_trainer() -> Any:
    """The trainer that is calling: a callback is handed its model and its state, and not the trainer itself.

    Raises:
        UsageError: no trainer is calling, or none of DPO.
    """
    frame: FrameType | None = inspect.currentframe()
    while frame is not None:
        caller = frame.f_locals.get("self")
        if isinstance(caller, Trainer):
            if not hasattr(caller, "beta") or not hasattr(caller, "loss_types"):
                raise UsageError(f"DPOFastCallback evaluates trl.DPOTrainer, and this is a {type(caller).__name__}")
            return caller
        frame = frame.f_back
    raise UsageError("DPOFastCallback is called by a trainer alone: hand it to DPOTrainer(…, callbacks=[…])")


def check_trainer(trainer: Any) -> None:
    """Refuse trainers whose own evaluation says something that the engine does not.

    Raises:
        UsageError: this is one; the message says what to change.
    """
    if trainer.compute_metrics is not None:
        raise UsageError("compute_metrics needs the trainer's own predictions: leave it out, or DPOFastCallback")
    if trainer.args.sync_ref_model:
        raise UsageError("sync_ref_model changes the reference, and DPOFastCallback scores it once: leave one out")
    if trainer.args.max_length is not None and trainer.args.truncation_mode != "keep_start":
        raise UsageError(
            f"truncation_mode {trainer.args.truncation_mode!r}: DPOFastCallback truncates as 'keep_start' does"
        )


def loss_settings(trainer: Any) -> LossSettings:
    """The trainer's loss.

    Raises:
        UsageError: a value that has no meaning.
    """
    return LossSettings(
        beta=trainer.beta,
        loss_type=tuple(trainer.loss_types),
        loss_weights=tuple(trainer.loss_weights),
        label_smoothing=trainer.label_smoothing,
        ld_alpha=trainer.ld_alpha,
        f_divergence_type=str(trainer.f_divergence_type),
        f_alpha_divergence_coef=trainer.f_alpha_divergence_coef,
        use_weighting=trainer.use_weighting,
        discopop_tau=trainer.args.discopop_tau,
    )


def max_length(trainer: Any) -> int:
    """The trainer's truncation in tokens; where it does not truncate, the positions that the model has.

    Raises:
        UsageError: neither says how many.
    """
    limit = trainer.args.max_length
    if limit is None:
        limit = read_sizes(trainer.accelerator.unwrap_model(trainer.model).config).positions
    if limit is None:
        raise UsageError("DPOConfig(max_length=None), and the model has no largest position: say how many tokens")
    return int(limit)


def save_policy(trainer: Any, folder: Path) -> None:
    """Write the policy's weights as they are now, and its tokenizer, as the trainer writes a checkpoint's.

    Every process of a distributed training takes part, since each may hold a share of the weights; the first writes.
    """
    with quiet():
        trainer.save_model(str(folder), _internal_call=True)  # what a checkpoint is saved with: nothing is pushed


def save_reference(trainer: Any, folder: Path) -> str:
    """Write the trainer's reference; every process takes part, as in `save_policy`.

    Returns:
        What `dpo_fast.export` takes as the reference: the folder, or "base" where that is the model beneath the
        policy's adapter, which needs no writing.

    Raises:
        UsageError: the reference was the policy before its first step, and that is over.
    """
    if trainer.ref_model is not None:
        model = trainer.accelerator.unwrap_model(trainer.ref_model)
        weights = trainer.accelerator.get_state_dict(trainer.ref_model)
        with quiet():
            model.save_pretrained(folder, state_dict=weights, is_main_process=trainer.args.should_save)
    elif is_adapter(trainer):
        return "base"
    elif trainer.state.global_step == 0:  # with precompute_ref_log_probs TRL keeps no reference
        save_policy(trainer, folder)
    else:
        raise UsageError(
            "precompute_ref_log_probs keeps no reference, and the policy has been trained already: name what it was "
            "trained from, DPOFastCallback(…, reference='…')"
        )
    return str(folder)


def is_adapter(trainer: Any) -> bool:
    """Whether the policy is a PEFT model."""
    return hasattr(trainer.accelerator.unwrap_model(trainer.model), "peft_config")


@contextmanager
def in_evaluation(model: Any) -> Iterator[None]:
    """Within the block, the model is in evaluation mode: by that, trainers tell an evaluation's log from a step's."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
