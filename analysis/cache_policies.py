"""Cache policies to compare context pruning with, over the same attention path: `Settings.policy` of model/context_pruning.py.

Each simulates, in one pass over whole texts, decoding token by token with a cache from which entries are evicted. A size counts the most
entries that a step reads, its own token's among them: after a step that read as many, one is evicted, which makes room for the next.

    window          the newest `size` tokens (Longformer, arXiv 2004.05150)
    sinks_window    the first `SINKS` tokens and the newest others (StreamingLLM, arXiv 2309.17453, at the text's own positions)
    tova            evicts the token with the least attention from the current query, a mean over heads (TOVA, arXiv 2401.06104)
    h2o             each key-value head for itself: half are the newest tokens, and of the others the one with the least attention so far,
                    summed over queries and over the query heads that share it, is evicted (H2O, arXiv 2306.14048)

The last two keep the newest token, and evict one a step from the step on that fills the cache.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from model.context_pruning import Policy, attend
from model.errors import InputError

SINKS = 4  # as in the paper
SMALLEST_SIZE = 2


def window(size: int) -> Policy:
    return _of_mask(lambda age, place: age < size)


def sinks_window(size: int) -> Policy:
    sinks = min(SINKS, size - 1)
    return _of_mask(lambda age, place: (age < size - sinks) | (place < sinks))


def tova(size: int) -> Policy:
    return _of_evictions(lambda scores: tova_evictions(scores, size))


def h2o(size: int) -> Policy:
    def policy(query: Tensor, key: Tensor, value: Tensor, scale: float | None, allowed: Tensor) -> tuple[Tensor, Tensor]:
        return _of_evictions(lambda scores: h2o_evictions(scores, size, key.shape[1]))(query, key, value, scale, allowed)

    return policy


POLICIES: dict[str, Callable[[int], Policy]] = {"window": window, "sinks_window": sinks_window, "tova": tova, "h2o": h2o}


def mean_live(size: int, length: int) -> float:
    """Entries that a step reads on average over a text, with a cache of this size."""
    full = min(size, length)
    return (full * (full + 1) / 2 + (length - full) * full) / length


def size_for(live: float, length: int) -> int:
    """The smallest size that has at least so many mean live entries over a text of this length, so that ours never has more."""
    low, high = SMALLEST_SIZE, max(SMALLEST_SIZE, length)
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if mean_live(middle, length) >= live - 1e-9 else (middle + 1, high)
    return low


# ------------------------------------------------------------------------------------------------------------- evictions


def tova_evictions(scores: Tensor, size: int) -> Tensor:
    """When each token leaves the cache.

    Args:
        scores: (batch, heads, length, length), scaled, before any mask.

    Returns:
        (batch, 1, length) int64: the first query that does not find the token; `length` where all do.
    """
    batch, heads, length, _ = scores.shape
    gone = torch.full((batch, length), length, device=scores.device)
    tokens = torch.arange(size, device=scores.device).repeat(batch, 1)  # those in the cache, a slot each, in no order
    newest = torch.full((batch, 1), size - 1, device=scores.device)  # its slot
    for step in range(size - 1, length - 1):
        row = scores[:, :, step].gather(2, tokens[:, None].expand(-1, heads, -1))
        attention = row.softmax(-1).mean(1).scatter(1, newest, torch.inf)
        newest = attention.argmin(1, keepdim=True)
        gone.scatter_(1, tokens.gather(1, newest), step + 1)
        tokens.scatter_(1, newest, step + 1)
    return gone[:, None]


def h2o_evictions(scores: Tensor, size: int, kv_heads: int) -> Tensor:
    """As `tova_evictions`, (batch, kv_heads, length)."""
    batch, heads, length, _ = scores.shape
    scores = scores.unflatten(1, (kv_heads, heads // kv_heads))
    gone = torch.full((batch, kv_heads, length), length, device=scores.device)
    filled = min(size, length)
    tokens = torch.arange(filled, device=scores.device).repeat(batch, kv_heads, 1)
    later = torch.ones(filled, filled, dtype=torch.bool, device=scores.device).triu(1)
    attended = scores[..., :filled, :filled].masked_fill(later, -torch.inf).softmax(-1).sum((2, 3))  # so far, by slot
    protected = max(1, size // 2)
    for step in range(size - 1, length - 1):
        if step >= size:
            row = scores[..., step, :].gather(3, tokens[:, :, None].expand(-1, -1, heads // kv_heads, -1))
            attended = attended + row.softmax(-1).sum(2)
        evicted = attended.masked_fill(tokens > step - protected, torch.inf).argmin(2, keepdim=True)
        gone.scatter_(2, tokens.gather(2, evicted), step + 1)
        tokens.scatter_(2, evicted, step + 1)
        attended.scatter_(2, evicted, 0.0)
    return gone


# -------------------------------------------------------------------------------------------------------------- the mixing


def _of_mask(kept: Callable[[Tensor, Tensor], Tensor]) -> Policy:
    """A policy that says from a token's age and place alone whether it is read."""

    def policy(query: Tensor, key: Tensor, value: Tensor, scale: float | None, allowed: Tensor) -> tuple[Tensor, Tensor]:
        places = _places(query, allowed)
        mask = (places <= places[:, None]) & kept(places[:, None] - places, places)
        return attend(query, key, value, mask[None, None], scale), mask.sum(-1).expand(len(query), -1)

    return policy


def _of_evictions(evictions: Callable[[Tensor], Tensor]) -> Policy:
    """A policy whose evictions (batch, 1 or kv_heads, length) follow from the scores."""

    def policy(query: Tensor, key: Tensor, value: Tensor, scale: float | None, allowed: Tensor) -> tuple[Tensor, Tensor]:
        places = _places(query, allowed)
        groups = query.shape[1] // key.shape[1]
        wide = torch.promote_types(query.dtype, torch.float32)
        scores = query.to(wide) @ key.to(wide).repeat_interleave(groups, dim=1).mT
        gone = evictions(scores * (query.shape[-1] ** -0.5 if scale is None else scale))
        mask = (places <= places[:, None]) & (places[:, None] < gone[:, :, None])  # (batch, 1 or kv_heads, queries, keys)
        live = mask.sum(-1).float().mean(1)
        return attend(query, key, value, mask if mask.shape[1] == 1 else mask.repeat_interleave(groups, dim=1), scale), live

    return policy


def _places(query: Tensor, allowed: Tensor) -> Tensor:
    """(length,) 0, 1, ... Raises InputError unless each query may see every token up to its own."""
    places = torch.arange(query.shape[2], device=query.device)
    if not torch.equal(allowed, (places <= places[:, None]).expand_as(allowed)):
        raise InputError("cache policies are measured on whole texts: no padding, and no other text in the same row")
    return places
