"""Schedules against their closed forms, and the guarded optimizer against torch's own."""

from __future__ import annotations

import math

import pytest
import torch

from training.optimizers import GuardedAdamW, learning_rate, total_norm
from training.recipe import OptimizerSection


def rates(steps: int = 100, **fields: object) -> list[float]:
    section = OptimizerSection(**{"learning_rate": 2.0, "warmup_fraction": 0.1, "final_learning_rate_fraction": 0.1, **fields})
    return [learning_rate(section, step, steps) for step in range(steps)]


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant", "warmup_stable_decay"])
def test_warmup_is_linear_and_reaches_the_peak(schedule: str) -> None:
    values = rates(schedule=schedule)
    assert values[:10] == pytest.approx([0.2 * (i + 1) for i in range(10)])
    assert values[10] == pytest.approx(2.0)
    assert max(values) == pytest.approx(2.0)


def test_decays_end_at_the_fraction_on_the_last_step() -> None:
    for schedule in ("cosine", "linear", "warmup_stable_decay"):
        assert rates(schedule=schedule)[-1] == pytest.approx(0.2)
    assert rates(schedule="constant")[-1] == 2.0


def test_shapes() -> None:
    cosine, linear, stable = rates(schedule="cosine"), rates(schedule="linear"), rates(schedule="warmup_stable_decay", decay_fraction=0.2)
    for step in range(10, 100):
        progress = (step - 10) / 89
        assert cosine[step] == pytest.approx(0.2 + 1.8 * (1 + math.cos(math.pi * progress)) / 2)
        assert linear[step] == pytest.approx(2.0 - 1.8 * progress)
    assert stable[10:81] == pytest.approx([2.0] * 71)
    assert stable[81:] == pytest.approx([2.0 - 1.8 * (step - 80) / 19 for step in range(81, 100)])


def test_no_warmup_and_single_step() -> None:
    assert rates(warmup_fraction=0.0)[0] == 2.0
    assert rates(steps=1) == [2.0]


def make(max_norm: float) -> tuple[list[torch.nn.Parameter], GuardedAdamW]:
    generator = torch.Generator().manual_seed(0)
    parameters = [torch.nn.Parameter(torch.randn(n, generator=generator)) for n in (3, 7)]
    return parameters, GuardedAdamW([{"params": parameters}], max_norm=max_norm, lr=0.1, weight_decay=0.01)


@pytest.mark.parametrize("max_norm", [0.0, 0.5, 100.0])
def test_guarded_adamw_is_adamw_after_clipping(max_norm: float) -> None:
    ours, guarded = make(max_norm)
    theirs, _ = make(max_norm)
    plain = torch.optim.AdamW(theirs, lr=0.1, weight_decay=0.01)
    for step in range(4):
        for a, b in zip(ours, theirs, strict=True):
            a.grad = torch.sin(a.detach() * (step + 1))
            b.grad = torch.sin(b.detach() * (step + 1))
        if max_norm:
            torch.nn.utils.clip_grad_norm_(theirs, max_norm)
        guarded.step()
        plain.step()
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_step_with_non_finite_gradients_changes_nothing(bad: float) -> None:
    parameters, guarded = make(1.0)
    before = [p.detach().clone() for p in parameters]
    for p in parameters:
        p.grad = torch.ones_like(p)
    assert parameters[1].grad is not None
    parameters[1].grad[2] = bad
    guarded.step()
    assert guarded.overflow and not guarded.state
    assert all(torch.equal(a, b) for a, b in zip(before, parameters, strict=True))
    parameters[1].grad[2] = 1.0
    guarded.step()
    assert not guarded.overflow and not torch.equal(before[0], parameters[0])


def test_total_norm_is_that_of_the_concatenation() -> None:
    tensors = [torch.randn(n) for n in (1, 10, 100)]
    assert total_norm(tensors).item() == pytest.approx(torch.cat(tensors).norm().item(), rel=1e-6)
