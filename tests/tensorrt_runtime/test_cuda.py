"""The device's memory: by the CUDA runtime's double, by the real bindings' names, and for real where there is a GPU."""

import ast
import enum
import gc
import inspect
import json
import operator
import os
import re
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from dpo_fast.engines import cuda
from dpo_fast.engines.cuda import Memory, RuntimeMemory, TorchMemory, open_memory
from dpo_fast.errors import BuildError, MissingDependencyError
from dpo_fast.tensorrt.package import count_gpus

from .surface import BUILD, ROOT

FOLDER = BUILD / "cuda-python"
INSTALL = f"{sys.executable} -m pip install --no-deps --target {FOLDER} cuda-bindings==13.4.4 cuda-pathfinder==1.9.0"


class Status(enum.IntEnum):
    cudaSuccess = 0
    cudaErrorMemoryAllocation = 2
    cudaErrorInsufficientDriver = 35
    cudaErrorNoDevice = 100
    cudaErrorIllegalAddress = 700


class CudaRuntime:
    """The CUDA runtime's double: every call returns its status first; memory is the host's."""

    cudaError_t = Status
    cudaMemcpyKind = SimpleNamespace(cudaMemcpyHostToDevice=1, cudaMemcpyDeviceToHost=2)
    cudaStreamNonBlocking, cudaEventDisableTiming, cudaEventBlockingSync = 1, 2, 1

    def __init__(self) -> None:
        self.status = Status.cudaSuccess
        self.held: dict[int, np.ndarray] = {}
        self.calls: list[str] = []

    def __getattr__(self, name: str):
        def call(*arguments):
            self.calls.append(name)
            if self.status:
                return (self.status, None)
            if name in ("cudaMalloc", "cudaMallocHost"):
                content = np.zeros(arguments[0] + 256, np.uint8)
                address = -(-content.ctypes.data // 256) * 256
                self.held[address] = content
                return Status.cudaSuccess, address
            if name in ("cudaFree", "cudaFreeHost", "cudaStreamDestroy", "cudaEventDestroy"):
                del self.held[arguments[0]]
            if name in ("cudaStreamCreateWithFlags", "cudaEventCreateWithFlags"):
                self.held[len(self.calls)] = np.zeros(0, np.uint8)
                return Status.cudaSuccess, len(self.calls)
            if name == "cudaMemcpyAsync":
                to, source, size = (
                    np.frombuffer((np.ctypeslib.ctypes.c_uint8 * arguments[2]).from_address(place), np.uint8)
                    if number < 2
                    else place
                    for number, place in enumerate(arguments[:3])
                )
                to[:size] = source
            return (Status.cudaSuccess,)

        return call

    def cudaGetDevice(self):
        return (self.status, 0 if not self.status else None)

    def cudaGetDeviceProperties(self, number: int):
        return Status.cudaSuccess, SimpleNamespace(name=b"NVIDIA Double")

    def cudaGetErrorString(self, status):
        return Status.cudaSuccess, status.name.removeprefix("cudaError").encode()


def round_trip(memory: Memory) -> None:
    """Bytes go to the device on one stream, and come back on another that waits for the first."""
    copying, computing = memory.stream(), memory.stream()
    device = memory.allocate(1000)
    there, back = memory.pinned(700), memory.pinned(700)
    there[:] = np.random.default_rng(0).integers(0, 256, 700)
    back[:] = 0
    memory.upload(device, there, copying)
    memory.wait(computing, memory.record(copying))
    memory.download(back, device, computing)
    memory.synchronize(memory.record(computing))
    np.testing.assert_array_equal(back, there)
    assert device.address % 256 == 0


def test_runtime_memory_copies_and_gives_everything_back():
    runtime = CudaRuntime()
    memory = RuntimeMemory(runtime)
    assert memory.device == "NVIDIA Double"
    round_trip(memory)
    part = memory.pinned(64)[10:20]  # an array's view holds its bytes
    gc.collect()
    assert len(runtime.held) == 3  # two streams, and the pinned bytes
    part[:] = 1
    del memory, part
    gc.collect()
    assert runtime.held == {}


@pytest.mark.parametrize("call", ["allocate", "pinned", "stream", "record"])
def test_status_of_each_call_is_looked_at(call):
    runtime = CudaRuntime()
    memory = RuntimeMemory(runtime)
    for status, kind in (
        (Status.cudaErrorMemoryAllocation, MemoryError),
        (Status.cudaErrorIllegalAddress, RuntimeError),
    ):
        runtime.status = status
        with pytest.raises(kind, match=f"{status.name}: {status.name.removeprefix('cudaError')}"):
            getattr(memory, call)(*([] if call == "stream" else [256]))


def test_status_of_each_copy_and_wait_is_looked_at():
    runtime = CudaRuntime()
    memory = RuntimeMemory(runtime)
    device, host, stream = memory.allocate(8), memory.pinned(8), memory.stream()
    event = memory.record(stream)
    runtime.status = Status.cudaErrorIllegalAddress
    for refused in (
        lambda: memory.upload(device, host, stream),
        lambda: memory.download(host, device, stream),
        lambda: memory.wait(stream, event),
        lambda: memory.synchronize(event),
    ):
        with pytest.raises(RuntimeError, match="IllegalAddress"):
            refused()
    runtime.status = Status.cudaSuccess


@pytest.mark.parametrize(
    ("status", "words"),
    [(Status.cudaErrorInsufficientDriver, "no NVIDIA driver"), (Status.cudaErrorNoDevice, "finds no GPU")],
)
def test_no_driver_and_no_device(status, words):
    runtime = CudaRuntime()
    runtime.status = status
    with pytest.raises(BuildError, match=words):
        RuntimeMemory(runtime)


def test_without_cuda_in_pytorch_and_without_cuda_python(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setitem(sys.modules, "cuda.bindings.runtime", None)
    with pytest.raises(MissingDependencyError, match=r"running a plan needs .*cuda-python.*dpo-fast\[tensorrt\]"):
        open_memory("tensorrt", "running a plan")


# -- the real bindings


def in_cuda_python(code: str) -> str:
    if not (FOLDER / "cuda" / "bindings").is_dir():
        pytest.fail(f"cuda-python is not there: {INSTALL}", pytrace=False)
    environment = {**os.environ, "PYTHONPATH": f"{FOLDER}{os.pathsep}{ROOT}{os.pathsep}{ROOT / 'tests'}"}
    found = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    return found.stdout


def test_every_name_of_the_cuda_runtime_exists():
    real = json.loads(
        in_cuda_python(
            "import json; from cuda.bindings import runtime as r;"
            "print(json.dumps(dir(r) + [*r.cudaError_t.__members__, *r.cudaMemcpyKind.__members__]))"
        )
    )
    used = {
        node.attr
        for node in ast.walk(ast.parse(inspect.getsource(cuda)))
        if isinstance(node, ast.Attribute) and re.match("cuda[A-Z]", node.attr)
    }
    assert len(used) > 15
    assert used <= set(real)
    assert {name for name in dir(CudaRuntime) if name.startswith("cuda")} <= set(real)


def test_every_name_of_pytorch_exists():
    used = set(re.findall(r"self\._torch((?:\.\w+)+)", inspect.getsource(TorchMemory)))
    assert len(used) > 5
    for name in used:
        operator.attrgetter(name.removeprefix("."))(torch)


def test_cuda_python_on_this_machine():
    """On a GPU bytes go and come back; without a driver the error says so."""
    said = in_cuda_python(
        "import torch; torch.cuda.is_available = lambda: False\n"
        "from dpo_fast.engines.cuda import open_memory\n"
        "from dpo_fast.errors import BuildError\n"
        "from tensorrt_runtime.test_cuda import round_trip\n"
        "try:\n    memory = open_memory('tensorrt', 'a test')\n"
        "except BuildError as error:\n    print(error)\n"
        "else:\n    round_trip(memory)\n    print('copied')\n"
    )
    assert said.startswith("copied" if count_gpus() else "no NVIDIA driver is installed"), said


def test_pytorch_on_this_machine():
    """The same by PyTorch, where it has CUDA; where not, it is not what is opened."""
    if torch.cuda.is_available():
        memory = open_memory("tensorrt", "a test")
        assert isinstance(memory, TorchMemory)
        round_trip(memory)
        with pytest.raises(MemoryError):
            memory.allocate(1 << 50)
    else:
        with pytest.raises((BuildError, MissingDependencyError)):
            open_memory("tensorrt", "a test")
