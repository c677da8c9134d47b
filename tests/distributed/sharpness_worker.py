"""Run by test_sharpness_aware.py under torchrun: sharpness-aware steps at every stage; what was seen goes to a JSON file.

torchrun --nproc_per_node N -m tests.distributed.sharpness_worker RECIPE OUT.json
"""

from __future__ import annotations

import gc
import hashlib
import json
import math
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile

from model.config import ModelConfig
from model.parametrization import initialize, is_decayed, owned_parameters
from model.transformer import Transformer
from training.curvature import Curvature, lanczos
from training.data import Batch
from training.distributed import Ranks, discover, leave
from training.engine import Engine, deepspeed, start_distributed
from training.optimizers import parameter_groups
from training.plan import plan
from training.recipe import Recipe, model_config
from training.recipe_file import load_recipe
from training.sharpness_aware import compare, take_step

VOCAB, LENGTH, STEPS = 53, 12, 3
BASE = [
    "model.width=20", "model.heads=2", "model.mlp_width=33", "model.init_std=0.2", "training.sequence_length=12",
    "training.micro_batch_size=2", "training.gradient_clipping=0.5", "optimizer.learning_rate=1e-2", "optimizer.epsilon=1e-4",
    "optimizer.sharpness.radius=0.3", "optimizer.sharpness_aware=none",
]  # fmt: skip
SAM = "optimizer.sharpness_aware=sam"
FUNCTIONAL = "optimizer.sharpness_aware=functional_sam"
PRECONDITIONED = ["optimizer.sharpness.precondition=true", "optimizer.sharpness.precondition_epsilon=1e-3"]


def sequences(step: int, count: int) -> tuple[Tensor, Tensor]:
    tokens = torch.randint(VOCAB, (count, LENGTH + 1), generator=torch.Generator().manual_seed(step))
    targets = tokens[:, 1:].clone()
    targets[1, 5:] = -100
    return tokens[:, :-1], targets


def documents_of(tokens: Tensor) -> Tensor:
    """Documents that begin at every seventh token of the vocabulary."""
    return (tokens % 7 == 0).cumsum(1)


def batches(step: int, ranks: Ranks, accumulation: int, masked: bool = False) -> list[Batch]:
    tokens, targets = sequences(step, 2 * ranks.world_size * accumulation)
    starts = [(m * ranks.world_size + ranks.rank) * 2 for m in range(accumulation)]
    return [Batch(tokens[s : s + 2], targets[s : s + 2], documents_of(tokens[s : s + 2]) if masked else None) for s in starts]


