"""What the sources ask of TensorRT, and what the double pretends, against the real interfaces of three packages."""

import inspect
import os
import subprocess
import sys
from pathlib import Path

import pytest

from dpo_fast.engines.tensorrt import TensorRtEngine
from dpo_fast.errors import BuildError, EngineOutputError
from dpo_fast.tensorrt.refit import refit_plan

from .double import CLASSES, ENUMS, Call, Double, kinds, write_plan
from .names import packages_in, unknown_names
from .signatures import parameters, takes
from .surface import ALL, BINDINGS, BUILD, ROOT, Surface, stubs, surface
from .tiny_plans import Tiny, make_batch, save_with_external_data

SOURCES = [ROOT / "dpo_fast" / "engines" / "tensorrt.py", *sorted((ROOT / "dpo_fast" / "tensorrt").glob("*.py"))]


@pytest.fixture(scope="module")
def surfaces() -> list[Surface]:
    return [surface(which) for which in ALL]


# -- the sources' names


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.name)
def test_every_name_exists_in_all_versions(source, surfaces):
    assert unknown_names(source.read_text(), surfaces) == []


def test_names_are_found_at_all():
    """So that the check above has something to check."""
    for name in ("engines/tensorrt.py", "tensorrt/package.py", "tensorrt/worker.py"):
        assert packages_in((ROOT / "dpo_fast" / name).read_text()) >= 3, name


@pytest.mark.parametrize(
    ("source", "unknown"),
    [
        ("import tensorrt as trt\ntrt.BuilderFlag.REFIT", 0),
        ("import tensorrt as trt\ntrt.BuilderFlag.FP16", 2),  # gone in 11, and not in RTX
        ("import tensorrt as trt\ntrt.DataType.FLOAT32", 3),  # nowhere
        ("import tensorrt as trt\ntrt.Logger.Severity.WARNING", 0),
        ("import tensorrt as trt\ntrt.Logger.Severity.FATAL", 3),
        ("import tensorrt as trt\ntrt.NoSuchClass()", 3),
        ("def f(package: ModuleType) -> None:\n    package.CalibrationAlgoType", 2),
        (
            "def f(p: ModuleType | None) -> None:\n    self._p = p or import_package('x')\n    self._p.Nothing",
            3,
        ),
        ("def f() -> None:\n    trt = importlib.import_module(name)\n    trt.Nothing", 3),
        ("class C:\n    def f(self, p: ModuleType): self._p, x = p, 1\n    def g(self): self._p.DataType.NO", 3),
        ("def f(package: ModuleType): pass\ndef g(package: str): package.upper()", 0),
        ("def f() -> None:\n    p = import_package('x')\ndef g(p: str) -> None:\n    p.upper()", 0),
        ("engine.device_memory_size", 1),  # of 10 alone
        ("engine.device_memory_size_v2", 0),
        ("config.set_compute_capability(capability, 0)", 0),  # listed
        ("getattr(engine, 'device_memory_size')", 1),
        ("getattr(engine, 'device_memory_size', 0)", 0),
        ("if hasattr(engine, 'device_memory_size'):\n    engine.device_memory_size", 0),
        ("if hasattr(engine, 'device_memory_size'):\n    pass\nelse:\n    engine.device_memory_size", 1),
        ("x = engine.device_memory_size if hasattr(engine, 'device_memory_size') else 0", 0),
        ("array.shape; path.name; text.split()", 0),
    ],
)
def test_seeded_names_are_caught(source, unknown, surfaces):
    assert len(unknown_names(source, surfaces)) == unknown


# -- the double


def own_members(kind: type) -> list[str]:
    return [name for name in vars(kind) if name == "__init__" or not name.startswith("_")]


@pytest.mark.parametrize("which", ALL)
@pytest.mark.parametrize("kind", CLASSES, ids=lambda kind: kind.__name__)
def test_double_has_nothing_that_the_real_class_lacks(kind, which):
    real = surface(which).members[kind.__name__]
    for name in own_members(kind):
        assert name in real, name
        method = inspect.unwrap(vars(kind)[name])
        if not inspect.isfunction(method):
            assert real[name] == [], f"{name} is a method"
            continue
        ours = list(inspect.signature(method).parameters)[1:]
        theirs = [[parameter.name for parameter in parameters(signature)] for signature in real[name]]
        assert ours in theirs, f"{name}{ours} is not among {theirs}"


@pytest.mark.parametrize("which", ALL)
@pytest.mark.parametrize("kind", ENUMS, ids=lambda kind: kind.__name__)
def test_double_has_no_member_that_the_real_enumeration_lacks(kind, which):
    assert set(kind.__members__) <= surface(which).members[kind.__name__].keys()


