"""What the doctor says of machines of several kinds, by their facts; and what its self-test finds on this one."""

import ctypes
import io
import json
import re
import subprocess
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from dpo_fast import doctor
from dpo_fast.batches import Batch
from dpo_fast.doctor import Facts, Gpu, Module, ask_driver, cuda_of_driver, examine, judge, look_at, parse_gpus
from dpo_fast.doctor_table import print_examination, print_outcomes
from dpo_fast.engines.onnxruntime import OnnxRuntimeEngine
from dpo_fast.recipes import ENGINES, Recipe, load_recipe, recipe_folder
from dpo_fast.self_test import LARGEST, LIMITS, self_test
from dpo_fast.types import TokenScores

CPU, CUDA, TENSORRT = "CPUExecutionProvider", "CUDAExecutionProvider", "TensorrtExecutionProvider"
A10 = Gpu("NVIDIA A10", "8.6", "580.95.05", 23_028)
H100 = Gpu("NVIDIA H100 80GB HBM3", "9.0", "580.95.05", 81_559)
T4 = Gpu("Tesla T4", "7.5", "580.95.05", 15_360)
NONE = Module()


def installed(version: str, *distributions: str) -> Module:
    return Module(version, list(distributions))


# A laptop after `pip install 'dpo-fast[cpu]'`.
LAPTOP = Facts(
    hardware={"processor": "a processor", "cores": 8, "system": "Linux x86_64"},
    gpus=[],
    gpu_problem="nvidia-smi is not there: no NVIDIA driver is installed",
    cuda=None,
    modules={
        **dict.fromkeys(doctor.MODULES, NONE),
        "torch": installed("2.13.0", "torch"),
        "transformers": installed("5.23.0", "transformers"),
        "onnxruntime": installed("1.31.1", "onnxruntime"),
    },
    providers=["AzureExecutionProvider", CPU],
    torch_cuda=False,
    bfloat16=False,
)
# A server with all that there is for a GPU.
SERVER = replace(
    LAPTOP,
    gpus=[A10],
    gpu_problem=None,
    cuda="13.0",
    modules={
        **LAPTOP.modules,
        "onnxruntime": installed("1.31.1", "onnxruntime-gpu"),
        "openvino": installed("2026.4.1", "openvino"),
        "tensorrt": installed("10.16.1.11", "tensorrt"),
        "tensorrt_rtx": installed("1.7.1.116", "tensorrt_rtx"),
        "cuda.bindings": installed("13.0.0", "cuda-python"),
    },
    providers=[TENSORRT, CUDA, CPU],
    torch_cuda=True,
    bfloat16=True,
)
NEEDS_GPU = "needs an NVIDIA GPU with driver 580 or later"


def recipe(engine: str, precision: str = "fp16") -> Recipe:
    return Recipe(f"{engine}-{precision}", "", engine, precision, 4096, 512)


def with_module(facts: Facts, name: str, module: Module) -> Facts:
    return replace(facts, modules={**facts.modules, name: module})


# -- verdicts ---------------------------------------------------------------------------------------------------------


def test_a_server_with_everything_runs_everything() -> None:
    for engine, precisions in ENGINES.items():
        for precision in precisions:
            found = judge(recipe(engine, precision), SERVER)
            if (engine, precision) == ("tensorrt", "fp8"):
                continue  # not on Ampere
            assert (found.can_export, found.can_run, found.remedies) == (True, True, [])
            assert found.can_build == (True if engine.startswith("tensorrt") else None)
    assert judge(recipe("onnxruntime-tensorrt"), SERVER).can_run


