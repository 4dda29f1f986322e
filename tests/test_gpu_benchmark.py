"""The GPU's benchmark, as far as a machine without one can prove it: its arithmetic, its processes, and a whole run."""

import json
import shutil
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import make_config, make_pair
from transformers import AutoModelForCausalLM

from dpo_fast.doctor import MODULES, Facts, Gpu, Module
from dpo_fast.errors import UsageError
from dpo_fast.export.probes import make_probes
from dpo_fast.token_table import make_table
from dpo_fast.types import TokenizedPair

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))  # as the benchmark itself has it

from gpu import cli, families, large_model, peak, processes, results, speed, tables, verify, verify_families, with_torch
from gpu.contenders import DEFAULTS, find_contender
from gpu.environment import default_gpu, gather_facts
from gpu.errors import accuracy, sequence_errors
from gpu.pairs import Need, read_pairs, what_is_needed
from gpu.turns import score_both, summarise, timed_turns
from gpu.work import TASKS

H100 = Gpu("NVIDIA H100 80GB HBM3", "9.0", "580.95.05", 81_559)
A10 = Gpu("NVIDIA A10", "8.6", "580.95.05", 23_028)
SERVER = Facts(
    hardware={"processor": "a processor", "cores": 8, "system": "Linux x86_64"},
    gpus=[A10],
    gpu_problem=None,
    cuda="13.0",
    modules={name: Module("10.16.1", [name]) for name in MODULES},
    providers=["TensorrtExecutionProvider", "CUDAExecutionProvider", "CPUExecutionProvider"],
    torch_cuda=True,
    bfloat16=True,
)
ROWS = [
    {
        "prompt": f"Human: what is {thing}?\n\nAssistant:",
        "chosen": f" {thing} is a thing." * count,
        "rejected": f" I do not know {thing}.",
    }
    for count, thing in enumerate(("the sea", "a pen", "rain", "a letter", "the weather", "Spain"), start=1)
]


