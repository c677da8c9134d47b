"""Cross-entropy behind the unembedding, in chunks of rows, so that the logits of a whole batch never exist at once.

With hidden states h (rows, width), the unembedding W (vocabulary, width), logits z = h W^T, targets y and counted rows:

    loss   = sum over counted rows of  logsumexp(z) - z_y             `linear_cross_entropy`
    g      = d loss / d z = softmax(z) - onehot(y)                    `logit_derivative`
    VJP    = d <z, g> / d h = g W,   d <z, g> / d W = g^T h           `linear_product`, for any g, held fixed

The last is what Functional-SAM needs (training/sharpness_aware.py): g from one set of weights, the products from another.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORED_TARGET = -100  # a target with this value is not predicted and not counted
CHUNK_ELEMENTS = 2**24  # logits of a chunk: 64 MiB in float32


@dataclass(frozen=True)
class FrozenHead:
    """The derivative of the summed loss to the logits at some weights, to be used at other weights.

    Rebuilt chunk by chunk from what made the logits, `hidden` (batch, length, width) and `weight` (vocabulary, width); or from
    the logits themselves (batch, length, vocabulary), which saves one product and takes vocabulary / width times the memory.

    Attributes:
        targets: (batch, length).
        measured: the product's value is the summed loss at the weights where it is taken, for one product more, and not 0.
    """

    targets: Tensor
    hidden: Tensor | None = None
    weight: Tensor | None = None
    logits: Tensor | None = None
    measured: bool = False

    def derivative(self, rows: slice) -> Tensor:
        """d loss / d logits of some of the batch x length rows: (rows, vocabulary), float32."""
        if self.logits is not None:
            return logit_derivative(self.logits.flatten(0, 1)[rows], self.targets.flatten()[rows])
        assert self.hidden is not None and self.weight is not None
        return logit_derivative(F.linear(self.hidden.flatten(0, 1)[rows], self.weight), self.targets.flatten()[rows])


def logit_derivative(logits: Tensor, targets: Tensor) -> Tensor:
    """d (summed cross-entropy) / d logits (rows, vocabulary) for targets (rows,): at least float32, 0 in rows not counted."""
    counted = targets != IGNORED_TARGET
    derivative = torch.softmax(logits.to(_wide(logits)), dim=-1)
    # one is taken off at the target; a row that is not counted has its target at 0 for the moment, and is then emptied
    derivative.scatter_add_(-1, targets.clamp_min(0)[:, None], -torch.ones_like(derivative[:, :1]))
    return derivative.mul_(counted[:, None])


def linear_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Summed cross-entropy in nats of logits hidden W^T, a float32 scalar; for measuring: no gradient flows.

    hidden (batch, length, width), weight (vocabulary, width), targets (batch, length).
    """
    hidden, targets = hidden.detach().flatten(0, 1), targets.flatten()
    loss = torch.zeros((), dtype=torch.float32, device=hidden.device)
    for rows in _chunks(len(hidden), len(weight)):
        logits = F.linear(hidden[rows], weight.detach())
        logits = logits.to(_wide(logits))
        loss += F.cross_entropy(logits, targets[rows], ignore_index=IGNORED_TARGET, reduction="sum")
    return loss


def linear_product(hidden: Tensor, weight: Tensor, frozen: FrozenHead) -> Tensor:
    """A float32 scalar whose gradient is that of <hidden W^T, g>, with g = `frozen.derivative` held fixed.

    Its value is not that product, which nobody needs, but 0 or, if `frozen.measured`, the summed cross-entropy of hidden W^T.

    Args:
        hidden: (batch, length, width).
        weight: (vocabulary, width).
    """
    product: Tensor = _LinearProduct.apply(hidden, weight, frozen)  # pyright: ignore[reportAssignmentType]
    return product


class _LinearProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, frozen: FrozenHead) -> Tensor:  # type: ignore[override]
        # The weight is saved as the parameter itself: under ZeRO-3 it is gathered again for the backward pass.
        ctx.save_for_backward(hidden, weight)
        ctx.frozen = frozen
        return linear_cross_entropy(hidden, weight, frozen.targets) if frozen.measured else hidden.new_zeros((), dtype=torch.float32)

    @staticmethod
    def backward(ctx, scale: Tensor) -> tuple[Tensor, Tensor, None]:  # type: ignore[override]
        hidden, weight = ctx.saved_tensors
        rows_of_hidden = hidden.flatten(0, 1)
        to_hidden = torch.empty_like(rows_of_hidden)
        # chunks add up in float32, as one product over all rows does inside
        to_weight = torch.zeros(weight.shape, dtype=_wide(weight), device=weight.device)
        for rows in _chunks(len(rows_of_hidden), len(weight)):
            g = (ctx.frozen.derivative(rows) * scale).to(weight.dtype)
            to_hidden[rows] = g @ weight
            to_weight += g.T @ rows_of_hidden[rows]
        return to_hidden.view_as(hidden), to_weight.to(weight.dtype), None


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


def _chunks(rows: int, vocabulary: int) -> Iterator[slice]:
    size = max(1, CHUNK_ELEMENTS // vocabulary)
    return (slice(first, min(first + size, rows)) for first in range(0, rows, size))
