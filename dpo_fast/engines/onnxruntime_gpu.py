"""ONNX Runtime on an NVIDIA GPU: its CUDA provider, or TensorRT's with CUDA for what TensorRT does not take."""

import copy
import io
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import redirect_stdout
from hashlib import sha256
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from dpo_fast import files
from dpo_fast.batches import Batch
from dpo_fast.cache_folder import cache_errors, cache_folder
from dpo_fast.engines.onnxruntime import (
    ADAPTER_GATES,
    Gates,
    check_contract,
    failed,
    gated_inputs,
    open_session,
    session_options,
)
from dpo_fast.errors import BundleError, MissingDependencyError
from dpo_fast.tensorrt.plans import Profile
from dpo_fast.types import TokenScores

if TYPE_CHECKING:
    import onnxruntime

CUDA, TENSORRT = "CUDAExecutionProvider", "TensorrtExecutionProvider"
PROVIDERS = {"onnxruntime-cuda": CUDA, "onnxruntime-tensorrt": TENSORRT}  # by a recipe's engine
EXTRAS = {CUDA: "gpu", TENSORRT: "onnxruntime-tensorrt"}
# By default CUDA would round the factors of float32 products to TensorFloat-32, which has float16's 11 bits: the
# head is in float32 because that is not enough.
CUDA_OPTIONS = {"use_tf32": "0"}
# What computes shapes from shapes: ONNX Runtime itself moves these from a GPU to the CPU, where shapes lie anyway.
SHAPE_OPERATORS = frozenset(
    {"Add", "Cast", "Concat", "Constant", "ConstantOfShape", "Div", "Equal", "Expand", "Gather", "Max", "Min", "Mod",
     "Mul", "Range", "ReduceProd", "Reshape", "Shape", "Size", "Slice", "Squeeze", "Sub", "Unsqueeze", "Where"}
)  # fmt: skip
FOLDERS = {"engines": "onnxruntime-tensorrt/engines", "timing": "onnxruntime-tensorrt/timing"}


class OnnxRuntimeGpuEngine:
    """A log-prob graph on a GPU provider; no operator that computes anything is left to the CPU."""

    def __init__(
        self,
        graph: Path,
        *,
        precision: str = "fp16",
        gates: Sequence[float] | None = None,
        provider: str = CUDA,
        provider_options: Mapping[str, str] | None = None,
        profile: Profile | None = None,
        threads: int = 0,
    ) -> None:
        """Load a graph and the weights it points to.

        Args:
            graph: the .onnx file; its weights must lie in its folder or below.
            precision: of the graph's matrix products, for the record.
            gates: one for each adapter in the graph: 1 turns it on, 0 off; None for a graph without adapters.
            provider: `CUDA`, `TENSORRT`, or any other that ONNX Runtime has.
            provider_options: of that provider, beside our own or in their place.
            profile: for `TENSORRT`, the shapes that its engine is built for. A batch of more rows is run in pieces. One
                of wider rows is computed too, after the engine has been built again for it, which takes minutes.
            threads: of what prepares; 0 lets ONNX Runtime take every physical core.

        Raises:
            MissingDependencyError: onnxruntime, the build of it that has the provider, or what the provider loads is
                not installed.
            StorageError: the cache cannot be written.
            BundleError: the provider leaves operators to another or cannot load the graph, or the graph's inputs or
                outputs are not those of the graph contract.
        """
        onnxruntime = import_onnxruntime(provider)
        adapters = 0 if gates is None else len(gates)
        options = session_options(threads)
        # `session.disable_cpu_ep_fallback` would refuse every graph of dynamic shapes, for what computes the shapes.
        # So where each node went is recorded, and judged below.
        options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
        providers: dict[str, Mapping[str, str]] = {provider: {**(provider_options or {})}}
        if provider == CUDA:
            providers = {CUDA: {**CUDA_OPTIONS, **(provider_options or {})}}
        elif provider == TENSORRT:
            # TensorRT's provider has no option for it, and its engines would use TensorFloat-32 too.
            os.environ.setdefault("NVIDIA_TF32_OVERRIDE", "0")
            own = {**tensorrt_options(graph, profile, adapters), **(provider_options or {})}
            providers = {TENSORRT: own, CUDA: CUDA_OPTIONS}
        self._session = open_session(graph, options, providers)
        check_providers(graph, list(providers), self._session.get_providers())
        check_placement(graph, list(providers), placement(self._session))
        self._outputs = check_contract(graph, self._session, gates)
        self._gates: Gates | None = gates
        self._most_rows = None if profile is None else profile.rows[2]
        self.precision = precision
        self.name = f"onnxruntime {onnxruntime.__version__} {provider}"

    def with_gates(self, gates: Gates) -> "OnnxRuntimeGpuEngine":
        """The same session with other adapters turned on; several lists of gates are taken by the rows in turn."""
        other = copy.copy(self)
        other._gates = gates
        return other

    def score(self, batch: Batch) -> TokenScores:
        """Score a batch's N targets.

        Inputs go to the GPU and outputs come back once each, at the places that the binding says. Hardly two batches
        have the same shape, and all that is moved is some bytes a token: buffers are not kept for the next one.

        Raises:
            EngineOutputError: ONNX Runtime failed, most likely for want of memory.
        """
        inputs = gated_inputs(batch, self._gates)
        scores: dict[str, list[NDArray[Any]]] = {name: [] for name in self._outputs}
        places = []
        try:
            for piece, place in split_rows(inputs, self._most_rows or len(batch.input_ids)):
                for name, values in zip(self._outputs, self._run(piece), strict=True):
                    scores[name].append(values)
                places.append(place)
        except Exception as error:  # onnxruntime's own exceptions share no public base class
            raise failed(batch, error) from error
        order = np.argsort(np.concatenate(places)) if len(places) > 1 else slice(None)
        return TokenScores(**{name: np.concatenate(values)[order] for name, values in scores.items()})

    def _run(self, inputs: Mapping[str, NDArray[Any]]) -> list[NDArray[Any]]:
        """The outputs, in the session's order."""
        binding = self._session.io_binding()
        for name, values in inputs.items():
            binding.bind_cpu_input(name, np.ascontiguousarray(values))
        for name in self._outputs:
            binding.bind_output(name, "cpu")
        self._session.run_with_iobinding(binding)
        outputs: list[NDArray[Any]] = binding.copy_outputs_to_cpu()
        return outputs


