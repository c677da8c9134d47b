"""The covariance SDE against its formulas written out, against one layer of wide networks, and against whole networks of matrices."""

from __future__ import annotations

import json
import math
import shlex
from dataclasses import replace
from itertools import combinations_with_replacement
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from analysis.__main__ import main
from analysis.covariance import (
    NETWORKS,
    Setting,
    activated,
    add_branch,
    analyze_covariance,
    bartlett,
    correlations_of,
    describe,
    drift,
    gaussian,
    ks_critical,
    ks_statistic,
    mean_correlation,
    network_paths,
    next_covariance,
    noise,
    root,
    sde_paths,
    shaped,
)

START = torch.tensor([[1.0, 0.3, -0.2], [0.3, 1.4, 0.5], [-0.2, 0.5, 0.8]], dtype=torch.float64)
UPPER = list(combinations_with_replacement(range(3), 2))
MASKS = ("bidirectional", "causal")


def written_out(v: Tensor, setting: Setting) -> tuple[Tensor, Tensor]:
    """Drift (m, m) and Sigma (pairs, pairs) of one V, every sum as in the paper's theorem with the centring matrix P."""
    p, g, tau = setting.centring(), setting.gain, setting.temperature
    with_mean, means = torch.einsum("bk,nk->nb", p, v), torch.einsum("an,nk,bk->ab", p, v, p)
    s1 = torch.einsum(
        "ab,anbk->anbk",
        v,
        v[None, :, None, :] - with_mean[None, :, :, None] - with_mean.T[:, None, None, :] + means[:, None, :, None],
    )
    q = v.diagonal()[None, :] - 2 * with_mean.T + means.diagonal()[:, None]
    s2 = v.diagonal()[:, None] * (q - (p * q).sum(1, keepdim=True))
    half = torch.einsum("an,an,nb->ab", p, s2, v)
    b = (g / tau) ** 2 * (torch.einsum("an,bk,nk,anbk->ab", p, p, v, s1) + 0.5 * (half + half.T))
    t = torch.einsum("an,ck,nb,kd,anck->abcd", p, p, v, v, s1)
    linear = torch.einsum("ac,bd->abcd", v, v) + torch.einsum("ad,bc->abcd", v, v)
    sigma = g**2 * (2 - g**2) * linear
    sigma = sigma + g**4 / tau**2 * (t + t.permute(0, 1, 3, 2) + t.permute(1, 0, 2, 3) + t.permute(1, 0, 3, 2))
    if setting.slopes is not None:
        positive, negative = setting.slopes
        scale = torch.outer(v.diagonal(), v.diagonal()).sqrt()
        rho = (v / scale).clamp(-1, 1)
        b = b + g**2 * (positive - negative) ** 2 / (2 * math.pi) * ((1 - rho**2).sqrt() - rho * torch.arccos(rho)) * scale
        sigma = sigma + 2 * g**2 * linear
    return b, torch.stack([torch.stack([sigma[a, b, c, d] for c, d in UPPER]) for a, b in UPPER])


def upper(v: Tensor) -> Tensor:
    return torch.stack([v[:, a, b] for a, b in UPPER], 1)


@pytest.mark.parametrize("slopes", [None, (0.3, -1.0)])
@pytest.mark.parametrize("mask", MASKS)
def test_drift_and_noise_are_the_formulas(mask: str, slopes: tuple[float, float] | None) -> None:
    setting = Setting(tokens=3, temperature=0.5, gain=0.6, mask=mask, slopes=slopes)
    b, sigma = written_out(START, setting)
    assert torch.allclose(drift(START[None], setting)[0], b, atol=1e-14)
    drawn = upper(noise(START.expand(400_000, 3, 3), setting, np.random.default_rng(0)))
    assert drawn.mean(0).abs().max() < 0.02
    assert (drawn.T.cov() - sigma).abs().max() < 0.01 * sigma.abs().max()


@pytest.mark.parametrize("mask", MASKS)
def test_the_drift_is_that_of_a_layer_of_a_wide_network(mask: str) -> None:
    """n (E[V'] - V), over values and over logits of both signs so that terms of order 1/sqrt(n) vanish, nears b like 1/n."""
    errors = {}
    for width in (200, 2000):
        setting = Setting(width=width, tokens=3, temperature=0.25, gain=0.6, mask=mask)
        rng, x = np.random.default_rng(1), root(START.expand(100_000, 3, 3))
        logits = x @ bartlett(x, 64, rng) @ gaussian(x, rng) @ x.mT / (setting.temperature * math.sqrt(width * 64))
        after = sum(a @ START @ a.mT / 2 for a in (shaped(logits, setting), shaped(-logits, setting)))
        moved = width * (setting.skip**2 * START + setting.gain**2 * after.mean(0) - START)
        b = drift(START[None], setting)[0]
        errors[width] = float((moved - b).norm() / b.norm())
    assert errors[2000] < 0.02
    assert errors[2000] < errors[200] / 3


