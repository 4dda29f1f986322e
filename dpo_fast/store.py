"""Scores on disk, in parts of consecutive pairs: what was computed once is not computed again.

A part is one Parquet file, written to a temporary name, synced and renamed, so it is whole or not there. Its metadata
holds what its numbers depend on, role by role: the token ids, the weights, the graph, the engine and the layout. A
part is taken again only if all of that is the same.
"""

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dpo_fast.bundle import POLICY, ROLES
from dpo_fast.errors import OutputExistsError, StorageError
from dpo_fast.files import storage_errors
from dpo_fast.scores import ScoredPairs
from dpo_fast.types import CompletionScores, PairScores, TokenizedPair

if TYPE_CHECKING:
    import pyarrow as pa

PAIRS_PER_PART = 1024
METADATA_KEY = b"dpo_fast"
BRANCH_NAMES = ("chosen", "rejected")
SUMS = ("entropy", "mean_logit", "top1", "log_sum_sq_prob")

# What a role's scores in a part depend on, by name.
Fingerprint = dict[str, str]


def token_hash(pairs: Sequence[TokenizedPair]) -> str:
    """SHA-256 over the pairs' token ids and the lengths that part them."""
    digest = hashlib.sha256()
    for pair in pairs:
        for ids in (pair.prompt_ids, pair.chosen_ids, pair.rejected_ids):
            digest.update(np.array([len(ids), *ids], np.int64).tobytes())
    return digest.hexdigest()


def row_hash(pairs: Sequence[TokenizedPair]) -> str:
    """SHA-256 over what a part says of its pairs beside the tokens: row numbers, truncation, groups."""
    rows = [[pair.row, pair.truncated, pair.group] for pair in pairs]
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()