class Reference:
    """The step in one process and float64, from the equations at the top of training/sharpness_aware.py: no engine, no chunks."""

    def __init__(self, recipe: Recipe, config: ModelConfig) -> None:
        self.optimizer, self.clipping = recipe.optimizer, recipe.training.gradient_clipping
        self.model = Transformer(config)
        initialize(self.model, recipe.run.seed)
        self.model.double()
        self.decayed = {name: is_decayed(name, module) for name, module, _ in owned_parameters(self.model)}
        self.masked = recipe.data.document_masks
        groups = {id(p): group for group in parameter_groups(self.model, recipe.optimizer).values() for p in group["params"]}
        self.groups = {name: groups[id(p)] for name, _, p in owned_parameters(self.model)}  # a parametrization's factors
        self.weights = {name: p.detach().clone() for name, _, p in owned_parameters(self.model)}
        self.first = {name: torch.zeros_like(w) for name, w in self.weights.items()}
        self.second = {name: torch.zeros_like(w) for name, w in self.weights.items()}
        self.taken = 0

    def logits(self, weights: dict[str, Tensor], tokens: Tensor) -> Tensor:
        return functional_call(self.model, weights, (tokens, None, documents_of(tokens) if self.masked else None), tie_weights=True)

    def gradient(self, weights: dict[str, Tensor], tokens: Tensor, targets: Tensor, frozen: Tensor | None) -> tuple[dict, Tensor]:
        """Gradient of the mean loss at these weights, or with the derivative at the logits given; and that derivative."""
        leaves = {name: w.clone().requires_grad_() for name, w in weights.items()}
        logits = self.logits(leaves, tokens)
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-100)
        derivative = torch.autograd.grad(loss, logits, retain_graph=True)[0]
        gradients = torch.autograd.grad(logits, list(leaves.values()), derivative if frozen is None else frozen)
        return dict(zip(leaves, gradients, strict=True)), derivative

    def perturbation(self, gradient: dict[str, Tensor], radius: float) -> dict[str, Tensor]:
        options = self.optimizer.sharpness
        u = gradient
        if options.precondition:
            beta = self.optimizer.betas[1]
            second, taken = self.second, self.taken
            if options.second_moment == "updated" and taken:
                second, taken = {n: beta * v + (1 - beta) * gradient[n] ** 2 for n, v in second.items()}, taken + 1
            if taken:
                corrected = {n: v / (1 - beta**taken) for n, v in second.items()}
                u = {n: g / (corrected[n] ** options.precondition_exponent + options.precondition_epsilon) for n, g in gradient.items()}
        if options.norm_scope == "tensor":
            return {n: radius / math.sqrt(len(u)) * t / t.norm() for n, t in u.items()}
        if options.norm_scope == "tensor_width":  # sqrt(fan_out / fan_in); a look-up has fan_in 1
            fans = {n: (t.shape[1], 1) if n.endswith("embedding.weight") and "un" not in n else (*t.shape, 1, 1)[:2] for n, t in u.items()}
            fans = {n: fan if u[n].ndim == 2 else (1, 1) for n, fan in fans.items()}
            return {n: radius * math.sqrt(fans[n][0] / fans[n][1]) * t / t.norm() for n, t in u.items()}
        norm = math.sqrt(sum(float(t.pow(2).sum()) for t in u.values()))
        return {n: radius * t / norm for n, t in u.items()}

    def step(self, tokens: Tensor, targets: Tensor, ascent: Tensor) -> float:
        """One step; `ascent` are the sequences that the direction is taken from. Returns the gradient's norm before clipping."""
        section = self.optimizer
        gradient, derivative = self.gradient(self.weights, tokens, targets, None)
        if section.sharpness_aware != "none":
            direction, _ = self.gradient(self.weights, tokens[ascent], targets[ascent], None)
            e = self.perturbation(direction, section.sharpness.radius)
            there = {name: w + e[name] for name, w in self.weights.items()}
            frozen = derivative if section.sharpness_aware == "functional_sam" else None
            if section.sharpness.rest == "plain":  # the other sequences keep their gradient at the weights, each token its share
                rest = torch.ones(len(tokens), dtype=torch.bool).index_fill_(0, ascent, False)
                share = float((targets[rest] != -100).sum()) / float((targets != -100).sum())
                plain, _ = self.gradient(self.weights, tokens[rest], targets[rest], None)
                perturbed, _ = self.gradient(
                    there, tokens[ascent], targets[ascent], None if frozen is None else frozen[ascent] / (1 - share)
                )
                gradient = {name: share * plain[name] + (1 - share) * perturbed[name] for name in plain}
            else:
                gradient, _ = self.gradient(there, tokens, targets, frozen)
        norm = math.sqrt(sum(float(g.pow(2).sum()) for g in gradient.values()))
        factor = min(1.0, self.clipping / norm)
        self.taken += 1
        rate, (beta1, beta2) = section.learning_rate, section.betas
        for name, g in gradient.items():
            g = g * factor
            self.first[name] = beta1 * self.first[name] + (1 - beta1) * g
            self.second[name] = beta2 * self.second[name] + (1 - beta2) * g * g
            epsilon, own_rate = self.groups[name]["eps"], rate * self.groups[name]["lr_factor"]
            update = self.first[name] / (1 - beta1**self.taken) / ((self.second[name] / (1 - beta2**self.taken)).sqrt() + epsilon)
            decay = self.groups[name]["weight_decay"] if self.decayed[name] else 0.0
            self.weights[name] = self.weights[name] * (1 - own_rate * decay) - own_rate * update
        return norm


