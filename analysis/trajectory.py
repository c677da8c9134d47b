"""How a run moved through weight space: maps, angles, lengths and principal components, from the Gram matrices of its checkpoints.

The quantities are those of "Hallmarks of Optimization Trajectories in Neural Networks" (arXiv 2403.07379); their exact
normalisations are stated in `DEFINITIONS`, which is written into every trajectory.json. All of them follow from one matrix of inner
products in the increment basis (analysis/grams.py), so a group of tensors costs a sum of small matrices.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from analysis.checkpoint import verify_checkpoints
from analysis.fused import Heads, heads_of, parts_of
from analysis.grams import increment_grams
from analysis.output import number_or_none
from analysis.ranks import Ranks
from analysis.runs import Run
from model.errors import InputError

DEFINITIONS = {
    "theta_t": "all weights of the group at checkpoint t = 0 .. K-1, as one vector; a tied weight once; the steps are under `steps`",
    "u_t": "theta_(t+1) - theta_t, one update: from one checkpoint to the next",
    "Delta_t": "theta_t - theta_0, the displacement",
    "trajectory_map": "C_ij = cos(theta_i, theta_j), K x K: the trajectory seen from the origin",
    "relative_map": "cos(Delta_i, Delta_j), i, j = 1 .. K-1: the trajectory seen from its first checkpoint",
    "omega": "mean directional similarity: the mean of trajectory_map, diagonal included; the squared length of the mean direction",
    "omega_off_diagonal": "the same mean without the diagonal: (K omega - 1) / (K - 1)",
    "omega_relative": "the mean of relative_map, diagonal included, over the displacements that are not zero; likewise with a suffix",
    "displacements": "how many of the K-1 displacements are not zero: a checkpoint equal to the first has no direction from it",
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
    "radial_updates": "<u_t, theta_t> / |theta_t|, t = 0 .. K-2: the part of an update that changes |theta| alone, as weight decay does",
    "tangential_updates": "sqrt(|u_t|^2 - radial^2): the part that changes the direction",
    "rounding_ratios": "rounding error of the stored weights / |u_t|, t = 0 .. K-2; above 0.3 an angle with u_t says nothing",
    "consecutive_update_angle_errors": "degrees by which the rounding of the stored weights moves that angle; null: it drowns it. "
    "Two neighbouring updates share an endpoint, whose rounding makes them seem to turn back",
    "displacement_angle_errors": "the same for displacement_angles",
    "apex_angle_errors": "the same for apex_angles",
    "omega_grid": "mean of trajectory_map with each checkpoint weighted by the training steps it stands for (trapezoid rule)",
    "omega_relative_grid": "the same mean of relative_map",
    "principal_components": "of the K checkpoints around their mean: shares of the variance, largest first (at most 10), and the "
    "coordinates of the checkpoints along the first three (K x 3); signs so that each ends positive",
    "participation_ratio": "(sum lambda)^2 / sum lambda^2 of those variances: along how many directions the path spreads, 1 to K-1",
    "grid": "a mean without _grid weighs each checkpoint alike, so it depends on which steps were kept; compare runs on equal `steps`",
    "fused": "tensors with query, key and value in one whose heads are not known: they count under `attention query, key and value`",
    "heads": "attention heads, and those of keys and values, by which tensors with all three in one were taken apart; null: not known",
    "null": "a value that is undefined, because a length is zero",
}

# Relative root-mean-square rounding error of weights stored with so many significant bits: 1.66e-3 for the 8 of bf16, measured.
_ROUNDING = {"bf16": 1.66e-3, "fp16": 1.66e-3 * 2.0**-3, "fp32": 1.66e-3 * 2.0**-16}
_ROUNDING |= {"fp8_e4m3": 1.66e-3 * 2.0**4, "fp8_e5m2": 1.66e-3 * 2.0**5}


def summarize(gram: np.ndarray, rounding: Sequence[float] | None = None, steps: Sequence[int] | None = None) -> dict[str, Any]:
    """Every quantity of `DEFINITIONS` from one Gram matrix in the increment basis.

    Args:
        gram: B, (K, K) float64.
        rounding: relative rounding error of each checkpoint's weights; default: that of float32.
        steps: training steps of the checkpoints, for the means over the grid; default: evenly spaced.

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
        radial = np.diag(sums @ gram, 1) / weight_norms[:-1]  # <theta_t, u_t> / |theta_t|
    # what each vector is in terms of theta_0 .. theta_(K-1): rows (K-1, K)
    thetas = np.eye(count)
    u, delta = np.diff(thetas, axis=0), thetas[1:] - thetas[0]
    whole = np.broadcast_to(delta[-1], u.shape)
    grid = _grid_weights(steps if steps is not None else range(count))
    moved = displacement_norms > 0  # after a step at a rate of 0 there is no direction, which must not cost the others theirs
    relative = relative_cosines[np.ix_(moved, moved)]
    relative_grid = _grid_weights(steps[1:] if steps is not None else range(count - 1))[moved]
    return {
        "omega": number_or_none(weight_cosines.mean()),
        "omega_off_diagonal": number_or_none(_off_diagonal_mean(weight_cosines)),
        "omega_grid": number_or_none(float(grid @ weight_cosines @ grid)),
        "omega_relative": number_or_none(relative.mean()) if moved.any() else None,
        "omega_relative_off_diagonal": number_or_none(_off_diagonal_mean(relative)),
        "omega_relative_grid": number_or_none(float(relative_grid @ relative @ relative_grid) / relative_grid.sum() ** 2)
        if moved.any()
        else None,
        "displacements": int(moved.sum()),
        "length": length,
        "straightness": number_or_none(total / length if length else math.nan),
        "weight_norms": weight_norms.tolist(),
        "displacement_norms": [0.0, *displacement_norms.tolist()],
        "update_norms": update_norms.tolist(),
        "radial_updates": [number_or_none(x) for x in radial],
        "tangential_updates": [number_or_none(x) for x in np.sqrt(np.maximum(update_norms**2 - radial**2, 0.0))],
        "consecutive_update_angles": _degrees(np.diag(update_cosines, 1)),
        "displacement_angles": _degrees(to_total),
        "apex_angles": _degrees(relative_cosines[:, -1]),
        "origin_angles": _degrees(weight_cosines[:, 0]),
        "rounding_ratios": [number_or_none(x) for x in rounding_ratios],
        "consecutive_update_angle_errors": _angle_errors(u[1:], u[:-1], weights, errors),
        "displacement_angle_errors": _angle_errors(u, whole, weights, errors),
        "apex_angle_errors": _angle_errors(delta, whole, weights, errors),
        "trajectory_map": [[number_or_none(x) for x in row] for row in weight_cosines],
        "relative_map": [[number_or_none(x) for x in row] for row in relative_cosines],
        **_principal_components(displacements),
    }


