"""Curvature of the loss while training: top eigenvalues and trace, by differences of gradients at perturbed weights.

With g(theta) the gradient of the mean loss over fixed validation tokens, v of unit norm and a small step h:

    H v = (g(theta + h v) - g(theta - h v)) / 2h                              the Hessian
    G v = (d(theta + h v) - d(theta - h v)) / 2h,  d = g_sam - g_fsam         its Gauss-Newton part: see training/sharpness_aware.py

Only first derivatives are taken, so it works with fused attention and at every ZeRO stage, in float32: bf16 would round h v away, and its
gradients' own rounding is as large as the difference. Errors are of order h^2 and of the gradients' rounding over h. For a run in
bf16, `python -m analysis curvature` measures the checkpoints.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from model.linear_cross_entropy import IGNORED_TARGET, FrozenHead
from training.data import Batch, PreparedData, Sequences
from training.distributed import sum_over_ranks
from training.engine import Engine
from training.master_weights import MasterWeights, Vector
from training.optimizers import parameter_groups
from training.recipe import Recipe

STEP = 1e-3  # h: small beside what curves the loss, large beside float32's rounding
FIRST_ITERATIONS, PROBES = 20, 2


class Curvature:
    """Measures the curvature at a cadence; each search begins at the eigenvector that was found the last time.

    The first one, also after a resume, begins at random, and takes at least 20 products.
    """

    def __init__(self, engine: Engine, data: PreparedData, recipe: Recipe) -> None:
        self.engine, self.iterations, self.lanczos_steps = (
            engine,
            recipe.evaluation.curvature_iterations,
            recipe.evaluation.curvature_lanczos,
        )
        self.batch = _fixed_batch(engine, data, recipe)
        (counted,) = sum_over_ranks(self.batch.valid_tokens, device=engine.device)
        self.scale = 1.0 / max(counted, 1.0)
        self.found: dict[str, Vector] = {}

    def measure(self, learning_rate: float) -> dict[str, float]:
        """What metrics.jsonl gets; every rank calls it. Weights, optimizer and random state are left as they are.

        Returns:
            hessian_top, gauss_newton_top: eigenvalues of largest magnitude, as Rayleigh quotients; with Lanczos the largest, and
            hessian_bottom the smallest. hessian_trace: by Hutchinson's method with two probes, so a rough one.
            preconditioned_hessian_top: of P^-1/2 H P^-1/2, where AdamW keeps a second moment v, with P = (sqrt(v) + epsilon) / f, f a
            parameter group's factor on the learning rate; stability_line: (2 + 2 beta1) / ((1 - beta1) learning_rate), where full-batch
            Adam becomes unstable (arXiv 2207.14484), at every size of a parametrization; left out at a learning rate of 0, where it never
            does.

        Raises:
            ArithmeticError: a gradient near the weights is not finite.
        """
        masters, optimizer = self.engine.masters, self.engine.recipe.optimizer
        values: dict[str, float] = {}
        values["hessian_top"], bottom = self._top("hessian", self.hessian)
        if bottom is not None:
            values["hessian_bottom"] = bottom
        values["gauss_newton_top"], _ = self._top("gauss_newton", self.gauss_newton)
        probes = [_unit(masters.normal(seed), masters) for seed in range(PROBES)]
        elements = sum(int(np.prod(shape)) for shape in masters.shapes)
        values["hessian_trace"] = elements * sum(masters.dot(v, self.hessian(v)) for v in probes) / PROBES
        moments = masters.state("exp_avg_sq")
        if moments is not None and optimizer.kind == "adamw":
            product = self.preconditioned(moments, 1 - optimizer.betas[1] ** masters.steps())
            values["preconditioned_hessian_top"], _ = self._top("preconditioned", product)
            if learning_rate > 0:
                values["stability_line"] = (2 + 2 * optimizer.betas[0]) / ((1 - optimizer.betas[0]) * learning_rate)
        return values

    def preconditioned(self, moments: Vector, correction: float) -> Callable[[Vector], Vector]:
        """v -> P^-1/2 H P^-1/2 v, for second moments over their bias correction."""
        masters, model = self.engine.masters, self.engine.model
        groups = {id(p): group for group in parameter_groups(model, self.engine.recipe.optimizer).values() for p in group["params"]}
        by_name = {name: groups[id(p)] for name, p in model.named_parameters() if id(p) in groups}
        roots = masters.zeros()
        for segment in masters.segments:
            group, second = by_name[masters.names[segment.tensor]], masters.part(moments, segment) / correction
            masters.part(roots, segment).copy_(second.sqrt_().add_(group["eps"]).div_(group["lr_factor"]).rsqrt_())

        def product(v: Vector) -> Vector:
            there = self.hessian([x * r for x, r in zip(v, roots, strict=True)])
            return [x * r for x, r in zip(there, roots, strict=True)]

        return product

    def hessian(self, v: Vector) -> Vector:
        """H v; v of any norm, left as it is."""
        return self._difference(v, self._gradient)

    def gauss_newton(self, v: Vector) -> Vector:
        """G v; v of any norm, left as it is."""
        engine = self.engine
        with engine.kept_heads(logits=False) as kept:
            engine.summed_loss(self.batch)
        targets = self.batch.targets.to(engine.device)
        head = FrozenHead(targets, hidden=kept[0], weight=engine.unembedding_weight())

        def through_the_logits(at: Vector) -> Vector:
            return engine.masters.add(self._gradient(at), self._gradient(at, head), -1.0)

        return self._difference(v, through_the_logits)

    def _difference(self, v: Vector, function: Callable[[Vector], Vector]) -> Vector:
        masters = self.engine.masters
        norm = masters.norm(v)
        if norm == 0:
            return masters.zeros()
        h = STEP / norm
        there = function([x * h for x in v])
        return masters.scale(masters.add(there, function([x * -h for x in v]), -1.0), 1 / (2 * h))

    def _gradient(self, at: Vector, frozen: FrozenHead | None = None) -> Vector:
        with self.engine.perturbed(at):
            gradient, _ = self.engine.gradient([self.batch], self.scale, None if frozen is None else [frozen])
        if gradient is None:
            raise ArithmeticError("a gradient near the weights is not finite")
        return gradient

    def _top(self, name: str, product: Callable[[Vector], Vector]) -> tuple[float, float | None]:
        """The top eigenvalue, and with Lanczos the smallest one."""
        masters = self.engine.masters
        vector, value = self.found.get(name) or _unit(masters.normal(PROBES), masters), 0.0
        if self.lanczos_steps is not None:
            self.found[name], value, bottom = lanczos(product, vector, self.lanczos_steps, masters)
            return value, bottom
        count = self.iterations if name in self.found else max(self.iterations, FIRST_ITERATIONS)
        for _ in range(count):
            moved = product(vector)
            value = masters.dot(vector, moved)
            vector = _unit(moved, masters)
        self.found[name] = vector
        return value, None


def lanczos(product: Callable[[Vector], Vector], start: Vector, steps: int, masters: MasterWeights) -> tuple[Vector, float, float]:
    """Top eigenvector, largest and smallest eigenvalue that so many products show, each new direction made orthogonal to all before, twice.

    Holds `steps` vectors of this rank's share in float32. `start` is of unit norm.
    """
    basis, tridiagonal = [start], np.zeros((steps, steps))
    for i in range(steps):
        moved = product(basis[i])
        tridiagonal[i, i] = masters.dot(moved, basis[i])
        for q in basis * 2:
            masters.add(moved, q, -masters.dot(moved, q))
        norm = masters.norm(moved)
        if i + 1 == steps or norm < 1e-6 * np.abs(tridiagonal).max():  # the second: the space is used up
            break
        tridiagonal[i, i + 1] = tridiagonal[i + 1, i] = norm
        basis.append(masters.scale(moved, 1 / norm))
    values, vectors = np.linalg.eigh(tridiagonal[: len(basis), : len(basis)])
    top = masters.zeros()
    for q, weight in zip(basis, vectors[:, -1], strict=True):
        masters.add(top, q, float(weight))
    return _unit(top, masters), float(values[-1]), float(values[0])


def _unit(vector: Vector, masters: MasterWeights) -> Vector:
    norm = masters.norm(vector)
    return masters.scale(vector, 1 / norm) if norm > 0 else vector


def _fixed_batch(engine: Engine, data: PreparedData, recipe: Recipe) -> Batch:
    """The same micro-batch of the validation split each time, another one on each rank; past the split's end nothing counts."""
    training = recipe.training
    sequences = Sequences(data, "validation", training.sequence_length, seed=0, shuffle=False, document_masks=recipe.data.document_masks)
    numbers = np.arange(training.micro_batch_size) + engine.ranks.rank * training.micro_batch_size
    batch = sequences.rows(np.minimum(numbers, len(sequences) - 1))
    batch.targets[torch.from_numpy(numbers >= len(sequences))] = IGNORED_TARGET
    return batch
