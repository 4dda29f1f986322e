"""From export to plans and back: what is written, what is refused, what a person is told."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest
from tiny_models import copy_checkpoint, make_config, make_model, save_model

from dpo_fast.bundle import POLICY, REFERENCE, open_bundle
from dpo_fast.cli import run
from dpo_fast.errors import BuildError, BundleError, MissingDependencyError, UsageError
from dpo_fast.evaluate import EvaluateOptions, evaluate
from dpo_fast.export.exporter import ExportOptions, export
from dpo_fast.export.refit import RefitOptions, refit
from dpo_fast.recipes import load_recipe
from dpo_fast.tensorrt import builder, bundle_plans, package
from dpo_fast.tensorrt.builder import run_worker
from dpo_fast.tensorrt.bundle_plans import build
from dpo_fast.tensorrt.graphs import make_graphs, write_graph
from dpo_fast.tensorrt.options import RTX_TARGETS, BuildOptions
from dpo_fast.tensorrt.plans import read_plans
from dpo_fast.types import LossSettings

from .test_adapters import QUICK, make_adapter

Trace = Callable[..., ir.Model]
pytestmark = pytest.mark.slow
RTX = "tensorrt-rtx-fp16"
ONE = BuildOptions(targets=("sm89",), profiles=1)


@pytest.fixture(scope="module")
def made(tiny_pair: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle with plans. Read only: copy it before changing anything."""
    policy, reference = map(str, tiny_pair)
    options = ExportOptions(recipe=RTX, build=ONE, max_length=64)
    return export(policy, reference, tmp_path_factory.mktemp("rtx") / "bundle", options)


@pytest.fixture
def own(made: Path, tmp_path: Path) -> Path:
    return copy_checkpoint(made, tmp_path / "own")


def plans_of(bundle: Path, role: str = POLICY) -> Any:
    description = open_bundle(bundle).manifest.models[role].plan
    assert description is not None
    return read_plans(bundle / description)


def test_export_builds_describes_and_hashes_plans(made: Path) -> None:
    opened = open_bundle(made)
    opened.verify()
    folder = made / "engines" / RTX
    assert sorted(path.name for path in folder.iterdir()) == sorted(
        f"{role}.{kind}" for role in (POLICY, REFERENCE) for kind in ("json", "body.plan", "head.plan")
    )
    for role in (POLICY, REFERENCE):
        plans = plans_of(made, role)
        assert (plans.package, plans.targets, plans.refittable) == ("tensorrt_rtx", ["sm89"], False)
        assert plans.profiles[-1].width[2] >= 2 * 64
        hashes = opened.role_hashes(role)
        files = opened.manifest.files
        assert {files[f"engines/{RTX}/{role}.{part}.plan"]["sha256"] for part in ("body", "head")} <= set(hashes)
    assert set(opened.role_hashes(POLICY)).isdisjoint(opened.role_hashes(REFERENCE))