def split_rows(
    inputs: Mapping[str, NDArray[Any]], most: int
) -> Iterator[tuple[dict[str, NDArray[Any]], NDArray[np.intp]]]:
    """Part a batch into pieces of at most so many rows; pieces without targets are left out.

    Args:
        inputs: by the graph's names.
        most: rows of a piece.

    Yields:
        The inputs of a piece, and (n,) the places of its targets among the batch's.
    """
    rows, width = inputs["input_ids"].shape
    row_of_target = inputs["target_index"] // width
    for start in range(0, rows, most):
        (place,) = np.nonzero((row_of_target >= start) & (row_of_target < start + most))
        if len(row_of_target) and not len(place):
            continue
        piece = {name: values[start : start + most] for name, values in inputs.items() if values.ndim == 2}
        piece["target_index"] = inputs["target_index"][place] - start * width
        piece["target_ids"] = inputs["target_ids"][place]
        yield piece, place


def import_onnxruntime(provider: str) -> ModuleType:
    """The package, in a build that has the provider, with CUDA's libraries loaded where pip installed them.

    Raises:
        MissingDependencyError: it is not installed, or in another build.
    """
    purpose, extra = f"running a graph on {provider}", EXTRAS.get(provider, "gpu")
    try:
        onnxruntime = import_module("onnxruntime")
    except ImportError as error:
        raise MissingDependencyError("onnxruntime-gpu", extra, purpose) from error
    if provider not in onnxruntime.get_available_providers():
        # Both packages write the same folder: beside onnxruntime, onnxruntime-gpu may be there and be overwritten.
        purpose += " (after `pip uninstall onnxruntime`)"
        raise MissingDependencyError("onnxruntime-gpu", extra, purpose)
    if provider in EXTRAS:
        with redirect_stdout(io.StringIO()):  # it prints what it does not find, and results belong there
            onnxruntime.preload_dlls()
    return onnxruntime


def check_providers(graph: Path, wanted: Sequence[str], started: Sequence[str]) -> None:
    """Refuse a session in which a provider is missing; ONNX Runtime leaves out what does not start, and says nothing.

    Args:
        graph: the .onnx file, for the message.
        wanted: the providers that were asked for, in their order.
        started: what `get_providers` says.

    Raises:
        MissingDependencyError: with what to install.
    """
    missing = [provider for provider in wanted if provider not in started]
    if missing:
        purpose = (
            f"{graph}: {' and '.join(missing)} did not start, only {', '.join(started)} did; beside an NVIDIA driver it"
        )
        raise MissingDependencyError("onnxruntime-gpu[cuda,cudnn]", EXTRAS.get(wanted[0], "gpu"), purpose)
    if started[0] != wanted[0]:
        raise BundleError(f"{graph}: ONNX Runtime prefers {started[0]} to {wanted[0]}; export with another recipe")


