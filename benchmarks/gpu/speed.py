"""Every shape with every contender: prepared, run in a process of its own, and held against the peers and the peak."""

import shutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dpo_fast.recipes import load_recipe
from dpo_fast.tensorrt.package import PACKAGES
from dpo_fast.token_table import TokenTable
from gpu.contenders import TORCH, TRL, Contender, Device
from gpu.errors import accuracy, sequence_errors
from gpu.pairs import Need, read_pairs, what_is_needed
from gpu.processes import Ended, Memory, Surroundings, run_python, run_task
from gpu.shapes import LARGE, find_shape, is_random, short_name

ROLES = 2  # policy and reference: what is counted of one model, both need


@dataclass(frozen=True, slots=True)
class Settings:
    """What is measured.

    Attributes:
        device: what the peers run on.
        shapes: names or folders.
        data: the preference set.
        pairs: rows of it.
        check_pairs: of these, the first ones that PyTorch in float32 scores too.
        turns: timed ones of each contender, after the one that sets everything up.
        token_budget: of a batch of the tuned PyTorch loop, padding included.
        batch_size: of TRL, in pairs.
        keep_bundles: whether they are left for another run.
        target: the GPU as builders name it, such as "sm86"; None without one.
    """

    device: Device
    shapes: Sequence[str]
    data: Path
    pairs: int
    check_pairs: int
    turns: int
    token_budget: int
    batch_size: int
    keep_bundles: bool
    target: str | None


def measure_peaks(precisions: Iterable[str], device: Device, surroundings: Surroundings) -> dict[str, dict[str, Any]]:
    """The matrix peak in each precision: `flop_per_second`, or `error`."""
    wanted = sorted(set(precisions))
    ended = run_task("peak", {"device": device, "precisions": wanted}, "peak", surroundings)
    found = {said["precision"]: said for said in ended.said}
    return {precision: found.get(precision, {"error": ended.error}) for precision in wanted}


def measure_shape(
    shape: str,
    contenders: Sequence[Contender],
    peaks: dict[str, dict[str, Any]],
    settings: Settings,
    surroundings: Surroundings,
    keep: Callable[[dict[str, Any]], None],
    report: Callable[[str], None],
) -> None:
    """Run all contenders on one shape.

    Args:
        shape: a name or a folder.
        contenders: that can run here.
        peaks: as `measure_peaks`.
        settings: what is measured.
        surroundings: of its processes.
        keep: called with the shape's result as it grows, after each contender.
        report: called with a line at each step.
    """
    roles = find_shape(shape, surroundings.work, settings.data)
    name = short_name(shape)
    table = read_pairs(Path(roles[0]), settings.data, settings.pairs)
    need = what_is_needed(Path(roles[0]), table)
    report(f"{name}: PyTorch in float32, {settings.check_pairs} pairs to compare with")
    exact_file = surroundings.work / f"{name}-exact.npy"
    ended = run_torch(roles, "fp32", settings.check_pairs, 1, exact_file, f"{name}-exact", settings, surroundings)
    exact = None if ended.error else np.load(exact_file)
    result: dict[str, Any] = {
        "shape": name,
        "random_weights": is_random(shape),
        "pairs": len(table),
        "check_pairs": settings.check_pairs,
        **asdict(need),
        "exact_error": ended.error,
        "contenders": [],
    }
    keep(result)
    for contender in contenders:
        report(f"{name}: {contender.name}")
        measured = measure(contender, name, roles, table, need, exact, peaks, settings, surroundings)
        result["contenders"].append({"name": contender.name, "precision": contender.precision, **measured})
        keep(result)


