"""Token ids back to text, token by token: what each token adds to the text before it."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dpo_fast.bundle import POLICY, open_bundle
from dpo_fast.tokens import load_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Token ids to as many pieces of text.
Pieces = Callable[[Sequence[int]], list[str]]

INCOMPLETE = "\N{REPLACEMENT CHARACTER}"  # what decoders put where a character's bytes are not all there
LONGEST_CHARACTER = 8  # tokens; bytes that are no character at all do not hold up what follows
ANCHOR = "a"


class TokenTexts:
    """The pieces of text of a tokenizer's tokens.

    A character whose bytes are several tokens belongs to the last of them, and the others' pieces are empty. Joined,
    the pieces are the text as the models saw it, special tokens included.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase") -> None:
        """No token is known yet.

        Args:
            tokenizer: what made the ids.
        """
        self._tokenizer = tokenizer
        # Decoders drop a first token's space: each piece is decoded after a token, whose text is then cut off.
        self._anchor = tokenizer(ANCHOR, add_special_tokens=False)["input_ids"]
        self._anchor_text = self._decode_whole(self._anchor)
        self._known: dict[int, str] = {}

    def __call__(self, ids: Sequence[int]) -> list[str]:
        """As many pieces of text as there are ids."""
        pieces: list[str] = []
        pending: list[int] = []
        for token in ids:
            piece = self._piece(token)
            if not pending and INCOMPLETE not in piece:
                pieces.append(piece)
                continue
            pending.append(token)
            text = self._decode(pending)
            if text.endswith(INCOMPLETE) and len(pending) < LONGEST_CHARACTER:
                pieces.append("")
            else:
                pieces.append(text)
                pending = []
        if pending:
            pieces[-1] = self._decode(pending)
        return pieces

    def _piece(self, token: int) -> str:
        """One token's text."""
        piece = self._known.get(token)
        if piece is None:
            piece = self._known[token] = self._decode([token])
        return piece

    def _decode(self, ids: list[int]) -> str:
        """What some tokens add to the anchor's text."""
        text = self._decode_whole([*self._anchor, *ids])
        return text.removeprefix(self._anchor_text)

    def _decode_whole(self, ids: list[int]) -> str:
        arguments: dict[str, Any] = {"skip_special_tokens": False, "clean_up_tokenization_spaces": False}
        return str(self._tokenizer.decode(ids, **arguments))


def token_numbers(ids: Sequence[int]) -> list[str]:
    """The ids themselves, where there is no tokenizer."""
    return [f"[{token}]" for token in ids]


def open_texts(
    bundle: Path | None, metrics: dict[str, Any], *, trust_remote_code: bool = False
) -> tuple[TokenTexts | None, str]:
    """The tokenizer of the bundle that a run was evaluated with.

    Args:
        bundle: its folder, or None.
        metrics: the content of the run's metrics.json.
        trust_remote_code: whether the tokenizer's own Python code may be run.

    Returns:
        The texts, or None and the reason with the way out.

    Raises:
        BundleError: it is no bundle.
        CheckpointError: its tokenizer cannot be loaded.
    """
    if bundle is None:
        return (
            None,
            "A run holds token ids; their text takes the bundle's tokenizer: dpo-fast report RUN --bundle BUNDLE",
        )
    opened = open_bundle(bundle)
    evaluated = metrics["provenance"]["models"][POLICY]["weights_and_graph_sha256"]
    if opened.role_hashes(POLICY) != evaluated:
        return None, (
            f"The bundle {bundle.resolve().name} is not the one that this run was evaluated with (its policy's hashes "
            "differ), so its tokenizer is not used; name the run's own: dpo-fast report RUN --bundle BUNDLE"
        )
    return TokenTexts(load_tokenizer(opened.model_folder(POLICY), trust_remote_code=trust_remote_code)), ""
