"""A double of TensorRT's interface: plans hold ONNX models, which ONNX Runtime computes on the host.

It refuses what TensorRT refuses, as TensorRT does: by None, False or a list. An execution reads its inputs where their
addresses point when the stream gets to it, not when it is asked for. Each call is recorded, and can be made to fail.
"""

import enum
import json
import weakref
from collections import Counter
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import onnxruntime

from .fake_memory import ALIGNMENT, DeviceFaultError, FakeMemory

MAGIC = b"double of a plan\n"
Profiles = list[dict[str, tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]]]


def make_plan(
    model: onnx.ModelProto,
    profiles: Profiles,
    *,
    refittable: bool = False,
    version: str = "11.4",
    host_code: bool = False,
) -> bytes:
    """A plan's bytes: for each profile, the smallest, tuned and largest shape of each input."""
    header = json.dumps({"profiles": profiles, "refittable": refittable, "version": version, "host_code": host_code})
    return MAGIC + header.encode() + b"\n" + model.SerializeToString()


@dataclass(frozen=True)
class Call:
    """A call by its types: `owner` is the class, `arguments` the kinds of each by position or by name."""

    owner: str
    method: str
    arguments: tuple[tuple[int | str, frozenset[str]], ...]


def kinds(value: Any) -> frozenset[str]:
    """What the bindings' signatures may call a value."""
    found = {kind.__name__ for kind in type(value).__mro__}
    if hasattr(value, "__int__") and not isinstance(value, str):
        found.add("SupportsInt")
    try:
        memoryview(value)
    except TypeError:
        return frozenset(found)
    return frozenset(found | {"Buffer"})


def recorded(method):
    """Put a call on the double's record, and let it fail where that is wished for."""

    @wraps(method)
    def call(self, *arguments, **named):
        owner = next(kind.__name__ for kind in type(self).__mro__ if method.__name__ in vars(kind))
        given = [*enumerate(arguments), *named.items()]
        self.double.calls.append(Call(owner, method.__name__, tuple((place, kinds(value)) for place, value in given)))
        self.double.counts[owner, method.__name__] += 1
        failure = self.double.failing.get((owner, method.__name__), method)
        if failure is not method:
            self.double.logger.log(ILogger.ERROR, f"injected into {method.__name__}")
            if isinstance(failure, Exception):
                raise failure
            return failure
        return method(self, *arguments, **named)

    return call


class Severity(enum.IntEnum):
    INTERNAL_ERROR, ERROR, WARNING, INFO, VERBOSE = range(5)


class TensorIOMode(enum.IntEnum):
    NONE, INPUT, OUTPUT = range(3)


class DataType(enum.IntEnum):
    FLOAT, HALF, INT8, INT32, BOOL, UINT8, FP8, BF16, INT64 = range(9)


class ExecutionContextAllocationStrategy(enum.IntEnum):
    STATIC, ON_PROFILE_CHANGE, USER_MANAGED = range(3)


TYPES = {np.dtype(np.float32): DataType.FLOAT, np.dtype(np.float16): DataType.HALF, np.dtype(np.int64): DataType.INT64}


class ILogger:
    double: "Double"
    Severity = Severity
    INTERNAL_ERROR, ERROR, WARNING, INFO, VERBOSE = Severity

    def __init__(self) -> None:
        self.ready = True  # the bindings refuse a logger whose base was not initialised

    def log(self, severity: Severity, msg: str) -> None:
        raise NotImplementedError("a logger says what it does with a message")


class Dims(list):
    """A shape."""


class IHostMemory(bytearray):
    """A buffer, which has no length of its own in the bindings."""

    @property
    def nbytes(self) -> int:
        return memoryview(self).nbytes

    def __len__(self) -> int:
        raise TypeError("object of type 'IHostMemory' has no len()")


