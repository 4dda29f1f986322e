"""A CUDA device's memory on the host: work on a stream runs as late as it may, and no order is taken for granted.

What is put on a stream runs when the host synchronises an event after it, and not before: bytes that the host changes
or frees too early are wrong by then. Bytes that two streams touch without an event between them are a fault at once,
whatever the order they would run in here.
"""

import weakref
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

POISON = 0xFF  # NaN as a float, -1 as an integer
ALIGNMENT = 256


class DeviceFaultError(RuntimeError):
    """What a real device would answer with wrong numbers, or not at all."""


class Bytes:
    """Device bytes; poisoned when nobody holds them any more."""

    def __init__(self, memory: "FakeMemory", size: int) -> None:
        backing = np.full(size + ALIGNMENT, POISON, np.uint8)
        self.address = -(-backing.ctypes.data // ALIGNMENT) * ALIGNMENT
        self._finalizer = weakref.finalize(self, memory.free, self.address)
        memory.blocks[self.address] = Block(backing[self.address - backing.ctypes.data :][:size])


@dataclass
class Block:
    """A live block: its bytes, and who wrote and read it last, by stream."""

    content: np.ndarray
    written: dict[int, int] = field(default_factory=dict)
    read: dict[int, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Event:
    stream: int
    position: int  # of the stream's work, when recorded
    known: dict[int, int]  # how far every stream is when that work is done


class FakeMemory:
    device = "Double"

    def __init__(self, limit: int | None = None) -> None:
        """`limit`: bytes; more are refused."""
        self.limit = limit
        self.blocks: dict[int, Block] = {}
        self.failing: dict[str, Exception] = {}  # by method: what it raises
        self._work: dict[int, list[Callable[[], None]]] = {}
        self._done: dict[int, int] = defaultdict(int)
        self._known: dict[int | None, dict[int, int]] = defaultdict(dict)  # by stream, and by the host (None)

    # -- what the engine calls

    def allocate(self, size: int) -> Bytes:
        self._fail("allocate")
        if self.limit is not None and self.held + size > self.limit:
            raise MemoryError(f"{size} bytes")
        return Bytes(self, size)

    def pinned(self, size: int) -> np.ndarray:
        self._fail("pinned")
        return np.full(size, POISON, np.uint8)

    def stream(self) -> int:
        self._work[len(self._work) + 1] = []
        return len(self._work)

    def upload(self, target: Bytes, source: np.ndarray, stream: int) -> None:
        self._fail("upload")
        address, size = target.address, source.size
        self.enqueue(stream, lambda: self.view(address, size).__setitem__(slice(None), source), [], [(address, size)])

    def download(self, target: np.ndarray, source: Bytes, stream: int) -> None:
        self._fail("download")
        address, size = source.address, target.size
        self.enqueue(stream, lambda: target.__setitem__(slice(None), self.view(address, size)), [(address, size)], [])

    def record(self, stream: int) -> Event:
        self._fail("record")
        return Event(stream, self._position(stream), {**self._known[stream], stream: self._position(stream)})

    def wait(self, stream: int, event: Event) -> None:
        self._fail("wait")
        self._work[stream].append(lambda: self._run(event))
        self._learn(stream, event.known)

    def synchronize(self, event: Event) -> None:
        self._fail("synchronize")
        self._run(event)
        self._learn(None, event.known)

    # -- what the engine's double calls

    def enqueue(
        self, stream: int, work: Callable[[], None], reads: list[tuple[int, int]], writes: list[tuple[int, int]]
    ) -> None:
        """Put work on a stream, which touches (address, size) of these."""
        self._learn(stream, self._known[None])
        self._work[stream].append(work)
        position = self._position(stream)
        known = self._known[stream]
        for places, is_write in ((reads, False), (writes, True)):
            for address, size in places:
                block = self._block(address, size)
                for earlier in (block.written, block.read) if is_write else (block.written,):
                    for other, when in earlier.items():
                        if other != stream and known.get(other, 0) < when:
                            raise DeviceFaultError(f"streams {other} and {stream} touch {address:#x} in no order")
                (block.written if is_write else block.read)[stream] = position

    def view(self, address: int, size: int) -> np.ndarray:
        """Live bytes."""
        block = self._block(address, size)
        start = address - block.content.ctypes.data
        return block.content[start : start + size]

    def pending(self) -> int:
        """How much work no one has waited for."""
        return sum(self._position(stream) - self._done[stream] for stream in self._work)

    @property
    def held(self) -> int:
        """Live bytes."""
        return sum(block.content.size for block in self.blocks.values())

    def free(self, address: int) -> None:
        block = self.blocks.pop(address)
        block.content[:] = POISON

    # -- inside

    def _block(self, address: int, size: int) -> Block:
        for start, block in self.blocks.items():
            if start <= address and address + size <= start + block.content.size:
                return block
        raise DeviceFaultError(f"{size} bytes at {address:#x} are not, or no longer, allocated")

    def _position(self, stream: int) -> int:
        return len(self._work[stream])

    def _run(self, event: Event) -> None:
        while self._done[event.stream] < event.position:
            work = self._work[event.stream][self._done[event.stream]]
            self._done[event.stream] += 1
            work()

    def _learn(self, who: int | None, known: dict[int, int]) -> None:
        for stream, position in known.items():
            self._known[who][stream] = max(position, self._known[who].get(stream, 0))

    def _fail(self, method: str) -> None:
        if method in self.failing:
            raise self.failing[method]
