"""The graph that a recipe's engine runs, made from the exact one: its products by weights in fewer bits.

The exact graph, ``{role}.onnx``, is never changed. What differs from it is written beside it; what does not (the
embedding, normalisations, biases) is pointed at where it lies::

    policy.onnx ─────────────▶ policy/*.safetensors ◀──────────────┐
    policy.cpu-int8.onnx ────▶ engines/cpu-int8/policy.safetensors │
                         └──────────────────────────────────────────┘

Logits are reduced in float32 whatever the precision: softmax, log-sum-exp and all that follows.
"""

import re
from collections.abc import Sequence
from pathlib import Path

import onnx_ir as ir
from onnx_ir.convenience import replace_nodes_and_values
from onnx_ir.passes.common import RemoveUnusedNodesPass
from onnx_ir.tape import Tape

from dpo_fast.errors import UsageError
from dpo_fast.export.calibration import measure_activations
from dpo_fast.export.cuda_fusions import fuse_for_cuda
from dpo_fast.export.half import narrow
from dpo_fast.export.modelopt_calibration import check_calibrator
from dpo_fast.export.products import Product, evaluate, find_products, split_gemms, stored_tensors
from dpo_fast.export.quantized_products import MICROSOFT, Float8, Form, Int4, Int8, Int8Weights
from dpo_fast.export.weights_file import WeightsFile
from dpo_fast.recipes import Recipe
from dpo_fast.types import TokenizedPair

HALVES = {"fp16": ir.DataType.FLOAT16, "fp8": ir.DataType.FLOAT16, "bf16": ir.DataType.BFLOAT16}


def make_engine_graph(
    folder: Path, role: str, recipe: Recipe, calibration: Sequence[TokenizedPair] | None = None
) -> str:
    """Make the graph that a recipe's engine runs.

    Args:
        folder: the bundle that is being made; it holds ``{role}.onnx`` and the weights that this points to.
        role: "policy" or "reference".
        recipe: the engine, its precision and what belongs to that.
        calibration: pairs from which the scales of activations are chosen; for fp8 alone.

    Returns:
        The name of the graph's file in the folder: the exact one's where the engine runs that.

    Raises:
        UsageError: fp8 without calibration pairs, an adapter where the recipe's calibrator takes whole models, or a
            layer to be kept exact that the model does not have.
        CheckpointError: a weight is too large for float16.
        MissingDependencyError: the recipe's calibrator is not installed.
    """
    exact = f"{role}.onnx"
    check_calibrator(recipe, folder / role)
    if recipe.precision == "fp32" or (recipe.engine, recipe.precision) == ("openvino", "bf16"):
        return exact  # OpenVINO narrows by itself
    model = ir.load(folder / exact)
    split_gemms(model)
    _check_layers(model.graph, role, recipe)
    products = find_products(model.graph)
    form = _form(folder, role, products, recipe, calibration)
    head_too = recipe.head_precision != "fp32"
    if form is not None:
        chosen = [each for each in products if not each.is_head or recipe.head_precision == recipe.precision]
        chosen = [each for each in chosen if not _layers_of(each) & set(recipe.exact_layers)]
        _replace(model, chosen, form, folder, folder / "engines" / recipe.name / f"{role}.safetensors")
    if recipe.precision in HALVES:
        narrow(model, HALVES[recipe.precision], [each.node for each in products if each.is_head and head_too])
    if recipe.engine == "onnxruntime-cuda":
        fuse_for_cuda(model)
    RemoveUnusedNodesPass()(model)
    name = f"{role}.{recipe.name}.onnx"
    ir.save(model, folder / name)
    return name


def layer_number(name: str) -> int | None:
    """The layer of the decoder that a weight belongs to, by its name; None for an embedding, a last norm, a head.

    It is the first number among the name's parts: the 3 of ``policy/model.layers.3.mlp.experts.7.w1.weight``.
    """
    found = re.search(r"(?:^|\.)(\d+)\.", name.rpartition("/")[2])
    return int(found[1]) if found else None


def layer_numbers(graph: ir.Graph) -> set[int]:
    """The layers of the decoder that a graph has weights of."""
    weights = (name for name, value in graph.initializers.items() if isinstance(value.const_value, ir.ExternalTensor))
    return {number for name in weights if (number := layer_number(name)) is not None}


def _layers_of(product: Product) -> set[int | None]:
    """The layers that a product's weight belongs to."""
    return {layer_number(name) for name in stored_tensors(product.weight) or ()}


def _check_layers(graph: ir.Graph, role: str, recipe: Recipe) -> None:
    """Refuse layers to be kept exact that a model does not have."""
    there = layer_numbers(graph)
    for layer in recipe.exact_layers:
        if layer not in there:
            has = f"{min(there)} to {max(there)}" if there else "none that are numbered"
            raise UsageError(
                f"--recipe {recipe.name}: exact_layers = {list(recipe.exact_layers)}: the {role} has no layer {layer}; "
                f"its layers are {has}"
            )


def _form(
    folder: Path, role: str, products: Sequence[Product], recipe: Recipe, calibration: Sequence[TokenizedPair] | None
) -> Form | None:
    """What the products become, or None where their weights stay as they are stored."""
    match recipe.engine, recipe.precision:
        case "onnxruntime", "int8":
            return Int8(reduce_range=bool(recipe.reduce_range))
        case "openvino", "int8":
            return Int8Weights()
        case _, "int4":
            assert recipe.block_size is not None
            return Int4(recipe.block_size, symmetric=bool(recipe.symmetric))
        case _, "fp8":
            if not calibration:
                raise UsageError(
                    f"--recipe {recipe.name}: fp8 needs pairs to choose the activations' scales from; "
                    "name some with --calibration DATASET"
                )
            body = [each for each in products if not each.is_head]
            return Float8(measure_activations(folder / f"{role}.onnx", folder / role, body, recipe, calibration))
    return None


def _replace(model: ir.Model, products: Sequence[Product], form: Form, folder: Path, path: Path) -> None:
    """Put products by quantised weights in the place of exact ones; one weight is in memory at a time."""
    graph = model.graph
    layouts = {
        f"{product.name}.{ending}": layout
        for product in products
        for ending, layout in form.layout(*product.shape).items()
    }
    with WeightsFile(path, layouts) as file:
        for product in products:
            stored = {}
            for ending, values in form.quantize(evaluate(product.weight)).items():
                name = f"{product.name}.{ending}"
                file.write(name, values)
                tensor = file.reference(name, folder)
                stored[ending] = ir.val(name, tensor.dtype, tensor.shape, const_value=tensor)
                graph.register_initializer(stored[ending])
            tape = Tape()
            result = form.compute(tape, product, stored)
            replace_nodes_and_values(graph, product.node, [product.node], tape.nodes, product.node.outputs, [result])
    if any(node.domain == MICROSOFT for node in graph):
        model.opset_imports[MICROSOFT] = 1
