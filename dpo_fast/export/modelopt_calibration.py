"""How large activations become on real pairs, as NVIDIA's ModelOpt measures them in the PyTorch model.

::

    exact graph   activation ──▶ MatMul ◀── … ◀── a parameter's value, which has its name
    PyTorch       input_quantizer.amax of the module ◀── the module's weight, of the same name
"""

from collections.abc import Container, Sequence
from pathlib import Path
from typing import Any

import onnx_ir as ir

from dpo_fast.engines.torch import load_model
from dpo_fast.errors import CheckFailedError, MissingDependencyError, UsageError
from dpo_fast.export.checkpoint import ADAPTER_CONFIG
from dpo_fast.export.products import Product
from dpo_fast.quiet import quiet
from dpo_fast.recipes import Recipe
from dpo_fast.text import named_line
from dpo_fast.types import TokenizedPair


def check_calibrator(recipe: Recipe, folder: Path) -> None:
    """Refuse a recipe whose calibrator is ModelOpt where that cannot be; do nothing for others.

    Args:
        recipe: what a bundle is made for.
        folder: of a role's checkpoint.

    Raises:
        UsageError: the folder is a PEFT adapter's.
        MissingDependencyError: nvidia-modelopt is not installed.
    """
    if recipe.calibrator != "modelopt":
        return
    if (folder / ADAPTER_CONFIG).is_file():
        raise UsageError(
            f'--recipe {recipe.name}: calibrator = "modelopt" takes whole models, and {folder.name} is a PEFT adapter; '
            'take calibrator = "largest", or merge the adapter first: '
            "AutoPeftModelForCausalLM.from_pretrained(...).merge_and_unload().save_pretrained(...)"
        )
    _import_quantization()


def measure_by_modelopt(
    folder: Path, products: Sequence[Product], pairs: Sequence[TokenizedPair]
) -> dict[ir.Value, float]:
    """The largest magnitudes of the products' activations, where ModelOpt quantises the module that multiplies them.

    Products of which it does not quantise the module are left out, and those whose weight multiplies several
    activations: the module's magnitude is of all of them.

    Args:
        folder: the Transformers folder that the products' weights lie in.
        products: of its exact graph.
        pairs: of the kind that the engine will score.

    Raises:
        MissingDependencyError: nvidia-modelopt is not installed.
        CheckpointError: Transformers cannot load the folder.
        CheckFailedError: ModelOpt cannot calibrate the model: an activation is infinite, say.
    """
    by_parameter = _calibrate(folder, pairs)
    activations: dict[str, set[ir.Value]] = {}
    for product in products:
        parameter = _find_parameter(product.weight, by_parameter)
        if parameter is not None:
            activations.setdefault(parameter, set()).add(product.activation)
    return {next(iter(of)): by_parameter[parameter] for parameter, of in activations.items() if len(of) == 1}


def _find_parameter(weight: ir.Value | None, known: Container[str]) -> str | None:
    """Which known parameter a product's weight is, however it was moved; parameters keep their names in a graph."""
    while weight is not None:
        name = str(weight.name).removesuffix(".float32")  # of one that is stored in fewer bits
        if name in known:
            return name
        node = weight.producer()
        weight = None if node is None else node.inputs[0]
    return None


def _calibrate(folder: Path, pairs: Sequence[TokenizedPair]) -> dict[str, float]:
    """The largest magnitude of what each quantised module multiplies its weight by, by the weight's name.

    One completion behind its prompt is a sequence, and each is run by itself: no padding is measured.
    """
    import torch

    quantization = _import_quantization()
    model = load_model(folder, None, torch.float32)

    def run(model: Any) -> None:
        for pair in pairs:
            for completion in (pair.chosen_ids, pair.rejected_ids):
                model(input_ids=torch.tensor([[*pair.prompt_ids, *completion]]), use_cache=False)

    try:
        with quiet(), torch.no_grad():
            quantization.quantize(model, quantization.FP8_DEFAULT_CFG, run)
    except Exception as error:  # ModelOpt asserts that numbers are finite; architectures fail in their own ways
        raise CheckFailedError(
            f'{folder.name}: ModelOpt cannot calibrate this model ({named_line(error)}); take calibrator = "largest"'
        ) from error
    quantizers = {name: getattr(module, "input_quantizer", None) for name, module in model.named_modules()}
    return {
        f"{name}.weight": quantizer.amax.item()
        for name, quantizer in quantizers.items()
        if quantizer is not None and quantizer.is_enabled and quantizer.amax is not None
    }


def _import_quantization() -> Any:
    """ModelOpt's quantisation for PyTorch; it takes seconds to import."""
    try:
        with quiet():  # it warns of every version of Transformers that is newer than itself
            import modelopt.torch.quantization as quantization
    except ImportError as error:
        raise MissingDependencyError("nvidia-modelopt", "modelopt", 'calibrator = "modelopt"') from error
    return quantization
