"""A trainer's evaluations on an engine: its weights are written, a bundle is refitted, its run's metrics are logged.

::

    training begins   policy, reference ──export──▶ bundle         traced, and compared with PyTorch, once
    each evaluation   policy ──refit──▶ bundle ──evaluate──▶ runs/step-000100/metrics.json ──▶ trainer.log

`trainer.evaluate()` is what is replaced, on this one trainer. So what a trainer makes of an evaluation stays as it is:
its log and those who listen to it, the best model, early stopping, schedulers that wait for a plateau.
"""

import logging
import math
import re
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, TypeVar, cast

from accelerate.utils import broadcast_object_list
from transformers import TrainerCallback

from dpo_fast.errors import DpoFastError, InterruptedRunError, UsageError
from dpo_fast.evaluate import EvaluateOptions, evaluate
from dpo_fast.export.exporter import ExportOptions, export
from dpo_fast.export.refit import RefitOptions, refit
from dpo_fast.files import make_folder, storage_errors
from dpo_fast.quiet import quiet
from dpo_fast.recipes import DEFAULT
from dpo_fast.run_folder import SKIPPED
from dpo_fast.text import reason_of
from dpo_fast.training.dpo_trainer import (
    check_trainer,
    find_trainer,
    in_evaluation,
    loss_settings,
    max_length,
    save_policy,
    save_reference,
)
from dpo_fast.types import Aggregate

logger = logging.getLogger(__name__)
Saved = TypeVar("Saved")
Result = TypeVar("Result")

SAVED = ".saved"  # in the output folder, a name of nobody else's: models that are written to be exported, and removed
COLUMNS = ("prompt", "chosen", "rejected", "tools", "chat_template_kwargs")  # of a data set, what is evaluated


