"""Samples: what is drawn, that the right weights say it, what is written and shown, what is refused."""

import io
import json
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from fake_engines import ROWS, FakeEngines, make_fake_bundle, write_rows
from peft import LoraConfig, PeftModel, get_peft_model
from rich.console import Console
from safetensors.torch import load_file, save_file
from tiny_models import make_config, make_model, make_pair, perturb, save_model
from toy_tokenizers import chat
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from dpo_fast.bundle import MANIFEST, POLICY, REFERENCE, hash_files, open_bundle
from dpo_fast.cli import run
from dpo_fast.errors import BundleError, DatasetError, RowError, UsageError
from dpo_fast.generate import GenerateOptions, generate
from dpo_fast.generation.completion import Sampling
from dpo_fast.generation.files import PROVENANCE, SAMPLES, Sample, read_samples
from dpo_fast.generation.prompts import draw_prompts
from dpo_fast.generation.table import print_samples
from dpo_fast.generation.weights import SavedWeights
from dpo_fast.tokens import load_tokenizer, tokenize_pair
from dpo_fast.types import PreferenceRow

pytestmark = pytest.mark.usefixtures("one_thread")
SHORT = Sampling(max_new_tokens=12)
GREEDY = Sampling(max_new_tokens=12, greedy=True)


def complete_bundle(folder: Path, weights: dict[str, list[str]] | None = None) -> Path:
    """A bundle around model folders that are there; its graphs are none, and `generate` needs none.

    Args:
        folder: holds policy/, and reference/ or base/.
        weights: of the manifest, by role; each role's own folder by default.
    """
    weights = weights or {role: [role] for role in (POLICY, REFERENCE) if (folder / role).is_dir()}
    manifest = json.loads((make_fake_bundle(folder.parent / f"{folder.name} template") / MANIFEST).read_text())
    manifest["models"] = {role: manifest["models"][role] | {"weights": names} for role, names in weights.items()}
    for entry in manifest["models"].values():
        (folder / entry["graph"]).write_bytes(b"no graph")
    manifest["files"] = hash_files(folder)
    (folder / MANIFEST).write_text(json.dumps(manifest))
    return folder


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A policy and its reference. Read only."""
    folder = tmp_path_factory.mktemp("pair") / "bundle"
    make_pair(folder)
    return complete_bundle(folder)


@pytest.fixture
def own_bundle(tmp_path: Path) -> Callable[[], Path]:
    """The same, to be changed, and completed by calling this."""
    make_pair(tmp_path / "own")
    return lambda: complete_bundle(tmp_path / "own")


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_rows(tmp_path_factory.mktemp("data") / "pairs.jsonl", ROWS)


def sample(bundle: Path, dataset: str, **options: Any) -> list[Sample]:
    return generate(bundle, dataset, GenerateOptions(**{"sampling": SHORT, "num_samples": 5, **options})).samples


def by_hand(
    model: PreTrainedModel, folder: Path, row: int, seed: int, *, top_k: int, temperature: float, count: int
) -> str:
    """A completion token by token, from whole forwards without a cache; top_k 1 is greedy.

    Random numbers: one `torch.multinomial` a token, seeded with (seed, row).
    """
    tokenizer = AutoTokenizer.from_pretrained(folder / POLICY)
    ids: list[int] = tokenizer(ROWS[row - 1]["prompt"])["input_ids"]
    start = len(ids)
    with torch.random.fork_rng(), torch.inference_mode():
        torch.manual_seed(int(np.random.SeedSequence((seed, row)).generate_state(1, np.uint64)[0] >> 1))
        while len(ids) < start + count:
            logits = model(torch.tensor([ids])).logits[0, -1] / temperature
            kept = logits.where(logits >= logits.topk(top_k).values[-1], -torch.inf)
            ids.append(int(torch.multinomial(kept.softmax(-1), 1)))
            if ids[-1] == tokenizer.eos_token_id:
                break
    return tokenizer.decode(ids[start:], skip_special_tokens=True)


# What is drawn.


@pytest.mark.slow
def test_texts_are_those_of_a_loop_by_hand(bundle: Path, dataset: str) -> None:
    """Both models, sampled with Transformers' default top_k of 50, and greedily."""
    models = {role: AutoModelForCausalLM.from_pretrained(bundle / role) for role in (POLICY, REFERENCE)}
    drawn = sample(bundle, dataset, seed=3)
    cool = sample(bundle, dataset, seed=3, sampling=Sampling(12, temperature=0.5, top_k=20))
    greedy = sample(bundle, dataset, sampling=GREEDY)
    for index, prompt in enumerate(drawn):
        for role, model in models.items():
            texts = [getattr(said[index], role) for said in (drawn, cool, greedy)]
            assert texts == [
                by_hand(model, bundle, prompt.row, 3, top_k=50, temperature=1.0, count=12),
                by_hand(model, bundle, prompt.row, 3, top_k=20, temperature=0.5, count=12),
                by_hand(model, bundle, prompt.row, 0, top_k=1, temperature=1.0, count=12),
            ]
    assert len({said.policy for said in drawn + cool + greedy} | {said.reference for said in drawn}) > 15


