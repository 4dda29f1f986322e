"""The package that builds and runs plans: `tensorrt` or `tensorrt_rtx`, imported when it is wanted."""

import ctypes
import importlib
import sys
from types import ModuleType

from dpo_fast.errors import MissingDependencyError
from dpo_fast.tensorrt.plans import Package

# By a recipe's engine.
PACKAGES: dict[str, Package] = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt_rtx"}
EXTRAS: dict[Package, str] = {"tensorrt": "tensorrt", "tensorrt_rtx": "tensorrt-rtx"}


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


def count_gpus() -> int:
    """How many NVIDIA GPUs this machine's driver has; 0 where there is no driver."""
    try:
        driver = ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    except OSError:
        return 0
    count = ctypes.c_int(0)
    if driver.cuInit(0) != 0 or driver.cuDeviceGetCount(ctypes.byref(count)) != 0:
        return 0
    return count.value
