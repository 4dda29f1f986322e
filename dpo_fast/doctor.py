"""What this machine has, which recipes can be exported, built and run on it, and what mends those that cannot.

Facts are gathered first and judged after: what is said of a machine with a GPU can be seen on one without.
"""

import ctypes
import importlib
import subprocess
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from dpo_fast.engines.onnxruntime import CPU
from dpo_fast.engines.onnxruntime_gpu import CUDA, TENSORRT
from dpo_fast.engines.openvino import open_core
from dpo_fast.errors import UsageError
from dpo_fast.provenance import hardware
from dpo_fast.recipes import Recipe, load_recipe, recipe_folder
from dpo_fast.tensorrt.options import RTX_TARGETS
from dpo_fast.tensorrt.package import PACKAGES as PLAN_PACKAGES
from dpo_fast.tensorrt.package import load_driver

# What recipes may need, by the name that Python imports, and the names under which registries have it.
MODULES = {
    "torch": ("torch",),
    "transformers": ("transformers",),
    "onnxruntime": ("onnxruntime", "onnxruntime-gpu"),
    "openvino": ("openvino",),
    "tensorrt": ("tensorrt", "tensorrt-cu13", "tensorrt-cu12"),
    "tensorrt_rtx": ("tensorrt_rtx",),
    "cuda.bindings": ("cuda-python", "cuda-bindings"),
}
# onnxruntime-gpu and TensorRT are built with CUDA 13, whose release notes name the lowest driver that it starts on.
LOWEST_CUDA, LOWEST_DRIVER = (13,), 580
# Compute capabilities: bfloat16 products since Ampere, float8 products since Ada.
LOWEST_CAPABILITY = {"bf16": (8, 0), "fp8": (8, 9)}
TOO_NEW_TENSORRT = (11,)  # for ONNX Runtime, whose provider loads the libraries of TensorRT 10
QUERY = "name,compute_cap,driver_version,memory.total"
CAPABILITY_MAJOR, CAPABILITY_MINOR = 75, 76  # CUdevice_attribute of the driver's interface
TIMEOUT = 20  # seconds that nvidia-smi may take, which is some when the driver is not loaded yet


@dataclass(frozen=True, slots=True)
class Gpu:
    """An NVIDIA GPU.

    Attributes:
        name: NVIDIA's.
        capability: its compute capability, such as "8.6".
        driver: the driver's version.
        memory_mib: in MiB.
    """

    name: str
    capability: str
    driver: str
    memory_mib: int

    @property
    def target(self) -> str:
        """The compute capability as builders name it, such as "sm86"."""
        return f"sm{self.capability.replace('.', '')}"


@dataclass(frozen=True, slots=True)
class Module:
    """A package that recipes may need.

    Attributes:
        version: None where it is not installed.
        distributions: the names under which it is installed; onnxruntime has two, and either overwrites the other.
        problem: why it cannot be imported although it is installed, or None.
    """

    version: str | None = None
    distributions: list[str] = field(default_factory=list)
    problem: str | None = None

    @property
    def works(self) -> bool:
        """Whether it is installed and can be imported."""
        return self.version is not None and self.problem is None


@dataclass(frozen=True, slots=True)
class Facts:
    """What a machine has.

    Attributes:
        hardware: the processor, its cores, the system.
        gpus: NVIDIA's.
        gpu_problem: why nvidia-smi says nothing, or None.
        cuda: the newest CUDA that the driver takes, such as "13.0", or None without a driver.
        modules: by the name that Python imports.
        providers: of ONNX Runtime.
        torch_cuda: whether PyTorch computes on a GPU here.
        bfloat16: whether OpenVINO computes in bfloat16 on this processor.
    """

    hardware: dict[str, str | int]
    gpus: list[Gpu]
    gpu_problem: str | None
    cuda: str | None
    modules: dict[str, Module]
    providers: list[str]
    torch_cuda: bool
    bfloat16: bool


@dataclass(frozen=True, slots=True)
class Verdict:
    """What can be done with a recipe on a machine.

    Attributes:
        recipe: its name.
        engine, precision, description: the recipe's.
        can_export: whether a bundle can be made with it.
        can_build: whether its plans can be built; None where its engine has no plans.
        can_run: whether its engine runs here.
        remedies: what to do about what cannot be done, a command or a sentence each.
    """

    recipe: str
    engine: str
    precision: str
    description: str
    can_export: bool
    can_build: bool | None
    can_run: bool
    remedies: list[str]


def examine(facts: Facts | None = None) -> dict[str, Any]:
    """Say what a machine has, and what can be done with each shipped recipe.

    Args:
        facts: of the machine; None gathers this one's.

    Returns:
        `machine` (as `Facts`) and `recipes` (as `Verdict`, one each), for JSON.
    """
    facts = gather() if facts is None else facts
    recipes = (load_recipe(path.stem) for path in sorted(recipe_folder().glob("*.toml")))
    return {"machine": asdict(facts), "recipes": [asdict(judge(recipe, facts)) for recipe in recipes]}


