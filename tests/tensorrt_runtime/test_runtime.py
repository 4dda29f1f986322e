"""The engine on a double of TensorRT: numbers, order, lifetimes, and what it says when something fails."""

import gc
from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dpo_fast.batches import Batch
from dpo_fast.engines.base import PipelinedEngine
from dpo_fast.engines.onnxruntime import OnnxRuntimeEngine
from dpo_fast.engines.tensorrt import TensorRtEngine, split
from dpo_fast.errors import BundleError, EngineOutputError
from dpo_fast.tensorrt.plans import Profile
from dpo_fast.types import TokenScores

from .double import DataType, Double, write_plan
from .fake_memory import FakeMemory
from .tiny_plans import Tiny, make_batch

# Sums of 23 terms in float32 against float64; states are exact. A wrong token, row or chunk is off by 1e-2 and more.
TOLERANCE = 2e-5
TINIES = {
    "float32": Tiny(),
    "float16, odd": Tiny(hidden_size=7, half=True, chunk=129),
    "adapters in body and head": Tiny(adapters=3, half=True, chunk=100),
    "adapters in the body": Tiny(adapters=2, head_adapters=False),
}
EXECUTE = ("IExecutionContext", "execute_async_v3")


def load(tiny: Tiny, folder: Path, double: Double, gates: list[float] | None = None) -> TensorRtEngine:
    if gates is None and tiny.adapters:
        gates = [1.0] * tiny.adapters
    return TensorRtEngine(tiny.write(folder), precision="fp16", gates=gates, memory=double.memory, package=double)


def assert_equal(found: TokenScores, wanted: TokenScores) -> None:
    for field in fields(TokenScores):
        values = getattr(found, field.name)
        assert values.dtype == np.float32
        np.testing.assert_allclose(values, getattr(wanted, field.name), rtol=0, atol=TOLERANCE, err_msg=field.name)


@pytest.fixture
def double() -> Double:
    return Double()


@pytest.fixture(scope="module", params=list(TINIES))
def loaded(request, tmp_path_factory) -> tuple[Tiny, TensorRtEngine, Double]:
    tiny, double = TINIES[request.param], Double()
    return tiny, load(tiny, tmp_path_factory.mktemp("plans"), double), double


WIDEST = TINIES["float32"].profiles[-1].width[2]
BATCHES = st.builds(
    make_batch, st.integers(0, 2**32), st.integers(1, 9), st.integers(1, WIDEST), st.sampled_from([0, 1, 5, 40, 170])
)


# -- numbers


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(st.data())
def test_every_batch_scores_as_uncut(loaded, data):
    """All shapes, splits, paddings and chunks, with buffers that earlier batches have left, two under way."""
    tiny, engine, double = loaded
    batches = data.draw(st.lists(BATCHES, min_size=1, max_size=4))
    gates = np.array(
        data.draw(
            st.lists(
                st.lists(st.sampled_from([-1.0, 0.0, 0.5, 1.0]), min_size=tiny.adapters, max_size=tiny.adapters),
                min_size=1,
                max_size=3,
            )
        )
    )
    if tiny.adapters:
        engine = engine.with_gates(gates if len(gates) > 1 else gates[0])
    scores = list(engine.score_all(iter(batches)))
    assert len(scores) == len(batches)
    for batch, found in zip(batches, scores, strict=True):
        assert_equal(found, tiny.expected(batch, gates.astype(np.float32)))
    for found, alone in zip(scores, map(engine.score, batches), strict=True):
        for field in fields(TokenScores):
            np.testing.assert_array_equal(getattr(found, field.name), getattr(alone, field.name))
    assert double.memory.pending() == 0