@pytest.mark.parametrize("slopes", [None, (0.3, -1.0)])
@pytest.mark.parametrize("mask", MASKS)
def test_the_noise_is_that_of_a_layer_of_a_wide_network(mask: str, slopes: tuple[float, float] | None) -> None:
    """n Cov(V' - V) is Sigma."""
    setting = Setting(width=1000, tokens=3, temperature=0.5, gain=0.6, mask=mask, slopes=slopes, head_dim=64)
    samples = 8_000 if slopes else 200_000
    moved = next_covariance(START.expand(samples, 3, 3), setting, "shaped", np.random.default_rng(2)) - START
    sigma = written_out(START, setting)[1]
    found = setting.width * upper(moved).T.cov()
    assert (found - sigma).abs().max() < (0.06 if slopes else 0.012) * sigma.abs().max()


def test_the_drift_of_a_shaped_relu() -> None:
    """n (E[F F^T / n] - V) at width n is nu over a^2 + b^2, a = 1 + (c+ + c-) / 2 sqrt(n), b = (c+ - c-) / 2 sqrt(n): a closed form."""
    setting = Setting(width=100, tokens=3, slopes=(0.0, -1.0))
    x = root(START.expand(20_000, 3, 3))
    hidden = activated(x, setting, "shaped", np.random.default_rng(3))
    linear = x @ torch.from_numpy(np.random.default_rng(3).standard_normal((20_000, 3, 100)))  # the same draws: most noise cancels
    moved = (hidden @ hidden.mT - linear @ linear.mT).mean(0)
    nu = (drift(START[None], setting) - drift(START[None], Setting(width=100, tokens=3)))[0] / setting.gain**2
    n = setting.width
    ratio = 1 / ((1 - 1 / (2 * math.sqrt(n))) ** 2 + (1 / (2 * math.sqrt(n))) ** 2)
    assert ratio == pytest.approx(1.105, abs=5e-4)
    assert torch.allclose(moved, ratio * nu, atol=0.02)


def literal(setting: Setting, samples: int, rng: np.random.Generator) -> Tensor:
    """V at the last layer of networks made of matrices, softmax and all: the definition, and nothing that the module under test has."""
    n, n_k, m, g = setting.width, setting.query_dim, setting.tokens, setting.gain

    def weights(rows: int, columns: int) -> Tensor:
        return torch.from_numpy(rng.standard_normal((samples, rows, columns)))

    start = (1 - setting.correlation) * torch.eye(m, dtype=torch.float64) + setting.correlation
    x = torch.linalg.cholesky(start) @ torch.linalg.qr(weights(n, m))[0].mT * math.sqrt(n)
    allowed = torch.ones(m, m).tril() if setting.mask == "causal" else torch.ones(m, m)
    centre = allowed.double() / allowed.double().sum(1, keepdim=True)
    for _ in range(setting.depth):
        logits = x @ weights(n, n_k) @ weights(n, n_k).mT @ x.mT / (n * setting.temperature * math.sqrt(n * n_k))
        a = torch.eye(m) + torch.softmax(logits.masked_fill(allowed == 0, -math.inf), -1) - centre
        x = math.sqrt(1 - g * g) * x + g * a @ x @ weights(n, n) / math.sqrt(n)
        if setting.slopes is not None:
            up, down = (1 + c / math.sqrt(n) for c in setting.slopes)
            hidden = x @ weights(n, n) / math.sqrt(n)
            hidden = torch.where(hidden > 0, up * hidden, down * hidden) * math.sqrt(2 / (up**2 + down**2) / n)
            x = math.sqrt(1 - g * g) * x + g * hidden @ weights(n, n)
    return x @ x.mT / n


@pytest.mark.parametrize(("mask", "slopes"), [("bidirectional", None), ("causal", (0.0, -1.0))])
def test_the_chain_is_a_network_of_matrices(mask: str, slopes: tuple[float, float] | None) -> None:
    setting = Setting(width=24, depth=12, tokens=3, temperature=0.5, mask=mask, slopes=slopes, head_dim=8, samples=2000)
    ends = literal(setting, 2000, np.random.default_rng(4)), network_paths(setting, "shaped").end
    for of in (lambda v: v[:, 1, 2], lambda v: correlations_of(v)[:, 0, 2], lambda v: v[:, 2, 2]):
        assert ks_statistic(*(of(end).numpy() for end in ends)) < ks_critical(2000, 2000)


