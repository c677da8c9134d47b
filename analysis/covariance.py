"""How the covariance of tokens moves through the depth of a shaped transformer: its limit, an SDE, against networks of finite width.

Noci et al., "The Shaped Transformer", arXiv 2306.17759. X (tokens x width) is what a layer reads and V = X X^T / n the covariance of its
tokens. With width n and depth L to infinity at L/n = T, weights N(0, 1) and the layer

    Z  = lambda X + g A X W_V / sqrt(n)                                     lambda^2 + g^2 = 1
    A  = I + softmax(X W_Q W_K^T X^T / (n tau)) - C,                        tau = tau0 sqrt(n n_k), C what the softmax is at zero
    X' = lambda Z + g sigma(Z W_pre / sqrt(n)) sqrt(c / n) W_post           with an MLP; s+- = 1 + c+-/sqrt(n), 1/c = (s+^2 + s-^2)/2

V at time t = layer / n follows dV = b(V) dt + Sigma(V)^(1/2) dB. C is 1/m everywhere, or for causal attention row i's mean over j <= i.

Nothing here has the size of the width: V is a Markov chain of itself. With R R^T = V and U of orthonormal rows, X = sqrt(n) R U, so
queries are R times Gaussians, and the part of a Gaussian matrix outside U enters through a Wishart matrix alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from model.errors import InputError

Mask = Literal["bidirectional", "causal"]
Network = Literal["shaped", "softmax", "pre_norm"]
NETWORKS: dict[Network, str] = {
    "shaped": "shaped attention, skip lambda and branch g",
    "softmax": "softmax attention with logits over sqrt(n_k), ReLU, skip lambda and branch g",
    "pre_norm": "the same on normalised inputs, skip 1 and branch 1",
}
BLOW_UP = 100.0
BINS = 48
DEFINITIONS = {
    "paths": f"by layer, over the samples: mean, 10% and 90% quantile of a sample's mean correlation V_ab / sqrt(V_aa V_bb) over pairs of "
    f"tokens; mean_variance, the mean of V_aa; blown_up, the share of samples in which a V_aa has passed {BLOW_UP:g} (or, in a step of the "
    "SDE that is too long, 0), which stay as they were before (shaped networks and SDE alone: a pre-norm stream grows by design)",
    "covariance_sde": "the same of Euler-Maruyama paths of the SDE, at layer = width x time",
    "statistics": "of the last two tokens at the last layer, over the samples that have not blown up: covariance V_12, correlation, and "
    "variance V_22. ks_statistic: largest distance between the distribution functions of the network and the SDE; "
    "ks_critical: what it stays below in 95% of cases if the two are one distribution",
    "counts": "samples in each bin of `edges`; outside: the share of samples beyond the edges",
}


@dataclass(frozen=True)
class Setting:
    """What is compared. Raises `InputError` for numbers that make no network.

    Attributes:
        depth: layers L; a layer is attention, and an MLP where `slopes` are given.
        temperature: tau0.
        gain: g, of each branch; the skip has lambda = sqrt(1 - g^2).
        slopes: c+ and c- of the shaped ReLU; None: no MLP.
        head_dim: n_k; None: the width.
        correlation: V_ab at layer 0, where V_aa = 1.
        samples: networks, and paths of the SDE.
        time_step: dt of Euler-Maruyama, in layers / width.
    """

    width: int = 300
    depth: int = 150
    tokens: int = 4
    temperature: float = 1.0
    gain: float = 8**-0.5
    mask: Mask = "bidirectional"
    slopes: tuple[float, float] | None = None
    head_dim: int | None = None
    correlation: float = 0.2
    samples: int = 4096
    seed: int = 0
    time_step: float = 0.01

    def __post_init__(self) -> None:
        least = {"depth": 1, "tokens": 2, "samples": 2, "width": 2 * self.tokens, "head_dim": self.tokens}
        for name, smallest in least.items():
            value = getattr(self, name)
            if value is not None and value < smallest:
                reason = "" if name in ("depth", "tokens", "samples") else f", {'twice ' * (name == 'width')}the tokens"
                raise InputError(f"--{name.replace('_', '-')} {value}: expected at least {smallest}{reason}")
        if self.seed < 0:
            raise InputError(f"--seed {self.seed}: expected 0 or more")
        for name in ("temperature", "time_step"):
            if not getattr(self, name) > 0:
                raise InputError(f"--{name.replace('_', '-')} {getattr(self, name):g}: expected a positive number")
        if not 0 < self.gain <= 1:
            raise InputError(f"--gain {self.gain:g}: expected a number above 0 and at most 1: the skip has sqrt(1 - gain^2)")
        if not -1 / (self.tokens - 1) < self.correlation < 1:
            raise InputError(f"--correlation {self.correlation:g}: expected a number above -1 / (tokens - 1) and below 1")
        if self.mask not in get_args(Mask):
            raise InputError(f"--mask {self.mask}: expected {' or '.join(get_args(Mask))}")

    @property
    def skip(self) -> float:
        return math.sqrt(1 - self.gain**2)

    @property
    def query_dim(self) -> int:
        return self.head_dim or self.width

    def start(self) -> Tensor:
        """V at layer 0, (samples, tokens, tokens) float64."""
        eye = torch.eye(self.tokens, dtype=torch.float64)
        return (eye + self.correlation * (1 - eye)).expand(self.samples, -1, -1).clone()

    def centring(self) -> Tensor:
        """P of the SDE and C of the network: softmax's value at equal logits, (tokens, tokens)."""
        ones = torch.ones(self.tokens, self.tokens, dtype=torch.float64)
        ones = ones.tril() if self.mask == "causal" else ones
        return ones / ones.sum(1, keepdim=True)


