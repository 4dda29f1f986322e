"""How far is the engine's graph from the exact one? Both run the self-check's probes, and are compared by token."""

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from dpo_fast.batches import Layout, arrange, make_batches
from dpo_fast.engines.base import Engine
from dpo_fast.errors import EngineOutputError, SelfCheckError
from dpo_fast.scores import check_scores
from dpo_fast.token_table import make_table
from dpo_fast.types import TokenizedPair

# Nats a token. No precision moves the mean of random tokens' log-probs so far: a graph that does is another model.
LIMIT = 1.0


@dataclass(frozen=True, slots=True)
class Drift:
    """Absolute errors of an engine's log-probs on the probes, in nats a token.

    Random tokens are rare tokens, whose log-probs move most; what a precision costs on real pairs is for a real data
    set to say.

    Attributes:
        engine: what computed.
        precision: of its matrix products.
        tokens: how many were compared.
        mean, largest: error of a token's log-prob.
    """

    engine: str
    precision: str
    tokens: int
    mean: float
    largest: float

    def __str__(self) -> str:
        return (
            f"{self.engine}, {self.precision}: log-probs of {self.tokens} random tokens are {self.mean:.2g} nats "
            f"from the exact graph's on average, {self.largest:.2g} at most"
        )

    def as_dict(self) -> dict[str, Any]:
        """For bundle.json."""
        return asdict(self)


def measure_drift(exact: Engine, engine: Engine, pairs: list[TokenizedPair], layout: Layout) -> Drift:
    """Compare an engine with the exact graph's.

    Raises:
        SelfCheckError: the engine fails, returns NaN, or is more than `LIMIT` off on average.
    """
    errors = []
    try:
        table = make_table(pairs)
        for batch in make_batches(arrange(table, layout, token_budget=1), token_budget=1):
            found, expected = (check_scores(each.score(batch), batch, table.rows) for each in (engine, exact))
            errors.append(np.abs(found.log_prob.astype(np.float64) - expected.log_prob))
    except EngineOutputError as error:
        raise SelfCheckError(f"the recipe's engine cannot run this model: {error}") from error
    every = np.concatenate(errors)
    drift = Drift(engine.name, engine.precision, every.size, float(every.mean()), float(every.max()))
    if not drift.mean <= LIMIT:
        raise SelfCheckError(f"{drift}; that is another model (limit {LIMIT:g}): choose a recipe of higher precision")
    return drift
