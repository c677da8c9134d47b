"""How far apart the tokens of a sequence are: cosine, correlation and ranks.

Tokens that have become alike carry one token's information, and queries and keys no longer learn (Noci et al., "Signal Propagation in
Transformers", arXiv 2206.03126).
"""

from __future__ import annotations

import torch
from torch import Tensor

DEFINITIONS = {
    "token_cosine": "mean cosine between different tokens of a sequence, averaged over sequences; 1: collapsed",
    "correlation": "((mean of |sum_a x_a|^2) / (mean of sum_a |x_a|^2) - 1) / (m - 1), m tokens, means over sequences (arXiv 2206.03126)",
    "stable_rank": "sum of squared singular values of a sequence's (tokens, width) matrix over the largest, averaged; 1: collapsed",
    "entropy_rank": "exp of the entropy of the singular values over their sum, averaged over sequences; 1: collapsed",
    "activation_rms": "root mean square over tokens and channels",
    "centred": "the same after each sequence's mean token is taken away, which a common offset adds to all. What is left sums to zero, so "
    "its cosine and correlation lie near -1 / (m - 1) whatever happens: read its ranks",
}


def geometry(x: Tensor, valid: Tensor) -> dict[str, Tensor]:
    """Of each sequence what `summarize` makes the measures of; padding counts as nothing.

    x: (sequences, tokens, width); valid: (sequences, tokens) bool, at least two a sequence -> (sequences,) float64 each.
    """
    x = x.detach().double() * valid[..., None]
    count = valid.sum(1)
    squares = x.square().sum(-1)
    directions = x / squares.sqrt().clamp(min=torch.finfo(torch.float64).tiny)[..., None]
    singular = torch.linalg.svdvals(x)
    power = singular.square()
    shares = singular / singular.sum(1, keepdim=True).clamp(min=torch.finfo(torch.float64).tiny)
    return {
        "cosine": (directions.sum(1).square().sum(-1) - directions.square().sum((1, 2))) / (count * (count - 1)),
        "alike": x.sum(1).square().sum(-1) - squares.sum(1),  # C - N, over (m - 1) N
        "apart": (count - 1) * squares.sum(1),
        "stable_rank": power.sum(1) / power[:, 0].clamp(min=torch.finfo(torch.float64).tiny),
        "entropy_rank": torch.special.entr(shares).sum(1).exp(),
        "squares": squares.sum(1),
        "values": (count * x.shape[-1]).double(),
    }


def centred(x: Tensor, valid: Tensor) -> Tensor:
    """x (sequences, tokens, width) less the mean of each sequence's valid tokens."""
    x = x.detach().double()
    mean = (x * valid[..., None]).sum(1) / valid.sum(1, keepdim=True)
    return x - mean[:, None]


def summarize(parts: list[dict[str, Tensor]]) -> dict[str, float]:
    """The measures of DEFINITIONS, over all sequences of what `geometry` returned for one batch after another."""
    of = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    return {
        "token_cosine": float(of["cosine"].mean()),
        "correlation": float(of["alike"].sum() / of["apart"].sum()) if of["apart"].sum() > 0 else 0.0,
        "stable_rank": float(of["stable_rank"].mean()),
        "entropy_rank": float(of["entropy_rank"].mean()),
        "activation_rms": float((of["squares"].sum() / of["values"].sum()).sqrt()),
    }