class Given:
    """In place of a random generator: arrays, one after another."""

    def __init__(self, *arrays: Tensor) -> None:
        self.arrays = list(arrays)

    def standard_normal(self, shape: tuple[int, ...]) -> np.ndarray:
        array = self.arrays.pop(0)
        assert array.shape == shape
        return array.numpy()

    def chisquare(self, degrees: np.ndarray, size: tuple[int, ...]) -> np.ndarray:
        return self.standard_normal(size)


def test_a_branch_is_a_sum_of_matrices() -> None:
    """The small matrices that stand for X and Y = B G give their covariances exactly, for one G."""
    generator = torch.Generator().manual_seed(7)
    x, branch = root(START[None]), torch.randn(1, 3, 3, generator=generator, dtype=torch.float64)
    g = torch.randn(1, 3, 10, generator=generator, dtype=torch.float64)
    whole = 0.8 * math.sqrt(10) * torch.cat([x, torch.zeros(1, 3, 7)], 2) + 0.6 * branch @ g
    outside = root(g[:, :, 3:] @ g[:, :, 3:].mT)
    given = Given(g[:, :, :3], outside.tril(-1), outside.diagonal(dim1=1, dim2=2).square())
    assert torch.allclose(add_branch(x, branch, 0.8, 0.6, 10, given), whole @ whole.mT / 10, atol=1e-12)


def test_the_networks_compared_with() -> None:
    """Softmax and pre-norm, one layer of matrices each, in mean and spread of V."""
    setting = Setting(width=40, tokens=3, mask="causal", head_dim=4, slopes=(0.0, 0.0))
    samples, rng = 6_000, np.random.default_rng(5)
    x = torch.linalg.cholesky(START) @ torch.eye(3, 40, dtype=torch.float64) * math.sqrt(40)

    def w(rows: int, columns: int) -> Tensor:
        return torch.from_numpy(rng.standard_normal((samples, rows, columns)).astype(np.float32)).double()

    for name in ("softmax", "pre_norm"):
        skip, gain = (1.0, 1.0) if name == "pre_norm" else (setting.skip, setting.gain)
        norm = torch.nn.RMSNorm(40, eps=0, elementwise_affine=False) if name == "pre_norm" else torch.nn.Identity()
        read = norm(x).expand(samples, 3, 40)
        queries, keys, values = (read @ w(40, k) / math.sqrt(40) for k in (4, 4, 40))
        mixed = torch.nn.functional.scaled_dot_product_attention(queries, keys, values, is_causal=True)
        z = skip * x + gain * mixed
        z = skip * z + gain * (norm(z) @ w(40, 40) / math.sqrt(40)).relu() * math.sqrt(2 / 40) @ w(40, 40)
        expected = upper(z @ z.mT / 40)
        found = upper(next_covariance(START.expand(samples, 3, 3), setting, name, rng))
        assert torch.allclose(found.mean(0), expected.mean(0), atol=0.05), name
        assert torch.allclose(found.T.cov(), expected.T.cov(), atol=0.08), name


@pytest.mark.parametrize("mask", MASKS)
def test_the_sde_is_the_limit_of_networks(mask: str) -> None:
    """Width 100, 50 layers: the distributions are not told apart."""
    setting = Setting(width=100, depth=50, tokens=3, temperature=0.5, mask=mask, samples=2048, seed=1)
    result = analyze_covariance(setting, progress=False)
    statistics, alive = result["statistics"], 2048 * (1 - result["covariance_sde"]["blown_up"][-1])
    assert statistics["ks_critical"] == pytest.approx(0.0424, abs=1e-4)
    for name in ("covariance", "correlation", "variance"):
        assert statistics[name]["ks_statistic"] < statistics["ks_critical"], name
        assert sum(statistics[name]["sde"]["counts"]) == pytest.approx(alive * (1 - statistics[name]["sde"]["outside"]))


def test_a_wrong_limit_is_told_apart() -> None:
    """Without attention's part of it the SDE is not what networks do: the comparison has the power to see that."""
    setting = Setting(width=100, depth=50, tokens=3, temperature=0.3, gain=0.8, samples=1024)
    wrong = replace(setting, temperature=1e6)
    ends = [network_paths(setting, "shaped").end, sde_paths(wrong).end]
    assert ks_statistic(*(end[:, 1, 2].numpy() for end in ends)) > ks_critical(1024, 1024)