@pytest.mark.parametrize(
    ("engine", "precision", "remedies"),
    [
        ("onnxruntime", "fp32", []),
        ("onnxruntime", "int8", []),
        ("openvino", "bf16", ["pip install 'dpo-fast[openvino]'"]),
        (
            "onnxruntime-cuda",
            "fp16",
            ["pip uninstall --yes onnxruntime && pip install 'dpo-fast[gpu]'", NEEDS_GPU],
        ),
        (
            "onnxruntime-tensorrt",
            "fp16",
            [
                "pip uninstall --yes onnxruntime && pip install 'dpo-fast[onnxruntime-tensorrt]'",
                "pip install 'dpo-fast[onnxruntime-tensorrt]'",
                NEEDS_GPU,
            ],
        ),
        ("tensorrt", "fp32", ["pip install 'dpo-fast[tensorrt]'", NEEDS_GPU]),
        (
            "tensorrt",
            "fp8",
            [
                "pip install 'dpo-fast[tensorrt]'",
                "needs an NVIDIA GPU of compute capability 8.9 or higher with driver 580 or later",
            ],
        ),
        ("tensorrt-rtx", "fp16", ["pip install 'dpo-fast[tensorrt-rtx]'", NEEDS_GPU]),
    ],
)
def test_a_laptop(engine: str, precision: str, remedies: list[str]) -> None:
    found = judge(recipe(engine, precision), LAPTOP)
    assert found.remedies == remedies
    assert found.can_run == (not remedies)
    assert found.can_export, "graphs are made anywhere"
    assert found.can_build == (False if engine.startswith("tensorrt") else None)


def test_tensorrt_rtx_builds_without_a_gpu() -> None:
    facts = with_module(LAPTOP, "tensorrt_rtx", installed("1.7.1.116", "tensorrt_rtx"))
    found = judge(recipe("tensorrt-rtx"), facts)
    assert (found.can_build, found.can_run) == (True, False)
    facts = with_module(LAPTOP, "tensorrt", installed("11.4.0.106", "tensorrt"))
    assert judge(recipe("tensorrt"), facts).can_build is False


def test_both_builds_of_onnx_runtime_overwrite_each_other() -> None:
    both = installed("1.31.1", "onnxruntime", "onnxruntime-gpu")
    facts = replace(with_module(SERVER, "onnxruntime", both), providers=[CPU])
    command = "pip uninstall --yes onnxruntime onnxruntime-gpu && pip install 'dpo-fast[gpu]'"
    assert judge(recipe("onnxruntime-cuda"), facts).remedies == [command]
    assert judge(recipe("onnxruntime-cuda"), replace(facts, providers=[CUDA, CPU])).remedies == []


def test_nothing_is_exported_without_onnx_runtime() -> None:
    facts = replace(with_module(LAPTOP, "onnxruntime", NONE), providers=[])
    found = judge(recipe("onnxruntime", "fp32"), facts)
    assert (found.can_export, found.can_run, found.remedies) == (False, False, ["pip install 'dpo-fast[cpu]'"])
    assert not judge(recipe("tensorrt"), facts).can_export


@pytest.mark.parametrize(
    ("gpu", "engine", "precision", "said"),
    [
        (A10, "tensorrt", "fp8", "needs compute capability 8.9 for fp8; NVIDIA A10 has 8.6: take a recipe in fp16"),
        (T4, "onnxruntime-cuda", "bf16", "needs compute capability 8.0 for bf16; Tesla T4 has 7.5"),
        (T4, "tensorrt-rtx", "fp16", "TensorRT-RTX is for sm80, .*; Tesla T4 is sm75: take tensorrt-fp16"),
        (H100, "tensorrt-rtx", "bf16", "TensorRT-RTX is for .*; NVIDIA H100 80GB HBM3 is sm90: take tensorrt-bf16"),
    ],
)
def test_gpus_that_cannot(gpu: Gpu, engine: str, precision: str, said: str) -> None:
    found = judge(recipe(engine, precision), replace(SERVER, gpus=[gpu]))
    assert not found.can_run
    assert len(found.remedies) == 1
    assert re.match(said, found.remedies[0])


def test_an_old_driver() -> None:
    old = replace(A10, driver="535.161.07")
    found = judge(recipe("onnxruntime-cuda"), replace(SERVER, gpus=[old], cuda="12.2"))
    assert found.remedies == ["needs driver 580 or later; NVIDIA A10 has 535.161.07: install NVIDIA's newer driver"]


