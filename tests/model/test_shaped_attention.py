"""Shaped attention and the simplified blocks against their formulas written out with whole matrices, in float64."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from model.activation_checkpointing import ActivationCheckpointing
from model.attention import Attention, Context
from model.blocks import shaped_relu
from model.cache import Cache
from model.config import ModelConfig
from model.errors import InputError
from model.parametrization import initialize, is_decayed, owned_parameters
from model.section import ModelSection
from model.shaped_attention import causal_mean, running_sums, shape_by_blocks
from model.transformer import Transformer

SMALL: dict[str, Any] = {"width": 48, "depth": 3, "heads": 4, "vocab_size": 97, "sequence_length": 40}


def make(**fields: Any) -> Transformer:
    """In float64, with every gain and norm scale drawn at random, so that none can hide."""
    model = Transformer(ModelConfig(**{**SMALL, **fields})).double()
    initialize(model, 0)
    generator = torch.Generator().manual_seed(5)
    for name, module, parameter in owned_parameters(model):
        if not is_decayed(name, module):
            parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        elif name.endswith("query.weight"):
            parameter.data = 0.4 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    return model.eval()


def tokens_of(batch: int = 2, length: int = 40) -> torch.Tensor:
    return torch.randint(0, 97, (batch, length), generator=torch.Generator().manual_seed(1))


def dense(attention: Attention, x: torch.Tensor, x_value: torch.Tensor, allowed: torch.Tensor) -> torch.Tensor:
    """(alpha I + beta A - gamma C) V with A and C as whole matrices; `allowed` (batch, 1, length, length) boolean. No RoPE."""
    batch, length, _ = x.shape

    def heads(y: torch.Tensor) -> torch.Tensor:
        y = y.view(batch, length, -1, attention.head_dim).transpose(1, 2)
        return y.repeat_interleave(attention.heads // y.shape[1], dim=1)

    query, key, value = heads(attention.query(x)), heads(attention.key(x)), heads(attention.value(x_value))
    scores = (query @ key.mT * attention.scale).masked_fill(~allowed, -torch.inf)
    centre = allowed.double() / allowed.sum(dim=-1, keepdim=True)
    alpha, beta, gamma = (g.view(-1, 1, 1) for g in (attention.identity_gain, attention.softmax_gain, attention.centering_gain))
    matrix = alpha * torch.eye(length, dtype=x.dtype) + beta * scores.softmax(-1) - gamma * centre
    return attention.output((matrix @ value).transpose(1, 2).reshape(batch, length, -1))


def allowed_of(document_ids: torch.Tensor, window: int | None = None) -> torch.Tensor:
    """By the plain rule, a pair of tokens at a time."""
    batch, length = document_ids.shape
    allowed = torch.zeros(batch, 1, length, length, dtype=torch.bool)
    for b in range(batch):
        for i in range(length):
            for j in range(i + 1):
                allowed[b, 0, i, j] = document_ids[b, i] == document_ids[b, j] and (window is None or i - j < window)
    return allowed


DOCUMENTS = torch.tensor([[0] * 5 + [1] + [2] * 14 + [3] * 20, [7] * 40])
PADDED_LEFT = torch.tensor([[0] * 9 + [1] * 31, [1] * 40])


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize(("document_ids", "window"), [(None, None), (DOCUMENTS, None), (PADDED_LEFT, None), (None, 7), (DOCUMENTS, 7)])
def test_decomposed_equals_dense_forward_and_backward(kv_heads: int, document_ids: torch.Tensor | None, window: int | None) -> None:
    model = make(attention="shaped", kv_heads=kv_heads, positions="learned", attention_window=window)
    attention: Attention = model.blocks[0].attention  # pyright: ignore
    x = torch.randn(2, 40, 48, dtype=torch.float64, generator=torch.Generator().manual_seed(2)).requires_grad_()
    weight = torch.randn(2, 40, 48, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    inputs = [x, *attention.parameters()]
    ours = attention(x, x, model._context(0, 40, document_ids, x))
    allowed = allowed_of(torch.zeros(2, 40) if document_ids is None else document_ids, window)
    theirs = dense(attention, x, x, allowed)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)
    for a, b in zip(torch.autograd.grad((weight * ours).sum(), inputs), torch.autograd.grad((weight * theirs).sum(), inputs), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


def test_zero_queries_and_equal_gains_leave_values_alone() -> None:
    """At initialisation A = C, so attention is the identity of alpha V: no token mixing."""
    model = Transformer(ModelConfig(**SMALL, attention="shaped")).double()
    initialize(model, 0)
    attention: Attention = model.blocks[1].attention  # pyright: ignore
    assert not attention.query.weight.any() and attention.key.weight.any()
    x = torch.randn(2, 40, 48, dtype=torch.float64)
    torch.testing.assert_close(attention(x, x, Context()), attention.output(attention.value(x)), rtol=0, atol=1e-14)


def test_fixed_gains_are_gains_of_one() -> None:
    free = Transformer(ModelConfig(**SMALL, attention="shaped", query_init="normal", init_std=0.3)).double()
    fixed = Transformer(ModelConfig(**SMALL, attention="shaped", query_init="normal", init_std=0.3, attention_gains="fixed")).double()
    initialize(free, 0)
    initialize(fixed, 0)
    assert not [name for name, _ in fixed.named_parameters() if "gain" in name]
    torch.testing.assert_close(fixed(tokens_of()), free(tokens_of()), rtol=0, atol=1e-12)


def test_temperature_gives_scores_of_variance_v_squared_over_tau0_squared_n() -> None:
    """With weights of variance 1 / n: Var(L_ab) = V_aa V_bb / (tau0^2 n), V = X X^T / n, whatever the number of heads."""
    width, tau0, measured = 64, 0.7, []
    for seed in range(400):
        model = Transformer(ModelConfig(64, 1, 4, 11, 8, attention="shaped", attention_temperature=tau0, init_std=width**-0.5))
        initialize(model, seed)
        attention: Attention = model.blocks[0].attention  # pyright: ignore
        x = torch.randn(2, width, generator=torch.Generator().manual_seed(0)) * torch.tensor([[1.0], [2.0]])
        query, key = (linear(x).view(2, 4, 16).transpose(0, 1) for linear in (attention.query, attention.key))
        measured.append(query @ key.mT * attention.scale)
    variance = torch.stack(measured).square().mean(dim=(0, 1))
    v = x.square().mean(dim=1)
    torch.testing.assert_close(variance, v[:, None] * v / (tau0**2 * width), rtol=0.15, atol=0)


def test_mean_of_bf16_values_is_accumulated_in_float32() -> None:
    value = torch.ones(1, 4096, 2, dtype=torch.bfloat16)  # bf16 would stop at 256
    assert causal_mean(value, None, 4096).dtype == torch.float32
    assert (causal_mean(value, None, 4096) == 1).all()


def test_documents_far_into_a_sequence_keep_their_mean() -> None:
    """Sums over all that came before are large; their difference must not lose the small document at the end."""
    value = torch.full((1, 20000, 1), 1000.1)
    value[:, -3:] = 1e-3
    starts = torch.full((1, 3), 19997)
    torch.testing.assert_close(causal_mean(value, starts, 3), torch.full((1, 3, 1), 1e-3), rtol=1e-3, atol=0)


@pytest.mark.parametrize("tokens", [1, 63, 64, 65, 128, 150, 200])
def test_running_sums_by_blocks_are_running_sums(tokens: int) -> None:
    """And their gradient is the sum from each token on."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, tokens, 3, dtype=torch.float64, generator=generator).requires_grad_()
    toward = torch.randn(2, tokens, 3, dtype=torch.float64, generator=generator)
    sums = running_sums(x)
    assert sums.shape == x.shape
    torch.testing.assert_close(sums, torch.stack([x[:, : i + 1].sum(1) for i in range(tokens)], 1), rtol=0, atol=1e-12)
    (gradient,) = torch.autograd.grad((toward * sums).sum(), x)
    torch.testing.assert_close(gradient, torch.stack([toward[:, i:].sum(1) for i in range(tokens)], 1), rtol=0, atol=1e-12)


