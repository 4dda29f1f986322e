"""Sizes under one name each: through optimum where it knows the family, from the configuration where it does not."""

import pytest
from optimum.utils import NormalizedConfigManager
from transformers import AutoConfig

from dpo_fast.export.sizes import Sizes, read_sizes

KNOWN = {
    "llama": Sizes(vocabulary=32000, hidden=4096, layers=32, heads=32, positions=2048),
    "gpt2": Sizes(vocabulary=50257, hidden=768, layers=12, heads=12, positions=1024),
    "mpt": Sizes(vocabulary=50368, hidden=2048, layers=24, heads=16, positions=2048),
    "bloom": Sizes(vocabulary=250880, hidden=64, layers=2, heads=8, positions=None),
}
UNKNOWN = {
    "mamba": Sizes(vocabulary=50280, hidden=768, layers=32, heads=None, positions=None),
    "gemma3_text": Sizes(vocabulary=262208, hidden=2304, layers=26, heads=8, positions=131072),
}


@pytest.mark.parametrize("model_type", KNOWN | UNKNOWN)
def test_sizes_of_a_familys_default_configuration(model_type: str) -> None:
    """The families' published defaults; llama 2's, gpt2's, …"""
    assert read_sizes(AutoConfig.for_model(model_type)) == (KNOWN | UNKNOWN)[model_type]


def test_which_families_optimum_names() -> None:
    """The two ways of reading sizes are both tried above."""
    for model_type in KNOWN:
        NormalizedConfigManager.check_supported_model(model_type)
    for model_type in UNKNOWN:
        with pytest.raises(KeyError, match="not supported yet"):
            NormalizedConfigManager.check_supported_model(model_type)


def test_positions_end_where_frequencies_change() -> None:
    """A graph holds the frequencies of short sequences; the message for a longer row is the positions'."""
    scaling = {"rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0] * 48, "long_factor": [2.0] * 48}
    config = AutoConfig.for_model(
        "phi3", max_position_embeddings=131072, original_max_position_embeddings=4096, rope_parameters=scaling
    )
    assert read_sizes(config).positions == 4096
