"""Cache policies simulated in one pass, against a loop that decodes token by token and takes entries out of the cache."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from analysis.cache_policies import POLICIES, SINKS, mean_live, size_for
from model.errors import InputError

CAUSAL = torch.ones(1, 40, 40, dtype=torch.bool).tril()


def decode(name: str, size: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> tuple[Tensor, list[list[float]]]:
    """One text at a time, one token at a time: lists of entries, from which those evicted are deleted."""
    batch, heads, length, _ = query.shape
    groups = heads // key.shape[1]
    out, live = torch.zeros(batch, heads, length, value.shape[3], dtype=query.dtype), []
    for b in range(batch):
        caches: list[list[int]] = [[] for _ in range(key.shape[1])]
        attended: list[dict[int, float]] = [{} for _ in caches]
        read = []
        for now in range(length):
            weights = []
            for cache in caches:
                cache.append(now)
                while name == "window" and len(cache) > size:
                    del cache[0]
                while name == "sinks_window" and len(cache) > size:
                    del cache[min(SINKS, size - 1)]
            read.append(sum(len(cache) for cache in caches) / len(caches))
            for head in range(heads):
                cache = caches[head // groups]
                weight = (key[b, head // groups, cache] @ query[b, head, now] * scale).softmax(0)
                out[b, head, now] = weight @ value[b, head // groups, cache]
                weights.append(weight)
            if name == "tova" and len(caches[0]) == size:
                mean = torch.stack(weights).mean(0)[:-1]
                for cache in caches:
                    del cache[int(mean.argmin())]
            for number, cache in enumerate(caches):
                if name == "h2o":
                    for i, token in enumerate(cache):
                        more = sum(float(weights[number * groups + g][i]) for g in range(groups))
                        attended[number][token] = attended[number].get(token, 0.0) + more
                    if len(cache) == size:
                        old = cache[: len(cache) - max(1, size // 2)]
                        cache.remove(min(old, key=lambda token: attended[number][token]))
        live.append(read)
    return out, live


@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize("size", [2, 3, 7, 16, 39, 40, 60])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_a_policy_is_decoding_with_evictions(name, size, kv_heads):
    generator = torch.Generator().manual_seed(size + kv_heads)
    query, key, value = (torch.randn(2, heads, 40, 6, generator=generator, dtype=torch.float64) * 1.5 for heads in (4, kv_heads, kv_heads))
    expected, read = decode(name, size, query, key, value, 6**-0.5)
    found, live = POLICIES[name](size)(query, key, value, None, CAUSAL)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    assert torch.equal(live.double(), torch.tensor(read, dtype=torch.float64))
    assert float(live.double().mean()) == pytest.approx(mean_live(size, 40))
    if size < 20:  # it is another result than the whole context gives
        whole = torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
        assert (found - whole).abs().max() > 0.1
    half, _ = POLICIES[name](size)(query.float(), key.float(), value.float(), 6**-0.5, CAUSAL)
    torch.testing.assert_close(half.double(), expected, rtol=0, atol=1e-5)


def test_sizes_have_at_least_the_entries_asked_for():
    for length in (10, 24, 1024):
        for live in (1.0, 1.7, 2.0, length / 8, length / 3, (length + 1) / 2, length):
            size = size_for(live, length)
            counted = sum(min(now + 1, size) for now in range(length)) / length
            assert mean_live(size, length) == pytest.approx(counted)
            assert counted >= live - 1e-9 or size == length
            assert size == 2 or mean_live(size - 1, length) < live


def test_padding_is_refused():
    query = torch.randn(1, 1, 5, 4)
    allowed = torch.ones(1, 5, 5, dtype=torch.bool).tril()
    allowed[0, 3, 0] = False
    with pytest.raises(InputError, match="whole texts: no padding"):
        POLICIES["tova"](3)(query, query, query, math.nan, allowed)
