"""TensorRT and TensorRT-RTX: a graph's two plans, run one after the other on one GPU.

::

    rows of tokens -> [body] -> states, on the device -> [head], some targets at a time -> log_prob …

A batch is cut into pieces that the plans' profiles take. Two pieces are under way at once: while one is computed, the
next one's inputs are copied on a stream of their own. All computing is on one stream, so that the plans share what
memory they compute in.
"""

import copy
import itertools
import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from dpo_fast.batches import Batch
from dpo_fast.engines.cuda import Bytes, DeviceBytes, Event, Memory, open_memory
from dpo_fast.engines.onnxruntime import ADAPTER_GATES
from dpo_fast.errors import BundleError, EngineOutputError
from dpo_fast.tensorrt.contract import AGAIN, OUTPUTS, TARGET_IDS, Contract
from dpo_fast.tensorrt.package import EXTRAS, import_package, message_log, read_plan
from dpo_fast.tensorrt.plans import STATES, TARGET_GATES, WIDTH_STEP, read_plans
from dpo_fast.text import said_by
from dpo_fast.types import Float32Array, Int64Array, TokenScores

ALIGNMENT = 256  # bytes; of every address that TensorRT is given
IN_FLIGHT = 2
Tensor = tuple[tuple[int, ...], int]  # shape and address
Held = TypeVar("Held")


@dataclass(frozen=True, slots=True)
class Piece:
    """Rows and targets of a batch, padded to what a profile takes.

    Attributes:
        profile: the body's, by number.
        inputs: of both plans by name: (B, T) or (N,) int64, adapter_gates (B, adapters) float32.
        count: how many targets are wanted; those after them are padding.
    """

    profile: int
    inputs: dict[str, NDArray[Any]]
    count: int


@dataclass(slots=True)
class _Slot:
    """What a piece under way has to itself; none of it may be touched before `done`.

    Attributes:
        device, host: bytes by use, with their sizes.
        place: the batch, for messages.
        count: how many targets are wanted.
        done: when the outputs are on the host.
    """

    device: dict[str, tuple[int, DeviceBytes]] = field(default_factory=dict)
    host: dict[str, tuple[int, Bytes]] = field(default_factory=dict)
    place: str = ""
    count: int = 0
    done: Event = None