def test_onnx_runtime_loads_tensorrt_10_alone() -> None:
    facts = with_module(SERVER, "tensorrt", installed("11.4.0.106", "tensorrt"))
    assert judge(recipe("onnxruntime-tensorrt"), facts).remedies == ["pip install 'dpo-fast[onnxruntime-tensorrt]'"]
    assert judge(recipe("tensorrt"), facts).can_run


def test_bindings_without_their_library_do_not_count() -> None:
    broken = replace(installed("10.16.1.11", "tensorrt"), problem="libnvinfer.so.10: cannot open shared object file")
    found = judge(recipe("tensorrt"), with_module(SERVER, "tensorrt", broken))
    assert (found.can_build, found.remedies) == (False, ["pip install 'dpo-fast[tensorrt]'"])


def test_plans_run_with_cuda_python_or_pytorch() -> None:
    without = with_module(SERVER, "cuda.bindings", NONE)
    assert judge(recipe("tensorrt"), without).can_run
    found = judge(recipe("tensorrt"), replace(without, torch_cuda=False))
    assert (found.can_build, found.can_run) == (True, False)
    assert found.remedies == ["pip install 'dpo-fast[tensorrt]'"]


def test_bfloat16_on_processors() -> None:
    facts = replace(SERVER, bfloat16=False)
    assert not judge(recipe("openvino", "bf16"), facts).can_run
    assert judge(recipe("openvino", "int8"), facts).can_run


def test_every_shipped_recipe_has_its_verdict_and_limit() -> None:
    names = [path.stem for path in sorted(recipe_folder().glob("*.toml"))]
    for facts in (LAPTOP, SERVER):
        verdicts = examine(facts)["recipes"]
        assert [verdict["recipe"] for verdict in verdicts] == names
        assert all(verdict["can_run"] == (not verdict["remedies"]) for verdict in verdicts)
    assert {load_recipe(name).precision for name in names} <= set(LIMITS)


# -- facts ------------------------------------------------------------------------------------------------------------


def test_what_nvidia_smi_says() -> None:
    answer = "NVIDIA A10, 8.6, 580.95.05, 23028\nNVIDIA GB10, 12.1, 580.95.05, [N/A]\nno line of it\n"
    assert parse_gpus(answer) == [A10, Gpu("NVIDIA GB10", "12.1", "580.95.05", 0)]
    assert parse_gpus(answer)[1].target == "sm121"


def script(folder: Path, text: str) -> str:
    path = folder / "nvidia-smi"
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return str(path)


def test_nvidia_smi_that_answers_fails_and_hangs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answers = script(tmp_path, f"case \"$1\" in *{doctor.QUERY}*) echo 'NVIDIA A10, 8.6, 580.95.05, 23028';; esac")
    assert doctor.ask_nvidia_smi(answers) == ([A10], None)
    fails = script(tmp_path, "echo 'NVIDIA-SMI has failed because it\ncould not communicate'; exit 9")
    assert doctor.ask_nvidia_smi(fails) == ([], "NVIDIA-SMI has failed because it could not communicate")
    empty = script(tmp_path, "exit 0")
    assert doctor.ask_nvidia_smi(empty) == ([], f"{empty} lists no GPU")
    gpus, problem = doctor.ask_nvidia_smi(str(tmp_path / "none"))
    assert not gpus
    assert problem is not None
    assert "no NVIDIA driver is installed" in problem

    def hang(*_: Any, timeout: float, **__: Any) -> None:
        raise subprocess.TimeoutExpired("nvidia-smi", timeout)

    monkeypatch.setattr(subprocess, "run", hang)
    assert doctor.ask_nvidia_smi() == ([], f"nvidia-smi did not answer in {doctor.TIMEOUT} s")


