"""Schedules against their closed forms, and the base optimizers against torch's own."""

from __future__ import annotations

import io
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from model.config import ModelConfig
from model.parametrization import initialize
from model.transformer import Transformer
from training.optimizers import JointOptimizer, describe_groups, learning_rate, make_optimizer, parameter_groups, state_elements, total_norm
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


def make(max_norm: float | None) -> tuple[list[torch.nn.Parameter], JointOptimizer]:
    generator = torch.Generator().manual_seed(0)
    parameters = [torch.nn.Parameter(torch.randn(n, generator=generator)) for n in (3, 7)]
    joint = JointOptimizer([torch.optim.AdamW([{"params": parameters}], lr=0.1, weight_decay=0.01)], max_norm)
    joint.ready = True
    return parameters, joint


@pytest.mark.parametrize("max_norm", [None, 0.0, 0.5, 100.0])
def test_joint_adamw_is_adamw_after_clipping(max_norm: float | None) -> None:
    ours, joint = make(max_norm)
    theirs, _ = make(max_norm)
    plain = torch.optim.AdamW(theirs, lr=0.1, weight_decay=0.01)
    for step in range(4):
        for a, b in zip(ours, theirs, strict=True):
            a.grad = torch.sin(a.detach() * (step + 1))
            b.grad = torch.sin(b.detach() * (step + 1))
        if max_norm:
            torch.nn.utils.clip_grad_norm_(theirs, max_norm)
        joint.step()
        plain.step()
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def network(**fields: Any) -> Transformer:
    values: dict[str, Any] = {"width": 24, "depth": 2, "heads": 2, "vocab_size": 50, "sequence_length": 8, "block": "outlier_protected"}
    model = Transformer(ModelConfig(**values | fields))
    initialize(model, 0)
    return model


def backward(model: Transformer, step: int) -> None:
    tokens = torch.randint(0, 50, (4, 9), generator=torch.Generator().manual_seed(step))
    model.zero_grad()
    (model(tokens[:, :-1], tokens[:, 1:]) / 32).backward()


def stepped(model: Transformer, optimizer: torch.optim.Optimizer, steps: range) -> list[torch.Tensor]:
    for step in steps:
        backward(model, step)
        optimizer.step()
    return [p.detach().clone() for p in model.parameters()]


KINDS = ["adamw", "adafactor", "muon", "soap"]


@pytest.mark.parametrize("kind", KINDS)
def test_every_weight_moves_and_every_parameter_is_in_one_group(kind: str) -> None:
    model = network(positions="learned", biases="all", final_norm=True, tied_embeddings=False)
    section = OptimizerSection.model_validate({"kind": kind, "learning_rate": 1e-2})
    groups = parameter_groups(model, section)
    assert list(groups) == ["matrices", "embeddings", "vectors", "the rest"]
    members = [id(p) for group in groups.values() for p in group["params"]]
    assert sorted(members) == sorted(id(p) for p in model.parameters())
    assert all(p.ndim == 2 for name in ("matrices", "embeddings") for p in groups[name]["params"])
    assert all(line.endswith("weight decay 0") for line in describe_groups(model, section).splitlines()[2:])
    optimizer = make_optimizer(model, section, sharded=False, max_norm=1.0)
    assert isinstance(optimizer, JointOptimizer)
    optimizer.ready = True
    before = [p.detach().clone() for p in model.parameters()]
    after = stepped(model, optimizer, range(3))
    for (name, _), a, b in zip(model.named_parameters(), before, after, strict=True):
        assert not torch.equal(a, b), name
    held = sum(t.numel() for t in _tensors(list(optimizer.state.values())) if t.ndim)
    assert held == state_elements(model, section)


def _tensors(thing: Any) -> Iterator[torch.Tensor]:
    if isinstance(thing, torch.Tensor):
        yield thing
    elif isinstance(thing, dict | list):
        for part in thing.values() if isinstance(thing, dict) else thing:
            yield from _tensors(part)


