"""Outlier features: how unevenly the channels of the residual stream are used, layer by layer, over a run's checkpoints.

The measures are those of "Understanding and Minimising Outlier Features in Transformer Training" (arXiv 2405.19279), section 2,
taken where the paper takes them for its CodeParrot models: on the residual stream entering attention of each layer, and on the
input of the unembedding. Kurtosis here is not the textbook's: equal channels give 1, not 3.
"""

from __future__ import annotations

import math
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from analysis.decoders import Decoder, Pretrained, Projections, build_model, projection_groups, run_decoder, watch
from analysis.outlier_neurons import MassiveActivations, NeuronEnergies, OutlierFeatures, Thresholds, watch_projections
from analysis.runs import Run
from analysis.tokens import check_vocabulary, held_out_tokens
from model.errors import InputError

DEFINITIONS = {
    "place": "`layer i`: the residual stream entering attention of block i, before any norm; `unembedding`: the input of the unembedding",
    "X": "activations at a place, n positions x d channels; s_j = sqrt(mean over positions of X_aj^2), without centring",
    "kurtosis": "mean_j(s_j^4) / mean_j(s_j^2)^2 (Eq 1): positions are summed first; from 1 (all channels alike) to d (one channel alone)",
    "kurtosis_minus_one": "kurtosis - 1, what the paper's log-scale figures show",
    "max_median_ratio_mean": "mean over positions of max_j |X_aj| / median_j |X_aj| (Eq 2); of an even d the median averages two",
    "max_median_ratio_max": "the largest of these ratios over all positions",
    "activation_rms": "sqrt(mean over positions and channels of X^2)",
    "neurons": "at each place the neurons with the largest s_j: rms is s_j, share is s_j^2 over the sum of all s^2",
    "massive_activations": "values with |a| > massive_magnitude and >= massive_ratio times the median magnitude of their sequence at that "
    "place (arXiv 2402.17762): how many, and the largest value of all, with its position in the sequence, neuron and ratio to the median",
    "outlier_features": "dimensions with |x| >= feature_magnitude in at least feature_layers of the layers and at feature_positions of the "
    "positions (arXiv 2208.07339): `residual`, what query, key, value and the MLP's expansion read; `heads`, what the output projection "
    "reads. A layer counts when one position reaches it, a position when one layer does",
    "loss": "mean cross-entropy over these tokens, nats per token, of the model as read from the checkpoint",
}


class ActivationMoments:
    """Sums over positions from which the measures follow exactly, whatever the split into batches. float64."""

    def __init__(self) -> None:
        self.positions = 0
        self.squares: Tensor | float = 0.0  # (d,), sum over positions of X_aj^2
        self.ratio_sum = 0.0
        self.ratio_max = 0.0

    def add(self, x: Tensor) -> None:
        """x (..., d), any dtype; leading dimensions are positions."""
        x = x.detach().reshape(-1, x.shape[-1])
        self.positions += x.shape[0]
        self.squares = self.squares + x.double().square().sum(dim=0).cpu()
        width, lower, upper = x.shape[1], (x.shape[1] - 1) // 2, x.shape[1] // 2
        ordered = np.partition(x.abs().float().cpu().numpy(), sorted({lower, upper, width - 1})).astype(
            np.float64
        )  # half the cost of sorting
        ratios = ordered[:, -1] / np.maximum((ordered[:, lower] + ordered[:, upper]) / 2, np.finfo(np.float32).tiny)
        self.ratio_sum += float(ratios.sum())
        self.ratio_max = max(self.ratio_max, float(ratios.max()))

    def measures(self) -> dict[str, float | None]:
        """The measures of `DEFINITIONS`; None where the activations are all zero or not finite."""
        mean_squares = torch.as_tensor(self.squares) / self.positions  # s_j^2
        second = mean_squares.mean()
        kurtosis = (mean_squares.square().mean() / second.square()).item()
        values = {
            "kurtosis": kurtosis,
            "kurtosis_minus_one": kurtosis - 1.0,
            "max_median_ratio_mean": self.ratio_sum / self.positions,
            "max_median_ratio_max": self.ratio_max,
            "activation_rms": second.sqrt().item(),
        }
        return {key: value if math.isfinite(value) else None for key, value in values.items()}


