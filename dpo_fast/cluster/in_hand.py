"""Reference scores on their way from the worker that computed them to the one that writes the part."""

from dpo_fast.reference_scores import KeptScores, KnownScores, scores_from_bytes, scores_to_bytes
from dpo_fast.scores import ScoredPairs
from dpo_fast.store import Fingerprint


class ScoresInHand:
    """What one worker hands to another, in front of the scores that are known and kept anyway."""

    def __init__(self, known: KnownScores, cache: KeptScores) -> None:
        """Nothing is in hand.

        Args:
            known: where scores are looked for that are not in hand.
            cache: where scores are kept as well.
        """
        self._known, self._cache = known, cache
        self._scores: dict[str, ScoredPairs] = {}  # by the hash of the pairs' token ids

    def take(self, token_ids: str, content: bytes) -> None:
        """Take a part's scores in hand.

        Args:
            token_ids: the hash of its pairs'.
            content: from `hand_over`; empty where nothing was handed over.
        """
        if content:
            self._scores[token_ids] = scores_from_bytes(content)

    def hand_over(self, token_ids: str, found: ScoredPairs | None) -> bytes:
        """A part's scores, for another worker to take.

        Args:
            token_ids: the hash of its pairs'.
            found: the scores, where they needed no computing.
        """
        scored = self._scores.pop(token_ids, None) or found
        return b"" if scored is None else bytes(scores_to_bytes(scored))

    def forget(self, token_ids: str) -> None:
        """Let go of a part's scores."""
        self._scores.pop(token_ids, None)

    def knows(self, weights_and_graph: str) -> bool:
        """Whether there are scores by a model, of whatever pairs."""
        return self._known.knows(weights_and_graph)

    def find(self, part: int, token_ids: str, model: Fingerprint) -> ScoredPairs | None:
        """A part's reference scores, or None; see `KnownScores`."""
        return self._scores.pop(token_ids, None) or self._known.find(part, token_ids, model)

    def keep(self, token_ids: str, model: Fingerprint, scored: ScoredPairs) -> None:
        """Keep a part's scores, in hand and in the cache; see `KeptScores`."""
        self._cache.keep(token_ids, model, scored)
        self._scores[token_ids] = scored