def _grid_weights(steps: Sequence[int]) -> np.ndarray:
    """How much of the training each checkpoint stands for, summing to 1: trapezoid rule."""
    if len(steps) < 2 or steps[0] == steps[-1]:
        return np.full(len(steps), 1.0 / len(steps))
    gaps = np.diff(np.asarray(steps, dtype=np.float64))
    return (np.append(gaps, 0.0) + np.insert(gaps, 0, 0.0)) / (2.0 * gaps.sum())


def _angle_errors(first: np.ndarray, second: np.ndarray, weights: np.ndarray, errors: np.ndarray) -> list[float | None]:
    """Degrees by which rounding moves the angle between first @ theta and second @ theta, both (n, K) in terms of the checkpoints.

    Rounding adds independent noise of length e_t to theta_t, so an inner product is off by sum_t first_t second_t e_t^2, expected.
    Taking that off gives the angle before rounding, or None where there is nothing left of a length.
    """
    inner = np.einsum("ni,ij,nj->n", first, weights, second) - (first * second) @ errors**2
    squares = [np.einsum("ni,ij,nj->n", a, weights, a) for a in (first, second)]
    observed = np.einsum("ni,ij,nj->n", first, weights, second) / np.sqrt(np.maximum(squares[0] * squares[1], 1e-300))
    left = [square - a**2 @ errors**2 for square, a in zip(squares, (first, second), strict=True)]
    with np.errstate(divide="ignore", invalid="ignore"):
        before = np.where((left[0] > 0) & (left[1] > 0), inner / np.sqrt(left[0] * left[1]), np.nan)
        before = np.where(np.abs(before) > 1 + 1e-6, np.nan, before)
    return [number_or_none(x) for x in np.abs(np.degrees(np.arccos(np.clip(before, -1, 1)) - np.arccos(np.clip(observed, -1, 1))))]


def _principal_components(displacements: np.ndarray) -> dict[str, Any]:
    """From <Delta_i, Delta_j>, i, j >= 1: moving the origin to theta_0 changes no principal component."""
    count = len(displacements) + 1
    gram = np.zeros((count, count))
    gram[1:, 1:] = displacements
    centring = np.eye(count) - 1.0 / count
    variances, vectors = np.linalg.eigh(centring @ gram @ centring)
    variances, vectors = np.maximum(variances[::-1], 0.0), vectors[:, ::-1]
    total = variances.sum()
    if total <= 0:
        return {"participation_ratio": None, "principal_components": None}
    coordinates = vectors[:, :3] * np.sqrt(variances[:3])
    coordinates *= np.where(coordinates[-1] < 0, -1.0, 1.0)
    shares = variances[: min(10, count - 1)] / total
    return {
        "participation_ratio": float(total**2 / (variances**2).sum()),
        "principal_components": {"shares": shares.tolist(), "coordinates": coordinates.tolist()},
    }


