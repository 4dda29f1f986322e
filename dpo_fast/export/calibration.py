"""How large activations become on real pairs: what constant scales are chosen from."""

import math
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from dpo_fast.batches import arrange, make_batches
from dpo_fast.errors import CheckFailedError, MissingDependencyError, UsageError
from dpo_fast.export.modelopt_calibration import check_calibrator, measure_by_modelopt
from dpo_fast.export.products import Product
from dpo_fast.preferences import load_preferences
from dpo_fast.recipes import Recipe
from dpo_fast.token_table import make_table
from dpo_fast.tokens import load_tokenizer, tokenize
from dpo_fast.types import TokenizedPair

CALIBRATED = ("fp8",)  # precisions whose activations have constant scales

ONE_ROW = 1  # token budget of batches that hold a row each, however long: padding would be measured too
PAIRS = 64  # the data set's first; largest magnitudes hardly change beyond


def read_calibration(
    dataset: str | None, recipe: Recipe, tokenizer: Path, max_length: int, *, trust_remote_code: bool
) -> list[TokenizedPair] | None:
    """The pairs that a recipe's scales are chosen from; None for a recipe whose scales need none.

    Args:
        dataset: a file, a folder or a Hub id.
        recipe: what a bundle is made for.
        tokenizer: the policy's folder.
        max_length: of prompt and completion together, in tokens.
        trust_remote_code: whether the tokenizer's own Python code may be run.

    Raises:
        UsageError: pairs are missing, or given where the recipe has no use for them; an adapter where its calibrator
            takes whole models.
        DatasetError: a row cannot be used.
        MissingDependencyError: the calibrator is not installed.
    """
    check_calibrator(recipe, tokenizer)
    if recipe.precision not in CALIBRATED:
        if dataset is not None:
            raise UsageError(
                f"--calibration {dataset}: the recipe {recipe.name} has no scales to choose; leave it out, or take a "
                f"recipe whose precision is {' or '.join(CALIBRATED)}"
            )
        return None
    if dataset is None:
        raise UsageError(
            f"--recipe {recipe.name}: {recipe.precision} needs pairs to choose the activations' scales from; "
            "name some with --calibration DATASET"
        )
    rows = load_preferences(dataset, limit=PAIRS).rows(on_error="stop")
    loaded = load_tokenizer(tokenizer, trust_remote_code=trust_remote_code)
    return [item for item in tokenize(rows, loaded, max_length=max_length) if isinstance(item, TokenizedPair)]


def measure_activations(
    graph: Path, folder: Path, products: Iterable[Product], recipe: Recipe, pairs: Sequence[TokenizedPair]
) -> dict[ir.Value, float]:
    """The largest magnitude of each product's activation.

    Args:
        graph: the exact graph.
        folder: the model's folder beside it.
        products: of the graph.
        recipe: says by its calibrator who measures; for an activation that ModelOpt does not, the exact graph does.
        pairs: of the kind that the engine will score.

    Raises:
        MissingDependencyError: onnxruntime, or the calibrator, is not installed.
        CheckpointError: Transformers cannot load the folder for ModelOpt.
        CheckFailedError: an activation is infinite, or ModelOpt fails.
    """
    products = list(products)
    found = measure_by_modelopt(folder, products, pairs) if recipe.calibrator == "modelopt" else {}
    others = {each.activation: str(each.activation.name) for each in products if each.activation not in found}
    if others:
        largest = largest_magnitudes(graph, others.values(), pairs)
        found |= {value: largest[name] for value, name in others.items()}
    return found


def largest_magnitudes(graph: Path, activations: Iterable[str], pairs: Sequence[TokenizedPair]) -> dict[str, float]:
    """The largest magnitude of each of some values of a float32 graph, over pairs, a sequence at a time.

    Args:
        graph: the exact graph; a temporary one that puts out the magnitudes as well is written beside it.
        activations: the values' names.
        pairs: of the kind that the engine will score.

    Raises:
        MissingDependencyError: onnxruntime is not installed.
        CheckFailedError: an activation is infinite.
    """
    try:
        import onnxruntime
    except ImportError as error:
        raise MissingDependencyError("onnxruntime", "cpu", "calibrating") from error
    model = ir.load(graph)
    values = {str(value.name): value for node in model.graph for value in node.outputs}
    names = sorted(set(activations))
    for name in names:
        magnitude = ir.node("Abs", [values[name]])
        largest = ir.node("ReduceMax", [magnitude.outputs[0]], {"keepdims": 0})
        largest.outputs[0].name, largest.outputs[0].shape = f"largest {name}", ir.Shape([])
        largest.outputs[0].dtype = ir.DataType.FLOAT
        model.graph.extend([magnitude, largest])
        model.graph.outputs.append(largest.outputs[0])
    found = np.zeros(len(names), np.float32)
    # External data must lie below the graph that points to it.
    with tempfile.NamedTemporaryFile(suffix=".onnx", dir=graph.parent) as file:
        ir.save(model, file.name)
        session = onnxruntime.InferenceSession(file.name, providers=["CPUExecutionProvider"])
        adapters = [value.shape[1] for value in session.get_inputs() if value.name == "adapter_gates"]
        for batch in make_batches(arrange(make_table(pairs), "plain", ONE_ROW), ONE_ROW):
            inputs: dict[str, Any] = dict(batch.inputs)
            for switch in (0.0, 1.0) if adapters else (0.0,):  # all adapters off, then on
                if adapters:
                    inputs["adapter_gates"] = np.full((len(batch.input_ids), adapters[0]), switch, np.float32)
                outputs = session.run([f"largest {name}" for name in names], inputs)
                found = np.maximum(found, np.array(outputs, np.float32))
    largest_found: dict[str, float] = dict(zip(names, found.tolist(), strict=True))
    for name, number in largest_found.items():
        if not math.isfinite(number):
            raise CheckFailedError(f"{graph}: the activation {name!r} is {number} on the calibration pairs")
    return largest_found