class DPOFastCallback(TrainerCallback):  # type: ignore[misc]  # Transformers has no types
    """Evaluates on an engine instead of by `trainer.evaluate()`, for `trl.DPOTrainer`.

    ::

        DPOTrainer(…, callbacks=[DPOFastCallback("pairs.jsonl", every=200)]).train()

    The metrics have TRL's names, and by default TRL's values: means of batch means over the trainer's evaluation
    batches, with the trainer's own beta, losses and truncation. What differs: the engine computes as the recipe says
    (float32 by default), and not under the trainer's autocast; the router's loss of mixtures of experts is no part of
    `eval_loss`; rows that cannot be used are skipped, counted and listed in the run.

    The first process of a distributed training scores, and the others wait for it; TRL counts some rows twice there, to
    give each process as many, and here each counts once. The model that is trained stays in
    memory, and none of it is run: neither its mode nor its checkpointing nor the random numbers change.
    """

    def __init__(
        self,
        eval_dataset: "str | Path | Any | Mapping[str, Any] | None" = None,
        *,
        every: int | None = None,
        output: str | Path | None = None,
        recipe: str = DEFAULT,
        reference: str | None = None,
        base: str | None = None,
        aggregate: Aggregate = "trl",
        limit: int | None = None,
        on_error: Literal["warn", "raise"] = "warn",
        trust_remote_code: bool = False,
    ) -> None:
        """Nothing is done before the training begins.

        Args:
            eval_dataset: preference pairs: a file, a folder or a Hub id, a `datasets.Dataset`, or several of these by
                name; the trainer's own where None.
            every: steps between two evaluations, the last step being evaluated too; None leaves it to the trainer's
                `eval_strategy`, which `load_best_model_at_end` and early stopping need (and the trainer then needs an
                `eval_dataset` of its own).
            output: folder of the bundle and the runs; `dpo_fast` in the trainer's `output_dir` by default.
            recipe: what the evaluations run on; see `dpo-fast export --recipe`.
            reference: folder or Hub id of the reference, where the trainer no longer has it.
            base: an adapter's base model, where it is not what its adapter_config.json names.
            aggregate: "trl", or "exact" over all pairs, whatever the batches.
            limit: only the first rows.
            on_error: whether an evaluation that fails is a warning, or ends the training. What is wrong before the
                first step is raised in any case.
            trust_remote_code: whether the model's own Python code may be run.

        Raises:
            UsageError: a value that has no meaning.
        """
        if every is not None and every < 1:
            raise UsageError(f"DPOFastCallback(every={every}): must be at least 1 step")
        if on_error not in ("warn", "raise"):
            raise UsageError(f"DPOFastCallback(on_error={on_error!r}): choose 'warn' or 'raise'")
        self._eval_dataset, self._every, self._output = eval_dataset, every, output
        self._recipe, self._reference, self._base = recipe, reference, base
        self._options = EvaluateOptions(
            aggregate=aggregate, limit=limit, on_error="skip", trust_remote_code=trust_remote_code, overwrite=True
        )
        self._raises = on_error == "raise"
        self._trainer: Any = None
        self._evaluate_by_trainer: Callable[..., dict[str, float]]
        self._is_exported = False
        self._datasets: dict[str, str] = {}  # by name, as `evaluate` takes them; "" where there is but one

    # What Transformers calls.

    def on_init_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Take the trainer's evaluations over."""
        self._attach()

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Export the bundle, so that what cannot work fails before the first step and not after hours.

        Raises:
            UsageError: the trainer does something that the engine cannot, or there is nothing to evaluate, or never.
            DpoFastError: as `dpo_fast.export.exporter.export`.
        """
        self._attach()  # not done yet for a callback that came by `trainer.add_callback`
        if self._every is None and args.eval_strategy == "no":
            raise UsageError("DPOFastCallback never evaluates: say every=STEPS, or set the trainer's eval_strategy")
        self._export()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        """Ask for an evaluation where one is due."""
        if self._every is not None and (state.global_step % self._every == 0 or control.should_training_stop):
            control.should_evaluate = True
        return control

    # What it does.

    def _attach(self) -> None:
        """Put `self._evaluate` in the place of the calling trainer's `evaluate`."""
        trainer = find_trainer()
        if trainer is self._trainer:
            return
        self._trainer, self._is_exported = trainer, False
        self._evaluate_by_trainer = trainer.evaluate
        trainer.evaluate = self._evaluate

    def _evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """`Trainer.evaluate`, on the engine; the trainer's own for a data set that is handed to it.

        Returns:
            The metrics. After an evaluation that failed, and was but warned of, nothing, or NaN for the one that the
            trainer chooses the best model by: NaN is better than nothing that came before.
        """
        if eval_dataset is not None:
            return self._evaluate_by_trainer(eval_dataset, ignore_keys, metric_key_prefix)
        trainer = self._trainer
        self._export()
        try:
            metrics = self._together(self._save_policy, lambda policy: self._score(policy, metric_key_prefix))
        except InterruptedRunError as error:
            raise KeyboardInterrupt(str(error)) from error
        except Exception as error:  # whatever it was, the training is worth more
            if self._raises:
                raise
            logger.warning(
                "step %d was not evaluated; training goes on: %s", trainer.state.global_step, reason_of(error)
            )
            trainer.control.should_evaluate = False  # or the same step would be tried again as its epoch ends
            return self._nothing()
        with in_evaluation(trainer.model):
            trainer.log(metrics)
        trainer.control = trainer.callback_handler.on_evaluate(trainer.args, trainer.state, trainer.control, metrics)
        return metrics

    def _export(self) -> None:
        """Export the bundle from the policy and the reference as they are now, unless that is done."""
        if self._is_exported:
            return
        trainer = self._trainer
        check_trainer(trainer)
        options = ExportOptions(
            base=self._base,
            recipe=self._recipe,
            max_length=max_length(trainer),
            trust_remote_code=self._options.trust_remote_code,
            overwrite=True,
        )

        def save() -> tuple[Path, str]:
            policy = self._save_policy()
            return policy, self._reference or save_reference(trainer, policy.with_name("reference"))

        def export_bundle(saved: tuple[Path, str]) -> None:
            policy, reference = saved
            own = Path(reference).parent == policy.parent
            for remains in self._folder.glob(".bundle.*"):  # of a process that was killed
                shutil.rmtree(remains)
            self._datasets = self._write_datasets()
            # What was written a moment ago is removed below, so that its place on the disk can be the bundle's.
            export(str(policy), reference, self._folder / "bundle", replace(options, link=own), logger.info)
            shutil.rmtree(policy.parent)

        self._together(save, export_bundle)
        self._options = replace(
            self._options,
            loss=loss_settings(trainer),
            batch_size=trainer.args.eval_batch_size * trainer.args.world_size,
        )
        self._is_exported = True

    def _save_policy(self) -> Path:
        """Write the policy's weights as they are now, into a new folder; in every process."""
        saved = self._folder / SAVED
        if self._trainer.is_world_process_zero() and saved.exists():  # of a process that was killed
            shutil.rmtree(saved)
        save_policy(self._trainer, saved / "policy")
        return saved / "policy"

    def _score(self, policy: Path, prefix: str) -> dict[str, float]:
        """The metrics of the weights in a folder, which is removed."""
        began = time.perf_counter()
        bundle, step = self._folder / "bundle", self._trainer.state.global_step
        # The graph is the one that was compared with PyTorch; NaN in the weights is looked for each time.
        options = RefitOptions(self_check=False, link=True, trust_remote_code=self._options.trust_remote_code)
        refit(bundle, str(policy), None, options, logger.info)
        shutil.rmtree(policy.parent)
        logged: dict[str, float] = {}
        pairs = 0
        for name, dataset in self._datasets.items():
            suffix = name and f"-{re.sub(r'[^A-Za-z0-9.-]', '_', name)}"
            run = self._folder / "runs" / f"step-{step:06}{suffix}"
            metrics = evaluate(bundle, dataset, run, self._options, logger.warning)
            if skipped := metrics["counts"]["skipped"]:
                logger.warning("%d rows cannot be used; %s says why", skipped, run / SKIPPED)
            start = f"{prefix}_{name}" if name else prefix
            logged |= {
                f"{start}{key.removeprefix('eval')}": value for key, value in metrics.items() if key.startswith("eval_")
            }
            pairs += metrics["counts"]["pairs"]
        seconds = time.perf_counter() - began
        return {**logged, f"{prefix}_runtime": seconds, f"{prefix}_samples_per_second": pairs / seconds}

    def _together(self, save: Callable[[], Saved], then: Callable[[Saved], Result]) -> Result:
        """Do `save` in every process and `then` in the first, and return, or raise, in all what came of it.

        Raises:
            Exception: what the first process raised; in the others, as a `DpoFastError`.
        """
        result: Result | None = None
        failure: Exception | None = None
        try:
            saved = save()
            if self._trainer.is_world_process_zero():
                result = then(saved)
        except Exception as error:
            failure = error
        outcome: list[Any] = [result, None if failure is None else reason_of(failure)]
        broadcast_object_list(outcome)  # which does nothing where there is one process
        if failure is not None:
            raise failure
        if outcome[1] is not None:
            raise DpoFastError(f"the first process: {outcome[1]}")
        return cast("Result", outcome[0])

    def _write_datasets(self) -> dict[str, str]:
        """The data sets by name, each as a file, a folder or a Hub id.

        Raises:
            UsageError: there is none, or one of a kind that cannot be read more than once.
        """
        given = self._trainer.eval_dataset if self._eval_dataset is None else self._eval_dataset
        if given is None:
            raise UsageError("DPOFastCallback has nothing to evaluate: name an eval_dataset, here or of the trainer")
        datasets = given if isinstance(given, Mapping) else {"": given}
        return {name: self._write_dataset(str(number), value) for number, (name, value) in enumerate(datasets.items())}

    def _write_dataset(self, file: str, dataset: Any) -> str:
        """One data set as `evaluate` takes it; what is in memory is written beside the bundle."""
        from datasets import Dataset

        if isinstance(dataset, str | Path):
            return str(dataset)
        if not isinstance(dataset, Dataset):
            raise UsageError(
                f"DPOFastCallback evaluates files, Hub ids and datasets.Dataset, and was given {type(dataset).__name__}"
            )
        path = self._folder / "data" / f"{file}.parquet"
        make_folder(path.parent)
        with storage_errors(path), quiet():
            dataset.select_columns([name for name in COLUMNS if name in dataset.column_names]).to_parquet(path)
        return str(path)

    def _nothing(self) -> dict[str, float]:
        """The metrics of an evaluation that failed: NaN for what the trainer looks for, which is never better."""
        wanted = self._trainer.args.metric_for_best_model
        return {} if wanted is None else {f"eval_{wanted.removeprefix('eval_')}": math.nan}

    @property
    def _folder(self) -> Path:
        """Where the bundle and the runs lie."""
        return Path(self._trainer.args.output_dir, "dpo_fast") if self._output is None else Path(self._output)
