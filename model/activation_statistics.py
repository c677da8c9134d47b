"""Outlier features: how unevenly the neurons of the residual stream are used, measured on a forward pass, exactly in any split.

The measures are those of "Understanding and Minimising Outlier Features in Transformer Training" (arXiv 2405.19279), section 2,
taken where the paper takes them for its CodeParrot models: on the residual stream entering attention of each layer, and on the
input of the unembedding. Kurtosis here is not the textbook's: neurons that all carry the same give 1, not 3.

Training and `python -m analysis outliers` share this file: sums are taken per batch, added over batches and ranks, and only then
turned into ratios.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor

from model.transformer import Transformer

DEFINITIONS = {
    "place": "`layer i`: the residual stream entering attention of block i, before any norm; `unembedding`: the input of the unembedding",
    "X": "activations at a place, n positions x d neurons; s_j = sqrt(mean over positions of X_aj^2), without centring",
    "kurtosis": "mean_j(s_j^4) / mean_j(s_j^2)^2 (Eq 1): positions are summed first; from 1 (all neurons alike) to d (one neuron alone)",
    "kurtosis_minus_one": "kurtosis - 1, what the paper's log-scale figures show",
    "max_median_ratio_mean": "mean over positions of max_j |X_aj| / median_j |X_aj| (Eq 2); of an even d the median averages two",
    "max_median_ratio_max": "the largest of these ratios over all positions",
    "input_correlation_rms": "RMS over pairs of different positions of X_a . X_b / (d mean X^2): 0 orthogonal, 1 all inputs alike",
    "activation_rms": "sqrt(mean over positions and neurons of X^2)",
}


class ActivationMoments:
    """Sums over positions from which the measures follow exactly, whatever the split into batches, micro-batches and ranks.

    `sums` may be added over ranks elementwise and `ratio_max` maximised; `measures` then speaks for all of them.
    """

    def __init__(self, width: int, device: torch.device) -> None:
        # [positions, sum of ratios, sum of |X_a|^4, sum of X_aj^2 for each j]; float64
        self.sums = torch.zeros(3 + width, dtype=torch.float64, device=device)
        self.ratio_max = torch.zeros((), dtype=torch.float64, device=device)
        self.gram = torch.zeros(width, width, dtype=torch.float32, device=device)  # X^T X

    @torch.no_grad()
    def add(self, x: Tensor) -> None:
        """x (..., d), any dtype, on the device of the sums; leading dimensions are positions. Nothing waits for the device."""
        x = x.reshape(-1, x.shape[-1]).float()
        width = x.shape[1]
        upper_half = x.abs().topk(width // 2 + 1, dim=1, sorted=False).values  # holds the maximum and the median: half of a sort
        lowest = upper_half.topk(min(2, upper_half.shape[1]), dim=1, largest=False).values
        median = lowest[:, 0] if width % 2 else lowest.mean(dim=1)
        ratios = upper_half.amax(dim=1) / median.clamp_min(torch.finfo(torch.float32).tiny)
        squares = x.square()
        lengths = squares.sum(dim=1, dtype=torch.float64)
        self.sums[0] += x.shape[0]
        self.sums[1] += ratios.sum(dtype=torch.float64)
        self.sums[2] += lengths.square().sum()
        self.sums[3:] += squares.sum(dim=0, dtype=torch.float64)
        self.ratio_max = torch.maximum(self.ratio_max, ratios.amax().double())
        self.gram.addmm_(x.T, x)

    def measures(self) -> dict[str, float | None]:
        """The measures of `DEFINITIONS`; None where they are not defined: activations all zero or not finite, a single position."""
        positions, ratio_sum, fourth_powers = self.sums[:3].tolist()
        if positions == 0:
            raise ValueError("no activations were added")
        width = self.gram.shape[0]
        mean_squares = self.sums[3:] / positions  # s_j^2
        second = mean_squares.mean().item()
        kurtosis = mean_squares.square().mean().item() / second**2 if second > 0 else math.nan
        # With Sigma_I = X X^T and Sigma_F = X^T X: sum_ab (Sigma_I)_ab^2 = sum_ij (Sigma_F)_ij^2, so no n x n matrix is needed.
        pairs = positions * (positions - 1)
        off_diagonal = max(0.0, self.gram.double().square().sum().item() - fourth_powers)
        correlation = math.sqrt(off_diagonal / pairs) / (width * second) if pairs and second > 0 else math.nan
        values = {
            "kurtosis": kurtosis,
            "kurtosis_minus_one": kurtosis - 1.0,
            "max_median_ratio_mean": ratio_sum / positions,
            "max_median_ratio_max": self.ratio_max.item(),
            "input_correlation_rms": correlation,
            "activation_rms": math.sqrt(second),
        }
        return {key: value if math.isfinite(value) else None for key, value in values.items()}


def add_to(moments: dict[str, ActivationMoments], place: str, x: Tensor) -> None:
    """Add x (..., d) to the moments of its place, which begin with it."""
    if place not in moments:
        moments[place] = ActivationMoments(x.shape[-1], x.device)
    moments[place].add(x)


@contextmanager
def watch_residuals(model: Transformer) -> Iterator[dict[str, ActivationMoments]]:
    """Within it, each forward pass adds to the moments of every place: `layer 0` .. and `unembedding`.

    The model calls between its blocks, outside what activation checkpointing runs a second time and torch.compile takes over.
    """
    moments: dict[str, ActivationMoments] = {}
    model.watch = partial(add_to, moments)
    try:
        yield moments
    finally:
        model.watch = None
