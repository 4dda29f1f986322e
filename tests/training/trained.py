"""Real trainings by `trl.DPOTrainer`, of tiny models, for the tests of what goes on during one."""

import json
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

trl = pytest.importorskip("trl")

STEPS, EVERY = 5, 2  # evaluated at 2, 4 and, because it is the last, 5
BATCH = 4
MAX_LENGTH = 48  # cuts the longest completions off

PROMPTS = ["What colour is the sky today?", "Write a letter.", "How do I print a sum?", "Is it raining in Spain?", "Hi"]
ANSWERS = [
    " The sky is blue, and so is the sea.", " With understanding.", " print(add(1, 2))", " Yes.",
    " The weather is the weather, whether you like it or not.", " Mainly in the plain; the rain stays.",
    " I do not know that, and nobody else does: ask again tomorrow, when the weather is better.",
]  # fmt: skip
# 14 pairs, so that the last batch of an evaluation is smaller than the others.
ROWS = [
    {"prompt": PROMPTS[i % 5], "chosen": ANSWERS[3 * i % 7], "rejected": ANSWERS[(3 * i + 1 + i % 4) % 7]}
    for i in range(14)
]  # fmt: skip


def write_pairs(path: Path, rows: list[dict[str, str]] = ROWS) -> Path:
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    return path


class Training(NamedTuple):
    """A finished training, evaluated by the callback and by TRL at each of its checkpoints.

    Attributes:
        trainer: after it.
        folder: the trainer's output_dir, with `checkpoint-STEP` and the callback's `dpo_fast`.
        pairs: the file of the data set.
        trls: TRL's own metrics, by step.
        modes: whether the model was in training mode after each evaluation.
    """

    trainer: Any
    folder: Path
    pairs: Path
    trls: dict[int, dict[str, float]]
    modes: list[bool]


class TrlsOwn(TrainerCallback):
    """After each evaluation, TRL's own of the same weights; what it logs is kept out of the trainer's log."""

    def __init__(self) -> None:
        self.trainer: Any = None
        self.metrics: dict[int, dict[str, float]] = {}
        self.modes: list[bool] = []

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step in self.metrics:  # its own
            return
        self.modes.append(self.trainer.model.training)
        self.metrics[state.global_step] = {}
        logged = len(state.log_history)
        self.metrics[state.global_step] = trl.DPOTrainer.evaluate(self.trainer)
        del state.log_history[logged:]


def make_trainer(
    policy: Path, reference: Path | None, output: Path, callbacks: list[Any], *, adapter: Any = None, **arguments: Any
) -> Any:
    """A trainer of a policy; `arguments` are the trainer's own, or those of its configuration."""
    data = Dataset.from_list(ROWS)
    of_trainer = {name: arguments.pop(name) for name in ("eval_dataset", "compute_metrics") if name in arguments}
    settings = {
        "output_dir": str(output), "report_to": "none", "use_cpu": True, "bf16": False, "disable_tqdm": True,
        "gradient_checkpointing": False, "per_device_train_batch_size": 4, "per_device_eval_batch_size": BATCH,
        "max_length": MAX_LENGTH, "max_steps": STEPS, "learning_rate": 1e-3, "beta": 0.2, "logging_steps": 3,
        "save_strategy": "no", "dataloader_pin_memory": False,
    } | arguments  # fmt: skip
    return trl.DPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(policy),
        ref_model=None if reference is None else AutoModelForCausalLM.from_pretrained(reference),
        args=trl.DPOConfig(**settings),
        train_dataset=data,
        processing_class=AutoTokenizer.from_pretrained(policy),
        callbacks=callbacks,
        peft_config=adapter,
        **{"eval_dataset": data} | of_trainer,
    )