def measure(
    contender: Contender,
    shape: str,
    roles: tuple[str, str],
    table: TokenTable,
    need: Need,
    exact: Any,
    peaks: dict[str, dict[str, Any]],
    settings: Settings,
    surroundings: Surroundings,
) -> dict[str, Any]:
    """One contender's figures, or its `error`."""
    log = f"{shape}-{Path(contender.name).stem}"
    saved = surroundings.work / f"{log}.npy"
    saved.unlink(missing_ok=True)
    said: dict[str, Any] = {}
    if contender.peer == TRL:
        ended = run_trl(contender, roles, log, settings, surroundings)
    elif contender.peer == TORCH:
        assert contender.precision is not None
        ended = run_torch(
            roles, contender.precision, settings.pairs, settings.turns, saved, log, settings, surroundings
        )
    else:
        bundle = surroundings.work / "bundles" / log
        ended = make_bundle(contender, bundle, shape, roles, settings, surroundings)
        said["export_seconds"] = ended.seconds
        if ended.error is None:
            ended = run_engine(bundle, saved, log, settings, surroundings)
        if not settings.keep_bundles:
            shutil.rmtree(bundle, ignore_errors=True)
    if ended.error or not ended.said:
        return {**said, "error": ended.error or "it ended well, and said nothing"}
    said |= ended.said[-1]
    said["device_bytes_before"], said["device_largest_bytes"] = ended.memory.before, ended.memory.largest
    if saved.is_file():
        log_probs = np.load(saved)
        said["accuracy"] = accuracy(log_probs)
        said["errors"] = None if exact is None else sequence_errors(log_probs, exact)
    return said | rates(said["score_seconds"], len(table), need, peaks.get(str(contender.precision), {}))


def rates(seconds: float, pairs: int, need: Need, peak: dict[str, Any]) -> dict[str, Any]:
    """What a contender does in a second, under both models, and how near that is to the peak of its precision."""
    flop = ROLES * (need.body_flop + need.head_flop)
    at_peak = peak.get("flop_per_second")
    return {
        "pairs_per_second": pairs / seconds,
        "tokens_per_second": ROLES * need.sequence_tokens / seconds,
        "needed_flop_per_second": flop / seconds,
        "share_of_peak": None if at_peak is None else flop / seconds / at_peak,
    }


def run_trl(
    contender: Contender, roles: tuple[str, str], log: str, settings: Settings, surroundings: Surroundings
) -> Ended:
    """TRL's own evaluation."""
    arguments = {
        "policy": roles[0],
        "reference": roles[1],
        "data": str(settings.data),
        "pairs": settings.pairs,
        "device": settings.device,
        "precision": contender.precision,
        "batch_size": settings.batch_size,
        "turns": settings.turns,
    }
    return run_task("with_trl", arguments, log, surroundings)


def run_torch(
    roles: tuple[str, str],
    precision: str,
    pairs: int,
    turns: int,
    saved: Path,
    log: str,
    settings: Settings,
    surroundings: Surroundings,
) -> Ended:
    """The tuned loop."""
    arguments = {
        "policy": roles[0],
        "reference": roles[1],
        "data": str(settings.data),
        "pairs": pairs,
        "device": settings.device,
        "precision": precision,
        "token_budget": settings.token_budget,
        "turns": turns,
        "log_probs": str(saved),
    }
    return run_task("with_torch", arguments, log, surroundings)


def make_bundle(
    contender: Contender,
    bundle: Path,
    shape: str,
    roles: tuple[str, str],
    settings: Settings,
    surroundings: Surroundings,
) -> Ended:
    """A recipe's bundle, with plans fitted to the data where its engine runs such; one that is there is taken."""
    if bundle.exists():
        return Ended([], None, 0.0, Memory())
    bundle.parent.mkdir(parents=True, exist_ok=True)
    recipe = load_recipe(contender.name)
    options: list[Any] = ["--policy", roles[0], "--reference", roles[1], "--output", bundle, "--link"]
    options += ["--recipe", contender.name]
    if recipe.precision == "fp8":
        options += ["--calibration", settings.data]
    if recipe.engine in PACKAGES:
        options += ["--profile-from", settings.data]
    if recipe.engine == "tensorrt-rtx" and settings.target is not None:
        options += ["--target", settings.target]
    if shape == LARGE:
        # A self-check needs the model in float32 on the processor; here the errors are measured.
        options += ["--no-self-check", "--layout", "shared"]
    return run_python(["-m", "dpo_fast.export", *options], f"{bundle.name}-export", surroundings)


def run_engine(bundle: Path, saved: Path, log: str, settings: Settings, surroundings: Surroundings) -> Ended:
    """A recipe's engine on its bundle; what engines keep between runs is removed first."""
    shutil.rmtree(surroundings.work / "cache", ignore_errors=True)
    arguments = {
        "bundle": str(bundle),
        "data": str(settings.data),
        "pairs": settings.pairs,
        "turns": settings.turns,
        "log_probs": str(saved),
    }
    return run_task("with_engine", arguments, log, surroundings)
