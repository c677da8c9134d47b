"""Parameter groups, the base optimizers, and learning-rate schedules."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from model.parametrization import is_decayed, learning_factors, owned_parameters
from model.pretrained import PretrainedDecoder
from training.network import Network
from training.recipe import OptimizerSection

LARGEST_PRECONDITIONER = 10_000  # SOAP's default: a longer side of a matrix is not rotated


def parameter_groups(model: Network, section: OptimizerSection) -> dict[str, dict[str, Any]]:
    """Name -> {params, weight_decay, lr_factor, and eps where the optimizer has one}, none empty.

    The blocks' matrices, the embeddings, and what is not decayed: the blocks' vectors, and the rest. Each has the factors of the
    network's parametrization in it; `Engine.step` multiplies the learning rate by `lr_factor`. What decides about the context is a group
    of its own, and so are the matrices and vectors of a pretrained network, whose parts have other names. Frozen parameters are in none.
    """
    groups: dict[str, dict[str, Any]] = {name: {} for name in ("matrices", "embeddings", "vectors", "the rest", "interactions")}
    for name, module, parameter in owned_parameters(model):
        if not parameter.requires_grad:
            continue
        if ".context_pruning." in name:
            _add(groups["interactions"], parameter, section, section.pruning_learning_rate_factor, 0.0)
            groups["interactions"]["interactions"] = True
            continue
        if isinstance(model, PretrainedDecoder):
            matrix = len(getattr(parameter, "ds_shape", parameter.shape)) > 1  # at ZeRO stage 3 a parameter itself is flat
            _add(groups["matrices" if matrix else "vectors"], parameter, section, 1.0, section.weight_decay if matrix else 0.0)
            continue
        inside, decayed = name.startswith("blocks."), is_decayed(name, module)
        group = groups[("matrices" if inside else "embeddings") if decayed else ("vectors" if inside else "the rest")]
        if not group:  # the factors are the same for all of a group
            factors = learning_factors(name, module, model.config, by_root=section.kind in ("adafactor", "muon"))
            embedded = section.embedding_learning_rate_factor if decayed and not inside else 1.0
            group.update(params=[], lr_factor=factors.learning_rate * embedded, lr=factors.learning_rate * embedded * section.learning_rate)
            group["weight_decay"] = factors.weight_decay * section.weight_decay if decayed else 0.0
            if section.kind in ("adamw", "soap") or (section.kind == "muon" and not (inside and decayed)):
                group["eps"] = factors.epsilon * section.epsilon
        group["params"].append(parameter)
    return {name: group for name, group in groups.items() if group}


def _add(group: dict[str, Any], parameter: torch.nn.Parameter, section: OptimizerSection, factor: float, weight_decay: float) -> None:
    if not group:
        group.update(params=[], lr_factor=factor, lr=factor * section.learning_rate, weight_decay=weight_decay)
        if section.kind in ("adamw", "soap"):
            group["eps"] = section.epsilon
    group["params"].append(parameter)


def describe_groups(model: Network, section: OptimizerSection) -> str:
    """What updates which parameters: a line for each group."""
    lines = []
    for name, group in parameter_groups(model, section).items():
        kind = "adamw" if section.kind == "muon" and name != "matrices" else section.kind
        # ds_numel: at ZeRO stage 3 a parameter itself is empty
        count = sum(getattr(parameter, "ds_numel", parameter.numel()) for parameter in group["params"])
        line = f"{kind} on {name}: {len(group['params'])} tensors, {count:,} parameters, weight decay {group['weight_decay']:g}"
        factors = f", learning rate x {group['lr_factor']:g}" if group["lr_factor"] != 1 else ""
        if group.get("eps", section.epsilon) != section.epsilon:
            factors += f", epsilon {group['eps']:.3g}"
        lines.append(line + factors)
    return "\n".join(lines)


def state_elements(model: Network, section: OptimizerSection) -> int:
    """Numbers that the optimizer keeps for the whole of these parameters, float32 each, beside the weights."""
    count = 0
    for name, group in parameter_groups(model, section).items():
        for parameter in group["params"]:
            size, sides = parameter.numel(), list(parameter.shape) if parameter.ndim > 1 else []
            if section.kind == "adafactor":
                count += sum(sides) if sides else size  # second moments of rows and columns
            elif section.kind == "muon" and name == "matrices":
                count += size  # momentum
            else:
                count += 2 * size
            if section.kind == "soap":  # a covariance and its eigenvectors for each side
                count += sum(2 * side**2 for side in sides if side <= (section.largest_preconditioner or LARGEST_PRECONDITIONER))
    return count


def make_optimizer(model: Network, section: OptimizerSection, sharded: bool = True, max_norm: float | None = None) -> torch.optim.Optimizer:
    """The recipe's base optimizer over `parameter_groups`.

    Args:
        sharded: DeepSpeed hands it flat shards (ZeRO 1 to 3), which AdamW alone can work on; otherwise it is a `JointOptimizer`.
        max_norm: what that one clips to; None where DeepSpeed does.
    """
    groups = parameter_groups(model, section)
    adam: dict[str, Any] = {"betas": section.betas}  # AdamW is fused, on a CPU too: one pass over a group's memory, without temporaries
    if section.kind == "adamw":
        members: list[torch.optim.Optimizer] = [torch.optim.AdamW(groups.values(), **adam, fused=True)]
    elif section.kind == "adafactor":
        members = [torch.optim.Adafactor(groups.values())]
    elif section.kind == "muon":  # orthogonalised momentum, with AdamW's size of step so that one learning rate serves both
        momentum = 0.95 if section.momentum is None else section.momentum
        muon = torch.optim.Muon([groups.pop("matrices")], momentum=momentum, adjust_lr_fn="match_rms_adamw")
        members = [muon, torch.optim.AdamW(groups.values(), **adam, fused=True)]
    else:
        from pytorch_optimizer import SOAP

        frequency, largest = section.precondition_frequency or 10, section.largest_preconditioner or LARGEST_PRECONDITIONER
        members = [SOAP(list(groups.values()), **adam, precondition_frequency=frequency, max_precondition_dim=largest)]
    return members[0] if sharded else JointOptimizer(members, max_norm)


class JointOptimizer(torch.optim.Optimizer):
    """Several optimizers as the one that DeepSpeed takes without ZeRO, each on parameters of its own.

    Given a norm it also clips, and skips a step whose gradients are not finite: DeepSpeed without ZeRO does neither in fp32, and
    reports that it did the step. Its engine reads `overflow` and `_global_grad_norm` from any optimizer that has them, as its own
    ZeRO optimizers do. In bf16 DeepSpeed clips and skips by itself.

    Until `ready` is set nothing moves: when DeepSpeed wraps an optimizer for bf16 it takes a step with zero gradients to have the
    state allocated, which would decay the weights and count as a step in the moments' bias correction.
    """

    def __init__(self, members: list[torch.optim.Optimizer], max_norm: float | None) -> None:
        self.members = members
        super().__init__([group for member in members for group in member.param_groups], {})
        self.max_norm = max_norm
        self.ready = False
        self.overflow = False
        self._global_grad_norm = 0.0
        self._share()

    def _share(self) -> None:
        """One state and one list of groups, of which each member sees its own: what is loaded or replaced here is so there."""
        start = 0
        for member in self.members:
            stop = start + len(member.param_groups)
            member.param_groups, member.state = self.param_groups[start:stop], self.state
            start = stop

    def __setstate__(self, state: dict[str, Any]) -> None:  # load_state_dict ends in this
        super().__setstate__(state)
        self._share()

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        if not self.ready or (self.max_norm is not None and not self._clip(self.max_norm)):
            return
        for member in self.members:
            member.step()

    def _clip(self, max_norm: float) -> bool:
        """Scale the gradients to `max_norm` (0: leave them); False, with `overflow` set, where they are not finite."""
        gradients = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
        self._global_grad_norm = total_norm(gradients).item()
        self.overflow = not math.isfinite(self._global_grad_norm)
        if not self.overflow and max_norm > 0:
            factor = 1.0 / max(1.0, (self._global_grad_norm + 1e-6) / max_norm)  # DeepSpeed's formula, so that stages agree
            if factor < 1.0:
                for gradient in gradients:
                    gradient.mul_(factor)
        return not self.overflow


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
