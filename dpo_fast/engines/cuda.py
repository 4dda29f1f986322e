"""The memory of a CUDA device: bytes there, pinned bytes here, streams, and copies between them.

TensorRT takes addresses and a stream, and leaves both to its caller. PyTorch has them where it is built for CUDA;
otherwise `cuda-python` has.
"""

import ctypes
import importlib
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from dpo_fast.errors import BuildError, MissingDependencyError

Bytes = NDArray[np.uint8]
Event = Any  # a point in a stream's work; each implementation has its own


class DeviceBytes(Protocol):
    """Bytes on the device; freed when nobody holds them any more."""

    @property
    def address(self) -> int:
        """Of the first, a multiple of 256."""
        ...


class Memory(Protocol):
    """A CUDA device's memory. Work that is put on a stream runs in that stream's order, and nobody waits for it.

    What a stream's work reads or writes must be held, and left alone, until an event recorded after it is synchronised.
    What CUDA refuses is a `RuntimeError`.

    Attributes:
        device: its name, such as "NVIDIA H100 80GB HBM3".
    """

    device: str

    def allocate(self, size: int) -> DeviceBytes:
        """Bytes on the device, of any content; `MemoryError` where there are too few."""
        ...

    def pinned(self, size: int) -> Bytes:
        """Host bytes that can be copied while the host goes on; `MemoryError` where there are too few."""
        ...

    def stream(self) -> int:
        """A new stream's handle."""
        ...

    def upload(self, target: DeviceBytes, source: Bytes, stream: int) -> None:
        """Put a copy of pinned bytes, to the first of the device's, on a stream."""
        ...

    def download(self, target: Bytes, source: DeviceBytes, stream: int) -> None:
        """Put a copy of the first of the device's bytes, to pinned bytes, on a stream."""
        ...

    def record(self, stream: int) -> Event:
        """The point that a stream's work has been put to so far."""
        ...

    def wait(self, stream: int, event: Event) -> None:
        """Let what is put on a stream from now on run after an event."""
        ...

    def synchronize(self, event: Event) -> None:
        """Wait until an event's stream has come to it."""
        ...


def open_memory(extra: str, purpose: str) -> Memory:
    """The current device's memory.

    Args:
        extra: of dpo_fast, which installs cuda-python.
        purpose: what for, as the error says it.

    Raises:
        MissingDependencyError: neither PyTorch with CUDA nor cuda-python is installed.
        BuildError: there is no NVIDIA driver or no device.
    """
    import torch

    if torch.cuda.is_available():
        return TorchMemory()
    try:
        runtime = importlib.import_module("cuda.bindings.runtime")
    except (ImportError, OSError) as error:
        raise MissingDependencyError("cuda-python", extra, purpose) from error
    return RuntimeMemory(runtime)


class _TorchBytes:
    def __init__(self, tensor: Any) -> None:
        self.tensor = tensor

    @property
    def address(self) -> int:
        return int(self.tensor.data_ptr())


class TorchMemory:
    """PyTorch's memory, of which its other users have their share."""

    def __init__(self) -> None:
        import torch

        self._torch: Any = torch  # half of what is used here has no types
        self.device = torch.cuda.get_device_name()

    def allocate(self, size: int) -> _TorchBytes:
        """As `Memory`; PyTorch aligns to 512 bytes."""
        with self._out_of_memory():
            return _TorchBytes(self._torch.empty(size, dtype=self._torch.uint8, device="cuda"))

    def pinned(self, size: int) -> Bytes:
        """As `Memory`; the array holds its tensor."""
        with self._out_of_memory():
            pinned: Bytes = self._torch.empty(size, dtype=self._torch.uint8, pin_memory=True).numpy()
        return pinned

    def stream(self) -> int:
        """As `Memory`; of PyTorch's pool, which lives as long as the process."""
        return int(self._torch.cuda.Stream().cuda_stream)

    def upload(self, target: Any, source: Bytes, stream: int) -> None:
        """As `Memory`."""
        with self._torch.cuda.stream(self._torch.cuda.ExternalStream(stream)):
            target.tensor[: source.size].copy_(self._torch.from_numpy(source), non_blocking=True)

    def download(self, target: Bytes, source: Any, stream: int) -> None:
        """As `Memory`."""
        with self._torch.cuda.stream(self._torch.cuda.ExternalStream(stream)):
            self._torch.from_numpy(target).copy_(source.tensor[: target.size], non_blocking=True)

    def record(self, stream: int) -> Event:
        """As `Memory`."""
        event = self._torch.cuda.Event(blocking=True)  # who waits for it sleeps
        event.record(self._torch.cuda.ExternalStream(stream))
        return event

    def wait(self, stream: int, event: Event) -> None:
        """As `Memory`."""
        self._torch.cuda.ExternalStream(stream).wait_event(event)

    def synchronize(self, event: Event) -> None:
        """As `Memory`."""
        event.synchronize()

    @contextmanager
    def _out_of_memory(self) -> Iterator[None]:
        """PyTorch's own exception is a `RuntimeError`."""
        try:
            yield
        except self._torch.OutOfMemoryError as error:
            raise MemoryError(str(error)) from error