def test_as_onnx_runtime_on_the_uncut_graph(tmp_path, double):
    """The two halves joined to one graph, on the engine that the package has had all along."""
    tiny = Tiny(adapters=2)
    body, head = tiny.body(), onnx.compose.add_prefix(tiny.head(), "head_", rename_inputs=False, rename_outputs=False)
    for node in head.graph.node:  # what both halves name alike, but for what they share
        node.output[:] = [
            name.removeprefix("head_") if name.removeprefix("head_") in vars_of_scores() else name
            for name in node.output
        ]
    whole = onnx.compose.merge_models(
        body, head, io_map=[("states", "states"), ("target_gates", "target_gates")],
        outputs=sorted(vars_of_scores()),
    )  # fmt: skip
    onnx.save(whole, tmp_path / "whole.onnx")
    gates = [[1.0, 0.0], [0.5, -1.0]]
    plain = OnnxRuntimeEngine(tmp_path / "whole.onnx", gates=gates[0], threads=1).with_gates(gates)
    engine = load(tiny, tmp_path, double, gates[0]).with_gates(gates)
    for seed in range(20):
        batch = make_batch(seed, 1 + seed % 9, 1 + seed * 7 % WIDEST, 90)
        assert_equal(engine.score(batch), plain.score(batch))


def vars_of_scores() -> set[str]:
    return {field.name for field in fields(TokenScores)}


@given(st.lists(st.integers(0, 9), max_size=12), st.integers(1, 5), st.integers(1, 12))
def test_split_covers_every_target_once(counts, most_rows, most_targets):
    pieces = list(split(np.cumsum(counts), most_rows, most_targets))
    rows = np.repeat(np.arange(len(counts)), counts)
    assert [target for _, targets in pieces for target in range(targets.start, targets.stop)] == list(
        range(sum(counts))
    )
    for in_rows, in_targets in pieces:
        assert 0 < in_targets.stop - in_targets.start <= most_targets
        assert 0 < in_rows.stop - in_rows.start <= most_rows
        assert in_rows.start <= rows[in_targets].min()
        assert rows[in_targets].max() < in_rows.stop


def test_split_by_hand():
    # Rows of 2, 1, 7 and 0 targets: two rows fit; the third alone has too many; the last has none.
    pieces = [((r.start, r.stop), (t.start, t.stop)) for r, t in split(np.array([2, 3, 10, 10]), 2, 4)]
    assert pieces == [((0, 2), (0, 3)), ((2, 3), (3, 7)), ((2, 4), (7, 10))]


@pytest.mark.parametrize(
    ("width", "profile", "padded"),
    [(1, 0, 8), (8, 0, 8), (9, 0, 12), (12, 0, 12), (13, 1, 20), (17, 1, 24), (37, 1, 37)],
)
def test_narrowest_profile_and_width_in_eights(tmp_path, double, width, profile, padded):
    """Eights, but not beyond the profile, and not below its smallest."""
    engine = load(Tiny(), tmp_path, double)
    (piece,) = engine._pieces(make_batch(3, 2, width, 40))
    assert (piece.profile, piece.inputs["input_ids"].shape) == (profile, (2, padded))


def test_no_targets_runs_nothing(tmp_path, double):
    engine = load(Tiny(), tmp_path, double)
    empty = make_batch(0, 3, 8, 0)
    full = make_batch(1, 3, 8, 5)
    first, second, third = engine.score_all([empty, full, empty])
    assert len(first.log_prob) == len(third.log_prob) == 0
    assert_equal(second, Tiny().expected(full))
    executions = double.counts[EXECUTE]
    assert len(engine.score(empty).log_prob) == 0
    assert double.counts[EXECUTE] == executions
    assert list(engine.score_all([])) == []


def test_name_precision_and_interface(tmp_path, double):
    engine = load(Tiny(half=True), tmp_path, double)
    assert engine.name == "tensorrt 11.4.0.106 Double, fp16, states in float16"
    assert engine.precision == "fp16"
    assert isinstance(engine, PipelinedEngine)


# -- order and lifetimes


