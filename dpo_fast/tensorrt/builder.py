"""A bundle's plans: graphs cut and checked, profiles chosen, each plan built in a child process.

engine graph -> body, head -> what TensorRT would refuse -> profiles -> child process -> plan, description
"""

import json
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import onnx_ir as ir
from tqdm import tqdm

from dpo_fast.batches import Layout
from dpo_fast.bundle import ModelEntry
from dpo_fast.cache_folder import cache_folder
from dpo_fast.errors import BuildError, MissingDependencyError, UsageError
from dpo_fast.files import storage_errors
from dpo_fast.recipes import Recipe
from dpo_fast.tensorrt.checker import find_violations
from dpo_fast.tensorrt.graphs import BODY, HEAD, make_graphs, write_graph
from dpo_fast.tensorrt.options import RTX_TARGETS, BuildOptions
from dpo_fast.tensorrt.package import PACKAGES, count_gpus, import_package
from dpo_fast.tensorrt.plans import Package, Plans, Profile, write_plans

Shapes = dict[str, list[list[int]]]  # by input: the smallest, the tuned and the largest shape


def check_graphs(folder: Path, entries: Mapping[str, ModelEntry]) -> None:
    """Refuse engine graphs that no TensorRT would build.

    Args:
        folder: the bundle's.
        entries: by role.

    Raises:
        BuildError: with the first nodes that would be refused.
    """
    for graph in {entry.engine_graph for entry in entries.values()}:
        for part, model in make_graphs(folder / graph).items():
            violations = find_violations(model)
            if violations:
                more = f", and {len(violations) - 1} more" if len(violations) > 1 else ""
                raise BuildError(
                    f"{graph}: TensorRT would not build its {part}: {violations[0]}{more}; "
                    "export with a recipe for another engine"
                )


def why_not_here(package: Package) -> str | None:
    """Why plans cannot be built on this machine; None where they can."""
    try:
        import_package(package, "building plans")
    except MissingDependencyError as error:
        return str(error)
    if package == "tensorrt" and not count_gpus():
        return "TensorRT builds on a machine with an NVIDIA GPU, and this one has none, or no driver for it"
    return None


def build_plans(
    folder: Path,
    entries: Mapping[str, ModelEntry],
    recipe: Recipe,
    profiles: Mapping[Layout, Sequence[Profile]],
    options: BuildOptions,
    report: Callable[[str], None] = lambda step: None,
) -> dict[str, ModelEntry]:
    """Build the plans of a bundle's roles.

    Args:
        folder: the bundle that is being made; it holds the engine graphs and their weights.
        entries: by role.
        recipe: what the bundle is made for; its engine is one of `PACKAGES`.
        profiles: for each layout that a role has.
        options: see `BuildOptions`.
        report: called with a line at each step.

    Returns:
        The entries, with `plan` filled in.

    Raises:
        MissingDependencyError: the package is not installed.
        UsageError: an option that the package has no use for.
        BuildError: the graph was refused, or the builder failed or crashed.
    """
    package = PACKAGES[recipe.engine]
    options.check(package)
    reason = why_not_here(package)
    if reason is not None:
        import_package(package, "building plans")
        raise BuildError(reason)
    if options.refittable and package == "tensorrt_rtx" and not count_gpus():
        raise UsageError("--refittable: TensorRT-RTX builds such plans on a machine with an NVIDIA GPU; leave it out")
    made: dict[str, ModelEntry] = {}
    of_graph: dict[str, str] = {}  # roles of one graph share its plans
    for role, entry in entries.items():
        if entry.engine_graph not in of_graph:
            of_graph[entry.engine_graph] = _build(
                folder, entry, recipe, package, profiles[entry.layout], options, report
            )
        made[role] = replace(entry, plan=of_graph[entry.engine_graph])
    return made


