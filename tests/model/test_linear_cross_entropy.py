"""Chunked cross-entropy and the products of Functional-SAM, against whole logits and exact Hessian and Gauss-Newton products."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import functional_call, jvp
from torch.nn.attention import SDPBackend, sdpa_kernel

import model.linear_cross_entropy
from model.config import ModelConfig
from model.linear_cross_entropy import FrozenHead, linear_cross_entropy, linear_product, logit_derivative
from model.parametrization import initialize
from model.transformer import Transformer

ROWS, WIDTH, VOCAB = (2, 5), 6, 11


@pytest.fixture(params=[1, 3, 10, 1000])
def chunked(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of one row, of a number that does not divide, of all rows, and larger than that."""
    monkeypatch.setattr(model.linear_cross_entropy, "CHUNK_ELEMENTS", request.param * VOCAB)


def head(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(*ROWS, WIDTH, generator=generator, dtype=torch.float64)
    weight = torch.randn(VOCAB, WIDTH, generator=generator, dtype=torch.float64)
    targets = torch.randint(VOCAB, ROWS, generator=generator)
    targets[0, 2:4] = -100
    return hidden, weight, targets


def test_the_derivative_is_autograds() -> None:
    hidden, weight, targets = head()
    logits = F.linear(hidden, weight).requires_grad_()
    loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-100, reduction="sum")
    (expected,) = torch.autograd.grad(loss, logits)
    derivative = logit_derivative(logits.detach().flatten(0, 1), targets.flatten())
    torch.testing.assert_close(derivative, expected.flatten(0, 1))
    assert (derivative.view(*ROWS, VOCAB)[targets == -100] == 0).all()


@pytest.mark.usefixtures("chunked")
def test_the_chunked_loss_is_the_loss() -> None:
    hidden, weight, targets = head()
    expected = F.cross_entropy(F.linear(hidden, weight).flatten(0, 1), targets.flatten(), ignore_index=-100, reduction="sum")
    assert linear_cross_entropy(hidden, weight, targets).item() == pytest.approx(expected.item(), rel=1e-6)


@pytest.mark.usefixtures("chunked")
@pytest.mark.parametrize("stored", [False, True])
def test_the_product_with_a_frozen_derivative(stored: bool) -> None:
    """Gradients of 0.7 <h W^T, g0> with g0 from another h and W, rebuilt or from stored logits: those of the whole product."""
    hidden, weight, targets = head(1)
    hidden0, weight0, _ = head(2)
    logits = F.linear(hidden0, weight0)
    frozen = FrozenHead(targets, logits=logits) if stored else FrozenHead(targets, hidden=hidden0, weight=weight0)
    g = logit_derivative(logits.flatten(0, 1), targets.flatten()).view_as(logits)
    hidden.requires_grad_()
    weight.requires_grad_()
    expected = torch.autograd.grad(0.7 * (F.linear(hidden, weight) * g).sum(), (hidden, weight))
    product = 0.7 * linear_product(hidden, weight, frozen)
    assert product.item() == 0
    torch.testing.assert_close(torch.autograd.grad(product, (hidden, weight)), expected)


def test_a_measured_product_is_the_loss_here() -> None:
    hidden, weight, targets = head(1)
    frozen = FrozenHead(targets, logits=F.linear(*head(2)[:2]), measured=True)
    expected = F.cross_entropy(F.linear(hidden, weight).flatten(0, 1), targets.flatten(), ignore_index=-100, reduction="sum")
    assert linear_product(hidden, weight, frozen).item() == pytest.approx(expected.item(), rel=1e-6)


@pytest.mark.parametrize("tied", [False, True])
def test_the_two_differences_are_gauss_newton_and_the_rest(tied: bool) -> None:
    """(g_sam - g_fsam) / rho -> G e and (g_fsam - g) / rho -> (H - G) e, in float64, with errors that shrink with rho.

    H e and G e are exact: double backward, and J^T H_F J e with a forward-mode derivative of the logits.
    """
    config = ModelConfig(width=12, depth=2, heads=2, vocab_size=13, sequence_length=7, tied_embeddings=tied, init_std=0.3)
    network = Transformer(config)
    initialize(network, seed=0)
    network.double()
    generator = torch.Generator().manual_seed(0)
    tokens, targets = torch.randint(13, (3, 7), generator=generator), torch.randint(13, (3, 7), generator=generator)
    weights = {name: p.detach().clone() for name, p in network.named_parameters()}

    def logits(at: dict[str, Tensor]) -> Tensor:
        return functional_call(network, at, (tokens,), tie_weights=True)

    def loss(at: dict[str, Tensor]) -> Tensor:
        return F.cross_entropy(logits(at).flatten(0, 1), targets.flatten(), reduction="sum")

    def gradient(at: dict[str, Tensor], frozen: FrozenHead | None = None) -> dict[str, Tensor]:
        leaves = {name: w.clone().requires_grad_() for name, w in at.items()}
        value = loss(leaves) if frozen is None else functional_call(network, leaves, (tokens, targets, None, frozen), tie_weights=True)
        return dict(zip(leaves, torch.autograd.grad(value, list(leaves.values())), strict=True))

    def distance(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
        return float(torch.stack([(a[n] - b[n]).pow(2).sum() for n in a]).sum().sqrt())

    plain = gradient(weights)
    norm = float(torch.stack([g.pow(2).sum() for g in plain.values()]).sum().sqrt())
    e = {name: g / norm for name, g in plain.items()}
    with sdpa_kernel(SDPBackend.MATH):
        leaves = {name: w.clone().requires_grad_() for name, w in weights.items()}
        first = torch.autograd.grad(loss(leaves), list(leaves.values()), create_graph=True)
        hessian = torch.autograd.grad(sum((g * e[n]).sum() for n, g in zip(leaves, first, strict=True)), list(leaves.values()))
        hessian = dict(zip(leaves, hessian, strict=True))
        z, moved = jvp(logits, (weights,), (e,))[:2]
    p = z.softmax(-1)
    curved = p * moved - p * (p * moved).sum(-1, keepdim=True)  # H_F J e of softmax cross-entropy
    gauss_newton = torch.autograd.grad(logits(leaves), list(leaves.values()), curved)
    gauss_newton = dict(zip(leaves, gauss_newton, strict=True))
    rest = {name: hessian[name] - gauss_newton[name] for name in hessian}
    zero = {name: torch.zeros_like(w) for name, w in weights.items()}
    assert distance(gauss_newton, zero) > 0.1 and distance(rest, zero) > 0.1

    errors = []
    frozen = FrozenHead(targets, logits=logits(weights).detach())
    for rho in (1e-2, 1e-3):
        there = {name: w + rho * e[name] for name, w in weights.items()}
        sam, functional = gradient(there), gradient(there, frozen)
        logit_part = {name: (sam[name] - functional[name]) / rho for name in e}
        function_part = {name: (functional[name] - plain[name]) / rho for name in e}
        errors.append((distance(logit_part, gauss_newton), distance(function_part, rest)))
    for coarse, fine in zip(*errors, strict=True):
        assert fine < 0.2 * coarse
        assert fine < 2e-2 * distance(rest, zero)