class ScoreStore:
    """The parts of one run, in `RUN/scores`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def path(self, part: int) -> Path:
        """A part's file."""
        return self.folder / f"part-{part:05}.parquet"

    def has(self, part: int, fingerprints: dict[str, Fingerprint]) -> bool:
        """Whether a part was computed already, from the same tokens, by the same models on the same engine.

        Raises:
            OutputExistsError: it was computed from something else; the message says from what.
        """
        import pyarrow.parquet as pq

        path = self.path(part)
        if not path.is_file():
            return False
        try:
            stored = dict(json.loads(pq.read_schema(path).metadata[METADATA_KEY]))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise StorageError(f"{path}: cannot be read; remove it, and it is computed again") from error
        for role in sorted(fingerprints.keys() | stored.keys()):
            wanted, found = fingerprints.get(role, {}), stored.get(role, {})
            differing = sorted(key for key in wanted.keys() | found.keys() if wanted.get(key) != found.get(key))
            if differing:
                raise OutputExistsError(
                    f"{self.folder.parent}: holds an unfinished run whose {role} scores differ in "
                    f"{', '.join(differing)}; name another folder, or say --overwrite"
                )
        return True

    def clear(self) -> None:
        """Remove all parts, and what a killed run left of one; nothing else in the folder is touched.

        Raises:
            StorageError: the disk refused.
        """
        with storage_errors(self.folder):
            for path in [*self.folder.glob("part-*.parquet"), *self.folder.glob(".part-*.parquet.*")]:
                path.unlink()

    def write(
        self,
        part: int,
        pairs: Sequence[TokenizedPair],
        scores: dict[str, ScoredPairs],
        fingerprints: dict[str, Fingerprint],
    ) -> None:
        """Write a part: one row a pair.

        Args:
            part: its number.
            pairs: P pairs.
            scores: of these pairs, by role.
            fingerprints: what they depend on, by role.

        Raises:
            StorageError: the disk refused.
        """
        import pyarrow as pa
        import pyarrow.parquet as pq

        columns: dict[str, Any] = {
            "row": pa.array([pair.row for pair in pairs], pa.int64()),
            "prompt_ids": pa.array([pair.prompt_ids for pair in pairs], pa.list_(pa.int32())),
            "chosen_ids": pa.array([pair.chosen_ids for pair in pairs], pa.list_(pa.int32())),
            "rejected_ids": pa.array([pair.rejected_ids for pair in pairs], pa.list_(pa.int32())),
            "truncated": pa.array([pair.truncated for pair in pairs], pa.bool_()),
            "group": pa.array([pair.group for pair in pairs], pa.string()),
        }
        for role, scored in scores.items():
            for branch, completions in zip(BRANCH_NAMES, (scored.chosen, scored.rejected), strict=True):
                name = f"{role}_{branch}"
                offsets = np.concatenate([[0], np.cumsum(completions.lengths)]).astype(np.int32)
                columns[f"{name}_log_probs"] = pa.ListArray.from_arrays(offsets, completions.log_probs)
                for value in SUMS:
                    columns[f"{name}_{value}"] = pa.array(getattr(completions, value))
        table = pa.table(columns).replace_schema_metadata({METADATA_KEY: json.dumps(fingerprints)})
        target = self.path(part)
        temporary = target.with_name(f".{target.name}.{os.getpid()}")
        with storage_errors(target):
            self.folder.mkdir(parents=True, exist_ok=True)
            try:
                with temporary.open("wb") as file:
                    pq.write_table(table, file, compression="zstd", write_page_checksum=True)
                    file.flush()
                    os.fsync(file.fileno())
                temporary.replace(target)
            finally:
                temporary.unlink(missing_ok=True)

    def read(self, parts: int) -> PairScores:
        """All scores of a run, in the data set's order.

        Args:
            parts: how many there are.

        Raises:
            StorageError: a part is missing or damaged.
        """
        import pyarrow as pa
        import pyarrow.parquet as pq

        tables = []
        for path in map(self.path, range(parts)):
            try:
                table = pq.read_table(path, page_checksum_verification=True)
            except (OSError, pa.ArrowException) as error:
                reason = " ".join(str(error).split())[:200]
                raise StorageError(f"{path}: cannot be read ({reason}); remove it, and evaluate again") from error
            tables.append(table.replace_schema_metadata(None))
        table = pa.concat_tables(tables)
        scores = {
            f"{role}_{branch}": _completion_scores(table, f"{role}_{branch}")
            for role in ROLES
            for branch in BRANCH_NAMES
            if role == POLICY or f"{role}_{branch}_log_probs" in table.column_names
        }
        groups = table["group"].to_pylist()
        return PairScores(
            rows=table["row"].to_numpy(),
            prompt_lengths=_list_lengths(table, "prompt_ids"),
            chosen_lengths=_list_lengths(table, "chosen_ids"),
            rejected_lengths=_list_lengths(table, "rejected_ids"),
            truncated=table["truncated"].to_numpy(),
            groups=None if all(group is None for group in groups) else groups,
            policy_chosen=scores["policy_chosen"],
            policy_rejected=scores["policy_rejected"],
            reference_chosen=scores.get("reference_chosen"),
            reference_rejected=scores.get("reference_rejected"),
        )


def _list_lengths(table: "pa.Table", column: str) -> np.ndarray[Any, np.dtype[np.int64]]:
    """(P,) int64: how many elements each row's list has."""
    import pyarrow.compute as pc

    return np.asarray(pc.list_value_length(table[column]).to_numpy(), np.int64)


def _completion_scores(table: "pa.Table", name: str) -> CompletionScores:
    """One role's scores of one branch, back from a table's columns."""
    import pyarrow.compute as pc

    values = {value: table[f"{name}_{value}"].to_numpy() for value in SUMS}
    return CompletionScores(
        log_probs=np.asarray(pc.list_flatten(table[f"{name}_log_probs"]).to_numpy(), np.float32),
        lengths=_list_lengths(table, f"{name}_log_probs"),
        **values,
    )
