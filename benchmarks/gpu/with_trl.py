"""TRL's own `DPOTrainer.evaluate()`, as users have it: timed in turns, with its metrics.

The baseline script beside the project does the same once; here, as for all contenders, the first turn, which sets up
kernels and memory, is apart from the timed ones.
"""

import gzip
import json
import tempfile
import time
from collections.abc import Iterator
from typing import Any

from gpu.pairs import MAX_LENGTH
from gpu.torch_device import DTYPES, largest_memory, synchronise
from gpu.turns import summarise, timed_turns

ACCURACY = "eval_rewards/accuracies"


def run(
    *,
    policy: str,
    reference: str,
    data: str,
    pairs: int,
    device: str,
    precision: str,
    batch_size: int,
    turns: int,
    started: float,
) -> Iterator[dict[str, Any]]:
    """Evaluate a policy and its reference.

    Args:
        policy: its folder.
        reference: its folder.
        data: JSONL of preferences, gzipped or not.
        pairs: of which so many are evaluated.
        device: "cuda" or "cpu".
        precision: "fp32" or "bf16".
        batch_size: pairs of a batch.
        turns: timed ones.
        started: when the process was, in seconds since the epoch.
    """
    import trl
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer

    opened = gzip.open if data.endswith(".gz") else open
    with opened(data, "rt", encoding="utf-8") as lines:
        rows = [json.loads(line) for _, line in zip(range(pairs), lines, strict=False)]
    preferences = Dataset.from_list(rows)
    models = [AutoModelForCausalLM.from_pretrained(path, dtype=DTYPES[precision]) for path in (policy, reference)]
    with tempfile.TemporaryDirectory() as folder:
        config = trl.DPOConfig(
            output_dir=folder,
            per_device_eval_batch_size=batch_size,
            max_length=MAX_LENGTH,
            report_to=[],
            bf16=precision == "bf16",
            gradient_checkpointing=False,
            disable_tqdm=True,
            use_cpu=device == "cpu",
        )
        trainer = trl.DPOTrainer(
            model=models[0],
            ref_model=models[1],
            args=config,
            train_dataset=preferences.select(range(min(2, len(preferences)))),
            eval_dataset=preferences,
            processing_class=AutoTokenizer.from_pretrained(policy),
        )

        def evaluate() -> dict[str, float]:
            metrics: dict[str, float] = trainer.evaluate()
            synchronise(device)
            return metrics

        metrics, seconds = timed_turns(evaluate, turns)
    yield {
        **summarise([seconds], time.time() - started),
        "engine": f"trl {trl.__version__}",
        "torch_largest_bytes": largest_memory(device),
        "accuracy": metrics[ACCURACY],
        "metrics": {name: value for name, value in metrics.items() if name.startswith("eval_")},
    }
