"""Attention masks: the first visible key of each query, as an additive mask or a FlexAttention BlockMask."""

from __future__ import annotations

import functools
import importlib.util

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

BLOCK = 128  # tokens along each side of flex_attention's blocks


@functools.cache
def has_block_kernel(device_type: str, head_dim: int) -> bool:
    """Whether flex_attention trains there: it has no gradient on a CPU, and on a GPU Triton makes it, for heads of at least 16."""
    return device_type == "cuda" and head_dim >= 16 and importlib.util.find_spec("triton") is not None


def first_keys(first: int, length: int, document_ids: Tensor | None, window: int | None, device: torch.device) -> Tensor:
    """The first key that each of the queries from `first` up to `length` may look at, (batch or 1, length - first), int64.

    Within the query's document, whose ids (batch, length) stand together, and the window that ends at it.
    """
    positions = torch.arange(length, device=device)[None]
    starts = torch.zeros_like(positions)
    if document_ids is not None:
        begins = torch.ones_like(document_ids, dtype=torch.bool)
        begins[:, 1:] = document_ids[:, 1:] != document_ids[:, :-1]
        starts = torch.where(begins, positions, 0).cummax(dim=1).values
    if window is not None:
        starts = starts.maximum(positions - (window - 1))
    return starts[:, first:]


def attention_mask(first: int, length: int, starts: Tensor | None, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Who may look at whom, (batch or 1, 1, length - first, length) of `dtype`: 0 where the query (row) sees the key (column), -inf
    elsewhere. Additive, since every block would turn a boolean mask into this anew, and keep it."""
    keys, queries = torch.arange(length, device=device), torch.arange(first, length, device=device)
    allowed = (keys <= queries[:, None])[None]
    if starts is not None:
        allowed = allowed & (keys >= starts[:, :, None])
    return torch.zeros(allowed.shape, dtype=dtype, device=device).masked_fill_(~allowed, -torch.inf)[:, None]


def block_mask(starts: Tensor, batch: int) -> BlockMask:
    """What `attention_mask` says, for flex_attention, without a number for each pair of tokens.

    `starts` (batch or 1, length), as from `first_keys`, rise along a sequence. So of 128 x 128 blocks a row of them sees those from its
    first query's start up to the diagonal, and sees whole those from its last query's start on; the kernel skips the rest.
    """
    length, device = starts.shape[1], starts.device
    first = torch.arange(0, length, BLOCK, device=device)
    last = (first + BLOCK - 1).clamp(max=length - 1)
    rows, columns = torch.arange(len(first), device=device)[:, None], torch.arange(len(first), device=device)
    seen = (columns >= (starts[:, first] // BLOCK)[:, :, None]) & (columns <= rows)
    whole = (columns * BLOCK >= starts[:, last][:, :, None]) & (columns < rows) & ((rows + 1) * BLOCK <= length)
    starts = starts.expand(batch, -1).contiguous()

    def visible(b: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (key <= query) & (key >= starts[b, query])

    def ordered(blocks: Tensor) -> tuple[Tensor, Tensor]:
        """(how many a row has, which ones they are, before the others)"""
        blocks = blocks.int().expand(batch, -1, -1)[:, None]
        return blocks.sum(-1, dtype=torch.int32), blocks.argsort(dim=-1, descending=True, stable=True).int()

    return BlockMask.from_kv_blocks(*ordered(seen & ~whole), *ordered(whole), BLOCK, visible, (length, length))