def test_next_batch_is_under_way_when_one_is_given_out(tmp_path, double):
    engine = load(Tiny(), tmp_path, double)
    taken: list[int] = []

    def batches() -> Iterator[Batch]:
        for seed in range(4):
            taken.append(seed)
            yield make_batch(seed, 2, 8, 5)

    scores = engine.score_all(batches())
    next(scores)
    assert taken == [0, 1]
    assert double.memory.pending() > 0
    next(scores)
    assert taken == [0, 1, 2]


def test_each_context_selects_its_profile_once(tmp_path, double):
    engine = load(Tiny(), tmp_path, double)
    for seed in range(6):
        engine.score(make_batch(seed, 5, 1 + 7 * seed % WIDEST, 90))
    assert double.counts["ICudaEngine", "create_execution_context"] == 3  # two profiles of the body, one of the head
    assert double.counts["IExecutionContext", "set_optimization_profile_async"] == 3


def test_interleaved_runs_do_not_share_buffers(tmp_path, double):
    """Policy and reference as adapters of one model, scored side by side."""
    tiny = Tiny(adapters=2)
    policy = load(tiny, tmp_path, double, [1.0, 0.0])
    reference = policy.with_gates([0.0, 1.0])
    batches = [make_batch(seed, 3, 12, 9) for seed in range(5)]
    pairs = zip(policy.score_all(batches), reference.score_all(batches), strict=True)
    for batch, (of_policy, of_reference) in zip(batches, pairs, strict=True):
        assert_equal(of_policy, tiny.expected(batch, np.array([[1.0, 0.0]])))
        assert_equal(of_reference, tiny.expected(batch, np.array([[0.0, 1.0]])))


def test_run_given_up_leaves_the_next_one_right(tmp_path, double):
    tiny = Tiny()
    engine = load(tiny, tmp_path, double)
    scores = engine.score_all(make_batch(seed, 4, 12, 20) for seed in range(9))
    next(scores)
    scores.close()
    assert double.memory.pending() == 0
    batch = make_batch(5, 4, 12, 60)
    assert_equal(engine.score(batch), tiny.expected(batch))


def test_failing_source_of_batches_leaves_the_next_run_right(tmp_path, double):
    tiny = Tiny()
    engine = load(tiny, tmp_path, double)

    def batches() -> Iterator[Batch]:
        yield make_batch(0, 4, 12, 20)
        raise OSError("the data set is gone")

    with pytest.raises(OSError, match="the data set is gone"):
        list(engine.score_all(batches()))
    assert double.memory.pending() == 0
    batch = make_batch(5, 4, 12, 60)
    assert_equal(engine.score(batch), tiny.expected(batch))


def test_buffers_grow_and_are_given_back(tmp_path, double):
    tiny = Tiny()
    engine = load(tiny, tmp_path, double)
    batches = [make_batch(targets, 1, 12, targets) for targets in (1, 10, 100, 30, 150)]
    held = [double.memory.held]
    for batch in batches:
        assert_equal(engine.score(batch), tiny.expected(batch))
        held.append(double.memory.held)
    assert held == sorted(held)
    assert held[-1] > held[1]
    for batch in batches:
        engine.score(batch)
    assert double.memory.held == held[-1]
    del engine
    gc.collect()
    assert double.memory.held == 0


# What the double is there to see: each fault is put into the engine, and has to come out.


def faulty_scores(engine: TensorRtEngine, tiny: Tiny) -> None:
    batches = [make_batch(seed, 4, 12, 60) for seed in range(4)]
    for batch, found in zip(batches, engine.score_all(batches), strict=True):
        assert_equal(found, tiny.expected(batch))


def test_double_sees_computing_that_does_not_wait_for_copies(tmp_path, double, monkeypatch):
    engine = load(Tiny(), tmp_path, double)
    monkeypatch.setattr(double.memory, "wait", lambda stream, event: None)
    with pytest.raises(EngineOutputError, match="in no order"):
        faulty_scores(engine, Tiny())


