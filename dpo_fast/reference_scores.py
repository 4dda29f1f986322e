"""A reference's scores, kept apart from any policy's: one pass of the reference serves every later policy.

They are found by what they depend on: the pairs' token ids, the reference's weights and graph, the engine, its
precision and the layout. They come from the local cache, which finds them by itself, or from a run that is named.
"""

import hashlib
import json
import zlib
from pathlib import Path
from typing import Protocol
from uuid import uuid4

from dpo_fast.bundle import REFERENCE
from dpo_fast.cache_folder import cache_errors, cache_folder
from dpo_fast.errors import UsageError
from dpo_fast.files import make_folder
from dpo_fast.run_folder import open_scores
from dpo_fast.scores import ScoredPairs
from dpo_fast.store import (
    BRANCH_NAMES,
    PAIRS,
    Fingerprint,
    completion_scores,
    differences,
    parquet_bytes,
    score_columns,
)


class KnownScores(Protocol):
    """Where a reference's scores may be found."""

    def find(self, part: int, token_ids: str, model: Fingerprint) -> ScoredPairs | None:
        """A part's reference scores, or None.

        Args:
            part: its number.
            token_ids: the hash of its pairs'.
            model: what the reference's scores depend on beside them.
        """
        ...

    def knows(self, weights_and_graph: str) -> bool:
        """Whether there are scores by a model, of whatever pairs."""
        ...


class KeptScores(Protocol):
    """Where a reference's scores are kept for later."""

    def keep(self, token_ids: str, model: Fingerprint, scored: ScoredPairs) -> None:
        """Keep a part's scores.

        Args:
            token_ids: the hash of its pairs'.
            model: what the scores depend on beside them.
            scored: the scores.

        Raises:
            StorageError: the disk refused.
        """
        ...


def scores_to_bytes(scored: ScoredPairs) -> memoryview:
    """A reference's scores of some pairs, as a Parquet file's content."""
    return parquet_bytes(score_columns(REFERENCE, scored), {})


def scores_from_bytes(content: bytes) -> ScoredPairs:
    """The reverse of `scores_to_bytes`."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pq.read_table(pa.BufferReader(content))
    chosen, rejected = (completion_scores(table, f"{REFERENCE}_{branch}") for branch in BRANCH_NAMES)
    return ScoredPairs(chosen, rejected, tokens=0, padding=0)


class ReferenceCache:
    """The reference's scores in the local cache: a file a part, named by what the scores depend on and a CRC-32."""

    def __init__(self, folder: Path | None = None) -> None:
        """Open the cache.

        Args:
            folder: where it lies; in the user's cache folder by default.
        """
        self._folder = folder or cache_folder() / "reference_scores"

    def knows(self, weights_and_graph: str) -> bool:
        """Whether there are scores by a model, of whatever pairs."""
        return self._of_model(weights_and_graph).is_dir()

    def find(self, part: int, token_ids: str, model: Fingerprint) -> ScoredPairs | None:
        """The scores that depend on just this; None if they are not there, or damaged."""
        folder, name = self._place(token_ids, model)
        for path in folder.glob(f"{name}-*.parquet"):
            try:
                content = path.read_bytes()
            except OSError:
                continue
            if f"{name}-{zlib.crc32(content):08x}" != path.stem:
                continue
            return scores_from_bytes(content)
        return None

    def keep(self, token_ids: str, model: Fingerprint, scored: ScoredPairs) -> None:
        """Keep a part's scores.

        Raises:
            StorageError: the cache's disk refused.
        """
        folder, name = self._place(token_ids, model)
        content = scores_to_bytes(scored)
        target = folder / f"{name}-{zlib.crc32(content):08x}.parquet"
        temporary = folder / f".{target.name}.{uuid4().hex}"
        with cache_errors(target):
            make_folder(folder)
            try:
                temporary.write_bytes(content)
                temporary.replace(target)
            finally:
                temporary.unlink(missing_ok=True)

    def _of_model(self, weights_and_graph: str) -> Path:
        """The folder of one model's scores."""
        return self._folder / hashlib.sha256(weights_and_graph.encode()).hexdigest()[:32]

    def _place(self, token_ids: str, model: Fingerprint) -> tuple[Path, str]:
        """The folder and the beginning of the name of a part's file."""
        digest = hashlib.sha256(json.dumps([token_ids, model], sort_keys=True).encode()).hexdigest()
        return self._of_model(model["weights and graph"]), digest[:32]


class ScoresOfRun:
    """The reference's scores in the parts of a run that is named."""

    def __init__(self, run: Path) -> None:
        """Open a run.

        Raises:
            UsageError: it holds no parts.
        """
        self._run = run
        self._store = open_scores(run)
        if not self._store.parts():
            raise UsageError(f"--reference-scores {run}: holds no scores; name a folder that `dpo-fast evaluate` wrote")

    def knows(self, weights_and_graph: str) -> bool:
        """True: what is not there is an error when it is looked for."""
        return True

    def find(self, part: int, token_ids: str, model: Fingerprint) -> ScoredPairs:
        """A part's reference scores.

        Raises:
            UsageError: the run has others, or none, of this part.
        """
        record = self._store.record(part)
        if record is None:
            raise UsageError(
                f"--reference-scores {self._run}: has no sound part {part}: it was made from fewer rows, or is "
                "damaged; leave the option out, and what is missing is computed"
            )
        found = record.fingerprints
        differing = differences(model, found.get(REFERENCE, {}))
        if found.get(PAIRS, {}).get("token ids") != token_ids:
            differing.append("token ids")
        if differing:
            raise UsageError(
                f"--reference-scores {self._run}: its reference scores differ in {', '.join(differing)} (part {part}); "
                "name a run of the same reference, data set, --max-length and --part-size, or leave the option out"
            )
        scores = self._store.read_part(part)
        if scores.reference_chosen is None or scores.reference_rejected is None:  # its fingerprint says there are some
            raise UsageError(f"--reference-scores {self._run}: has no reference scores in part {part}; leave it out")
        return ScoredPairs(scores.reference_chosen, scores.reference_rejected, tokens=0, padding=0)