class Runtime:
    double: "Double"
    engine_host_code_allowed = False

    @recorded
    def __init__(self, logger: ILogger) -> None:
        assert logger.ready
        self.double.logger = logger

    @recorded
    def deserialize_cuda_engine(self, serialized_engine):
        content = bytes(serialized_engine)
        header, _, model = content.removeprefix(MAGIC).partition(b"\n")
        if not content.startswith(MAGIC) or json.loads(header)["version"] != self.double.plan_version:
            self.double.logger.log(ILogger.INFO, "Loaded engine size: 0 MiB")
            self.double.logger.log(ILogger.ERROR, "IRuntime::deserializeCudaEngine: Error Code 1: Serialization")
            return None
        if json.loads(header)["host_code"] and not self.engine_host_code_allowed:
            self.double.logger.log(ILogger.ERROR, "the plan holds host code, which is not allowed")
            return None
        return self.double.ICudaEngine._make(json.loads(header), onnx.load_from_string(model))


class ICudaEngine:
    double: "Double"
    device_memory_size_v2 = 4096

    @classmethod
    def _make(cls, header, model):
        engine = cls.__new__(cls)
        engine._header, engine._model, engine._contexts = header, model, weakref.WeakSet()
        engine._tensors = {
            value.name: (mode, value)
            for mode, values in ((TensorIOMode.INPUT, model.graph.input), (TensorIOMode.OUTPUT, model.graph.output))
            for value in values
        }
        engine._load()
        return engine

    def _load(self) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        self._session = onnxruntime.InferenceSession(self._model.SerializeToString(), options)

    @property
    def num_io_tensors(self) -> int:
        return len(self._tensors)

    @property
    def num_optimization_profiles(self) -> int:
        return len(self._header["profiles"])

    @property
    def refittable(self) -> bool:
        return self._header["refittable"]

    @recorded
    def get_tensor_name(self, index):
        return list(self._tensors)[index]

    @recorded
    def get_tensor_mode(self, name):
        return self._tensors[name][0]

    @recorded
    def get_tensor_dtype(self, name):
        return TYPES[self._numpy_type(name)]

    @recorded
    def get_tensor_shape(self, name):
        return Dims(-1 if isinstance(size, str) else size for size in self._sizes(name))

    @recorded
    def get_tensor_profile_shape(self, name, profile_index):
        if self._tensors[name][0] != TensorIOMode.INPUT:
            return []
        return [Dims(shape) for shape in self._header["profiles"][profile_index][name]]

    @recorded
    def create_execution_context(self, strategy=ExecutionContextAllocationStrategy.STATIC):
        return self.double.IExecutionContext._make(self, strategy)

    @recorded
    def serialize(self):
        profiles, refittable = self._header["profiles"], self._header["refittable"]
        return IHostMemory(make_plan(self._model, profiles, refittable=refittable, version=self._header["version"]))

    def _numpy_type(self, name) -> np.dtype:
        return np.dtype(onnx.helper.tensor_dtype_to_np_dtype(self._tensors[name][1].type.tensor_type.elem_type))

    def _sizes(self, name) -> list[int | str]:
        """Numbers, and the names of those that vary."""
        return [size.dim_param or size.dim_value for size in self._tensors[name][1].type.tensor_type.shape.dim]


