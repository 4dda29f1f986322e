"""Families exported with a recipe, run on its engine, and compared with PyTorch run plainly: one sequence a row.

How far an engine may be off is measured, not guessed: PyTorch itself, run plainly in the recipe's precision, is off by
its rounding; an engine that is off by several times that computes something else.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from dpo_fast.batches import arrange, make_batches
from dpo_fast.bundle import POLICY, open_bundle
from dpo_fast.engines import open_engine
from dpo_fast.engines.base import Engine
from dpo_fast.export.exporter import ExportOptions, export
from dpo_fast.export.probes import make_probes
from dpo_fast.quiet import quiet
from dpo_fast.recipes import load_recipe
from dpo_fast.scores import check_scores
from dpo_fast.tensorrt.options import BuildOptions
from dpo_fast.token_table import make_table
from dpo_fast.types import Float64Array, TokenizedPair
from gpu.families import POSITIONS, VOCABULARY, WINDOW, make_family, write_calibration
from gpu.torch_device import DTYPES

OUTPUTS = ("log_prob", "entropy", "mean_logit", "log_sum_sq_prob")
# Against PyTorch's own error in the same precision: another order of the same sums, and another choice of what stays
# in float32, move it by less. What is dropped (a window, a bias, a soft cap) moves it by more.
FACTOR = 4.0
ROUNDING = 1e-4  # nats; what float32 is off by at most, which PyTorch in float32 is not from itself
Expected = dict[tuple[int, int], dict[str, Float64Array]]


def run(*, recipe: str, families: list[str], work: str, target: str | None, started: float) -> Iterator[dict[str, Any]]:
    """Verify a recipe on families, and say of each how it went.

    Args:
        recipe: a name or file.
        families: keys of `FAMILIES`.
        work: folder for models and bundles.
        target: what plans are built for, such as "sm86", where the builder has a choice; None leaves it to the builder.
        started: of no matter here.
    """
    folder = Path(work)
    folder.mkdir(parents=True, exist_ok=True)
    loaded = load_recipe(recipe)
    build = BuildOptions(targets=(target,) if target is not None and loaded.engine == "tensorrt-rtx" else ())
    calibration = str(write_calibration(folder)) if loaded.precision == "fp8" else None
    options = ExportOptions(recipe=recipe, calibration=calibration, build=build, max_length=POSITIONS, overwrite=True)
    for family in families:
        with quiet():
            model = make_family(family, folder)
            bundle = open_bundle(export(str(model), None, folder / "bundles" / f"{family}-{loaded.name}", options))
            layout = bundle.manifest.models[POLICY].layout
            pairs = make_probes(VOCABULARY, window=WINDOW, positions=POSITIONS)
            expected = plain_scores(model, pairs, torch.float32)
            dtype = DTYPES.get(loaded.precision)
            floor = None if dtype is None else compare(expected, plain_scores(model, pairs, dtype))
            engine = open_engine(bundle, POLICY)
            found = compare(expected, engine_scores(engine, pairs, layout))
        yield {
            "family": family,
            "layout": layout,
            "engine": engine.name,
            **found,
            "torch_in_this_precision": floor,
            "passed": None if floor is None else passes(found, floor),
        }


def passes(found: Mapping[str, float], floor: Mapping[str, float]) -> bool:
    """Whether an engine's errors are such as rounding explains; NaN is a failure."""
    names = ("mean_nats", "largest_nats", "largest_of_all_outputs")
    return found["tokens"] > 0 and all(found[name] <= FACTOR * floor[name] + ROUNDING for name in names)


def compare(expected: Expected, found: Expected) -> dict[str, float]:
    """Errors of the log-prob over all tokens, mean and largest, in nats; and the largest of any output."""
    errors = {
        name: np.concatenate([np.abs(found[key][name] - expected[key][name]) for key in expected]) for name in OUTPUTS
    }
    return {
        "tokens": len(errors["log_prob"]),
        "mean_nats": float(errors["log_prob"].mean()),
        "largest_nats": float(errors["log_prob"].max()),
        "largest_of_all_outputs": float(max(of_output.max() for of_output in errors.values())),
    }


def plain_scores(folder: Path, pairs: list[TokenizedPair], dtype: torch.dtype) -> Expected:
    """PyTorch's scores of each completion by pair and branch, (n,) each, one sequence a row, logs in float64."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="eager").eval()
    scores: Expected = {}
    with torch.inference_mode():
        for index, pair in enumerate(pairs):
            for branch, completion in enumerate((pair.chosen_ids, pair.rejected_ids)):
                ids = torch.tensor([pair.prompt_ids + completion])
                # the state at t predicts token t + 1
                logits = model(input_ids=ids, use_cache=False).logits[0, len(pair.prompt_ids) - 1 : -1].double()
                log_probs = logits.log_softmax(-1)
                values = {
                    "log_prob": log_probs.gather(1, torch.tensor(completion)[:, None])[:, 0],
                    "entropy": -(log_probs.exp() * log_probs).sum(-1),
                    "mean_logit": logits.mean(-1),
                    "log_sum_sq_prob": (2 * log_probs).logsumexp(-1),
                }
                scores[index, branch] = {name: value.numpy() for name, value in values.items()}
    return scores


def engine_scores(engine: Engine, pairs: list[TokenizedPair], layout: Any) -> Expected:
    """An engine's scores of each completion, from one padded batch of all pairs."""
    table = make_table(pairs)
    budget = table.tokens.size * len(table)
    arrangement = arrange(table, layout, budget)
    scores: Expected = {}
    for batch in make_batches(arrangement, budget):
        said = check_scores(engine.score(batch), batch, table.rows)
        end = 0
        for pair, branch, count in batch.completions.tolist():
            start, end = end, end + count
            scores[pair, branch] = {name: getattr(said, name)[start:end].astype(np.float64) for name in OUTPUTS}
    for pair, branch, source, source_branch in arrangement.copies.tolist():
        scores[pair, branch] = scores[source, source_branch]
    return scores