def test_double_sees_outputs_that_are_read_too_early(tmp_path, double, monkeypatch):
    engine = load(Tiny(), tmp_path, double)
    monkeypatch.setattr(double.memory, "synchronize", lambda event: None)
    batch = make_batch(0, 4, 12, 9)
    with pytest.raises(AssertionError, match="log_prob"):
        assert_equal(engine.score(batch), Tiny().expected(batch))


def test_double_sees_buffers_that_two_batches_share(tmp_path, double, monkeypatch):
    from dpo_fast.engines import tensorrt

    engine = load(Tiny(), tmp_path, double)
    shared = tensorrt._Slot()
    monkeypatch.setattr(tensorrt, "_Slot", lambda: shared)
    with pytest.raises((AssertionError, EngineOutputError)):
        faulty_scores(engine, Tiny())


def test_double_sees_buffers_freed_too_early(tmp_path, double, monkeypatch):
    from dpo_fast.engines import tensorrt

    engine = load(Tiny(), tmp_path, double)
    monkeypatch.setattr(
        tensorrt, "_room", lambda held, name, size, allocate: held.setdefault(name, (size, allocate(size)))[1]
    )
    monkeypatch.setattr(
        engine._memory, "allocate", lambda size: _Dropped(FakeMemory.allocate(double.memory, size).address)
    )
    with pytest.raises(EngineOutputError, match="no longer, allocated"):
        faulty_scores(engine, Tiny())


class _Dropped:
    def __init__(self, address: int) -> None:
        self.address = address


def test_double_sees_addresses_that_are_not_aligned(tmp_path, double):
    engine = load(Tiny(chunk=100), tmp_path, double)
    engine._step = 100  # 100 x 4 bytes is no multiple of 256
    with pytest.raises(EngineOutputError, match="set_tensor_address refused"):
        faulty_scores(engine, Tiny(chunk=100))


# -- failures


@pytest.mark.parametrize(
    ("call", "failure", "words"),
    [
        (("IExecutionContext", "set_input_shape"), False, "set_input_shape refused input_ids (2, 8)"),
        (("IExecutionContext", "set_tensor_address"), False, "set_tensor_address refused input_ids"),
        (("IExecutionContext", "infer_shapes"), ["target_index"], "infer_shapes lacks target_index"),
        (("IExecutionContext", "infer_shapes"), RuntimeError("inference failed"), "inference failed"),
        (("IExecutionContext", "get_tensor_shape"), (5, -1), "states would have the shape (5, -1) instead of"),
        (EXECUTE, False, "execute_async_v3 failed"),
    ],
)
def test_quiet_failure_of_a_run(tmp_path, double, call, failure, words):
    """Each call that says no quietly, one by one; the engine can be used afterwards."""
    tiny = Tiny()
    engine, batch = load(tiny, tmp_path, double), make_batch(2, 2, 8, 6)
    engine.score(batch)
    double.failing[call] = failure
    with pytest.raises(EngineOutputError) as caught:
        list(engine.score_all([batch, batch]))
    assert words in str(caught.value)
    assert "2 x 8 tokens" in str(caught.value)
    assert "--token-budget" in str(caught.value)
    if not isinstance(failure, Exception):
        assert f"injected into {call[1]}" in str(caught.value)  # the logger's message
    double.failing.clear()
    assert double.memory.pending() == 0
    assert_equal(engine.score(batch), tiny.expected(batch))


@pytest.mark.parametrize("method", ["allocate", "pinned", "upload", "download", "record", "wait", "synchronize"])
@pytest.mark.parametrize("error", [RuntimeError("an illegal memory access"), MemoryError("12 bytes")])
def test_failure_of_cuda(tmp_path, double, method, error):
    engine = load(Tiny(), tmp_path, double)
    double.memory.failing[method] = error
    with pytest.raises(EngineOutputError, match="--token-budget") as caught:
        engine.score(make_batch(2, 2, 8, 6))
    assert f"a batch of 2 x 8 tokens, {len(make_batch(2, 2, 8, 6).target_ids)} targets ({error})" in str(caught.value)
    assert ("CUDA is out of memory" in str(caught.value)) == isinstance(error, MemoryError)