# The network


def next_covariance(covariance: Tensor, setting: Setting, network: Network, rng: np.random.Generator) -> Tensor:
    """V after one more layer of networks with fresh weights: an exact draw, at a cost that does not depend on the width (an MLP's does).

    covariance: (samples, tokens, tokens) float64 -> the same.
    """
    skip, gain = (1.0, 1.0) if network == "pre_norm" else (setting.skip, setting.gain)
    x = root(covariance)
    read = normalised(x) if network == "pre_norm" else x
    covariance = add_branch(x, mixing(read, setting, network, rng) @ read, skip, gain, setting.width, rng)
    if setting.slopes is not None:
        x = root(covariance)
        read = normalised(x) if network == "pre_norm" else x
        hidden = activated(read, setting, network, rng)
        covariance = add_branch(x, root(hidden @ hidden.mT / setting.width), skip, gain, setting.width, rng)
    return covariance


def mixing(x: Tensor, setting: Setting, network: Network, rng: np.random.Generator) -> Tensor:
    """The attention matrix A of one head with random queries and keys, of tokens with root x (samples, tokens, tokens)."""
    # Q K^T = x G1 G2^T x^T with G1, G2 (tokens, n_k) Gaussian; G1 = T O, O of orthonormal rows, leaves T (O G2^T), both small
    product = x @ bartlett(x, setting.query_dim, rng) @ gaussian(x, rng) @ x.mT / math.sqrt(setting.query_dim)
    if network == "shaped":
        return shaped(product / (setting.temperature * math.sqrt(setting.width)), setting)
    return softmax(product, setting)


def softmax(logits: Tensor, setting: Setting) -> Tensor:
    if setting.mask == "causal":
        logits = logits.masked_fill(torch.ones_like(logits[0], dtype=torch.bool).triu(1), -torch.inf)
    return logits.softmax(-1)


def shaped(logits: Tensor, setting: Setting) -> Tensor:
    """I + softmax(logits) - C."""
    return torch.eye(setting.tokens, dtype=torch.float64) + softmax(logits, setting) - setting.centring()


def activated(x: Tensor, setting: Setting, network: Network, rng: np.random.Generator) -> Tensor:
    """sqrt(c) sigma(Z W_pre / sqrt(n)), (samples, tokens, width), of tokens with root x; ReLU where the network is not shaped."""
    assert setting.slopes is not None
    positive, negative = (1 + slope / math.sqrt(setting.width) for slope in setting.slopes) if network == "shaped" else (1.0, 0.0)
    hidden = x @ gaussian(x, rng, setting.width)
    return (positive * hidden.clamp(min=0) + negative * hidden.clamp(max=0)) * math.sqrt(2 / (positive**2 + negative**2))