class _Owned:
    """An address, or a handle, that is given back when nobody holds this any more."""

    def __init__(self, address: int, give_back: Any) -> None:
        self.address = address
        weakref.finalize(self, give_back, address)


class RuntimeMemory:
    """The CUDA runtime's memory by cuda-python, whose `cuda.bindings.runtime` is given.

    Raises:
        BuildError: as `open_memory`.
    """

    def __init__(self, runtime: ModuleType) -> None:
        self._runtime = runtime
        self._streams: list[_Owned] = []
        status, number = runtime.cudaGetDevice()
        if status == runtime.cudaError_t.cudaErrorInsufficientDriver:
            raise BuildError(
                "no NVIDIA driver is installed, or one older than this CUDA needs; install NVIDIA's driver"
            )
        if status == runtime.cudaError_t.cudaErrorNoDevice:
            raise BuildError("the NVIDIA driver finds no GPU; see what nvidia-smi and CUDA_VISIBLE_DEVICES say")
        self.device: str = self._done(runtime.cudaGetDeviceProperties(self._done((status, number)))).name.decode()

    def allocate(self, size: int) -> _Owned:
        """As `Memory`."""
        return _Owned(int(self._done(self._runtime.cudaMalloc(size))), self._runtime.cudaFree)

    def pinned(self, size: int) -> Bytes:
        """As `Memory`; the array holds what owns its bytes."""
        address = int(self._done(self._runtime.cudaMallocHost(size)))
        owner = (ctypes.c_uint8 * size).from_address(address)
        weakref.finalize(owner, self._runtime.cudaFreeHost, address)
        return np.ctypeslib.as_array(owner)

    def stream(self) -> int:
        """As `Memory`; it lives as long as this does."""
        # Non-blocking: the default stream's work, which is others', is not waited for.
        handle = int(self._done(self._runtime.cudaStreamCreateWithFlags(self._runtime.cudaStreamNonBlocking)))
        self._streams.append(_Owned(handle, self._runtime.cudaStreamDestroy))
        return handle

    def upload(self, target: DeviceBytes, source: Bytes, stream: int) -> None:
        """As `Memory`."""
        kind = self._runtime.cudaMemcpyKind.cudaMemcpyHostToDevice
        self._done(self._runtime.cudaMemcpyAsync(target.address, source.ctypes.data, source.size, kind, stream))

    def download(self, target: Bytes, source: DeviceBytes, stream: int) -> None:
        """As `Memory`."""
        kind = self._runtime.cudaMemcpyKind.cudaMemcpyDeviceToHost
        self._done(self._runtime.cudaMemcpyAsync(target.ctypes.data, source.address, target.size, kind, stream))

    def record(self, stream: int) -> Event:
        """As `Memory`."""
        # Blocking: who waits for it sleeps.
        flags = self._runtime.cudaEventDisableTiming | self._runtime.cudaEventBlockingSync
        event = _Owned(int(self._done(self._runtime.cudaEventCreateWithFlags(flags))), self._runtime.cudaEventDestroy)
        self._done(self._runtime.cudaEventRecord(event.address, stream))
        return event

    def wait(self, stream: int, event: Event) -> None:
        """As `Memory`."""
        self._done(self._runtime.cudaStreamWaitEvent(stream, event.address, 0))

    def synchronize(self, event: Event) -> None:
        """As `Memory`."""
        self._done(self._runtime.cudaEventSynchronize(event.address))

    def _done(self, result: tuple[Any, ...]) -> Any:
        """A call's value, without its status."""
        status, *values = result
        if status == self._runtime.cudaError_t.cudaSuccess:
            return values[0] if values else None
        _, text = self._runtime.cudaGetErrorString(status)
        kind = MemoryError if status == self._runtime.cudaError_t.cudaErrorMemoryAllocation else RuntimeError
        raise kind(f"{status.name}: {text.decode()}")
