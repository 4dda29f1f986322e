"""A self-test of every engine that runs here: a tiny random Llama exported, run, compared with PyTorch, and refitted.

It says whether an installation works, from export to log-probs. What a precision costs on a real model is for
`dpo-fast evaluate` to say.
"""

import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from dpo_fast.bundle import POLICY, open_bundle
from dpo_fast.engines import open_engine
from dpo_fast.errors import CheckFailedError, DpoFastError
from dpo_fast.export.probes import make_probes
from dpo_fast.quiet import quiet
from dpo_fast.recipes import load_recipe
from dpo_fast.scores import score_pairs
from dpo_fast.tensorrt.options import RTX_TARGETS, BuildOptions
from dpo_fast.token_table import make_table
from dpo_fast.types import Float32Array, TokenizedPair

MAX_LENGTH = 128  # tokens
# By precision, the mean error of a token's log-prob that rounding explains, in nats, and why.
LIMITS: dict[str, tuple[float, str]] = {
    "fp32": (1e-4, "float32: two orders of summation differ by some 1e-6 nats on a model of two layers"),
    "fp16": (0.01, "float16 rounds to 2^-12 of a number, in two layers and of logits of several units"),
    "bf16": (0.1, "bfloat16 rounds to 2^-9 of a number, in two layers and of logits of several units"),
    "int8": (0.3, "8 bits: levels lie at 0.8 % of the largest number of a row or a column"),
    "int4": (1.2, "4 bits: levels lie at a seventh of the largest number of a block"),
    "fp8": (0.8, "float8 (e4m3) rounds to 2^-4 of a number"),
}
LARGEST = 10  # times the limit of the mean: the largest error of some two hundred tokens


@dataclass(slots=True)
class Step:
    """A step of a self-test.

    Attributes:
        name: "export", "run", "refit" or "run refitted".
        seconds: how long it took.
        mean, largest: error of a token's log-prob against PyTorch in nats, of the steps that run.
    """

    name: str
    seconds: float = 0.0
    mean: float | None = None
    largest: float | None = None


@dataclass(slots=True)
class Outcome:
    """A recipe's self-test.

    Attributes:
        recipe: its name.
        passed: whether all that can be done here was done, and right.
        ran: whether the engine ran; where it cannot, its plans were built only.
        engine: what computed, with its version.
        limit: of the mean error, in nats a token.
        reason: for the limit.
        steps: those that were begun, in order.
        error: why it did not pass, in one line.
    """

    recipe: str
    passed: bool = False
    ran: bool = False
    engine: str | None = None
    limit: float | None = None
    reason: str | None = None
    steps: list[Step] = field(default_factory=list)
    error: str | None = None


@dataclass(frozen=True, slots=True)
class _Checkpoint:
    """A checkpoint's folder, and what PyTorch says of the pairs: the log-probs of all completions, nats."""

    folder: Path
    log_probs: Float32Array


def self_test(
    verdicts: Sequence[Mapping[str, Any]], report: Callable[[str], None] = lambda step: None
) -> list[dict[str, Any]]:
    """Test every recipe that can be run or built here; a failure is kept, and the others go on.

    Args:
        verdicts: of `dpo_fast.doctor.examine`.
        report: called with a line at each step.

    Returns:
        An `Outcome` for each recipe tested, for JSON.
    """
    possible = [verdict for verdict in verdicts if verdict["can_run"] or verdict["can_build"]]
    if not possible:
        return []
    with tempfile.TemporaryDirectory(prefix="dpo-fast-") as name:
        folder = Path(name)
        report("making two tiny checkpoints")
        with quiet():
            pairs, checkpoints, calibration = _make_models(folder)
        outcomes = [
            try_recipe(
                verdict["recipe"], folder, pairs, checkpoints, calibration, can_run=verdict["can_run"], report=report
            )
            for verdict in possible
        ]
    return [asdict(outcome) for outcome in outcomes]