class Driver:
    """NVIDIA's driver with one GPU, an A10."""

    def cuDriverGetVersion(self, number: Any) -> int:
        return self._put(number, ctypes.c_int, 12_040)

    def cuDeviceGetCount(self, number: Any) -> int:
        return self._put(number, ctypes.c_int, 1)

    def cuDeviceGetName(self, name: Any, size: int, device: int) -> int:
        assert (size, device) == (256, 0)
        name.value = b"NVIDIA A10"
        return 0

    def cuDeviceTotalMem_v2(self, number: Any, device: int) -> int:
        assert device == 0
        return self._put(number, ctypes.c_size_t, 23_028 * 2**20)

    def cuDeviceGetAttribute(self, number: Any, attribute: int, device: int) -> int:
        assert device == 0
        return self._put(number, ctypes.c_int, {75: 8, 76: 6}[attribute])

    def _put(self, reference: Any, kind: Any, value: int) -> int:
        ctypes.cast(reference, ctypes.POINTER(kind))[0] = value
        return 0


def test_the_driver_is_asked_where_its_tool_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in many containers; nobody is told then that no driver is installed."""
    assert ask_driver(Driver()) == [replace(A10, driver="unknown")]
    assert cuda_of_driver(Driver()) == "12.4"
    monkeypatch.setattr(doctor, "load_driver", Driver)
    monkeypatch.setattr(doctor, "ask_nvidia_smi", lambda: ([], LAPTOP.gpu_problem))
    monkeypatch.setattr(doctor, "look_at", lambda *_: Module())
    facts = doctor.gather()
    assert (facts.gpus, facts.gpu_problem) == ([replace(A10, driver="unknown")], None)


def test_modules() -> None:
    assert look_at("onnxruntime", ("onnxruntime", "onnxruntime-gpu")).works
    assert look_at("no_such_module", ("no-such-distribution",)) == Module()
    broken = look_at("no_such_module", ("onnx",))
    assert broken.version is not None
    assert not broken.works
    assert broken.problem == "No module named 'no_such_module'"


@pytest.mark.slow
def test_this_machine() -> None:
    examined = examine()
    assert json.loads(json.dumps(examined, allow_nan=False)) == examined
    assert CPU in examined["machine"]["providers"]
    verdicts = {verdict["recipe"]: verdict for verdict in examined["recipes"]}
    assert verdicts["cpu-fp32"]["can_run"]


# -- the self-test ----------------------------------------------------------------------------------------------------


def verdict(name: str, *, can_run: bool = True, can_build: bool | None = None) -> dict[str, Any]:
    return {"recipe": name, "can_run": can_run, "can_build": can_build}


@pytest.mark.slow
def test_engines_that_run_here_pass() -> None:
    lines: list[str] = []
    outcomes = self_test(
        [verdict("cpu-fp32"), verdict("cpu-int8"), verdict("openvino-int8"), verdict("cuda-fp16", can_run=False)],
        lines.append,
    )
    assert [outcome["recipe"] for outcome in outcomes] == ["cpu-fp32", "cpu-int8", "openvino-int8"]
    for outcome in outcomes:
        assert (outcome["passed"], outcome["ran"], outcome["error"]) == (True, True, None)
        assert [step["name"] for step in outcome["steps"]] == ["export", "run", "refit", "run refitted"]
        assert all(step["seconds"] > 0 for step in outcome["steps"])
        limit, reason = outcome["limit"], outcome["reason"]
        assert reason
        for step in outcome["steps"][1::2]:
            assert 0 < step["mean"] <= limit
            assert step["mean"] < step["largest"] <= LARGEST * limit
    assert outcomes[0]["engine"].startswith("onnxruntime")
    assert any("cpu-int8: refit" in line for line in lines)
    assert json.loads(json.dumps(outcomes, allow_nan=False)) == outcomes


@pytest.mark.slow
def test_another_model_passes_at_no_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    """A refit that changes nothing leaves the first checkpoint's scores: further off than any precision may be."""
    from dpo_fast.export import refit

    monkeypatch.setattr(refit, "refit", lambda bundle, *_: bundle)
    outcome = self_test([verdict("cpu-fp32")])[0]
    assert (outcome["passed"], outcome["ran"]) == (False, False)
    assert [step["name"] for step in outcome["steps"]] == ["export", "run", "refit", "run refitted"]
    assert outcome["error"].startswith("run refitted: log-probs are off from PyTorch's by ")
    assert outcome["steps"][-1]["mean"] > max(limit for limit, _ in LIMITS.values())