def exact_split(reference: Reference, tokens: Tensor, targets: Tensor) -> dict[str, float]:
    """The norms that a step with `split_every` logs, in float64."""
    weights, radius = reference.weights, reference.optimizer.sharpness.radius
    plain, derivative = reference.gradient(weights, tokens, targets, None)
    e = reference.perturbation(plain, radius)
    there = {name: w + e[name] for name, w in weights.items()}
    sam, functional = (reference.gradient(there, tokens, targets, frozen)[0] for frozen in (None, derivative))

    def distance(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
        return math.sqrt(sum(float((a[n] - b[n]).pow(2).sum()) for n in a)) / radius

    return {"split_functional_norm": distance(functional, plain), "split_logit_norm": distance(sam, functional)}


def weights_of(engine: Engine) -> dict[str, Tensor]:
    """Whole forward weights, float64."""
    named = [(name, parameter) for name, _, parameter in owned_parameters(engine.model)]
    with deepspeed.zero.GatheredParameters([p for _, p in named]) if engine.stage == 3 else nullcontext():
        return {name: parameter.detach().double().clone() for name, parameter in named}


def make(path: str, ranks: Ranks, device: torch.device, accumulation: int, *options: str) -> Engine:
    unit = f"training.tokens_per_step={2 * LENGTH * ranks.world_size * accumulation}"
    recipe = load_recipe(path, [*BASE, "optimizer.schedule=constant", "optimizer.warmup_fraction=0", unit, *options]).recipe
    return Engine(recipe, model_config(recipe, VOCAB), accumulation, ranks, device)


def against_reference(path: str, ranks: Ranks, device: torch.device, accumulation: int, *options: str) -> dict[str, Any]:
    """Steps of the engine beside the reference's: largest difference of a weight, and of the gradient's norm in proportion."""
    engine = make(path, ranks, device, accumulation, *options)
    reference = Reference(engine.recipe, engine.model.config)
    per_rank = round(engine.recipe.optimizer.sharpness.ascent_fraction * accumulation)
    norms, split = [], None
    for step in range(STEPS):
        tokens, targets = sequences(step, 2 * ranks.world_size * accumulation)
        mine = batches(step, ranks, accumulation, engine.recipe.data.document_masks)
        outcome = take_step(engine, mine, float((targets != -100).sum()), step, 100, step == 1)
        if outcome.values.get("split_logit_norm"):
            exact = exact_split(reference, tokens, targets)
            split = max(abs(outcome.values[key] / value - 1) for key, value in exact.items())  # pyright: ignore[reportOperatorIssue]
        norm = reference.step(tokens, targets, torch.arange(2 * ranks.world_size * per_rank))
        norms.append(abs(outcome.result.grad_norm / norm - 1))
    weights = weights_of(engine)
    differences = {name: float((weights[name] - w).abs().max()) for name, w in reference.weights.items()}
    engine.deepspeed.destroy()
    return {"difference": max(differences.values()), "norm": max(norms), "split": split}


def clean(engine: Engine) -> bool:
    """The whole forward weights are the masters, rounded, to the bit, as far as this rank has masters of them."""
    masters = engine.masters
    dtype = masters.forward[0].dtype
    if any(parameter.dtype != dtype for parameter in engine.model.parameters()):
        return False
    whole = weights_of(engine)
    vector = [master.detach() for master in masters.masters]
    return all(
        torch.equal(
            whole[masters.names[segment.tensor]].flatten()[segment.offset : segment.offset + segment.length],
            masters.part(vector, segment).to(dtype).double(),
        )
        for segment in masters.segments
    )


def invariants(path: str, ranks: Ranks, device: torch.device, *options: str) -> dict[str, Any]:
    """What must hold whatever happens between the two passes, and what a vector is."""
    engine = make(path, ranks, device, 3, FUNCTIONAL, *options)
    masters, seen = engine.masters, {}

    def bits() -> list[Tensor]:
        return [master.detach().clone() for master in masters.masters]

    def same(one: Any, other: Any) -> bool:
        if isinstance(one, dict):
            return all(torch.equal(one[name], other[name]) for name in one)
        return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))

    def step(number: int, **arguments: Any) -> Any:
        counted = float((sequences(number, 6 * ranks.world_size)[1] != -100).sum())
        return take_step(engine, batches(number, ranks, 3), counted, number, 100, True, **arguments)

    # a gradient leaves nothing behind: twice the same bits, and the reference's norm
    reference = Reference(engine.recipe, engine.model.config)
    tokens, targets = sequences(0, 6 * ranks.world_size)
    exact, _ = reference.gradient(reference.weights, tokens, targets, None)
    scale = 1.0 / float((targets != -100).sum())
    first, _ = engine.gradient(batches(0, ranks, 3), scale)
    second, _ = engine.gradient(batches(0, ranks, 3), scale)
    seen["repeatable"] = same(first, second)
    by_tensor = masters.dot_by_tensor(first, first).sqrt().tolist()
    seen["gradient"] = max(abs(n / float(exact[name].norm()) - 1) for name, n in zip(masters.names, by_tensor, strict=True))
    # a vector's numbers do not depend on how it is cut
    noise = masters.normal(7)
    seen["normal"] = [masters.norm(noise), masters.dot(noise, masters.normal(8)), float(masters.dot_by_tensor(noise, noise)[1])]

    # perturbed: the forward pass sees masters + vector, the masters keep their bits, an exception changes nothing
    weights, kept = weights_of(engine), bits()
    vector = masters.scale(masters.normal(9), 0.01)
    whole = {name: _normal(9, name, shape) for name, shape in zip(masters.names, masters.shapes, strict=True)}
    try:
        with engine.perturbed(vector):
            there = weights_of(engine)
            expected = {name: reference.weights[name] + 0.01 * whole[name].double() for name in whole}
            seen["perturbed"] = max(float(((there[n] - expected[n]).abs() / (expected[n].abs() + 1e-2)).max()) for n in whole)
            seen["masters_untouched"] = (engine.stage == 0 and masters.aliased) or same(bits(), kept)
            engine.files(Path("/nonexistent"), "x")
    except RuntimeError as error:
        seen["save"] = str(error)
    seen["restored"] = same(weights_of(engine), weights) and same(bits(), kept)

    # steps: a good one, one whose second pass is not finite, one whose first is not, and a good one again
    seen["step"] = step(0).result.applied
    seen["clean"] = clean(engine)
    for name, only_perturbed in (("second", True), ("first", False)):
        kept, weights = bits(), weights_of(engine)
        hook = engine.model.blocks[1].register_forward_hook(
            lambda module, inputs, output, only=only_perturbed: output * math.nan if engine._perturbed or not only else output
        )
        outcome = step(1)
        hook.remove()
        seen[f"{name}_skipped"] = [outcome.result.applied, outcome.ascent_was_finite, engine.skipped_steps]
        seen[f"{name}_untouched"] = same(bits(), kept) and same(weights_of(engine), weights) and clean(engine)
    # one whose loss is refused, where it would be accepted if it were asked for again
    kept, weights, asked = bits(), weights_of(engine), []

    def refuse_once(loss_sum: Tensor, tokens: int) -> bool:
        asked.append(tokens)
        return len(asked) > 1

    outcome = step(1, accept=refuse_once)
    seen["refused"] = [outcome.refused, outcome.result.applied, len(asked), engine.skipped_steps]
    seen["refused_untouched"] = same(bits(), kept) and same(weights_of(engine), weights) and clean(engine)
    outcome = step(2)
    seen["after"] = outcome.result.applied and math.isfinite(outcome.result.grad_norm) and clean(engine)
    seen["values"] = {key: value for key, value in outcome.values.items() if isinstance(value, float)}
    seen["counters"] = [engine.deepspeed.global_steps, engine.deepspeed.micro_steps]
    engine.deepspeed.destroy()
    return seen