def try_recipe(
    name: str,
    folder: Path,
    pairs: list[TokenizedPair],
    checkpoints: tuple[_Checkpoint, _Checkpoint],
    calibration: Path,
    *,
    can_run: bool,
    report: Callable[[str], None] = lambda step: None,
) -> Outcome:
    """Export a checkpoint with a recipe, run it, put the other checkpoint in, and run that.

    Args:
        name: of a shipped recipe, or a file.
        folder: where the bundle goes.
        pairs: what is scored.
        checkpoints: the first and the second.
        calibration: a data set, for recipes that want one.
        can_run: whether the engine runs here; if not, its plans are built only.
        report: called with a line at each step.
    """
    outcome = Outcome(name)
    try:
        from dpo_fast.export.exporter import ExportOptions, export
        from dpo_fast.export.refit import RefitOptions, refit

        recipe = load_recipe(name)
        outcome.limit, outcome.reason = LIMITS[recipe.precision]
        needed = str(calibration) if recipe.precision == "fp8" else None
        # For one kind of GPU: where none is, building for all of them would say no more.
        build = BuildOptions(targets=RTX_TARGETS[:1] if recipe.engine == "tensorrt-rtx" and not can_run else ())
        first, second = checkpoints
        bundle = folder / Path(name).stem
        with _step(outcome, "export", report):
            options = ExportOptions(recipe=name, max_length=MAX_LENGTH, calibration=needed, build=build)
            export(str(first.folder), None, bundle, options)
        if can_run:
            _run(outcome, "run", bundle, pairs, first, report)
        elif open_bundle(bundle).manifest.models[POLICY].plan is None:
            raise CheckFailedError("no plans were built, though the package to build them is there")
        with _step(outcome, "refit", report):
            refit(bundle, str(second.folder), None, RefitOptions(calibration=needed))
        if can_run:
            _run(outcome, "run refitted", bundle, pairs, second, report)
            outcome.ran = True
        outcome.passed = True
    except DpoFastError as error:
        outcome.error = " ".join(str(error).split())
    except Exception as error:  # any other is a fault too, of this package or of one that it uses
        outcome.error = " ".join(f"{type(error).__name__}: {error}".split())[:300]
    report(f"{name}: {'passed' if outcome.passed else outcome.error}")
    return outcome


@contextmanager
def _step(outcome: Outcome, name: str, report: Callable[[str], None]) -> Iterator[Step]:
    """A step that is timed, and kept even if it fails."""
    report(f"{outcome.recipe}: {name}")
    step = Step(name)
    outcome.steps.append(step)
    start = time.perf_counter()
    try:
        yield step
    finally:
        step.seconds = round(time.perf_counter() - start, 3)


def _run(
    outcome: Outcome,
    name: str,
    bundle: Path,
    pairs: list[TokenizedPair],
    checkpoint: _Checkpoint,
    report: Callable[[str], None],
) -> None:
    """Score the pairs on the recipe's engine, and compare with PyTorch.

    Raises:
        CheckFailedError: the errors are more than rounding.
    """
    with _step(outcome, name, report) as step:
        opened = open_bundle(bundle)
        engine = open_engine(opened, POLICY)
        outcome.engine = engine.name
        layout = opened.manifest.models[POLICY].layout
        budget = opened.manifest.recipe["token_budget"]
        scored = score_pairs(make_table(pairs), engine, layout=layout, token_budget=budget)
        found = np.concatenate([scored.chosen.log_probs, scored.rejected.log_probs])
        error = np.abs(found.astype(np.float64) - checkpoint.log_probs)
        step.mean, step.largest = float(error.mean()), float(error.max())
    assert outcome.limit is not None
    if not (step.mean <= outcome.limit and step.largest <= LARGEST * outcome.limit):
        raise CheckFailedError(
            f"{name}: log-probs are off from PyTorch's by {step.mean:.2g} nats a token in the mean and "
            f"{step.largest:.2g} at most (limits {outcome.limit:g} and {LARGEST * outcome.limit:g})"
        )


def _make_models(folder: Path) -> tuple[list[TokenizedPair], tuple[_Checkpoint, _Checkpoint], Path]:
    """Two tiny Llamas of one architecture and other weights, a tokenizer, the pairs, and a data set to calibrate on."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    from dpo_fast.demo_data import make_pairs, write_jsonl

    rows, _ = make_pairs(12, 0)
    calibration = folder / "calibration.jsonl"
    write_jsonl(rows, calibration)
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator([row["prompt"] + row["chosen"] for row in rows], trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|end|>")  # noqa: S106
    config = LlamaConfig(
        vocab_size=384,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=None,
    )
    pairs = make_probes(config.vocab_size, positions=MAX_LENGTH)
    checkpoints = []
    for seed, name in enumerate(("first", "second")):
        generator = torch.Generator().manual_seed(seed)
        model = LlamaForCausalLM(config).eval()
        with torch.no_grad():
            # Wide enough that the models have opinions: a fresh model's log-probs are all near log(1 / vocabulary),
            # and would be near those of any other.
            for parameter in model.parameters():
                if parameter.dim() > 1:
                    parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
        checkpoints.append(_Checkpoint(folder / name, _plain_log_probs(model, pairs)))
    return pairs, (checkpoints[0], checkpoints[1]), calibration


def _plain_log_probs(model: Any, pairs: list[TokenizedPair]) -> Float32Array:
    """PyTorch's log-probs of all chosen completions, then of all rejected ones, one sequence at a time."""
    import torch

    found = []
    with torch.inference_mode():
        for branch in ("chosen_ids", "rejected_ids"):
            for pair in pairs:
                tokens = getattr(pair, branch)
                # The state at t predicts token t + 1: the prompt's last predicts the completion's first.
                logits = model(input_ids=torch.tensor([pair.prompt_ids + tokens]), use_cache=False).logits
                log_probs = logits[0, len(pair.prompt_ids) - 1 : -1].double().log_softmax(-1)
                found.append(log_probs.gather(1, torch.tensor(tokens)[:, None])[:, 0])
    values: Float32Array = torch.cat(found).float().numpy()
    return values
