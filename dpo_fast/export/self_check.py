"""Is the exported graph the model? The graph on ONNX Runtime against PyTorch run plainly, one sequence a row."""

import gc
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dpo_fast.batches import LAYOUTS, Layout, make_batches
from dpo_fast.engines.base import Engine
from dpo_fast.engines.onnxruntime import OnnxRuntimeEngine
from dpo_fast.errors import CheckpointError, EngineOutputError, SelfCheckError
from dpo_fast.quiet import quiet
from dpo_fast.scores import check_scores
from dpo_fast.types import TokenizedPair

# Tokens of (prompt, chosen, rejected): the shortest possible, prompts and completions longer and shorter than another.
PROBES = ((5, 3, 7), (1, 1, 1), (17, 12, 4), (2, 40, 40), (61, 20, 33))
SEED = 20_240_607
# Largest error, in nats (in units of the logit for mean_logit), that rounding explains. Two float32 orders of
# summation differ by 1e-6 on tiny models and 2e-5 on 30 layers; layers that mix tokens across a shared prompt err by
# 6e-4 and more, a dropped sliding window by 3e-2.
TOLERANCE = 1e-4
# The entropy and the sum of squares are expectations over the whole vocabulary, and so is the mean logit.
CONTINUOUS = ("log_prob", "entropy", "mean_logit", "log_sum_sq_prob")


@dataclass(frozen=True, slots=True)
class SelfCheck:
    """How far a graph is from its PyTorch model.

    Attributes:
        layout: the layout that passed: "shared", or "plain" where sharing the prompt changes the numbers.
        tokens: how many were compared, over single rows and padded batches.
        errors: largest absolute error by output, nats.
        top1_disagreements: tokens whose is_top1 differs though the two largest logits are apart.
        tolerance: that `errors` were held to.
    """

    layout: Layout
    tokens: int
    errors: dict[str, float]
    top1_disagreements: int
    tolerance: float

    @property
    def passed(self) -> bool:
        """NaN is a failure, never a pass, and so is a comparison of nothing."""
        exact = all(error <= self.tolerance for error in self.errors.values())
        return exact and self.top1_disagreements == 0 and self.tokens > 0

    def __str__(self) -> str:
        figures = ", ".join(f"{name} {error:.2g}" for name, error in self.errors.items())
        return (
            f"{self.layout} layout, {self.tokens} tokens, largest errors: {figures} (limit {self.tolerance:g}); "
            f"{self.top1_disagreements} top-1 disagreements"
        )

    def as_dict(self) -> dict[str, Any]:
        """For bundle.json."""
        return asdict(self) | {"passed": self.passed}


@dataclass(frozen=True, slots=True)
class _PlainScores:
    """PyTorch's answer for one completion, and how far the two largest logits are apart: (n,) each."""

    scores: dict[str, np.ndarray[Any, Any]]
    gap: np.ndarray[Any, Any]


def self_check(graph: Path, folder: Path, *, layout: Layout | None, trust_remote_code: bool = False) -> SelfCheck:
    """Compare a graph with the PyTorch model of a folder; choose the layout unless it is given.

    Args:
        graph: the exported graph.
        folder: the Transformers folder whose weights it points into.
        layout: to be checked; None tries the shared prompt first, then one sequence a row.
        trust_remote_code: whether the folder's Python code may be run.

    Raises:
        SelfCheckError: no layout agrees with PyTorch; the message has the figures.
        CheckpointError: Transformers cannot load the folder.
    """
    pairs, expected = _plain_scores(folder, trust_remote_code)
    engine = OnnxRuntimeEngine(graph)
    failures = []
    for candidate in (layout,) if layout else LAYOUTS:
        try:
            result = compare(engine, pairs, expected, candidate)  # type: ignore[arg-type]
        except EngineOutputError as error:
            failures.append(f"{candidate} layout: {error}")
            continue
        if result.passed:
            return result
        failures.append(str(result))
    raise SelfCheckError(f"{graph.name}: the graph does not say what PyTorch says: {'; '.join(failures)}")


