"""The verdict needs NumPy and nothing heavier."""

import subprocess
import sys


def test_verification_imports_numpy_and_the_standard_library_only():
    """Everything that importing all of `dpo_fast.verification` loads, beyond what NumPy itself does."""
    program = """
import sys, numpy, numpy.random, numpy.typing
before = set(sys.modules)
import importlib, dpo_fast.verification
names = ("types", "integrity", "decisions", "drift", "noise", "verdict")
for name in names:
    importlib.import_module(f"dpo_fast.verification.{name}")
loaded = {name for name in set(sys.modules) - before if name.partition(".")[0] not in sys.stdlib_module_names}
print(" ".join(sorted(name for name in loaded if name.partition(".")[0] != "numpy")))
"""
    output = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    allowed = {"dpo_fast", "dpo_fast.types", "dpo_fast.errors", "dpo_fast.metrics", "dpo_fast.verification"}
    loaded = set(output.split())
    assert "dpo_fast.verification.verdict" in loaded
    prefixes = ("dpo_fast.metrics.", "dpo_fast.verification.")
    assert {name for name in loaded if not name.startswith(prefixes)} <= allowed