def add_branch(x: Tensor, branch: Tensor, skip: float, gain: float, width: int, rng: np.random.Generator) -> Tensor:
    """Covariance of skip X + gain Y, Y = B W a fresh projection: x and branch are roots of the covariances of X and B.

    Y = branch G with G (tokens, width) Gaussian; along X's rows G is h, and elsewhere it enters as a Wishart matrix of n - m degrees.
    """
    along = gaussian(x, rng)
    outside = bartlett(x, width - x.shape[-1], rng)
    own = branch @ ((along @ along.mT + outside @ outside.mT) / width) @ branch.mT
    cross = x @ along.mT @ branch.mT / math.sqrt(width)
    return skip**2 * (x @ x.mT) + skip * gain * (cross + cross.mT) + gain**2 * own


def root(covariance: Tensor) -> Tensor:
    """R with R R^T = V: Cholesky's, or where V is singular to rounding, the symmetric one."""
    result, failed = torch.linalg.cholesky_ex(covariance)
    if failed.any():
        values, vectors = torch.linalg.eigh(covariance[failed > 0])
        result[failed > 0] = vectors * values.clamp(min=0).sqrt()[..., None, :]
    return result


def normalised(x: Tensor) -> Tensor:
    """RMSNorm: tokens of variance 1."""
    return x / x.square().sum(-1, keepdim=True).sqrt()


def gaussian(like: Tensor, rng: np.random.Generator, columns: int | None = None) -> Tensor:
    """Independent N(0, 1), (samples, tokens, columns); columns: the tokens."""
    return torch.from_numpy(rng.standard_normal((*like.shape[:-1], columns or like.shape[-1])))


def bartlett(like: Tensor, degrees: int, rng: np.random.Generator) -> Tensor:
    """Lower triangular T with T T^T a Wishart matrix of so many degrees of freedom, (samples, tokens, tokens)."""
    triangle = gaussian(like, rng).tril(-1)
    chi = np.sqrt(rng.chisquare(degrees - np.arange(like.shape[-1]), size=like.shape[:-1]))
    return triangle + torch.from_numpy(chi).diag_embed()


# The SDE


def drift(covariance: Tensor, setting: Setting) -> Tensor:
    """b(V), (samples, tokens, tokens), with n and k summed over tokens and P the centring matrix:

    b^ab = (g/tau0)^2 ( sum_nk P_an P_bk V^nk S1[an,bk] + 1/2 sum_n (P_an S2[an] V^nb + P_bn S2[bn] V^na) )
           + g^2 nu(rho^ab) sqrt(V^aa V^bb)                                                     with an MLP
    S1[an,bk] = V^ab (V^nk - V^{n xbar_b} - V^{xbar_a k} + V^{xbar_a xbar_b}),   xbar_a = sum_n P_an x_n
    S2[an] = V^aa (q[an] - sum_k P_ak q[ak]),   q[an] = V^nn - 2 V^{n xbar_a} + V^{xbar_a xbar_a}
    nu(rho) = (c+ - c-)^2 / 2 pi (sqrt(1 - rho^2) - rho arccos rho)
    """
    v, p = covariance, setting.centring()
    with_mean = v @ p.mT  # V^{n xbar_b}
    means = p @ with_mean  # V^{xbar_a xbar_b}
    once = p @ with_mean.square()
    first = v * (p @ v.square() @ p.mT - once - once.mT + means.square())
    q = v.diagonal(dim1=1, dim2=2)[:, None, :] - 2 * with_mean.mT + means.diagonal(dim1=1, dim2=2)[..., None]
    second = v.diagonal(dim1=1, dim2=2)[..., None] * (q - (p * q).sum(-1, keepdim=True))
    half = (p * second) @ v
    result = (setting.gain / setting.temperature) ** 2 * (first + 0.5 * (half + half.mT))
    if setting.slopes is not None:
        deviation = v.diagonal(dim1=1, dim2=2).sqrt()
        scale = deviation[:, :, None] * deviation[:, None, :]
        rho = (v / scale).clamp(-1, 1)
        nu = (setting.slopes[0] - setting.slopes[1]) ** 2 / (2 * math.pi) * ((1 - rho**2).sqrt() - rho * rho.arccos())
        result += setting.gain**2 * nu * scale
    return result


