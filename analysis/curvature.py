"""The curvature of a checkpoint's loss: eigenvalues of its Hessian and Gauss-Newton matrix, their density, and by part.

With g(theta) the gradient of the mean loss over fixed tokens, products are differences of gradients along a direction of unit norm,

    H v = (g(theta + h v) - g(theta - h v)) / 2h
    G v = (d(theta + h v) - d(theta - h v)) / 2h,   d(theta') = J(theta')^T (dL/dF(theta') - dL/dF(theta)),  F the logits,

so that any form of attention will do. Lanczos with full re-orthogonalisation turns products into eigenvalues; from random starts its
tridiagonal matrix is a quadrature of the eigenvalue density (stochastic Lanczos, Ghorbani et al., arXiv 1901.10159).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from analysis.checkpoint import Checkpoint
from analysis.decoders import build_model
from analysis.runs import Run, read_metrics
from analysis.tokens import check_vocabulary, held_out_tokens
from model.errors import InputError
from model.linear_cross_entropy import FrozenHead
from model.parametrization import owned_parameters
from model.transformer import Transformer

DEFINITIONS = {
    "loss": "mean cross-entropy over these tokens, nats a token",
    "hessian": "second derivative H of that loss to all weights",
    "gauss_newton": "G = J^T (d2 loss / d logits2) J, the part of H that moves the logits' derivative; H - G moves the function itself",
    "top": "largest eigenvalues by Lanczos from a random start, largest first; residual: norm of A x - value x of the first",
    "bottom": "smallest (most negative) eigenvalue that Lanczos saw",
    "trace": "sum of eigenvalues, by Hutchinson's method: weights x mean of v^T H v over random unit v; standard_error over the probes",
    "density": "stochastic Lanczos quadrature: nodes (eigenvalues) and weights that sum to 1, over all probes",
    "gradient_direction": "e^T H e and e^T G e along the unit gradient e: the loss's curvature where SAM perturbs",
    "parts": "top eigenvalue of H and G with all weights outside the part held fixed (a diagonal block), and the density of that of H",
    "preconditioned": "of P^-1/2 H P^-1/2, P = (sqrt(v) + epsilon) / f, v AdamW's bias-corrected second moment, f a group's factor on the "
    "learning rate; stability_line: (2 + 2 beta1) / ((1 - beta1) learning rate), above which full-batch Adam is unstable (2207.14484)",
}
STEP = 1e-3  # h: small beside what curves the loss, large beside float32's rounding
PART_STEPS = 8
BESIDE = 10  # copies of the weights, at their most, beside Lanczos's: as they were, gradients at two places, their parts and their sum

Product = Callable[[Tensor], Tensor]


class Surface:
    """The mean loss over tokens as a function of the flat weights of a model; `products` counts what was spent."""

    def __init__(self, model: Transformer, sequences: Tensor, batch_tokens: int = 4096) -> None:
        self.model = model.eval()
        named = [(name, parameter) for name, _, parameter in owned_parameters(model)]
        self.names, self.parameters = [n for n, _ in named], [p for _, p in named]
        self.sizes = [parameter.numel() for parameter in self.parameters]
        self.device = self.parameters[0].device
        self.kept = [parameter.detach().clone() for parameter in self.parameters]
        self.batches = sequences.to(self.device).split(max(1, batch_tokens // (sequences.shape[1] - 1)))
        self.tokens = sequences.shape[0] * (sequences.shape[1] - 1)
        self.heads = self._heads()

    @torch.no_grad()
    def _heads(self) -> list[FrozenHead]:
        weight = self.model.unembedding.weight.detach().clone()
        return [FrozenHead(batch[:, 1:], hidden=self.model.hidden_states(batch[:, :-1]), weight=weight) for batch in self.batches]

    def loss(self) -> float:
        with torch.no_grad():
            return sum(float(self.model(batch[:, :-1], batch[:, 1:])) for batch in self.batches) / self.tokens

    def gradient(self, offset: Tensor | None = None, frozen: bool = False) -> Tensor:
        """The gradient at weights + offset; `frozen`: with the loss's derivative at the logits as it is at the weights."""
        try:
            with torch.no_grad():
                if offset is not None:
                    for parameter, kept, part in zip(self.parameters, self.kept, offset.split(self.sizes), strict=True):
                        parameter.copy_(kept + part.view_as(parameter))
            total = torch.zeros(sum(self.sizes), device=self.device, dtype=self.parameters[0].dtype)
            for batch, head in zip(self.batches, self.heads, strict=True):
                value = self.model(batch[:, :-1], batch[:, 1:], None, head if frozen else None) / self.tokens
                total += torch.cat([g.flatten() for g in torch.autograd.grad(value, self.parameters)])
            return total
        finally:
            with torch.no_grad():
                for parameter, kept in zip(self.parameters, self.kept, strict=True):
                    parameter.copy_(kept)

    def hessian(self, v: Tensor) -> Tensor:
        return self._difference(v, self.gradient)

    def gauss_newton(self, v: Tensor) -> Tensor:
        return self._difference(v, lambda at: self.gradient(at) - self.gradient(at, frozen=True))

    def _difference(self, v: Tensor, function: Product) -> Tensor:
        h = STEP / float(v.norm())
        return (function(h * v) - function(-h * v)) / (2 * h)

    def mask(self, chosen: Callable[[str], bool]) -> Tensor:
        """1 at the weights of parameters whose name is chosen, 0 elsewhere."""
        return torch.cat(
            [torch.full((n,), float(chosen(name)), device=self.device) for name, n in zip(self.names, self.sizes, strict=True)]
        )