def test_out_of_memory(tmp_path, double):
    tiny = Tiny()
    engine = load(tiny, tmp_path, double)
    double.memory.limit = double.memory.held + 6000
    small, large = make_batch(2, 1, 8, 3), make_batch(3, 4, 12, 140)
    with pytest.raises(EngineOutputError, match=r"CUDA is out of memory at a batch of 4 x 12 tokens.*--token-budget"):
        list(engine.score_all([large, large]))
    double.memory.limit = None
    assert_equal(engine.score(small), tiny.expected(small))


def test_output_left_unwritten_is_nan_and_not_the_last_batches(tmp_path, double):
    engine = load(Tiny(), tmp_path, double)
    batch = make_batch(2, 2, 8, 6)
    engine.score(batch)
    double.failing[EXECUTE] = True  # says that it ran
    assert all(np.isnan(getattr(engine.score(batch), field.name)).all() for field in fields(TokenScores))


def test_row_wider_than_every_profile(tmp_path, double):
    engine = load(Tiny(), tmp_path, double)
    with pytest.raises(EngineOutputError, match=r"38 tokens wide.*takes 37 at most.*--max-length.*dpo-fast build"):
        engine.score(make_batch(0, 2, WIDEST + 1, 9))


@pytest.mark.parametrize("index", [[17, 3], [-1, 3], [3, 24], [24]])
def test_targets_out_of_order_or_place(tmp_path, double, index):
    engine, batch = load(Tiny(), tmp_path, double), make_batch(0, 3, 8, 9)
    wrong = replace(batch, target_index=np.array(index), target_ids=np.zeros(len(index), np.int64))
    with pytest.raises(EngineOutputError, match="3 x 8 tokens has targets outside its rows, or not in their order"):
        engine.score(wrong)


@pytest.mark.parametrize(
    ("call", "failure", "words"),
    [
        (("Runtime", "__init__"), TypeError("pybind11::init(): factory function returned nullptr"), "does not start"),
        (("Runtime", "deserialize_cuda_engine"), None, "policy.body.plan: tensorrt 11.4.0.106 does not take it"),
        (("ICudaEngine", "create_execution_context"), None, "create_execution_context made none"),
        (("IExecutionContext", "set_optimization_profile_async"), False, "refused profile 0"),
    ],
)
def test_quiet_failure_of_loading(tmp_path, double, call, failure, words):
    double.failing[call] = failure
    with pytest.raises(BundleError) as caught:
        load(Tiny(), tmp_path, double)
    assert words in str(caught.value)
    if call[0] != "Runtime" or failure is None:
        assert f"injected into {call[1]}" in str(caught.value)
        assert "dpo-fast build" in str(caught.value)


def test_device_memory_refused(tmp_path, double):
    """It returns nothing; the first execution says so."""
    engine = load(Tiny(), tmp_path, double)
    engine._body_contexts[0]._scratch = None
    with pytest.raises(EngineOutputError, match="no device memory was given"):
        engine.score(make_batch(0, 2, 8, 9))


def test_too_little_memory_to_load(tmp_path):
    double = Double(FakeMemory(limit=100))
    with pytest.raises(BundleError, match=r"too little device memory.*--token-budget"):
        load(Tiny(), tmp_path, double)


def test_plan_of_another_version(tmp_path, double):
    tiny = Tiny()
    path = tiny.write(tmp_path)
    write_plan(tmp_path / "policy.head.plan", tiny.head(), tiny.head_profiles(), version="10.16")
    with pytest.raises(
        BundleError, match=r"policy.head.plan: tensorrt 11.4.0.106 does not take it: .*Serialization.*dpo-fast build"
    ):
        TensorRtEngine(path, precision="fp16", memory=double.memory, package=double)


