"""How a run moved through weight space: one Gram matrix a tensor, in one pass over all its checkpoints.

The quantities are those of "Hallmarks of Optimization Trajectories in Neural Networks" (arXiv 2403.07379); their exact
normalisations are stated in `DEFINITIONS`, which is written into every trajectory.json.

Everything follows from inner products of checkpoints. They are summed in the increment basis

    b_0 = theta_0,   b_t = u_(t-1) = theta_t - theta_(t-1),        B_st = <b_s, b_t>,   float64,

because steps are a thousand times shorter than weights: from inner products of the weights themselves, rounded to float32, the
angle between two steps comes out wrong even in sign. B of a layer or of the network is the sum over its tensors.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from analysis.runs import Run
from analysis.shards import Checkpoint
from model.errors import InputError

DEFINITIONS = {
    "theta_t": "all weights of the group at checkpoint t = 0 .. K-1, as one vector; a tied weight once; the steps are under `steps`",
    "u_t": "theta_(t+1) - theta_t, one update: from one checkpoint to the next",
    "Delta_t": "theta_t - theta_0, the displacement",
    "trajectory_map": "C_ij = cos(theta_i, theta_j), K x K: the trajectory seen from the origin",
    "relative_map": "cos(Delta_i, Delta_j), i, j = 1 .. K-1: the trajectory seen from its first checkpoint",
    "omega": "mean directional similarity: the mean of trajectory_map, diagonal included; the squared length of the mean direction",
    "omega_off_diagonal": "the same mean without the diagonal: (K omega - 1) / (K - 1)",
    "omega_relative": "the mean of relative_map, diagonal included",
    "omega_relative_off_diagonal": "the mean of relative_map without the diagonal",
    "consecutive_update_angles": "degrees between u_t and u_(t-1), t = 1 .. K-2: 0 straight on, 90 unrelated, above 90 turning back",
    "displacement_angles": "degrees between u_t and the whole displacement Delta_(K-1), t = 0 .. K-2",
    "apex_angles": "degrees between Delta_t and Delta_(K-1), t = 1 .. K-1",
    "origin_angles": "degrees between theta_t and theta_0, t = 0 .. K-1",
    "weight_norms": "|theta_t|, t = 0 .. K-1",
    "displacement_norms": "|Delta_t|, t = 0 .. K-1",
    "update_norms": "|u_t|, t = 0 .. K-2",
    "length": "sum of update_norms: the length of the path through the checkpoints",
    "straightness": "|Delta_(K-1)| / length: 1 for a straight line",
    "rounding_ratios": "rounding error of the stored weights / |u_t|, t = 0 .. K-2; above 0.3 an angle with u_t says nothing",
    "grid": "every mean weighs each checkpoint alike, so it depends on which steps were kept; compare runs on equal `steps`",
    "null": "a value that is undefined, because a length is zero",
}

# Relative root-mean-square rounding error of weights stored with so many significant bits: 1.66e-3 for the 8 of bf16, measured.
_ROUNDING = {"bf16": 1.66e-3, "fp16": 1.66e-3 * 2.0**-3, "fp32": 1.66e-3 * 2.0**-16}


def increment_grams(checkpoints: Sequence[Checkpoint], memory_megabytes: float = 32, progress: bool = True) -> dict[str, torch.Tensor]:
    """One Gram matrix a tensor, in the increment basis.

    The checkpoints may differ in ZeRO stage and ranks: elements are matched by their place in the parameter.

    Args:
        checkpoints: K checkpoints of one model, in order of step.
        memory_megabytes: bounds the buffer, K rows of float64 of as many elements as fit; a small one stays in the processor's caches.

    Returns:
        {name: B}, B (K, K) float64, B_st = <b_s, b_t>.

    Raises:
        InputError: fewer than two checkpoints; parameters differ in name or shape; a weight is not finite.
    """
    count = len(checkpoints)
    if count < 2:
        raise InputError(
            f"{checkpoints[0].path}: a trajectory needs at least two checkpoints, found 1" if checkpoints else "no checkpoints"
        )
    first = checkpoints[0]
    for other in checkpoints[1:]:
        differing = sorted({name for name, _ in first.shapes.items() ^ other.shapes.items()})
        if differing:
            raise InputError(f"{first.path} and {other.path} are not of one model: they differ in {', '.join(differing[:3])}")
    columns = int(memory_megabytes * 2**20 / (8 * count))
    if columns < 1:
        raise InputError(f"--memory-megabytes {memory_megabytes}: {count} checkpoints need at least {8 * count / 2**20:.6f}")
    buffer = torch.empty(count * min(columns, max(shape.numel() for shape in first.shapes.values())), dtype=torch.float64)
    total = 4 * count * sum(shape.numel() for shape in first.shapes.values())
    grams = {}
    with tqdm(total=total, unit="B", unit_scale=True, desc="trajectory", mininterval=1.0, disable=not progress) as bar:
        for name, shape in first.shapes.items():
            gram = torch.zeros(count, count, dtype=torch.float64)
            for start in range(0, shape.numel(), columns):
                width = min(columns, shape.numel() - start)
                rows = buffer[: count * width].view(count, width)
                for row, checkpoint in zip(rows, checkpoints, strict=True):
                    checkpoint.read(name, start, row)
                for t in range(count - 1, 0, -1):
                    rows[t] -= rows[t - 1]  # exact: both are float32 numbers held in float64
                gram += rows @ rows.T
                bar.update(4 * count * width)
            if not gram.isfinite().all():
                bad = next(c for c in checkpoints if not c.tensor(name).isfinite().all())
                raise InputError(f"{bad.path}: {name} holds values that are not finite; leave this checkpoint out")
            grams[name] = gram
    return grams


def summarize(gram: np.ndarray, rounding: Sequence[float] | None = None) -> dict[str, Any]:
    """Every quantity of `DEFINITIONS` from one Gram matrix in the increment basis.

    Args:
        gram: B, (K, K) float64.
        rounding: relative rounding error of each checkpoint's weights; default: that of float32.

    Returns:
        JSON values; None where undefined.
    """
    count = len(gram)
    sums = np.tril(np.ones((count, count)))
    weights = sums @ gram @ sums.T  # <theta_i, theta_j>
    updates = gram[1:, 1:]  # <u_i, u_j>
    displacements = sums[1:, 1:] @ updates @ sums[1:, 1:].T  # <Delta_i, Delta_j>, from 1
    with_total = updates.sum(axis=1)  # <u_t, Delta_(K-1)>
    weight_norms, update_norms, displacement_norms = (np.sqrt(np.maximum(np.diag(g), 0.0)) for g in (weights, updates, displacements))
    weight_cosines, relative_cosines, update_cosines = (_cosines(g) for g in (weights, displacements, updates))
    length, total = float(update_norms.sum()), float(displacement_norms[-1])
    errors = np.asarray(rounding if rounding is not None else [_ROUNDING["fp32"]] * count) * weight_norms
    with np.errstate(divide="ignore", invalid="ignore"):
        to_total = with_total / (update_norms * total)
        rounding_ratios = np.hypot(errors[1:], errors[:-1]) / update_norms
    return {
        "omega": _number(weight_cosines.mean()),
        "omega_off_diagonal": _number(_off_diagonal_mean(weight_cosines)),
        "omega_relative": _number(relative_cosines.mean()),
        "omega_relative_off_diagonal": _number(_off_diagonal_mean(relative_cosines)),
        "length": length,
        "straightness": _number(total / length if length else math.nan),
        "weight_norms": weight_norms.tolist(),
        "displacement_norms": [0.0, *displacement_norms.tolist()],
        "update_norms": update_norms.tolist(),
        "consecutive_update_angles": _degrees(np.diag(update_cosines, 1)),
        "displacement_angles": _degrees(to_total),
        "apex_angles": _degrees(relative_cosines[:, -1]),
        "origin_angles": _degrees(weight_cosines[:, 0]),
        "rounding_ratios": [_number(x) for x in rounding_ratios],
        "trajectory_map": [[_number(x) for x in row] for row in weight_cosines],
        "relative_map": [[_number(x) for x in row] for row in relative_cosines],
    }


def null_values(count: int) -> dict[str, dict[str, float]]:
    """What two trajectories without structure would give, at this number of checkpoints K.

    An isotropic random walk with equal steps in many dimensions has cos(Delta_s, Delta_t) = sqrt(s / t); its omega_relative
    tends to 2/3 as K grows.
    """
    s = np.arange(1, count)
    ratios = np.sqrt(np.minimum.outer(s, s) / np.maximum.outer(s, s))
    return {
        "straight_line": {"omega_relative": 1.0, "straightness": 1.0, "consecutive_update_angle": 0.0},
        "random_walk": {
            "omega_relative": float(ratios.mean()),
            "omega_relative_many_checkpoints": 2 / 3,
            "straightness": 1 / math.sqrt(count - 1),
            "consecutive_update_angle": 90.0,
        },
    }


def layer_of(name: str) -> int | None:
    """The block a parameter belongs to (`blocks.3.mlp.up.weight`, `model.layers.3...`, `transformer.h.3...`), or None."""
    match = re.search(r"(?:^|\.)(?:blocks|layers?|h)\.(\d+)\.", name)
    return int(match[1]) if match else None


# What a parameter does, by the words of its name: the first that fits. Common Hugging Face names are known too.
_KINDS = [
    ("norms", r"norm|(^|[._])ln_?\w*(\.|$)"),
    ("residual gains", r"gain"),
    ("attention query, key and value", r"query_key_value|qkv|c_attn"),
    ("attention query", r"(^|[._])(query|q_proj|wq)(\.|$)"),
    ("attention key", r"(^|[._])(key|k_proj|wk)(\.|$)"),
    ("attention value", r"(^|[._])(value|v_proj|wv)(\.|$)"),
    ("attention output", r"attention\.output|attention\.dense|attn\.c_proj|(^|[._])(o_proj|wo)(\.|$)"),
    ("mlp", r"mlp|feed_forward|ffn|(^|[._])fc_?\d"),
    ("unembedding", r"unembedding|lm_head|embed_out"),
    ("embedding", r"embed|wte|wpe"),
]


def kind_of(name: str) -> str:
    """What a parameter does: attention query, key, value or output, mlp, norms, embedding, unembedding, residual gains, or other."""
    return next((kind for kind, pattern in _KINDS if re.search(pattern, name)), "other")


def analyze_trajectory(run: Run, memory_megabytes: float = 32, verify: bool = True, progress: bool = True) -> dict[str, Any]:
    """What trajectory.json holds. Raises InputError as `increment_grams` does, and for damaged files."""
    checkpoints = run.open(verify)
    grams = {name: gram.numpy() for name, gram in increment_grams(checkpoints, memory_megabytes, progress).items()}
    shapes = checkpoints[0].shapes
    rounding = [_ROUNDING[checkpoint.precision] for checkpoint in checkpoints]

    def summary(names: Sequence[str]) -> dict[str, Any]:
        return {"parameters": sum(shapes[n].numel() for n in names), **summarize(np.sum([grams[n] for n in names], axis=0), rounding)}

    layers = sorted({layer for name in grams if (layer := layer_of(name)) is not None})
    kinds = dict.fromkeys(kind for kind in [kind for kind, _ in reversed(_KINDS)] + ["other"] if any(kind_of(n) == kind for n in grams))
    steps = [checkpoint.step for checkpoint in checkpoints]
    scalars = ("parameters", "omega", "omega_relative", "length", "straightness")
    return {
        "format": 1,
        "verb": "trajectory",
        "run": run.name,
        "path": str(run.path),
        "definitions": DEFINITIONS,
        "null_values": null_values(len(steps)),
        "steps": steps,
        "starts_at_initialisation": steps[0] == 0,
        "evenly_spaced": len(set(np.diff(steps).tolist())) == 1,
        "checkpoints": [
            {"path": str(c.path), "step": c.step, "zero_stage": c.zero_stage, "ranks": c.world_size, "precision": c.precision}
            for c in checkpoints
        ],
        "tied": checkpoints[0].aliases,
        "frozen": sorted(checkpoints[0].frozen),
        "network": summary(list(grams)),
        "layers": {str(layer): summary([n for n in grams if layer_of(n) == layer]) for layer in layers},
        "kinds": {kind: summary([n for n in grams if kind_of(n) == kind]) for kind in kinds},
        "tensors": {name: {key: value for key, value in summary([name]).items() if key in scalars} for name in grams},
    }


def describe(result: dict[str, Any]) -> str:
    """The result in a few lines for the terminal, null values beside."""
    network, nulls = result["network"], result["null_values"]
    walk, line = nulls["random_walk"], nulls["straight_line"]
    angles = [angle for angle in network["consecutive_update_angles"] if angle is not None]
    mean_angle = f"{sum(angles) / len(angles):.1f}" if angles else "-"
    lines = [
        f"{result['run']}: {len(result['steps'])} checkpoints, steps {result['steps'][0]} to {result['steps'][-1]}, "
        f"{network['parameters']:,} parameters",
        f"  mean directional similarity  from the origin {_text(network['omega'])} (off-diagonal {_text(network['omega_off_diagonal'])})",
        f"                               from the start  {_text(network['omega_relative'])}"
        f"   [straight line {line['omega_relative']:.0f}, random walk {walk['omega_relative']:.3f}, with many checkpoints 2/3]",
        f"  straightness {_text(network['straightness'])}   [straight line 1, random walk {walk['straightness']:.3f}]",
        f"  mean angle between consecutive updates {mean_angle} degrees   [straight line 0, random walk 90]",
    ]
    unreliable = sum(ratio is not None and ratio > 0.3 for ratio in network["rounding_ratios"])
    if unreliable:
        lines.append(f"  {unreliable} updates drown in the rounding of the stored weights: their angles say nothing")
    return "\n".join(lines)


def _cosines(gram: np.ndarray) -> np.ndarray:
    """Inner products to cosines; nan where a length is zero. The diagonal is exactly 1."""
    norms = np.sqrt(np.maximum(np.diag(gram), 0.0))
    with np.errstate(divide="ignore", invalid="ignore"):
        cosines = np.clip(gram / np.outer(norms, norms), -1.0, 1.0)
    np.fill_diagonal(cosines, np.where(norms > 0, 1.0, np.nan))
    return cosines


def _off_diagonal_mean(cosines: np.ndarray) -> float:
    count = len(cosines)
    return (float(cosines.sum()) - count) / (count * (count - 1)) if count > 1 else math.nan


def _degrees(cosines: np.ndarray) -> list[float | None]:
    return [_number(x) for x in np.degrees(np.arccos(np.clip(cosines, -1.0, 1.0)))]


def _number(value: float) -> float | None:
    """A JSON number, or None for what is not one."""
    return float(value) if math.isfinite(value) else None


def _text(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"
