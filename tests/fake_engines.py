"""Engines without a model, a bundle without weights, and a few pairs, for what needs no more.

A fake engine's word on a token is a hash of all that a language model's word may depend on: the target, and the tokens
before it with their positions, of the prompt and of its own completion. Any other influence (padding, another row, the
other completion, a wrong position) changes the hash.
"""

import json
import zlib
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import strategies as st
from toy_tokenizers import byte_bpe

from dpo_fast.batches import Batch, Layout
from dpo_fast.bundle import FORMAT, POLICY, REFERENCE, Bundle, Manifest, ModelEntry, hash_files, write_manifest
from dpo_fast.recipes import Recipe
from dpo_fast.types import TokenizedPair, TokenScores

OUTPUTS = ("log_prob", "entropy", "mean_logit", "is_top1", "log_sum_sq_prob")
RECIPE = Recipe("fake", "no model", engine="onnxruntime", precision="fp32", vocabulary_tile=128, token_budget=64)
ROWS = [
    {"prompt": "What is it?", "chosen": " It is blue.", "rejected": " I do not know it.", "kind": "sky"},
    {"prompt": "And this?", "chosen": " The sea.", "rejected": " Rain.", "kind": "sea"},
    {"prompt": "The rain in", "chosen": " Spain stays in the plain.", "rejected": " you.", "kind": "sky"},
    {"prompt": "def add(a, b):", "chosen": "\n    return a + b", "rejected": "\n    pass", "kind": "sea"},
    {"prompt": "Human: hi", "chosen": " Assistant: hi", "rejected": " weather", "kind": "sky"},
]


def opinion(context: Sequence[tuple[int, int]], target: int, salt: str = "") -> tuple[float, ...]:
    """The five outputs for a target after a context of (position, token); exact in float32."""
    digest = zlib.crc32(repr((salt, sorted(context), target)).encode())
    parts = [digest >> shift & 0x3F for shift in (0, 6, 12, 18, 24)]
    return -parts[0] / 8, parts[1] / 8, parts[2] / 8 - 4, parts[3] % 2, -parts[4] / 8


def expected(prompt: list[int], completion: list[int], salt: str = "") -> list[tuple[float, ...]]:
    """What the fake engine says of each scored token of one completion, from its sequence alone."""
    sequence = [*prompt, *completion]
    first = max(len(prompt), 1)
    return [opinion(list(enumerate(sequence[:index])), sequence[index], salt) for index in range(first, len(sequence))]


class FakeEngine:
    """Follows the graph contract, in plain Python; counts what it is asked."""

    precision = "fp32"

    def __init__(self, salt: str = "", name: str = "fake 1.0") -> None:
        self.salt = salt
        self.name = name
        self.batches: list[Batch] = []

    def score(self, batch: Batch) -> TokenScores:
        self.batches.append(batch)
        width = batch.input_ids.shape[1]
        values = []
        for index, target in zip(batch.target_index.tolist(), batch.target_ids.tolist(), strict=True):
            row, column = divmod(index, width)
            segments = batch.segment_ids[row]
            seen = [j for j in range(column + 1) if segments[j] in (0, segments[column])]
            context = [(int(batch.position_ids[row, j]), int(batch.input_ids[row, j])) for j in seen]
            values.append(opinion(context, target, self.salt))
        table = np.array(values, np.float32).reshape(len(values), len(OUTPUTS))
        return TokenScores(*table.T)

    def with_gates(self, gates: Sequence[float]) -> "FakeEngine":
        """Other gates are another model."""
        return FakeEngine(f"{self.salt} with {list(gates)}", self.name)


class FakeEngines:
    """Opens a fake engine for each role, and keeps them."""

    def __init__(self, name: str = "fake 1.0") -> None:
        self.name = name
        self.engines: dict[str, FakeEngine] = {}

    def __call__(self, bundle: Bundle, role: str) -> FakeEngine:
        self.engines[role] = FakeEngine(salt=role, name=self.name)
        return self.engines[role]

    @property
    def calls(self) -> int:
        return sum(len(engine.batches) for engine in self.engines.values())


def make_fake_bundle(
    folder: Path,
    *,
    reference: bool = True,
    layout: Layout = "shared",
    weights: bytes = b"weights",
) -> Path:
    """A bundle with a tokenizer, but with neither a graph nor weights that could be loaded."""
    models = {}
    for role in (POLICY, REFERENCE) if reference else (POLICY,):
        (folder / role).mkdir(parents=True)
        (folder / f"{role}.onnx").write_bytes(b"no graph")
        (folder / role / "model.safetensors").write_bytes(weights + role.encode())
        (folder / role / "config.json").write_text('{"model_type": "llama"}')
        models[role] = ModelEntry(
            source=role, revision=None, architecture="LlamaForCausalLM", model_type="llama", stored_dtypes=["F32"],
            parameters=1, vocabulary=500, hidden=32, layers=2, heads=4, max_positions=256, graph=f"{role}.onnx",
            engine_graph=f"{role}.onnx", weights=[role], adapter_gates=None, layout=layout, self_check=None,
            engine_check=None,
        )  # fmt: skip
    byte_bpe().save_pretrained(folder / POLICY)
    manifest = Manifest(
        format=FORMAT, versions={}, recipe=asdict(RECIPE), max_length=64, inputs={}, outputs=list(OUTPUTS),
        models=models, files=hash_files(folder),
    )  # fmt: skip
    write_manifest(folder, manifest)
    return folder


def pairs_alike(most: int = 8) -> st.SearchStrategy[list[TokenizedPair]]:
    """Up to `most` pairs of few prompts and few completions, so that much is there several times.

    As `dpo_fast.tokens` gives them: without a prompt, a completion has a second token, which can be scored.
    """
    token, texts = st.integers(1, 3), {}
    for least in (1, 2):
        texts[least] = st.lists(token, min_size=least, max_size=least + 2)
    pair = st.one_of(
        st.builds(make_pair, st.lists(token, min_size=1, max_size=2), texts[1], texts[1]),
        st.builds(make_pair, st.just([]), texts[2], texts[2]),
    )
    return st.lists(pair, min_size=1, max_size=most).map(numbered)


def numbered(pairs: Sequence[TokenizedPair]) -> list[TokenizedPair]:
    """The pairs as rows 1, 2, …"""
    return [replace(pair, row=row) for row, pair in enumerate(pairs, start=1)]


def make_pair(
    prompt: list[int], chosen: list[int], rejected: list[int], row: int = 1, group: str | None = None
) -> TokenizedPair:
    return TokenizedPair(row=row, prompt_ids=prompt, chosen_ids=chosen, rejected_ids=rejected, group=group)


def write_rows(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    return str(path)