def plain_is_plain(path: str, ranks: Ranks, device: torch.device, *options: str) -> list[bool]:
    """Bits of the weights after three steps: as the loop took them before there was a choice, with `none`, and with radius 0."""
    ends = []
    for chosen in (None, "optimizer.sharpness_aware=none", "optimizer.sharpness.radius=0"):
        engine = make(path, ranks, device, 3, *([FUNCTIONAL] if chosen else []), *([chosen] if chosen else []), *options)
        for step in range(STEPS):
            mine, counted = batches(step, ranks, 3), float((sequences(step, 6 * ranks.world_size)[1] != -100).sum())
            if chosen:
                take_step(engine, mine, counted, step, 100, True)
            else:
                for batch in mine:
                    engine.accumulate(batch, scale=1.0 / counted)
                engine.step(1e-2)
        ends.append(weights_of(engine))
        engine.deepspeed.destroy()
    return [all(torch.equal(ends[0][name], end[name]) for name in end) for end in ends[1:]]


def dropout_replayed(path: str, ranks: Ranks, device: torch.device, *options: str) -> list[float]:
    """With dropout and hardly any perturbation, both passes have the same gradient: norms of the two."""
    engine = make(path, ranks, device, 3, SAM, "optimizer.sharpness.radius=1e-6", *options)
    engine.model.blocks[0].register_forward_hook(lambda module, inputs, output: F.dropout(output, 0.5, training=module.training))
    outcome = take_step(engine, batches(0, ranks, 3), float((sequences(0, 6 * ranks.world_size)[1] != -100).sum()), 0, 100, True)
    engine.deepspeed.destroy()
    return [outcome.values["ascent_norm"], outcome.result.grad_norm]  # pyright: ignore[reportReturnType]