@pytest.mark.parametrize("tokens", [65, 128, 150])
def test_by_blocks_is_what_it_is_put_together_from(tokens: int) -> None:
    """Values and gradients against a dense matrix alpha I - gamma C of each column, and gradients of gradients by finite differences."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape_: int) -> torch.Tensor:
        return torch.randn(*shape_, dtype=torch.float64, generator=generator).requires_grad_()

    value, attended, gains, toward = draw(2, tokens, 3), draw(2, tokens, 3), (draw(3), draw(3), draw(3)), draw(2, tokens, 3)
    inputs = (value, attended, *gains)
    found = shape_by_blocks(value, attended, gains)
    assert found is not None
    centring = torch.ones(tokens, tokens, dtype=torch.float64).tril() / torch.arange(1, tokens + 1)[:, None]
    alpha, beta, gamma = gains
    expected = alpha * value + beta * attended - gamma * (centring @ value)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    gradients = [torch.autograd.grad(out, inputs, toward.detach(), retain_graph=True) for out in (found, expected)]
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-11)
    first = [torch.autograd.grad(out, inputs, toward, create_graph=True) for out in (found, expected)]
    second = [torch.autograd.grad(sum(g.square().sum() for g in of_one), (*inputs, toward)) for of_one in first]
    for ours, theirs in zip(*second, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


def test_by_blocks_has_second_gradients_of_values_alone() -> None:
    value = torch.randn(1, 70, 2, dtype=torch.float64, requires_grad=True)
    ones = torch.ones(2, dtype=torch.float64)
    found = shape_by_blocks(value, torch.zeros_like(value.detach()), (ones, ones, 2 * ones))
    assert found is not None
    (first,) = torch.autograd.grad(found.square().sum(), value, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), value)
    matrix = torch.eye(70, dtype=torch.float64) - 2 * torch.ones(70, 70, dtype=torch.float64).tril() / torch.arange(1, 71)[:, None]
    expected = 2 * (matrix.T @ matrix).sum(0)
    torch.testing.assert_close(second, expected[None, :, None].expand_as(second), rtol=0, atol=1e-11)


def test_by_blocks_sums_bf16_in_float32() -> None:
    value = torch.ones(1, 4096, 2, dtype=torch.bfloat16)  # bf16 would stop at 256
    ones = torch.ones(2, dtype=torch.bfloat16)
    found = shape_by_blocks(value, 0 * value, (ones, ones, 2 * ones))
    assert found is not None and found.dtype == torch.bfloat16 and (found == -1).all()
    value.requires_grad_()
    found = shape_by_blocks(value, 0 * value.detach(), (ones, ones, 0.5 * ones))
    assert found is not None
    found.sum().backward()
    left = 1 - 0.5 * (1 / torch.arange(1, 4097)).flip(0).cumsum(0).flip(0)  # the first token is in every mean
    assert value.grad is not None
    torch.testing.assert_close(value.grad[0, :, 0].float(), left, rtol=8e-3, atol=4e-3)


BLOCKS: list[dict[str, Any]] = [
    {"attention": "shaped"},
    {"attention": "shaped", "block": "outlier_protected", "kv_heads": 2},
    {"attention": "shaped", "attention_window": 5},
    {"attention_window": 5, "positions": "learned"},
    {"block": "simplified", "activation": "relu"},
    {"block": "simplified_parallel", "activation": "relu", "norm_places": []},
    {"attention_softcap": 5.0, "block": "post_norm"},
]


@pytest.mark.parametrize("fields", BLOCKS)
@pytest.mark.parametrize("pieces", [[1] * 40, [13, 1, 20, 6], [40]])
def test_cached_decoding_equals_the_full_forward(fields: dict[str, Any], pieces: list[int]) -> None:
    model, tokens = make(**fields), tokens_of()
    cache, found = Cache(), []
    for piece in tokens.split(pieces, dim=1):
        found.append(model(piece, cache=cache))
    torch.testing.assert_close(torch.cat(found, dim=1), model(tokens), rtol=0, atol=1e-7)


def test_cached_decoding_of_a_batch_padded_on_the_left() -> None:
    model, tokens = make(attention="shaped"), tokens_of()
    cache = Cache()
    found = [model(tokens[:, :20], document_ids=PADDED_LEFT[:, :20], cache=cache)]
    found += [model(tokens[:, i : i + 1], document_ids=PADDED_LEFT[:, : i + 1], cache=cache) for i in range(20, 40)]
    alone = model(tokens[:1, 9:])  # RoPE knows distances alone
    torch.testing.assert_close(torch.cat(found, dim=1)[:1, 9:], alone, rtol=0, atol=1e-6)


def test_cache_reordered_is_that_of_the_reordered_batch() -> None:
    model, tokens = make(attention="shaped"), tokens_of()
    cache = Cache()
    model(tokens[:, :10], cache=cache)
    cache.reorder(torch.tensor([1, 1]))
    expected = model(tokens[[1, 1]][:, :11])[:, -1:]
    torch.testing.assert_close(model(tokens[[1, 1]][:, 10:11], cache=cache), expected, rtol=0, atol=1e-7)


@pytest.mark.parametrize("slopes", [(0.0, -1.0), (0.5, -2.0)])
def test_shaped_relu_is_its_formula_with_unit_second_moment(slopes: tuple[float, float]) -> None:
    x, width = torch.linspace(-6, 6, 60001, dtype=torch.float64), 144
    density = torch.exp(-x.square() / 2) / math.sqrt(2 * math.pi)
    found = shaped_relu(x, slopes, width)
    assert float(torch.trapezoid(found.square() * density, x)) == pytest.approx(1.0, abs=1e-6)
    positive, negative = 1 + slopes[0] / 12, 1 + slopes[1] / 12
    ratio = torch.where(x > 0, positive, negative) * x / found
    torch.testing.assert_close(ratio[x != 0], ratio[0].expand_as(ratio[x != 0]))


def test_simplified_block_is_the_papers_equation() -> None:
    """SAS: Xhat = A Norm(X), out = Xhat + beta W_2 relu(W_1 Norm(Xhat)); A per head on slices of Norm(X)."""
    model = make(block="simplified", activation="relu", positions="learned")
    block: Any = model.blocks[1]
    assert sorted(n for n, _ in block.named_parameters()) == sorted(
        [f"attention.{n}" for n in ("identity_gain", "softmax_gain", "centering_gain", "query.weight", "key.weight")]
        + ["attention_norm.weight", "mlp_norm.weight", "mlp.up.weight", "mlp.down.weight", "mlp_gain"]
    )
    x = torch.randn(2, 40, 48, dtype=torch.float64)

    def norm(y: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        return scale * y / (y.square().mean(-1, keepdim=True) + 1e-5).sqrt()

    allowed = allowed_of(torch.zeros(2, 40))
    mixed = dense(block.attention, norm(x, block.attention_norm.weight), norm(x, block.attention_norm.weight), allowed)
    expected = mixed + block.mlp_gain * (F.relu(norm(mixed, block.mlp_norm.weight) @ block.mlp.up.weight.T) @ block.mlp.down.weight.T)
    torch.testing.assert_close(block(x, Context()), expected, rtol=0, atol=1e-12)


def test_simplified_parallel_block_is_the_papers_equation() -> None:
    """SAS-P: out = A Norm(X) + beta W_2 relu(W_1 Norm(X)); no skip at all, and one norm."""
    model = make(block="simplified_parallel", activation="relu", positions="learned")
    block: Any = model.blocks[1]
    x = torch.randn(2, 40, 48, dtype=torch.float64)
    normed = block.attention_norm.weight * x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    mixed = dense(block.attention, normed, normed, allowed_of(torch.zeros(2, 40)))
    expected = mixed + block.mlp_gain * (F.relu(normed @ block.mlp.up.weight.T) @ block.mlp.down.weight.T)
    torch.testing.assert_close(block(x, Context()), expected, rtol=0, atol=1e-12)


def test_simplified_starts_as_the_paper_has_it() -> None:
    model = Transformer(ModelConfig(48, 18, 4, 97, 40, block="simplified", activation="relu"))
    initialize(model, 0)
    first, second = model.blocks[0], model.blocks[1]
    assert torch.equal(first.attention.value.weight, torch.eye(48))  # pyright: ignore
    assert not list(second.attention.value.parameters()) and not list(first.attention.output.parameters())  # pyright: ignore
    assert not first.attention.query.weight.any()  # pyright: ignore
    assert torch.equal(first.attention.identity_gain, torch.ones(4)) and first.mlp_gain.item() == pytest.approx(0.1)  # pyright: ignore
    gains = [n for n, m, _ in owned_parameters(model) if n.endswith("gain") and is_decayed(n, m)]
    assert gains == []


def test_skip_gain_is_a_factor_on_both_skips() -> None:
    model = make(residual_gain=0.6, skip_gain=0.8, norm_places=[], positions="learned")
    block: Any = model.blocks[0]
    x = torch.randn(2, 40, 48, dtype=torch.float64)
    z = 0.8 * x + 0.6 * block.attention(x, x, Context())
    torch.testing.assert_close(block(x, Context()), 0.8 * z + 0.6 * block.mlp(z), rtol=0, atol=1e-12)


@pytest.mark.parametrize("fields", BLOCKS)
def test_checkpointing_and_no_token_sees_the_future(fields: dict[str, Any]) -> None:
    model, tokens = make(**fields).train(), tokens_of()
    loss = model(tokens[:, :-1], tokens[:, 1:])
    gradients = torch.autograd.grad(loss, list(model.parameters()))
    for chosen in (ActivationCheckpointing(full=len(model.blocks)), ActivationCheckpointing(selective=len(model.blocks))):
        model.activation_checkpointing = chosen
        again = torch.autograd.grad(model(tokens[:, :-1], tokens[:, 1:]), list(model.parameters()))
        assert all(torch.equal(a, b) for a, b in zip(gradients, again, strict=True))
    changed = tokens.clone()
    changed[:, 25] = (changed[:, 25] + 1) % 97
    before, after = model(tokens), model(changed)
    assert torch.equal(before[:, :25], after[:, :25]) and not torch.equal(before[:, 25:], after[:, 25:])


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({"block": "simplified", "kv_heads": 2}, "model.heads: values of simplified are slices"),
        ({"block": "simplified_parallel", "norm_places": ["mlp"]}, "model.norm_places: both branches"),
        ({"attention_gains": "fixed"}, "model.attention_gains: only shaped"),
        ({"activation_slopes": (0.0, 1.0)}, "model.activation_slopes: gelu has none"),
        ({"parametrization": "mup"}, "model.base_width: required"),
        ({"parametrization": "complete_p", "base_width": 16}, "model.base_depth: required"),
        ({"base_width": 16}, "model.base_width: parametrization standard does not use it"),
        ({"parametrization": "mup", "base_width": 16, "base_depth": 2}, "model.base_depth: parametrization mup does not use it"),
        ({"parametrization": "mup", "base_width": 16, "attention_temperature": 1.0}, "model.attention_temperature: mup scales"),
        (
            {"block": "simplified", "parametrization": "complete_p", "base_width": 16, "base_depth": 2},
            "model.parametrization: complete_p weights",
        ),
        ({"skip_gain": 0.9, "parametrization": "depth_mup", "base_width": 16, "base_depth": 2}, "model.skip_gain: under depth_mup"),
    ],
)
def test_what_cannot_be_is_refused_by_name(fields: dict[str, Any], problem: str) -> None:
    with pytest.raises(InputError) as error:
        ModelConfig(**{**SMALL, **fields})
    assert str(error.value).startswith(problem)


def test_the_preset_brings_what_its_theory_is_about() -> None:
    """Weights of variance 1/width and embeddings of variance 1, at any width; what a recipe says itself stays."""
    config = ModelSection.model_validate({"preset": "shaped_transformer", "size": "10m"}).config(100, 64)
    assert config.init_std == pytest.approx(config.width**-0.5)
    assert config.init_std * config.embedding_multiplier == pytest.approx(1.0)  # pyright: ignore[reportOperatorIssue]
    own = ModelSection.model_validate({"preset": "shaped_transformer", "size": "10m", "init_std": 0.1, "embedding_multiplier": 3.0})
    assert (own.init_std, own.embedding_multiplier) == (0.1, 3.0)