def compare(
    engine: Engine, pairs: list[TokenizedPair], expected: dict[tuple[int, int], _PlainScores], layout: Layout
) -> SelfCheck:
    """Run the probes one pair at a time, and all in one padded batch; keep the largest errors."""
    errors = dict.fromkeys(CONTINUOUS, 0.0)
    tokens = disagreements = 0
    largest = sum(len(pair.prompt_ids + pair.chosen_ids + pair.rejected_ids) for pair in pairs) * len(pairs)
    for token_budget in (1, largest):
        for batch in make_batches(pairs, layout, token_budget):
            found = check_scores(engine.score(batch), batch, pairs)
            end = 0
            for pair, branch, count in batch.completions.tolist():
                start, end = end, end + count
                plain = expected[pair, branch]
                for name in CONTINUOUS:
                    error = np.abs(getattr(found, name)[start:end].astype(np.float64) - plain.scores[name])
                    errors[name] = float(np.maximum(errors[name], error.max(initial=0.0)))
                differ = found.is_top1[start:end] != plain.scores["is_top1"]
                disagreements += int((differ & (plain.gap > TOLERANCE)).sum())
                tokens += count
    return SelfCheck(layout, tokens, errors, disagreements, TOLERANCE)


def _plain_scores(
    folder: Path, trust_remote_code: bool
) -> tuple[list[TokenizedPair], dict[tuple[int, int], _PlainScores]]:
    """The probes, and PyTorch's scores of each completion by (pair, branch), from the model's own logits in float64."""
    import torch
    from transformers import AutoModelForCausalLM

    try:
        with quiet():
            model = AutoModelForCausalLM.from_pretrained(
                folder,
                dtype=torch.float32,
                local_files_only=True,
                trust_remote_code=trust_remote_code,
                use_safetensors=True,
            ).eval()
    except Exception as error:  # the folder's own files, read by as many loaders
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise CheckpointError(f"{folder.name}: Transformers cannot load this checkpoint ({reason})") from error
    config = model.config.get_text_config()
    pairs = _probes(model.get_output_embeddings().weight.shape[0], config)
    expected = {}
    with torch.inference_mode():
        for index, pair in enumerate(pairs):
            for branch, tokens in enumerate((pair.chosen_ids, pair.rejected_ids)):
                ids = torch.tensor([pair.prompt_ids + tokens])
                prompt = len(pair.prompt_ids)
                # the state at t predicts token t + 1: the prompt's last predicts the completion's first
                logits = model(input_ids=ids, use_cache=False).logits[0, prompt - 1 : -1].double()  # (n, V)
                targets = torch.tensor(tokens)
                log_probs = logits.log_softmax(-1)
                best = logits.topk(2).values
                scores = {
                    "log_prob": log_probs.gather(1, targets[:, None])[:, 0],
                    "entropy": -(log_probs.exp() * log_probs).sum(-1),
                    "mean_logit": logits.mean(-1),
                    "log_sum_sq_prob": (2 * log_probs).logsumexp(-1),
                    "is_top1": (logits.argmax(-1) == targets).float(),
                }
                expected[index, branch] = _PlainScores(
                    {name: value.numpy() for name, value in scores.items()}, (best[:, 0] - best[:, 1]).numpy()
                )
    del model
    gc.collect()
    return pairs, expected


def _probes(vocabulary: int, config: Any) -> list[TokenizedPair]:
    """Pairs of random tokens: several shapes, and one past a sliding window, where it is short enough to run here."""
    generator = np.random.default_rng(SEED)
    shapes = list(PROBES)
    window = getattr(config, "sliding_window", None)
    if window and window <= 1024:
        shapes.append((window + 3, 9, 5))
    longest = getattr(config, "max_position_embeddings", None) or 1 << 30
    pairs = []
    for row, (prompt, chosen, rejected) in enumerate(shapes, start=1):
        if prompt + max(chosen, rejected) > longest:
            continue
        ids = generator.integers(0, vocabulary, prompt + chosen + rejected).tolist()
        pairs.append(TokenizedPair(row, ids[:prompt], ids[prompt : prompt + chosen], ids[prompt + chosen :]))
    return pairs
