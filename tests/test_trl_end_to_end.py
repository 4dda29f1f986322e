"""The whole way against TRL's: `trl.DPOTrainer.evaluate()` on a file, and `evaluate` on a bundle of the same models.

Nothing is shared between the two sides but the checkpoints and the file: TRL tokenises, pads, runs PyTorch and averages
its way; ours goes through the exported graphs on ONNX Runtime.

Tolerance: both compute in float32. A log-prob is good to about 1e-6 nats, a completion's sum of some 100 nats to about
1e-5 of itself, and a reward, the difference of two such sums times beta, to 1e-4 absolute. Accuracies are shares of
whole numbers and must be equal to float32's own rounding of a mean (1e-7).
"""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from toy_tokenizers import CHAT_TEMPLATES

from dpo_fast.bundle import hash_files, open_bundle, write_manifest
from dpo_fast.evaluate import EvaluateOptions, evaluate
from dpo_fast.types import LossSettings

torch = pytest.importorskip("torch")
trl = pytest.importorskip("trl")

pytestmark = [
    pytest.mark.slow,  # exports a model and builds trainers
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning"),  # TRL's own use of Transformers
]

BATCH = 8
MAX_LENGTH = 64  # cuts the longest completions off
EXACT = ("eval_rewards/accuracies", "eval_mean_token_accuracy")
KEYS = (
    "eval_loss", "eval_rewards/chosen", "eval_rewards/rejected", "eval_rewards/margins", "eval_logps/chosen",
    "eval_logps/rejected", "eval_logits/chosen", "eval_logits/rejected", "eval_entropy", *EXACT,
)  # fmt: skip

PROMPTS = [
    "What colour is the sky today?", "Write a letter.", "How do I print a sum?", "Is it raining in Spain?",
    "Hi", "Name an unhappy, uncommon, international word.", "What is the sea?",
]  # fmt: skip
ANSWERS = [
    " The sky is blue, and so is the sea.", " With understanding.", " print(add(1, 2))", " Yes.",
    " The weather is the weather, whether you like it or not.", " Mainly in the plain; the rain stays.",
    " I do not know that, and nobody else does: ask again tomorrow, when the weather is better, in plain words.",
    " 你好 мир 🙂", " “quoted” café",
]  # fmt: skip


def texts(count: int) -> list[tuple[str, str, str]]:
    """Prompts and two different answers, in an order without a pattern."""
    return [
        (PROMPTS[i % len(PROMPTS)], ANSWERS[5 * i % len(ANSWERS)], ANSWERS[(5 * i + 1 + i % 4) % len(ANSWERS)])
        for i in range(count)
    ]


def message(role: str, text: str) -> dict[str, str]:
    return {"role": role, "content": text}


def explicit_text(prompt: str, chosen: str, rejected: str) -> dict[str, Any]:
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def implicit_text(prompt: str, chosen: str, rejected: str) -> dict[str, Any]:
    dialogue = f"\n\nHuman: {prompt}\n\nAssistant:"
    return {"chosen": dialogue + chosen, "rejected": dialogue + rejected}


def explicit_conversation(prompt: str, chosen: str, rejected: str) -> dict[str, Any]:
    return {
        "prompt": [message("user", prompt)],
        "chosen": [message("assistant", chosen)],
        "rejected": [message("assistant", rejected)],
    }


def implicit_conversation(prompt: str, chosen: str, rejected: str) -> dict[str, Any]:
    opening = [message("user", "Hi"), message("assistant", "Yes?"), message("user", prompt)]
    return {
        "chosen": [*opening, message("assistant", chosen)],
        "rejected": [*opening, message("assistant", rejected)],
    }


FORMATS = {make.__name__: make for make in (explicit_text, implicit_text, explicit_conversation, implicit_conversation)}