# -- judging ----------------------------------------------------------------------------------------------------------


def judge(recipe: Recipe, facts: Facts) -> Verdict:
    """What can be done with a recipe, given the facts."""
    exporting = _lacks_onnxruntime(facts)
    building = None if recipe.engine not in PLAN_PACKAGES else [*exporting, *_lacks_to_build(recipe, facts)]
    running = [*(building or ()), *_lacks_to_run(recipe, facts)]
    remedies = list(dict.fromkeys([*exporting, *(building or ()), *running]))  # each once
    return Verdict(
        recipe.name,
        recipe.engine,
        recipe.precision,
        recipe.description,
        can_export=not exporting,
        can_build=None if building is None else not building,
        can_run=not running,
        remedies=remedies,
    )


def _lacks_onnxruntime(facts: Facts) -> list[str]:
    """What every export lacks: the exact graph is checked on ONNX Runtime's CPU provider."""
    found = facts.modules["onnxruntime"]
    if found.works and CPU in facts.providers:
        return []
    return [_reinstall(found, "cpu") if found.distributions else "pip install 'dpo-fast[cpu]'"]


def _lacks_to_build(recipe: Recipe, facts: Facts) -> list[str]:
    """What the builder of a recipe's plans lacks."""
    package = PLAN_PACKAGES[recipe.engine]
    lacks = [] if facts.modules[package].works else [f"pip install 'dpo-fast[{recipe.engine}]'"]
    if package == "tensorrt":
        lacks += _lacks_gpu(recipe, facts)
    return lacks


def _lacks_to_run(recipe: Recipe, facts: Facts) -> list[str]:
    """What a recipe's engine lacks."""
    match recipe.engine:
        case "onnxruntime":
            return _lacks_onnxruntime(facts)
        case "openvino":
            if not facts.modules["openvino"].works:
                return ["pip install 'dpo-fast[openvino]'"]
            if recipe.precision == "bf16" and not facts.bfloat16:
                return ["needs a processor with bfloat16 arithmetic; cpu-fp32 and cpu-int8 run on any"]
            return []
        case "onnxruntime-cuda":
            return [*_lacks_provider(CUDA, "gpu", facts), *_lacks_gpu(recipe, facts)]
        case "onnxruntime-tensorrt":
            extra = "onnxruntime-tensorrt"
            lacks = _lacks_provider(TENSORRT, extra, facts)
            tensorrt = facts.modules["tensorrt"]
            if not tensorrt.works or _numbers(str(tensorrt.version)) >= TOO_NEW_TENSORRT:
                # Where another TensorRT is installed, this takes its place.
                lacks.append(f"pip install 'dpo-fast[{extra}]'")
            return [*lacks, *_lacks_gpu(recipe, facts)]
        case "tensorrt" | "tensorrt-rtx":
            lacks = _lacks_gpu(recipe, facts)
            if not (facts.torch_cuda or facts.modules["cuda.bindings"].works):
                lacks.append(f"pip install 'dpo-fast[{recipe.engine}]'")
            return lacks
    raise UsageError(f"{recipe.name}: the engine {recipe.engine!r} is not known here")


def _lacks_provider(provider: str, extra: str, facts: Facts) -> list[str]:
    """What to install for a provider of ONNX Runtime."""
    if provider in facts.providers:
        return []
    found = facts.modules["onnxruntime"]
    return [_reinstall(found, extra) if found.distributions else f"pip install 'dpo-fast[{extra}]'"]


def _reinstall(found: Module, extra: str) -> str:
    """The command that leaves one build of ONNX Runtime; pip does not see that two write the same folder."""
    return f"pip uninstall --yes {' '.join(found.distributions)} && pip install 'dpo-fast[{extra}]'"


def _lacks_gpu(recipe: Recipe, facts: Facts) -> list[str]:
    """What a recipe for NVIDIA's GPUs lacks in hardware and driver."""
    driver = f"driver {LOWEST_DRIVER} or later"
    lowest = LOWEST_CAPABILITY.get(recipe.precision, (0, 0))
    if not facts.gpus:
        capable = f" of compute capability {_dotted(lowest)} or higher" if any(lowest) else ""
        return [f"needs an NVIDIA GPU{capable} with {driver}"]
    lacks = []
    gpu = facts.gpus[0]
    if facts.cuda is None or _numbers(facts.cuda) < LOWEST_CUDA:
        lacks.append(f"needs {driver}; {gpu.name} has {gpu.driver}: install NVIDIA's newer driver")
    if _numbers(gpu.capability) < lowest:
        lacks.append(
            f"needs compute capability {_dotted(lowest)} for {recipe.precision}; {gpu.name} has {gpu.capability}: "
            "take a recipe in fp16"
        )
    if recipe.engine == "tensorrt-rtx" and gpu.target not in RTX_TARGETS:
        lacks.append(
            f"TensorRT-RTX is for {', '.join(RTX_TARGETS)}; {gpu.name} is {gpu.target}: "
            f"take {recipe.name.replace('tensorrt-rtx', 'tensorrt')}"
        )
    return lacks


