"""Spectral measures against exact singular values and closed forms."""

from __future__ import annotations

import json
import math
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from analysis import weights
from analysis.__main__ import main
from analysis.weights import hill_exponent, spectrum_of


def decaying(rows: int, columns: int, power: float) -> torch.Tensor:
    """A matrix with singular values i^-power and random directions."""
    generator = torch.Generator().manual_seed(0)
    left = torch.linalg.qr(torch.randn(rows, rows, generator=generator, dtype=torch.float64)).Q
    right = torch.linalg.qr(torch.randn(columns, rows, generator=generator, dtype=torch.float64)).Q
    return (left * torch.arange(1.0, rows + 1, dtype=torch.float64) ** -power @ right.T).float()


def test_closed_forms():
    identity = spectrum_of(torch.eye(40, 60))
    assert identity["spectral_norm"] == pytest.approx(1.0)
    assert identity["stable_rank"] == pytest.approx(40.0)
    assert identity["entropy_rank"] == pytest.approx(40.0)
    outer = spectrum_of(torch.outer(torch.randn(30), torch.randn(20)))
    assert outer["stable_rank"] == pytest.approx(1.0, rel=1e-5)
    assert outer["entropy_rank"] == pytest.approx(1.0, rel=1e-4)
    assert spectrum_of(torch.zeros(3, 4))["stable_rank"] is None


@pytest.mark.parametrize(("power", "shape"), [(0.0, (300, 700)), (0.5, (700, 300)), (1.0, (300, 500))])
def test_randomised_methods_against_all_singular_values(power, shape):
    short = min(shape)
    matrix = decaying(short, max(shape), power)
    matrix = matrix if shape[0] <= shape[1] else matrix.T
    if power == 0.0:
        matrix = torch.randn(shape, generator=torch.Generator().manual_seed(1))  # the hardest: no gap anywhere
    before = torch.get_rng_state()
    exact, quick = spectrum_of(matrix), spectrum_of(matrix, exact=16)
    assert torch.equal(torch.get_rng_state(), before) and spectrum_of(matrix, exact=16) == quick
    singular = torch.linalg.svdvals(matrix.double())
    assert (exact["exact"], quick["exact"]) == (True, False)
    np.testing.assert_allclose(exact["spectrum"], singular[:32], rtol=1e-5)
    shares = singular.square() / singular.square().sum()
    assert exact["entropy_rank"] == pytest.approx(math.exp(float(-(shares * shares.log()).sum())), rel=1e-5)
    assert exact["stable_rank"] == pytest.approx(float(1 / shares[0]), rel=1e-5)
    np.testing.assert_allclose(quick["spectrum"], singular[:32], rtol=0.01)
    assert quick["entropy_rank"] == pytest.approx(exact["entropy_rank"], rel=0.02)
    assert quick["tail_exponent"] is quick["tail_eigenvalues"] is None


def test_hill_finds_the_exponent_of_a_power_law():
    uniform = torch.rand(200_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for alpha in (2.0, 3.5):
        samples = (1 - uniform).pow(-1 / (alpha - 1)).sort(descending=True).values  # density ~ x^-alpha, x >= 1
        assert hill_exponent(samples, 20_000) == pytest.approx(alpha, rel=0.03)
    assert hill_exponent(torch.ones(50), 9) is None


@pytest.mark.parametrize("shape", [(1600, 1700), (40, 70), (99, 120)])
def test_the_tail_is_the_largest_tenth_at_any_width(shape):
    """Of a Gaussian matrix, whose spectrum is flat, so that another share of it gives another exponent."""
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(2))
    eigenvalues = torch.linalg.svdvals(matrix.double()).square()
    found, tail = spectrum_of(matrix), min(shape) // 10
    expected = 1 + 1 / float((eigenvalues[:tail] / eigenvalues[tail]).log().mean())
    assert found["tail_eigenvalues"] == (tail if tail >= 10 else None)
    assert found["tail_exponent"] == (pytest.approx(expected, rel=1e-6) if tail >= 10 else None)


class Copies(TorchDispatchMode):
    """Notes the most elements that an operation within it puts into new memory."""

    def __init__(self) -> None:
        super().__init__()
        self.most = 0

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        result = function(*arguments, **(keywords or {}))
        old = {x.untyped_storage().data_ptr() for x in tree_flatten((arguments, keywords))[0] if isinstance(x, torch.Tensor)}
        new = [x for x in tree_flatten(result)[0] if isinstance(x, torch.Tensor) and x.untyped_storage().data_ptr() not in old]
        self.most = max([self.most, *(x.numel() for x in new)])
        return result


@pytest.mark.parametrize("exact", [1024, 16])
def test_no_copy_of_a_matrix_is_made(monkeypatch, exact):
    monkeypatch.setattr(weights, "PIECE", 1000)
    monkeypatch.setattr(weights, "spectrum_of", partial(spectrum_of, exact=exact))
    one, other = (torch.randn(3000, 300, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    stored = SimpleNamespace(tensor=lambda name: one, path="one"), SimpleNamespace(tensor=lambda name: other, path="other")
    expected = {
        "norm": float(one.double().norm()),
        "difference_norm": float((one.double() - other.double()).norm()),
        "angle": math.degrees(math.acos(torch.cosine_similarity(one.double().flatten(), other.double().flatten(), dim=0))),
    }
    with Copies() as copies:
        found = weights._measure(*stored, "a")
    assert copies.most < one.numel()
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, rel=1e-9 if name == "norm" else 1e-6), name


def test_the_verb_compares_two_checkpoints(run_folder, tmp_path, capsys):
    steps = run_folder / "checkpoints"
    assert main(["weights", str(steps / "step-00000020"), "--compare", str(steps / "step-00000010"), "--out", str(tmp_path)]) == 0
    result = json.loads((tmp_path / "weights.json").read_text())
    found = result["tensors"]["blocks.0.mlp.up.weight"]
    a, b = (
        torch.load(steps / f"step-000000{n}" / "mp_rank_00_model_states.pt")["module"]["blocks.0.mlp.up.weight"].double() for n in (20, 10)
    )
    assert found["norm"] == pytest.approx(float(a.norm()))
    assert found["relative_difference"] == pytest.approx(float((a - b).norm() / b.norm()))
    assert found["angle"] == pytest.approx(math.degrees(math.acos(float((a * b).sum() / a.norm() / b.norm()))), rel=1e-6)
    singular = torch.linalg.svdvals(a - b)
    assert found["difference_stable_rank"] == pytest.approx(float(singular.square().sum() / singular[0] ** 2), rel=1e-4)
    assert set(found) - {"shape", "layer", "kind"} <= set(result["definitions"])
    assert "blocks.0.mlp.up.weight" in capsys.readouterr().out
    assert main(["weights", str(run_folder), "--compare", str(steps / "step-00000010" / "nothing")]) == 2