def test_an_altered_plan_is_not_run(own: Path, dataset: str, tmp_path: Path) -> None:
    plan = own / "engines" / RTX / "policy.head.plan"
    content = bytearray(plan.read_bytes())
    content[len(content) // 2] ^= 1
    plan.write_bytes(content)
    with pytest.raises(BundleError, match=r"policy.head.plan: is not the file that was exported"):
        open_bundle(own).verify()


def test_evaluating_without_a_gpu_says_what_is_missing(
    made: Path, dataset: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["evaluate", str(made), "--dataset", dataset, "--output", str(tmp_path / "run")]) == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said.startswith("dpo-fast: ")
    assert "NVIDIA" in said or "cuda-python" in said
    assert not (tmp_path / "run").exists()


def test_longer_rows_than_plans_take_are_refused_first(made: Path, dataset: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"--max-length 100: the bundle's plans take rows of --max-length 64"):
        evaluate(made, dataset, tmp_path / "run", EvaluateOptions(max_length=100))
    assert not (tmp_path / "run").exists()


def test_a_bundle_without_plans_names_the_command(tiny_pair: tuple[Path, Path], tmp_path: Path, dataset: str) -> None:
    lines: list[str] = []
    bundle = export(
        str(tiny_pair[0]),
        None,
        tmp_path / "bundle",
        ExportOptions(recipe="tensorrt-fp16", self_check=False),
        lines.append,
    )
    if not package.count_gpus():
        assert any("no plans were built" in line and "`dpo-fast build`" in line for line in lines), lines
        with pytest.raises(BundleError, match=r"has no plans yet, .* build them with `dpo-fast build "):
            evaluate(bundle, dataset, tmp_path / "run", EvaluateOptions(loss=LossSettings(reference_free="sum")))
        with pytest.raises((MissingDependencyError, BuildError)):
            build(bundle, BuildOptions())


def test_build_replaces_the_plans(own: Path, dataset: str) -> None:
    lines: list[str] = []
    (own / POLICY / "README.md").write_text("a card\n", encoding="utf-8")
    before = open_bundle(own)
    assert (
        build(own, BuildOptions(targets=("sm86", "sm120"), profile_from=dataset, profiles=2), report=lines.append)
        == own
    )
    after = open_bundle(own)
    after.verify()
    assert (own / POLICY / "README.md").read_text(encoding="utf-8") == "a card\n"
    plans = plans_of(own)
    assert plans.targets == ["sm86", "sm120"]
    assert 1 <= len(plans.profiles) <= 3
    # What the profiles have to do is told before anything is built.
    first_built = next(number for number, line in enumerate(lines) if "built the body" in line)
    told = [number for number, line in enumerate(lines) if line.startswith(("profile ", "all "))]
    assert told
    assert max(told) < first_built
    kept = [name for name in before.manifest.files if not name.startswith("engines/")]
    assert {name: after.manifest.files[name] for name in kept} == {name: before.manifest.files[name] for name in kept}


def test_a_failed_build_leaves_the_bundle_as_it_was(own: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = {path: path.read_bytes() for path in own.rglob("*.json")}

    def refuse(job: Any, name: str) -> Any:
        raise BuildError(f"{name}: refused")

    monkeypatch.setattr(builder, "run_worker", refuse)
    with pytest.raises(BuildError, match="refused"):
        build(own, ONE)
    assert {path: path.read_bytes() for path in own.rglob("*.json")} == before
    open_bundle(own).verify()
    assert sorted(path.name for path in own.parent.iterdir()) == ["own"]


def test_a_refit_builds_the_plans_again(own: Path, tiny_pair: tuple[Path, Path]) -> None:
    """Plans for other machines take no new weights: they are built anew, as they were."""
    old = {path.name: path.read_bytes() for path in (own / "engines" / RTX).iterdir()}
    refit(own, str(tiny_pair[1]), options=RefitOptions(self_check=False))
    open_bundle(own).verify()
    new = {path.name: path.read_bytes() for path in (own / "engines" / RTX).iterdir()}
    assert new.keys() == old.keys()
    assert new["policy.body.plan"] != old["policy.body.plan"]
    assert new["reference.body.plan"] == old["reference.body.plan"]
    plans = plans_of(own)
    assert (plans.targets, plans.options["profiles"]) == (["sm89"], 1)


def test_a_refit_where_nothing_can_be_built_leaves_no_old_weights(
    own: Path, tiny_pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bundle_plans, "why_not_here", lambda package: "there is no builder")
    lines: list[str] = []
    refit(own, str(tiny_pair[1]), options=RefitOptions(self_check=False), report=lines.append)
    assert any("its plans were left out" in line and "there is no builder" in line for line in lines)
    opened = open_bundle(own)
    opened.verify()
    assert opened.manifest.models[POLICY].plan is None
    assert not (own / "engines" / RTX / "policy.body.plan").exists()
    assert opened.manifest.models[REFERENCE].plan is not None


def test_an_adapters_plans_are_its_bases_too(
    tiny_pair: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where a refit leaves them out, the reference has none either."""
    adapter, newer = (make_adapter(tiny_pair[0], tmp_path / str(seed), seed=seed, **QUICK) for seed in (1, 2))
    options = ExportOptions(recipe=RTX, build=ONE, max_length=64, self_check=False)
    bundle = export(str(adapter), "base", tmp_path / "bundle", options)
    assert plans_of(bundle) == plans_of(bundle, REFERENCE)
    monkeypatch.setattr(bundle_plans, "why_not_here", lambda package: "there is no builder")
    refit(bundle, str(newer), options=RefitOptions(self_check=False))
    opened = open_bundle(bundle)
    opened.verify()
    assert [opened.manifest.models[role].plan for role in (POLICY, REFERENCE)] == [None, None]


def test_a_mixtures_experts_are_dense_for_tensorrt_alone(tmp_path: Path) -> None:
    """And the self-check has held them against PyTorch's own experts."""
    policy = save_model(make_model(make_config("mixtral"), scale=0.15), tmp_path / "policy")
    graphs = {}
    for recipe in ("cpu-fp32", "tensorrt-fp32"):
        bundle = export(str(policy), None, tmp_path / recipe, ExportOptions(recipe=recipe))
        opened = open_bundle(bundle)
        check = opened.manifest.models[POLICY].self_check
        assert check is not None
        assert check["passed"]
        graphs[recipe] = {node.op_type for node in ir.load(opened.graph(POLICY)).graph.all_nodes()}
    assert graphs["tensorrt-fp32"].isdisjoint({"NonZero", "Loop"})
    assert graphs["cpu-fp32"] != graphs["tensorrt-fp32"]


# -- the child process -------------------------------------------------------------------------------------------------


def job_for(bundle: Path, tmp_path: Path, **changes: Any) -> dict[str, Any]:
    graph = open_bundle(bundle).engine_graph(POLICY)
    path = write_graph(make_graphs(graph)["head"], tmp_path, "head")
    hidden = ir.load(path).graph.inputs[1].shape[1]  # type: ignore[index]
    shapes = {"target_ids": [[1], [8], [8]], "states": [[1, hidden], [8, hidden], [8, hidden]]}
    return {
        "package": "tensorrt_rtx", "graph": str(path), "plan": str(tmp_path / "head.plan"), "profiles": [shapes],
        "targets": ["sm86"], "workspace_bytes": 1 << 30, "refittable": False, "version_compatible": False,
        "hardware_compatible": False, "timing_cache": None, **changes,
    }  # fmt: skip


def test_a_worker_builds(made: Path, tmp_path: Path) -> None:
    said = run_worker(job_for(made, tmp_path), "head")
    assert said["bytes"] == (tmp_path / "head.plan").stat().st_size
    assert said["seconds"] > 0
    assert said["version"] == "1.7.1.116"


REFUSALS = {
    "a GPU without float32 products": ({"targets": ["sm75"]}, "FP32 GEMM is not supported"),
    "a GPU that it does not know": ({"targets": ["sm90"]}, "it does not build for sm90"),
    "new weights without a GPU": ({"refittable": True}, "it looks for a GPU, and this machine has none"),
    "later versions": ({"version_compatible": True}, "libnvinfer_lean"),
    "a profile that is none": (
        {"profiles": [{"target_ids": [[8], [4], [1]], "states": [[8, 32], [4, 32], [1, 32]]}]},
        "profile",
    ),
}


@pytest.mark.parametrize("what", REFUSALS)
def test_what_the_builder_refuses_is_our_error(made: Path, tmp_path: Path, what: str) -> None:
    changes, message = REFUSALS[what]
    with pytest.raises(BuildError) as caught:
        run_worker(job_for(made, tmp_path, **changes), "policy, head")
    assert message in str(caught.value)
    assert str(caught.value).startswith("policy, head: ")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "head.plan").exists()


def test_what_the_parser_refuses_is_told_with_node_and_operator(made: Path, tmp_path: Path) -> None:
    job = job_for(made, tmp_path)
    model = ir.load(job["graph"])
    node = next(node for node in model.graph if node.op_type == "Softmax")
    node.op_type, node.name = "Hardmax2", "the culprit"
    ir.save(model, job["graph"])
    with pytest.raises(BuildError, match=r"refuses it: node 'the culprit' \(Hardmax2\): "):
        run_worker(job, "policy, head")
    job["graph"] = str(tmp_path / "none.onnx")
    with pytest.raises(BuildError, match="refuses it"):
        run_worker(job, "policy, head")


FAKES = {
    "crash": ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "crashed while it built it, SIGSEGV"),
    "exit": ("import sys; print('no licence', file=sys.stderr); sys.exit(5)", r"did not build it \(no licence\)"),
    "error": ("raise RuntimeError('half a package')", r"did not build it \(RuntimeError: half a package\)"),
}


@pytest.mark.parametrize("fake", FAKES)
def test_a_builder_that_dies_is_our_error(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fake: str
) -> None:
    code, message = FAKES[fake]
    (tmp_path / "fake_tensorrt.py").write_text(code, encoding="utf-8")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(BuildError, match=f"policy, head: fake_tensorrt {message}"):
        run_worker(job_for(made, tmp_path, package="fake_tensorrt"), "policy, head")


def test_an_interrupted_build_leaves_no_child(made: Path, tmp_path: Path) -> None:
    """The child would go on for minutes, and nobody would want what it builds."""
    (tmp_path / "fake_tensorrt.py").write_text(
        "import os, time, pathlib\n"
        f"pathlib.Path({str(tmp_path / 'pid')!r}).write_text(str(os.getpid()))\ntime.sleep(60)",
        encoding="utf-8",
    )
    job = job_for(made, tmp_path, package="fake_tensorrt")
    # Where the tests run in the background, SIGINT is ignored.
    code = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
    code += f"from dpo_fast.tensorrt.builder import run_worker; run_worker({job!r}, 'head')"
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    parent = subprocess.Popen([sys.executable, "-c", code], env=environment, stderr=subprocess.DEVNULL)
    while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text():
        assert parent.poll() is None
    parent.send_signal(signal.SIGINT)
    parent.wait(30)
    child = int((tmp_path / "pid").read_text())
    with pytest.raises(ProcessLookupError):
        os.kill(child, 0)


# -- options ----------------------------------------------------------------------------------------------------------

WRONG: dict[str, tuple[str, BuildOptions, str]] = {
    "target of another builder": (
        "tensorrt-fp16",
        BuildOptions(targets=("sm89",)),
        "builds for the GPU of the machine",
    ),
    "Hopper": (RTX, BuildOptions(targets=("sm90",)), "take a recipe tensorrt-… and build on that machine"),
    "Turing": (RTX, BuildOptions(targets=("sm75",)), "has no float32 products"),
    "no target": (RTX, BuildOptions(targets=("",)), "builds for sm80, sm86"),
    "profiles": (RTX, BuildOptions(profiles=0), "--profiles 0 must be between 1 and 16"),
    "workspace": (RTX, BuildOptions(workspace_gib=-1), "--workspace -1 must be above 0 GiB"),
    "split of nothing": (RTX, BuildOptions(profile_split="test"), "--profile-split test goes with --profile-from"),
    "versions": (RTX, BuildOptions(version_compatible=True), "--version-compatible: TensorRT-RTX has no such plans"),
    "hardware": (RTX, BuildOptions(hardware_compatible=True), "--hardware-compatible: TensorRT-RTX has no such plans"),
    "no plans at all": ("cpu-fp32", BuildOptions(targets=("sm89",)), "the recipe cpu-fp32 has no plans to build"),
    "no such data": (RTX, BuildOptions(profile_from="none.jsonl"), "none.jsonl"),
}


@pytest.mark.parametrize("what", WRONG)
def test_a_wrong_option_is_refused_before_anything_is_built(
    tiny_pair: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    recipe, options, message = WRONG[what]
    monkeypatch.setattr(builder, "run_worker", lambda *_: pytest.fail("something was built"))
    with pytest.raises(Exception, match=message.replace("(", r"\(")) as caught:
        export(
            str(tiny_pair[0]), None, tmp_path / "bundle",
            ExportOptions(recipe=recipe, build=options, self_check=False, max_length=64),
        )  # fmt: skip
    assert caught.type.__module__ == "dpo_fast.errors"
    assert not (tmp_path / "bundle").exists()


def test_rows_that_do_not_fit_are_refused_before_anything_is_built(
    tiny_pair: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(builder, "run_worker", lambda *_: pytest.fail("something was built"))
    recipe = tmp_path / "small.toml"
    recipe.write_text(
        'description = ""\nengine = "tensorrt-rtx"\nprecision = "fp16"\nhead_precision = "fp32"\n'
        "vocabulary_tile = 128\ntoken_budget = 100\nhead_chunk = 256\n",
        encoding="utf-8",
    )
    options = ExportOptions(recipe=str(recipe), build=ONE, self_check=False, layout="shared", max_length=64)
    with pytest.raises(UsageError, match=r"may have 128 tokens, .* token_budget is 100; lower --max-length to 50"):
        export(str(tiny_pair[0]), None, tmp_path / "bundle", options)


def test_the_package_is_asked_for_where_plans_are(
    tiny_pair: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", None)
    policy = str(tiny_pair[0])
    with pytest.raises(MissingDependencyError, match=r"pip install 'dpo-fast\[tensorrt-rtx\]'"):
        export(policy, None, tmp_path / "bundle", ExportOptions(recipe=RTX, build=ONE, self_check=False))
    lines: list[str] = []
    export(policy, None, tmp_path / "bundle", ExportOptions(recipe=RTX, self_check=False), lines.append)
    assert any("no plans were built" in line and "dpo-fast[tensorrt-rtx]" in line for line in lines)


def test_every_target_is_one_that_the_package_has() -> None:
    import tensorrt_rtx

    assert set(RTX_TARGETS) | {"sm75", "none", "current"} == {
        name.lower() for name in tensorrt_rtx.ComputeCapability.__members__
    }


def test_the_bundle_keeps_its_format(made: Path) -> None:
    value = json.loads((made / "bundle.json").read_text(encoding="utf-8"))
    assert value["models"][POLICY]["plan"] == f"engines/{RTX}/policy.json"
    assert load_recipe(RTX).head_chunk == value["recipe"]["head_chunk"]
