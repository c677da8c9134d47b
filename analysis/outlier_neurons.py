"""Which neurons the outliers are, and other works' tests for them, beside the measures of analysis/outliers.py.

Top neurons: those with the largest s_j (root mean square over positions) at a place, and their share of its energy.
Massive activations: single values, after Sun et al., "Massive Activations in Large Language Models" (arXiv 2402.17762).
Outlier features: dimensions that are large in many layers and positions, after LLM.int8() (arXiv 2208.07339), section 4.1.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from analysis.decoders import Decoder, Projections
from model.activation_statistics import ActivationMoments
from model.errors import InputError


@dataclass
class Thresholds:
    """The criteria's numbers; the defaults are the papers'. Raises InputError when made of impossible ones."""

    feature_magnitude: float = 6.0  # |x| of LLM.int8()
    feature_layers: float = 0.25  # in at least this share of layers
    feature_positions: float = 0.06  # and of sequence positions
    massive_magnitude: float = 100.0
    massive_ratio: float = 1000.0  # to the median magnitude of its hidden state

    def __post_init__(self) -> None:
        for name in ("feature_layers", "feature_positions"):
            if not 0 <= getattr(self, name) <= 1:
                raise InputError(f"--{name.replace('_', '-')} {getattr(self, name):g}: expected a share, 0 to 1")
        for name in ("feature_magnitude", "massive_magnitude", "massive_ratio"):
            if getattr(self, name) <= 0:
                raise InputError(f"--{name.replace('_', '-')} {getattr(self, name):g}: expected a positive number")


def top_neurons(moments: ActivationMoments, count: int) -> list[dict[str, float]]:
    """The neurons with the largest s_j at a place, largest first: [{"neuron", "rms": s_j, "share": s_j^2 / sum of s^2}].

    Empty where the activations are not finite.
    """
    positions, squares = moments.sums[0].item(), moments.sums[3:]
    total = squares.sum().clamp_min(torch.finfo(torch.float64).tiny)
    if not total.isfinite():
        return []
    values, neurons = squares.topk(min(count, len(squares)))
    return [
        {"neuron": neuron, "rms": (value / positions) ** 0.5, "share": value / total.item()}
        for value, neuron in zip(values.tolist(), neurons.tolist(), strict=True)
    ]


@dataclass
class MassiveActivations:
    """Values of a hidden state (one sequence at one place, length x d) that dwarf its median magnitude."""

    thresholds: Thresholds
    count: int = 0
    largest: dict[str, float] | None = None  # the largest value of all, massive or not

    def add(self, x: Tensor) -> None:
        """x (batch, length, d)."""
        magnitudes = x.abs().flatten(1)
        medians = magnitudes.median(dim=1, keepdim=True).values  # the lower of the two middle ones
        massive = (magnitudes > self.thresholds.massive_magnitude) & (magnitudes >= self.thresholds.massive_ratio * medians)
        self.count += int(massive.sum())
        sequence, place = divmod(int(magnitudes.argmax()), magnitudes.shape[1])
        magnitude = magnitudes[sequence, place].item()
        if math.isfinite(magnitude) and (self.largest is None or magnitude > abs(self.largest["value"])):
            position, neuron = divmod(place, x.shape[-1])
            median = max(medians[sequence].item(), torch.finfo(torch.float32).tiny)
            value = x[sequence, position, neuron].item()
            self.largest = {"value": value, "position": position, "neuron": neuron, "median_ratio": magnitude / median}

    def measures(self) -> dict[str, Any]:
        return {"count": self.count, "largest": self.largest}


class OutlierFeatures:
    """LLM.int8()'s outlier features: dimensions h_i that reach the magnitude in enough layers and at enough positions.

    Looked at are the inputs of query, key, value and output projection and of the MLP's expansion, not of its contraction. The
    output projection reads heads, not the residual stream, so its dimensions are counted apart. A layer counts when one of the
    inputs reaches the magnitude at one position; a position when that happens in one layer.
    """

    KINDS = ("residual", "heads")  # inputs of query, key, value and the expansion; input of the output projection

    def __init__(self, layers: int, thresholds: Thresholds) -> None:
        self.thresholds = thresholds
        self.positions = 0
        self.in_layer: dict[str, list[Tensor | None]] = {kind: [None] * layers for kind in self.KINDS}  # (d,) bool a layer
        self.here: dict[str, Tensor] = {}  # (positions of this batch, d): whether any layer so far reached the magnitude
        self.at_positions: dict[str, Tensor] = {}  # (d,) positions where one did
        self.magnitudes: dict[str, Tensor] = {}  # (d,) largest |x|

    def add(self, kind: str, layer: int, x: Tensor) -> None:
        """x (..., d): what one layer's projection reads, for every position of the batch."""
        x = x.detach().abs().reshape(-1, x.shape[-1]).nan_to_num(nan=0.0)
        large = x >= self.thresholds.feature_magnitude
        before = self.in_layer[kind][layer]
        self.in_layer[kind][layer] = large.any(dim=0) if before is None else before | large.any(dim=0)
        self.here[kind] = self.here[kind] | large if kind in self.here else large
        largest = x.amax(dim=0)
        self.magnitudes[kind] = torch.maximum(self.magnitudes[kind], largest) if kind in self.magnitudes else largest

    def end_batch(self) -> None:
        """To be called after each forward pass."""
        self.positions += max(map(len, self.here.values()), default=0)
        for kind, large in self.here.items():
            self.at_positions[kind] = self.at_positions.get(kind, 0) + large.sum(dim=0)
        self.here = {}

    def measures(self) -> dict[str, Any]:
        """{kind: {"features": [{"dimension", "layers", "positions", "largest"}], "largest": the largest magnitude of all}}.

        A kind that no layer reads is left out: simplified blocks have no output projection.
        """
        result = {}
        for kind in self.magnitudes:
            layers = torch.stack([layer for layer in self.in_layer[kind] if layer is not None]).double().mean(dim=0).cpu()
            positions = self.at_positions[kind].double().cpu() / self.positions
            meets = (layers >= self.thresholds.feature_layers) & (positions >= self.thresholds.feature_positions) & (layers > 0)
            result[kind] = {
                "features": [
                    {
                        "dimension": i,
                        "layers": layers[i].item(),
                        "positions": positions[i].item(),
                        "largest": self.magnitudes[kind][i].item(),
                    }
                    for i in meets.nonzero().flatten().tolist()
                ],
                "largest": self.magnitudes[kind].max().item(),
            }
        return result


@contextmanager
def watch_projections(decoder: Decoder, groups: list[Projections], features: OutlierFeatures) -> Iterator[None]:
    """Within it, each forward pass adds what the projections read."""

    def hook(module: nn.Linear, kind: str, layer: int) -> Any:
        return module.register_forward_pre_hook(lambda _, args: features.add(kind, layer, args[0]))

    handles = []
    for i, group in enumerate(groups):
        # maps of one group that read the same tensor see the same, so looking at it twice changes nothing
        handles += [hook(module, "residual", i) for module in (*group.attention_inputs, group.mlp_expansion[0])]
        handles += [hook(module, "heads", i) for module in group.attention_output]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
