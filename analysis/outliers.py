"""Outlier features: how unevenly the neurons of the residual stream are used, layer by layer, over a run's checkpoints.

`model/activation_statistics.py` says what is measured and where; training logs the same measures on its own batches.
"""

from __future__ import annotations

import math
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from analysis.decoders import Decoder, Pretrained, Projections, build_model, projection_groups, refilled, run_decoder, watch
from analysis.outlier_neurons import MassiveActivations, OutlierFeatures, Thresholds, top_neurons, watch_projections
from analysis.runs import Run
from analysis.tokens import check_vocabulary, held_out_tokens
from model import activation_statistics
from model.activation_statistics import ActivationMoments, add_to
from model.errors import InputError

DEFINITIONS = {
    **activation_statistics.DEFINITIONS,
    "neurons": "at each place the neurons with the largest s_j: rms is s_j, share is s_j^2 over the sum of all s^2",
    "massive_activations": "values with |a| > massive_magnitude and >= massive_ratio times the median magnitude of their sequence at that "
    "place (arXiv 2402.17762): how many, and the largest value of all, with its position in the sequence, neuron and ratio to the median",
    "outlier_features": "dimensions with |x| >= feature_magnitude in at least feature_layers of the layers and at feature_positions of the "
    "positions (arXiv 2208.07339): `residual`, what query, key, value and the MLP's expansion read; `heads`, what the output projection "
    "reads. A layer counts when one position reaches it, a position when one layer does",
    "loss": "mean cross-entropy over these tokens, nats per token, of the model as read from the checkpoint",
}


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
    massive: dict[str, MassiveActivations] = {}
    features = OutlierFeatures(len(decoder.layers), thresholds)

    def look(place: str, x: Tensor) -> None:
        add_to(moments, place, x)
        massive.setdefault(place, MassiveActivations(thresholds)).add(x)

    length, loss = tokens.shape[1] - 1, 0.0
    with watch(decoder, look), watch_projections(decoder, groups or [], features):
        for batch in tokens.split(max(1, batch_tokens // length)):
            loss += decoder.summed_loss(batch)
            features.end_batch()
    loss /= tokens.shape[0] * length
    return {
        "places": {place: sums.measures() for place, sums in moments.items()},
        "neurons": {place: top_neurons(sums, top) for place, sums in moments.items()},
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
        if checkpoint is not None and len(checkpoints) > 1:
            decoder = refilled(decoder, checkpoint)
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
    kurtosis = f"{max(finals)[0]:.2f} at {max(finals)[1]}" if finals else "kurtosis -"
    loss = "-" if last["loss"] is None else f"{last['loss']:.4f} nats"
    lines.append(f"  at the last step {kurtosis}; loss on these tokens {loss}")
    diverged = [checkpoint["step"] for checkpoint in result["checkpoints"] if checkpoint["loss"] is None]
    if diverged:
        lines.append(f"  diverged: activations that are not finite have no value: step {', '.join(map(str, diverged))}")
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
