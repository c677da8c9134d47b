"""Cross-entropy behind the unembedding, in chunks of rows, so that the logits of a whole batch never exist at once.

With hidden states h (rows, width), the unembedding W (vocabulary, width), logits z = h W^T, targets y and counted rows:

    loss   = sum over counted rows of  logsumexp(z) - z_y             `linear_cross_entropy`, with its gradients
    g      = d loss / d z = softmax(z) - onehot(y)                    `logit_derivative_`
    VJP    = d <z, g> / d h = g W,   d <z, g> / d W = g^T h           `linear_product`, for any g, held fixed

The last is what Functional-SAM needs (training/sharpness_aware.py): g from one set of weights, the products from another.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

IGNORED_TARGET = -100  # a target with this value is not predicted and not counted
# Logits of a chunk. On a CPU they stay in its cache, 16 MiB in float32 (docs/performance.md has the measurement); a GPU needs thousands
# of rows for its products to be worth more than the adding up of the unembedding's gradient: 512 MiB. (Not measured on one.)
CHUNK_ELEMENTS = {"cpu": 2**22, "cuda": 2**27}


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

    def derivative(self, rows: slice, room: _Room) -> Tensor:
        """d loss / d logits of some of the batch x length rows: (rows, vocabulary), at least float32, in the room's wide part."""
        if self.logits is not None:
            wide = room.wide[: rows.stop - rows.start].copy_(self.logits.flatten(0, 1)[rows])
        else:
            assert self.hidden is not None and self.weight is not None
            wide = room.widened(room.product(self.hidden.flatten(0, 1)[rows], self.weight))
        return logit_derivative_(wide, self.targets.flatten()[rows])


class _Room:
    """Memory for the logits of a chunk, in their own dtype and at least in float32, that one chunk after another is written to.

    New memory of this size comes to a CPU page by page, and takes as long as what is done in it. Where both dtypes are one there is one
    tensor: what is made of logits takes their place.
    """

    def __init__(self, hidden: Tensor, weight: Tensor, wide: torch.dtype) -> None:
        """For the chunks of hidden (rows, width) and weight (vocabulary, width); `wide`: the dtype that logits are widened to."""
        shape = min(len(hidden), chunk_rows(len(weight), weight.device.type)), len(weight)
        self.narrow = torch.empty(shape, dtype=weight.dtype, device=weight.device)
        self.wide = self.narrow if weight.dtype == wide else torch.empty(shape, dtype=wide, device=weight.device)

    def product(self, hidden: Tensor, weight: Tensor) -> Tensor:
        """The logits of a chunk's rows, hidden W^T."""
        return torch.mm(hidden, weight.T, out=self.narrow[: len(hidden)])

    def widened(self, logits: Tensor) -> Tensor:
        """What `product` returned, at least in float32; it may be overwritten."""
        return logits if self.wide is self.narrow else self.wide[: len(logits)].copy_(logits)

    def narrowed(self, wide: Tensor, dtype: torch.dtype) -> Tensor:
        """Something in the wide part, in the dtype of the products to come: there, or in the narrow part."""
        return wide if wide.dtype == dtype else self.narrow[: len(wide)].copy_(wide)


def logit_derivative_(logits: Tensor, targets: Tensor) -> Tensor:
    """d (summed cross-entropy) / d logits (rows, vocabulary) for targets (rows,), put in the place of the logits; 0 in rows not counted."""
    counted = targets != IGNORED_TARGET
    derivative = torch.softmax(logits, dim=-1, out=logits)  # a row is read to its end before it is written
    # one is taken off at the target; a row that is not counted has its target at 0 for the moment, and is then emptied
    derivative.scatter_add_(-1, targets.clamp_min(0)[:, None], -torch.ones_like(derivative[:, :1]))
    return derivative.mul_(counted[:, None])


def loss_and_derivative_(logits: Tensor, targets: Tensor) -> Tensor:
    """The summed cross-entropy of logits (rows, vocabulary), whose derivative takes their place.

    Written to be compiled: two passes over the logits and nothing of their size beside them, where operation by operation it is a dozen
    passes, most of them in float32.
    """
    wide, at = logits.to(_wide(logits)), targets.clamp_min(0)[:, None]
    counted = (targets != IGNORED_TARGET)[:, None]
    normalizer = torch.logsumexp(wide, dim=-1, keepdim=True)
    loss = torch.where(counted, normalizer - wide.gather(-1, at), 0.0).sum()
    hit = torch.arange(logits.shape[1], device=logits.device) == at
    logits.copy_(((wide - normalizer).exp() - hit.to(wide.dtype)) * counted)
    return loss


@functools.cache
def compiled_loss_and_derivative() -> Callable[[Tensor, Tensor], Tensor]:
    return torch.compile(loss_and_derivative_)


