"""New weights in a plan, on the double."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from dpo_fast.engines.tensorrt import TensorRtEngine
from dpo_fast.errors import BuildError, StorageError
from dpo_fast.tensorrt.package import KEPT_MESSAGES, message_log
from dpo_fast.tensorrt.refit import refit_plan

from .double import Double, Severity, write_plan
from .tiny_plans import Tiny, make_batch, save_with_external_data

OLD, NEW = Tiny(adapters=2), Tiny(adapters=2, seed=1)


@pytest.fixture
def double() -> Double:
    return Double()


@pytest.fixture
def folder(tmp_path) -> Path:
    """The old weights' plans, and the new ones' graphs with their weights beside them."""
    OLD.write(tmp_path)
    write_plan(tmp_path / "policy.body.plan", OLD.body(), OLD.body_profiles(), refittable=True)
    write_plan(tmp_path / "policy.head.plan", OLD.head(), OLD.head_profiles(), refittable=True)
    save_with_external_data(NEW.body(), tmp_path / "body.onnx")
    save_with_external_data(NEW.head(), tmp_path / "head.onnx")
    return tmp_path


def test_refitted_plans_score_with_the_new_weights(folder, double):
    for half in ("body", "head"):
        refit_plan(double, folder / f"policy.{half}.plan", folder / f"{half}.onnx", folder / f"policy.{half}.plan")
    engine = TensorRtEngine(
        folder / "policy.json", precision="fp32", gates=[1.0, 0.0], memory=double.memory, package=double
    )
    batch, gates = make_batch(3, 4, 12, 30), np.array([[1.0, 0.0]])
    found, old, new = engine.score(batch), OLD.expected(batch, gates), NEW.expected(batch, gates)
    np.testing.assert_allclose(found.log_prob, new.log_prob, rtol=0, atol=2e-5)  # float32 against float64
    assert np.abs(old.log_prob - new.log_prob).max() > 0.1
    assert sorted(path.name for path in folder.iterdir() if path.name.startswith(".")) == []


@pytest.mark.parametrize(
    ("call", "failure", "words"),
    [
        (("Runtime", "__init__"), TypeError("factory function returned nullptr"), "does not start"),
        (
            ("Runtime", "deserialize_cuda_engine"),
            None,
            "policy.body.plan: tensorrt 11.4.0.106 does not take it: injected",
        ),
        (("Refitter", "__init__"), TypeError("factory function returned nullptr"), "cannot be refitted: injected"),
        (
            ("OnnxParserRefitter", "__init__"),
            TypeError("factory function returned nullptr"),
            "cannot be refitted: injected",
        ),
        (("OnnxParserRefitter", "refit_from_file"), False, "body.onnx: its weights do not go into policy.body.plan"),
        (("Refitter", "get_missing_weights"), ["embedding", "segments"], "lacks 2 weights .* such as 'embedding'"),
        (("Refitter", "refit_cuda_engine"), False, "refused the weights of .*body.onnx: injected"),
        (("ICudaEngine", "serialize"), None, "cannot be written anew: injected"),
    ],
)
def test_quiet_failure(folder, double, call, failure, words):
    double.failing[call] = failure
    with pytest.raises(BuildError, match=words) as caught:
        refit_plan(double, folder / "policy.body.plan", folder / "body.onnx", folder / "new.plan")
    assert "\n" not in str(caught.value)
    assert not (folder / "new.plan").exists()


def test_weights_of_another_shape_are_told_with_their_node(folder, double):
    save_with_external_data(replace(NEW, hidden_size=16).body(), folder / "body.onnx")
    with pytest.raises(BuildError, match=r"\(Gather\): embedding has another shape or type"):
        refit_plan(double, folder / "policy.body.plan", folder / "body.onnx", folder / "new.plan")


def test_graph_without_its_adapters(folder, double):
    save_with_external_data(replace(NEW, adapters=0).body(), folder / "body.onnx")
    with pytest.raises(BuildError, match=r"lacks 1 weights that policy.body.plan wants, such as 'adapters'"):
        refit_plan(double, folder / "policy.body.plan", folder / "body.onnx", folder / "new.plan")


def test_missing_graph_missing_plan_and_plan_that_takes_no_weights(folder, double):
    with pytest.raises(BuildError, match=r"none.onnx: its weights do not go .*cannot load"):
        refit_plan(double, folder / "policy.body.plan", folder / "none.onnx", folder / "new.plan")
    with pytest.raises(BuildError, match=r"none.plan: cannot be read"):
        refit_plan(double, folder / "none.plan", folder / "body.onnx", folder / "new.plan")
    write_plan(folder / "policy.body.plan", OLD.body(), OLD.body_profiles())
    with pytest.raises(BuildError, match=r"policy.body.plan: takes no new weights"):
        refit_plan(double, folder / "policy.body.plan", folder / "body.onnx", folder / "new.plan")


def test_disk_that_refuses_leaves_the_old_plan(folder, double):
    before = (folder / "policy.body.plan").read_bytes()
    target = folder / "policy.body.plan"
    with pytest.raises(StorageError, match="shorter name"):
        refit_plan(double, target, folder / "body.onnx", folder / ("long" * 80))
    assert target.read_bytes() == before


def test_plan_that_the_real_package_refuses(folder):
    """TensorRT-RTX's own runtime, which needs no GPU to say that a file is no plan."""
    import tensorrt_rtx

    with pytest.raises(
        BuildError, match=r"policy.body.plan: tensorrt_rtx 1\.7\.1\.116 does not take it: .*deserialize"
    ):
        refit_plan(tensorrt_rtx, folder / "policy.body.plan", folder / "body.onnx", folder / "new.plan")


def test_log_keeps_the_last_errors_and_warnings_on_one_line(double):
    log = message_log(double)
    for number in range(5):
        log.log(Severity.WARNING, f"message\n{number}")
        log.log(Severity.INFO, "news")
    assert log.last() == ": " + " | ".join(f"message {number}" for number in range(5 - KEPT_MESSAGES, 5))
    assert log.last() == ""
