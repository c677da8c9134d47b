"""Context pruning in training: the schedule of alpha, the weight of sparsity, and the controller that reaches a target share.

    at first        for `attention_fraction` of the steps, decisions learn from the dense network's attention alone
                    (model/attention_need.py), and nothing else is trained
    every other     alpha goes from alpha_start to alpha_end by a cosine; the objective gains gamma x the kept share, whose gradient
                    model/context_pruning.py takes
    fixed           decisions are hard and stay as they are, and the weights learn to live with them
    with a target   a threshold on all decisions follows the distance of the share kept, with hard decisions, to the target, which
                    falls from 1: the budget is met from early on, and what is learned is which tokens to spend it on; that of fixed
                    decisions is found before the first step, by bisection

The kept share is the mean over layers of the pairs j < k that still see each other. With hard decisions it is the mean number of live
entries over the mean number of tokens before: what generation will hold.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch

from model.config import SMALLEST_ALPHA
from model.context_pruning import Settings, find_threshold, measuring_products, standards_of
from model.errors import InputError
from training.data import Batch
from training.engine import Engine
from training.recipe import ContextPruningSection

GAIN, DAMPING = 0.2, 1.0  # of the controller: the threshold moves by GAIN x (error + DAMPING x change of the error) a step
LARGEST_MOVE = 0.2


class PruningController:
    """What steers a network's pruning over a run."""

    def __init__(self, settings: Settings, section: ContextPruningSection, device: torch.device) -> None:
        self.settings, self.section, self.device = settings, section, device
        self.error: float | None = None  # of the last step
        settings.level = section.target_kept is not None
        settings.distillation_weight, settings.sparsity_weight = section.distillation_weight, section.sparsity_weight

    def begin(self, engine: Engine, batches: list[Batch], total_steps: int) -> str | None:
        """Before the first step of a run, on that step's text: standardise each layer's products, where nothing says what they mean yet,
        and find the threshold of fixed decisions, of which a line to show comes back. Every rank calls it.

        Raises InputError where fixed decisions keep the target at no threshold.
        """
        # what was learned has standards already, and what attention teaches a scale of its own
        if self.section.standardize and self.section.start is None and self.section.attention_fraction == 0:
            self._standardize(engine, batches)
        if self.section.target_kept is None or self.section.decisions != "fixed":
            return None

        def share(threshold: float) -> float:
            self.settings.threshold = threshold
            with self.evaluating("hard"):
                for batch in batches:
                    engine.summed_loss(batch)
                return self.take_measured()[1]

        known: dict[float, float] = {}
        target = target_at(self.section, 0, total_steps)
        threshold, reached = find_threshold(share, target, self.settings.threshold, known)
        self.settings.threshold, nearest = threshold, known[threshold]
        if not reached:
            raise InputError(
                f"context_pruning.target_kept: {target:g} is out of reach: at any threshold these decisions keep "
                f"{'at least' if nearest > target else 'at most'} {nearest:.3g} of the first step's text, sinks and window included"
            )
        return f"fixed decisions: threshold {threshold:.4g} keeps {nearest:.3g} of the first step's text, found in {len(known)} passes"

    def _standardize(self, engine: Engine, batches: list[Batch]) -> None:
        with measuring_products(engine.model) as sums:
            for batch in batches:
                engine.summed_loss(batch)
        together = torch.stack([sums[layer] for layer in self.settings.layers]).to(self.device)
        if torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
            torch.distributed.all_reduce(together)
        self.settings.standards = standards_of(dict(zip(self.settings.layers, together.cpu(), strict=True)))

    def before_step(self, step: int, total_steps: int) -> None:
        """Set what step `step` (0-based) trains with."""
        first = self.attention_steps(total_steps)
        self.settings.recording = True
        self.settings.from_attention = step < first
        fixed = self.section.decisions == "fixed"
        self.settings.alpha = math.inf if fixed else alpha_at(self.section, max(0, step - first), total_steps - first)

    def attention_steps(self, total_steps: int) -> int:
        """How many of the steps learn from attention, the first ones."""
        return round(self.section.attention_fraction * total_steps)

    def after_step(self, step: int, total_steps: int) -> dict[str, Any]:
        """Take in what the step measured; returns it for the metrics. Every rank calls it, and gets the same."""
        soft, hard, by_layer = self.take_measured()
        values = {
            "kept_share": hard,
            "kept_share_soft": soft,
            "kept_share_by_layer": by_layer,
            "threshold": self.settings.threshold,
        }
        if math.isfinite(self.settings.alpha):
            values["alpha"] = self.settings.alpha
        if self.settings.from_attention:
            values["need_loss"] = self.take_need_loss()
        if self.section.target_kept is not None:
            error = hard - target_at(self.section, step, total_steps)
            change = 0.0 if self.error is None else error - self.error
            move = GAIN * (error + DAMPING * change)
            self.settings.threshold += max(-LARGEST_MOVE, min(LARGEST_MOVE, move))
            self.error = error
        return values

    @contextmanager
    def evaluating(self, how: Literal["hard", "soft", "dense"]) -> Iterator[None]:
        """Decisions as in generation, as in training, or none; what they keep is measured, and training's own measure is put by."""
        settings = self.settings
        before = settings.alpha, settings.enabled, settings.recording, settings.measured, settings.from_attention
        settings.enabled, settings.recording, settings.measured, settings.from_attention = how != "dense", True, {}, False
        if how == "hard":
            settings.alpha = math.inf
        try:
            yield
        finally:
            settings.alpha, settings.enabled, settings.recording, settings.measured, settings.from_attention = before

    def take_measured(self) -> tuple[float, float, list[float]]:
        """(kept share, kept share with hard decisions, that by layer) since it was last asked, over all ranks."""
        measured = self.settings.measured
        sums = torch.stack([measured[layer] for layer in self.settings.layers]).to(self.device)
        if torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
            torch.distributed.all_reduce(sums)
        measured.clear()
        shares = (sums[:, :2] / sums[:, 2:].clamp_min(1)).cpu()
        return float(shares[:, 0].mean()), float(shares[:, 1].mean()), [round(float(share), 4) for share in shares[:, 1]]

    def take_need_loss(self) -> float:
        """The mean over layers and micro-batches of how far decisions are from what is needed, over all ranks, since it was last asked."""
        sums = self.settings.need_loss.to(self.device, copy=True)
        if torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
            torch.distributed.all_reduce(sums)
        self.settings.need_loss.zero_()
        return float(sums[0] / sums[1])

    def state(self) -> dict[str, Any]:
        return {"threshold": self.settings.threshold, "error": self.error, "standards": list(self.settings.standards.items())}

    def restore(self, state: dict[str, Any]) -> None:
        """Raises InputError when the state is not one of these."""
        try:
            self.settings.threshold = float(state["threshold"])
            self.error = None if state["error"] is None else float(state["error"])
            self.settings.standards = {int(layer): (float(mean), float(deviation)) for layer, (mean, deviation) in state["standards"]}
        except (KeyError, TypeError, ValueError):
            raise InputError("the checkpoint has no state of context pruning: it was made by another recipe") from None


def alpha_at(section: ContextPruningSection, step: int, total_steps: int) -> float:
    """alpha of step `step` (0-based); below `SMALLEST_ALPHA` it counts as 1."""
    done = min(1.0, step / max(1, round(section.alpha_fraction * total_steps)))
    alpha = section.alpha_end + 0.5 * (section.alpha_start - section.alpha_end) * (1 + math.cos(math.pi * done))
    return alpha if alpha >= SMALLEST_ALPHA else 1.0


def target_at(section: ContextPruningSection, step: int, total_steps: int) -> float:
    """The share that is aimed at after step `step`: from 1 to `target_kept` in a straight line, over `target_fraction` of the steps."""
    assert section.target_kept is not None
    fraction = section.target_fraction
    if fraction is None:
        fraction = 0.0 if section.decisions == "fixed" else 0.5
    return 1.0 + (section.target_kept - 1.0) * min(1.0, (step + 1) / max(1, round(fraction * total_steps)))
