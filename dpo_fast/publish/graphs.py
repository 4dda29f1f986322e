"""A bundle's graphs as they lie in a repository, where the policy's folder is the root.

::

    BUNDLE                                REPOSITORY
    policy.onnx                           policy.onnx, pointing at what follows
    policy/model.safetensors              model.safetensors
    engines/cpu-int8/policy.safetensors   engines/cpu-int8/policy.safetensors
    reference/ base/                      the same, where an adapter's graph needs the weights beneath it

ONNX's external data may not leave the graph's folder, so a graph in a subfolder could not share the root's weights.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from dpo_fast.bundle import POLICY, Bundle, is_of_plan
from dpo_fast.errors import BundleError

# Such a name stands in the card's code as it is.
_GRAPH_NAME = re.compile(r"[\w.+-]+\.onnx")


@dataclass(frozen=True, slots=True)
class PublishedGraph:
    """A graph in a repository, for the card.

    Attributes:
        file: its name at the root.
        engine: that runs it.
        precision: of its matrix products.
        is_exact: whether it is the exact float32 graph, which ONNX Runtime runs anywhere.
        gates: what its input `adapter_gates` takes, or None where it has no adapters.
    """

    file: str
    engine: str
    precision: str
    is_exact: bool
    gates: Sequence[float] | None


@dataclass(slots=True)
class GraphFiles:
    """What goes into a repository for a bundle's graphs.

    Attributes:
        files: on this disk, by path in the repository.
        graphs: those among them that are graphs.
        foreign_weights: of the files, weights that are neither the policy's nor made of them: an adapter's base.
    """

    files: dict[str, Path] = field(default_factory=dict)
    graphs: list[PublishedGraph] = field(default_factory=list)
    foreign_weights: list[str] = field(default_factory=list)


def collect_graphs(bundle: Bundle, working: Path, *, exact: bool, engines: bool) -> GraphFiles:
    """Collect the policy's graphs, rewritten for a repository's root, and all that they point at.

    Args:
        bundle: whose files are checked already.
        working: the folder that rewritten graphs are put into.
        exact: whether the exact graph goes.
        engines: whether the recipe's own graph, its weights and its plans go.

    Raises:
        BundleError: a graph cannot be read, or points at what is no file of the bundle.
    """
    collected = GraphFiles()
    entry, recipe = bundle.manifest.models[POLICY], bundle.manifest.recipe
    wanted: list[PublishedGraph] = []
    if exact:
        wanted.append(PublishedGraph(entry.graph, "onnxruntime", "fp32", True, entry.adapter_gates))
    if engines and entry.engine_graph != entry.graph:
        wanted.append(
            PublishedGraph(entry.engine_graph, recipe["engine"], recipe["precision"], False, entry.adapter_gates)
        )
    for graph in wanted:
        if not _GRAPH_NAME.fullmatch(graph.file):
            raise BundleError(f"{bundle.folder}: the name of its graph, {graph.file!r}, is not one; export it again")
        target = working / graph.file
        for location in sorted(point_at_root(bundle.folder / graph.file, target)):
            if location not in bundle.manifest.files:
                raise BundleError(
                    f"{bundle.folder / graph.file}: points at {location!r}, which the bundle does not list; export "
                    "the bundle again"
                )
            name = published_name(location)
            collected.files[name] = bundle.folder / location
            if name == location and not location.startswith("engines/") and name not in collected.foreign_weights:
                collected.foreign_weights.append(name)
        collected.files[graph.file] = target
        collected.graphs.append(graph)
    if engines and entry.plan is not None:
        plans = (name for name in bundle.manifest.files if is_of_plan(name, str(entry.plan)))
        collected.files |= {name: bundle.folder / name for name in plans}
    return collected


def published_name(location: str) -> str:
    """Where a bundle's file lies in a repository."""
    return location.removeprefix(f"{POLICY}/")


def point_at_root(graph: Path, target: Path) -> set[str]:
    """Write a graph whose references into the policy's folder point at the root instead.

    Args:
        graph: in a bundle; the weights that it points at are not read.
        target: the file to write.

    Returns:
        The files that the graph points at, by path in the bundle.

    Raises:
        BundleError: the graph cannot be read.
    """
    import onnx_ir as ir

    try:
        model = ir.load(graph)
    except Exception as error:  # whatever protobuf and onnx_ir raise on bytes that are no graph
        raise BundleError(f"{graph}: is no ONNX graph ({type(error).__name__}); export the bundle again") from error
    locations: set[str] = set()
    for value in model.graph.initializers.values():
        place = value.const_value
        if not isinstance(place, ir.ExternalTensor):
            continue
        location = str(place.location)
        locations.add(location)
        value.const_value = ir.ExternalTensor(
            published_name(location), place.offset, place.length, place.dtype, shape=place.shape, name=str(place.name)
        )
    target.parent.mkdir(parents=True, exist_ok=True)
    ir.save(model, target)
    return locations