class TensorRtEngine:
    """A log-prob graph, cut where the head begins, as two plans of TensorRT or TensorRT-RTX."""

    def __init__(
        self,
        description: Path,
        *,
        precision: str,
        gates: Sequence[float] | None = None,
        memory: Memory | None = None,
        package: ModuleType | None = None,
    ) -> None:
        """Load a role's plans onto the current device.

        Args:
            description: the role's JSON file beside its plans (see `dpo_fast.tensorrt.plans`).
            precision: of the graph's matrix products, for the record.
            gates: one for each adapter in the graph: 1 turns it on, 0 off; None for a graph without adapters.
            memory: the device's; None opens the current one's.
            package: whose runtime takes the plans; None imports the one that the description names.

        Raises:
            MissingDependencyError: the package, or one that reaches the device's memory, is not installed.
            BuildError: there is no NVIDIA driver or no device.
            BundleError: a plan is missing, was built by another version or for another device, is not what its
                description says, or finds too little memory.
        """
        plans = read_plans(description)
        purpose = f"running a plan of {plans.package}"
        package = package or import_package(plans.package, purpose)
        self._memory = memory or open_memory(EXTRAS[plans.package], purpose)
        self._plans = plans
        self._log = message_log(package)
        self._slots: list[_Slot] = []  # those at rest
        version_compatible = bool(plans.options.get("version_compatible"))
        body, head = (
            read_plan(package, self._log, description.parent / name, BundleError, host_code=version_compatible)
            for name in (plans.body, plans.head)
        )
        self._gates: Sequence[float] | Sequence[Sequence[float]] | None = gates
        self._adapters = 0 if gates is None else len(gates)
        contract = Contract(description, package, plans)
        self._body_inputs = contract.check_body(body, self._adapters)
        state_type, self._has_target_gates = contract.check_head(head, body, self._adapters)
        self._hidden_size = int(head.get_tensor_shape(STATES)[1])
        self._state_size = contract.state_sizes[state_type]
        self._step = self._head_step(description)
        try:
            self._open_contexts(package, body, head)
        except MemoryError as error:
            raise BundleError(
                f"{description}: the plans find too little device memory ({error}); free some, or build the plans "
                "again with a lower --token-budget"
            ) from error
        except RuntimeError as error:
            raise BundleError(f"{description}: the plans do not start ({said_by(error, 600)}); {AGAIN}") from error
        self.precision = precision
        self.name = (
            f"{plans.package} {package.__version__} {self._memory.device}, {precision}, "
            f"states in {contract.state_names[state_type]}"
        )

    def with_gates(self, gates: Sequence[float] | Sequence[Sequence[float]]) -> "TensorRtEngine":
        """The same plans with other adapters turned on; several lists of gates are taken by the rows in turn.

        The two share contexts and streams: one thread may use both in turn, two threads may not.

        Raises:
            BundleError: the plans have another number of adapters.
        """
        if np.shape(gates)[-1] != self._adapters:
            raise BundleError(
                f"{self._plans.body}: has {self._adapters} adapters, and {np.shape(gates)[-1]} gates were given; "
                "export the bundle again"
            )
        other = copy.copy(self)
        other._gates = gates
        return other

    def score(self, batch: Batch) -> TokenScores:
        """Score a batch's N targets.

        Raises:
            EngineOutputError: as `score_all`.
        """
        return next(self.score_all([batch]))

    def score_all(self, batches: Iterable[Batch]) -> Iterator[TokenScores]:
        """The scores of each batch, in order; the next batch is under way when one is given out.

        An output that TensorRT leaves unwritten is NaN, which `dpo_fast.scores` refuses, as it does any other NaN.

        Raises:
            EngineOutputError: a row is wider than every profile, memory is too short, TensorRT refused or failed, or
                its outputs have other shapes than the targets.
        """
        under_way: deque[tuple[_Slot, bool]] = deque()  # and whether it is its batch's last piece
        parts: list[Float32Array] = []  # of the batch that is being collected: (outputs, targets) each

        def collect() -> Iterator[TokenScores]:
            slot, is_last = under_way[0]
            with self._failures(slot.place):
                parts.append(self._collect(slot))
            under_way.popleft()
            self._slots.append(slot)
            if is_last:
                scores = TokenScores(**dict(zip(OUTPUTS, np.concatenate(parts, axis=1), strict=True)))
                parts.clear()
                yield scores

        try:
            for batch in batches:
                pieces = list(self._pieces(batch))
                for number, piece in enumerate(pieces, start=1):
                    slot = self._slots.pop() if self._slots else _Slot()
                    under_way.append((slot, number == len(pieces)))
                    rows, width = batch.input_ids.shape
                    slot.place = f"a batch of {rows} x {width} tokens, {len(batch.target_ids)} targets"
                    with self._failures(slot.place):
                        self._enqueue(piece, slot)
                    if len(under_way) == IN_FLIGHT:
                        yield from collect()
            while under_way:
                yield from collect()
        finally:
            if under_way:  # given up before its time: the device may still be at work on what is freed now
                with suppress(RuntimeError, MemoryError):
                    self._memory.synchronize(self._memory.record(self._copying))
                    self._memory.synchronize(self._memory.record(self._computing))

    def _head_step(self, description: Path) -> int:
        """How many targets the head takes at a time, so that the addresses of each time are aligned."""
        row_sizes = [8, 4, self._hidden_size * self._state_size]  # bytes of a target id, of an output, of a state
        if self._has_target_gates:
            row_sizes.append(4 * self._adapters)
        unit = math.lcm(*(ALIGNMENT // math.gcd(ALIGNMENT, size) for size in row_sizes))
        if self._plans.chunk < unit:
            raise BundleError(
                f"{description}: its head takes {self._plans.chunk} targets at a time, and aligned addresses want a "
                f"multiple of {unit}; {AGAIN}"
            )
        return self._plans.chunk // unit * unit

    def _open_contexts(self, package: ModuleType, body: Any, head: Any) -> None:
        """Make a context for each profile. They run one after the other, and so share the memory they compute in."""
        self._copying, self._computing = self._memory.stream(), self._memory.stream()
        size = max(body.device_memory_size_v2, head.device_memory_size_v2, ALIGNMENT)
        self._workspace = self._memory.allocate(size)
        strategy = package.ExecutionContextAllocationStrategy.USER_MANAGED
        contexts = []
        for engine, profile in [*((body, number) for number in range(len(self._plans.profiles))), (head, 0)]:
            context = engine.create_execution_context(strategy)
            self._require(context is not None, "create_execution_context made none")
            selected = context.set_optimization_profile_async(profile, self._computing)
            self._require(selected, f"set_optimization_profile_async refused profile {profile}")
            context.set_device_memory(self._workspace.address, size)
            contexts.append(context)
        self._memory.synchronize(self._memory.record(self._computing))
        *self._body_contexts, self._head_context = contexts

    def _pieces(self, batch: Batch) -> Iterator[Piece]:
        """Cut a batch into what the narrowest profile that it fits takes, and pad that."""
        rows, width = batch.input_ids.shape
        if not len(batch.target_index):
            yield Piece(0, {}, 0)
            return
        number = self._profile_of(width)
        profile = self._plans.profiles[number]
        row_of_target, column = np.divmod(batch.target_index, width)
        if (np.diff(row_of_target) < 0).any() or row_of_target[0] < 0 or row_of_target[-1] >= rows:
            raise EngineOutputError(
                f"a batch of {rows} x {width} tokens has targets outside its rows, or not in their order; "
                "make it with dpo_fast.batches"
            )
        ends = np.searchsorted(row_of_target, np.arange(rows), side="right")
        gates = np.resize(np.array(self._gates if self._gates is not None else [], np.float32), (rows, self._adapters))
        padded = min(max(math.ceil(width / WIDTH_STEP) * WIDTH_STEP, profile.width[0]), profile.width[2])
        for in_rows, in_targets in split(ends, profile.rows[2], profile.targets[2]):
            shape = max(in_rows.stop - in_rows.start, profile.rows[0]), padded
            targets = (max(in_targets.stop - in_targets.start, profile.targets[0]),)
            index = (row_of_target[in_targets] - in_rows.start) * padded + column[in_targets]
            inputs = {
                "input_ids": _pad(batch.input_ids[in_rows], shape, 0),
                "position_ids": _pad(batch.position_ids[in_rows], shape, 0),
                "segment_ids": _pad(batch.segment_ids[in_rows], shape, -1),
                "target_index": _pad(index, targets, 0),
                TARGET_IDS: _pad(batch.target_ids[in_targets], targets, 0),
                ADAPTER_GATES: _pad(gates[in_rows], (shape[0], self._adapters), 0),
            }
            yield Piece(number, inputs, in_targets.stop - in_targets.start)

    def _profile_of(self, width: int) -> int:
        """The number of the narrowest profile that takes rows of a width."""
        for number, profile in enumerate(self._plans.profiles):
            if width <= profile.width[2]:
                return number
        limit = max(profile.width[2] for profile in self._plans.profiles)
        raise EngineOutputError(
            f"a row is {width} tokens wide, and the plan {self._plans.body} takes {limit} at most; lower --max-length, "
            "or build the plans again with `dpo-fast build` for wider rows"
        )

    def _enqueue(self, piece: Piece, slot: _Slot) -> None:
        """Put a piece's copies and computations on the streams."""
        slot.count = piece.count
        if not piece.count:
            return
        stride = _aligned(4 * piece.count)
        outputs = _room(slot.device, "outputs", stride * len(OUTPUTS), self._memory.allocate)
        host = _room(slot.host, "outputs", stride * len(OUTPUTS), self._memory.pinned)[: stride * len(OUTPUTS)]
        host.view(np.float32).fill(np.nan)  # what is left unwritten must not be another batch's
        self._memory.upload(outputs, host, self._copying)
        uploaded = {name: piece.inputs[name] for name in (*self._body_inputs, TARGET_IDS)}
        place = self._upload(slot, uploaded)
        targets = len(piece.inputs["target_index"])
        state_bytes, gate_bytes = self._hidden_size * self._state_size, 4 * self._adapters
        states = _room(slot.device, STATES, targets * state_bytes, self._memory.allocate).address
        made: dict[str, Tensor] = {STATES: ((targets, self._hidden_size), states)}
        if self._has_target_gates:
            target_gates = _room(slot.device, TARGET_GATES, targets * gate_bytes, self._memory.allocate).address
            made[TARGET_GATES] = ((targets, self._adapters), target_gates)
        taken: dict[str, Tensor] = {name: (piece.inputs[name].shape, place[name]) for name in self._body_inputs}
        self._run("body", self._body_contexts[piece.profile], taken, made)

        for start in range(0, piece.count, self._step):
            count = min(self._step, piece.count - start)
            taken = {
                STATES: ((count, self._hidden_size), states + start * state_bytes),
                TARGET_IDS: ((count,), place[TARGET_IDS] + start * 8),
            }
            if self._has_target_gates:
                taken[TARGET_GATES] = ((count, self._adapters), target_gates + start * gate_bytes)
            made = {
                name: ((count,), outputs.address + number * stride + start * 4) for number, name in enumerate(OUTPUTS)
            }
            self._run("head", self._head_context, taken, made)
        self._memory.download(host, outputs, self._computing)
        slot.done = self._memory.record(self._computing)

    def _upload(self, slot: _Slot, arrays: dict[str, NDArray[Any]]) -> dict[str, int]:
        """Put a copy of arrays, side by side, on the copying stream, and let the computing one wait for it.

        Returns:
            The address of each on the device.
        """
        *offsets, size = itertools.accumulate((_aligned(array.nbytes) for array in arrays.values()), initial=0)
        host = _room(slot.host, "inputs", size, self._memory.pinned)
        device = _room(slot.device, "inputs", size, self._memory.allocate)
        for offset, array in zip(offsets, arrays.values(), strict=True):
            host[offset : offset + array.nbytes] = array.reshape(-1).view(np.uint8)
        self._memory.upload(device, host[:size], self._copying)
        self._memory.wait(self._computing, self._memory.record(self._copying))
        return {name: device.address + offset for name, offset in zip(arrays, offsets, strict=True)}

    def _run(self, half: str, context: Any, inputs: dict[str, Tensor], outputs: dict[str, Tensor]) -> None:
        """Put one execution on the computing stream; TensorRT says by what it returns whether it took each step."""
        for name, (shape, address) in inputs.items():
            self._require(context.set_input_shape(name, shape), f"{half}: set_input_shape refused {name} {shape}")
            self._require(context.set_tensor_address(name, address), f"{half}: set_tensor_address refused {name}")
        unknown = context.infer_shapes()
        self._require(not unknown, f"{half}: infer_shapes lacks {', '.join(unknown)}")
        for name, (shape, address) in outputs.items():
            made = tuple(context.get_tensor_shape(name))
            self._require(made == shape, f"{half}: {name} would have the shape {made} instead of {shape}")
            self._require(context.set_tensor_address(name, address), f"{half}: set_tensor_address refused {name}")
        self._require(context.execute_async_v3(self._computing), f"{half}: execute_async_v3 failed")

    def _collect(self, slot: _Slot) -> Float32Array:
        """Wait for a piece's outputs: (outputs, targets)."""
        if not slot.count:
            return np.zeros((len(OUTPUTS), 0), np.float32)
        self._memory.synchronize(slot.done)
        stride = _aligned(4 * slot.count)
        host = slot.host["outputs"][1][: stride * len(OUTPUTS)]
        return host.view(np.float32).reshape(len(OUTPUTS), -1)[:, : slot.count].copy()

    def _require(self, fine: bool, what: str) -> None:
        if not fine:
            raise RuntimeError(f"{what}{self._log.last()}")

    @contextmanager
    def _failures(self, place: str) -> Iterator[None]:
        """What CUDA or TensorRT refuses, as our error."""
        try:
            yield
        except MemoryError as error:
            raise EngineOutputError(
                f"CUDA is out of memory at {place} ({said_by(error, 600)}); lower --token-budget or --max-length"
            ) from error
        except RuntimeError as error:
            raise EngineOutputError(
                f"TensorRT failed at {place} ({said_by(error, 600)}); if memory is short, lower --token-budget, "
                f"otherwise {AGAIN}"
            ) from error


def split(ends: Int64Array, most_rows: int, most_targets: int) -> Iterator[tuple[slice, slice]]:
    """Cut a batch into pieces by rows; a row of too many targets is run again for the rest of them.

    Args:
        ends: (B,) how many targets the rows up to and with each have.
        most_rows: of a piece.
        most_targets: of a piece.

    Yields:
        The rows and the targets of each piece that has targets.
    """
    row, target = 0, 0
    while row < len(ends):
        end = min(row + most_rows, int(np.searchsorted(ends, target + most_targets, side="right")))
        if end > row:
            rows, targets = slice(row, end), slice(target, int(ends[end - 1]))
            row = end
        else:
            rows, targets = slice(row, row + 1), slice(target, target + most_targets)
        if targets.stop > targets.start:
            yield rows, targets
        target = targets.stop


def _pad(values: NDArray[Any], shape: tuple[int, ...], value: int) -> NDArray[Any]:
    """An array in the first corner of a larger one."""
    padded = np.full(shape, value, values.dtype)
    padded[tuple(slice(size) for size in values.shape)] = values
    return padded


def _aligned(size: int) -> int:
    """Bytes, up to the next address that TensorRT takes."""
    return -(-size // ALIGNMENT) * ALIGNMENT


def _room(held: dict[str, tuple[int, Held]], name: str, size: int, allocate: Callable[[int], Held]) -> Held:
    """Bytes that are held under a name, at least so many; they grow to powers of two, and so seldom."""
    if name not in held or held[name][0] < size:
        held.pop(name, None)  # given back before more is asked for
        size = 1 << max(size - 1, ALIGNMENT - 1).bit_length()
        held[name] = size, allocate(size)
    return held[name][1]
