"""The last optimizer step, rebuilt from one checkpoint: Adam's moments say what it was, up to float32's rounding.

With m, v the moments after step t, eta the learning rate, lambda the weight decay (AdamW, arXiv 1711.05101):

    mhat = m / (1 - beta1^t),   vhat = v / (1 - beta2^t),   a = mhat / (sqrt(vhat) + epsilon)
    theta_(t-1) = (theta_t + eta a) / (1 - eta lambda),     u = theta_t - theta_(t-1) = -eta a - eta lambda theta_(t-1)

and v is an average of squared gradients: up to a factor the diagonal of the empirical Fisher matrix, a measure of curvature that
costs no data.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from analysis.checkpoint import AdamSettings, verify_checkpoints
from analysis.runs import Run, read_metrics
from analysis.shards import open_checkpoint
from analysis.trajectory import kind_of, layer_of
from model.errors import InputError

DEFINITIONS = {
    "u": "the last update, theta_t - theta_(t-1), rebuilt from Adam's moments and settings; weight decay is part of it",
    "m, v": "Adam's first and second moment (exp_avg, exp_avg_sq); mhat, vhat without their bias towards zero",
    "update_norm": "|u|",
    "relative_update": "|u| / |theta|",
    "decay_share": "|weight decay's part of u| / |u|",
    "angle_to_weights": "degrees between u and theta: below 90 the weights grow, above they shrink",
    "angle_to_displacement": "degrees between u and theta - theta_0; null without a first checkpoint at step 0",
    "sign_like": "share of coordinates with |mhat| > 0.9 sqrt(vhat): gradients agree so well that Adam steps by their sign",
    "update_rms_over_learning_rate": "root mean square of u without decay / learning rate: 1 for sign descent",
    "curvature": "mean of vhat: the mean squared gradient, Fisher's diagonal up to a factor of the batch size",
    "curvature_percentiles": "log10 of vhat's 1st, 10th, 50th, 90th and 99th percentile (of a histogram with bins of 0.02)",
    "curvature_participation": "(sum vhat)^2 / (n sum vhat^2): 1 when all coordinates carry the same curvature, 1/n for a single one",
    "learning_rate": "of the step that was taken: from metrics.jsonl where the run has it, else from the optimizer's own state, which a "
    "schedule that stepped before saving has already moved on",
}
_BINS = np.linspace(-40, 10, 2501)  # log10 of vhat


class StepSums:
    """Sums over coordinates from which every number of `DEFINITIONS` follows. float64."""

    def __init__(self) -> None:
        self.parameters = 0
        self.sums: dict[str, float] = {}
        self.histogram = np.zeros(len(_BINS) + 1)

    def add(self, theta: torch.Tensor, m: torch.Tensor, v: torch.Tensor, start: torch.Tensor | None, settings: AdamSettings) -> None:
        """1-D float32 pieces of one parameter, of equal length; `start` is theta_0."""
        update, decay, second = last_step(theta.double(), m.double(), v.double(), settings)
        theta64 = theta.double()
        first = m.double().abs() / (1 - settings.betas[0] ** settings.step)
        self.parameters += theta.numel()
        values = {
            "uu": update @ update,
            "dd": decay @ decay,
            "uw": update @ theta64,
            "ww": theta64 @ theta64,
            "aa": (update - decay).square().sum() / settings.learning_rate**2 if settings.learning_rate else torch.tensor(0.0),
            "sign": (first > 0.9 * second.sqrt()).sum(),
            "v": second.sum(),
            "vv": second @ second,
        }
        if start is not None:
            displacement = theta64 - start.double()
            values |= {"ud": update @ displacement, "displacement": displacement @ displacement}
        for key, value in values.items():
            self.sums[key] = self.sums.get(key, 0.0) + float(value)
        logs = torch.log10(second.clamp(min=1e-40)).numpy()
        self.histogram += np.bincount(np.searchsorted(_BINS, logs), minlength=len(_BINS) + 1)

    def merge(self, other: StepSums) -> None:
        self.parameters += other.parameters
        for key, value in other.sums.items():
            self.sums[key] = self.sums.get(key, 0.0) + value
        self.histogram += other.histogram

    def measures(self) -> dict[str, Any]:
        """The numbers of `DEFINITIONS`; None where undefined."""
        s, n = self.sums, self.parameters
        cumulative = np.cumsum(self.histogram) / max(self.histogram.sum(), 1)
        places = [_BINS[min(int(np.searchsorted(cumulative, q)), len(_BINS) - 1)] for q in (0.01, 0.1, 0.5, 0.9, 0.99)]
        return {
            "parameters": n,
            "update_norm": math.sqrt(s["uu"]),
            "relative_update": _ratio(math.sqrt(s["uu"]), math.sqrt(s["ww"])),
            "decay_share": _ratio(math.sqrt(s["dd"]), math.sqrt(s["uu"])),
            "angle_to_weights": _angle(s["uw"], s["uu"], s["ww"]),
            "angle_to_displacement": _angle(s["ud"], s["uu"], s["displacement"]) if "ud" in s else None,
            "sign_like": s["sign"] / n,
            "update_rms_over_learning_rate": math.sqrt(s["aa"] / n),
            "curvature": s["v"] / n,
            "curvature_percentiles": [round(float(place), 2) for place in places],
            "curvature_participation": _ratio(s["v"] ** 2, n * s["vv"]),
        }


def last_step(
    theta: torch.Tensor, m: torch.Tensor, v: torch.Tensor, settings: AdamSettings
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(u, weight decay's part of u, vhat) of AdamW, elementwise, in the dtype of theta."""
    rate, decay = settings.learning_rate, settings.weight_decay
    second = v / (1 - settings.betas[1] ** settings.step)
    direction = m / (1 - settings.betas[0] ** settings.step) / (second.sqrt() + settings.epsilon)
    before = (theta + rate * direction) / (1 - rate * decay)
    return -rate * direction - rate * decay * before, -rate * decay * before, second


