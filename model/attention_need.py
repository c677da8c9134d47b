"""Learning what to drop from the dense network's own attention, before the loss has a say; not in the paper.

How much a token j will be needed after k is known once the text has been read to its end: the most attention, a mean over heads, that any
later token gives it. What decides about the context (model/context_pruning.py) is taught to predict it from what it sees at k:

    need[k, j] = max over t > k of mean over heads of A[t, j]                 A: attention over the whole context
    loss       = mean over pairs of exp(x[k, j]) - u x[k, j],  u = need[k, j] / NEGLIGIBLE, divided by the mean of u

whose minimum is exp(x) = the expected u: a Poisson regression, in which rare large needs count by their size. A threshold on x then keeps
what may be needed by more than NEGLIGIBLE exp(threshold), in all layers by the same measure, whatever share of the context each takes.

Every layer's loss concerns what decides in that layer alone, so nothing is propagated back through the network.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

NEGLIGIBLE = 1e-4  # a share of attention
# Pairs (k, j) with fewer than this share of the text's tokens after k are left out: too little of the future is seen to tell what it needs.
UNSEEN = 0.25


@torch.no_grad()
def future_need(query: Tensor, key: Tensor, scale: float | None, allowed: Tensor) -> Tensor:
    """need[k, j], (batch, length, length) float32; 0 where no later token may look at j.

    Args:
        query: (batch, heads, length, head_dim).
        key: (batch, kv_heads, length, head_dim).
        allowed: (batch or 1, length, length) bool, who may look at whom: a token at itself, at least.
    """
    batch, heads, length, head_dim = query.shape
    groups = heads // key.shape[1]
    over_root: float = head_dim**-0.5 if scale is None else scale
    mask = torch.zeros(batch, length, length, device=query.device).masked_fill_(~allowed, -torch.inf)
    largest = torch.zeros_like(mask)
    for head in range(heads):  # one at a time: all together are the largest tensors of a step
        scores = torch.baddbmm(mask, query[:, head].float(), key[:, head // groups].float().mT, alpha=over_root)
        largest.add_(scores.softmax(-1), alpha=1 / heads)
    reach = 1
    while reach < length:  # row k holds the largest of rows k to k + reach - 1; five times as fast as cummax, which keeps places
        torch.maximum(largest[:, :-reach], largest[:, reach:].clone(), out=largest[:, :-reach])
        reach *= 2
    return torch.cat((largest[:, 1:], torch.zeros_like(largest[:, :1])), dim=1)


def need_loss(x: Tensor, need: Tensor, pairs: Tensor) -> Tensor:
    """The loss above of x (batch, length, length) over the pairs (batch or 1, length, length) bool: a scalar, 0 where none is needed."""
    u = need / NEGLIGIBLE
    total = torch.where(pairs, x.exp() - u * x, 0.0).sum()
    return total / torch.where(pairs, u, 0.0).sum().clamp_min(1.0)


def taught(
    scores: Callable[..., Tensor],
    made_of: tuple[Tensor, ...],
    decided: Tensor,
    query: Tensor,
    key: Tensor,
    scale: float | None,
    allowed: Tensor,
) -> Tensor:
    """The loss of one layer, with gradient to what its decisions are made of; no tensor of length^2 is held for it.

    Args:
        scores: `made_of` -> x, (batch, length, length).
        decided: (batch or 1, length, length) bool, pairs on which there is a decision; those of which less than UNSEEN of k's own text
            follows on k are left out here.
        query, key, scale, allowed: of `future_need`.
    """
    followers = allowed.sum(1) - 1  # how many later tokens see k
    text = allowed.sum(2) + followers  # and how long k's own text is, of several packed in a row
    pairs = decided & allowed & (followers >= UNSEEN * text)[:, :, None]
    need = future_need(query, key, scale, allowed)
    # hooks that do nothing: those of activation checkpointing would run the block again for this graph, which is gone in a moment
    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor, lambda tensor: tensor):
        leaves = [part.detach().requires_grad_() for part in made_of]
        loss = need_loss(scores(*leaves), need, pairs)
        gradients = torch.autograd.grad(loss, leaves)
    by_gradient = torch.stack([(part * gradient).sum(dtype=torch.float32) for part, gradient in zip(made_of, gradients, strict=True)]).sum()
    return loss.detach() + by_gradient - by_gradient.detach()
