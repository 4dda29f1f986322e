"""The demo's training: a tiny language model as the reference, and a policy that TRL's `DPOTrainer` makes of it."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dpo_fast.demo_data import Row

PAD_TOKEN = "<|pad|>"  # noqa: S105
END_TOKEN = "<|endoftext|>"  # noqa: S105


@dataclass(frozen=True, slots=True)
class DemoSettings:
    """How large the demo is; the defaults train for a minute or two on one CPU core.

    Attributes:
        train_pairs: preference pairs to train on.
        held_out_pairs: pairs to evaluate on; not a multiple of `eval_batch_size`, so that the last batch is smaller
            and the comparison tells a mean over pairs from a mean of batch means.
        vocab_size: the most tokens that the tokenizer may have; 256 of them are the bytes.
        hidden_size: width of the Llama.
        layers: depth of the Llama.
        reference_epochs: passes of language modelling over both kinds of completions.
        reference_learning_rate: its peak.
        policy_epochs: passes of DPO.
        policy_learning_rate: its peak.
        train_batch_size: pairs a step, in DPO; completions a step are twice that, in language modelling too.
        eval_batch_size: pairs a batch in `trainer.evaluate()`, and in our batch means.
        beta: DPO's beta, dimensionless. Far above TRL's default of 0.1, since so small a model would otherwise forget
            its language for the preferences.
    """

    train_pairs: int = 900
    held_out_pairs: int = 204
    vocab_size: int = 512
    hidden_size: int = 128
    layers: int = 4
    reference_epochs: int = 6
    reference_learning_rate: float = 1e-3
    policy_epochs: int = 8
    policy_learning_rate: float = 1.5e-4
    train_batch_size: int = 16
    eval_batch_size: int = 8
    beta: float = 0.8


DEFAULT_SETTINGS = DemoSettings()


def train_reference(rows: Sequence[Row], folder: Path, settings: DemoSettings, seed: int) -> None:
    """Train a byte-level BPE tokenizer and a tiny Llama on both kinds of completions, and save them.

    The reference sees every chosen and every rejected completion equally often: it learns the language, and nothing of
    which completion is preferred.

    Args:
        rows: the training pairs.
        folder: where the model and the tokenizer are saved.
        settings: sizes.
        seed: of the initial weights and the order of the texts.
    """
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, set_seed

    texts = [row["prompt"] + row[side] + END_TOKEN for row in rows for side in ("chosen", "rejected")]

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    bpe.decoder = decoders.ByteLevel()
    bpe_trainer = trainers.BpeTrainer(
        vocab_size=settings.vocab_size,
        special_tokens=[PAD_TOKEN, END_TOKEN],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, bpe_trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, pad_token=PAD_TOKEN, eos_token=END_TOKEN)

    set_seed(seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=settings.hidden_size,
            intermediate_size=3 * settings.hidden_size,
            num_hidden_layers=settings.layers,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=256,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    batch_size = 2 * settings.train_batch_size
    optimizer = torch.optim.AdamW(model.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer,
        settings.reference_learning_rate,
        total_steps=settings.reference_epochs * math.ceil(len(texts) / batch_size),
    )
    generator = torch.Generator().manual_seed(seed)
    model.train()
    for _ in range(settings.reference_epochs):
        for indices in torch.split(torch.randperm(len(texts), generator=generator), batch_size):
            batch = [texts[index] for index in indices]
            tokens = tokenizer(batch, padding=True, return_tensors="pt", return_token_type_ids=False)
            labels = tokens["input_ids"].masked_fill(tokens["attention_mask"] == 0, -100)
            loss = model(**tokens, labels=labels).loss
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def train_policy(
    train_rows: Sequence[Row], held_out_rows: Sequence[Row], reference: Path, folder: Path, settings: DemoSettings,
    seed: int,
) -> Any:  # fmt: skip
    """Train the reference into a policy with TRL's `DPOTrainer`, and save it.

    Args:
        train_rows: the training pairs.
        held_out_rows: the pairs that `trainer.evaluate()` will take.
        reference: the reference's folder.
        folder: where the policy and its tokenizer are saved.
        settings: sizes.
        seed: of the order of the pairs.

    Returns:
        The `trl.DPOTrainer`, after training.
    """
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, PrinterCallback
    from trl import DPOConfig, DPOTrainer

    tokenizer = AutoTokenizer.from_pretrained(reference)
    policy = AutoModelForCausalLM.from_pretrained(reference, dtype=torch.float32)
    trainer = DPOTrainer(
        model=policy,
        ref_model=AutoModelForCausalLM.from_pretrained(reference, dtype=torch.float32),
        args=DPOConfig(
            output_dir=str(folder),
            beta=settings.beta,
            num_train_epochs=settings.policy_epochs,
            learning_rate=settings.policy_learning_rate,
            lr_scheduler_type="cosine",
            warmup_steps=10,
            per_device_train_batch_size=settings.train_batch_size,
            per_device_eval_batch_size=settings.eval_batch_size,
            seed=seed,
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,  # for large models; here it would only cost time
            dataloader_pin_memory=False,  # pinned memory serves a GPU
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
        ),
        train_dataset=Dataset.from_list(list(train_rows)),
        eval_dataset=Dataset.from_list(list(held_out_rows)),
        processing_class=tokenizer,
    )
    trainer.remove_callback(PrinterCallback)  # prints every logged dict on standard output
    trainer.train()
    policy.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return trainer


def preference_rate(trainer: Any, model: Any) -> float:
    """Share of held-out pairs where a model gives the chosen completion the higher log-prob; TRL computes them.

    Args:
        trainer: a `trl.DPOTrainer`.
        model: its policy or its reference.

    Returns:
        The share, 0 to 1: about 0.5 for a model that does not know what is preferred.
    """
    model.eval()
    preferred = pairs = 0
    for batch in trainer.get_eval_dataloader():
        chosen, rejected = trainer.compute_ref_log_probs(model, batch)  # (B,), nats
        preferred += int((chosen > rejected).sum())
        pairs += len(chosen)
    return preferred / pairs


@contextmanager
def one_thread() -> Iterator[None]:
    """Let PyTorch compute with one thread.

    Models this small gain little from a second one, and lose much where it has to wait for a core that is busy. The
    weights then depend less on the machine, too.
    """
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