def noise(covariance: Tensor, setting: Setting, rng: np.random.Generator) -> Tensor:
    """A draw from N(0, Sigma(V)), symmetric (samples, tokens, tokens), without forming Sigma:

    Sigma^{ab,cd} = linear (V^ac V^bd + V^ad V^bc) + (g^4/tau0^2) (T^{ab,cd} + T^{ab,dc} + T^{ba,cd} + T^{ba,dc})
    T^{ab,cd} = sum_nk P_an P_ck V^nb V^kd S1[an,ck]

    The first is R S R^T with S a symmetric Gaussian matrix; the second what Gaussian logits L = R G R^T / tau0, of covariance S1 once
    centred, do to A V + V A^T to first order. linear = g^2 (2 - g^2), and 2 g^2 more with an MLP.
    """
    x, p = root(covariance), setting.centring()
    symmetric = gaussian(x, rng)
    linear = setting.gain**2 * (2 - setting.gain**2) + (0 if setting.slopes is None else 2 * setting.gain**2)
    weights = x @ (symmetric + symmetric.mT) @ x.mT * math.sqrt(linear / 2)
    logits = x @ gaussian(x, rng) @ x.mT / setting.temperature
    moved = p * (logits - (p * logits).sum(-1, keepdim=True)) @ covariance
    return weights + setting.gain**2 * (moved + moved.mT)


# Both


@dataclass
class Paths:
    """What became of the samples: where they ended, and their mean correlation on the way.

    Attributes:
        layers: at which `correlations` (places, samples) and `variances` (places,) were taken; not whole numbers for the SDE.
        alive: (samples,) bool, those that have not blown up.
    """

    layers: list[float]
    correlations: Tensor
    variances: list[float]
    blown_up: list[float]
    end: Tensor
    alive: Tensor


def follow(setting: Setting, move: Callable[[Tensor], Tensor], layers: list[float], name: str, stop: bool, progress: bool) -> Paths:
    """Apply `move` between one layer of the list and the next; with `stop`, samples whose variance would pass BLOW_UP stay as they are."""
    v = setting.start()
    alive = torch.ones(len(v), dtype=torch.bool)
    correlations, variances, blown_up = [mean_correlation(v)], [1.0], [0.0]
    for _ in tqdm(layers[1:], desc=name, unit="layer", mininterval=1.0, disable=not progress):
        moved = move(v[alive])
        variances_of = moved.diagonal(dim1=1, dim2=2)
        kept = (variances_of <= BLOW_UP).all(1) & (variances_of > 0).all(1) if stop else torch.ones(len(moved), dtype=torch.bool)
        alive[alive.clone()] = kept
        v[alive] = moved[kept]
        correlations.append(mean_correlation(v))
        variances.append(float(v.diagonal(dim1=1, dim2=2).mean()))
        blown_up.append(1 - float(alive.double().mean()))
    return Paths(layers, torch.stack(correlations), variances, blown_up, v, alive)


def network_paths(setting: Setting, network: Network, progress: bool = False) -> Paths:
    """Networks of the setting's width, layer by layer."""
    rng = np.random.default_rng([setting.seed, list(NETWORKS).index(network)])
    layers = [float(layer) for layer in range(setting.depth + 1)]
    return follow(setting, lambda v: next_covariance(v, setting, network, rng), layers, network, network == "shaped", progress)


def sde_paths(setting: Setting, progress: bool = False) -> Paths:
    """Euler-Maruyama from 0 to depth / width, in equal steps of at most `time_step`."""
    rng = np.random.default_rng([setting.seed, len(NETWORKS)])
    time = setting.depth / setting.width
    steps = max(1, math.ceil(time / setting.time_step))
    dt = time / steps
    layers = [setting.depth * step / steps for step in range(steps + 1)]
    return follow(
        setting, lambda v: v + drift(v, setting) * dt + noise(v, setting, rng) * math.sqrt(dt), layers, "covariance SDE", True, progress
    )


def correlations_of(covariance: Tensor) -> Tensor:
    """V_ab / sqrt(V_aa V_bb), (samples, tokens, tokens)."""
    deviation = covariance.diagonal(dim1=1, dim2=2).sqrt()
    return covariance / (deviation[:, :, None] * deviation[:, None, :])


def mean_correlation(covariance: Tensor) -> Tensor:
    """Mean over the pairs of different tokens, (samples,)."""
    tokens = covariance.shape[-1]
    return (correlations_of(covariance).sum((1, 2)) - tokens) / (tokens * (tokens - 1))


def ks_statistic(first: np.ndarray, second: np.ndarray) -> float:
    """Two-sample Kolmogorov-Smirnov: the largest distance between the empirical distribution functions of two samples."""
    values = np.concatenate([first, second])
    below = [np.searchsorted(np.sort(sample), values, side="right") / len(sample) for sample in (first, second)]
    return float(np.abs(below[0] - below[1]).max())