class IExecutionContext:
    double: "Double"

    @classmethod
    def _make(cls, engine, strategy):
        context = cls.__new__(cls)
        context._engine, context._strategy, context._profile, context._scratch = engine, strategy, None, None
        context._shapes, context._addresses = {}, {}
        engine._contexts.add(context)
        return context

    @recorded
    def set_optimization_profile_async(self, profile_index, stream_handle):
        taken = {context._profile for context in self._engine._contexts if context is not self}
        if (
            profile_index in taken
            or not 0 <= profile_index < self._engine.num_optimization_profiles
            or not stream_handle
        ):
            return self._refuse(f"profile {profile_index} is in use or not there")
        self._profile = profile_index
        self._shapes.clear()
        return True

    @recorded
    def set_device_memory(self, memory, size) -> None:
        if memory % ALIGNMENT or size < self._engine.device_memory_size_v2:
            self._refuse("too little device memory, or not aligned")
        else:
            self._scratch = (memory, size)

    @recorded
    def set_input_shape(self, name, shape):
        if self._profile is None or self._mode(name) != TensorIOMode.INPUT:
            return self._refuse(f"{name} is no input, or no profile is selected")
        smallest, _, largest = self._engine._header["profiles"][self._profile][name]
        inside = len(shape) == len(smallest) and all(
            low <= size <= high for low, size, high in zip(smallest, shape, largest, strict=True)
        )
        if not inside:
            return self._refuse(f"{name}: {shape} is outside profile {self._profile}")
        self._shapes[name] = tuple(shape)
        return True

    @recorded
    def infer_shapes(self):
        lacking = [name for name in self._inputs() if name not in self._shapes]
        sizes: dict[str, int] = {}
        for name in set(self._inputs()) - set(lacking):
            for variable, size in zip(self._engine._sizes(name), self._shapes[name], strict=True):
                if isinstance(variable, str) and sizes.setdefault(variable, size) != size:
                    raise RuntimeError(f"{name}: {variable} is {sizes[variable]} and {size}")
        return lacking

    @recorded
    def get_tensor_shape(self, name):
        sizes = {
            variable: size
            for given, shape in self._shapes.items()
            for variable, size in zip(self._engine._sizes(given), shape, strict=True)
        }
        return Dims(sizes.get(size, -1) if isinstance(size, str) else size for size in self._engine._sizes(name))

    @recorded
    def set_tensor_address(self, name, memory):
        if name not in self._engine._tensors or memory % ALIGNMENT or not memory:
            return self._refuse(f"{name}: {memory:#x} is not aligned, or it is no tensor")
        self._addresses[name] = memory
        return True

    @recorded
    def execute_async_v3(self, stream_handle):
        tensors = list(self._engine._tensors)
        shapes = {name: tuple(self.get_tensor_shape(name)) for name in tensors}
        if any(-1 in shape for shape in shapes.values()) or set(self._addresses) != set(tensors) or not stream_handle:
            return self._refuse("shapes or addresses are lacking")
        if self._strategy == ExecutionContextAllocationStrategy.USER_MANAGED and self._scratch is None:
            return self._refuse("no device memory was given")
        memory = self.double.memory
        places = {
            name: (self._addresses[name], int(np.prod(shapes[name])) * self._engine._numpy_type(name).itemsize)
            for name in tensors
        }
        scratch = [self._scratch] if self._scratch else []

        def work() -> None:
            for place in scratch:
                memory.view(*place)[:] = np.random.default_rng(0).integers(0, 256, place[1])
            feeds = {
                name: memory.view(*places[name]).view(self._engine._numpy_type(name)).reshape(shapes[name]).copy()
                for name in self._inputs()
            }
            outputs = [name for name in tensors if self._mode(name) == TensorIOMode.OUTPUT]
            for name, value in zip(outputs, self._engine._session.run(outputs, feeds), strict=True):
                if value.shape != shapes[name] or value.dtype != self._engine._numpy_type(name):
                    raise DeviceFaultError(f"{name} is {value.dtype} {value.shape}, not {shapes[name]}")
                memory.view(*places[name])[:] = np.ascontiguousarray(value).reshape(-1).view(np.uint8)

        outputs = [places[name] for name in tensors if self._mode(name) == TensorIOMode.OUTPUT]
        memory.enqueue(stream_handle, work, [places[name] for name in self._inputs()], outputs + scratch)
        return True

    def _inputs(self) -> list[str]:
        return [name for name in self._engine._tensors if self._mode(name) == TensorIOMode.INPUT]

    def _mode(self, name) -> TensorIOMode:
        return self._engine._tensors.get(name, (TensorIOMode.NONE, None))[0]

    def _refuse(self, text: str) -> bool:
        self.double.logger.log(ILogger.ERROR, f"IExecutionContext: {text}")
        return False