def peak_memory(path: str, ranks: Ranks, device: torch.device, *options: str) -> dict[str, Any]:
    """Bytes above the weights and optimizer state at the height of a step, as the allocator records them, and as planned."""
    shape = ["model.width=96", "model.mlp_width=384", "model.block=pre_norm", "training.sequence_length=64", "training.micro_batch_size=4"]
    vocab = 3000
    recipe = load_recipe(path, [*BASE, *shape, "training.tokens_per_step=512", *options]).recipe
    engine = Engine(recipe, model_config(recipe, vocab), 2, ranks, device)
    tokens = torch.randint(vocab, (4, 64))
    mine = [Batch(tokens, tokens, None)] * 2
    take_step(engine, mine, 512.0, 0, 100, False)
    take_step(engine, mine, 512.0, 1, 100, True)
    peaks = []
    for step in (2, 3, 4):  # the least of three: a tensor in a reference cycle is there until Python's collector happens to run
        gc.collect()
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            take_step(engine, mine, 512.0, step, 100, True)
        events: list[Any] = profiler.profiler.kineto_results.events()
        now, peak = 0, 0
        for _, change in sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]"):
            now += change
            peak = max(peak, now)
        peaks.append(peak)
    memory = plan(recipe, engine.model.config, 1, device="cpu").memory
    engine.deepspeed.destroy()
    planned = memory.total - memory.weights - memory.optimizer - memory.statistics  # no outliers are measured here
    return {"seen": min(peaks), "planned": planned, "held": memory.weights + memory.optimizer, "phase": memory.peak_phase}


def in_float32(path: str, ranks: Ranks, device: torch.device, *options: str) -> dict[str, Any]:
    """A perturbation far below bf16's spacing: does the change of the gradient follow float64's, in bf16 and with a float32 pass?"""
    engine = make(path, ranks, device, 3, FUNCTIONAL, *options)
    masters, reference = engine.masters, Reference(engine.recipe, engine.model.config)
    reference.weights = weights_of(engine)
    tokens, targets = sequences(0, 6 * ranks.world_size)
    mine, scale = batches(0, ranks, 3), 1.0 / float((targets != -100).sum())
    exact, _ = reference.gradient(reference.weights, tokens, targets, None)
    norm = math.sqrt(sum(float(g.pow(2).sum()) for g in exact.values()))
    radius = 1e-2
    gradient, _ = engine.gradient(mine, scale)
    vector = masters.scale(gradient, radius / masters.norm(gradient))
    there, _ = reference.gradient({n: w + radius * exact[n] / norm for n, w in reference.weights.items()}, tokens, targets, None)
    seen: dict[str, Any] = {}
    before = [weight.detach().clone() for weight in masters.forward]
    for name, wide in (("bf16", False), ("float32", True)):
        with engine.perturbed(vector, wide):
            seen[f"{name}_cosine"] = compare(masters, masters.moved(before), vector)["perturbation_cosine"]
            moved, _ = engine.gradient(mine, scale)
        seen[f"{name}_clean"] = clean(engine) and engine.model.unembedding.weight is engine.model.embedding.weight
        difference = masters.zeros()
        for segment in masters.segments:
            place, key = slice(segment.offset, segment.offset + segment.length), masters.names[segment.tensor]
            masters.part(difference, segment).copy_((masters.part(moved, segment).double() - there[key].flatten()[place]).float())
        change = math.sqrt(sum(float((there[n] - exact[n]).pow(2).sum()) for n in exact))
        seen[f"{name}_error"] = masters.norm(difference) / change  # of the gradient there, as a share of its change
    engine.deepspeed.destroy()
    return seen