def _numbers(dotted: str) -> tuple[int, ...]:
    """The numbers of a version; none where there are no numbers."""
    return tuple(int(part) for part in dotted.split(".") if part.isdecimal())


def _dotted(numbers: Iterable[int]) -> str:
    return ".".join(map(str, numbers))


# -- gathering --------------------------------------------------------------------------------------------------------


def gather() -> Facts:
    """This machine's facts; whatever cannot be found out is left out."""
    driver = load_driver()
    gpus, gpu_problem = ask_nvidia_smi()
    if driver is not None and not gpus:  # as in containers, which have the driver without its tool
        gpus = ask_driver(driver)
        gpu_problem = None if gpus else gpu_problem  # that the tool is missing is none
    modules = {name: look_at(name, distributions) for name, distributions in MODULES.items()}
    return Facts(
        hardware=hardware(),
        gpus=gpus,
        gpu_problem=gpu_problem,
        cuda=None if driver is None else cuda_of_driver(driver),
        modules=modules,
        providers=_providers() if modules["onnxruntime"].works else [],
        torch_cuda=modules["torch"].works and _torch_has_cuda(),
        bfloat16=modules["openvino"].works and _openvino_has_bfloat16(),
    )


def ask_nvidia_smi(command: str = "nvidia-smi") -> tuple[list[Gpu], str | None]:
    """The GPUs that NVIDIA's own tool sees, and why it sees none.

    Args:
        command: the tool.
    """
    try:
        answer = subprocess.run(  # noqa: S603
            [command, f"--query-gpu={QUERY}", "--format=csv,noheader,nounits"],
            capture_output=True,
            text=True,
            timeout=TIMEOUT,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return [], f"{command} did not answer in {TIMEOUT} s"
    except OSError:
        return [], f"{command} is not there: no NVIDIA driver is installed"
    if answer.returncode:
        return [], " ".join((answer.stdout or answer.stderr).split())[:200] or f"{command} failed"
    gpus = parse_gpus(answer.stdout)
    return gpus, None if gpus else f"{command} lists no GPU"


def parse_gpus(answer: str) -> list[Gpu]:
    """The GPUs in nvidia-smi's answer, one a line; a line that cannot be read is left out."""
    gpus = []
    for line in answer.splitlines():
        fields = [part.strip() for part in line.split(",")]
        if len(fields) == len(QUERY.split(",")):
            name, capability, driver, memory = fields
            # A GPU that shares the processor's memory has "[N/A]".
            gpus.append(Gpu(name, capability, driver, int(memory) if memory.isdecimal() else 0))
    return gpus


def cuda_of_driver(driver: Any) -> str | None:
    """The newest CUDA that a driver takes, or None where it does not say."""
    number = ctypes.c_int(0)
    if driver.cuDriverGetVersion(ctypes.byref(number)) != 0 or not number.value:
        return None
    return f"{number.value // 1000}.{number.value % 1000 // 10}"


def ask_driver(driver: Any) -> list[Gpu]:
    """The GPUs that a driver has; it does not say its own version."""
    count = ctypes.c_int(0)
    if driver.cuDeviceGetCount(ctypes.byref(count)) != 0:
        return []
    gpus = []
    for device in range(count.value):
        name, memory = ctypes.create_string_buffer(256), ctypes.c_size_t(0)
        major, minor = ctypes.c_int(0), ctypes.c_int(0)
        driver.cuDeviceGetName(name, len(name), device)
        driver.cuDeviceTotalMem_v2(ctypes.byref(memory), device)
        for number, attribute in ((major, CAPABILITY_MAJOR), (minor, CAPABILITY_MINOR)):
            driver.cuDeviceGetAttribute(ctypes.byref(number), attribute, device)
        gpus.append(Gpu(name.value.decode(), f"{major.value}.{minor.value}", "unknown", memory.value >> 20))
    return gpus


def look_at(name: str, distributions: Iterable[str]) -> Module:
    """Import a package, and see what it is.

    Args:
        name: that Python imports.
        distributions: the names under which it may be installed.
    """
    installed = {}
    for distribution in distributions:
        try:
            installed[distribution] = version(distribution)
        except PackageNotFoundError:
            continue
    try:
        module = importlib.import_module(name)
    except Exception as error:  # bindings fail in their own ways when the library behind them is missing
        if not installed:
            return Module()
        return Module(next(iter(installed.values())), list(installed), " ".join(str(error).split())[:200])
    found = getattr(module, "__version__", None) or next(iter(installed.values()), "unknown")
    return Module(str(found), list(installed))


def _providers() -> list[str]:
    import onnxruntime

    return list(onnxruntime.get_available_providers())


def _torch_has_cuda() -> bool:
    import torch

    return bool(torch.cuda.is_available())


def _openvino_has_bfloat16() -> bool:
    return "BF16" in open_core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