@pytest.fixture
def one_thread_each(monkeypatch: pytest.MonkeyPatch) -> None:
    """Models this small only lose by sharing the work."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


@pytest.fixture
def surroundings(tmp_path: Path) -> processes.Surroundings:
    return processes.Surroundings(tmp_path, None, 60)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS), encoding="utf-8")
    return path


# -- what is counted ---------------------------------------------------------------------------------------------------


def test_needed_operations_are_those_counted_by_hand(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"vocab_size": 10, "hidden_size": 4}')
    weights = {"embed": torch.zeros(10, 4), "layer": torch.zeros(4, 6), "norm": torch.zeros(4)}
    save_file(weights, tmp_path / "model.safetensors")
    # The second pair has the first one's prompt and one of its completions.
    table = make_table([TokenizedPair(1, [1, 2, 3], [4, 5], [6]), TokenizedPair(2, [1, 2, 3], [7, 8, 9], [6])])
    need = what_is_needed(tmp_path, table)
    assert need == Need(
        parameters=68,
        sequence_tokens=5 + 4 + 6 + 4,
        shared_tokens=3 + 2 + 1 + 3,
        targets=2 + 1 + 3,
        body_flop=2 * 28 * 9,  # the matrix and the vector: not the embedding
        head_flop=2 * 40 * 6,
    )
    save_file({"lm_head.weight": torch.zeros(10, 4)}, tmp_path / "model-2.safetensors")
    untied = what_is_needed(tmp_path, table)
    assert (untied.parameters, untied.body_flop, untied.head_flop) == (108, need.body_flop, need.head_flop)


def test_rates_are_of_both_models_and_the_share_is_of_the_peak() -> None:
    need = Need(parameters=1, sequence_tokens=300, shared_tokens=1, targets=1, body_flop=8e9, head_flop=2e9)
    found = speed.rates(4.0, 10, need, {"flop_per_second": 50e9})
    assert found == {
        "pairs_per_second": 2.5,
        "tokens_per_second": 150.0,
        "needed_flop_per_second": 5e9,
        "share_of_peak": 0.1,
    }
    assert speed.rates(4.0, 10, need, {"error": "no such product"})["share_of_peak"] is None


def test_seconds_are_the_fastest_turn_of_each_model_and_wall_time_has_the_first_turns_alone() -> None:
    assert summarise([[5.0, 2.0, 1.0], [4.0, 3.0, 6.0]], 100.0) == {
        "score_seconds": 4.0,
        "first_seconds": 9.0,
        "turn_seconds": [[2.0, 1.0], [3.0, 6.0]],
        "wall_seconds": 88.0,
    }
    calls = iter(range(10))
    assert timed_turns(lambda: next(calls), 3)[0] == 3
    assert next(calls) == 4


def test_log_probs_of_both_models_are_kept_in_order(tmp_path: Path) -> None:
    of_role = {"policy": np.array([[-1.0, -2.0]]), "reference": np.array([[-3.0, -4.0]])}
    file = tmp_path / "log_probs.npy"
    score_both(lambda role: (of_role[role], [1.0, 1.0]), list(of_role), file, time.time())
    assert np.load(file).tolist() == [[-1, -2, -3, -4]]


def test_errors_and_accuracy() -> None:
    # Log-ratios: 1 over 0; 0 and 0, a tie; -1 under 1.
    log_probs = np.array([[-1.0, -5.0, -2.0, -5.0], [-3.0, -3.0, -3.0, -3.0], [-2.0, -1.0, -1.0, -2.0]])
    assert accuracy(log_probs) == pytest.approx(1 / 3)
    exact = log_probs[:2].copy()
    exact[0, 0] += 0.8
    found = sequence_errors(log_probs, exact)
    assert (found["sequences"], found["largest_nats"], found["mean_nats"]) == (
        8,
        pytest.approx(0.8),
        pytest.approx(0.1),
    )
    assert found["p99_nats"] == pytest.approx(0.8 * 0.93)  # the 99th percentile of 8 lies 0.93 between the last two


def test_peaks_are_of_products_in_the_precision_that_they_say() -> None:
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(128, 128, generator=generator) for _ in range(2))
    # Independent roundings of both factors: the product's relative error is some 0.8 of the largest rounding of one,
    # 2^-p; at least a sixteenth, so that it is no higher precision, and four times as much at most.
    for precision, rounding in (("fp16", 2**-11), ("bf16", 2**-8), ("fp8", 2**-4)):
        product = peak.make_product(128, "cpu", precision)().float()
        expected = left @ (right.t() if precision == "fp8" else right)
        error = (product - expected).std().item() / expected.std().item()
        assert rounding / 16 < error < 4 * rounding, precision
    torch.testing.assert_close(peak.make_product(128, "cpu", "fp32")(), left @ right)


def test_a_precision_without_a_product_has_its_error_and_the_others_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(peak.SIZES, "cpu", 64)
    unknown, known = peak.run(device="cpu", precisions=["int3", "fp32"], started=0.0)
    assert "int3" in unknown["error"]
    assert known["flop_per_second"] > 0


# -- the tuned loop ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("token_budget", [1, 64, 100_000])
def test_the_tuned_loop_says_what_pytorch_says_plainly(tiny_pair: tuple[Path, Path], token_budget: int) -> None:
    pairs = make_probes(make_config().vocab_size)
    pairs.append(TokenizedPair(9, [], [5, 6, 7], [8]))  # no prompt: nothing predicts the first token
    model = with_torch.load(str(tiny_pair[0]), "cpu", "fp32")
    found = with_torch.score(model, make_table(pairs), token_budget)
    expected = np.zeros_like(found)
    with torch.inference_mode():
        for row, pair in enumerate(pairs):
            for branch, completion in enumerate((pair.chosen_ids, pair.rejected_ids)):
                tokens = pair.prompt_ids + completion
                log_probs = model(input_ids=torch.tensor([tokens])).logits[0].double().log_softmax(-1)
                first = max(len(pair.prompt_ids), 1)
                expected[row, branch] = sum(log_probs[at - 1, tokens[at]].item() for at in range(first, len(tokens)))
    # float32, 40 tokens of some 10 nats at most: 1e-5 a sequence in either order of summation
    np.testing.assert_allclose(found, expected, atol=2e-4, rtol=0)


def test_batches_of_the_tuned_loop_keep_to_their_budget_and_leave_nothing_out() -> None:
    lengths = np.random.default_rng(0).integers(1, 90, 200).tolist()
    batches = list(with_torch.make_batches(lengths, 128))
    assert sorted(index for batch in batches for index in batch) == list(range(200))
    assert all(len(batch) * max(lengths[index] for index in batch) <= 128 for batch in batches)


# -- processes ---------------------------------------------------------------------------------------------------------


def test_a_process_gives_its_json_whatever_else_it_prints(surroundings: processes.Surroundings) -> None:
    code = "print('loading'); print('{\"seconds\": 1}'); import sys; print('chatter', file=sys.stderr)"
    ended = processes.run_python(["-c", code], "one", surroundings)
    assert (ended.said, ended.error) == ([{"seconds": 1}], None)
    assert "chatter" in (surroundings.work / "logs" / "one.txt").read_text()


@pytest.mark.parametrize(
    ("code", "error"),
    [
        ("raise ValueError('out of memory')", "ValueError: out of memory"),
        ("import os; os.kill(os.getpid(), 11)", "ended by signal 11; its last words: it said nothing"),
        ("import time; time.sleep(60)", "did not end in 0.5 s; allow more with --timeout"),
    ],
)
def test_a_process_that_fails_is_one_line(surroundings: processes.Surroundings, code: str, error: str) -> None:
    timeout = 0.5 if "sleep" in code else 60
    assert processes.run_python(["-c", code], "one", replace(surroundings, timeout=timeout)).error == error


def test_a_process_sees_the_one_gpu_that_was_asked_for(surroundings: processes.Surroundings) -> None:
    code = "import os, json; print(json.dumps({n: v for n, v in os.environ.items() if n.startswith('CUDA_')}))"
    ended = processes.run_python(["-c", code], "one", replace(surroundings, gpu=3))
    assert ended.said[0].items() >= {"CUDA_DEVICE_ORDER": "PCI_BUS_ID", "CUDA_VISIBLE_DEVICES": "3"}.items()


def test_memory_is_the_largest_that_nvidia_smi_saw(tmp_path: Path) -> None:
    tool, asked = tmp_path / "nvidia-smi", tmp_path / "asked"
    tool.write_text(
        f'#!/bin/sh\necho "$@" >> {asked}\ncase $(wc -l < {asked}) in 1) echo 100;; 2) echo 300;; 3) echo "[N/A]";; '
        "*) echo 200;; esac\n"
    )
    tool.chmod(0o755)
    with processes.watch_memory(2, str(tool)) as memory:
        deadline = time.monotonic() + 20
        while asked.read_text().count("\n") < 5 and time.monotonic() < deadline:
            time.sleep(0.01)
    assert (memory.before, memory.largest) == (100 << 20, 300 << 20)
    assert all("--id=2" in line for line in asked.read_text().splitlines())


def test_without_nvidia_smi_memory_is_not_known() -> None:
    with processes.watch_memory(0, "/nowhere/nvidia-smi") as memory:
        pass
    assert (memory.before, memory.largest) == (None, None)


# -- contenders --------------------------------------------------------------------------------------------------------


def test_with_everything_installed_every_contender_runs() -> None:
    found = {name: find_contender(name, "cuda", SERVER) for name in DEFAULTS["cuda"]}
    reasons = {name: each.missing for name, each in found.items() if each.missing}
    assert set(reasons) == {"tensorrt-fp8"}  # float8 products came with the next generation
    assert "8.9" in reasons["tensorrt-fp8"]


def test_what_is_missing_has_its_reason() -> None:
    bare = replace(SERVER, gpus=[], torch_cuda=False, modules={**SERVER.modules, "tensorrt": Module()})
    missing = {name: find_contender(name, "cuda", bare).missing for name in DEFAULTS["cuda"]}
    assert all(reason is not None and "NVIDIA GPU" in reason for reason in missing.values())
    assert "dpo-fast[tensorrt]" in str(missing["tensorrt-fp16"])
    assert "sm90" in str(find_contender("tensorrt-rtx-fp16", "cuda", replace(SERVER, gpus=[H100])).missing)
    assert find_contender("torch-bf16", "cpu", bare).missing is None
    assert "neither a file" in str(find_contender("tensort-fp16", "cuda", SERVER).missing)
    with pytest.raises(UsageError, match="torch-int8"):
        find_contender("torch-int8", "cuda", SERVER)


# -- the 8B model ------------------------------------------------------------------------------------------------------


def test_a_large_model_is_written_shard_by_shard(
    tmp_path: Path, tiny_pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    shape = {**large_model.LLAMA_8B, "hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 3}
    shape |= {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 700}
    limit = 100_000  # bytes; the largest tensor has 89,600
    sizes: list[int] = []

    def save(tensors: dict[str, torch.Tensor], *arguments: Any) -> None:
        sizes.append(sum(tensor.nbytes for tensor in tensors.values()))
        save_file(tensors, *arguments)

    monkeypatch.setattr(large_model, "save_file", save)
    large_model.make_large_pair(tmp_path / "large", shape, tiny_pair[0], shard_bytes=limit)
    assert len(sizes) > 4
    assert max(sizes) <= limit
    policy, reference = (
        AutoModelForCausalLM.from_pretrained(tmp_path / "large" / role, dtype="auto")
        for role in ("policy", "reference")
    )
    assert policy.dtype == torch.bfloat16
    assert policy.config.rope_parameters["rope_type"] == "llama3"
    assert (tmp_path / "large" / "policy" / "tokenizer.json").is_file()
    changed = dict(policy.named_parameters())
    for name, weight in reference.named_parameters():
        step = (changed[name].float() - weight.float()).detach()
        if weight.dim() == 1:
            assert torch.equal(weight, torch.ones_like(weight)), name
            assert not step.any(), name
        else:
            # 2,000 entries and more: the deviation is known to 2 %; bfloat16 rounds a step to some 10 % of it
            assert weight.float().std().item() == pytest.approx(large_model.DEVIATION, rel=0.1), name
            assert step.std().item() == pytest.approx(large_model.STEP * large_model.DEVIATION, rel=0.3), name
    with torch.inference_mode():
        assert policy(input_ids=torch.tensor([[1, 2, 3]])).logits.isfinite().all()


# -- verification ------------------------------------------------------------------------------------------------------

FAULTS = {
    "mistral": {"sliding_window": None},
    "gemma2": {"final_logit_softcapping": None},
    "gemma2, attention": {"attn_logit_softcapping": 50.0},
    "qwen2": {},  # its biases vanish
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_seeded_fault_does_not_pass_for_rounding(tmp_path: Path, fault: str) -> None:
    family = fault.partition(",")[0]
    right = families.make_family(family, tmp_path)
    wrong = Path(shutil.copytree(right, tmp_path / "wrong"))
    config = json.loads((wrong / "config.json").read_text())
    (wrong / "config.json").write_text(json.dumps(config | FAULTS[fault]))
    if not FAULTS[fault]:
        weights = load_file(wrong / "model.safetensors")
        kept = {name: torch.zeros_like(weight) if name.endswith("bias") else weight for name, weight in weights.items()}
        save_file(kept, wrong / "model.safetensors", {"format": "pt"})
    pairs = make_probes(families.VOCABULARY, window=families.WINDOW, positions=families.POSITIONS)
    exact = verify_families.plain_scores(right, pairs, torch.float32)
    floor = verify_families.compare(exact, verify_families.plain_scores(right, pairs, torch.bfloat16))
    found = verify_families.compare(exact, verify_families.plain_scores(wrong, pairs, torch.float32))
    assert verify_families.passes(floor, floor)
    assert not verify_families.passes(found, floor)


def test_nan_and_nothing_do_not_pass() -> None:
    floor = {"tokens": 10, "mean_nats": 0.1, "largest_nats": 0.1, "largest_of_all_outputs": 0.1}
    assert verify_families.passes(floor, floor)
    assert not verify_families.passes({**floor, "mean_nats": float("nan")}, floor)
    assert not verify_families.passes({**floor, "tokens": 0}, floor)


def test_families_after_one_that_kills_its_process_get_another(
    surroundings: processes.Surroundings, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[list[str]] = []

    def run_task(task: str, arguments: dict[str, Any], *_: Any) -> processes.Ended:
        assert task in TASKS
        asked.append(arguments["families"])
        done = [{"family": family, "passed": True} for family in arguments["families"]]
        if "gpt2" not in arguments["families"]:
            return processes.Ended(done, None, 1.0, processes.Memory())
        return processes.Ended(
            done[: arguments["families"].index("gpt2")], "ended by signal 11", 1.0, processes.Memory()
        )

    monkeypatch.setattr(verify, "run_task", run_task)
    contender = find_contender("cpu-fp32", "cpu", SERVER)
    found = verify.verify(contender, ["llama", "gpt2", "phi3"], None, surroundings, lambda line: None)
    assert asked == [["llama", "gpt2", "phi3"], ["phi3"]]
    assert [each["passed"] for each in found["families"].values()] == [True, False, True]
    assert found["families"]["gpt2"]["error"] == "ended by signal 11"
    assert not verify.all_passed([found])


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread_each")
def test_verification_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "verify.json"
    options = ["--device", "cpu", "--contenders", "cpu-fp32,openvino-bf16,tensorrt-fp32", "--families", "mistral"]
    assert cli.main(["--verify", *options, "--work", str(tmp_path), "--output", str(output)]) == 0
    result = results.read_result(output)
    exact, half = (each["families"]["mistral"] for each in result["contenders"])
    assert exact["passed"]
    assert half["passed"]
    assert exact["largest_of_all_outputs"] < 1e-4  # float32 alone; a dropped window is off by 5 nats
    assert 1e-3 < half["mean_nats"] < 0.1  # bfloat16, really: not float32 under another name
    assert [each["name"] for each in result["missing"]] == ["tensorrt-fp32"]
    printed = capsys.readouterr().out
    assert "| mistral |" in printed
    assert "- tensorrt-fp32: " in printed


# -- a whole run -------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread_each")
def test_a_whole_run(tmp_path: Path, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    policy, _ = make_pair(tmp_path / "tiny")
    output = tmp_path / "result.json"
    options = ["--device", "cpu", "--contenders", "torch-fp32,torch-bf16,cpu-fp32,cuda-fp16", "--turns", "1"]
    options += ["--shapes", str(tmp_path / "tiny"), "--pairs", "6", "--check-pairs", "4", "--data", str(data)]
    assert cli.main([*options, "--work", str(tmp_path / "work"), "--output", str(output)]) == 0
    result = results.read_result(output)
    (shape,) = result["shapes"]
    found = {each["name"]: each for each in shape["contenders"]}
    assert set(found) == {"torch-fp32", "torch-bf16", "cpu-fp32"}
    assert asdict(what_is_needed(policy, read_pairs(policy, data, 6))).items() <= shape.items()
    assert shape["pairs"] == 6
    assert set(result["peaks"]) == {"fp32", "bf16"}
    for each in found.values():
        assert each["pairs_per_second"] == pytest.approx(6 / each["score_seconds"])
        assert 0 < each["score_seconds"] < each["wall_seconds"]
        assert 0 < each["share_of_peak"] < 1
        assert each["errors"]["sequences"] == 16
    # Sums of some hundred tokens: float32 in another order is off by 1e-5, bfloat16 by tenths.
    assert found["torch-fp32"]["errors"]["largest_nats"] < 1e-3
    assert found["cpu-fp32"]["errors"]["largest_nats"] < 1e-3
    assert 1e-2 < found["torch-bf16"]["errors"]["largest_nats"] < 10
    assert found["cpu-fp32"]["accuracy"] == found["torch-fp32"]["accuracy"]
    assert not (tmp_path / "work" / "bundles" / "tiny-cpu-fp32").exists()
    assert {"date", "command", "commit", "device", "hardware", "versions", "settings"} <= set(result)
    printed = capsys.readouterr().out
    assert "| `cpu-fp32` |" in printed
    assert "- cuda-fp16: " in printed


def test_a_contender_that_fails_has_its_error_and_the_others_go_on(
    tmp_path: Path, data: Path, tiny_pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def run_task(task: str, arguments: dict[str, Any], *_: Any) -> processes.Ended:
        assert task in TASKS
        if task == "with_trl":
            return processes.Ended([], "CUDA out of memory", 1.0, processes.Memory())
        np.save(arguments["log_probs"], np.tile([-1.0, -2.0, -1.0, -1.0], (arguments["pairs"], 1)))
        said = {"score_seconds": 2.0, "wall_seconds": 9.0, "torch_largest_bytes": 5}
        return processes.Ended([said], None, 9.0, processes.Memory(1, 7))

    monkeypatch.setattr(speed, "run_task", run_task)
    shape = tmp_path / "shape"
    for role, folder in zip(("policy", "reference"), tiny_pair, strict=True):
        shutil.copytree(folder, shape / role)
    settings = speed.Settings("cuda", [str(shape)], data, 6, 2, 1, 100, 8, False, "sm86")
    able = [find_contender(name, "cuda", SERVER) for name in ("trl-bf16", "torch-bf16")]
    kept: list[dict[str, Any]] = []
    surroundings = processes.Surroundings(tmp_path, None, 60)
    speed.measure_shape(str(shape), able, {}, settings, surroundings, kept.append, lambda line: None)
    trl, loop = kept[-1]["contenders"]
    assert trl == {"name": "trl-bf16", "precision": "bf16", "error": "CUDA out of memory"}
    assert (loop["accuracy"], loop["pairs_per_second"], loop["device_largest_bytes"]) == (1.0, 3.0, 7)
    assert loop["errors"]["largest_nats"] == 0


def test_without_a_gpu_every_reason_is_listed(
    tmp_path: Path, data: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gpu.environment.gather", lambda: replace(SERVER, gpus=[], torch_cuda=False))
    output = tmp_path / "result.json"
    assert cli.main(["--data", str(data), "--work", str(tmp_path), "--output", str(output)]) == 2
    said = capsys.readouterr().err
    assert all(f"not run here: {name}: " in said for name in DEFAULTS["cuda"])
    assert not output.exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--data", "nowhere.jsonl"], "nowhere.jsonl: not found"),
        (["--verify", "--families", "lama"], "--families lama: is not known; choose from llama, qwen2"),
        (["--verify", "--device", "cpu", "--contenders", "torch-bf16"], "compares recipes with PyTorch"),
        (["table", "nowhere.json"], "nowhere.json: cannot be read"),
    ],
)
def test_bad_arguments_are_one_line(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gpu.environment.gather", lambda: SERVER)
    assert cli.main(arguments) == 2
    error = capsys.readouterr().err.strip()
    assert said in error
    assert "\n" not in error


@pytest.mark.parametrize(("visible", "expected"), [(None, 0), ("", 0), ("3", 3), ("2,5", 2)])
def test_the_gpu_is_the_first_that_cuda_may_see(
    visible: str | None, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    if visible is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    else:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert default_gpu() == expected


def test_a_gpu_named_by_its_uuid_must_be_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-4a2f")
    with pytest.raises(UsageError, match="GPU-4a2f: say which one it is with --gpu"):
        default_gpu()


def test_a_gpu_that_is_not_there_is_refused(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gpu.environment.gather", lambda: replace(SERVER, gpus=[A10, H100]))
    assert gather_facts(1).gpus == [H100]
    with pytest.raises(UsageError, match="--gpu 2: nvidia-smi lists 2"):
        gather_facts(2)


# -- results and tables ------------------------------------------------------------------------------------------------


def result_of(*contenders: dict[str, Any]) -> dict[str, Any]:
    shape = {
        "shape": "a-shape",
        "random_weights": True,
        "pairs": 512,
        "parameters": 134_515_008,
        "exact_error": None,
        "contenders": list(contenders),
    }
    return {
        "format": 1,
        "kind": "speed",
        "date": "2030-01-02T03:04:05+00:00",
        "device": {"kind": "cuda", "name": "NVIDIA X", "driver": "580.1"},
        "commit": {"hash": "0123456789", "changed": False},
        "missing": [{"name": "tensorrt-fp8", "reason": "needs compute capability 8.9"}],
        "shapes": [shape],
    }


def measured(name: str, seconds: float, **more: Any) -> dict[str, Any]:
    figures = {"score_seconds": seconds, "wall_seconds": 20.0, "pairs_per_second": 512 / seconds}
    return {"name": name, **figures, "tokens_per_second": 1234.5, "share_of_peak": 0.25, "accuracy": 0.5, **more}


def test_a_table_has_ratios_and_what_failed_and_what_is_missing() -> None:
    errors = {"mean_nats": 0.01, "p99_nats": 0.2, "largest_nats": 0.3}
    memory = {"device_largest_bytes": 3_000_000_000, "torch_largest_bytes": None}
    contenders = [
        measured("trl-bf16", 8.0),
        measured("torch-bf16", 2.0),
        measured("tensorrt-fp16", 0.5, errors=errors, **memory),
        {"name": "cuda-fp16", "error": "out of memory"},
    ]
    made = tables.make_tables([result_of(*contenders)])
    assert "| `tensorrt-fp16` | 0.500 | 1,024 | 1,234 | 16.00 | 4.00 | 25.0% | 3.00 / – | 0.01 / 0.2 / 0.3 |" in made
    assert "| `torch-bf16` | 2.00 | 256 | 1,234 | 4.00 |  | 25.0% |  |  | 0.500 | 20.0 |" in made
    assert "- cuda-fp16: out of memory" in made
    assert "- tensorrt-fp8: needs compute capability 8.9" in made
    assert "NVIDIA X, driver 580.1, 2030-01-02, commit 0123456." in made
    assert "Random weights" in made


def test_tables_go_between_the_marks(tmp_path: Path) -> None:
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n\n{tables.BEGIN}\nold\n{tables.END}\n\nbehind\n")
    # A pattern that matches nothing comes as it is.
    assert cli.main(["table", str(tmp_path / "results" / "*.json"), "--write", str(readme)]) == 0
    assert readme.read_text() == f"before\n\n{tables.BEGIN}\n\n{tables.NOTHING}\n\n{tables.END}\n\nbehind\n"
    path = tmp_path / "one.json"
    results.write_result(path, result_of(measured("torch-bf16", 2.0)))
    assert cli.main(["table", str(path), "--write", str(readme)]) == 0
    assert "| `torch-bf16` |" in readme.read_text()
    assert "Nothing has been measured" not in readme.read_text()
    readme.write_text("no marks")
    assert cli.main(["table", str(path), "--write", str(readme)]) == 2
    assert readme.read_text() == "no marks"


def test_a_verification_says_what_is_wrong() -> None:
    right = {"largest_nats": 0.02, "mean_nats": 0.001, "passed": True}
    found = {"llama": right, "gpt2": {**right, "passed": False}, "phi3": {"error": "it died", "passed": False}}
    result = {**result_of(), "kind": "verify", "contenders": [{"name": "cuda-fp16", "families": found}]}
    made = tables.make_tables([result])
    assert "| llama | 2.0e-02 (1.0e-03) |" in made
    assert "| gpt2 | **wrong:** 2.0e-02 (1.0e-03) |" in made
    assert "| phi3 | failed |" in made
    assert "- cuda-fp16, phi3: it died" in made


def test_a_result_overwrites_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(results, "FOLDER", tmp_path)
    first = results.choose_path("2030-01-02T03:04:05+00:00", "NVIDIA H100 80GB HBM3", "speed")
    assert first.name == "2030-01-02-nvidia-h100-80gb-hbm3.json"
    results.write_result(first, result_of())
    assert results.choose_path("2030-01-02", "NVIDIA H100 80GB HBM3", "speed").name.endswith("hbm3-2.json")
    assert results.choose_path("2030-01-02", "NVIDIA H100 80GB HBM3", "verify").name.endswith("hbm3-verify.json")


@pytest.mark.parametrize("content", ["{", "[]", '{"format": 2, "kind": "speed"}', '{"format": 1, "kind": "other"}'])
def test_a_file_that_is_no_result_is_refused(tmp_path: Path, content: str) -> None:
    path = tmp_path / "other.json"
    path.write_text(content)
    with pytest.raises(UsageError, match=r"other\.json: is no"):
        results.read_result(path)