def curvature_of(engine: Engine, ranks: Ranks, lanczos_steps: int | None) -> Curvature:
    """Of the loss over the sequences of step 0."""
    measure = Curvature.__new__(Curvature)
    (measure.batch,) = batches(0, ranks, 1)
    measure.engine, measure.scale = engine, 1.0 / float((sequences(0, 2 * ranks.world_size)[1] != -100).sum())
    measure.iterations, measure.lanczos_steps, measure.found = 40, lanczos_steps, {}
    return measure


def measured_between_steps(path: str, ranks: Ranks, device: torch.device, *options: str) -> dict[str, Any]:
    """What is measured between two steps, and whether weights, moments and random state are those of a run without."""
    ends, seen = [], {}
    for measured in (False, True):
        engine = make(path, ranks, device, 1, "optimizer.sharpness_aware=none", *options)
        for step in range(2):
            take_step(engine, batches(step, ranks, 1), float((sequences(step, 2 * ranks.world_size)[1] != -100).sum()), step, 100, False)
            if not measured or step:
                continue
            random_state, measure = torch.get_rng_state(), curvature_of(engine, ranks, 6)
            seen = measure.measure(1e-2)
            hook = engine.model.blocks[1].register_forward_hook(lambda module, inputs, output: output * math.nan)
            try:
                measure.measure(1e-2)
            except ArithmeticError as error:
                seen["not_finite"] = str(error)
            hook.remove()
            seen["random"] = torch.equal(random_state, torch.get_rng_state())
        masters = engine.masters
        ends.append([t.detach().clone() for v in (masters.masters, *map(masters.state, ("exp_avg", "exp_avg_sq"))) for t in v or []])
        ends[-1] += weights_of(engine).values()
        seen["clean"] = clean(engine)
        engine.deepspeed.destroy()
    seen["same"] = all(torch.equal(a, b) for a, b in zip(*ends, strict=True))
    return seen


def curvature(path: str, ranks: Ranks, device: torch.device, *options: str) -> dict[str, Any]:
    """Products and top eigenvalues by differences of gradients beside exact ones in float64, for a network of 1500 weights."""
    shape = ["model.width=8", "model.depth=1", "model.mlp_width=16", "model.block=pre_norm", "model.init_std=0.4"]
    shape += ["model.parametrization=mup", "model.base_width=4", "model.base_head_dim=4"]  # the preconditioner has its factors in it
    engine = make(path, ranks, device, 1, "optimizer.sharpness_aware=none", *shape, *options)
    masters, reference = engine.masters, Reference(engine.recipe, engine.model.config)
    reference.weights = weights_of(engine)
    tokens, targets = sequences(0, 2 * ranks.world_size)
    measure = curvature_of(engine, ranks, None)

    sizes = {name: w.numel() for name, w in reference.weights.items()}
    flat = torch.cat([w.flatten() for w in reference.weights.values()])

    def named(vector: Tensor) -> dict[str, Tensor]:
        pieces = vector.split(list(sizes.values()))
        return {name: piece.view(reference.weights[name].shape) for name, piece in zip(sizes, pieces, strict=True)}

    def loss_of_logits(logits: Tensor) -> Tensor:
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-100)

    with sdpa_kernel(SDPBackend.MATH):
        gradient = torch.func.grad(lambda w: loss_of_logits(reference.logits(named(w), tokens)))
        exact = torch.func.jacrev(gradient, chunk_size=64)(flat)
        jacobian = torch.func.jacrev(lambda w: reference.logits(named(w), tokens).flatten(), chunk_size=64)(flat)
        logits = reference.logits(reference.weights, tokens)
    curved = torch.func.hessian(lambda z: loss_of_logits(z.view_as(logits)))(logits.detach().flatten())
    gauss_newton = jacobian.T @ curved @ jacobian
    v = masters.normal(4)
    order = torch.cat([_normal(4, name, w.shape).flatten() for name, w in reference.weights.items()]).double()
    seen: dict[str, Any] = {}
    # AdamW's P by the equation, with second moments as if there had been steps: epsilon over m_N = 2, the rate of the matrices too
    seconds = [x.square() for x in masters.normal(5)]
    epsilon, roots = engine.recipe.optimizer.epsilon, []
    for name, weight in reference.weights.items():
        factor = 0.5 if name.startswith("blocks.") and weight.ndim == 2 else 1.0
        second = _normal(5, name, weight.shape).double().square() / 0.8
        roots.append((factor / (second.sqrt() + epsilon / 2)).sqrt().flatten())
    diagonal = torch.cat(roots)
    products = (
        ("hessian", measure.hessian, exact),
        ("gauss_newton", measure.gauss_newton, gauss_newton),
        ("preconditioned", measure.preconditioned(seconds, 0.8), diagonal[:, None] * exact * diagonal),
    )
    for name, product, matrix in products:
        expected, found = named(matrix @ order), product(v)
        difference = masters.zeros()
        for segment in masters.segments:
            place, key = slice(segment.offset, segment.offset + segment.length), masters.names[segment.tensor]
            masters.part(difference, segment).copy_((masters.part(found, segment).double() - expected[key].flatten()[place]).float())
        eigenvalues = torch.linalg.eigvalsh(matrix)
        seen[name] = {
            "error": masters.norm(difference) / float((matrix @ order).norm()),
            "top": measure._top(name, product)[0],
            "exact": float(eigenvalues[eigenvalues.abs().argmax()]),
            "lanczos": lanczos(product, masters.scale(masters.normal(6), 1 / masters.norm(masters.normal(6))), 30, masters)[1:],
            "ends": [float(eigenvalues[-1]), float(eigenvalues[0])],
        }
    kept = weights_of(engine)
    seen["clean"] = clean(engine) and all(torch.equal(kept[n], w) for n, w in reference.weights.items())
    engine.deepspeed.destroy()
    return seen


