"""The sparse sigmoid and its gradient against bisection in float64, the closed forms' values, and finite differences."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from model.sparse_sigmoid import CLOSED_FORMS, sparse_sigmoid

ALPHAS = (*CLOSED_FORMS, 1.01, 1.05, 1.2, 1.7, 1.999, 2.3, 3.5, 6.0, 8.0, 13.0, 25.0, 64.0)


def points(alpha: float) -> Tensor:
    """Over the support and a little beyond, and close to the middle, where large alphas are steep."""
    edge = 1 / (alpha - 1)
    near = torch.logspace(-17, 0, 200, dtype=torch.float64) * edge
    return torch.cat((torch.linspace(-1.1 * edge, 1.1 * edge, 4001, dtype=torch.float64), near, -near))


def by_bisection(x: Tensor, alpha: float) -> tuple[Tensor, Tensor]:
    """(p, dp/dx) from the equation alone: q = 1 - p at |x| is found between 0 and 1/2, bit by bit."""
    a, low, high = alpha - 1, torch.zeros_like(x), torch.full_like(x, 0.5)
    for _ in range(1100):  # down to the smallest number there is
        middle = (low + high) / 2
        above = (1 - middle) ** a - middle**a > a * x.abs()
        low, high = torch.where(above, middle, low), torch.where(above, high, middle)
    q = torch.where(x.abs() >= 1 / a, 0.0, (low + high) / 2)
    slope = torch.where(q > 0, 1 / (q ** (alpha - 2) + (1 - q) ** (alpha - 2)), 0.0)
    return torch.where(x > 0, 1 - q, q), slope


@pytest.mark.parametrize("alpha", ALPHAS)
def test_value_and_gradient_are_those_of_bisection(alpha: float) -> None:
    x = points(alpha).requires_grad_()
    p = sparse_sigmoid(x, alpha)
    (slope,) = torch.autograd.grad(p.sum(), x)
    expected, expected_slope = by_bisection(x.detach(), alpha)
    torch.testing.assert_close(p.detach(), expected, rtol=0, atol=1e-12)
    # slopes reach 2^61 at alpha 64: as a share of the largest
    torch.testing.assert_close(slope / expected_slope.max(), expected_slope / expected_slope.max(), rtol=1e-10, atol=1e-12)
    assert (slope[x.detach().abs() >= 1 / (alpha - 1)] == 0).all()  # outside the support a pair says nothing


@pytest.mark.parametrize("alpha", [1.0, 1.3, 1.5, 2.0, 2.7, 4.0, 8.0])
def test_gradient_by_finite_differences(alpha: float) -> None:
    edge = 1 / max(alpha - 1, 0.3)
    x = torch.linspace(-0.93 * edge, 0.91 * edge, 40, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: sparse_sigmoid(x, alpha), x, eps=1e-7, atol=1e-5)


def test_logistic_and_step_are_the_two_ends() -> None:
    x = torch.tensor([-3.0, -1e-9, 0.0, 1e-9, 2.0], dtype=torch.float64)
    torch.testing.assert_close(sparse_sigmoid(x, 1.0), 1 / (1 + torch.exp(-x)))
    assert sparse_sigmoid(x, math.inf).tolist() == [0, 0, 0, 1, 1]
    # alpha towards its ends goes towards these
    assert (sparse_sigmoid(x, 1.01) - sparse_sigmoid(x, 1.0)).abs().max() < 5e-3
    far = torch.tensor([-0.02, 0.02])
    assert sparse_sigmoid(far, 64.0).tolist() == [0.0, 1.0]


@pytest.mark.parametrize("alpha", [1.5, 2.7, 1.02, 4.0, 8.0])
def test_float32_is_float64_to_its_own_precision(alpha: float) -> None:
    x = points(alpha)
    torch.testing.assert_close(sparse_sigmoid(x.float(), alpha).double(), sparse_sigmoid(x.float().double(), alpha), rtol=0, atol=2e-5)


def test_other_alphas_are_refused() -> None:
    for alpha in (0.5, 1.001, -1.0, math.nan):
        with pytest.raises(ValueError, match=r"expected 1, or at least 1\.01"):
            sparse_sigmoid(torch.zeros(1), alpha)