@pytest.fixture(scope="module")
def chat_bundle(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny bundle, its tokenizer with a chat template."""
    folder = tmp_path_factory.mktemp("chat") / "bundle"
    shutil.copytree(tiny_bundle, folder)
    (folder / "policy" / "chat_template.jinja").write_text(CHAT_TEMPLATES["plain"])
    write_manifest(folder, replace(open_bundle(folder).manifest, files=hash_files(folder)))
    return folder


def write_file(path: Path, make: Any, count: int = 19) -> Path:
    """19 rows: two batches of 8, and one of 3."""
    rows = [make(*text) for text in texts(count)]
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    return path


def make_trainer(pair: tuple[Path, Path], file: Path, output: Path, **arguments: Any) -> Any:
    from datasets import load_dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(pair[0])
    tokenizer.chat_template = CHAT_TEMPLATES["plain"]
    policy, reference = (AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32) for folder in pair)
    data = load_dataset("json", data_files=str(file), split="train", cache_dir=str(output / "cache"))
    return trl.DPOTrainer(
        model=policy,
        ref_model=reference,
        args=trl.DPOConfig(
            output_dir=str(output), report_to="none", use_cpu=True, bf16=False, gradient_checkpointing=False,
            per_device_eval_batch_size=BATCH, max_length=MAX_LENGTH, disable_tqdm=True, **arguments,
        ),
        train_dataset=data,
        eval_dataset=data,
        processing_class=tokenizer,
    )  # fmt: skip


def assert_equal(ours: dict[str, Any], theirs: dict[str, float]) -> None:
    for key in KEYS:
        tolerance = 1e-7 if key in EXACT else 1e-4 if "rewards" in key else 1e-5 * max(1.0, abs(theirs[key]))
        assert abs(ours[key] - theirs[key]) <= tolerance, f"{key}: {ours[key]} here, {theirs[key]} in TRL"


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_gives_trl_s_metrics(
    tiny_pair: tuple[Path, Path], chat_bundle: Path, tmp_path: Path, name: str
) -> None:
    file = write_file(tmp_path / "pairs.jsonl", FORMATS[name])
    theirs = make_trainer(tiny_pair, file, tmp_path / "trl").evaluate()

    options = EvaluateOptions(aggregate="trl", batch_size=BATCH, max_length=MAX_LENGTH)
    ours = evaluate(chat_bundle, str(file), tmp_path / "run", options)

    assert_equal(ours, theirs)
    assert ours["counts"]["pairs"] == 19
    assert ours["counts"]["truncated"] > 0
    # The comparison can tell: rewards of some nats, an accuracy that is neither 0 nor 1, and a batch smaller than the
    # others, which tells TRL's mean of batch means from the mean over pairs.
    assert abs(theirs["eval_rewards/chosen"]) > 0.01
    assert 0 < theirs["eval_rewards/accuracies"] < 1
    exact = evaluate(chat_bundle, str(file), tmp_path / "exact", replace(options, aggregate="exact"))
    assert abs(exact["eval_logps/chosen"] - theirs["eval_logps/chosen"]) > 1e-2


LOSSES = [
    LossSettings(loss_type=("ipo",), beta=0.3),
    LossSettings(loss_type=("aot",)),
    LossSettings(loss_type=("sft", "sigmoid"), loss_weights=(0.5, 1.0)),
    LossSettings(loss_type=("robust",), label_smoothing=0.2),
    LossSettings(loss_type=("discopop",), discopop_tau=0.1),
    LossSettings(loss_type=("sigmoid_norm",), beta=1.0),
    LossSettings(loss_type=("sigmoid",), f_divergence_type="js_divergence"),
    LossSettings(loss_type=("sigmoid",), ld_alpha=0.4),
]


def test_losses_give_trl_s_metrics(tiny_pair: tuple[Path, Path], chat_bundle: Path, tmp_path: Path) -> None:
    """One trainer, set to one loss after another."""
    file = write_file(tmp_path / "pairs.jsonl", explicit_text, count=13)
    trainer = make_trainer(tiny_pair, file, tmp_path / "trl")
    losses = []
    for number, settings in enumerate(LOSSES):
        trainer.loss_types = list(settings.loss_type)
        trainer.loss_weights = list(settings.loss_weights or [1.0] * len(settings.loss_type))
        trainer.args.discopop_tau = settings.discopop_tau
        for name in ("beta", "label_smoothing", "f_divergence_type", "ld_alpha"):
            assert hasattr(trainer, name)
            setattr(trainer, name, getattr(settings, name))
        trainer._metrics["eval"].clear()
        theirs = trainer.evaluate()

        options = EvaluateOptions(aggregate="trl", batch_size=BATCH, max_length=MAX_LENGTH, loss=settings)
        ours = evaluate(chat_bundle, str(file), tmp_path / f"run{number}", options)

        assert_equal(ours, theirs)
        losses.append(theirs["eval_loss"])
    assert len(set(losses)) == len(LOSSES)  # the trainer did take each loss
