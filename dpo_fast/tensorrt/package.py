"""The package that builds and runs plans: `tensorrt` or `tensorrt_rtx`, imported when it is wanted."""

import ctypes
import importlib
import mmap
import sys
from collections import deque
from pathlib import Path
from types import ModuleType
from typing import Any

from dpo_fast.errors import DpoFastError, MissingDependencyError
from dpo_fast.tensorrt.plans import Package

# By a recipe's engine.
PACKAGES: dict[str, Package] = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt_rtx"}
EXTRAS: dict[Package, str] = {"tensorrt": "tensorrt", "tensorrt_rtx": "tensorrt-rtx"}
KEPT_MESSAGES = 3


def import_package(package: Package, purpose: str) -> ModuleType:
    """Import a package.

    Args:
        package: the one whose plans are wanted.
        purpose: what for, as the error says it.

    Raises:
        MissingDependencyError: it, or a library that it loads, is not installed.
    """
    try:
        return importlib.import_module(package)
    except (ImportError, OSError) as error:  # the bindings may be there, and the library behind them not
        raise MissingDependencyError(package, EXTRAS[package], purpose) from error


def load_driver() -> Any:
    """NVIDIA's driver as a library, or None without one that starts."""
    try:
        driver = ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    except OSError:
        return None
    return driver if driver.cuInit(0) == 0 else None


def count_gpus() -> int:
    """How many NVIDIA GPUs this machine's driver has; 0 where there is no driver."""
    driver, count = load_driver(), ctypes.c_int(0)
    if driver is None or driver.cuDeviceGetCount(ctypes.byref(count)) != 0:
        return 0
    return count.value


def message_log(package: ModuleType) -> Any:
    """A logger that keeps the package's last errors and warnings, for our own messages."""

    class MessageLog(package.ILogger):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            package.ILogger.__init__(self)  # the bindings want it called by name
            self.messages: deque[str] = deque(maxlen=KEPT_MESSAGES)

        def log(self, severity: Any, msg: str) -> None:
            if severity <= package.ILogger.WARNING:
                self.messages.append(" ".join(msg.split())[:300])

        def last(self) -> str:
            """The messages since the last call, as a message goes on with them."""
            text = " | ".join(self.messages)
            self.messages.clear()
            return f": {text}" if text else ""

    return MessageLog()


def read_plan(
    package: ModuleType, log: Any, plan: Path, error_kind: type[DpoFastError], *, host_code: bool = False
) -> Any:
    """Deserialise a plan.

    Args:
        package: whose runtime reads it.
        log: a `message_log`.
        plan: the file.
        error_kind: what is raised.
        host_code: whether the plan's own code may run: one for later versions brings its runtime along.

    Returns:
        The ICudaEngine.

    Raises:
        DpoFastError: of `error_kind`: the file is missing or empty, or this version on this device does not take it.
    """
    again = "build the plans again on this machine with `dpo-fast build`"
    try:
        runtime = package.Runtime(log)
        if host_code:
            runtime.engine_host_code_allowed = True
        with plan.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            engine = runtime.deserialize_cuda_engine(content)
    except TypeError as error:  # what the bindings raise where the library makes nothing
        raise error_kind(
            f"{package.__name__} {package.__version__} does not start{log.last()}; see its driver"
        ) from error
    except (OSError, ValueError) as error:  # mmap takes no empty file
        raise error_kind(f"{plan}: cannot be read ({error}); {again}") from error
    if engine is None:
        raise error_kind(f"{plan}: {package.__name__} {package.__version__} does not take it{log.last()}; {again}")
    return engine


def parser_errors(parser: Any) -> str:
    """What a parser refused first, with node and operator."""
    errors = [parser.get_error(number) for number in range(parser.num_errors)]
    return "; ".join(
        f"node {error.node_name()!r} ({error.node_operator() or 'no operator'}): {' '.join(error.desc().split())[:300]}"
        for error in errors[:3]
    )