def placement(session: "onnxruntime.InferenceSession") -> list[tuple[str, str]]:
    """Each node's provider and operator, as ONNX Runtime gave them out."""
    return [
        (subgraph.ep_name, node.op_type)
        for subgraph in session.get_provider_graph_assignment_info()
        for node in subgraph.get_nodes()
    ]


def check_placement(graph: Path, wanted: Sequence[str], placed: Iterable[tuple[str, str]]) -> None:
    """Refuse a session that computes on another provider than the wanted ones.

    Args:
        graph: the .onnx file, for the message.
        wanted: the providers that were asked for.
        placed: as `placement`.

    Raises:
        BundleError: an operator that is not for shapes alone is elsewhere.
    """
    elsewhere = {
        operator: provider
        for provider, operator in placed
        if provider not in wanted and operator not in SHAPE_OPERATORS
    }
    if elsewhere:
        listed = ", ".join(f"{operator} on {provider}" for operator, provider in sorted(elsewhere.items()))
        raise BundleError(
            f"{graph}: {wanted[0]} does not take all of its operators ({listed}), so that most of the time would go "
            "into copies; export with another recipe, such as cpu-fp32"
        )


def tensorrt_options(graph: Path, profile: Profile | None, adapters: int) -> dict[str, str]:
    """The options of ONNX Runtime's TensorRT provider for a graph.

    The graph's own types are kept: the provider makes a strongly typed network unless an option such as
    `trt_fp16_enable` lets it choose, and none of those is given.

    Args:
        graph: the .onnx file.
        profile: the shapes that the engine is built for; None leaves them to the first batches.
        adapters: how many the graph has.

    Raises:
        StorageError: the cache's folders cannot be made.
    """
    # TensorRT's engines hold the weights, and the provider finds one again by the graph's names: other weights need
    # another folder. How fast kernels are does not depend on the weights: those times are shared.
    engines, timing = cache_folder() / FOLDERS["engines"] / content_key(graph), cache_folder() / FOLDERS["timing"]
    for folder in (engines, timing):
        with cache_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
    options = {
        "trt_engine_cache_enable": "1",
        "trt_engine_cache_path": str(engines),
        "trt_timing_cache_enable": "1",
        "trt_timing_cache_path": str(timing),
    }
    if profile is not None:
        for name, place in (("min", 0), ("opt", 1), ("max", 2)):
            options[f"trt_profile_{name}_shapes"] = profile_shapes(profile, place, adapters)
    return options


def profile_shapes(profile: Profile, place: int, adapters: int) -> str:
    """The inputs' shapes as the provider reads them, such as "input_ids:1x16,target_ids:8".

    Args:
        profile: of the graph.
        place: 0 for the smallest shapes, 1 for those that kernels are tuned for, 2 for the largest.
        adapters: how many the graph has.
    """
    rows, width, targets = profile.rows[place], profile.width[place], profile.targets[place]
    shapes = dict.fromkeys(("input_ids", "position_ids", "segment_ids"), (rows, width))
    wanted = {**shapes, "target_index": (targets,), "target_ids": (targets,)}
    if adapters:
        wanted[ADAPTER_GATES] = (rows, adapters)
    return ",".join(f"{name}:{'x'.join(map(str, shape))}" for name, shape in wanted.items())


def content_key(graph: Path) -> str:
    """What a graph computes: a SHA-256 of its file and of the weights' files that it points to, in hexadecimal.

    Raises:
        BundleError: the graph or a weights' file cannot be read.
    """
    import onnx
    from onnx.external_data_helper import uses_external_data

    try:
        tensors = onnx.load(graph, load_external_data=False).graph.initializer
        locations = {
            entry.value
            for tensor in tensors
            if uses_external_data(tensor)
            for entry in tensor.external_data
            if entry.key == "location"
        }
        hashes = [files.sha256(path) for path in (graph, *(graph.parent / name for name in sorted(locations)))]
    except Exception as error:  # protobuf's, onnx's and the file system's
        raise BundleError(
            f"{graph}: cannot be read ({' '.join(str(error).split())[:300]}); export the bundle again"
        ) from error
    return sha256("".join(hashes).encode()).hexdigest()