def lanczos(product: Product, start: Tensor, steps: int) -> tuple[Tensor, Tensor, Tensor]:
    """Lanczos with full re-orthogonalisation, twice over.

    Returns:
        eigenvalues of the tridiagonal matrix, ascending; the squared first components of its eigenvectors; and for each the norm
        of A x - value x. float64, on the CPU.

    Raises:
        InputError: a product is not finite.
    """
    basis, diagonal, beside = [start / start.norm()], [], []
    for _ in range(steps):
        w = product(basis[-1])
        diagonal.append(float(torch.dot(w, basis[-1])))
        for _ in range(2):
            for q in basis:
                w -= torch.dot(w, q) * q
        beside.append(float(w.norm()))
        if not math.isfinite(beside[-1]):
            raise InputError("products with the Hessian are not finite, so it has no eigenvalues to show")
        if beside[-1] <= 1e-6 * max(abs(d) for d in diagonal) or len(diagonal) == steps:
            break
        basis.append(w / beside[-1])
    inner = torch.tensor(beside[:-1], dtype=torch.float64)
    matrix = torch.diag(torch.tensor(diagonal, dtype=torch.float64)) + torch.diag(inner, 1) + torch.diag(inner, -1)
    values, vectors = torch.linalg.eigh(matrix)
    return values, vectors[0].square(), vectors[-1].abs() * beside[-1]


def parts_of(names: list[str]) -> dict[str, Callable[[str], bool]]:
    """The parts that are looked at alone: each layer, all queries, keys and values, and what lies outside the layers."""
    layers = sorted({int(name.split(".")[1]) for name in names if name.startswith("blocks.")})
    parts: dict[str, Callable[[str], bool]] = {f"layer {i}": lambda name, i=i: name.startswith(f"blocks.{i}.") for i in layers}
    for kind in ("query", "key", "value"):
        parts[kind] = lambda name, kind=kind: f".attention.{kind}." in name
    for whole in ("embedding", "unembedding"):
        parts[whole] = lambda name, whole=whole: name.startswith(f"{whole}.")
    return {part: chosen for part, chosen in parts.items() if any(map(chosen, names))}


