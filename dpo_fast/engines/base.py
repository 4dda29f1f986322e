"""What an engine is: something that scores a batch."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Protocol, runtime_checkable

from dpo_fast.batches import Batch
from dpo_fast.types import TokenScores


class Engine(Protocol):
    """Runs one model's log-prob graph.

    Attributes:
        name: what computes, with its version, such as "onnxruntime 1.31.1 CPUExecutionProvider".
        precision: of the matrix products, such as "fp32".
    """

    name: str
    precision: str

    def score(self, batch: Batch) -> TokenScores:
        """Score a batch's N targets; the result is checked by `dpo_fast.scores`, not here."""
        ...

    def with_gates(self, gates: Sequence[float]) -> "Engine":
        """The same loaded weights with other adapters turned on: 1 on, 0 off, in the graph's order."""
        ...


@runtime_checkable
class PipelinedEngine(Engine, Protocol):
    """An engine that takes the next batch while it computes one."""

    def score_all(self, batches: Iterable[Batch]) -> Iterator[TokenScores]:
        """The scores of each batch, in order; the next batch is under way when one is given out."""
        ...
