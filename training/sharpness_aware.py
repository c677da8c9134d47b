"""SAM, Functional-SAM and their preconditioned forms, as one training step over the engine.

With theta the master weights, L the mean loss of the step's tokens, F the logits and J = dF / d theta:

    g      = dL/dtheta at theta                                    first pass
    u      = g, or preconditioned g / (v^exponent + epsilon)       v: AdamW's second moment
    e      = radius u / ||u||                                      the perturbation
    g_sam  = J(theta + e)^T dL/dF(theta + e)                       SAM, arXiv 2010.01412
    g_fsam = J(theta + e)^T dL/dF(theta)                           Functional-SAM, arXiv 2502.02407
    theta  = AdamW(theta, g_sam or g_fsam)                         second pass; clipping acts here, decay on theta

To first order (g_fsam - g) / radius = (H - G) u/||u|| and (g_sam - g_fsam) / radius = G u/||u||, with H the Hessian of L and
G = J^T d2L/dF2 J its Gauss-Newton part. docs/functional_sam.md has the options, the cost and what was measured.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from model.linear_cross_entropy import FrozenHead
from training.data import Batch
from training.engine import Engine, StepResult
from training.master_weights import MasterWeights, Vector
from training.optimizers import learning_rate
from training.recipe import OptimizerSection


@dataclass(frozen=True)
class Outcome:
    """What a training step did.

    Attributes:
        loss_sum: summed loss, at the unperturbed weights, of those of this rank's tokens for which it was computed, a float32 scalar.
        loss_tokens: how many those are.
        values: what is logged beside; empty for a plain step.
        ascent_was_finite: of a step that was not applied: only the second pass was at fault.
        buried: a warning, where hardly anything of the perturbation reached the forward weights.
        watched: what the context `watch` gave.
        refused: `accept` said no, so no update was made.
    """

    result: StepResult
    loss_sum: Tensor
    loss_tokens: int
    values: dict[str, float | dict[str, float]]
    ascent_was_finite: bool = False
    buried: str | None = None
    watched: Any = None
    refused: bool = False


def take_step(
    engine: Engine,
    batches: list[Batch],
    valid_tokens: float,
    step: int,
    total_steps: int,
    logged: bool,
    watch: AbstractContextManager = nullcontext(),  # noqa: B008 - it holds nothing
    accept: Callable[[Tensor, int], bool] = lambda loss_sum, tokens: True,
) -> Outcome:
    """One optimizer step on this rank's micro-batches, of the kind that the recipe asks for at this step. Every rank calls it.

    Args:
        valid_tokens: counted targets of the step over all ranks.
        step: 0-based, of `total_steps`: the schedules are functions of it.
        logged: measure what is written to the metrics as well; where `is_split`, that is always done.
        watch: open while the forward passes at the unperturbed weights run, and then no more.
        accept: is given this rank's summed loss and its tokens, and says whether the update may be made, on every rank alike.
    """
    optimizer = engine.recipe.optimizer
    rate, radius = learning_rate(optimizer, step, total_steps), radius_at(optimizer, step, total_steps)
    if radius > 0:
        split = is_split(optimizer, step, total_steps)
        outcome = _sharpness_aware_step(engine, batches, 1.0 / valid_tokens, rate, radius, split, logged, watch, accept)
        if outcome is not None:
            return outcome
        # The first gradient is not finite, and neither is the plain step's, which is skipped, counted and reported like any other.
        watch = nullcontext()
    losses = torch.zeros((), device=engine.device)
    with watch as watched:
        for batch in batches:
            losses += engine.accumulate(batch, scale=1.0 / valid_tokens)
    if not accept(losses, _counted(batches)):
        return Outcome(engine.discard(), losses, _counted(batches), {}, watched=watched, refused=True)
    return Outcome(engine.step(rate), losses, _counted(batches), {}, watched=watched)


def radius_at(optimizer: OptimizerSection, step: int, total_steps: int) -> float:
    """Radius of the perturbation at step `step` (0-based) of `total_steps`; 0: a plain step."""
    options = optimizer.sharpness
    first = round(options.start_fraction * total_steps)
    if optimizer.sharpness_aware == "none" or step < first or (step + 1) % options.every:  # counted as the loop counts what it logs
        return 0.0
    if options.schedule == "learning_rate":
        return options.radius * learning_rate(optimizer, step, total_steps) / optimizer.learning_rate
    if options.schedule == "linear_increase":
        return options.radius * (step + 1 - first) / (total_steps - first)
    return options.radius


def is_split(optimizer: OptimizerSection, step: int, total_steps: int) -> bool:
    """Whether step `step` (0-based) of `total_steps` tells what acts through the logits from what acts through the function."""
    every = optimizer.sharpness.split_every
    return every is not None and (step + 1) % every == 0 and radius_at(optimizer, step, total_steps) > 0


def _sharpness_aware_step(
    engine: Engine,
    batches: list[Batch],
    scale: float,
    rate: float,
    radius: float,
    split: bool,
    logged: bool,
    watch: AbstractContextManager,
    accept: Callable[[Tensor, int], bool],
) -> Outcome | None:
    """Two passes and an update, or none where the loss of the first is not accepted; None, with nothing changed, where the first pass's
    gradient is not finite."""
    optimizer, options, masters = engine.recipe.optimizer, engine.recipe.optimizer.sharpness, engine.masters
    functional = optimizer.sharpness_aware == "functional_sam"
    logged = logged or split
    count = round(options.ascent_fraction * len(batches))
    ascent, rest = batches[:count], batches[count:]

    random_state = _random_state(engine.device)
    keeping = engine.kept_heads(options.store_logits) if functional or split else nullcontext([])
    with watch as watched:
        with keeping as kept:
            gradient, losses = engine.gradient(ascent, scale * len(batches) / len(ascent))
            if functional and options.rest == "perturbed":  # the rest of the batch needs its derivative at the logits as well
                for batch in rest:
                    losses += engine.summed_loss(batch, training=True)
        if gradient is None:
            _set_random_state(random_state, engine.device)
            return None
        judged = _counted(batches if functional and options.rest == "perturbed" else ascent)
        if not accept(losses, judged):
            return Outcome(engine.leave_out(masters.norm(gradient)), losses, judged, {}, watched=watched, refused=True)
        if options.rest == "plain":  # these are done with; the perturbed pass goes over the others
            for batch in rest:
                losses += engine.accumulate(batch, scale)
    again, measured = (batches if options.rest == "perturbed" else ascent), (batches if functional or options.rest == "plain" else ascent)
    heads = _frozen_heads(engine, again, kept, options.store_logits) if kept else []
    end_state = _random_state(engine.device)
    plain = [part.clone() for part in gradient] if split else None
    values: dict[str, float | dict[str, float]] = {"radius": radius}
    if logged:
        values["ascent_norm"] = masters.norm(gradient)
    perturbation = perturb_along(masters, gradient, optimizer, radius)
    del gradient

    other = after = None
    if split:
        _set_random_state(random_state, engine.device)
        with engine.perturbed(perturbation, options.float32_second_pass):
            other, _ = engine.gradient(batches, scale, None if functional else heads)
        after = masters.zeros()
    before = [weight.detach().clone() for weight in masters.forward] if logged else []
    keep = perturbation if split else None
    _set_random_state(random_state, engine.device)
    with engine.perturbed(perturbation, options.float32_second_pass):
        if logged:
            values.update(compare(masters, masters.moved(before), perturbation, by_tensor=split))
        del perturbation, before
        if logged and functional:
            heads = [replace(head, measured=True) for head in heads]
        losses_there = torch.zeros((), device=engine.device)
        for number, batch in enumerate(again):
            losses_there += engine.accumulate(batch, scale, heads[number] if functional else None)
        result = engine.step(rate, after)
    if options.rest == "plain":
        _set_random_state(end_state, engine.device)
    if logged:
        total = losses_there.double()
        if engine.ranks.world_size > 1:
            torch.distributed.all_reduce(total)
        values["perturbed_loss"] = float(total) * scale * len(batches) / len(again)
    if split and other is not None and result.applied and plain is not None and after is not None and keep is not None:
        sam, functional_sam = (other, after) if functional else (after, other)
        values.update(split_of(masters, plain, functional_sam, sam, masters.norm(keep)))
    return Outcome(result, losses, _counted(measured), values, True, _buried(values, options.cosine_warning), watched)


def _buried(values: dict[str, Any], least: float) -> str | None:
    cosine = values.get("perturbation_cosine", 1.0)
    if cosine >= least:
        return None
    return (
        f"the perturbation that reaches the forward weights has cosine {cosine:.2f} with the intended one "
        f"(optimizer.sharpness.cosine_warning {least:g}): the rest is rounding; optimizer.sharpness.float32_second_pass helps"
    )


def perturb_along(masters: MasterWeights, gradient: Vector, optimizer: OptimizerSection, radius: float) -> Vector:
    """Turn the gradient, in place, into the perturbation e = radius u / ||u||.

    The preconditioned direction is u = g / (v^exponent + epsilon), with v the bias-corrected second moment of AdamW: either as
    the last step left it, or with this gradient taken in. Before there is one, u = g. (The paper's exponent, epsilon and choice of
    moment are not known to us, hence the options.)

    Norms, by `norm_scope`:
        global:        ||e|| = radius.
        tensor:        ||e_l|| = radius / sqrt(tensors) for every parameter tensor l, so that ||e|| = radius as well.
        tensor_width:  ||e_l|| = radius sqrt(fan_out / fan_in): the norm with which a matrix of rank one changes activations of
                       unit size by `radius` at any width (the spectral condition of arXiv 2310.17813; our reading of what muP^2,
                       arXiv 2411.00075, asks of SAM). An embedding has fan_in 1, a vector is a diagonal matrix.
    """
    options = optimizer.sharpness
    if options.precondition:
        _precondition(masters, gradient, optimizer)
    squares = masters.dot_by_tensor(gradient, gradient)
    if options.norm_scope == "global":
        norm = math.sqrt(float(squares.sum()))
        return masters.scale(gradient, radius / norm if norm > 0 else 0.0)
    if options.norm_scope == "tensor":
        wanted = torch.full_like(squares, radius / math.sqrt(len(squares)))
    else:
        wanted = torch.tensor([radius * unit_norm(name, shape) for name, shape in zip(masters.names, masters.shapes, strict=True)])
    return masters.scale_by_tensor(gradient, torch.where(squares > 0, wanted / squares.sqrt(), 0.0))


def unit_norm(name: str, shape: tuple[int, ...]) -> float:
    """sqrt(fan_out / fan_in) of a parameter: see `perturb_along`."""
    if len(shape) < 2:
        return 1.0
    return math.sqrt(shape[1]) if "embedding" in name and "unembedding" not in name else math.sqrt(shape[0] / shape[1])


def _precondition(masters: MasterWeights, gradient: Vector, optimizer: OptimizerSection) -> None:
    options, decay = optimizer.sharpness, optimizer.betas[1]
    moments, steps = masters.state("exp_avg_sq"), masters.steps()
    if moments is None:
        return
    for part, moment in zip(gradient, moments, strict=True):
        if options.second_moment == "updated":
            moment, taken = decay * moment + (1 - decay) * part * part, steps + 1
        else:
            taken = steps
        part.div_((moment / (1 - decay**taken)).pow_(options.precondition_exponent).add_(options.precondition_epsilon))


def compare(masters: MasterWeights, moved: Vector, perturbation: Vector, by_tensor: bool = False) -> dict[str, float | dict[str, float]]:
    """How far the forward weights have really moved along the perturbation that was asked for. Every rank calls it.

    In bf16 a perturbation is finer than the weights' spacing: what arrives is right on average, and mostly rounding.

    Returns:
        perturbation_norm: of what was asked for. perturbation_cosine: of the realised and the intended, over all weights, and
        perturbation_cosine_worst: over one tensor, the least. perturbation_projection: of the realised on the intended, in its
        lengths: 1 where all of it arrives. With `by_tensor` also perturbation_cosine_by_tensor, of each parameter that is to move, and
        perturbation_norm_by_tensor, of what was asked for.
    """
    along, asked, real = (masters.dot_by_tensor(*pair) for pair in ((moved, perturbation), (perturbation, perturbation), (moved, moved)))
    whole, there = float(asked.sum()), asked > 0
    cosines = along[there] / (asked[there] * real[there]).sqrt().clamp_min(1e-300)
    names = [name for name, moves in zip(masters.names, there.tolist(), strict=True) if moves]
    found: dict[str, float | dict[str, float]] = {}
    if by_tensor:
        found["perturbation_cosine_by_tensor"] = dict(zip(names, cosines.tolist(), strict=True))
        found["perturbation_norm_by_tensor"] = dict(zip(masters.names, asked.sqrt().tolist(), strict=True))
    return {
        **found,
        "perturbation_norm": math.sqrt(whole),
        "perturbation_cosine": float(along.sum()) / max(math.sqrt(whole * float(real.sum())), 1e-300),
        "perturbation_cosine_worst": float(cosines.min()) if len(cosines) else 0.0,
        "perturbation_projection": float(along.sum()) / max(whole, 1e-300),
    }


def split_of(masters: MasterWeights, plain: Vector, functional: Vector, sam: Vector, radius: float) -> dict[str, float | dict[str, float]]:
    """What the perturbation did through the logits and what through the function: see the top of this file.

    Overwrites `functional` and `sam`. `plain`, `functional` and `sam` are gradients of the same tokens.

    Returns:
        split_functional_norm: ||g_fsam - g|| / radius; split_logit_norm: ||g_sam - g_fsam|| / radius; split_cosine between the
        two; gradient_cosine_sam and gradient_cosine_functional: with g; ascent_norm_by_tensor: ||g|| of each parameter.
    """
    squares = masters.dot_by_tensor(plain, plain)
    norm = math.sqrt(float(squares.sum()))

    def cosine(a: Vector, b: Vector) -> float:
        return masters.dot(a, b) / max(masters.norm(a) * masters.norm(b), 1e-300)

    with_plain = cosine(plain, sam), cosine(plain, functional)
    masters.scale(masters.add(sam, functional, -1.0), 1 / radius)
    masters.scale(masters.add(functional, plain, -1.0), 1 / radius)
    return {
        "ascent_norm": norm,
        "split_functional_norm": masters.norm(functional),
        "split_logit_norm": masters.norm(sam),
        "split_cosine": cosine(functional, sam),
        "gradient_cosine_sam": with_plain[0],
        "gradient_cosine_functional": with_plain[1],
        "ascent_norm_by_tensor": dict(zip(masters.names, squares.sqrt().tolist(), strict=True)),
    }


def _frozen_heads(engine: Engine, batches: list[Batch], kept: list[Tensor], logits: bool) -> list[FrozenHead]:
    targets = [batch.targets.to(engine.device, non_blocking=True) for batch in batches]
    if logits:
        return [FrozenHead(target, logits=tensor) for target, tensor in zip(targets, kept, strict=True)]
    weight = engine.unembedding_weight()
    return [FrozenHead(target, hidden=tensor, weight=weight) for target, tensor in zip(targets, kept, strict=True)]


def _counted(batches: list[Batch]) -> int:
    return sum(batch.valid_tokens for batch in batches)


def _random_state(device: torch.device) -> tuple[Tensor, Tensor | None]:
    """The second pass is to draw the same dropout as the first."""
    return torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None


def _set_random_state(state: tuple[Tensor, Tensor | None], device: torch.device) -> None:
    torch.set_rng_state(state[0])
    if state[1] is not None:
        torch.cuda.set_rng_state(state[1], device)
