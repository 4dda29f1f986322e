"""What the page loads: scripts, for browsers read nothing else from a folder. Each hands one value to the page.

::

    report/pairs.js              one number a pair and column: what the table sorts by
           excerpts-00000.js …   the beginning or the end of each text: what the table shows and searches
           tokens-00000.js …     whole texts and log-ratios, a few pairs a file: loaded when a row is opened
           figures.js            Plotly's figures
"""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dpo_fast.files import storage_errors
from dpo_fast.report.pairs import RunPairs
from dpo_fast.report.texts import Pieces
from dpo_fast.run_folder import open_scores
from dpo_fast.store import ScoreStore
from dpo_fast.types import CompletionScores, Float64Array, Int64Array

EXCERPT_PAIRS = 4096  # of a file
TOKEN_PAIRS = 64  # of a file: some 100 kB, which a browser reads in a few milliseconds
EXCERPT_BUDGET = 24_000_000  # characters in memory, whatever the number of pairs
EXCERPT_CHARACTERS = (80, 2000)  # of one text: at least, at most
PER_NAT = 100  # log-ratios are kept to two decimals, as whole numbers
LARGEST_VALUE = 100 * PER_NAT  # larger ones count as this where the colours are chosen

# Ends no script and begins no comment, in a file or in a page; JavaScript once took the two separators for line ends,
# and UTF-8 has no lone surrogates.
_ESCAPED = re.compile("[<>&\u2028\u2029\ud800-\udfff]")


@dataclass(frozen=True, slots=True)
class TokenFiles:
    """What the page must know of the files of texts and tokens.

    Attributes:
        excerpt_characters: how much of each text the table searches.
        scale: nats; 99 % of the tokens' values are no larger, so the heat maps' colours end there.
    """

    excerpt_characters: int
    scale: float


def script_json(value: Any) -> str:
    """JSON that means the same inside of a script, whatever text it holds."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return _ESCAPED.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


def write_script(folder: Path, name: str, value: Any) -> None:
    """Write one data file: a script that hands a value to the page.

    Raises:
        StorageError: the disk refused.
    """
    path = folder / f"{name}.js"
    with storage_errors(path):
        path.write_text(f"dpoFastReport.receive({script_json(name)},{script_json(value)})\n", encoding="utf-8")


def pair_columns(pairs: RunPairs) -> dict[str, Any]:
    """The table's numbers, column by column; rewards to five digits."""
    names = sorted(set(pairs.sums.groups or ()))
    places = {name: place for place, name in enumerate(names)}
    return {
        "row": pairs.sums.rows.tolist(),
        "margin": _five_digits(pairs.margins),
        "chosen": _five_digits(pairs.chosen_rewards),
        "rejected": _five_digits(pairs.rejected_rewards),
        "chosenTokens": pairs.sums.chosen_lengths.tolist(),
        "rejectedTokens": pairs.sums.rejected_lengths.tolist(),
        "truncated": pairs.sums.truncated.astype(int).tolist(),
        "subset": [places[name] for name in pairs.sums.groups or ()],
        "subsets": names,
    }


def write_tokens(folder: Path, run: Path, pairs: int, pieces: Pieces, *, excerpts: bool) -> TokenFiles:
    """Write the files of texts and tokens, in the order of the pairs.

    Args:
        folder: where to.
        run: what `dpo-fast evaluate` wrote.
        pairs: how many the run has.
        pieces: token ids to text.
        excerpts: whether there is text to show and search.

    Raises:
        StorageError: the disk refused, or a part is damaged.
    """
    least, most = EXCERPT_CHARACTERS
    characters = min(max(EXCERPT_BUDGET // (3 * pairs), least), most)
    counts = np.zeros(LARGEST_VALUE + 1, np.int64)  # of tokens, by the size of their value
    opened: list[dict[str, Any]] = []
    shown: list[list[str]] = []
    position = 0
    for position, pair in enumerate(_pairs(run, pieces, counts), start=1):
        opened.append(pair)
        if position % TOKEN_PAIRS == 0:
            write_script(folder, f"tokens-{position // TOKEN_PAIRS - 1:05}", opened)
            opened = []
        if excerpts:
            shown.append(_excerpts(pair, characters))
            if position % EXCERPT_PAIRS == 0:
                write_script(folder, f"excerpts-{position // EXCERPT_PAIRS - 1:05}", shown)
                shown = []
    if opened:
        write_script(folder, f"tokens-{position // TOKEN_PAIRS:05}", opened)
    if shown:
        write_script(folder, f"excerpts-{position // EXCERPT_PAIRS:05}", shown)
    up_to = np.cumsum(counts)
    scale = int(np.searchsorted(up_to, 0.99 * up_to[-1]))
    return TokenFiles(characters, max(scale, 1) / PER_NAT)


def token_values(policy: CompletionScores, reference: CompletionScores | None) -> Int64Array:
    """(C,) int64: log p_policy - log p_reference of each scored token, in hundredths of a nat, rounded.

    The policy's log-prob alone where there is no reference.
    """
    values = policy.log_probs.astype(np.float64)
    if reference is not None:
        values -= reference.log_probs
    return np.rint(PER_NAT * values).astype(np.int64)


def _pairs(run: Path, pieces: Pieces, counts: Int64Array) -> Iterator[dict[str, Any]]:
    """Each pair as the page opens it.

    A completion's first token, which is not scored where the prompt is empty, has no value.

    Args:
        run: what `dpo-fast evaluate` wrote.
        pieces: token ids to text.
        counts: how many tokens have a value of each size; those of every pair are added.
    """
    store = open_scores(run)
    for part in store.parts():
        scores, ids = store.read_part(part), _read_ids(store, part)
        branches = []
        for name, policy, reference in (
            ("chosen", scores.policy_chosen, scores.reference_chosen),
            ("rejected", scores.policy_rejected, scores.reference_rejected),
        ):
            values = token_values(policy, reference)
            counts += np.bincount(np.minimum(np.abs(values), LARGEST_VALUE), minlength=len(counts))
            branches.append((name, np.split(values, np.cumsum(policy.lengths)[:-1])))
        for index in range(len(scores.rows)):
            pair: dict[str, Any] = {"prompt": "".join(pieces(ids["prompt_ids"][index].tolist()))}
            for name, values_of_pairs in branches:
                tokens, values_of_pair = pieces(ids[f"{name}_ids"][index].tolist()), values_of_pairs[index].tolist()
                unscored = [None] * (len(tokens) - len(values_of_pair))
                pair[name] = {"tokens": tokens, "values": unscored + values_of_pair}
            yield pair


def _read_ids(store: ScoreStore, part: int) -> dict[str, list[Any]]:
    """A part's token ids: one array a pair."""
    import pyarrow.compute as pc

    table = store.read_columns(part, ["prompt_ids", "chosen_ids", "rejected_ids"])
    ids = {}
    for name in table.column_names:
        column = table[name].combine_chunks()
        ends = np.cumsum(pc.list_value_length(column).to_numpy())
        ids[name] = np.split(column.flatten().to_numpy(), ends[:-1])
    return ids


def _excerpts(pair: dict[str, Any], characters: int) -> list[str]:
    """The end of the prompt, where the question is, and the beginning of both completions."""
    return [
        pair["prompt"][-characters:],
        *("".join(pair[name]["tokens"])[:characters] for name in ("chosen", "rejected")),
    ]


def _five_digits(values: Float64Array) -> list[float]:
    return [float(f"{value:.5g}") for value in values.tolist()]
