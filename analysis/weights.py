"""The weights of a checkpoint, matrix by matrix: norms, ranks, the tail of the spectrum; and how two checkpoints differ.

One matrix is in memory at a time, two where two checkpoints are compared. Small ones (shorter side up to `EXACT`) are taken apart
exactly, by the eigenvalues of W W^T in float64. Larger ones by methods that only multiply with W: the largest singular values by a
randomised range finder with power iterations (Halko, Martinsson and Tropp, arXiv 0909.4061), and the entropy by stochastic Lanczos
quadrature (Ubaru, Chen and Saad 2017) of what those leave.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from analysis.checkpoint import Checkpoint
from analysis.runs import Run
from analysis.trajectory import kind_of, layer_of
from model.errors import InputError

EXACT = 4096  # shorter side up to which all singular values are computed: half a minute on a core for a square matrix
SKETCH = 128  # singular values that are computed of a larger matrix
PIECE = 1 << 20  # elements cast to float64 at a time

DEFINITIONS = {
    "norm": "Frobenius norm of the tensor",
    "rms": "root mean square of its elements",
    "spectral_norm": "sigma_1, the largest singular value (matrices only, as all below)",
    "stable_rank": "|W|_F^2 / sigma_1^2: from 1 to the shorter side",
    "entropy_rank": "exp(-sum p log p), p = sigma_i^2 / |W|_F^2: how many directions carry the energy (Roy and Vetterli 2007)",
    "tail_exponent": "alpha of a power law p(lambda) ~ lambda^-alpha of the largest tenth of the eigenvalues lambda = sigma^2, by Hill's "
    "estimator; below about 4 a heavy tail (Martin and Mahoney, arXiv 1810.01075); null for fewer than 10 of them, and where not "
    "all singular values were computed",
    "tail_eigenvalues": "how many eigenvalues that tenth is, the shorter side over 10; null where tail_exponent is",
    "spectrum": "the largest 32 singular values",
    "exact": "whether all singular values were computed; else spectral_norm and spectrum are within about 1 percent, entropy_rank within 2",
    "difference_norm": "|W - W_other|",
    "relative_difference": "|W - W_other| / |W_other|",
    "angle": "degrees between W and W_other as vectors",
    "difference_stable_rank": "stable rank of W - W_other: how many directions the change took",
}


def spectrum_of(matrix: Tensor, exact: int = EXACT, seed: int = 0) -> dict[str, Any]:
    """Spectral measures of a matrix (rows, columns), float32."""
    short = min(matrix.shape)
    total = inner_product(matrix, matrix)
    matrix = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    if total == 0:
        nothing = dict.fromkeys(("stable_rank", "entropy_rank", "tail_exponent", "tail_eigenvalues"))
        return {"spectral_norm": 0.0, **nothing, "spectrum": [], "exact": True}
    if short <= exact:
        gram = torch.zeros(short, short, dtype=torch.float64)
        for columns in matrix.split(max(PIECE // short, 1), dim=1):
            columns = columns.double()
            gram.addmm_(columns, columns.T)
        eigenvalues = torch.linalg.eigvalsh(gram).flip(0).clamp(min=0)
        shares = eigenvalues / eigenvalues.sum()
        entropy = float(-(shares * shares.clamp(min=1e-300).log()).sum())
    else:
        left, singular = largest_singular_values(matrix, SKETCH, seed)
        eigenvalues = singular.double().square()
        shares = eigenvalues / total
        rest = entropy_by_lanczos(matrix, total, left, 1.0 - float(shares.sum()), seed)
        entropy = float(-(shares * shares.log()).sum()) + rest
    largest, tail = float(eigenvalues[0]), short // 10
    exponent = hill_exponent(eigenvalues, tail) if short <= exact else None  # the sketch holds fewer, and the last of them only roughly
    return {
        "spectral_norm": math.sqrt(largest),
        "stable_rank": total / largest,
        "entropy_rank": math.exp(entropy),
        "tail_exponent": exponent,
        "tail_eigenvalues": tail if exponent is not None else None,
        "spectrum": eigenvalues[:32].sqrt().tolist(),
        "exact": short <= exact,
    }


def inner_product(first: Tensor, second: Tensor) -> float:
    """Of two tensors of one shape as vectors, in float64, a piece at a time: a whole copy would be twice as large as they are."""
    pieces = zip(first.reshape(-1).split(PIECE), second.reshape(-1).split(PIECE), strict=True)
    return sum(float(one.double() @ other.double()) for one, other in pieces)


def largest_singular_values(matrix: Tensor, count: int, seed: int = 0, iterations: int = 6) -> tuple[Tensor, Tensor]:
    """Left vectors (rows, count) and values (count,) of the largest singular values; matrix (rows <= columns)."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # svd_lowrank takes no generator; torch.manual_seed would seed GPUs as well
        left, values, _ = torch.svd_lowrank(matrix, min(count + 32, matrix.shape[0]), iterations)
    return left[:, :count], values[:count]