@pytest.mark.parametrize("content", [None, b"", b"junk"])
def test_plan_missing_or_damaged(tmp_path, double, content):
    path = Tiny().write(tmp_path)
    (tmp_path / "policy.body.plan").unlink()
    if content is not None:
        (tmp_path / "policy.body.plan").write_bytes(content)
    with pytest.raises(BundleError, match=r"policy.body.plan.*dpo-fast build"):
        TensorRtEngine(path, precision="fp16", memory=double.memory, package=double)


def test_plan_that_the_real_package_refuses(tmp_path):
    """TensorRT-RTX's own runtime, which needs no GPU to say that a file is no plan."""
    import tensorrt_rtx

    path = Tiny().write(tmp_path, package="tensorrt_rtx")
    with pytest.raises(
        BundleError, match=r"policy.body.plan: tensorrt_rtx 1\.7\.1\.116 does not take it: .*deserializeCudaEngine"
    ):
        TensorRtEngine(path, precision="fp16", memory=FakeMemory(), package=tensorrt_rtx)


PROFILES = Tiny().profiles


@pytest.mark.parametrize(
    ("built", "described", "words"),
    [
        (Tiny(profiles=PROFILES[:1]), Tiny(), "has 1 profiles instead of 2"),
        (
            Tiny(),
            Tiny(profiles=(PROFILES[0], Profile((2, 2, 4), (20, 24, 37), (5, 16, 70)))),
            "in profile 1 instead of",
        ),
        (Tiny(), Tiny(profiles=(Profile((1, 2, 4), (4, 8, 12), (1, 8, 151)), PROFILES[1])), "takes target_index of"),
        (
            Tiny(chunk=64),
            Tiny(chunk=128),
            r"takes states from \(1, 8\) to \(64, 8\) instead of from \(1, 8\) to \(128, 8\)",
        ),
        (Tiny(chunk=16), Tiny(chunk=16), "16 targets at a time, and aligned addresses want a multiple of 64"),
    ],
)
def test_plans_are_not_what_their_description_says(tmp_path, double, built, described, words):
    path = built.write(tmp_path, profiles=list(described.profiles), chunk=described.chunk)
    with pytest.raises(BundleError, match=words):
        TensorRtEngine(path, precision="fp16", memory=double.memory, package=double)


def renamed(model: onnx.ModelProto, old: str, new: str) -> onnx.ModelProto:
    for values in (model.graph.input, model.graph.output):
        for value in values:
            value.name = new if value.name == old else value.name
    for node in model.graph.node:
        node.input[:] = [new if name == old else name for name in node.input]
        node.output[:] = [new if name == old else name for name in node.output]
    return model


@pytest.mark.parametrize(
    ("half", "old", "new"),
    [
        ("body", "states", "hidden"),
        ("body", "input_ids", "ids"),
        ("head", "entropy", "surprise"),
        ("head", "target_ids", "ids"),
    ],
)
def test_plan_of_other_tensors(tmp_path, double, half, old, new):
    tiny = Tiny()
    path = tiny.write(tmp_path)
    model, profiles = (tiny.body(), tiny.body_profiles()) if half == "body" else (tiny.head(), tiny.head_profiles())
    profiles = [{new if name == old else name: shapes for name, shapes in profile.items()} for profile in profiles]
    write_plan(tmp_path / f"policy.{half}.plan", renamed(model, old, new), profiles)
    with pytest.raises(BundleError, match=f"policy.{half}.plan: (lacks {old}|has {new} as)"):
        TensorRtEngine(path, precision="fp16", memory=double.memory, package=double)


def test_head_of_other_states_than_the_bodys(tmp_path, double):
    path = Tiny().write(tmp_path)
    write_plan(tmp_path / "policy.head.plan", Tiny(half=True).head(), Tiny().head_profiles())
    with pytest.raises(BundleError, match=r"policy.head.plan: has states as INPUT of HALF"):
        TensorRtEngine(path, precision="fp16", memory=double.memory, package=double)
    write_plan(tmp_path / "policy.head.plan", Tiny(hidden_size=9).head(), Tiny(hidden_size=9).head_profiles())
    with pytest.raises(BundleError, match=r"policy.head.plan: takes states from \(1, 9\)"):
        TensorRtEngine(path, precision="fp16", memory=double.memory, package=double)