def analyze_curvature(
    run: Run,
    tokens: int = 2048,
    steps: int = 20,
    probes: int = 2,
    data: list[str] | None = None,
    verify: bool = True,
    progress: bool = True,
) -> dict[str, Any]:
    """What curvature.json holds, of the run's last checkpoint.

    Raises:
        InputError: a damaged checkpoint, no model_config.json, no data, weights that are not finite, numbers that make no sense, or
            more memory than is free.
    """
    for name, value, least in (("--tokens", tokens, 1), ("--steps", steps, 2), ("--probes", probes, 1)):
        if value < least:
            raise InputError(f"{name} {value}: expected at least {least}")
    checkpoint = run.last(verify)
    if (checkpoint.path / "pretrained.json").exists():
        raise InputError(f"{checkpoint.path}: began with model.pretrained; curvature is measured of Burnish's own networks alone")
    model = build_model(checkpoint)
    config = model.config
    require_memory(sum(p.numel() for p in model.parameters()), steps, next(model.parameters()).device)
    sequences, source = held_out_tokens(run, data, tokens, config.sequence_length)
    check_vocabulary(sequences, config.vocab_size, source)
    try:
        measured = measure(model, sequences, steps, probes, progress, preconditioner(checkpoint, model))
    except InputError as error:
        raise InputError(f"{checkpoint.path}: {error}") from None
    if "preconditioned" in measured:
        measured["preconditioned"]["stability_line"] = stability_line(run, checkpoint)
    return {
        "format": 1,
        "verb": "curvature",
        "run": run.name,
        "path": str(run.path),
        "step": checkpoint.step,
        "definitions": DEFINITIONS,
        "data": source,
        **measured,
    }


def require_memory(weights: int, steps: int, device: torch.device) -> None:
    """Raises InputError where Lanczos over so many weights would need more than is free on the device."""
    needed, free = 4 * weights * (steps + BESIDE), free_memory(device)
    if free is not None and needed > free:
        fit = free // (4 * weights) - BESIDE
        raise InputError(
            f"--steps {steps}: Lanczos holds that many copies of {weights:,} weights, {needed / 1e9:.1f} GB with what is beside them, and "
            f"{free / 1e9:.1f} GB are free; " + (f"--steps {fit} would do" if fit >= 2 else "it needs a larger machine")
        )


def free_memory(device: torch.device) -> int | None:
    """Bytes that may still be taken on a device; None where that is not known."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")), None)


def preconditioner(checkpoint: Checkpoint, model: Transformer) -> Tensor | None:
    """P^-1/2 of `DEFINITIONS` over the flat weights, on the model's device; None where the files hold no AdamW state or no step."""
    roots = []
    try:
        for name, _, parameter in owned_parameters(model):
            settings, moment = checkpoint.adam_settings(name), checkpoint.tensor(name, "exp_avg_sq").float().flatten()
            if settings.step == 0:
                return None
            root = (moment / (1 - settings.betas[1] ** settings.step)).sqrt_().add_(settings.epsilon)
            roots.append(root.div_(settings.learning_rate_factor).rsqrt_().to(parameter.device))
    except InputError:
        return None
    return torch.cat(roots)


def stability_line(run: Run, checkpoint: Checkpoint) -> float | None:
    """(2 + 2 beta1) / ((1 - beta1) learning rate) of the checkpoint's step; None at a learning rate of 0, where nothing is unstable."""
    settings = checkpoint.adam_settings(next(iter(checkpoint.shapes)))
    recorded = next((r["learning_rate"] for r in read_metrics(run) if r.get("step") == checkpoint.step and "learning_rate" in r), None)
    rate = float(recorded) if recorded is not None else settings.learning_rate / settings.learning_rate_factor
    return (2 + 2 * settings.betas[0]) / ((1 - settings.betas[0]) * rate) if rate > 0 else None


def measure(
    model: Transformer, sequences: Tensor, steps: int, probes: int, progress: bool = False, roots: Tensor | None = None
) -> dict[str, Any]:
    """The measures of `DEFINITIONS` for one model over sequences (sequences, length + 1) of tokens.

    Args:
        roots: P^-1/2 over the flat weights; None: nothing is preconditioned.

    Raises:
        InputError: the loss, or a product, is not finite; the gradient is 0.
    """
    surface = Surface(model, sequences)
    loss = surface.loss()
    if not math.isfinite(loss):
        raise InputError(f"the loss over these tokens is {loss}; where weights are not finite, `python -m analysis inspect` names them")
    gradient = surface.gradient()
    if not gradient.any():
        raise InputError("the gradient is 0 everywhere, so there is no curvature along it; these weights do nothing")
    count = sum(surface.sizes)
    steps = min(steps, count)
    parts = parts_of(surface.names)
    total = (2 + probes + (roots is not None)) * steps + 2 + 2 * PART_STEPS * len(parts)
    with tqdm(total=total, desc="curvature", unit="product", disable=not progress) as bar:
        spectra = _spectra(surface, gradient / gradient.norm(), parts, steps, probes, roots, bar)
    counts = {"weights": count, "tokens": surface.tokens, "steps": steps, "probes": probes}
    return {"loss": loss, **counts, "gradient_norm": float(gradient.norm()), **spectra}


