"""The parts of shaped attention around any kernel for A V: alpha V + beta A V - gamma C V (arXiv 2306.17759; 2311.01906, eq. 5).

C is A at equal scores: C V is the mean over the values that a token may look at. `shape` puts the three together. On a CPU, whole texts go
through `_ByBlocks`, some tokens at a time, so that a block stays in the processor's cache from the values to the sum of all three.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

SUM_BLOCK = 64  # tokens, whose running sums are a product with a triangle of ones

Gains = tuple[Tensor, Tensor, Tensor]  # alpha, beta, gamma of each column, (heads x head_dim,)


def causal_mean(value: Tensor, starts: Tensor | None, queries: int) -> Tensor:
    """C V: for each of the last `queries` tokens the mean of the values that it may look at.

    value (batch, keys, width), `starts` as in `model.attention.Context` -> (batch, queries, width), at least float32. Sums are kept so,
    since a running sum in bf16 stops growing; where they are subtracted from one another, in float64.
    """
    keys, dtype = value.shape[1], torch.promote_types(value.dtype, torch.float32)
    if starts is None:
        counts = torch.arange(1, keys + 1, device=value.device)[:, None]
        return (running_sums(value.to(dtype)) / counts)[:, keys - queries :]
    sums = running_sums(value.double())
    before = F.pad(sums, (0, 0, 1, 0)).gather(1, starts[:, :, None].expand(len(value), queries, value.shape[2]))
    counts = torch.arange(keys - queries + 1, keys + 1, device=value.device) - starts
    return ((sums[:, keys - queries :] - before) / counts[:, :, None]).to(dtype)


def running_sums(x: Tensor) -> Tensor:
    """x (batch, tokens, width) -> the sums over each token and those before it, of the same shape.

    By products of `SUM_BLOCK` tokens with a triangle of ones: `cumsum` walks down one column after another, and compiled for a GPU by
    torch 2.11 it fails beside a factor of each column (a split scan; pytorch issue 180221).
    """
    batch, tokens, width = x.shape
    if tokens <= SUM_BLOCK:
        return x.cumsum(1)
    blocks = F.pad(x, (0, 0, 0, -tokens % SUM_BLOCK)).view(batch, -1, SUM_BLOCK, width)
    within = torch.ones(SUM_BLOCK, SUM_BLOCK, dtype=x.dtype, device=x.device).tril() @ blocks
    before = F.pad(within[:, :-1, -1].cumsum(1), (0, 0, 1, 0))
    return (within + before[:, :, None]).view(batch, -1, width)[:, :tokens]


def shape(value: Tensor, attended: Tensor, mean: Tensor, gains: Gains | None) -> Tensor:
    """alpha V + beta A V - gamma C V, each (batch, tokens, heads x head_dim); gains None: all are 1."""
    if gains is None:
        return value + attended - mean
    alpha, beta, gamma = gains
    return torch.addcmul(torch.addcmul(alpha * value, beta, attended), gamma, mean, value=-1)


def shape_by_blocks(value: Tensor, attended: Tensor, gains: Gains | None) -> Tensor | None:
    """`shape` of a whole text of its own, C V included; None where that is not faster: `causal_mean` and `shape` then serve."""
    if gains is None or value.device.type != "cpu" or value.shape[1] <= SUM_BLOCK or torch.compiler.is_compiling():
        return None
    return _ByBlocks.apply(value, attended, *gains)


class _ByBlocks(torch.autograd.Function):
    """`shape` and the mean in it, `SUM_BLOCK` tokens at a time, summed in float32 at least."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, attended: Tensor, alpha: Tensor, beta: Tensor, gamma: Tensor) -> Tensor:  # type: ignore[override]
        tokens, dtype = value.shape[1], torch.promote_types(value.dtype, torch.float32)
        triangle, shares = torch.ones(SUM_BLOCK, SUM_BLOCK, dtype=dtype).tril(), _shares(tokens, dtype)
        out, mean = torch.empty_like(value), torch.empty_like(value)
        before: Tensor | float = 0.0  # the sum of all blocks that came before
        for rows in _blocks(tokens):
            size, values = rows.stop - rows.start, value[:, rows].to(dtype)
            sums = (triangle[:size, :size] @ values).add_(before)
            before = sums[:, -1:].clone()
            means = sums.mul_(shares[rows])
            mean[:, rows] = means
            out[:, rows] = values.mul(alpha).addcmul_(beta, attended[:, rows].to(dtype)).addcmul_(gamma, means, value=-1)
        ctx.save_for_backward(value, attended, mean, alpha, beta, gamma)
        return out

    @staticmethod
    def backward(ctx: Any, toward: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        value, attended, mean, alpha, beta, gamma = ctx.saved_tensors
        if torch.is_grad_enabled():  # a gradient of the gradient is wanted
            out = shape(value, attended, causal_mean(value, None, value.shape[1]).type_as(value), (alpha, beta, gamma))
            inputs = zip((value, attended, alpha, beta, gamma), ctx.needs_input_grad, strict=True)
            found = iter(torch.autograd.grad(out, [x for x, needed in inputs if needed], toward, create_graph=True))
            return tuple(next(found) if needed else None for needed in ctx.needs_input_grad)
        tokens, dtype = value.shape[1], torch.promote_types(value.dtype, torch.float32)
        triangle, shares = torch.ones(SUM_BLOCK, SUM_BLOCK, dtype=dtype).triu(), _shares(tokens, dtype)
        to_value, to_attended = torch.empty_like(value), torch.empty_like(attended)
        to_gains = torch.zeros(3, value.shape[2], dtype=dtype)
        after: Tensor | float = 0.0
        for rows in reversed(_blocks(tokens)):
            size, gradient = rows.stop - rows.start, toward[:, rows].to(dtype)
            to_attended[:, rows] = gradient * beta
            for sums, factor, sign in zip(to_gains, (value, attended, mean), (1, 1, -1), strict=True):
                sums.add_((gradient * factor[:, rows]).sum((0, 1)), alpha=sign)
            # token j is in the mean of each token n >= j, with a share of 1 / n
            sums = (triangle[:size, :size] @ (gradient * shares[rows]).mul_(gamma)).add_(after)
            after = sums[:, :1].clone()
            to_value[:, rows] = gradient.mul(alpha).sub_(sums)
        return to_value, to_attended, *to_gains.to(alpha.dtype)


def _blocks(tokens: int) -> list[slice]:
    return [slice(start, min(start + SUM_BLOCK, tokens)) for start in range(0, tokens, SUM_BLOCK)]


def _shares(tokens: int, dtype: torch.dtype) -> Tensor:
    """1 / n for the n-th token, (tokens, 1)."""
    return torch.arange(1, tokens + 1, dtype=dtype)[:, None].reciprocal()