def ks_critical(first: int, second: int) -> float:
    """The 5% point of the two-sample statistic for so many samples: sqrt(-ln(0.025) / 2) sqrt(1/first + 1/second)."""
    return math.sqrt(-math.log(0.025) / 2) * math.sqrt(1 / first + 1 / second)


def analyze_covariance(setting: Setting, progress: bool = True) -> dict[str, Any]:
    """What covariance.json holds."""
    found = {name: network_paths(setting, name, progress) for name in NETWORKS}
    limit = sde_paths(setting, progress)
    return {
        "format": 1,
        "verb": "covariance",
        "definitions": DEFINITIONS,
        "setting": {**asdict(setting), "time": setting.depth / setting.width},
        "networks": NETWORKS,
        "paths": {name: _path(paths) for name, paths in found.items()},
        "covariance_sde": _path(limit),
        "statistics": _statistics(found["shaped"], limit),
    }


def _path(paths: Paths) -> dict[str, Any]:
    low, high = torch.quantile(paths.correlations, torch.tensor([0.1, 0.9], dtype=torch.float64), dim=1)
    mean = paths.correlations.mean(1).tolist()
    return {
        "layers": paths.layers,
        "mean": mean,
        "low": low.tolist(),
        "high": high.tolist(),
        "mean_variance": paths.variances,
        "blown_up": paths.blown_up,
    }


def _statistics(network: Paths, limit: Paths) -> dict[str, Any] | None:
    """Network against SDE; None where too few samples are left to compare."""
    ends = [paths.end[paths.alive] for paths in (network, limit)]
    if min(map(len, ends)) < 2:
        return None
    of_two: dict[str, Callable[[Tensor], Tensor]] = {
        "covariance": lambda v: v[:, -2, -1],
        "correlation": lambda v: correlations_of(v)[:, -2, -1],
        "variance": lambda v: v[:, -1, -1],
    }
    result: dict[str, Any] = {"ks_critical": ks_critical(len(ends[0]), len(ends[1]))}
    for name, statistic in of_two.items():
        samples = [statistic(end).numpy() for end in ends]
        both = np.concatenate(samples)
        edges = np.linspace(np.quantile(both, 0.002), np.quantile(both, 0.998), BINS + 1)
        entry: dict[str, Any] = {"ks_statistic": ks_statistic(*samples), "edges": edges.tolist()}
        for key, sample in zip(("network", "sde"), samples, strict=True):
            counts = np.histogram(sample, edges)[0]
            entry[key] = {
                "mean": float(sample.mean()),
                "standard_deviation": float(sample.std(ddof=1)),
                "counts": counts.tolist(),
                "outside": 1 - counts.sum() / len(sample),
            }
        result[name] = entry
    return result


def describe(result: dict[str, Any]) -> str:
    """The result in a few lines for the terminal."""
    setting, statistics = result["setting"], result["statistics"]
    lines = [
        f"{setting['samples']} networks of width {setting['width']}, {setting['depth']} layers (time {setting['time']:.3g}), "
        f"{setting['tokens']} tokens, {setting['mask']}{', MLP' if setting['slopes'] else ''}"
    ]
    for name, what in NETWORKS.items():
        lines.append(f"  {name:9} mean correlation {result['paths'][name]['mean'][-1]:.3f} at the last layer: {what}")
    lines.append(f"  {'SDE':9} mean correlation {result['covariance_sde']['mean'][-1]:.3f}")
    lost = [result["paths"]["shaped"]["blown_up"][-1], result["covariance_sde"]["blown_up"][-1]]
    if any(lost):
        lines.append(
            f"  blow-up: a variance passed {BLOW_UP:g} in {lost[0]:.3f} of the shaped networks and {lost[1]:.3f} of the SDE's paths"
        )
    if statistics is None:
        return "\n".join([*lines, "  too few samples have not blown up to compare"])
    for name in ("covariance", "correlation", "variance"):
        found, critical = statistics[name]["ks_statistic"], statistics["ks_critical"]
        verdict = "not told apart" if found < critical else "told apart"
        lines.append(f"  {name:11} of the last two tokens: Kolmogorov-Smirnov {found:.4f}, 5% critical {critical:.4f}: {verdict}")
    return "\n".join(lines)