def _normal(seed: int, name: str, shape: tuple[int, ...]) -> Tensor:
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return torch.randn(shape, generator=torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True)))


SHARDINGS = {
    "fp32-0": ["training.precision=fp32", "deepspeed={zero_optimization: {stage: 0}}"],
    "fp32-3": ["training.precision=fp32", "deepspeed={zero_optimization: {stage: 3, stage3_param_persistence_threshold: 300}}"],
    "fp32-2-offload": [
        "training.precision=fp32",
        "deepspeed={zero_optimization: {stage: 2, round_robin_gradients: true, offload_optimizer: {device: cpu}}}",
    ],
    "bf16-0": ["training.precision=bf16", "deepspeed={zero_optimization: {stage: 0}}"],
    "bf16-1-fp32": ["training.precision=bf16", "deepspeed={zero_optimization: {stage: 1}, data_types: {grad_accum_dtype: fp32}}"],
    "bf16-2": ["training.precision=bf16", "deepspeed={zero_optimization: {stage: 2, round_robin_gradients: true}}"],
    "bf16-2-fp32": ["training.precision=bf16", "deepspeed={zero_optimization: {stage: 2}, data_types: {grad_accum_dtype: fp32}}"],
    "bf16-3-fp32": [
        "training.precision=bf16",
        "deepspeed={zero_optimization: {stage: 3, stage3_param_persistence_threshold: 300}, data_types: {grad_accum_dtype: fp32}}",
    ],
    "bf16-3-offload": [
        "training.precision=bf16",
        "deepspeed={zero_optimization: {stage: 3, offload_optimizer: {device: cpu}, offload_param: {device: cpu}}}",
    ],
}
WIDE = "optimizer.sharpness.float32_second_pass=true"
SHARDINGS |= {f"{name}-wide": [*SHARDINGS[name], WIDE] for name in ("bf16-0", "bf16-2-fp32", "bf16-3-fp32")}
MASKED = ["data.document_masks=true", "model.block=pre_norm", "training.activation_checkpointing=1"]
EVERYTHING = {  # what the network may have beside, together
    "functional-3-mup": (
        3, FUNCTIONAL, *MASKED, "model.positions=learned", "model.parametrization=mup", "model.base_width=10", "model.base_head_dim=5",
        "optimizer.sharpness.norm_scope=tensor_width", "optimizer.sharpness.radius=0.02",
    ),
    "functional-3-untied": (
        3, FUNCTIONAL, *MASKED, "model.tied_embeddings=false", "model.attention_softcap=5", "model.kv_heads=1", "model.attention_window=5",
        "optimizer.sharpness.ascent_fraction=0.33333333", "optimizer.sharpness.store_logits=true",
        "training.activation_checkpointing=selective",
    ),
}  # fmt: skip


