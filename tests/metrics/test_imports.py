"""The metrics need NumPy and nothing heavier."""

import subprocess
import sys


def test_metrics_import_numpy_and_the_standard_library_only():
    """Everything that importing all of `dpo_fast.metrics` loads, beyond what NumPy itself does."""
    program = """
import sys, numpy, numpy.random, numpy.typing
before = set(sys.modules)
import importlib, pkgutil, dpo_fast.metrics
for module in pkgutil.iter_modules(dpo_fast.metrics.__path__, "dpo_fast.metrics."):
    importlib.import_module(module.name)
loaded = {name for name in set(sys.modules) - before if name.partition(".")[0] not in sys.stdlib_module_names}
print(" ".join(sorted(name for name in loaded if name.partition(".")[0] != "numpy")))
"""
    output = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    allowed = {"dpo_fast", "dpo_fast.types", "dpo_fast.errors", "dpo_fast.metrics"}
    loaded = set(output.split())
    assert {"dpo_fast.metrics.summary", "dpo_fast.metrics.losses"} <= loaded
    assert {name for name in loaded if not name.startswith("dpo_fast.metrics.")} <= allowed
