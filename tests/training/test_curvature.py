"""The preconditioned Hessian against its eigenvalues, with a learning rate and an epsilon for each group."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from training.curvature import Curvature
from training.recipe import OptimizerSection


def test_the_preconditioner_is_the_update_of_each_group() -> None:
    """Adam moves a weight by rate f m / (sqrt(v) + epsilon), f and epsilon of its group: that times H has to stay below the line."""
    generator = torch.Generator().manual_seed(0)
    h = torch.randn(5, 5, generator=generator)
    h = h @ h.T
    masters = [torch.zeros(2), torch.zeros(3)]
    moments, sizes = [torch.rand(2, generator=generator), torch.rand(3, generator=generator)], [2, 3]
    groups = [{"params": [masters[1]], "lr_factor": 0.25, "eps": 0.1}, {"params": [masters[0]], "lr_factor": 1.0, "eps": 0.3}]
    fake = SimpleNamespace(
        shapes=[(2,), (3,)],
        masters=masters,
        base=SimpleNamespace(param_groups=groups),
        normal=lambda seed: list(torch.randn(5, generator=torch.Generator().manual_seed(seed)).split(sizes)),
        dot=lambda a, b: float(torch.cat(a) @ torch.cat(b)),
        norm=lambda a: float(torch.cat(a).norm()),
        scale=lambda a, factor: [x * factor for x in a],
        state=lambda key: moments,
        steps=lambda: 3,
    )
    curvature = object.__new__(Curvature)
    curvature.engine = SimpleNamespace(masters=fake, recipe=SimpleNamespace(optimizer=OptimizerSection(betas=(0.9, 0.95))))
    curvature.iterations, curvature.found = 300, {}
    curvature.hessian = curvature.gauss_newton = lambda v: list((h @ torch.cat(v)).split(sizes))
    measured = curvature.measure(1e-2)
    v = torch.cat(moments) / (1 - 0.95**3)
    root = (torch.tensor([1.0, 1.0, 0.25, 0.25, 0.25]) / (v.sqrt() + torch.tensor([0.3, 0.3, 0.1, 0.1, 0.1]))).sqrt()
    assert measured["preconditioned_hessian_top"] == pytest.approx(float(torch.linalg.eigvalsh(root[:, None] * h * root)[-1]), rel=1e-4)
    assert measured["hessian_top"] == pytest.approx(float(torch.linalg.eigvalsh(h)[-1]), rel=1e-4)
    assert measured["stability_line"] == pytest.approx(38 / 1e-2)