def null_values(steps: int | Sequence[int]) -> dict[str, dict[str, float]]:
    """What two trajectories without structure would give, at these training steps (or at so many evenly spaced ones).

    An isotropic random walk in many dimensions, with steps of one size, has |Delta_t|^2 = t and cos(Delta_s, Delta_t) = sqrt(s / t);
    on an even grid its omega_relative tends to 2/3 as K grows, and its first principal component to a share of 6 / pi^2.
    """
    steps = list(range(steps)) if isinstance(steps, int) else list(steps)
    s = np.asarray(steps[1:], dtype=np.float64) - steps[0]
    cosines = np.sqrt(np.minimum.outer(s, s) / np.maximum.outer(s, s))
    grid = _grid_weights(steps[1:])
    walk, line = (_principal_components(g) for g in (np.minimum.outer(s, s), np.outer(s, s)))
    return {
        "straight_line": {
            "omega_relative": 1.0,
            "omega_relative_grid": 1.0,
            "straightness": 1.0,
            "consecutive_update_angle": 0.0,
            "participation_ratio": line["participation_ratio"],
        },
        "random_walk": {
            "omega_relative": float(cosines.mean()),
            "omega_relative_many_checkpoints": 2 / 3,
            "omega_relative_grid": float(grid @ cosines @ grid),
            "straightness": float(math.sqrt(s[-1]) / np.sqrt(np.diff(steps)).sum()),
            "consecutive_update_angle": 90.0,
            "participation_ratio": walk["participation_ratio"],
        },
    }


# The order in which results list them.
_KIND_ORDER = (
    "embedding",
    "unembedding",
    "attention query, key and value",
    "attention query",
    "attention key",
    "attention value",
    "attention output",
    "mlp",
    "norms",
    "residual gains",
    "context pruning",
    "adapters",
)
_SCALARS = (
    "parameters",
    "omega",
    "omega_relative",
    "omega_relative_grid",
    "displacements",
    "length",
    "straightness",
    "participation_ratio",
    "mean_consecutive_update_angle",
)


def layer_of(name: str) -> int | None:
    """The block a parameter belongs to (`blocks.3.mlp.up.weight`, `model.layers.3...`, `transformer.h.3...`), or None."""
    match = re.search(r"(?:^|\.)(?:blocks|layers?|h)\.(\d+)\.", name)
    return int(match[1]) if match else None


