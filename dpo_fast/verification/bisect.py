"""Which layers a drift comes from, and what keeping the worst of them exact would give."""

from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

from dpo_fast.bundle import Bundle
from dpo_fast.errors import CheckFailedError, InputError
from dpo_fast.recipes import OPTIONAL
from dpo_fast.token_table import TokenTable
from dpo_fast.types import TokenizedPair
from dpo_fast.verification.hidden_states import EMBEDDING, compare_hidden_states, find_culprits
from dpo_fast.verification.kept_layers import KeptLayers, Trade, try_kept_layers

PAIRS_OF_STATES = 4  # their hidden states are in memory, of all layers
PAIRS_OF_TRADES = 32


def bisect(
    bundle: Bundle,
    roles: Sequence[str],
    table: TokenTable,
    *,
    threads: int = 0,
    trust_remote_code: bool = False,
    report: Callable[[str], None] = lambda step: None,
) -> dict[str, Any]:
    """Compare hidden states layer by layer; for a quantised engine, try the worst layers in the exact precision.

    Args:
        bundle: what is verified.
        roles: whose models.
        table: the pairs; the first ones are taken.
        threads: of the engine; 0 takes every physical core.
        trust_remote_code: whether the checkpoint's own Python code may be run.
        report: called with a line at each step.

    Returns:
        For JSON: by role the drift of each graph's layers and the culprits among them; the trade of error for speed and
        the recipe that it suggests, for a quantised engine; and what could not be looked at, with the reason.
    """
    found: dict[str, Any] = {"layers": {}, "culprits": {}, "trades": [], "recipe": None, "problems": []}
    few = pairs_of(table, PAIRS_OF_STATES)
    for role in roles:
        report(f"{role}: comparing {len(few)} pairs' hidden states, layer by layer")
        try:
            drifts = compare_hidden_states(bundle, role, few, trust_remote_code=trust_remote_code)
        except (InputError, CheckFailedError) as error:  # a family whose layers cannot be found, an engine not here
            found["problems"].append(f"{role}: {error}")
            continue
        found["layers"][role] = [asdict(drift) for drift in drifts]
        found["culprits"][role] = [asdict(drift) for drift in find_culprits(drifts)]
    if bundle.manifest.recipe["precision"] in OPTIONAL["exact_layers"]:
        try:
            kept = try_kept_layers(bundle, pairs_of(table, PAIRS_OF_TRADES), threads=threads, report=report)
        except (InputError, CheckFailedError) as error:
            found["problems"].append(str(error))
        else:
            found["trades"] = [asdict(trade) for trade in kept.trades]
            found["recipe"] = kept.recipe_text(len(suggested(kept).exact_layers))
    return found


def suggested(kept: KeptLayers) -> Trade:
    """The trade of the fewest exact layers that takes away half of the error, or of those that take away most."""
    start = next(trade for trade in kept.trades if not trade.exact_layers)
    enough = [trade for trade in kept.trades if trade.mean_error <= start.mean_error / 2]
    return min(enough, key=lambda trade: len(trade.exact_layers), default=min(kept.trades, key=lambda t: t.mean_error))


def describe_layer(drift: dict[str, Any]) -> str:
    """A layer as people call it."""
    return "embedding" if drift["layer"] == EMBEDDING else f"layer {drift['layer']}"


def pairs_of(table: TokenTable, count: int) -> list[TokenizedPair]:
    """The first pairs of a table, one by one."""
    pairs = []
    for number in range(min(count, len(table))):
        pieces = [
            table.tokens[start : start + length].tolist()
            for start, length in zip(table.starts[number], table.lengths[number], strict=True)
        ]
        pairs.append(TokenizedPair(int(table.rows[number]), *pieces))
    return pairs
