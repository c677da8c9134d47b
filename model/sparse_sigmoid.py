"""The sparse sigmoid: how likely a token is kept, exactly 0 and exactly 1 outside a bounded interval.

sigma_alpha(x) is the first component of alpha-entmax of (x, 0) (arXiv 1905.05702), used so by arXiv 2305.15805. With a = alpha - 1, p
solves

    p^a - (1 - p)^a = a x,      p = 1 from x = 1 / a on,  p = 0 up to x = -1 / a
    dp / dx = 1 / (p^(alpha - 2) + (1 - p)^(alpha - 2))   in between, 0 outside

The equation has a closed form for alpha 1.5, 2, 3, 4 and 5; alpha 1 is the logistic sigmoid and infinity a step. Any other alpha is solved
by Newton's method, for the power of whichever of p and 1 - p keeps the slope of the equation between 1 and 2.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from model.config import SMALLEST_ALPHA

_NEWTON_STEPS = 40  # at most; 4 to 8 do nearly always


def sparse_sigmoid(x: Tensor, alpha: float) -> Tensor:
    """sigma_alpha(x), of any shape, in x's dtype; with its gradient.

    Args:
        alpha: 1 (logistic), at least 1.01, or infinity: 1 where x > 0, else 0, without a gradient.

    Raises:
        ValueError: another alpha.
    """
    if not alpha >= 1 or 1 < alpha < SMALLEST_ALPHA:
        raise ValueError(f"alpha {alpha}: expected 1, or at least {SMALLEST_ALPHA}")
    if alpha == 1:
        return torch.sigmoid(x)
    if math.isinf(alpha):
        return (x > 0).to(x.dtype)
    result: Tensor = _SparseSigmoid.apply(x, alpha)  # pyright: ignore[reportAssignmentType]
    return result


def _smaller_at_3_halves(x: Tensor) -> Tensor:
    """1/2 - (s/2) sqrt(2 - s^2) with s = x / 2, multiplied out so that no near numbers are subtracted."""
    s = (x / 2).clamp(max=1.0)
    return (1 - s * s) ** 2 / 2 / (1 + s * torch.sqrt(2 - s * s))


CLOSED_FORMS: dict[float, Callable[[Tensor], Tensor]] = {  # alpha -> 1 - sigma_alpha(x), for 0 <= x < 1 / (alpha - 1)
    1.5: _smaller_at_3_halves,
    2.0: lambda x: (1 - x) / 2,
    3.0: lambda x: (1 - 2 * x) / 2,
    4.0: lambda x: 0.5 - torch.sinh(torch.asinh(6 * x) / 3),
    5.0: lambda x: 0.5 - torch.sinh(torch.asinh(12 * math.sqrt(3) * x) / 3) / math.sqrt(3),
}


class _SparseSigmoid(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, alpha: float) -> Tensor:  # type: ignore[override]
        # The smaller of p and 1 - p is what is solved for, since it is what has digits to lose.
        smaller = _smaller(x.abs(), alpha)
        p = torch.where(x > 0, 1 - smaller, smaller)
        ctx.save_for_backward(smaller)
        ctx.alpha = alpha
        return p

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        (smaller,) = ctx.saved_tensors
        exponent = ctx.alpha - 2
        if exponent < 0:  # multiplied through by smaller^-exponent, which then vanishes with it
            power = smaller.pow(-exponent)
            slope = power / (1 + power * (1 - smaller).pow(exponent))
        else:
            slope = 1 / (smaller.pow(exponent) + (1 - smaller).pow(exponent))
        return torch.where(smaller > 0, gradient * slope, 0), None


def _smaller(x: Tensor, alpha: float) -> Tensor:
    """1 - sigma_alpha(x) for x >= 0, in [0, 1/2]."""
    a = alpha - 1
    inside = x < 1 / a
    if alpha in CLOSED_FORMS:
        smaller = CLOSED_FORMS[alpha](x)
    elif x.is_cuda:  # everywhere, since choosing would have it wait
        smaller = _solve(torch.where(inside, x, 0), a)
    else:
        smaller = torch.zeros_like(x)
        smaller[inside] = _solve(x[inside], a)
    return torch.where(inside, smaller, 0).clamp(0, 0.5)


def _solve(x: Tensor, a: float) -> Tensor:
    """q in (0, 1/2] with (1 - q)^a - q^a = a x, for x in [0, 1 / a)."""
    if x.numel() == 0:
        return x
    tolerance, every = 4 * torch.finfo(x.dtype).eps, 4 if x.is_cuda else 1  # a look at how far it is has a GPU wait
    target = a * x
    if a >= 1:  # unknown P = p^a: P - (1 - P^(1/a))^a - a x has slope 1 + (q / p)^(a - 1)
        unknown = target.clamp(min=0.5**a)
        for number in range(1, _NEWTON_STEPS + 1):
            p = unknown.pow(1 / a)
            q = 1 - p
            step = (unknown - q.pow(a) - target) / (1 + (q / p).pow(a - 1))
            unknown = (unknown - step).clamp(0.5**a, 1)
            if number % every == 0 and (step.abs() <= tolerance * unknown).all():
                break
        return 1 - unknown.pow(1 / a)
    unknown = (1 - target).clamp(0, 0.5**a)  # Q = q^a: Q - (1 - Q^(1/a))^a + a x has slope 1 + (q / p)^(1 - a)
    for number in range(1, _NEWTON_STEPS + 1):
        q = unknown.pow(1 / a)
        # 1 - p^a without the difference of near numbers
        step = (unknown + torch.expm1(a * torch.log1p(-q)).neg() - (1 - target)) / (1 + (q / (1 - q)).pow(1 - a))
        unknown = (unknown - step).clamp(0, 0.5**a)
        if number % every == 0 and (step.abs() <= tolerance * unknown.clamp(min=torch.finfo(x.dtype).tiny)).all():
            break
    return unknown.pow(1 / a)
