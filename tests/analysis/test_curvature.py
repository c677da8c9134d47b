"""Curvature of a small network against its exact Hessian and Gauss-Newton matrix, in float64."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import functional_call, grad, hessian, jacrev
from torch.nn.attention import SDPBackend, sdpa_kernel

import analysis.curvature
from analysis.__main__ import main
from analysis.curvature import PART_STEPS, Surface, free_memory, lanczos, measure, parts_of
from model.config import ModelConfig
from model.errors import InputError
from model.parametrization import initialize
from model.transformer import Transformer
from tests.analysis.conftest import CONFIG, write_checkpoint


@pytest.fixture(scope="module")
def network() -> tuple[Transformer, Tensor]:
    model = Transformer(ModelConfig(width=8, depth=2, heads=2, vocab_size=17, sequence_length=9, mlp_width=12, init_std=0.4))
    initialize(model, seed=1)
    return model, torch.randint(17, (5, 10), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def exact(network: tuple[Transformer, Tensor]) -> dict[str, Tensor]:
    """Both matrices by automatic differentiation."""
    model, sequences = network
    wide = Transformer(model.config).double()
    wide.load_state_dict(model.state_dict())
    surface = Surface(wide, sequences)
    shapes = dict(zip(surface.names, [p.shape for p in surface.parameters], strict=True))
    flat = torch.cat([p.detach().flatten() for p in surface.parameters])
    targets = sequences[:, 1:].flatten()

    def logits(w: Tensor) -> Tensor:
        named = {n: part.view(shapes[n]) for n, part in zip(surface.names, w.split(surface.sizes), strict=True)}
        return functional_call(wide, named, (sequences[:, :-1],), tie_weights=True).flatten(0, 1)

    with sdpa_kernel(SDPBackend.MATH):
        full = jacrev(grad(lambda w: F.cross_entropy(logits(w), targets)), chunk_size=64)(flat)
        jacobian = jacrev(lambda w: logits(w).flatten(), chunk_size=64)(flat)
        z = logits(flat).detach().flatten()
    curved = hessian(lambda z: F.cross_entropy(z.view(len(targets), -1), targets))(z)
    return {"hessian": full, "gauss_newton": jacobian.T @ curved @ jacobian}


@pytest.fixture(scope="module")
def result(network: tuple[Transformer, Tensor]) -> dict[str, Any]:
    return measure(*network, steps=30, probes=8)


@pytest.mark.parametrize("name", ["hessian", "gauss_newton"])
def test_products_are_the_matrices(name: str, network: tuple[Transformer, Tensor], exact: dict[str, Tensor]) -> None:
    surface = Surface(*network)
    before = [p.detach().clone() for p in surface.parameters]
    v = torch.randn(sum(surface.sizes), generator=torch.Generator().manual_seed(3))
    expected = exact[name] @ v.double()
    assert float((getattr(surface, name)(v).double() - expected).norm() / expected.norm()) < 2e-3
    assert all(torch.equal(p, b) for p, b in zip(surface.parameters, before, strict=True))


def test_eigenvalues_are_pyhessians(network: tuple[Transformer, Tensor], result: dict[str, Any]) -> None:
    """A peer's own products, by double backward, and its own power iteration."""
    from pyhessian import hessian as pyhessian

    class Logits(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = Transformer(network[0].config)
            self.network.load_state_dict(network[0].state_dict())

        def forward(self, tokens: Tensor) -> Tensor:
            return self.network(tokens).flatten(0, 1)

    with sdpa_kernel(SDPBackend.MATH):
        theirs = pyhessian(Logits(), F.cross_entropy, data=(network[1][:, :-1], network[1][:, 1:].flatten()), cuda=False)
        torch.manual_seed(0)
        values, _ = theirs.eigenvalues(maxIter=300, tol=1e-6, top_n=2)
    assert [result["hessian"]["bottom"], result["hessian"]["top"][0]] == pytest.approx(values, rel=5e-3)  # it orders by magnitude


@pytest.mark.parametrize("name", ["hessian", "gauss_newton"])
def test_eigenvalues_are_the_matrices(name: str, result: dict[str, Any], exact: dict[str, Tensor]) -> None:
    values = torch.linalg.eigvalsh(exact[name])
    assert result[name]["top"][:2] == pytest.approx(values.flip(0)[:2].tolist(), rel=2e-3)
    if name == "hessian":
        assert result[name]["bottom"] == pytest.approx(values[0].item(), rel=2e-2)


def test_trace_and_density(result: dict[str, Any], exact: dict[str, Tensor]) -> None:
    """Within four standard errors of the exact trace, and those are what random unit vectors give: the density has mass 1 and that
    trace as its mean. n v^T H v of a unit v has variance 2 ||H||_F^2 n / (n + 2) - 2 trace^2 / (n + 2)."""
    matrix = exact["hessian"]
    trace, n = float(matrix.trace()), len(matrix)
    deviation = ((2 * n * float(matrix.square().sum()) - 2 * trace**2) / (n + 2)) ** 0.5
    assert abs(result["trace"]["value"] - trace) < 4 * deviation / 8**0.5
    assert result["trace"]["standard_error"] == pytest.approx(deviation / 8**0.5, rel=0.8)
    density = result["density"]
    assert sum(density["weights"]) == pytest.approx(1, abs=1e-6)
    mean = sum(n * w for n, w in zip(density["nodes"], density["weights"], strict=True))
    assert mean * result["weights"] == pytest.approx(result["trace"]["value"], rel=1e-6)
    values = torch.linalg.eigvalsh(exact["hessian"])
    share = sum(w for n, w in zip(density["nodes"], density["weights"], strict=True) if n > 0.1 * float(values[-1]))
    assert share == pytest.approx(float((values > 0.1 * values[-1]).double().mean()), abs=0.02)


def test_parts_are_diagonal_blocks(network: tuple[Transformer, Tensor], result: dict[str, Any], exact: dict[str, Tensor]) -> None:
    surface = Surface(*network)
    parts = parts_of(surface.names)
    assert list(result["parts"]) == ["layer 0", "layer 1", "query", "key", "value", "embedding"]
    for part, chosen in parts.items():
        there = surface.mask(chosen).bool()
        assert 0 < int(there.sum()) < len(there)
        for name in ("hessian", "gauss_newton"):
            top = float(torch.linalg.eigvalsh(exact[name][there][:, there])[-1])
            assert result["parts"][part][name] == pytest.approx(top, rel=0.1), (part, name)  # eight products
            assert result["parts"][part][name] < top * 1.003
        density, n = result["parts"][part]["density"], int(there.sum())
        assert sum(density["weights"]) == pytest.approx(1, abs=1e-6) and result["parts"][part]["weights"] == n
        block = exact["hessian"][there][:, there]
        mean = n * sum(node * weight for node, weight in zip(density["nodes"], density["weights"], strict=True))
        assert abs(mean - float(block.trace())) < 4 * math.sqrt(2 * float(block.square().sum())), part  # one random direction
    assert PART_STEPS == 8


def test_preconditioned_eigenvalues_are_the_matrices(network: tuple[Transformer, Tensor], exact: dict[str, Tensor]) -> None:
    """P^-1/2 H P^-1/2 for a diagonal P over four orders of magnitude."""
    roots = 10 ** (2 * torch.rand(len(exact["hessian"]), generator=torch.Generator().manual_seed(5), dtype=torch.float64) - 1)
    values = torch.linalg.eigvalsh(roots[:, None] * exact["hessian"] * roots)
    found = measure(*network, steps=40, probes=1, roots=roots.float())["preconditioned"]
    assert found["top"][0] == pytest.approx(float(values[-1]), rel=5e-3)
    assert found["bottom"] == pytest.approx(float(values[0]), rel=2e-2)


def test_more_vectors_than_fit_are_refused(run_folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Before anything is measured, with the number of steps that fits, or none."""
    count = sum(p.numel() for p in Transformer(CONFIG).parameters())
    for copies, said in ((100, "--steps 90 would do"), (9, "it needs a larger machine")):
        monkeypatch.setattr(analysis.curvature, "free_memory", lambda device, copies=copies: 4 * count * copies)
        assert main(["curvature", str(run_folder), "--steps", "91", "--tokens", "64"]) == 2
        error = capsys.readouterr().err
        assert f"--steps 91: Lanczos holds that many copies of {count:,} weights" in error and said in error
    assert (free_memory(torch.device("cpu")) or 0) > 2**20


def test_along_the_gradient(network: tuple[Transformer, Tensor], result: dict[str, Any], exact: dict[str, Tensor]) -> None:
    g = Surface(*network).gradient().double()
    for name, matrix in exact.items():
        assert result["gradient_direction"][name] == pytest.approx(float(g @ matrix @ g / (g @ g)), rel=5e-3)


def test_lanczos_stops_at_the_end_of_the_space() -> None:
    """A matrix with three distinct eigenvalues is done after three products, without ghosts."""
    matrix = torch.diag(torch.tensor([3.0, 3.0, 1.0, 1.0, -2.0, -2.0], dtype=torch.float64))
    values, weights, residuals = lanczos(lambda v: matrix @ v, torch.ones(6, dtype=torch.float64), 6)
    assert values.tolist() == pytest.approx([-2, 1, 3])
    assert weights.tolist() == pytest.approx([1 / 3] * 3)
    assert residuals.max() < 1e-6


def test_the_verb(run_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["curvature", str(run_folder), "--steps", "4", "--probes", "1", "--tokens", "64"]) == 0
    written = json.loads((run_folder / "report" / "curvature.json").read_text())
    assert written["step"] == 20 and written["tokens"] == 64 and written["trace"]["standard_error"] is None
    assert set(written) - {"format", "verb", "run", "path", "step", "definitions", "data"} >= {
        "hessian",
        "gauss_newton",
        "density",
        "parts",
    }
    assert (run_folder / "report" / "curvature.png").stat().st_size > 10_000
    assert "largest eigenvalue" in capsys.readouterr().out


def test_networks_without_curvature_are_named(tmp_path: Path, run_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Weights that are NaN, and weights that are all 0: no gradient, and Lanczos ends at once in each part."""
    for step, value, problem in ((30, math.nan, "the loss over these tokens is nan"), (40, 0.0, "the gradient is 0 everywhere")):
        broken = Transformer(CONFIG)
        with torch.no_grad():
            for parameter in broken.parameters():
                parameter.fill_(value)
        folder = run_folder / "checkpoints" / f"step-{step:08d}"
        write_checkpoint(folder, broken, step)
        assert main(["curvature", str(run_folder), "--steps", "4", "--probes", "1", "--tokens", "64"]) == 2
        (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
        assert line.startswith(f"error: {folder}: {problem}")


def test_a_run_that_began_with_a_pretrained_model_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import tests.analysis.tiny_pruned as tiny

    tiny.write_llama(tmp_path / "base")
    tiny.write_llama_run(tmp_path / "run", tmp_path / "base", pruned=False)
    assert main(["curvature", str(tmp_path / "run")]) == 2
    assert "began with model.pretrained; curvature is measured of Burnish's own networks alone" in capsys.readouterr().err


def test_lanczos_takes_a_matrix_of_zeros_and_refuses_nan() -> None:
    values, weights, _ = lanczos(torch.zeros_like, torch.ones(6), 4)
    assert (values.tolist(), weights.tolist()) == ([0.0], [1.0])
    with pytest.raises(InputError, match="products with the Hessian are not finite"):
        lanczos(lambda v: v * math.nan, torch.ones(6), 4)


@pytest.mark.parametrize("option", ["--tokens", "--steps", "--probes"])
def test_numbers_that_make_no_sense(option: str, run_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["curvature", str(run_folder), option, "0"]) == 2
    assert f"{option} 0: expected at least" in capsys.readouterr().err
    assert not (run_folder / "report").exists()
