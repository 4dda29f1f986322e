"""Grouped attention: what attention is, written out head by head and query by query."""

import pytest
import torch

from dpo_fast.export.attention import grouped_attention

LOWEST = torch.finfo(torch.float32).min


def written_out(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor,
    softcap: float | None,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """In float64, head by head and query by query."""
    query, key, value, mask = (tensor.double() for tensor in (query, key, value, mask))
    batch, heads, length, size = query.shape
    result = torch.zeros(batch, length, heads, value.shape[-1], dtype=torch.float64)
    for row in range(batch):
        for head in range(heads):
            group = head // (heads // key.shape[1])
            for place in range(length):
                scores = key[row, group] @ query[row, head, place] * size**-0.5
                if softcap is not None:
                    scores = softcap * torch.tanh(scores / softcap)
                scores = scores + mask[row, head % mask.shape[1], place]
                if sinks is not None:
                    scores = torch.cat([scores, sinks[head].double()[None]])
                result[row, place, head] = scores.softmax(-1)[:length] @ value[row, group]
    return result


@pytest.mark.parametrize("length", [1, 2, 11])
@pytest.mark.parametrize("key_heads", [1, 2, 6])
@pytest.mark.parametrize("kind", ["plain", "soft cap", "sinks", "a mask of each head"])
def test_it_is_attention(length: int, key_heads: int, kind: str) -> None:
    torch.manual_seed(0)
    batch, heads, size, out = 2, 6, 4, 5
    query, key = torch.randn(batch, heads, length, size), torch.randn(batch, key_heads, length, size)
    value = torch.randn(batch, key_heads, length, out)
    seen = torch.rand(batch, 1, length, length).tril() + torch.eye(length) > 0.3  # some of what precedes, and itself
    mask = torch.where(seen, 0.0, LOWEST)
    if kind == "a mask of each head":
        mask = mask + torch.randn(batch, heads, 1, length)
    softcap = 2.0 if kind == "soft cap" else None
    sinks = torch.randn(heads) if kind == "sinks" else None
    found, probabilities = grouped_attention(torch.nn.Module(), query, key, value, mask, softcap=softcap, sinks=sinks)
    assert probabilities is None
    assert found.shape == (batch, length, heads, out)
    # float32 against float64, of sums of at most 11 terms of single digits
    torch.testing.assert_close(found.double(), written_out(query, key, value, mask, softcap, sinks), rtol=0, atol=2e-6)