def test_muon_is_muon_on_the_blocks_and_adamw_elsewhere() -> None:
    """Against torch's two optimizers run by hand on the same parameters."""
    section = OptimizerSection(kind="muon", learning_rate=1e-2, weight_decay=0.2, betas=(0.8, 0.9), epsilon=1e-6, momentum=0.9)
    ours, theirs = network(), network()
    joint = make_optimizer(ours, section, sharded=False, max_norm=None)
    assert isinstance(joint, JointOptimizer)
    joint.ready = True
    matrices = [p for n, p in theirs.named_parameters() if n.startswith("blocks") and p.ndim == 2]
    vectors = [p for p in theirs.parameters() if p.ndim == 1]
    muon = torch.optim.Muon(matrices, lr=1e-2, weight_decay=0.2, momentum=0.9, adjust_lr_fn="match_rms_adamw")
    rest = [{"params": [theirs.embedding.weight], "weight_decay": 0.2}, {"params": vectors, "weight_decay": 0.0}]
    adam = torch.optim.AdamW(rest, lr=1e-2, betas=(0.8, 0.9), eps=1e-6, fused=True)
    for step in range(3):
        for model in (ours, theirs):
            backward(model, step)
        joint.step()
        muon.step()
        adam.step()
    for (name, a), b in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, msg=name)


@pytest.mark.parametrize("kind", KINDS)
def test_saved_state_goes_on_exactly(kind: str) -> None:
    section = OptimizerSection.model_validate(
        {"kind": kind, "learning_rate": 1e-2, "precondition_frequency": 2 if kind == "soap" else None}
    )

    def make_both() -> tuple[Transformer, JointOptimizer]:
        model = network()
        optimizer = make_optimizer(model, section, sharded=False, max_norm=0.0)
        assert isinstance(optimizer, JointOptimizer)
        optimizer.ready = True
        return model, optimizer

    model, optimizer = make_both()
    stepped(model, optimizer, range(3))
    buffer = io.BytesIO()
    torch.save({"weights": model.state_dict(), "optimizer": optimizer.state_dict()}, buffer)
    whole = stepped(model, optimizer, range(3, 6))
    buffer.seek(0)
    saved = torch.load(buffer, weights_only=True)
    model, optimizer = make_both()
    model.load_state_dict(saved["weights"])
    optimizer.load_state_dict(saved["optimizer"])
    for a, b in zip(whole, stepped(model, optimizer, range(3, 6)), strict=True):
        assert torch.equal(a, b)


def test_soap_rotates_what_is_short_enough() -> None:
    """With no side to rotate SOAP is Adam in the weights' own basis, one step later: its first gradient only fills the statistics."""
    section = OptimizerSection(
        kind="soap", learning_rate=1e-2, largest_preconditioner=1, weight_decay=0.0, betas=(0.9, 0.95), epsilon=1e-20
    )
    ours, theirs = network(), network()
    soap = make_optimizer(ours, section, sharded=False, max_norm=None)
    assert isinstance(soap, JointOptimizer)
    soap.ready = True
    adam = torch.optim.AdamW(theirs.parameters(), lr=1e-2, betas=(0.9, 0.95), eps=1e-20, weight_decay=0.0)
    assert all(torch.equal(a, b) for a, b in zip(stepped(ours, soap, range(1)), theirs.parameters(), strict=True))
    for a, b in zip(stepped(ours, soap, range(1, 4)), stepped(theirs, adam, range(1, 4)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    assert state_elements(network(), section) == 2 * sum(p.numel() for p in ours.parameters())


def test_nothing_moves_before_the_optimizer_is_ready() -> None:
    parameters, joint = make(1.0)
    joint.ready = False
    before = [p.detach().clone() for p in parameters]
    for p in parameters:
        p.grad = torch.zeros_like(p)
    joint.step()
    assert not joint.state and all(torch.equal(a, b) for a, b in zip(before, parameters, strict=True))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_step_with_non_finite_gradients_changes_nothing(bad: float) -> None:
    parameters, joint = make(1.0)
    before = [p.detach().clone() for p in parameters]
    for p in parameters:
        p.grad = torch.ones_like(p)
    assert parameters[1].grad is not None
    parameters[1].grad[2] = bad
    joint.step()
    assert joint.overflow and not joint.state
    assert all(torch.equal(a, b) for a, b in zip(before, parameters, strict=True))
    parameters[1].grad[2] = 1.0
    joint.step()
    assert not joint.overflow and not torch.equal(before[0], parameters[0])


def test_total_norm_is_that_of_the_concatenation() -> None:
    tensors = [torch.randn(n) for n in (1, 10, 100)]
    assert total_norm(tensors).item() == pytest.approx(torch.cat(tensors).norm().item(), rel=1e-6)
