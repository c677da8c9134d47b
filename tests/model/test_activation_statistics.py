"""Outlier measures against float64 brute force over all positions at once, and closed forms."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from model.activation_checkpointing import ActivationCheckpointing
from model.activation_statistics import DEFINITIONS, ActivationMoments, watch_residuals
from model.attention import Context, rotary_tables
from model.config import ModelConfig
from model.parametrization import initialize
from model.transformer import Transformer


def moments_of(x: torch.Tensor, *more: torch.Tensor) -> ActivationMoments:
    moments = ActivationMoments(x.shape[-1], x.device)
    for part in (x, *more):
        moments.add(part)
    return moments


def brute_force(x: np.ndarray) -> dict[str, float]:
    """Equations 1 and 2 of arXiv 2405.19279 and the correlations of every pair, in float64, all positions (n, d) at once."""
    n, d = x.shape
    s = np.sqrt((x**2).mean(axis=0))
    ratios = [max(abs(row)) / np.median(abs(row)) for row in x]
    correlations = (x @ x.T) / d / (x**2).mean()
    return {
        "kurtosis": (s**4).mean() / (s**2).mean() ** 2,
        "kurtosis_minus_one": (s**4).mean() / (s**2).mean() ** 2 - 1,
        "max_median_ratio_mean": float(np.mean(ratios)),
        "max_median_ratio_max": float(np.max(ratios)),
        "input_correlation_rms": math.sqrt((correlations[~np.eye(n, dtype=bool)] ** 2).mean()),
        "activation_rms": math.sqrt((x**2).mean()),
    }


@pytest.mark.parametrize("width", [1, 2, 7, 8])
def test_sums_over_batches_equal_brute_force(width: int) -> None:
    x = torch.randn(3, 50, width, generator=torch.Generator().manual_seed(0)) * torch.logspace(-1, 2, width) + 0.3
    measures = moments_of(*x.flatten(0, 1).split([1, 70, 79])).measures()  # any split: sums come before ratios
    expected = brute_force(x.flatten(0, 1).double().numpy())
    assert measures.keys() == expected.keys() <= DEFINITIONS.keys()
    for key, value in expected.items():
        assert measures[key] == pytest.approx(value, rel=1e-5), key


def test_sums_over_ranks_equal_one_process() -> None:
    """What training does: `sums` and `gram` add up, `ratio_max` is a maximum."""
    x = torch.randn(60, 6, generator=torch.Generator().manual_seed(3)).exp()
    whole, first, second = moments_of(x), moments_of(x[:23]), moments_of(x[23:])
    first.sums += second.sums
    first.gram += second.gram
    first.ratio_max = torch.maximum(first.ratio_max, second.ratio_max)
    assert first.measures() == pytest.approx(whole.measures(), rel=1e-6)


def test_closed_forms() -> None:
    alike = moments_of(torch.randn(1000, 4, generator=torch.Generator().manual_seed(0)).sign() * 3).measures()
    assert alike["kurtosis"] == 1.0
    assert alike["max_median_ratio_max"] == 1.0
    assert alike["activation_rms"] == pytest.approx(3.0)
    x = torch.zeros(10, 32)
    x[:, 5] = 2.0
    one = moments_of(x).measures()
    assert one["kurtosis"] == pytest.approx(32.0)
    assert one["input_correlation_rms"] == pytest.approx(1.0)  # rank one: every input is the same
    independent = moments_of(torch.randn(200_000, 8, generator=torch.Generator().manual_seed(0))).measures()
    assert independent["kurtosis"] == pytest.approx(1.0, abs=1e-3)  # 1, not the textbook's 3
    assert independent["input_correlation_rms"] == pytest.approx(1 / math.sqrt(8), rel=1e-2)  # of two Gaussian vectors of 8
    assert moments_of(torch.eye(16)).measures()["input_correlation_rms"] == 0.0
    silent = moments_of(torch.zeros(3, 8)).measures()
    assert silent["kurtosis"] is None and silent["input_correlation_rms"] is None
    assert moments_of(torch.ones(1, 8)).measures()["input_correlation_rms"] is None  # a single position has no pairs
    with pytest.raises(ValueError, match="no activations"):
        ActivationMoments(8, torch.device("cpu")).measures()


def test_identity_between_kurtosis_and_correlations() -> None:
    """n^2 d Kurt + sum_(i != j) (X^T X)_ij^2 = sum_ab (X X^T)_ab^2 where the mean square is 1: equations 4 and 5."""
    n, d = 40, 12
    x = torch.randn(n, d, generator=torch.Generator().manual_seed(0)) * torch.linspace(0.2, 3, d)
    x /= x.square().mean().sqrt()
    measures = moments_of(x).measures()
    kurtosis, correlation = measures["kurtosis"], measures["input_correlation_rms"]
    assert kurtosis is not None and correlation is not None
    features = x.double().T @ x.double()
    off_diagonal = (features.square().sum() - features.diagonal().square().sum()).item()
    diagonal = x.double().square().sum(dim=1).square().sum().item()
    inputs = n * (n - 1) * (d * correlation) ** 2 + diagonal
    assert n**2 * d * kurtosis + off_diagonal == pytest.approx(inputs, rel=1e-5)


@pytest.mark.parametrize("checkpointing", [(0, 0), (2, 0), (0, 2)])
def test_places_are_the_residual_entering_attention_and_the_unembedding(checkpointing: tuple[int, int]) -> None:
    """Also with activation checkpointing, whose second forward pass must not count."""
    model = Transformer(ModelConfig(width=16, depth=2, heads=2, vocab_size=50, sequence_length=8, init_std=0.2))
    initialize(model, 0)
    model.activation_checkpointing = ActivationCheckpointing(*checkpointing)
    tokens = torch.randint(0, 50, (3, 8), generator=torch.Generator().manual_seed(0))
    with watch_residuals(model) as moments:
        model(tokens, tokens).backward()
    model(tokens)  # watching has ended
    with torch.no_grad():
        x = model.embedding(tokens)
        context = Context(rotary_tables(0, 8, 8, 10000.0, tokens.device))
        x_1 = model.blocks[0](x, context)
        final = model.final_norm(model.blocks[1](x_1, context))
    assert list(moments) == ["layer 0", "layer 1", "unembedding"]
    for place, x_place in (("layer 0", x), ("layer 1", x_1), ("unembedding", final)):
        assert moments[place].sums[0] == 24
        assert moments[place].measures() == pytest.approx(brute_force(x_place.flatten(0, 1).double().numpy()), rel=1e-5)