@pytest.mark.slow
def test_the_same_seed_gives_the_same_samples_whatever_their_number(bundle: Path, dataset: str) -> None:
    torch.manual_seed(1)
    all_of_them = sample(bundle, dataset, seed=7)
    torch.manual_seed(2)
    state = torch.get_rng_state()
    some = sample(bundle, dataset, seed=7, num_samples=2)
    assert torch.equal(torch.get_rng_state(), state)  # a trainer's own draws go on as if nothing had been
    assert [said.row for said in all_of_them] == [1, 2, 3, 4, 5]
    assert len(some) == 2
    assert all(said in all_of_them for said in some)
    others = sample(bundle, dataset, seed=8)
    assert all(said.policy != other.policy for said, other in zip(all_of_them, others, strict=True))


def test_rows_of_parquet_are_those_of_a_draw_one_by_one_and_read_in_one_go(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first usable rows of the seeded order; a group is decoded from its beginning, so once for all of them."""
    rows = [{**ROWS[index % 5], "chosen": ROWS[index % 5]["chosen"] if index % 3 else ""} for index in range(6000)]
    table = {name: [row[name] for row in rows] for name in ("prompt", "chosen", "rejected")}
    pq.write_table(pa.table(table), tmp_path / "pairs.parquet", row_group_size=6000)
    passes: list[list[int]] = []
    iter_batches = pq.ParquetFile.iter_batches

    def counted(self: Any, *arguments: Any, row_groups: list[int], **options: Any) -> Any:
        passes.append(row_groups)
        return iter_batches(self, *arguments, row_groups=row_groups, **options)

    monkeypatch.setattr(pq.ParquetFile, "iter_batches", counted)
    path = str(tmp_path / "pairs.parquet")
    drawn = draw_prompts(open_bundle(bundle), path, 12, seed=1, max_length=64, on_error="skip")

    order = (np.random.default_rng(1).permutation(6000) + 1).tolist()
    usable = [row for row in order if rows[row - 1]["chosen"]]
    assert [prompt.row for prompt in drawn.prompts] == sorted(usable[:12])
    looked_at = order[: order.index(usable[11]) + 1]
    assert sorted(row.row for row in drawn.skipped) == sorted(set(looked_at) - set(usable))
    assert len(drawn.skipped) == 8
    assert len(passes) == 4  # of the 12, of the rows in the places of those that cannot be used, and so on


def test_another_seed_draws_other_rows(bundle: Path, dataset: str) -> None:
    draws = [
        [prompt.row for prompt in draw_prompts(open_bundle(bundle), dataset, 2, seed=seed, max_length=64).prompts]
        for seed in range(6)
    ]
    assert all(draw == sorted(set(draw)) for draw in draws)
    assert len({tuple(draw) for draw in draws}) > 1


def test_temperature_zero_is_greedy(bundle: Path, dataset: str) -> None:
    greedy = sample(bundle, dataset, sampling=GREEDY)
    assert sample(bundle, dataset, sampling=Sampling(12, temperature=0), seed=1) == greedy


def test_prompts_are_what_an_evaluation_scores_completions_after(
    own_bundle: Callable[[], Path], bundle: Path, tmp_path: Path
) -> None:
    """The chat template with its generation prompt; special tokens are not shown."""
    turn = {"role": "user", "content": "What colour is the sky?"}
    pair = {"prompt": [turn], "chosen": [answer("It is blue.")], "rejected": [answer("No.")]}
    folder = own_bundle()
    chat().save_pretrained(folder / POLICY)
    complete_again(folder)
    (said,) = sample(folder, write_rows(tmp_path / "chat.jsonl", [pair]))
    tokenizer = load_tokenizer(folder / POLICY)
    ids = tokenize_pair(PreferenceRow(1, **pair), tokenizer, 64).prompt_ids
    assert tokenizer.decode(ids) == "<|user|>\nWhat colour is the sky?<|end|>\n<|assistant|>\n"
    assert said.prompt == "\nWhat colour is the sky?\n\n"
    model = AutoModelForCausalLM.from_pretrained(folder / POLICY)
    said_greedily = sample(folder, str(tmp_path / "chat.jsonl"), sampling=GREEDY)[0].policy
    expected = model.generate(torch.tensor([ids]), do_sample=False, max_new_tokens=12, eos_token_id=0, pad_token_id=0)
    assert said_greedily == tokenizer.decode(expected[0, len(ids) :], skip_special_tokens=True)


def answer(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def complete_again(folder: Path) -> None:
    """Hash a changed bundle's files anew."""
    manifest = json.loads((folder / MANIFEST).read_text())
    (folder / MANIFEST).write_text(json.dumps(manifest | {"files": hash_files(folder)}))


def test_the_policys_generation_config_holds_for_both_and_options_go_before_it(
    own_bundle: Callable[[], Path], dataset: str
) -> None:
    folder = own_bundle()
    for role, config in ((POLICY, {"do_sample": False, "top_k": 3, "eos_token_id": 7}), (REFERENCE, {"top_k": 1})):
        (folder / role / "generation_config.json").write_text(json.dumps(config))
    complete_again(folder)
    found = generate(folder, dataset, GenerateOptions(5, SHORT))
    config = found.provenance["generation_config"]
    assert config == {
        "do_sample": True, "temperature": 1.0, "top_p": 1.0, "top_k": 3, "max_new_tokens": 12,
        "repetition_penalty": None, "eos_token_id": [7, 0],
    }  # fmt: skip
    reference = AutoModelForCausalLM.from_pretrained(folder / REFERENCE)
    unended = [said for said in found.samples if not said.reference_finished]
    assert unended
    for said in unended:
        text = by_hand(reference, folder, said.row, 0, top_k=3, temperature=1.0, count=12)
        assert said.reference == text
    top_k = generate(folder, dataset, GenerateOptions(5, Sampling(12, top_k=4))).provenance["generation_config"][
        "top_k"
    ]
    assert top_k == 4


def test_a_checkpoint_s_temperature_of_0_is_greedy(own_bundle: Callable[[], Path], dataset: str) -> None:
    folder = own_bundle()
    expected = sample(folder, dataset, sampling=GREEDY)
    (folder / POLICY / "generation_config.json").write_text(json.dumps({"temperature": 0.0}))
    complete_again(folder)

    assert sample(folder, dataset) == expected
    assert sample(folder, dataset, sampling=Sampling(12, temperature=1.0)) != expected


@pytest.mark.slow
def test_where_a_completion_ends(own_bundle: Callable[[], Path], dataset: str) -> None:
    """Every token is an end: one token, finished. None is, and the model's 256 positions are: cut off there."""
    folder = own_bundle()
    path = folder / POLICY / "generation_config.json"
    path.write_text(json.dumps({"eos_token_id": list(range(500))}))
    complete_again(folder)
    for said in sample(folder, dataset):
        assert (said.policy_tokens, said.policy_finished, said.reference_tokens) == (1, True, 1)
    path.write_text(json.dumps({"suppress_tokens": [0]}))
    complete_again(folder)
    tokenizer = load_tokenizer(folder / POLICY)
    for said in sample(folder, dataset, sampling=Sampling(5000), num_samples=1):
        assert said.policy_tokens == 256 - len(tokenizer(said.prompt)["input_ids"])
        assert (said.policy_finished, said.reference_finished) == (False, False)


def test_weights_are_in_their_own_precision(tmp_path: Path, dataset: str) -> None:
    make_pair(tmp_path / "half", dtype=torch.bfloat16)
    folder = complete_bundle(tmp_path / "half")
    manifest = json.loads((folder / MANIFEST).read_text())
    for entry in manifest["models"].values():
        entry["stored_dtypes"] = ["BF16"]
    (folder / MANIFEST).write_text(json.dumps(manifest))
    with SavedWeights(open_bundle(folder)).of(POLICY) as model:
        assert model.dtype == torch.bfloat16
    assert sample(folder, dataset)


def test_without_a_reference(tmp_path: Path, dataset: str) -> None:
    save_model(make_model(make_config()), tmp_path / "alone" / POLICY)
    folder = complete_bundle(tmp_path / "alone")
    samples = sample(folder, dataset, num_samples=1)
    assert (samples[0].reference, samples[0].reference_tokens, samples[0].reference_finished) == (None, None, None)
    assert "reference" not in shown(samples)


# Adapters: switched, never loaded twice.


@pytest.fixture(scope="module")
def adapted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, and two adapters of it that change other modules. Read only."""
    folder = tmp_path_factory.mktemp("adapted")
    save_model(make_model(make_config()), folder / "base")
    for seed, (name, lora) in enumerate(
        {
            "one": {"target_modules": ["q_proj", "down_proj"]},
            "two": {"target_modules": ["v_proj"], "modules_to_save": ["lm_head"]},
        }.items()
    ):
        torch.manual_seed(seed)
        base = AutoModelForCausalLM.from_pretrained(folder / "base")
        model = get_peft_model(base, LoraConfig(r=4, init_lora_weights=False, task_type="CAUSAL_LM", **lora))
        for key, parameter in model.named_parameters():
            if "lora_" in key or "modules_to_save" in key:
                parameter.data += 0.2 * torch.randn_like(parameter)
        model.save_pretrained(folder / name)
        AutoTokenizer.from_pretrained(folder / "base").save_pretrained(folder / name)
    return folder


# The roles' folders, and what the manifest says of their weights; how often a whole model is loaded.
ROLES = {
    "an adapter and its base": ({POLICY: "one", REFERENCE: "base"}, {POLICY: [REFERENCE], REFERENCE: [REFERENCE]}, 1),
    "two adapters of one base": (
        {POLICY: "one", REFERENCE: "two", "base": "base"},
        {POLICY: ["base"], REFERENCE: ["base"]},
        1,
    ),
    "a base and an adapter of it": ({POLICY: "base", REFERENCE: "two"}, {POLICY: [POLICY], REFERENCE: [POLICY]}, 1),
    "an adapter and another model": (
        {POLICY: "two", REFERENCE: "other", "base": "base"},
        {POLICY: ["base"], REFERENCE: [REFERENCE]},
        2,
    ),
}


@pytest.mark.parametrize("case", ROLES)
def test_adapters_are_switched_and_nothing_is_loaded_twice(
    case: str, adapted: Path, dataset: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Greedy texts are those of each model loaded by itself."""
    folders, weights, loads = ROLES[case]
    folder = tmp_path / "bundle"
    for target, source in folders.items():
        if source == "other":
            save_model(perturb(make_model(make_config()), scale=0.2), folder / target)
        else:
            shutil.copytree(adapted / source, folder / target)
    complete_bundle(folder, {role: [*names, f"{role}/adapter_model.safetensors"] for role, names in weights.items()})

    loaded: list[str] = []
    load = AutoModelForCausalLM.from_pretrained

    def counting(path: Path, **arguments: Any) -> Any:
        loaded.append(str(path))
        return load(path, **arguments)

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", counting)
    samples = sample(folder, dataset, sampling=GREEDY)
    assert len(loaded) == len(set(loaded)) == loads
    monkeypatch.undo()

    for role in (POLICY, REFERENCE):
        model = load(folder / weights[role][0]).eval()
        if (folder / role / "adapter_config.json").is_file():
            model = PeftModel.from_pretrained(model, folder / role).eval()
        for said in samples:
            text = by_hand(model, folder, said.row, 0, top_k=1, temperature=1.0, count=12)
            assert getattr(said, role) == text, role
    assert any(said.policy != said.reference for said in samples)


# What is written and shown.

HOSTILE = "[bold red]markup[/] \x1b[31mred\x1b]0;title\x07 \u202egnirts \x9b1m\r\nsecond line <b>"


def shown(samples: list[Sample]) -> str:
    output = io.StringIO()
    print_samples(samples, Console(width=160, file=output))
    return output.getvalue()


def test_hostile_text_is_shown_as_text() -> None:
    text = shown([Sample(3, HOSTILE, HOSTILE, "A short answer.", 9, 4, False, True)])
    assert "[bold red]markup[/]" in text
    assert "A short answer. …" not in text
    assert all(character.isprintable() or character == "\n" for character in text)
    assert "\u202e" not in text


@pytest.mark.slow
def test_the_command_writes_and_prints(
    bundle: Path, dataset: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "samples"
    arguments = ["generate", str(bundle), "--dataset", dataset, "--num-samples", "2", "--max-new-tokens", "12"]
    assert run([*arguments, "--output", str(output), "--seed", "3"]) == 0
    printed = capsys.readouterr().out
    expected = sample(bundle, dataset, num_samples=2, seed=3)
    assert read_samples(output) == [asdict(said) for said in expected]
    assert all(said.prompt in printed for said in expected)
    provenance = json.loads((output / PROVENANCE).read_text())
    assert provenance["models"][POLICY]["weights_and_graph_sha256"] == open_bundle(bundle).role_hashes(POLICY)
    assert (provenance["samples"], provenance["asked_for"]["seed"]) == (2, 3)
    assert (output / SAMPLES).read_bytes().isascii()

    assert run([*arguments, "--json", "--seed", "3"]) == 0
    assert json.loads(capsys.readouterr().out)["samples"] == read_samples(output)

    assert run([*arguments, "--output", str(output)]) == 2
    assert "exists already" in capsys.readouterr().err
    assert run([*arguments, "--output", str(output), "--overwrite"]) == 0
    assert read_samples(output) != [asdict(said) for said in expected]


@pytest.fixture
def fake_engines(monkeypatch: pytest.MonkeyPatch) -> None:
    """Evaluations in an instant; what they say is not looked at here."""
    monkeypatch.setattr("dpo_fast.local.open_engine", lambda bundle, role, threads: FakeEngines()(bundle, role))


@pytest.mark.usefixtures("fake_engines")
def test_an_evaluation_keeps_samples_in_its_run(
    own_bundle: Callable[[], Path], dataset: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, output = own_bundle(), tmp_path / "run"
    command = ["evaluate", str(folder), "--dataset", dataset, "--output", str(output), "--limit", "3", "--json"]
    assert run([*command, "--generate", "8", "--seed", "2"]) == 0
    captured = capsys.readouterr()
    samples = read_samples(output)
    assert json.loads(captured.out)["samples"] == samples
    assert [said["row"] for said in samples] == [1, 2, 3]
    assert "3 samples instead of 8" in captured.err
    metrics = json.loads((output / "metrics.json").read_text())
    provenance = json.loads((output / PROVENANCE).read_text())
    assert "samples" not in metrics
    for role in (POLICY, REFERENCE):
        hashes = metrics["provenance"]["models"][role]["weights_and_graph_sha256"]
        assert provenance["models"][role]["weights_and_graph_sha256"] == hashes
    assert provenance["dataset"]["fingerprint"] == metrics["provenance"]["dataset"]["fingerprint"]

    assert run([*command, "--beta", "0.2", "--overwrite"]) == 0  # another run: its samples are not these
    assert not (output / SAMPLES).exists()
    assert not (output / PROVENANCE).exists()


def test_samples_of_a_shard_are_refused_before_the_work(
    bundle: Path, dataset: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["evaluate", str(bundle), "--dataset", dataset, "--output", str(tmp_path / "run"), "--shard", "1/1"]
    assert run([*command, "--generate", "2"]) == 2
    assert "leave --shard out" in capsys.readouterr().err
    assert run([*command[:-2], "--generate", "0"]) == 2
    assert not (tmp_path / "run").exists()


# What cannot be used.

# The completions' first letters merge with the prompt's only one: nothing is left of the prompt.
MERGING = {"prompt": "p", "chosen": "r", "rejected": "rain"}


def test_rows_that_cannot_be_used(bundle: Path, tmp_path: Path) -> None:
    """As in an evaluation; and a row whose prompt has no token of its own, which that takes, cannot be answered."""
    rows = [*ROWS[:2], {"prompt": "x", "chosen": "", "rejected": "b"}, MERGING]
    path = write_rows(tmp_path / "pairs.jsonl", rows)
    with pytest.raises(RowError, match="row 3: 'chosen' is empty"):
        sample(bundle, path)
    found = generate(bundle, path, GenerateOptions(8, SHORT, on_error="skip"))
    assert [said.row for said in found.samples] == [1, 2]
    assert [row["row"] for row in found.provenance["skipped"]] == [3]
    assert found.provenance["rows_without_prompt"] == 1
    with pytest.raises(DatasetError, match="none of its 1 rows can be answered; their prompts are empty"):
        sample(bundle, write_rows(tmp_path / "empty.jsonl", rows[3:]))
    with pytest.raises(RowError, match="row"):  # a prompt that fills --max-length, as in an evaluation
        sample(bundle, write_rows(tmp_path / "long.jsonl", ROWS[:1]), max_length=2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_samples": 0}, "--num-samples 0 must be at least 1"),
        ({"sampling": Sampling(0)}, "--max-new-tokens 0"),
        ({"sampling": Sampling(temperature=-1)}, "--temperature -1 must be 0"),
        ({"sampling": Sampling(temperature=float("nan"))}, "--temperature nan"),
        ({"sampling": Sampling(top_p=0)}, "--top-p 0 must be above 0"),
        ({"sampling": Sampling(top_p=1.5)}, "--top-p 1.5"),
        ({"sampling": Sampling(top_k=-1)}, "--top-k -1"),
        ({"sampling": Sampling(greedy=True, top_p=0.9)}, "--greedy draws nothing"),
        ({"sampling": Sampling(temperature=0, top_k=5)}, "--temperature 0 draws nothing"),
        ({"seed": -1}, "--seed -1"),
        ({"max_length": 1}, "--max-length 1 leaves no room"),
        ({"max_length": 257}, "positions for 256 tokens"),
    ],
)
def test_options_that_mean_nothing(bundle: Path, dataset: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        sample(bundle, dataset, **options)


def test_weights_that_are_not_those_of_the_bundle(own_bundle: Callable[[], Path], dataset: str) -> None:
    folder = own_bundle()
    save_model(make_model(make_config(), seed=5), folder / POLICY)
    with pytest.raises(BundleError, match="is not the file that was exported"):
        sample(folder, dataset)


@pytest.fixture
def broken(own_bundle: Callable[[], Path]) -> Path:
    """A policy of NaN."""
    folder = own_bundle()
    path = folder / POLICY / "model.safetensors"
    save_file({name: tensor * float("nan") for name, tensor in load_file(path).items()}, path, {"format": "pt"})
    complete_again(folder)
    return folder


def test_weights_of_nan_are_one_line_and_nothing_is_written(
    broken: Path, dataset: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "samples"
    assert run(["generate", str(broken), "--dataset", dataset, "--output", str(output)]) == 2
    *_, last = capsys.readouterr().err.splitlines()
    assert last.startswith("dpo-fast: LlamaForCausalLM: Transformers cannot generate with it (RuntimeError: ")
    assert not output.exists()
