"""A model's sizes under one name each, whatever its family calls them."""

from dataclasses import dataclass
from typing import Any

from optimum.utils import NormalizedConfigManager
from transformers import PretrainedConfig

from dpo_fast.export.positions import longest_sequence


@dataclass(frozen=True, slots=True)
class Sizes:
    """What bundle.json says of a model's size; None where its configuration does not say.

    Attributes:
        vocabulary: rows of the embedding.
        hidden: width of a state.
        layers: of the decoder.
        heads: query heads of a layer.
        positions: longest sequence in tokens that the model has positions for, and the graph frequencies.
    """

    vocabulary: int
    hidden: int | None
    layers: int | None
    heads: int | None
    positions: int | None


def read_sizes(config: PretrainedConfig) -> Sizes:
    """The sizes of a configuration: by optimum's names where it knows the family, by Transformers' otherwise."""
    text = config.get_text_config()
    try:
        normalized: Any = NormalizedConfigManager.get_normalized_config_class(text.model_type)(text)
    except KeyError:
        normalized = None

    def size(optimum_name: str, transformers_name: str) -> int | None:
        for source, name in ((normalized, optimum_name), (text, transformers_name)):
            value = getattr(source, name, None)  # optimum's classes raise AttributeError for what a family lacks
            if type(value) is int:  # some families give one value a layer
                return value
        return None

    vocabulary = size("vocab_size", "vocab_size")
    if vocabulary is None:
        raise ValueError(f"{type(config).__name__} has no vocab_size")
    positions = (size("max_position_embeddings", "max_position_embeddings"), size("max_seq_len", "max_seq_len"))
    limits = [limit for limit in (*positions, longest_sequence(config)) if limit is not None]
    return Sizes(
        vocabulary=vocabulary,
        hidden=size("hidden_size", "hidden_size"),
        layers=size("num_layers", "num_hidden_layers"),
        heads=size("num_attention_heads", "num_attention_heads"),
        positions=min(limits, default=None),
    )