def entropy_by_lanczos(matrix: Tensor, total: float, left: Tensor, trace: float, seed: int = 0, probes: int = 8, depth: int = 48) -> float:
    """-tr(A log A) of A = W W^T / total beside `left`, by stochastic Lanczos quadrature; matrix W (rows <= columns).

    `left` (rows, k) spans what is known exactly and left out (Hutch++, arXiv 2010.09649), by projecting vectors, not a copy of W; A lives
    on the n = rows - k dimensions beside it, and tr A = `trace`. So what is sampled is -tr(A log(A n / trace)), small where the spectrum
    is flat.
    """
    rows, left_over = matrix.shape[0], matrix.shape[0] - left.shape[1]
    if trace <= 1e-9 or left_over < 1:
        return 0.0
    generator, scale, estimate = torch.Generator().manual_seed(seed), left_over / trace, 0.0
    for _ in range(probes):
        q = torch.randn(rows, generator=generator)
        q -= left @ (left.T @ q)
        basis, diagonal, beside = [q / q.norm()], [], []
        steps = min(depth, left_over)
        for step in range(steps):
            w = (matrix @ (matrix.T @ basis[-1])) / total
            w -= left @ (left.T @ w)
            diagonal.append(float(w @ basis[-1]))
            stack = torch.stack(basis)
            for _ in range(2):  # full reorthogonalisation
                w = w - stack.T @ (stack @ w)
            length = float(w.norm())
            if length < 1e-7 * trace or step + 1 == steps:
                break
            beside.append(length)
            basis.append(w / length)
        tridiagonal = torch.diag(torch.tensor(diagonal, dtype=torch.float64))
        off = torch.tensor(beside[: len(diagonal) - 1], dtype=torch.float64)
        tridiagonal += torch.diag(off, 1) + torch.diag(off, -1)
        nodes, vectors = torch.linalg.eigh(tridiagonal)
        nodes = nodes.clamp(min=1e-300)
        estimate -= left_over * float((vectors[0].square() * nodes * (nodes * scale).log()).sum()) / probes
    return estimate + trace * math.log(scale)


def hill_exponent(eigenvalues: Tensor, tail: int) -> float | None:
    """alpha of p(lambda) ~ lambda^-alpha by the maximum likelihood of the `tail` < n largest; descending (n,). None for fewer than 10."""
    if tail < 10 or float(eigenvalues[tail]) <= 0:
        return None
    mean = float((eigenvalues[:tail] / eigenvalues[tail]).log().mean())
    return 1.0 + 1.0 / mean if mean > 0 else None


def analyze_weights(run: Run, other: Run | None = None, verify: bool = True, progress: bool = True) -> dict[str, Any]:
    """What weights.json holds, of the run's last checkpoint; with `other`, how it differs from that one's last.

    Raises:
        InputError: the two are not of one model.
    """
    checkpoint, second = run.last(verify), other.last(verify) if other else None
    if second is not None and (differing := sorted({name for name, _ in checkpoint.shapes.items() ^ second.shapes.items()})):
        raise InputError(f"{checkpoint.path} and {second.path} are not of one model: they differ in {', '.join(differing[:3])}")
    tensors = {}
    for name in tqdm(checkpoint.shapes, desc="weights", unit="tensor", mininterval=1.0, disable=not progress):
        tensors[name] = _measure(checkpoint, second, name)
    return {
        "format": 1,
        "verb": "weights",
        "run": run.name,
        "path": str(checkpoint.path),
        "step": checkpoint.step,
        "compared_with": str(second.path) if second else None,
        "definitions": DEFINITIONS,
        "norm": math.sqrt(sum(found["norm"] ** 2 for found in tensors.values())),
        "difference_norm": math.sqrt(sum(found["difference_norm"] ** 2 for found in tensors.values())) if second else None,
        "tensors": tensors,
    }


def _measure(checkpoint: Checkpoint, second: Checkpoint | None, name: str) -> dict[str, Any]:
    value = checkpoint.tensor(name)
    norm = math.sqrt(inner_product(value, value))
    if not math.isfinite(norm):
        raise InputError(f"{checkpoint.path}: {name} holds values that are not finite")
    found: dict[str, Any] = {"shape": list(value.shape), "layer": layer_of(name), "kind": kind_of(name)}
    found |= {"norm": norm, "rms": norm / math.sqrt(max(value.numel(), 1))}
    matrix = value.reshape(value.shape[0], -1) if value.dim() > 1 else None
    if matrix is not None and min(matrix.shape) > 1:
        found |= spectrum_of(matrix)
    if second is not None:
        before = second.tensor(name)
        other_norm, inner = math.sqrt(inner_product(before, before)), inner_product(value, before)
        change = value.sub_(before)  # in place, `matrix` with it: two of a tensor are in memory, not three
        del before
        length = math.sqrt(inner_product(change, change))
        found |= {
            "difference_norm": length,
            "relative_difference": length / other_norm if other_norm else None,
            "angle": math.degrees(math.acos(max(-1.0, min(1.0, inner / norm / other_norm)))) if norm and other_norm else None,
        }
        if matrix is not None and min(matrix.shape) > 1:
            found["difference_stable_rank"] = spectrum_of(matrix)["stable_rank"]
    return found


def describe(result: dict[str, Any]) -> str:
    """A table for the terminal, a line a matrix."""
    compared = f", compared with {result['compared_with']}" if result["compared_with"] else ""
    lines = [f"{result['run']}: step {result['step']}, |theta| {result['norm']:.4g}{compared}"]
    lines.append(f"  {'matrix':44} {'norm':>9} {'spectral':>9} {'stable':>7} {'entropy':>8} {'tail':>6}" + "   change" * bool(compared))
    for name, found in result["tensors"].items():
        if "spectral_norm" in found:
            ranks = [f"{found[key]:.1f}" if found[key] is not None else "-" for key in ("stable_rank", "entropy_rank", "tail_exponent")]
            change = f" {found['relative_difference'] or 0:8.3g}" if compared else ""
            numbers = f"{found['norm']:9.4g} {found['spectral_norm']:9.4g} {ranks[0]:>7} {ranks[1]:>8} {ranks[2]:>6}"
            lines.append(f"  {name:44} {numbers}{change}")
    return "\n".join(lines)