@pytest.mark.slow
def test_a_failure_is_kept_and_the_rest_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    damaged = tmp_path / "damaged.toml"
    damaged.write_text("engine = 3")
    score = OnnxRuntimeEngine.score

    def off(self: OnnxRuntimeEngine, batch: Batch) -> TokenScores:
        found = score(self, batch)
        return replace(found, log_prob=found.log_prob - 3) if self.precision == "int8" else found

    monkeypatch.setattr(OnnxRuntimeEngine, "score", off)
    outcomes = self_test([verdict(str(damaged)), verdict("cpu-int8"), verdict("cpu-fp32")])
    assert [outcome["passed"] for outcome in outcomes] == [False, False, True]
    assert "damaged.toml" in outcomes[0]["error"]
    assert outcomes[0]["steps"] == []
    assert "another model" in outcomes[1]["error"], "the export's own check has seen it"
    assert all("\n" not in str(outcome["error"]) for outcome in outcomes)


@pytest.mark.slow
def test_plans_are_built_where_they_cannot_run() -> None:
    """By TensorRT-RTX, which builds on any machine; and a recipe that makes no plans has not passed."""
    pytest.importorskip("tensorrt_rtx")
    verdicts = [verdict(name, can_run=False, can_build=True) for name in ("tensorrt-rtx-fp16", "cpu-fp32")]
    built, none = self_test(verdicts)
    assert (built["passed"], built["ran"], built["engine"], built["error"]) == (True, False, None, None)
    assert [step["name"] for step in built["steps"]] == ["export", "refit"]
    assert not none["passed"]
    assert "no plans were built" in none["error"]


def test_nothing_to_test() -> None:
    assert self_test([verdict("cuda-fp16", can_run=False)]) == []


# -- tables -----------------------------------------------------------------------------------------------------------


def printed(write: Any, value: dict[str, Any] | Sequence[dict[str, Any]]) -> str:
    console = Console(file=io.StringIO(), width=160)
    write(value, console)
    return console.file.getvalue()  # type: ignore[attr-defined,no-any-return]


def test_the_tables() -> None:
    facts = with_module(LAPTOP, "tensorrt", replace(installed("10.16.1.11", "tensorrt"), problem="[red]no library[/]"))
    text = printed(print_examination, examine(facts))
    for expected in (
        "a processor, 8 cores, Linux x86_64",
        "nvidia-smi is not there",
        "10.16.1.11, cannot be imported: [red]no library[/]",
        "1.31.1 (installed as onnxruntime): AzureExecutionProvider, CPUExecutionProvider",
        "pip uninstall --yes onnxruntime && pip install 'dpo-fast[gpu]'",
        "not installed",
    ):
        assert expected in text
    text = printed(print_examination, {"machine": asdict(SERVER), "recipes": []})
    assert "NVIDIA A10, compute capability 8.6, 23,028 MiB, driver 580.95.05" in text
    assert "the driver takes up to 13.0" in text

    step = {"name": "run", "seconds": 1.26, "mean": 0.0123, "largest": 0.056}
    common = {"engine": "e", "limit": 0.01, "reason": "why so", "steps": [step]}
    text = printed(
        print_outcomes,
        [
            {"recipe": "one", "passed": True, "ran": True, "error": None, **common},
            {"recipe": "two", "passed": True, "ran": False, "error": None, **common},
            {"recipe": "three", "passed": False, "ran": False, "error": "off by\n[b]miles", **common},
            {"recipe": "four", "passed": False, "ran": False, "error": "is no recipe", **common, "steps": []},
        ],
    )
    for expected in (
        "passed",
        "built, not run",
        "failed",
        "0.012",
        "0.056",
        "1.3",
        "three: off by",
        "[b]miles",
        "four: is no",
    ):
        assert expected in text
    assert text.count("why so") == 1
