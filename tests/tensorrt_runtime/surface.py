"""The real interfaces of TensorRT 11 and 10 and of TensorRT-RTX, without a GPU.

TensorRT's bindings come without the libraries behind them; small libraries of the same names let them be imported.
"""

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
BUILD = ROOT / "build"
BINDINGS = {"11.4": "11.4.0.106", "10.16": "10.16.1.11"}
RTX = "1.7.1.116"
ALL = (*BINDINGS, "RTX")


@dataclass(frozen=True)
class Surface:
    """What a package offers.

    Attributes:
        names: of the module.
        members: by class or enumeration: each member's signatures; none for what is no method.
    """

    version: str
    names: frozenset[str]
    members: dict[str, dict[str, list[str]]]


@cache
def surface(which: str) -> Surface:
    """The interface of "11.4", "10.16" or "RTX"; the test fails where it is not installed."""
    environment = dict(os.environ)
    if which == "RTX":
        module, install = "tensorrt_rtx", f"{sys.executable} -m pip install tensorrt_rtx=={RTX}"
    else:
        module, folder = "tensorrt_bindings", BUILD / f"tensorrt-{which}"
        install = (
            f"{sys.executable} -m pip install --no-deps --target {folder} tensorrt-cu13-bindings=={BINDINGS[which]}"
        )
        if not (folder / module).is_dir():
            pytest.fail(f"the bindings of TensorRT {which} are not there: {install}", pytrace=False)
        environment |= {"PYTHONPATH": str(folder), "LD_LIBRARY_PATH": str(stubs(which.split(".")[0]))}
    found = subprocess.run(
        [sys.executable, str(HERE / "dump_surface.py"), module], env=environment, capture_output=True, text=True
    )
    if found.returncode:
        pytest.fail(f"{module} cannot be imported: {install}\n{found.stderr}", pytrace=False)
    value = json.loads(found.stdout)
    assert value["version"] == BINDINGS.get(which, RTX), f"another version is installed: {install}"
    return Surface(value["version"], frozenset(value["names"]), value["members"])


def stubs(major: str) -> Path:
    """A folder of libraries that the bindings of a major version find."""
    folder = BUILD / f"tensorrt-stubs-{major}"
    folder.mkdir(parents=True, exist_ok=True)
    for source in sorted((HERE / "stubs").glob("*.c")):
        with tempfile.TemporaryDirectory(dir=folder) as working:
            library = Path(working) / f"lib{source.stem}.so.{major}"
            subprocess.run(["cc", "-shared", "-fPIC", "-o", str(library), str(source)], check=True)
            library.replace(folder / library.name)
    return folder