class Refitter:
    double: "Double"

    @recorded
    def __init__(self, engine: ICudaEngine, logger: ILogger) -> None:
        self._engine, self._given = engine, {}
        self.double.logger = logger

    @recorded
    def get_missing_weights(self):
        return [weight.name for weight in self._engine._model.graph.initializer if weight.name not in self._given]

    @recorded
    def refit_cuda_engine(self):
        if self.get_missing_weights():
            return False
        for weight in self._engine._model.graph.initializer:
            weight.CopyFrom(self._given[weight.name])
        self._engine._load()
        return True


class ParserError:
    double: "Double"

    @classmethod
    def _make(cls, node: str, operator: str, text: str):
        error = cls.__new__(cls)
        error._node, error._operator, error._text = node, operator, text
        return error

    @recorded
    def node_name(self):
        return self._node

    @recorded
    def node_operator(self):
        return self._operator

    @recorded
    def desc(self):
        return self._text


class OnnxParserRefitter:
    double: "Double"

    @recorded
    def __init__(self, refitter: Refitter, logger: ILogger) -> None:
        self._refitter, self._errors = refitter, []

    @property
    def num_errors(self) -> int:
        return len(self._errors)

    @recorded
    def get_error(self, index):
        return self._errors[index]

    @recorded
    def refit_from_file(self, model):
        if not isinstance(model, str):
            raise TypeError("refit_from_file(): incompatible function arguments")
        try:
            graph = onnx.load(model).graph
        except Exception as error:
            self._errors.append(self.double.ParserError._make("", "", f"cannot load: {error}"))
            return False
        weights = {weight.name: weight for weight in self._refitter._engine._model.graph.initializer}
        for weight in graph.initializer:
            if weight.name in weights and (weight.dims, weight.data_type) != (
                weights[weight.name].dims,
                weights[weight.name].data_type,
            ):
                user = next(node for node in graph.node if weight.name in node.input)
                text = f"{weight.name} has another shape or type"
                self._errors.append(self.double.ParserError._make(user.name, user.op_type, text))
                return False
            if weight.name in weights:
                self._refitter._given[weight.name] = weight
        return True


CLASSES = (
    ILogger, Runtime, ICudaEngine, IExecutionContext, Refitter, OnnxParserRefitter, ParserError, Dims, IHostMemory
)  # fmt: skip
ENUMS = (TensorIOMode, DataType, ExecutionContextAllocationStrategy)


class Double:
    """The package: its classes are bound to this double, its record and its memory.

    Attributes:
        calls: what was called, in order.
        counts: how often each (class, method) was called.
        failing: (class, method) -> what it returns, or raises, instead.
    """

    def __init__(self, memory: FakeMemory | None = None, *, version: str = "11.4") -> None:
        self.__name__, self.__version__, self.plan_version = "tensorrt", f"{version}.0.106", version
        self.memory = memory or FakeMemory()
        self.logger: Any = SimpleNamespace(log=lambda severity, msg: None)  # until a runtime brings one
        self.calls: list[Call] = []
        self.counts: Counter[tuple[str, str]] = Counter()
        self.failing: dict[tuple[str, str], Any] = {}
        for kind in CLASSES:
            bound = kind if kind in (Dims, IHostMemory) else type(kind.__name__, (kind,), {"double": self})
            setattr(self, kind.__name__, bound)
        for kind in ENUMS:
            setattr(self, kind.__name__, kind)


def write_plan(path: Path, model: onnx.ModelProto, profiles: Profiles, **options: Any) -> None:
    """Write a plan's bytes to a file."""
    path.write_bytes(make_plan(model, profiles, **options))
