"""Alignment keeps the function of a network, finds a symmetry that was put there by hand, and only ever brings weights nearer."""

from __future__ import annotations

import dataclasses
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from analysis.alignment import _Pair, align, folded, plane_rotations, procrustes
from model.config import ModelConfig
from model.errors import InputError
from model.parametrization import initialize
from model.transformer import Transformer

NETWORKS: dict[str, dict[str, Any]] = {
    "pre_norm": {},
    "swiglu, grouped queries": {"activation": "swiglu", "heads": 4, "kv_heads": 2},
    "layer_norm, biases, learned positions": {"norm": "layer_norm", "biases": "all", "positions": "learned"},
    "learned positions, untied": {"positions": "learned", "tied_embeddings": False},
    "post_norm": {"block": "post_norm"},
    "outlier_protected": {"block": "outlier_protected", "residual_gain_form": "vector"},
    "norms on the MLP alone": {"norm_places": ("mlp",)},
    "shaped attention": {"attention": "shaped"},
    "simplified": {"block": "simplified"},
    "simplified_parallel": {"block": "simplified_parallel"},
    "one key for all queries": {"qk_norm": "simple_rms_norm", "kv_heads": 1, "heads": 4},
    "depth_mup": {"parametrization": "depth_mup", "base_width": 16, "base_depth": 1},
}


def make(seed: int, **fields: Any) -> Transformer:
    """Every parameter random, the scales of norms and the gains too."""
    sizes = {"width": 32, "depth": 2, "heads": 4, "vocab_size": 64, "sequence_length": 16, "init_std": 0.2}
    network = Transformer(ModelConfig(**{**sizes, **fields}))
    initialize(network, seed)
    generator = torch.Generator().manual_seed(100 + seed)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return network.eval()


TOKENS = torch.randint(64, (2, 16), generator=torch.Generator().manual_seed(0))


def deviation(one: Transformer, other: Transformer) -> float:
    """Largest difference of their logits over the largest logit."""
    with torch.no_grad():
        return float((one(TOKENS) - other(TOKENS)).abs().max() / other(TOKENS).abs().max())


@pytest.mark.parametrize("name", NETWORKS)
def test_both_networks_keep_their_function_and_come_nearer(name: str) -> None:
    a, b = make(0, **NETWORKS[name]), make(1, **NETWORKS[name])
    before = {key: value.clone() for key, value in b.state_dict().items()}

    result = align(a, b)

    assert deviation(folded(b), b) < 1e-5
    assert deviation(result.fixed, a) < 1e-5
    assert deviation(result.moved, b) < 1e-4
    assert deviation(result.moved, a) > 0.1  # it is b, not a
    assert result.cosine[1] > result.cosine[0] + 0.1
    assert all(torch.equal(value, before[key]) for key, value in b.state_dict().items())


