"""One plan, built in a process of its own: the builder is a native library that can crash.

Started by `dpo_fast.tensorrt.builder` as ``python -m dpo_fast.tensorrt.worker``: a job as JSON on standard input, a
JSON object a line on standard output: {"phase": …, "done": …} as it goes on, in the end {"built": …} or {"refused": …}.
"""

import importlib
import json
import os
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any, TextIO

from dpo_fast.tensorrt.package import parser_errors


class RefusedError(Exception):
    """The package did not do what it was asked; the message says what, and what it said itself."""


def build(job: dict[str, Any], say: TextIO) -> None:
    """Build one plan.

    Args:
        job: package; graph (path); plan (path to write); profiles: for each, (smallest, tuned, largest) shape by
            input; targets; workspace_bytes or None; refittable; version_compatible; hardware_compatible; timing_cache
            (path) or None.
        say: where the lines go.

    Raises:
        RefusedError: by the parser or the builder.
    """
    trt = importlib.import_module(job["package"])
    messages: list[str] = []

    def tell(**line: Any) -> None:
        say.write(json.dumps(line) + "\n")
        say.flush()

    logger = _make_logger(trt, messages)
    builder = trt.Builder(logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(job["graph"]):
        raise RefusedError(parser_errors(parser) or _last(messages))

    config = builder.create_builder_config()
    # float32 is float32: without this, its products keep 10 bits of the mantissa.
    config.clear_flag(trt.BuilderFlag.TF32)
    if job["refittable"]:
        config.set_flag(trt.BuilderFlag.REFIT)
    if job["version_compatible"]:
        config.set_flag(trt.BuilderFlag.VERSION_COMPATIBLE)
    if job["hardware_compatible"]:
        config.hardware_compatibility_level = trt.HardwareCompatibilityLevel.AMPERE_PLUS
    if job["workspace_bytes"] is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, job["workspace_bytes"])
    if job["targets"]:
        config.num_compute_capabilities = len(job["targets"])
        for index, target in enumerate(job["targets"]):
            capability = getattr(trt.ComputeCapability, target.upper(), None)
            if capability is None or not config.set_compute_capability(capability, index):
                raise RefusedError(f"it does not build for {target}: {_last(messages)}")
    profiles = [_add_profile(builder, config, network, shapes) for shapes in job["profiles"]]
    cache = _open_timing_cache(config, job["timing_cache"])
    monitor = _make_monitor(trt, tell)
    config.progress_monitor = monitor

    started = time.perf_counter()
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise RefusedError(_last(messages) or "the builder gave no reason")
    seconds = time.perf_counter() - started
    target = Path(job["plan"])
    with target.open("wb") as file:
        file.write(plan)
        file.flush()
        os.fsync(file.fileno())
    if cache is not None:
        _keep_timing_cache(config, Path(job["timing_cache"]))
    tell(
        built={
            "version": trt.__version__,
            "seconds": round(seconds, 3),
            "bytes": plan.nbytes,
            "layers": network.num_layers,
            "profiles": len(profiles),
            "peak_memory_bytes": _peak_memory(),
            "warnings": [message for message in messages if message.startswith("W")][:20],
        }
    )


def _make_logger(trt: ModuleType, messages: list[str]) -> Any:
    """A logger that keeps warnings and errors."""

    class Log(trt.ILogger):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, message: str) -> None:
            kinds = {
                trt.ILogger.WARNING: "W",
                trt.ILogger.ERROR: "E",
                trt.ILogger.INTERNAL_ERROR: "E",
            }
            kind = kinds.get(severity)
            text = " ".join(message.split())[:500]
            # int64 inputs are what the graph says; nothing is to be made sure of.
            if kind is not None and "Int64 binding" not in text:
                messages.append(f"{kind}: {text}")

    return Log()


def _make_monitor(trt: ModuleType, tell: Any) -> Any:
    """Tells of the outermost phase's steps."""

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.steps: dict[str, int] = {}

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            if parent_phase is None:
                self.steps[phase_name] = num_steps

        def step_complete(self, phase_name: str, step: int) -> bool:
            if phase_name in self.steps:
                tell(phase=phase_name, done=(step + 1) / max(self.steps[phase_name], 1))
            return True  # go on

        def phase_finish(self, phase_name: str) -> None:
            self.steps.pop(phase_name, None)

    return Monitor()


def _add_profile(builder: Any, config: Any, network: Any, shapes: dict[str, list[list[int]]]) -> Any:
    """Add one optimisation profile."""
    profile = builder.create_optimization_profile()
    for index in range(network.num_inputs):
        name = network.get_input(index).name
        smallest, tuned, largest = map(tuple, shapes[name])
        profile.set_shape(name, smallest, tuned, largest)
    if config.add_optimization_profile(profile) < 0:
        raise RefusedError(f"the optimisation profile {shapes} was not taken")
    return profile


def _open_timing_cache(config: Any, path: str | None) -> Any:
    """What earlier builds measured on this machine; nothing where the file is missing, or of another machine."""
    if path is None:
        return None
    kept = Path(path)
    cache = config.create_timing_cache(kept.read_bytes() if kept.is_file() else b"")
    if not config.set_timing_cache(cache, False):
        cache = config.create_timing_cache(b"")
        config.set_timing_cache(cache, False)
    return cache


def _keep_timing_cache(config: Any, path: Path) -> None:
    """Keep what was measured; the file appears whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    working = path.with_name(f"{path.name}.{os.getpid()}")
    working.write_bytes(config.get_timing_cache().serialize())
    working.replace(path)


def _last(messages: list[str]) -> str:
    """The first error that the package told of: what follows comes of it."""
    errors = [message[3:] for message in messages if message.startswith("E")]
    return errors[0] if errors else ""


def _peak_memory() -> int:
    """The largest resident set of this process, in bytes."""
    import resource

    status = Path("/proc/self/status")
    if status.is_file():  # what Linux says otherwise counts the process that this one was forked from
        lines = dict(line.split(":", 1) for line in status.read_text(encoding="utf-8").splitlines() if ":" in line)
        if "VmHWM" in lines:
            return int(lines["VmHWM"].split()[0]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def main() -> int:
    """Read a job, build it, and say what came of it."""
    # The package prints as it likes; the lines have a way of their own.
    say = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    try:
        build(json.load(sys.stdin), say)
    except RefusedError as error:
        say.write(json.dumps({"refused": str(error)}) + "\n")
        say.flush()
    return 0


if __name__ == "__main__":
    sys.exit(main())
