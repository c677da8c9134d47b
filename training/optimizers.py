"""Parameter groups, the base optimizer, and learning-rate schedules."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from model.parametrization import is_decayed, owned_parameters
from training.recipe import OptimizerSection


def parameter_groups(model: nn.Module, section: OptimizerSection) -> list[dict]:
    """Two groups: matrices with weight decay, and the rest without."""
    decayed, rest = [], []
    for name, module, parameter in owned_parameters(model):
        (decayed if is_decayed(name, module) else rest).append(parameter)
    groups = [{"params": decayed, "weight_decay": section.weight_decay}, {"params": rest, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def make_optimizer(model: nn.Module, section: OptimizerSection, fused: bool, guarded_norm: float | None = None) -> torch.optim.AdamW:
    """AdamW over `parameter_groups`; `fused` where one kernel updates a whole group; `GuardedAdamW` given a norm to clip to."""
    groups = parameter_groups(model, section)
    arguments: dict[str, Any] = {"lr": section.learning_rate, "betas": section.betas, "eps": section.epsilon, "fused": fused}
    if guarded_norm is not None:
        return GuardedAdamW(groups, guarded_norm, **arguments)
    return torch.optim.AdamW(groups, **arguments)


class GuardedAdamW(torch.optim.AdamW):
    """AdamW that clips, and skips a step whose gradients are not finite.

    For DeepSpeed without ZeRO in fp32, which otherwise applies a NaN step and reports that it was applied. DeepSpeed's engine
    reads `overflow` and `_global_grad_norm` from any optimizer that has them: its own ZeRO optimizers keep the same two.
    """

    def __init__(self, groups: list[dict], max_norm: float, **arguments: object) -> None:
        super().__init__(groups, **arguments)  # pyright: ignore[reportArgumentType]
        self.max_norm = max_norm
        self.overflow = False
        self._global_grad_norm = 0.0

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        gradients = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
        norm = total_norm(gradients)
        self._global_grad_norm = norm.item()
        self.overflow = not math.isfinite(self._global_grad_norm)
        if self.overflow:
            return
        if self.max_norm > 0:
            factor = 1.0 / max(1.0, (self._global_grad_norm + 1e-6) / self.max_norm)  # DeepSpeed's formula, so that stages agree
            if factor < 1.0:
                for gradient in gradients:
                    gradient.mul_(factor)
        super().step()


def total_norm(tensors: list[Tensor]) -> Tensor:
    """Euclidean norm of all tensors together, a float32 scalar."""
    return torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(t, dtype=torch.float32) for t in tensors]))


def learning_rate(section: OptimizerSection, step: int, total_steps: int) -> float:
    """Learning rate of step `step` (0-based) of `total_steps`: a pure function, so that resuming needs no state.

    Linear warm-up over `warmup_fraction` of the steps; then cosine or linear decay to `final_learning_rate_fraction` of the
    peak, constant, or constant with a linear decay over the last `decay_fraction` (warmup-stable-decay).
    """
    warmup = round(section.warmup_fraction * total_steps)
    if step < warmup:
        return section.learning_rate * (step + 1) / warmup
    last = section.final_learning_rate_fraction
    start = warmup
    if section.schedule == "warmup_stable_decay":
        start = max(warmup, total_steps - round(section.decay_fraction * total_steps))
    # 0 at the first step after `start`, 1 at the last step of the run
    progress = min(1.0, max(0.0, (step - start) / max(1, total_steps - 1 - start)))
    if section.schedule == "constant":
        factor = 1.0
    elif section.schedule == "cosine":
        factor = last + (1 - last) * 0.5 * (1 + math.cos(math.pi * progress))
    else:
        factor = last + (1 - last) * (1 - progress)
    return section.learning_rate * factor