@torch.no_grad()
def measure(
    decoder: Decoder,
    tokens: Tensor,
    thresholds: Thresholds | None = None,
    groups: list[Projections] | None = None,
    top: int = 5,
    batch_tokens: int = 8192,
) -> dict[str, Any]:
    """The measures at every place, the largest neurons, and the loss, over sequences of tokens (sequences, length + 1), int64.

    Args:
        groups: which maps LLM.int8()'s outlier features are looked for in; None: they are not.

    Returns:
        {"places": {place: measures}, "neurons": {place: the `top` largest}, "massive_activations": {place: counts},
         "outlier_features": as `OutlierFeatures.measures`, or None, "loss": nats per token}
    """
    thresholds = thresholds or Thresholds()
    moments: dict[str, ActivationMoments] = {}
    energies: dict[str, NeuronEnergies] = {}
    massive: dict[str, MassiveActivations] = {}
    features = OutlierFeatures(len(decoder.layers), thresholds)

    def look(place: str, x: Tensor) -> None:
        moments.setdefault(place, ActivationMoments()).add(x)
        energies.setdefault(place, NeuronEnergies()).add(x)
        massive.setdefault(place, MassiveActivations(thresholds)).add(x)

    length, loss = tokens.shape[1] - 1, 0.0
    with watch(decoder, look), watch_projections(decoder, groups or [], features):
        for batch in tokens.split(max(1, batch_tokens // length)):
            logits = decoder.logits(batch[:, :-1]).float()
            loss += F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten().to(logits.device), reduction="sum").item()
            features.end_batch()
    loss /= tokens.shape[0] * length
    return {
        "places": {place: sums.measures() for place, sums in moments.items()},
        "neurons": {place: sums.top(top) for place, sums in energies.items()},
        "massive_activations": {place: found.measures() for place, found in massive.items()},
        "outlier_features": features.measures() if groups else None,
        "loss": loss if math.isfinite(loss) else None,
    }


def analyze_outliers(
    source: Run | Pretrained,
    tokens: int = 8192,
    data: list[str] | None = None,
    thresholds: Thresholds | None = None,
    top: int = 5,
    verify: bool = True,
    progress: bool = True,
) -> dict[str, Any]:
    """What outliers.json holds: the measures for every checkpoint of the run, or for a pretrained model, on the same tokens.

    Raises:
        InputError: damaged checkpoints, no model_config.json, no data, or tokens outside the model's vocabulary.
    """
    for name, value in (("tokens", tokens), ("top", top)):
        if value < 1:
            raise InputError(f"--{name} {value}: expected a positive number")
    thresholds = thresholds or Thresholds()
    checkpoints = source.open(verify) if isinstance(source, Run) else []
    decoder = run_decoder(build_model(checkpoints[-1])) if isinstance(source, Run) else source.load()
    sequences, origin = held_out_tokens(source, data, tokens, decoder.sequence_length)
    check_vocabulary(sequences, decoder.vocab_size, origin)
    try:
        groups, refused = projection_groups(decoder, str(source.path)), None
    except InputError as error:  # the residual stream can be looked at all the same
        groups, refused = None, str(error)
    results = []
    for checkpoint in tqdm(checkpoints or [None], desc="outliers", unit="checkpoint", mininterval=1.0, disable=not progress):
        if checkpoint is not None:
            decoder = run_decoder(build_model(checkpoint))
            groups = projection_groups(decoder, str(source.path)) if groups else None
        step, precision = (checkpoint.step, checkpoint.precision) if checkpoint else (0, "fp32")
        results.append({"step": step, "precision": precision, **measure(decoder, sequences, thresholds, groups, top)})
    return {
        "format": 1,
        "verb": "outliers",
        "run": source.name,
        "path": str(source.path),
        "definitions": DEFINITIONS,
        "null_values": {"kurtosis": {"all channels alike": 1.0, "one channel alone": float(decoder.width)}},
        "thresholds": asdict(thresholds),
        "outlier_features_refused": refused,
        "data": origin,
        "tokens": sequences.shape[0] * (sequences.shape[1] - 1),
        "sequence_length": sequences.shape[1] - 1,
        "width": decoder.width,
        "places": list(results[0]["places"]),
        "steps": [result["step"] for result in results],
        "checkpoints": results,
    }


def largest_kurtosis(result: dict[str, Any]) -> tuple[float | None, str, int]:
    """(kurtosis, place, step) where it is largest over the run; (None, "", 0) when it is nowhere defined."""
    found = [
        (measures["kurtosis"], place, checkpoint["step"])
        for checkpoint in result["checkpoints"]
        for place, measures in checkpoint["places"].items()
        if measures["kurtosis"] is not None
    ]
    return max(found) if found else (None, "", 0)


def describe(result: dict[str, Any]) -> str:
    """The result in a few lines for the terminal."""
    peak, place, step = largest_kurtosis(result)
    last = result["checkpoints"][-1]
    finals = [(measures["kurtosis"], at) for at, measures in last["places"].items() if measures["kurtosis"] is not None]
    lines = [f"{result['run']}: {len(result['steps'])} checkpoints, {result['tokens']:,} tokens, width {result['width']}"]
    if peak is not None:
        lines.append(f"  largest kurtosis {peak:.2f} at {place}, step {step}   [all channels alike 1, one channel alone {result['width']}]")
    if finals:
        lines.append(f"  at the last step {max(finals)[0]:.2f} at {max(finals)[1]}; loss on these tokens {last['loss']:.4f} nats")
    layers = [place for place in result["places"] if place != "unembedding"]
    largest = sorted(((neuron, place) for place in layers for neuron in last["neurons"][place]), key=lambda pair: -pair[0]["share"])
    for neuron, place in largest[:5]:
        lines.append(f"  {place}, neuron {neuron['neuron']}: s_j {neuron['rms']:.3g}, share of the layer's energy {neuron['share']:.3f}")
    massive = {place: found["count"] for place, found in last["massive_activations"].items() if found["count"]}
    lines.append(f"  massive activations: {', '.join(f'{count} at {place}' for place, count in massive.items()) or 'none'}")
    if result["outlier_features_refused"]:
        lines.append(f"  outlier features of LLM.int8(): not looked for: {result['outlier_features_refused']}")
    else:
        for kind, found in last["outlier_features"].items():
            names = [
                f"{one['dimension']} ({one['layers']:.0%} of layers, {one['positions']:.0%} of positions)" for one in found["features"][:6]
            ]
            more = f" and {len(found['features']) - 6} more" if len(found["features"]) > 6 else ""
            largest_value = f"largest magnitude {found['largest']:.3g}"
            lines.append(f"  outlier features of LLM.int8() in {kind}: {', '.join(names) + more if names else 'none'}; {largest_value}")
    return "\n".join(lines)