def _build(
    folder: Path,
    entry: ModelEntry,
    recipe: Recipe,
    package: Package,
    profiles: Sequence[Profile],
    options: BuildOptions,
    report: Callable[[str], None],
) -> str:
    """Build a graph's two plans and describe them; the description's path in the bundle."""
    stem = Path(entry.graph).stem
    target = folder / "engines" / recipe.name
    assert recipe.head_chunk is not None
    targets = [] if package == "tensorrt" else list(options.targets or RTX_TARGETS)
    refittable = package == "tensorrt" if options.refittable is None else options.refittable
    built: dict[str, Any] = {}
    with storage_errors(target):
        target.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target, prefix="building-") as working:
            for part, model in make_graphs(folder / entry.engine_graph).items():
                shapes = [_shapes(model, profile) for profile in profiles]
                if part == HEAD:
                    chunk = recipe.head_chunk
                    shapes = [_shapes(model, Profile((1, 1, 1), (1, 1, 1), (1, chunk, chunk)))]
                job = {
                    "package": package,
                    "graph": str(write_graph(model, Path(working), part).absolute()),
                    "plan": str((target / f"{stem}.{part}.plan").absolute()),
                    "profiles": shapes,
                    "targets": targets,
                    "workspace_bytes": None if options.workspace_gib is None else int(options.workspace_gib * 2**30),
                    "refittable": refittable,
                    "version_compatible": options.version_compatible,
                    "hardware_compatible": options.hardware_compatible,
                    # TensorRT-RTX times nothing where it builds.
                    "timing_cache": str(cache_folder() / "timing" / "tensorrt") if package == "tensorrt" else None,
                }
                built[part] = build = run_worker(job, f"{entry.engine_graph}, {part}")
                report(
                    f"{stem}: built the {part} with {package} {build['version']} for "
                    f"{', '.join(targets) or 'this GPU'} in {build['seconds']:.1f} s, {build['bytes'] / 1e6:,.1f} MB"
                )
    description = f"engines/{recipe.name}/{stem}.json"
    write_plans(
        folder / description,
        Plans(
            package=package,
            version=str(built[BODY]["version"]),
            targets=targets,
            body=f"{stem}.{BODY}.plan",
            head=f"{stem}.{HEAD}.plan",
            profiles=list(profiles),
            chunk=recipe.head_chunk,
            refittable=refittable,
            built=built,
            options=asdict(options),
        ),
    )
    return description


def run_worker(job: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Build one plan in a child process, with a bar where somebody looks.

    Args:
        job: see `dpo_fast.tensorrt.worker.build`.
        name: of what is built, for messages.

    Returns:
        What the worker says of the plan: version, seconds, bytes, layers, profiles, peak_memory_bytes, warnings.

    Raises:
        BuildError: the graph was refused, or the builder failed or crashed.
    """
    command = [sys.executable, "-m", "dpo_fast.tensorrt.worker"]
    built: dict[str, Any] | None = None
    with (
        tempfile.TemporaryFile("w+", errors="replace") as chatter,
        subprocess.Popen(  # noqa: S603 (our own module)
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=chatter, text=True
        ) as child,
        # Without `disable`, a bar is drawn on a terminal alone.
        tqdm(total=1.0, desc=name, disable=None, leave=False, bar_format="{desc} {percentage:3.0f}%|{bar}|") as bar,
    ):
        assert child.stdin is not None
        assert child.stdout is not None
        try:
            json.dump(job, child.stdin)
            child.stdin.close()
            for line in child.stdout:
                said = json.loads(line)
                if "phase" in said:
                    bar.update(min(said["done"], 1.0) - bar.n)
                elif "refused" in said:
                    raise BuildError(f"{name}: {job['package']} refuses it: {_explained(said['refused'])}")
                else:
                    built = said["built"]
        except (BrokenPipeError, ValueError):  # it has died, and its exit code says how
            built = None
        finally:
            if sys.exc_info()[0] is not None:
                child.kill()
            child.wait()
        if built is None or child.returncode != 0:
            chatter.seek(0)
            raise BuildError(f"{name}: {_death(job['package'], child.returncode, chatter.read())}")
    return built


def _shapes(model: ir.Model, profile: Profile) -> Shapes:
    """A profile's shapes of each of a graph's inputs."""
    sizes = {"B": profile.rows, "T": profile.width, "N": profile.targets}
    found: Shapes = {}
    for value in model.graph.inputs:
        assert value.shape is not None
        dimensions = [
            (size, size, size) if isinstance(size, int) else sizes[str(getattr(size, "value", size))]
            for size in value.shape
        ]
        found[str(value.name)] = [[dimension[kind] for dimension in dimensions] for kind in range(3)]
    return found


def _explained(reason: str) -> str:
    """What the builder says, with what it means where that is known."""
    if "CUDA_SUCCESS" in reason or "CUDA driver version" in reason:
        return f"{reason}; it looks for a GPU, and this machine has none, or no driver for it"
    if "OutOfMemory" in reason or "out of memory" in reason:
        return f"{reason}; lower token_budget or head_chunk in the recipe, or set --workspace"
    return reason


def _death(package: str, code: int | None, chatter: str) -> str:
    """How a child process ended that has built nothing and said nothing of it."""
    lines = chatter.strip().splitlines()
    last = f" ({' '.join(lines[-1].split())[:300]})" if lines else ""
    if code is not None and code < 0:
        try:
            how = signal.Signals(-code).name
        except ValueError:
            how = f"signal {-code}"
        return f"{package} crashed while it built it, {how}{last}; export with another precision, or for another engine"
    return f"{package} did not build it{last}"
