"""Which rows are answered: a seeded draw of prompts, as token ids.

The rule: the data set's rows are put in an order by the seed alone, and the first of them that can be used are taken.
So fewer samples are a part of more samples, and every checkpoint answers the same prompts.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dpo_fast.bundle import POLICY, Bundle
from dpo_fast.errors import BundleError, DatasetError
from dpo_fast.preferences import PreferenceSet, load_preferences
from dpo_fast.tokens import load_tokenizer, tokenize
from dpo_fast.types import OnError, SkippedRow


@dataclass(frozen=True, slots=True)
class Prompt:
    """What is answered.

    Attributes:
        row: 1-based number of the row in the data set.
        ids: the tokens that an evaluation scores the row's completions after; never empty.
        text: the same as text, without special tokens.
    """

    row: int
    ids: list[int]
    text: str


@dataclass(frozen=True, slots=True)
class DrawnPrompts:
    """A draw.

    Attributes:
        prompts: in the data set's order.
        tokenizer: the policy's.
        dataset: what is said of the data set: name, split, fingerprint, rows.
        skipped: drawn rows that could not be used.
        without_prompt: drawn rows whose prompt is empty, and which were therefore passed over.
    """

    prompts: list[Prompt]
    tokenizer: Any
    dataset: dict[str, Any]
    skipped: list[SkippedRow]
    without_prompt: int


def draw_prompts(
    bundle: Bundle,
    dataset: str,
    count: int,
    *,
    seed: int,
    max_length: int,
    split: str | None = None,
    limit: int | None = None,
    on_error: OnError = "stop",
    trust_remote_code: bool = False,
) -> DrawnPrompts:
    """Draw rows, and tokenise their prompts as an evaluation does.

    Args:
        bundle: whose policy's tokenizer is used.
        dataset: a file, a folder or a Hub id.
        count: of prompts; there are fewer where the data set has fewer.
        seed: of the draw.
        max_length: of prompt and completion together, in tokens; a prompt that fills it is no usable row.
        split: of a data set that has several.
        limit: only the first rows.
        on_error: what a drawn row that cannot be used does: "stop", or be a "skip".
        trust_remote_code: whether the tokenizer's own Python code may be run.

    Raises:
        DatasetError: the data set cannot be read, or none of its rows can be used.
        RowError: a drawn row cannot be used, with `on_error="stop"`.
        CheckpointError: the tokenizer cannot be loaded.
        BundleError: a token id is beyond a model's vocabulary.
    """
    data = load_preferences(dataset, split=split, limit=limit)
    tokenizer = load_tokenizer(bundle.model_folder(POLICY), trust_remote_code=trust_remote_code)
    vocabulary = min(entry.vocabulary for entry in bundle.manifest.models.values())
    prompts: list[Prompt] = []
    skipped: list[SkippedRow] = []
    without_prompt = 0
    order, looked_at = np.random.default_rng(seed).permutation(len(data)), 0
    while len(prompts) < count and looked_at < len(order):
        # No more rows than are still missing, so that they are those of a draw one by one; read in the data set's
        # order, in which each row group of Parquet is gone through once and not once a row.
        drawn = np.sort(order[looked_at : looked_at + count - len(prompts)])
        looked_at += len(drawn)
        for index in drawn.tolist():
            items = data.rows(on_error=on_error, start=index, stop=index + 1)
            (pair,) = tokenize(items, tokenizer, max_length=max_length, on_error=on_error)
            if isinstance(pair, SkippedRow):
                skipped.append(pair)
            elif not pair.prompt_ids:
                without_prompt += 1
            elif (largest := max(pair.prompt_ids)) >= vocabulary:
                raise BundleError(
                    f"row {pair.row}: the tokenizer gave the id {largest}, and the model's vocabulary ends at "
                    f"{vocabulary - 1}; export the bundle with the model's own tokenizer"
                )
            else:
                prompts.append(Prompt(pair.row, pair.prompt_ids, decode(tokenizer, pair.prompt_ids)))
    if not prompts:
        reason = f"row {skipped[0].row}: {skipped[0].reason}" if skipped else "their prompts are empty"
        raise DatasetError(f"{dataset}: none of its {len(data)} rows can be answered; {reason}")
    prompts.sort(key=lambda prompt: prompt.row)
    return DrawnPrompts(prompts, tokenizer, _describe(data), skipped, without_prompt)


def decode(tokenizer: Any, ids: list[int]) -> str:
    """Token ids as text, without special tokens."""
    return str(tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))


def _describe(data: PreferenceSet) -> dict[str, Any]:
    """What is said of the data set; a local path is cut to its last part, since results are published."""
    path = Path(data.name)
    return {
        "name": path.name if path.exists() else data.name,
        "split": data.split,
        "fingerprint": data.fingerprint,
        "rows": len(data),
    }
