"""Is the exported graph the model? The graph on ONNX Runtime against PyTorch run plainly, one sequence a row."""

import gc
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dpo_fast.batches import LAYOUTS, Layout, arrange, make_batches
from dpo_fast.engines.base import Engine
from dpo_fast.engines.onnxruntime import OnnxRuntimeEngine
from dpo_fast.engines.torch import load_model
from dpo_fast.errors import EngineOutputError, SelfCheckError
from dpo_fast.export.probes import LONGEST_WINDOW, make_probes
from dpo_fast.scores import check_scores
from dpo_fast.token_table import make_table
from dpo_fast.types import TokenizedPair

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


def self_check(
    graph: Path,
    folder: Path,
    *,
    layout: Layout | None,
    probes: int | None = None,
    trust_remote_code: bool = False,
    base: Path | None = None,
    gates: Sequence[float] | None = None,
) -> SelfCheck:
    """Compare a graph with the PyTorch model of a folder; choose the layout unless it is given.

    Args:
        graph: the exported graph.
        folder: the Transformers or PEFT folder whose weights it points into.
        layout: to be checked; None tries the shared prompt first, then one sequence a row.
        probes: how many pairs are compared; None takes all.
        trust_remote_code: whether the folder's Python code may be run.
        base: the folder of the base model, where `folder` is a PEFT folder.
        gates: that turn the folder's adapter on, or all of them off for the base, in a graph with adapters.

    Raises:
        SelfCheckError: no layout agrees with PyTorch; the message has the figures.
        CheckpointError: Transformers or PEFT cannot load the folder.
        MissingDependencyError: the folder is a PEFT folder, and PEFT is not installed.
    """
    pairs, expected = _plain_scores(folder, base, probes, trust_remote_code)
    engine = OnnxRuntimeEngine(graph, gates=gates)
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
    table = make_table(pairs)
    for token_budget in (1, table.tokens.size * len(table)):
        for batch in make_batches(arrange(table, layout, token_budget), token_budget):
            found = check_scores(engine.score(batch), batch, table.rows)
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


def check_mixed_rows(graph: Path, pairs: list[TokenizedPair], gates: Sequence[Sequence[float]], layout: Layout) -> None:
    """Compare a batch whose rows have different gates with batches whose rows all have the same.

    Args:
        graph: with adapters; right with the same gates in all rows, as `self_check` finds.
        pairs: probes.
        gates: of each role, which the rows take in turn.
        layout: of the rows.

    Raises:
        SelfCheckError: a row's numbers depend on other rows' gates.
    """
    engine = OnnxRuntimeEngine(graph, gates=gates[0])
    table = make_table(pairs)
    token_budget = table.tokens.size * len(table)
    for batch in make_batches(arrange(table, layout, token_budget), token_budget):
        mixed = asdict(engine.with_gates(gates).score(batch))
        uniform = [asdict(engine.with_gates(of_role).score(batch)) for of_role in gates]
        turn = batch.target_index // batch.input_ids.shape[1] % len(gates)
        for name in CONTINUOUS:
            expected = np.stack([scores[name] for scores in uniform])[turn, np.arange(len(turn))]
            error = float(np.abs(mixed[name] - expected).max(initial=0.0))
            if not error <= TOLERANCE:
                raise SelfCheckError(
                    f"{graph.name}: rows of one batch do not keep their adapters apart: {name} differs by {error:.2g} "
                    f"(limit {TOLERANCE:g})"
                )


def _plain_scores(
    folder: Path, base: Path | None, probes: int | None, trust_remote_code: bool
) -> tuple[list[TokenizedPair], dict[tuple[int, int], _PlainScores]]:
    """The probes, and PyTorch's scores of each completion by (pair, branch), from the model's own logits in float64."""
    import torch

    from dpo_fast.export.positions import longest_sequence, windows

    model = load_model(folder, base, torch.float32, trust_remote_code=trust_remote_code)
    ends = (getattr(model.config.get_text_config(), "max_position_embeddings", None), longest_sequence(model.config))
    pairs = make_probes(
        model.get_output_embeddings().weight.shape[0],
        window=max((window for window in windows(model.config).values() if window <= LONGEST_WINDOW), default=None),
        positions=min((end for end in ends if end is not None), default=None),
    )[:probes]
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
