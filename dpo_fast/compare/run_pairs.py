"""A finished run pair by pair, without its tokens: some 70 bytes a pair, read from its parts with no engine.

Shapes use P (pairs). Logs are natural, in nats.
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dpo_fast.ahead import one_ahead
from dpo_fast.errors import StorageError, UsageError
from dpo_fast.metrics.grid import overflow_is_checked
from dpo_fast.metrics.losses import BATCH_LOSSES, total_losses
from dpo_fast.metrics.rewards import reduce_pairs
from dpo_fast.metrics.sums import sum_tokens
from dpo_fast.run_folder import open_scores
from dpo_fast.store import PAIRS, ScoreStore
from dpo_fast.types import Float64Array, Int64Array, LossSettings, PairScores

PIECES = ("prompt", "chosen", "rejected")
Digests = NDArray[np.uint64]
# Odd, so that nothing is lost, and different, so that the pieces' places count.
KEY_MULTIPLIERS = np.array([0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB], np.uint64)


@dataclass(frozen=True, slots=True)
class RunPairs:
    """What a run says of each of its P pairs at one setting of the loss.

    Attributes:
        rows: (P,) int64, 1-based row numbers in the data set, ascending.
        chosen_log_ratios, rejected_log_ratios: (P,) float64, nats: the policy's log-prob of the completion minus the
            reference's; or what stands in for it without a reference.
        reference_gaps: (P,) float64, nats: the reference's log-prob of the chosen completion minus that of the
            rejected; 0 without a reference.
        losses: (P,) float64; None where the loss cannot be traced to single pairs (aot, aot_unpaired, sft).
        chosen_lengths, rejected_lengths: (P,) int64 tokens, scored or not.
        groups: one text a pair, or None without `--group-by`.
    """

    rows: Int64Array
    chosen_log_ratios: Float64Array
    rejected_log_ratios: Float64Array
    reference_gaps: Float64Array
    losses: Float64Array | None
    chosen_lengths: Int64Array
    rejected_lengths: Int64Array
    groups: list[str] | None

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def margins(self) -> Float64Array:
        """(P,) float64, nats: the difference of the log-ratios; times beta, the margin of the rewards."""
        return self.chosen_log_ratios - self.rejected_log_ratios


def read_run(run: Path, settings: LossSettings) -> RunPairs:
    """Read a run's parts, one after another, and keep what belongs to pairs.

    Args:
        run: a finished run.
        settings: what the log-ratios and losses are computed with.

    Raises:
        UsageError: the run has no reference and the settings need one, or a number overflows.
        StorageError: a part is missing or damaged.
        EngineOutputError: a score is NaN or infinite.
    """
    traceable = not BATCH_LOSSES.intersection(settings.loss_type)

    def of_part(scores: PairScores) -> RunPairs:
        if scores.reference_chosen is None and settings.reference_free is None:
            raise UsageError(f"{run}: was evaluated without a reference; say --reference-free sum, average or norm")
        sums = sum_tokens(scores)
        chosen, rejected = reduce_pairs(sums, settings)
        with overflow_is_checked():
            losses = total_losses(chosen, rejected, settings) if traceable else None
        if losses is not None and not np.isfinite(losses).all():
            row = sums.rows[int(np.isfinite(losses).argmin())]
            raise UsageError(f"{run}: the loss of row {row} overflows with --beta {settings.beta}; change the loss")
        return RunPairs(
            rows=sums.rows,
            chosen_log_ratios=chosen.log_ratios,
            rejected_log_ratios=rejected.log_ratios,
            reference_gaps=chosen.reference - rejected.reference,
            losses=losses,
            chosen_lengths=sums.chosen_lengths,
            rejected_lengths=sums.rejected_lengths,
            groups=sums.groups,
        )

    parts = [of_part(scores) for scores in open_scores(run).read()]
    parts = [part for part in parts if len(part)] or parts[:1]

    def joined(name: str) -> NDArray[np.generic]:
        return np.concatenate([getattr(part, name) for part in parts])

    has_groups = all(part.groups is not None for part in parts)
    # A million texts, of which few differ: each is kept once.
    names: dict[str, str] = {}
    groups = [names.setdefault(name, name) for part in parts for name in part.groups or ()]
    return RunPairs(
        **{name: joined(name) for name in RunPairs.__slots__ if name not in ("losses", "groups")},  # type: ignore[arg-type]
        losses=np.concatenate([part.losses for part in parts if part.losses is not None]) if traceable else None,
        groups=groups if has_groups else None,
    )


def read_digests(run: Path) -> Digests:
    """Hashes of each pair's prompt and completions, by their token ids: equal pieces have equal hashes.

    Of 64 bits: among a million different pieces, the chance that any two are taken for equal is 3e-8.

    Args:
        run: a finished run.

    Returns:
        (P, 3) uint64: of the prompt, the chosen and the rejected completion.

    Raises:
        StorageError: a part is missing or damaged.
    """
    store = open_scores(run)
    return np.concatenate(list(one_ahead(lambda part: _part_digests(store, part), store.parts())))


def pair_keys(digests: Digests) -> NDArray[np.uint64]:
    """One number a pair: equal for pairs of the same pieces, in the same places.

    Args:
        digests: (P, 3).

    Returns:
        (P,) uint64.
    """
    return digests @ KEY_MULTIPLIERS  # modulo 2^64; the digests are random already


def check_same_pairs(runs: Sequence[Path], rows: Sequence[Int64Array]) -> None:
    """Refuse runs that are not of the same pairs: the same rows, with the same token ids.

    How the rows are cut into parts plays no role.

    Args:
        runs: finished runs.
        rows: of each, its row numbers.

    Raises:
        UsageError: they are of other pairs than the first; the message says in what they differ.
        StorageError: a part is missing or damaged.
    """
    first, first_digests = runs[0], None
    first_hashes = _token_hashes(first)
    for run, its_rows in zip(runs[1:], rows[1:], strict=True):
        if not np.array_equal(its_rows, rows[0]):
            missing, more = np.setdiff1d(rows[0], its_rows), np.setdiff1d(its_rows, rows[0])
            row, holder, other = (missing[0], first, run) if len(missing) else (more[0], run, first)
            raise UsageError(
                f"{run}: is not of the same pairs as {first}: {len(missing) + len(more):,} rows are in one alone, such "
                f"as row {row}, which {holder} has and {other} has not; evaluate both with the same rows"
            )
        if _token_hashes(run) == first_hashes:
            continue
        first_digests = read_digests(first) if first_digests is None else first_digests
        differing = (read_digests(run) != first_digests).any(axis=1)
        if differing.any():
            raise UsageError(
                f"{run}: is not of the same pairs as {first}: the tokens of {int(differing.sum()):,} of "
                f"{len(differing):,} rows differ, such as row {rows[0][int(differing.argmax())]}; evaluate both with "
                "the same data set, tokenizer and --max-length"
            )


def run_names(runs: Sequence[Path]) -> list[str]:
    """Each run's folder name, with as many of the folders above as it takes to tell them apart.

    A run that is named twice is numbered.
    """
    parts = [run.resolve().parts for run in runs]
    depth = next((n for n in range(1, max(map(len, parts))) if len({p[-n:] for p in parts}) == len(set(parts))), 1)
    names = ["/".join(each[-depth:]) for each in parts]
    return [f"{name} ({names[:i].count(name) + 1})" if name in names[:i] else name for i, name in enumerate(names)]


def _part_digests(store: ScoreStore, part: int) -> Digests:
    """(pairs of the part, 3) uint64."""
    table = store.read_columns(part, [f"{piece}_ids" for piece in PIECES])
    columns = [column.combine_chunks() for column in table.itercolumns()]
    return np.stack([np.fromiter(map(_digest, _lists(column)), np.uint64, len(column)) for column in columns], axis=1)


def _lists(column: "object") -> Iterator[bytes]:
    """The bytes of each list of a column of integers."""
    offsets = column.offsets.to_numpy()  # type: ignore[attr-defined]
    values = column.values.to_numpy()  # type: ignore[attr-defined]
    return (values[start:end].tobytes() for start, end in pairwise(offsets.tolist()))


def _digest(content: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little")


def _token_hashes(run: Path) -> list[object]:
    """Of each part, its rows and the hash of its token ids: where all are equal, so are the tokens."""
    store = open_scores(run)
    records = [(store.record(part), store.place(part)) for part in store.parts()]
    for record, place in records:
        if record is None:
            raise StorageError(f"{place}: is not what was written; evaluate again, and it is computed again")
    return [(record.rows, record.fingerprints.get(PAIRS, {}).get("token ids")) for record, _ in records if record]
