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
from training.recipe import Recipe

STEP = 1e-3  # h: small beside what curves the loss, large beside float32's rounding
FIRST_ITERATIONS, PROBES = 20, 2


class Curvature:
    """Measures the curvature at a cadence; each search begins at the eigenvector that was found the last time.

    The first one, also after a resume, begins at random, and takes at least 20 products.
    """

    def __init__(self, engine: Engine, data: PreparedData, recipe: Recipe) -> None:
        self.engine, self.iterations = engine, recipe.evaluation.curvature_iterations
        self.batch = _fixed_batch(engine, data, recipe)
        (counted,) = sum_over_ranks(self.batch.valid_tokens, device=engine.device)
        self.scale = 1.0 / max(counted, 1.0)
        self.found: dict[str, Vector] = {}

    def measure(self, learning_rate: float) -> dict[str, float]:
        """What metrics.jsonl gets; every rank calls it. Weights, optimizer and random state are left as they are.

        Returns:
            hessian_top, gauss_newton_top: eigenvalues of largest magnitude, as Rayleigh quotients. hessian_trace: by Hutchinson's
            method with two probes, so a rough one. preconditioned_hessian_top: of P^-1/2 H P^-1/2 with P = (sqrt(v) + epsilon) / f,
            AdamW's, where it keeps a second moment, f the factor on a tensor's learning rate; stability_line: (2 + 2 beta1) /
            ((1 - beta1) learning_rate), where full-batch Adam becomes unstable (arXiv 2207.14484): one line for every size.
        """
        masters, optimizer = self.engine.masters, self.engine.recipe.optimizer
        values = {
            "hessian_top": self._top("hessian", self.hessian),
            "gauss_newton_top": self._top("gauss_newton", self.gauss_newton),
        }
        probes = [_unit(masters.normal(seed), masters) for seed in range(PROBES)]
        elements = sum(int(np.prod(shape)) for shape in masters.shapes)
        values["hessian_trace"] = elements * sum(masters.dot(v, self.hessian(v)) for v in probes) / PROBES
        moments, beta1, beta2 = masters.state("exp_avg_sq"), *optimizer.betas
        if moments is not None and optimizer.kind == "adamw":
            corrected = 1 - beta2 ** masters.steps()
            groups = {id(master): group for group in masters.base.param_groups for master in group["params"]}
            own = [groups[id(master)] for master in masters.masters]
            roots = [
                ((m / corrected).sqrt_() + group["eps"]).rsqrt_() * group["lr_factor"] ** 0.5 for m, group in zip(moments, own, strict=True)
            ]

            def preconditioned(v: Vector) -> Vector:
                product = self.hessian([x * r for x, r in zip(v, roots, strict=True)])
                return [x * r for x, r in zip(product, roots, strict=True)]

            values["preconditioned_hessian_top"] = self._top("preconditioned", preconditioned)
            values["stability_line"] = (2 + 2 * beta1) / ((1 - beta1) * learning_rate)
        return values

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
            raise RuntimeError("curvature: a gradient near the weights is not finite")
        return gradient

    def _top(self, name: str, product: Callable[[Vector], Vector]) -> float:
        masters = self.engine.masters
        count = self.iterations if name in self.found else max(self.iterations, FIRST_ITERATIONS)
        vector, value = self.found.get(name) or _unit(masters.normal(PROBES), masters), 0.0
        for _ in range(count):
            moved = product(vector)
            value = masters.dot(vector, moved)
            vector = _unit(moved, masters)
        self.found[name] = vector
        return value


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