def linear_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor, logits: Tensor | None = None, compiled: bool = False) -> Tensor:
    """Summed cross-entropy in nats of logits hidden W^T, a float32 scalar whose gradient flows to hidden and weight.

    Where a gradient will be asked for it is made here, chunk by chunk, while the chunk's logits are at hand, and only multiplied by
    the incoming scalar later: no product is taken twice, and what waits for the backward pass has the sizes of `hidden` and `weight`.
    It can be asked for once.

    Args:
        hidden: (batch, length, width).
        weight: (vocabulary, width).
        targets: (batch, length); `IGNORED_TARGET` where nothing counts.
        logits: (batch, length, vocabulary), to be filled with the logits.
        compiled: where there are gradients, a chunk's loss and derivative are one kernel of torch.compile's.
    """
    if not torch.is_grad_enabled():  # which autograd's functions are not told: they would make gradients that nobody takes
        hidden, weight = hidden.detach(), weight.detach()
    loss: Tensor = _LinearCrossEntropy.apply(hidden, weight, targets, logits, compiled)  # pyright: ignore[reportAssignmentType]
    return loss


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, targets: Tensor, kept: Tensor | None, compiled: bool) -> Tensor:  # type: ignore[override]
        to_hidden_wanted, to_weight_wanted = ctx.needs_input_grad[:2]
        kind, types = hidden.device.type, (hidden.dtype, weight.dtype)
        if torch.is_autocast_enabled(kind):
            hidden, weight = hidden.to(torch.get_autocast_dtype(kind)), weight.to(torch.get_autocast_dtype(kind))
        with torch.autocast(kind, enabled=False):
            shape, hidden, targets = hidden.shape, hidden.flatten(0, 1), targets.flatten()
            counted = (targets != IGNORED_TARGET)[:, None]
            loss = torch.zeros((), dtype=torch.float32, device=hidden.device)
            to_hidden = torch.empty_like(hidden) if to_hidden_wanted else None
            to_weight = torch.zeros(weight.shape, dtype=_wide(weight), device=weight.device) if to_weight_wanted else None
            compiled &= to_hidden_wanted or to_weight_wanted
            room = _Room(hidden, weight, weight.dtype if compiled else _wide(weight))
            for rows in _chunks(hidden, weight):
                logits = room.product(hidden[rows], weight)
                if kept is not None:
                    kept.flatten(0, 1)[rows] = logits
                if compiled:
                    loss += compiled_loss_and_derivative()(logits, targets[rows])
                    derivative = logits
                else:
                    wide = room.widened(logits)
                    log_probabilities = torch.log_softmax(wide, dim=-1, out=wide)  # a row is read to its end before it is written
                    loss += F.nll_loss(log_probabilities, targets[rows], ignore_index=IGNORED_TARGET, reduction="sum")
                    if to_hidden is None and to_weight is None:
                        continue
                    derivative = log_probabilities.exp_()
                    # one is taken off at the target; what a row that is not counted gives is emptied where it is narrow
                    derivative.scatter_add_(-1, targets[rows].clamp_min(0)[:, None], -torch.ones_like(derivative[:, :1]))
                    derivative = room.narrowed(derivative, weight.dtype)
                if to_hidden is not None:
                    torch.mm(derivative, weight, out=to_hidden[rows])
                    to_hidden[rows] *= counted[rows]
                if to_weight is not None:
                    _add_product(to_weight, derivative, hidden[rows] * counted[rows])
        ctx.save_for_backward(None if to_hidden is None else to_hidden.view(shape).to(types[0]), to_weight)
        ctx.weight_dtype = types[1]
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx, scale: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:  # type: ignore[override]
        # in place, so autograd itself refuses a second backward pass
        to_hidden, to_weight = (None if gradient is None else gradient.mul_(scale) for gradient in ctx.saved_tensors)
        return to_hidden, None if to_weight is None else to_weight.to(ctx.weight_dtype), None, None, None


def _add_product(total: Tensor, derivative: Tensor, hidden: Tensor) -> None:
    """total += derivative^T hidden; chunks add up in float32, as one product over all rows does inside."""
    if total.dtype == derivative.dtype:
        total.addmm_(derivative.T, hidden)
    else:
        total += derivative.T @ hidden


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
        if not frozen.measured:
            return hidden.new_zeros((), dtype=torch.float32)
        return linear_cross_entropy(hidden.detach(), weight.detach(), frozen.targets)

    @staticmethod
    def backward(ctx, scale: Tensor) -> tuple[Tensor, Tensor, None]:  # type: ignore[override]
        hidden, weight = ctx.saved_tensors
        rows_of_hidden = hidden.flatten(0, 1)
        to_hidden = torch.empty_like(rows_of_hidden)
        to_weight = torch.zeros(weight.shape, dtype=_wide(weight), device=weight.device)
        frozen: FrozenHead = ctx.frozen
        # logits come from the frozen weight, which is narrower than the one here with `float32_second_pass`
        room = _Room(rows_of_hidden, weight if frozen.weight is None else frozen.weight, _wide(weight))
        for rows in _chunks(rows_of_hidden, weight):
            g = room.narrowed(frozen.derivative(rows, room).mul_(scale), weight.dtype)
            torch.mm(g, weight, out=to_hidden[rows])
            _add_product(to_weight, g, rows_of_hidden[rows])
        return to_hidden.view_as(hidden), to_weight.to(weight.dtype), None


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


def _chunks(hidden: Tensor, weight: Tensor) -> Iterator[slice]:
    """Rows of hidden (rows, width), as many at a time as `chunk_rows` says."""
    size = chunk_rows(len(weight), hidden.device.type)
    return (slice(first, min(first + size, len(hidden))) for first in range(0, len(hidden), size))


def chunk_rows(vocabulary: int, device: str) -> int:
    """Rows whose logits exist at once on that kind of device."""
    return max(1, CHUNK_ELEMENTS.get(device, CHUNK_ELEMENTS["cuda"]) // vocabulary)
