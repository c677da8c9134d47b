"""Chunked cross-entropy and the products of Functional-SAM, against whole logits and exact Hessian and Gauss-Newton products."""

from __future__ import annotations

import weakref
from typing import ClassVar

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import functional_call, jvp
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

import model.linear_cross_entropy
from model.config import ModelConfig
from model.linear_cross_entropy import FrozenHead, linear_cross_entropy, linear_product, logit_derivative_, loss_and_derivative_
from model.parametrization import initialize
from model.transformer import Transformer

ROWS, WIDTH, VOCAB = (2, 5), 6, 11


@pytest.fixture(params=[1, 3, 10, 1000])
def chunked(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of one row, of a number that does not divide, of all rows, and larger than that."""
    monkeypatch.setitem(model.linear_cross_entropy.CHUNK_ELEMENTS, "cpu", request.param * VOCAB)


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
    derivative = logit_derivative_(logits.detach().flatten(0, 1).clone(), targets.flatten())
    torch.testing.assert_close(derivative, expected.flatten(0, 1))
    assert (derivative.view(*ROWS, VOCAB)[targets == -100] == 0).all()


@pytest.mark.usefixtures("chunked")
def test_the_chunked_loss_and_its_gradients_are_those_of_whole_logits() -> None:
    hidden, weight, targets = head()
    hidden.requires_grad_()
    weight.requires_grad_()
    expected = F.cross_entropy(F.linear(hidden, weight).flatten(0, 1), targets.flatten(), ignore_index=-100, reduction="sum")
    kept = torch.zeros(*ROWS, VOCAB, dtype=torch.float64)
    loss = linear_cross_entropy(hidden, weight, targets, kept)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    torch.testing.assert_close(torch.autograd.grad(0.7 * loss, (hidden, weight)), torch.autograd.grad(0.7 * expected, (hidden, weight)))
    torch.testing.assert_close(kept, F.linear(hidden, weight).detach())


@pytest.mark.parametrize("frozen", ["hidden", "weight", "both"])
def test_only_the_gradients_that_are_asked_for(frozen: str) -> None:
    hidden, weight, targets = head()
    hidden.requires_grad_(frozen == "weight")
    weight.requires_grad_(frozen == "hidden")
    loss = linear_cross_entropy(hidden, weight, targets)
    assert loss.requires_grad == (frozen != "both")
    if frozen != "both":
        loss.backward()
        assert (hidden.grad is None) == (frozen == "hidden") and (weight.grad is None) == (frozen == "weight")


def test_without_gradients_none_is_made() -> None:
    """Evaluation takes one product of hidden states and unembedding, and keeps nothing of the unembedding's size."""
    hidden, weight, targets = head()

    class Counting(TorchDispatchMode):
        sizes: list[tuple[int, ...]]

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            made = func(*args, **(kwargs or {}))
            self.sizes += [tuple(made.shape)] if isinstance(made, Tensor) else []
            return made

    counting = Counting()
    counting.sizes = []
    with torch.no_grad(), counting:
        loss = linear_cross_entropy(hidden, weight.requires_grad_(), targets)
    assert counting.sizes.count((VOCAB, WIDTH)) <= 1  # the weight itself, detached
    with_gradients = linear_cross_entropy(hidden, weight, targets)
    assert loss.item() == with_gradients.item()


def test_in_bf16_and_under_autocast_it_is_as_near_to_float64_as_whole_logits_are() -> None:
    torch.manual_seed(0)
    hidden, weight, targets = torch.randn(4, 64, 32), torch.randn(500, 32) * 0.2, torch.randint(500, (4, 64))

    def gradients(form: str) -> tuple[Tensor, ...]:
        low = torch.bfloat16 if form in ("chunked", "whole") else torch.float64 if form == "exact" else torch.float32
        h, w = (x.to(torch.bfloat16).to(low).detach().requires_grad_() for x in (hidden, weight))
        with torch.autocast("cpu", torch.bfloat16, enabled=form == "autocast"):
            if form in ("chunked", "autocast"):
                loss = linear_cross_entropy(h, w, targets)
            else:
                logits = F.linear(h, w).flatten(0, 1)
                loss = F.cross_entropy(logits if form == "exact" else logits.float(), targets.flatten(), reduction="sum")
        (loss / targets.numel()).backward()
        assert h.grad is not None and w.grad is not None and h.grad.dtype == w.grad.dtype == low
        return loss.detach().double(), h.grad.double(), w.grad.double()

    exact = gradients("exact")

    def errors(form: str) -> list[float]:
        return [float((a - b).norm() / b.norm()) for a, b in zip(gradients(form), exact, strict=True)]

    for form in ("chunked", "autocast"):
        assert all(ours < 1.3 * whole + 1e-4 for ours, whole in zip(errors(form), errors("whole"), strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("compiled", [False, True])
def test_all_chunks_share_one_place(dtype: torch.dtype, compiled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a chunk's size there is one tensor for all chunks, and in bf16 a float32 one unless compiled."""
    monkeypatch.setitem(model.linear_cross_entropy.CHUNK_ELEMENTS, "cpu", 8 * 300)
    monkeypatch.setattr(model.linear_cross_entropy, "compiled_loss_and_derivative", lambda: lambda logits, targets: logits.new_zeros(()))
    made: dict[int, Tensor] = {}

    class Making(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            out = func(*args, **(kwargs or {}))
            if isinstance(out, Tensor) and out.numel() == 8 * 300:
                made[out.untyped_storage().data_ptr()] = out  # kept, so that no other storage takes the place of this one
            return out

    hidden, weight = torch.randn(1, 64, 16, dtype=dtype, requires_grad=True), torch.randn(300, 16, dtype=dtype, requires_grad=True)
    with Making():
        linear_cross_entropy(hidden, weight, torch.zeros(1, 64, dtype=torch.long), compiled=compiled)
    expected = [dtype] if dtype == torch.float32 or compiled else [dtype, torch.float32]
    assert sorted(map(str, (tensor.dtype for tensor in made.values()))) == sorted(map(str, expected))


def test_compiled_it_is_the_same_and_compiles_once_for_each_size_of_a_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(model.linear_cross_entropy.CHUNK_ELEMENTS, "cpu", 4 * VOCAB)
    torch._dynamo.reset()
    graphs: list[int] = []
    compiled = torch.compile(loss_and_derivative_, backend=lambda graph, inputs: graphs.append(1) or graph.forward)
    monkeypatch.setattr(model.linear_cross_entropy, "compiled_loss_and_derivative", lambda: compiled)
    for seed in range(3):
        hidden, weight, targets = head(seed)
        hidden.requires_grad_()
        weight.requires_grad_()
        expected = F.cross_entropy(F.linear(hidden, weight).flatten(0, 1), targets.flatten(), ignore_index=-100, reduction="sum")
        loss = linear_cross_entropy(hidden, weight, targets, compiled=True)
        assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
        torch.testing.assert_close(torch.autograd.grad(loss, (hidden, weight)), torch.autograd.grad(expected, (hidden, weight)))
        assert 1 <= len(graphs) <= 2  # chunks of 4, 4 and 2 rows
    with torch.no_grad():
        assert linear_cross_entropy(hidden, weight, targets, compiled=True).item() == pytest.approx(expected.item(), rel=1e-6)


def test_a_second_backward_pass_is_refused() -> None:
    hidden, weight, targets = head()
    loss = linear_cross_entropy(hidden.requires_grad_(), weight, targets)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_the_logits_of_all_rows_never_exist(monkeypatch: pytest.MonkeyPatch) -> None:
    """The largest tensor that a training loss makes, seen by the dispatcher: a chunk's, or the unembedding."""

    class Largest(TorchDispatchMode):
        elements = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            for tensor in out if isinstance(out, list | tuple) else [out]:
                if isinstance(tensor, Tensor):
                    Largest.elements = max(Largest.elements, tensor.numel())
            return out

    monkeypatch.setitem(model.linear_cross_entropy.CHUNK_ELEMENTS, "cpu", 8 * 300)
    network = Transformer(ModelConfig(width=16, depth=1, heads=2, vocab_size=300, sequence_length=64))
    initialize(network, seed=0)
    tokens = torch.zeros(4, 64, dtype=torch.long)
    with Largest():
        network(tokens, tokens).backward()
    assert Largest.elements == max(8 * 300, 300 * 16, 4 * 64 * 64)  # chunk, unembedding, the MLP's hidden layer


@pytest.mark.parametrize("low", [torch.float32, torch.bfloat16])
def test_the_chunks_of_a_frozen_product_share_one_place(low: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors with a chunk's rows of logits stand in one place, whatever is made of them; in bf16 in another in float32 as well."""

    class Alive(TorchDispatchMode):
        seen: ClassVar[list[weakref.ref]] = []
        most = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if isinstance(out, Tensor) and out.shape == (8, 300):
                Alive.seen.append(weakref.ref(out))
            places = {tensor.data_ptr() for reference in Alive.seen if (tensor := reference()) is not None}
            Alive.most = max(Alive.most, len(places))
            return out

    monkeypatch.setitem(model.linear_cross_entropy.CHUNK_ELEMENTS, "cpu", 8 * 300)
    hidden, weight = torch.randn(4, 16, 24, dtype=low, requires_grad=True), torch.randn(300, 24, dtype=low, requires_grad=True)
    targets = torch.randint(300, (4, 16))
    frozen = FrozenHead(targets, hidden=torch.randn(4, 16, 24, dtype=low), weight=torch.randn(300, 24, dtype=low))
    with Alive():
        linear_product(hidden, weight, frozen).backward()
    assert len(Alive.seen) >= 8 and Alive.most == (1 if low == torch.float32 else 2)


@pytest.mark.usefixtures("chunked")
@pytest.mark.parametrize("stored", [False, True])
def test_the_product_with_a_frozen_derivative(stored: bool) -> None:
    """Gradients of 0.7 <h W^T, g0> with g0 from another h and W, rebuilt or from stored logits: those of the whole product."""
    hidden, weight, targets = head(1)
    hidden0, weight0, _ = head(2)
    logits = F.linear(hidden0, weight0)
    frozen = FrozenHead(targets, logits=logits) if stored else FrozenHead(targets, hidden=hidden0, weight=weight0)
    g = logit_derivative_(logits.flatten(0, 1).clone(), targets.flatten()).view_as(logits)
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