def test_output_of_another_type(tmp_path, double):
    tiny = Tiny()
    path, head = tiny.write(tmp_path), tiny.head()
    next(
        value for value in head.graph.output if value.name == "is_top1"
    ).type.tensor_type.elem_type = onnx.TensorProto.INT64
    next(node for node in head.graph.node if "is_top1" in node.output).attribute[0].i = onnx.TensorProto.INT64
    write_plan(tmp_path / "policy.head.plan", head, tiny.head_profiles())
    with pytest.raises(BundleError, match=f"has is_top1 as OUTPUT of {DataType.INT64.name}"):
        TensorRtEngine(path, precision="fp16", memory=double.memory, package=double)


def test_input_where_an_output_is_wanted(tmp_path, double):
    tiny = Tiny()
    path, head = tiny.write(tmp_path), renamed(tiny.head(), "entropy", "computed")
    given = next(value for value in head.graph.output if value.name == "computed")
    head.graph.output.remove(given)
    given.name = "entropy"
    head.graph.input.append(given)
    profiles = [profile | {"entropy": profile["target_ids"]} for profile in tiny.head_profiles()]
    write_plan(tmp_path / "policy.head.plan", head, profiles)
    with pytest.raises(BundleError, match="has entropy as INPUT of FLOAT"):
        TensorRtEngine(path, precision="fp16", memory=double.memory, package=double)


def test_body_without_the_inputs_that_its_model_does_not_use(tmp_path, double):
    """A builder may drop an input that nothing reads, such as the positions of a model without any."""
    tiny = Tiny()
    path, body, profiles = tiny.write(tmp_path), tiny.body(), tiny.body_profiles()
    del body.graph.input[1]
    for node in body.graph.node:
        node.input[:] = ["input_ids" if name == "position_ids" else name for name in node.input]
    profiles = [{name: shapes for name, shapes in profile.items() if name != "position_ids"} for profile in profiles]
    write_plan(tmp_path / "policy.body.plan", body, profiles)
    engine = TensorRtEngine(path, precision="fp16", memory=double.memory, package=double)
    batch = make_batch(4, 3, 12, 9)
    assert_equal(engine.score(batch), tiny.expected(replace(batch, position_ids=batch.input_ids)))


@pytest.mark.parametrize(("adapters", "gates"), [(2, None), (0, [1.0]), (2, [1.0, 0.0, 1.0])])
def test_gates_that_the_plans_do_not_have(tmp_path, double, adapters, gates):
    path = Tiny(adapters=adapters).write(tmp_path)
    with pytest.raises(BundleError, match="adapter"):
        TensorRtEngine(path, precision="fp16", gates=gates, memory=double.memory, package=double)


def test_other_gates_of_another_number(tmp_path, double):
    with pytest.raises(BundleError, match="has 2 adapters, and 3 gates were given"):
        load(Tiny(adapters=2), tmp_path, double).with_gates([[1.0, 0.0, 1.0]])


def test_plan_for_later_versions_brings_its_runtime(tmp_path, double):
    """Such a plan holds code, which runs only where the description says that it was built so."""
    tiny = Tiny()
    batch = make_batch(1, 2, 8, 9)
    for version_compatible in (True, False):
        path = tiny.write(tmp_path, options={"version_compatible": version_compatible})
        write_plan(tmp_path / "policy.body.plan", tiny.body(), tiny.body_profiles(), host_code=True)
        if version_compatible:
            engine = TensorRtEngine(path, precision="fp16", memory=double.memory, package=double)
            assert_equal(engine.score(batch), tiny.expected(batch))
        else:
            with pytest.raises(BundleError, match=r"policy.body.plan.*host code"):
                TensorRtEngine(path, precision="fp16", memory=double.memory, package=double)