# What a parameter does, by the words of its name: the first that fits. Common Hugging Face names are known too.
_KINDS = [
    ("context pruning", r"(^|\.)context_pruning\."),
    ("adapters", r"(^|[._])lora_"),
    ("norms", r"norm|(^|[._])ln_?\w*(\.|$)"),
    ("residual gains", r"gain"),
    ("attention query", r"\[query\]$"),
    ("attention key", r"\[key\]$"),
    ("attention value", r"\[value\]$"),
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
    """What a parameter does: one of `_KIND_ORDER`, or other."""
    return next((kind for kind, pattern in _KINDS if re.search(pattern, name)), "other")


def analyze_trajectory(
    run: Run,
    memory_megabytes: float = 512,
    verify: bool = True,
    progress: bool = True,
    keep: Path | None = None,
    ranks: Ranks | None = None,
    every: int | None = None,
    heads: Heads | None = None,
) -> dict[str, Any]:
    """What trajectory.json holds, on every rank.

    Args:
        verify: compare checksums first, the checkpoints shared between the ranks.
        every: only the checkpoints whose step divides by this.
        keep, ranks, heads: as `increment_grams` takes them.

    Raises:
        InputError: as `increment_grams` does; damaged files; two checkpoints of one step.
    """
    ranks = ranks or Ranks()
    checkpoints = run.open(verify=False, every=every)
    problem = None
    try:
        verify_checkpoints(checkpoints[ranks.rank :: ranks.count] if verify else [], progress and ranks.is_first)
    except InputError as error:
        problem = error
    ranks.raise_together(problem)
    steps = [checkpoint.step for checkpoint in checkpoints]
    twice = next((a for a, b in pairwise(checkpoints) if a.step == b.step), None)
    if twice is not None:
        raise InputError(
            f"{run.path}: two checkpoints of step {twice.step}, {twice.path.name} among them; where the files do not say their step, "
            "end their names with it: step1000, 1000.safetensors"
        )
    heads = heads or heads_of(checkpoints[0])
    grams = {name: gram.numpy() for name, gram in increment_grams(checkpoints, memory_megabytes, progress, keep, ranks, heads).items()}
    parts = (part for name in checkpoints[0].shapes for part in parts_of(checkpoints[0], name, heads))
    sizes = {part: sum(stop - start for start, stop in runs) for part, runs in parts}
    rounding = [_ROUNDING[checkpoint.precision] for checkpoint in checkpoints]

    def summary(names: Sequence[str]) -> dict[str, Any]:
        total = np.sum([grams[name] for name in names], axis=0)
        return {"parameters": sum(sizes[name] for name in names), **summarize(total, rounding, steps)}

    def short_summary(names: Sequence[str]) -> dict[str, Any]:
        found = summary(names)
        angles = [angle for angle in found["consecutive_update_angles"] if angle is not None]
        found["mean_consecutive_update_angle"] = float(np.mean(angles)) if angles else None
        return {key: found[key] for key in _SCALARS}

    layers = sorted({layer for name in grams if (layer := layer_of(name)) is not None})
    kinds = [kind for kind in [*_KIND_ORDER, "other"] if any(kind_of(name) == kind for name in grams)]
    return {
        "format": 1,
        "verb": "trajectory",
        "run": run.name,
        "path": str(run.path),
        "definitions": DEFINITIONS,
        "null_values": null_values(steps),
        "steps": steps,
        "starts_at_initialisation": steps[0] == 0,
        "evenly_spaced": len(set(np.diff(steps).tolist())) == 1,
        "checkpoints": [
            {
                "path": str(c.path),
                "step": c.step,
                "format": c.format,
                "zero_stage": c.zero_stage,
                "ranks": c.world_size,
                "precision": c.precision,
            }
            for c in checkpoints
        ],
        "tied": checkpoints[0].aliases,
        "frozen": sorted(checkpoints[0].frozen),
        "heads": [heads.heads, heads.kv_heads] if heads else None,
        "fused": [name for name in grams if kind_of(name) == "attention query, key and value"],
        "network": summary(list(grams)),
        "layers": {str(layer): summary([n for n in grams if layer_of(n) == layer]) for layer in layers},
        "kinds": {kind: summary([n for n in grams if kind_of(n) == kind]) for kind in kinds},
        "layers_by_kind": {
            str(layer): {
                kind: short_summary(names)
                for kind in kinds
                if (names := [name for name in grams if layer_of(name) == layer and kind_of(name) == kind])
            }
            for layer in layers
        },
        "tensors": {name: short_summary([name]) for name in grams},
    }


def describe(result: dict[str, Any]) -> str:
    """The result in a few lines for the terminal, null values beside."""
    network, nulls = result["network"], result["null_values"]
    walk, line = nulls["random_walk"], nulls["straight_line"]
    angles = [angle for angle in network["consecutive_update_angles"] if angle is not None]
    mean_angle = f"{sum(angles) / len(angles):.1f}" if angles else "-"
    errors = [error for error in network["consecutive_update_angle_errors"] if error is not None]
    rounding = f", rounding moves it by about {max(errors):.2g}" if errors else ""
    lines = [
        f"{result['run']}: {len(result['steps'])} checkpoints, steps {result['steps'][0]} to {result['steps'][-1]}, "
        f"{network['parameters']:,} parameters",
        f"  mean directional similarity  from the origin {_text(network['omega'])} (off-diagonal {_text(network['omega_off_diagonal'])})",
        f"                               from the start  {_text(network['omega_relative'])}"
        f"   [straight line {line['omega_relative']:.0f}, random walk {walk['omega_relative']:.3f}"
        f"{', with many checkpoints 2/3' if result['evenly_spaced'] else ''}]",
    ]
    unmoved = len(result["steps"]) - 1 - network["displacements"]
    if 0 < unmoved < len(result["steps"]) - 1:
        lines.append(f"    {unmoved} of them equal to the first, and left out of the mean from the start")
    if not result["evenly_spaced"]:
        lines.append(
            f"    weighted by training steps {_text(network['omega_grid'])} and {_text(network['omega_relative_grid'])}"
            f"   [random walk {walk['omega_relative_grid']:.3f} from the start]"
        )
    lines += [
        f"  straightness {_text(network['straightness'])}   [straight line 1, random walk {walk['straightness']:.3f}]",
        f"  mean angle between consecutive updates {mean_angle} degrees{rounding}   [straight line 0, random walk 90]",
        f"  participation ratio {_text(network['participation_ratio'])}   [straight line 1, random walk {walk['participation_ratio']:.2f}]",
    ]
    unreliable = sum(ratio is not None and ratio > 0.3 for ratio in network["rounding_ratios"])
    if unreliable:
        lines.append(f"  {unreliable} updates drown in the rounding of the stored weights: their angles say nothing")
    if result["fused"]:
        lines.append(f"  query, key and value stay together in {len(result['fused'])} tensors: give their heads with --heads")
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
    return [number_or_none(x) for x in np.degrees(np.arccos(np.clip(cosines, -1.0, 1.0)))]


def _text(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"