def test_shaped_networks_keep_tokens_apart_where_softmax_does_not() -> None:
    """16 tokens, width 256, heads of 64, causal, layer 50: shaped below 0.3, softmax with the same skip above 0.95."""
    setting = Setting(width=256, depth=50, tokens=16, head_dim=64, mask="causal", samples=32)
    means = {name: float(network_paths(setting, name).correlations[-1].mean()) for name in NETWORKS}
    assert means["shaped"] < 0.3
    assert means["softmax"] > 0.95
    assert 0.9 < means["pre_norm"] < 0.97


def test_blow_up_is_counted_and_ends_a_sample() -> None:
    hot = Setting(width=200, depth=200, tokens=6, temperature=0.15, gain=0.8, samples=128)
    paths = network_paths(hot, "shaped")
    assert 0.75 < paths.blown_up[-1] < 1
    assert paths.blown_up == sorted(paths.blown_up)
    assert torch.isfinite(paths.end).all() and paths.end.diagonal(dim1=1, dim2=2).max() <= 100
    cool = Setting(width=200, depth=200, tokens=6, samples=128)
    assert network_paths(cool, "shaped").blown_up[-1] == 0
    result = analyze_covariance(Setting(width=12, depth=96, tokens=6, temperature=0.02, gain=1.0, samples=16), progress=False)
    assert "blow-up: a variance passed 100" in describe(result)
    json.dumps(result, allow_nan=False)


def test_all_samples_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("analysis.covariance.BLOW_UP", 0.5)
    result = analyze_covariance(Setting(width=16, depth=2, samples=4), progress=False)
    assert result["statistics"] is None and "too few samples" in describe(result)


def test_a_singular_covariance_has_a_root() -> None:
    ones = torch.ones(2, 3, 3, dtype=torch.float64)
    both = torch.stack([ones[0], START])
    assert torch.allclose(root(both) @ root(both).mT, both, atol=1e-12)
    assert mean_correlation(ones).tolist() == pytest.approx([1, 1])


def test_ks_statistic_by_hand() -> None:
    assert ks_statistic(np.array([1.0, 2.0, 3.0]), np.array([1.0, 2.0, 3.0])) == 0
    assert ks_statistic(np.array([1.0, 2.0, 3.0, 4.0]), np.array([2.5, 3.5])) == pytest.approx(0.5)
    assert ks_statistic(np.array([0.0, 1.0]), np.array([5.0])) == 1
    rng = np.random.default_rng(6)
    false_alarms = np.mean([ks_statistic(*rng.standard_normal((2, 400))) > ks_critical(400, 400) for _ in range(400)])
    assert 0.02 < false_alarms < 0.08


def test_the_verb(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = shlex.split("--width 32 --depth 6 --tokens 3 --samples 64 --mask causal --slopes 0 -1 --head-dim 8")
    assert main(["covariance", *options, "--out", str(tmp_path)]) == 0
    written = json.loads((tmp_path / "covariance.json").read_text())
    assert written["setting"]["slopes"] == [0, -1] and written["setting"]["time"] == 6 / 32
    assert written["paths"].keys() == NETWORKS.keys() and len(written["paths"]["shaped"]["mean"]) == 7
    assert (tmp_path / "covariance.png").stat().st_size > 10_000
    assert "Kolmogorov-Smirnov" in capsys.readouterr().out
    again = analyze_covariance(Setting(32, 6, 3, mask="causal", slopes=(0, -1), head_dim=8, samples=64), progress=False)
    assert again["statistics"] == written["statistics"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--width 6", "--width 6: expected at least 8, twice the tokens"),
        ("--head-dim 2", "--head-dim 2: expected at least 4, the tokens"),
        ("--tokens 1", "--tokens 1: expected at least 2"),
        ("--gain 1.5", "--gain 1.5: expected a number above 0 and at most 1"),
        ("--temperature 0", "--temperature 0: expected a positive number"),
        ("--correlation 1", "--correlation 1: expected a number above"),
        ("--mask none", "--mask none: expected bidirectional or causal"),
    ],
)
def test_numbers_that_make_no_sense(options: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["covariance", *options.split(), "--out", str(tmp_path / "out")]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_negative_seed_is_named(tmp_path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["covariance", "--seed", "-1", "--out", str(tmp_path)]) == 2
    assert capsys.readouterr().err == "error: --seed -1: expected 0 or more\n"