# -- the arguments


@pytest.fixture(scope="module")
def calls(tmp_path_factory) -> list[Call]:
    """Every kind of call that loading, scoring and refitting make."""
    folder, double, tiny = tmp_path_factory.mktemp("plans"), Double(), Tiny(adapters=2)
    path = tiny.write(folder)
    write_plan(folder / "refittable.plan", tiny.body(), tiny.body_profiles(), refittable=True)
    save_with_external_data(tiny.body(), folder / "body.onnx")
    engine = TensorRtEngine(path, precision="fp32", gates=[1.0, 1.0], memory=double.memory, package=double)
    list(engine.score_all(make_batch(seed, 5, 30, 40) for seed in range(3)))
    with pytest.raises(EngineOutputError):
        engine.score(make_batch(0, 2, 99, 3))
    refit_plan(double, folder / "refittable.plan", folder / "body.onnx", folder / "new.plan")
    with pytest.raises(BuildError):
        refit_plan(double, folder / "refittable.plan", folder / "none.onnx", folder / "new.plan")
    return sorted(set(double.calls), key=str)


@pytest.mark.parametrize("which", ALL)
def test_every_call_has_arguments_that_the_bindings_take(calls, which):
    real = surface(which).members
    refused = [call for call in calls if not takes(real[call.owner][call.method], call)]
    assert refused == []


def test_the_record_has_every_method_of_the_double(calls):
    """So that the check above sees all of them."""
    methods = {
        (kind.__name__, name)
        for kind in CLASSES
        for name in own_members(kind)
        if hasattr(vars(kind)[name], "__wrapped__")
    }
    assert {(call.owner, call.method) for call in calls} == methods


@pytest.mark.parametrize(
    ("owner", "method", "arguments", "taken"),
    [
        ("OnnxParserRefitter", "refit_from_file", ["graph.onnx"], True),
        ("OnnxParserRefitter", "refit_from_file", [Path("graph.onnx")], False),
        ("IExecutionContext", "set_input_shape", ["states", (1, 2)], True),
        ("IExecutionContext", "set_input_shape", ["states", [1, 2]], True),
        ("IExecutionContext", "set_input_shape", ["states", 5], False),
        ("IExecutionContext", "set_input_shape", ["states"], False),
        ("IExecutionContext", "set_tensor_address", ["states", 4096], True),
        ("IExecutionContext", "set_tensor_address", ["states", "4096"], False),
        ("IExecutionContext", "execute_async_v3", [7, 8], False),
        ("Runtime", "deserialize_cuda_engine", [b"plan"], True),
        ("Runtime", "deserialize_cuda_engine", ["policy.plan"], False),
        ("ICudaEngine", "create_execution_context", [], True),
        ("ICudaEngine", "create_execution_context", [2], False),
    ],
)
def test_seeded_arguments_are_caught(owner, method, arguments, taken, surfaces):
    call = Call(owner, method, tuple((place, kinds(value)) for place, value in enumerate(arguments)))
    assert [takes(real.members[owner][method], call) for real in surfaces] == [taken] * len(ALL)


def test_argument_of_an_unknown_name_is_caught(surfaces):
    call = Call("IExecutionContext", "execute_async_v3", (("stream", kinds(7)),))
    assert not takes(surfaces[0].members["IExecutionContext"]["execute_async_v3"], call)


# -- the real bindings, which make nothing here


@pytest.mark.parametrize("which", BINDINGS)
def test_bindings_without_their_library_do_not_start(which, tmp_path):
    """Our logger is one that the bindings take, and what they raise for want of a library is our error."""
    surface(which)  # or fail with how to install it
    (tmp_path / "policy.plan").write_bytes(b"no plan")
    code = f"""if True:
        from pathlib import Path
        import tensorrt_bindings
        from dpo_fast.errors import BundleError
        from dpo_fast.tensorrt.package import message_log, read_plan
        log = message_log(tensorrt_bindings)
        log.log(tensorrt_bindings.ILogger.ERROR, "an error")
        log.log(tensorrt_bindings.ILogger.INFO, "news")
        try:
            read_plan(tensorrt_bindings, log, Path({str(tmp_path / "policy.plan")!r}), BundleError)
        except BundleError as error:
            print(error)
    """
    environment = {
        **os.environ,
        "PYTHONPATH": f"{BUILD / f'tensorrt-{which}'}{os.pathsep}{ROOT}",
        "LD_LIBRARY_PATH": str(stubs(which.split(".")[0])),
    }
    found = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert found.stdout.startswith(f"tensorrt_bindings {BINDINGS[which]} does not start: an error;"), found.stderr