def main() -> None:
    path, out = sys.argv[1:]
    ranks = discover()
    device = start_distributed(ranks)
    results: dict[str, Any] = {}
    for stage in range(4):
        zero = f"deepspeed.zero_optimization.stage={stage}"
        persist = ["deepspeed.zero_optimization.stage3_param_persistence_threshold=300"] if stage == 3 else []
        cases = {"functional-3": (3, FUNCTIONAL, "optimizer.sharpness.split_every=2")}
        if ranks.world_size == 2:
            cases |= {
                "functional-1-stored": (1, FUNCTIONAL, "optimizer.sharpness.store_logits=true", "model.tied_embeddings=false"),
                "preconditioned-3-tensor": (3, FUNCTIONAL, *PRECONDITIONED, "optimizer.sharpness.norm_scope=tensor"),
                "sam-preconditioned-updated": (
                    1,
                    "optimizer.sharpness_aware=sam",
                    *PRECONDITIONED,
                    "optimizer.sharpness.second_moment=updated",
                ),
                "functional-3-fraction": (3, FUNCTIONAL, "optimizer.sharpness.ascent_fraction=0.33333333"),
                "functional-3-plain-rest": (3, FUNCTIONAL, "optimizer.sharpness={ascent_fraction: 0.33333333, rest: plain, radius: 0.3}"),
            }
        if ranks.world_size == 1:
            cases |= {"sam-1": (1, SAM, "optimizer.sharpness.split_every=2"), **EVERYTHING}
        if ranks.world_size == 3:
            cases |= {"sam-3": (3, SAM), "preconditioned-1": (1, FUNCTIONAL, *PRECONDITIONED)}
        for name, (accumulation, *options) in cases.items():
            options = ["training.precision=fp32", zero, *persist, *options]
            results[f"{name}-{stage}"] = against_reference(path, ranks, device, accumulation, *options)
            gc.collect()
    if ranks.world_size == 1:
        for precision, stage in (("fp32", 0), ("fp32", 2)):
            for kind in ("none", "sam", "functional_sam"):
                options = [
                    f"training.precision={precision}",
                    f"deepspeed.zero_optimization.stage={stage}",
                    f"optimizer.sharpness_aware={kind}",
                ]
                results[f"memory-{precision}-{stage}-{kind}"] = peak_memory(path, ranks, device, *options)
                gc.collect()
    if ranks.world_size == 2:
        for name, options in SHARDINGS.items():
            results[name] = invariants(path, ranks, device, *options)
            gc.collect()
        for name in [name for name in SHARDINGS if name.startswith("bf16") and not name.endswith("wide")]:
            checkpointing = "training.activation_checkpointing=true"
            results[f"{name}-float32"] = in_float32(path, ranks, device, *SHARDINGS[name], checkpointing)
        compile_with = torch.nn.Module.compile  # without a C++ compiler: what is compiled again for another precision is Dynamo's choice
        torch.nn.Module.compile = lambda self: compile_with(self, backend="aot_eager")  # pyright: ignore[reportAttributeAccessIssue]
        for name in ("bf16-0", "bf16-2-fp32"):
            results[f"{name}-compiled-float32"] = in_float32(path, ranks, device, *SHARDINGS[name], "training.compile=true")
        for stage in range(4):
            options = ["training.precision=fp32", f"deepspeed.zero_optimization.stage={stage}"]
            results[f"measured-{stage}"] = measured_between_steps(path, ranks, device, *options)
        results["curvature"] = curvature(path, ranks, device, *SHARDINGS["fp32-3"])
        for name in ("fp32-0", "fp32-3", "bf16-2-fp32"):
            results[f"{name}-plain"] = plain_is_plain(path, ranks, device, *SHARDINGS[name])
        results["dropout"] = dropout_replayed(path, ranks, device, *SHARDINGS["fp32-3"])
    if ranks.is_first:
        Path(out).write_text(json.dumps(results, indent=1))
    leave(0)


if __name__ == "__main__":
    main()