def analyze_step(run: Run, verify: bool = True, progress: bool = True, piece: int = 1 << 20) -> dict[str, Any]:
    """What step.json holds: the last step of the run's last checkpoint, `piece` elements in memory at a time.

    Raises:
        InputError: no Adam state in the files; the optimizer is Adam with decay in the gradient, which hides in the moments.
    """
    paths = run.oldest_first()
    checkpoint, first = open_checkpoint(paths[-1]), open_checkpoint(paths[0]) if len(paths) > 1 else None
    first = first if first is not None and first.step == 0 and first.shapes == checkpoint.shapes else None
    if verify:
        verify_checkpoints(filter(None, (checkpoint, first)))
    recorded = next((r["learning_rate"] for r in read_metrics(run) if r.get("step") == checkpoint.step and "learning_rate" in r), None)
    trained = [name for name in checkpoint.shapes if name not in checkpoint.frozen]
    sums: dict[str, StepSums] = {}
    rates: set[float] = set()
    with tqdm(
        total=sum(checkpoint.shapes[n].numel() for n in trained), unit="element", unit_scale=True, desc="step", disable=not progress
    ) as bar:
        for name in trained:
            settings = checkpoint.adam_settings(name)
            if recorded is not None:
                settings = settings._replace(learning_rate=float(recorded) * settings.learning_rate_factor)
            rates.add(settings.learning_rate)
            sums[name] = StepSums()
            for start in range(0, checkpoint.shapes[name].numel(), piece):
                buffers = torch.empty(4, min(piece, checkpoint.shapes[name].numel() - start))
                for row, kind in zip(buffers, ("weight", "exp_avg", "exp_avg_sq"), strict=False):
                    checkpoint.read(name, start, row, kind)
                if first is not None:
                    first.read(name, start, buffers[3])
                sums[name].add(buffers[0], buffers[1], buffers[2], buffers[3] if first is not None else None, settings)
                bar.update(buffers.shape[1])
    if not all(math.isfinite(value) for total in sums.values() for value in total.sums.values()):
        raise InputError(f"{checkpoint.path}: weights or moments that are not finite, `python -m analysis inspect` names them")
    layers = sorted({layer for name in trained if (layer := layer_of(name)) is not None})
    return {
        "format": 1,
        "verb": "step",
        "run": run.name,
        "path": str(checkpoint.path),
        "step": checkpoint.step,
        "definitions": DEFINITIONS,
        "learning_rates": sorted(rates),
        "learning_rate_from": "metrics.jsonl" if recorded is not None else "the optimizer's state",
        "network": _measure(sums, trained),
        "layers": {str(layer): _measure(sums, [n for n in trained if layer_of(n) == layer]) for layer in layers},
        "kinds": {kind: _measure(sums, [n for n in trained if kind_of(n) == kind]) for kind in dict.fromkeys(map(kind_of, trained))},
        "tensors": {name: sums[name].measures() for name in trained},
    }


def _measure(sums: dict[str, StepSums], names: list[str]) -> dict[str, Any]:
    total = StepSums()
    for name in names:
        total.merge(sums[name])
    return total.measures()


def describe(result: dict[str, Any]) -> str:
    """The result in a few lines for the terminal."""
    network = result["network"]
    lines = [
        f"{result['run']}: the step that ended at {result['step']}, rebuilt from Adam's moments; learning rate "
        f"{', '.join(f'{rate:.3g}' for rate in result['learning_rates'])} (from {result['learning_rate_from']})",
        f"  |u| / |theta| {network['relative_update']:.3g}, weight decay {network['decay_share']:.1%} of |u|"
        if network["update_norm"]
        else "  the learning rate was 0: it moved nothing",
        f"  degrees from u to the weights {_text(network['angle_to_weights'])}, "
        f"to the displacement {_text(network['angle_to_displacement'])}",
        f"  sign-like coordinates {network['sign_like']:.1%}; mean squared gradient {network['curvature']:.3g}",
        "  kind                              |u|/|theta|   sign-like   log10 curvature, median",
    ]
    for kind, found in result["kinds"].items():
        median = found["curvature_percentiles"][2]
        lines.append(f"  {kind:32}  {found['relative_update'] or 0:11.3g}   {found['sign_like']:9.1%}   {median:8.1f}")
    return "\n".join(lines)


def _ratio(a: float, b: float) -> float | None:
    return a / b if b > 0 else None


def _angle(inner: float, first: float, second: float) -> float | None:
    if first <= 0 or second <= 0:
        return None
    return math.degrees(math.acos(max(-1.0, min(1.0, inner / math.sqrt(first * second)))))


def _text(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"