def _spectra(
    surface: Surface,
    e: Tensor,
    parts: dict[str, Callable[[str], bool]],
    steps: int,
    probes: int,
    roots: Tensor | None,
    bar: tqdm,
) -> dict[str, Any]:
    """What `measure` finds by products with H and G, which it counts on the bar; e is the unit gradient."""
    count = len(e)

    def counted(product: Product) -> Product:
        def call(v: Tensor) -> Tensor:
            bar.update()
            return product(v)

        return call

    def start(seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(count, generator=generator).to(surface.device, surface.parameters[0].dtype)

    result: dict[str, Any] = {}
    matrices = {"hessian": counted(surface.hessian), "gauss_newton": counted(surface.gauss_newton)}
    wanted = dict(matrices)
    if roots is not None:
        wanted["preconditioned"] = lambda v: roots * matrices["hessian"](roots * v)
    for name, product in wanted.items():
        values, _, residuals = lanczos(product, start(0), steps)
        result[name] = {"top": values.flip(0)[:5].tolist(), "bottom": float(values[0]), "residual": float(residuals[-1])}
    nodes, weights, traces = [], [], []
    for probe in range(probes):
        values, weight, _ = lanczos(matrices["hessian"], start(1 + probe), steps)
        nodes += values.tolist()
        weights += (weight / probes).tolist()
        traces.append(count * float((values * weight).sum()))
    mean = sum(traces) / probes
    error = math.sqrt(sum((t - mean) ** 2 for t in traces) / (probes - 1) / probes) if probes > 1 else None
    result["density"] = {"nodes": nodes, "weights": weights}
    result["trace"] = {"value": mean, "standard_error": error}
    result["gradient_direction"] = {name: float(torch.dot(e, product(e))) for name, product in matrices.items()}
    result["parts"] = {}
    for part, chosen in parts.items():
        mask = surface.mask(chosen)
        found: dict[str, Any] = {"weights": int(mask.sum())}
        for name, product in matrices.items():
            values, weight, _ = lanczos(lambda v, product=product, mask=mask: mask * product(v), mask * start(0), PART_STEPS)
            found[name] = float(values[-1])
            if name == "hessian":
                found["density"] = {"nodes": values.tolist(), "weights": weight.tolist()}
        result["parts"][part] = found
    return result


def describe(result: dict[str, Any]) -> str:
    """A few lines for a person."""
    hessian, gauss_newton, trace = result["hessian"], result["gauss_newton"], result["trace"]
    lines = []
    if "preconditioned" in result:
        line = result["preconditioned"]["stability_line"]
        lines.append(
            f"  preconditioned by AdamW: {result['preconditioned']['top'][0]:.4g}"
            + (f", of {line:.4g} where full-batch Adam becomes unstable" if line is not None else "; the learning rate is 0")
        )
    error = "" if trace["standard_error"] is None else f" +- {trace['standard_error']:.3g}"
    return "\n".join(
        [
            f"{result['run']}: curvature at step {result['step']}, loss {result['loss']:.4f} over {result['tokens']:,} tokens",
            f"  largest eigenvalue: Hessian {hessian['top'][0]:.4g}, Gauss-Newton {gauss_newton['top'][0]:.4g}; "
            f"smallest {hessian['bottom']:.4g}; trace {trace['value']:.4g}{error}",
            *lines,
            f"  along the gradient: Hessian {result['gradient_direction']['hessian']:.4g}, "
            f"Gauss-Newton {result['gradient_direction']['gauss_newton']:.4g}",
        ]
    )