def hidden_copy(network: Transformer, seed: int) -> Transformer:
    """The same function with other weights: hidden units and groups of heads in another order, heads and residual stream turned. Written
    out matrix by matrix, for pre-norm networks with RoPE whose norms have no scales."""
    config = network.config
    assert config.kv_heads is not None and config.head_dim is not None and config.mlp_width is not None
    random = torch.Generator().manual_seed(seed)
    queries, size = config.heads // config.kv_heads, config.head_dim

    def orthogonal(n: int) -> Tensor:
        return torch.linalg.qr(torch.randn(n, n, generator=random))[0]

    def plane_turn() -> Tensor:
        turn = torch.zeros(size, size)
        for i in range(size // 2):
            angle = 6.28 * torch.rand((), generator=random)
            j = i + size // 2
            turn[i, i] = turn[j, j] = angle.cos()
            turn[j, i], turn[i, j] = angle.sin(), -angle.sin()
        return turn

    result = folded(network)
    turn = orthogonal(config.width)
    with torch.no_grad():
        result.embedding.weight.copy_(result.embedding.weight @ turn.T)
        result.unembedding.weight.copy_(result.unembedding.weight @ turn.T)
        blocks: Any = result.blocks
        for block in blocks:
            attention, mlp = block.attention, block.mlp
            units = torch.randperm(config.mlp_width, generator=random)
            for matrix in (mlp.up, mlp.gate):
                if matrix is not None:
                    matrix.weight.copy_(matrix.weight[units] @ turn.T)
            mlp.down.weight.copy_(turn @ mlp.down.weight[:, units])
            groups = torch.randperm(config.kv_heads, generator=random)
            query = attention.query.weight.view(config.kv_heads, queries, size, -1)[groups]
            key, value = (m.weight.view(config.kv_heads, size, -1)[groups] for m in (attention.key, attention.value))
            output = attention.output.weight.T.reshape(config.kv_heads, queries, size, -1)[groups]
            order = torch.randperm(queries, generator=random)
            query, output = query[:, order].clone(), output[:, order].clone()
            key, value = key.clone(), value.clone()
            for g in range(config.kv_heads):
                in_head, planes = orthogonal(size), plane_turn()
                query[g], key[g] = planes @ query[g], planes @ key[g]
                value[g], output[g] = in_head @ value[g], in_head @ output[g]
            attention.query.weight.copy_(query.flatten(0, 2) @ turn.T)
            attention.key.weight.copy_(key.flatten(0, 1) @ turn.T)
            attention.value.weight.copy_(value.flatten(0, 1) @ turn.T)
            attention.output.weight.copy_(turn @ output.flatten(0, 2).T)
    return result


@pytest.mark.parametrize("fields", [{}, {"activation": "swiglu", "heads": 4, "kv_heads": 2}])
def test_a_hidden_copy_is_found(fields: dict[str, Any]) -> None:
    network = folded(make(0, **fields))
    copied = hidden_copy(network, seed=5)
    assert deviation(copied, network) < 1e-4  # the copy itself is right
    result = align(network, copied)
    assert result.cosine[0] < 0.5
    assert result.cosine[1] > 0.99999
    for name, weight in result.fixed.state_dict().items():
        torch.testing.assert_close(result.moved.state_dict()[name], weight, atol=1e-3, rtol=0, msg=name)


def test_every_step_brings_the_weights_nearer() -> None:
    pair = _Pair(folded(make(0)), folded(make(1)))
    reached = [pair.inner()]
    for _ in range(3):
        for step in (lambda: pair.match_heads(0), lambda: pair.match_mlp(0), lambda: pair.match_heads(1), pair.turn_residual):
            step()
            reached.append(pair.inner())
    assert all(later > before - 1e-6 * abs(before) for before, later in pairwise(reached))
    assert reached[-1] > reached[0]


def test_the_turns_are_the_best_of_many() -> None:
    """Against every angle of a fine grid, plane by plane, and against random orthogonal matrices."""
    cross = torch.randn(6, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    turn = plane_rotations(cross)
    torch.testing.assert_close(turn @ turn.T, torch.eye(6, dtype=torch.float64))
    for i in range(3):
        j, best = i + 3, -torch.inf
        for angle in torch.linspace(0, 6.283185, 20001, dtype=torch.float64):
            plane = torch.stack([torch.stack([angle.cos(), -angle.sin()]), torch.stack([angle.sin(), angle.cos()])])
            best = max(best, float((plane * cross[[i, j]][:, [i, j]]).sum()))
        assert float((turn[[i, j]][:, [i, j]] * cross[[i, j]][:, [i, j]]).sum()) == pytest.approx(best, abs=1e-6)
    found = float((procrustes(cross) * cross).sum())
    for seed in range(200):
        other = torch.linalg.qr(torch.randn(6, 6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64))[0]
        assert float((other * cross).sum()) <= found + 1e-9


def test_networks_of_two_configurations_are_refused() -> None:
    a = make(0)
    b = Transformer(dataclasses.replace(a.config, residual_gain=0.5))
    initialize(b, 0)
    with pytest.raises(InputError, match="one configuration"):
        align(a, b)
